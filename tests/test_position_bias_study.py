"""The study of position biases: its photos, its pairing, its arms and its figures, and a run from end to end."""

import argparse
import csv
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.logging import MMLogger

from swinv2_mm.engine import launch
from swinv2_mm.position_bias import POSITION_BIASES

ROOT = Path(__file__).parents[1]
KINDS = tuple(POSITION_BIASES)


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('compare_position_biases')


@pytest.fixture(scope='module')
def steps(load_tool):
    return load_tool('transfer_steps')


@pytest.fixture(scope='module')
def plans(load_tool):
    return load_tool('transfer_plan')


@pytest.fixture(scope='module')
def photos_tool(load_tool):
    return load_tool('photos')


@pytest.fixture(scope='module')
def report(load_tool):
    return load_tool('transfer_report')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Photos of two classes, 24 pixels and more: bright above or bright on the left."""
    root, generator = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for split, number in (('train', 9), ('val', 5)):
        for name in ('above', 'left'):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                photo = generator.integers(0, 100, (24, 24 + i, 3), np.uint8)
                photo[:8] += np.uint8(100 * (name == 'above'))
                photo[:, :8] += np.uint8(100 * (name == 'left'))
                cv2.imwrite(str(folder / f'{i}.png'), photo)
    return root


@pytest.fixture(scope='module')
def photos(photos_tool, root):
    return {split: photos_tool.read_photos(root, split, 24) for split in ('train', 'val')}


@pytest.fixture(scope='module')
def settings(plans, root):
    """Maps of 8 and 4 tokens in training, windows of 4."""
    return plans.Settings(
        data_root=str(root),
        photo_size=24,
        image_size=16,
        window_size=4,
        patch_size=2,
        embed_dims=8,
        depths=(1, 2),
        num_heads=(1, 2),
        batch_size=6,
        lr=1e-2,
        mlp_lr_mult=1.0,
        table_lr_mult=1.0,
        finetune_iters=2,
        finetune_lr=1e-3,
        ratios=(1.5, 2.0),
        grids=(2,),
    )


@pytest.fixture
def classifier(steps, plans, settings, randomize):
    """A classifier with random weights for a condition, in evaluation mode."""

    def classifier(condition, kind='log_cpb'):
        model = steps.build(settings, kind, 2, condition)
        return randomize(model).eval()

    return classifier


def write(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))


# Photos.


def test_a_photo_is_its_middle_square_at_one_size(photos_tool, tmp_path):
    for name in 'ab':
        write(tmp_path / f'val/{name}/x/photo.PNG', (10, 14))  # of 10 x 10 after two columns on each side
    found = photos_tool.read_photos(tmp_path, 'val', 5)
    whole = cv2.imread(str(tmp_path / 'val/a/x/photo.PNG'))[:, 2:12].astype(float)
    means = whole.reshape(5, 2, 5, 2, 3).mean((1, 3))  # every pixel is the mean of four
    assert np.abs(found.pixels[0] - means).max() <= 0.5
    assert (found.classes, found.labels.tolist(), found.enlarged) == (('a', 'b'), [0, 1], 0)


def test_photos_that_are_smaller_are_enlarged_and_counted(photos_tool, tmp_path):
    write(tmp_path / 'val/a/small.png', (4, 9))
    write(tmp_path / 'val/b/large.png', (8, 9))
    found = photos_tool.read_photos(tmp_path, 'val', 6)
    assert (found.pixels.shape, found.enlarged) == ((2, 6, 6, 3), 1)


@pytest.mark.parametrize(
    'files, message',
    [
        ({}, r'has fewer than two folders: photos must lie at \S+/val/CLASS'),
        ({'a/photo.png': b''}, 'has fewer than two folders'),
        ({'a/photo.png': None, 'b/notes.txt': b'x'}, r'val/b has no photo: add some that end in .*\.png'),
        ({'a/photo.png': None, 'b/photo.png': b'not an image'}, r'b/photo.png cannot be read as an image: remove it'),
    ],
    ids=['none', 'one class', 'empty class', 'damaged'],
)
def test_folders_that_cannot_be_read_are_named(photos_tool, tmp_path, files, message):
    for name, contents in files.items():
        path = tmp_path / 'val' / name
        write(path, (8, 8)) if contents is None else path.parent.mkdir(parents=True, exist_ok=True)
        if contents is not None:
            path.write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        photos_tool.read_photos(tmp_path, 'val', 6)


def test_random_crops_stay_in_the_photo_and_show_as_much_as_they_should(photos_tool):
    photo = np.stack(np.meshgrid(np.arange(40), np.arange(40), [0]), -1)[:, :, 0].astype(np.uint8)  # x, y, 0
    np.random.seed(0)
    for _ in range(200):
        crop = photos_tool.random_crop(photo)
        height, width = crop.shape[:2]
        assert np.array_equal(crop[..., 0] - crop[0, 0, 0], np.tile(np.arange(width), (height, 1)))
        assert np.array_equal(crop[..., 1] - crop[0, 0, 1], np.tile(np.arange(height)[:, None], width))
        assert 0.3 <= height * width / 40**2 <= 1 and 0.7 <= width / height <= 1.43


def test_crops_are_mirrored_one_time_in_two(photos_tool):
    photo = np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (40, 1, 3))
    crops = photos_tool.RandomCrops(photos_tool.Photos(photo[None], np.array([1]), ('a', 'b'), 0), 20)
    np.random.seed(0)
    rows = [crops[0]['inputs'][0, 0].int() for _ in range(40)]
    assert 10 <= sum(int(row[-1] < row[0]) for row in rows) <= 30
    assert crops[0]['data_samples'] == 1


# What is trained and measured.


def test_the_plan_has_every_condition_once(plans, settings):
    at = plans.Condition
    on_canvas, enlarged = (
        [at(16, 8, 2), at(16, 4, 2)],
        [at(24, 6), at(24, 4), at(32, 8), at(32, 4), at(48, 12), at(48, 4)],
    )
    settings = settings._replace(ratios=(1.5, 2.0, 3.0))
    wider = [at(16, 6), at(16, 8)]  # maps of 8 tokens, so that a window of 12 would be one of 8
    early = [plans.Step(5), *(plans.Step(5, condition) for condition in [at(16, 4), *on_canvas, at(24, 6), at(32, 8)])]
    late = [plans.Step(20), *(plans.Step(20, c) for c in [at(16, 4), *on_canvas, *enlarged, *wider])]
    tuned = [plans.Step(20, condition, True) for condition in (at(16, 4), *on_canvas, *enlarged)]
    assert plans.plan(settings, 20, (5, 20, 40)) == early + late + tuned
    files = {step.file(plans.Path('run')) for step in early + late + tuned}
    assert len(files) == len(early + late + tuned)


def test_windows_are_no_larger_than_maps(plans, settings):
    assert plans.windows_at(settings, plans.Condition(16, 4)) == (4, 4)
    assert plans.windows_at(settings, plans.Condition(16, 6)) == (6, 4)  # maps of 8 and 4 tokens
    assert plans.windows_at(settings, plans.Condition(16, 16, 2)) == (16, 8)


def test_all_kinds_start_from_the_same_weights(steps, plans, settings):
    models = {kind: steps.from_scratch(settings, plans.Run(kind, 3), 2) for kind in KINDS}
    weights = {kind: dict(model.named_parameters()) for kind, model in models.items()}
    shared = set.intersection(*map(set, weights.values()))
    own = {kind: sorted(set(names) - shared) for kind, names in weights.items()}
    for kind in KINDS:
        assert own[kind] and all(POSITION_BIASES[kind].name in name for name in own[kind])
        assert all(torch.equal(weights[kind][name], weights['log_cpb'][name]) for name in shared)
    other = dict(steps.from_scratch(settings, plans.Run('log_cpb', 4), 2).named_parameters())
    assert not torch.equal(other['head.weight'], weights['log_cpb']['head.weight'])


class Batches(Hook):
    """Keeps the batches of training."""

    def __init__(self):
        self.batches = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.batches.append((data_batch['inputs'].clone(), data_batch['data_samples'].clone()))


@pytest.fixture
def trained_on(steps, settings, photos, tmp_path, monkeypatch):
    """The batches that a run is trained on."""

    def trained_on(run, epochs=2):
        kept = Batches()
        register = steps.SwinV2Runner.register_hooks

        def register_hooks(runner, *args, **kwargs):
            register(runner, *args, **kwargs)
            runner.register_hook(kept)

        with monkeypatch.context() as patch:
            patch.setattr(steps.SwinV2Runner, 'register_hooks', register_hooks)
            steps.train(settings, run, photos['train'], run.folder(tmp_path), epochs)
        return kept.batches

    return trained_on


def test_all_kinds_see_the_same_crops_in_the_same_batches(trained_on, plans):
    first = trained_on(plans.Run('log_cpb', 0))
    assert len(first) == 6  # two epochs of three batches
    assert not torch.equal(first[0][0], first[3][0])
    for kind in ('linear_cpb', 'parameterized'):
        for (inputs, labels), (others, their_labels) in zip(first, trained_on(plans.Run(kind, 0)), strict=True):
            assert torch.equal(inputs, others) and torch.equal(labels, their_labels)
    assert not torch.equal(first[0][0], trained_on(plans.Run('log_cpb', 1))[0][0])


def test_a_resumed_run_gives_the_same_numbers(steps, plans, settings, photos, tmp_path):
    run = plans.Run('log_cpb', 0)
    start = plans.training_condition(settings)
    outputs = []
    for name, counts in (('at once', (3,)), ('in parts', (1, 2, 3))):
        folder = tmp_path / name
        for count in counts:
            steps.carry_out(plans.Step(count), settings, run, folder, photos, 'cpu')
        steps.carry_out(plans.Step(3, start), settings, run, folder, photos, 'cpu')
        with np.load(plans.Step(3, start).file(folder)) as measured:
            outputs.append(dict(measured))
    assert outputs[0].keys() == outputs[1].keys() >= {'cross_entropy', 'correct', 'bias_std', 'bias_centre'}
    for name in outputs[0]:
        assert np.array_equal(outputs[0][name], outputs[1][name]), name


def test_what_is_measured_is_the_average_of_the_weights(steps, plans, settings, photos, tmp_path):
    run = plans.Run('parameterized', 0)
    steps.carry_out(plans.Step(1), settings, run, tmp_path, photos, 'cpu')
    initial = dict(steps.from_scratch(settings, run, 2).named_parameters())
    last = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['ema_state_dict']  # the plain weights are there
    measured = torch.load(tmp_path / 'after_1_epochs.pth', weights_only=True)['state_dict']
    moved, averaged = (
        sum((weights[name] - initial[name]).abs().sum() for name in initial)
        for weights in ({name[len('module.') :]: value for name, value in last.items()}, measured)
    )
    assert 0 < averaged < 0.1 * moved  # three iterations, each with a share of 0.005


# Where it is measured.


def plain_logits(model, pixels):
    """The logits of photos, one at a time, by the formula."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    logits = []
    for photo in pixels:
        image = torch.from_numpy(((photo[:, :, ::-1] - mean) / std).transpose(2, 0, 1)).float()
        logits.append(model.head(model.backbone(image[None])[-1].mean((2, 3)))[0])
    return torch.stack(logits)


@torch.no_grad()
def test_measuring_as_in_training_is_plain_evaluation(steps, plans, settings, photos, photos_tool, classifier):
    model, start = classifier(plans.training_condition(settings)), plans.training_condition(settings)
    pixels = np.stack([cv2.resize(photo, (16, 16), interpolation=cv2.INTER_AREA) for photo in photos['val'].pixels])
    found = steps.predict(model, photos['val'], start, 4)
    torch.testing.assert_close(found.logits, plain_logits(model, pixels), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.head(found.features), found.logits)


@torch.no_grad()
def test_on_a_canvas_every_photo_is_classified_by_its_own_part(steps, plans, photos, classifier):
    condition = plans.Condition(16, 8, 2)
    model = classifier(condition)
    found = steps.predict(model, photos['val'], condition, 6)  # ten photos: two canvases, and one that is filled up
    order = np.random.RandomState(0).permutation(10)
    pixels = [cv2.resize(photo, (16, 16), interpolation=cv2.INTER_AREA) for photo in photos['val'].pixels]
    for canvas in ([*order[:4]], [*order[4:8]], [*order[8:], *order[:2]]):
        a, b, c, d = (pixels[i] for i in canvas)
        image = np.vstack([np.hstack([a, b]), np.hstack([c, d])])
        inputs = model.data_preprocessor(dict(inputs=torch.from_numpy(image.transpose(2, 0, 1).copy())[None]))['inputs']
        [features] = model.backbone(inputs)[-1]  # (C, 8, 8), a quarter for each photo
        quarters = features[:, :4, :4], features[:, :4, 4:], features[:, 4:, :4], features[:, 4:, 4:]
        for i, quarter in zip(canvas if canvas[2] != order[0] else canvas[:2], quarters):
            torch.testing.assert_close(found.features[i], quarter.mean((1, 2)), rtol=1e-4, atol=1e-4)


def test_the_wrong_arm_has_the_wrong_window(steps, plans, settings, photos, tmp_path):
    run, moved = plans.Run('log_cpb', 0), plans.Condition(28, 7)
    steps.carry_out(plans.Step(1), settings, run, tmp_path, photos, 'cpu')
    weights = plans.Step(1).file(tmp_path)
    right, wrong = (steps.load(weights, settings, run, moved, is_wrong).backbone for is_wrong in (False, True))
    assert right.window_size == wrong.window_size == (7, 7)
    assert (right.pretrained_window_sizes, wrong.pretrained_window_sizes) == ((4, 4), (7, 7))
    own, right, wrong = (
        backbone.layers[1].blocks[1].attn.position_bias(7, 7)
        for backbone in (
            steps.load(weights, settings, run, plans.training_condition(settings), False).backbone,
            right,
            wrong,
        )
    )
    assert torch.equal(own, right)
    # normalised by 6 in place of 3, an offset of 2 d is taken for one of d
    torch.testing.assert_close(wrong[:, ::2, ::2], right[:, 3:10, 3:10])
    assert not torch.allclose(wrong, right)


@pytest.fixture(scope='module')
def trained(steps, plans, settings, photos, tmp_path_factory):
    """The folder of a run of log_cpb that has been trained for an epoch, with a position bias that matters."""
    folder = tmp_path_factory.mktemp('trained')
    steps.carry_out(plans.Step(1), settings, plans.Run('log_cpb', 0), folder, photos, 'cpu')
    file = plans.Step(1).file(folder)
    weights = torch.load(file, weights_only=True)
    for name, value in weights['state_dict'].items():
        if 'cpb_mlp' in name or 'norm' in name:
            torch.nn.init.normal_(value, std=0.5)
    torch.save(weights, file)
    return folder


def test_what_is_measured_is_that_of_both_arms_on_the_photos_of_validation(steps, plans, settings, photos, trained):
    run, moved = plans.Run('log_cpb', 0), plans.Condition(32, 8)
    steps.carry_out(plans.Step(1, moved), settings, run, trained, photos, 'cpu')
    pixels = np.stack([cv2.resize(photo, (32, 32), interpolation=cv2.INTER_CUBIC) for photo in photos['val'].pixels])
    labels = torch.from_numpy(photos['val'].labels)
    with np.load(plans.Step(1, moved).file(trained)) as measured:
        for prefix, wrong in (('', False), ('wrong_', True)):
            model = steps.load(plans.Step(1).file(trained), settings, run, moved, wrong).eval()
            with torch.no_grad():
                entropies = F.cross_entropy(plain_logits(model, pixels), labels, reduction='none')
            assert measured[f'{prefix}cross_entropy'] == pytest.approx(entropies.numpy(), rel=2e-5)
        assert measured['cross_entropy'] != pytest.approx(measured['wrong_cross_entropy'], rel=1e-4)
        assert measured['logit_change'].min() > 0
        steps.carry_out(plans.Step(1, moved, True), settings, run, trained, photos, 'cpu')
        with np.load(plans.Step(1, moved, True).file(trained)) as tuned:
            for name in ('cross_entropy', 'wrong_cross_entropy'):
                assert tuned[name] != pytest.approx(measured[name], rel=1e-4)


def test_a_run_that_is_trained_for_longer_cannot_be_measured_earlier(steps, plans, settings, photos, tmp_path):
    (tmp_path / 'epoch_4.pth').touch()
    with pytest.raises(ValueError, match='is trained for 4 epochs, and can be measured after 3 no more'):
        steps.carry_out(plans.Step(3), settings, plans.Run('log_cpb', 0), tmp_path, photos, 'cpu')


def test_the_learning_rates_are_those_of_the_settings(steps, plans, settings, photos, trained, monkeypatch):
    rates = []

    class Rates(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
            groups = runner.optim_wrapper.optimizer.param_groups
            rates.append({'cpb_mlp' in names[id(p)]: group['lr'] for group in groups for p in group['params']})

    register = steps.SwinV2Runner.register_hooks

    def register_hooks(runner, *args, **kwargs):
        register(runner, *args, **kwargs)
        runner.register_hook(Rates())

    monkeypatch.setattr(steps.SwinV2Runner, 'register_hooks', register_hooks)
    settings, run = settings._replace(mlp_lr_mult=4.0, table_lr_mult=30.0), plans.Run('log_cpb', 0)
    start = plans.training_condition(settings)
    model = steps.load(plans.Step(1).file(trained), settings, run, start, False)
    steps.finetune(model, settings, run, photos['train'], trained / 'finetuning', start)
    assert [rate[False] for rate in rates] == pytest.approx([1e-3, 5e-4])  # falls to 0 within two iterations
    assert [rate[True] for rate in rates] == pytest.approx([4e-3, 2e-3])
    table = steps.optim_wrapper(settings, plans.Run('parameterized', 0), 1.0)['paramwise_cfg']['custom_keys']
    assert table == {POSITION_BIASES['parameterized'].name: dict(lr_mult=30.0)}


@pytest.mark.parametrize('kind', KINDS)
def test_which_conditions_have_a_wrong_arm(plans, settings, kind):
    run = plans.Run(kind, 0)
    assert not plans.has_wrong_window(settings, run, plans.Condition(32, 4))
    assert plans.has_wrong_window(settings, run, plans.Condition(32, 8)) == (kind == 'log_cpb')


def test_fine_tuning_trains_at_the_condition(steps, plans, settings, photos, tmp_path):
    run, moved = plans.Run('log_cpb', 0), plans.Condition(16, 8, 2)
    steps.carry_out(plans.Step(1), settings, run, tmp_path, photos, 'cpu')
    model = steps.load(plans.Step(1).file(tmp_path), settings, run, moved, False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = []
    model.backbone.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    steps.finetune(model, settings, run, photos['train'], tmp_path / 'finetuning', moved)
    assert sizes == [(1, 3, 32, 32)] * 2  # batches of 6 photos fill one canvas of 4
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) == (name == 'backbone.pretrained_windows') for name in before)


# Figures.


def test_cross_entropy_and_hits_are_per_photo(steps):
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
    found = steps.losses_and_hits(steps.Outputs(torch.zeros(3, 1), logits), torch.tensor([0, 0, 1]))
    expected = [np.log1p(np.exp(-2.0)), np.log1p(np.exp(1.0)), np.log1p(np.exp(0.5))]
    assert found['cross_entropy'] == pytest.approx(expected, rel=1e-6)
    assert found['correct'].tolist() == [True, False, False]


def test_changes_are_relative_and_do_not_see_a_constant(steps):
    right = steps.Outputs(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, -1.0]]))
    wrong = steps.Outputs(torch.tensor([[3.0, 4.5]]), torch.tensor([[7.5, 4.5]]))  # 6 more, and the distance 3 for 2
    found = steps.changes(right, wrong)
    assert found['feature_change'] == pytest.approx([0.1])
    assert found['logit_change'] == pytest.approx([0.5])


def test_the_shape_of_a_bias_by_hand(steps, plans, settings):
    model = steps.build(settings._replace(window_size=8, image_size=32), 'parameterized', 2, plans.Condition(32, 8))
    tables = [block.attn.position_bias for stage in model.backbone.layers for block in stage.blocks]
    for bias in tables:
        torch.nn.init.normal_(bias.weight)
    found = steps.shape_of_biases(model.backbone)
    heads = []
    for bias in tables:
        for table in bias(8, 8).detach().double().numpy():  # (15, 15), offset 0 at 7
            squares = (table - table.mean()) ** 2
            near = sum(squares[y + 7, x + 7] for y in range(-3, 4) for x in range(-3, 4))
            heads.append((table.std(), near / squares.sum()))
    stds, shares = zip(*heads)
    assert found['bias_std'] == pytest.approx(stds, rel=1e-5) and found['bias_centre'] == pytest.approx(
        shares, rel=1e-5
    )


def test_the_bias_by_distance_by_hand(steps, plans, settings, randomize):
    model = steps.build(settings, 'linear_cpb', 2, plans.Condition(16, 8, 2))
    backbone = randomize(model.backbone)
    expected = []
    for block in (block for stage in backbone.layers for block in stage.blocks):
        for table in block.attn.position_bias(8, 8).detach().numpy():
            offsets = [(y, x) for y in range(-7, 8) for x in range(-7, 8)]
            expected.append(
                [np.mean([table[y + 7, x + 7] for y, x in offsets if max(abs(y), abs(x)) == d]) for d in range(8)]
            )
    assert steps.bias_by_distance(backbone) == pytest.approx(np.array(expected), rel=1e-5)


# The report.


@pytest.fixture
def measured(plans, tmp_path):
    """Two seeds of log_cpb and three of parameterized at one condition, and log_cpb at the condition of training."""
    generator = np.random.default_rng(0)
    values = {}
    for kind, seeds in (('log_cpb', (0, 1)), ('parameterized', (0, 1, 2))):
        for seed in seeds:
            values[kind, seed] = dict(cross_entropy=generator.random(30), correct=generator.random(30) < 0.5)
            if kind == 'log_cpb':
                wrong = values[kind, seed]['cross_entropy'] + 0.25 + 0.01 * generator.normal(size=30)
                values[kind, seed].update(wrong_cross_entropy=wrong, wrong_correct=np.zeros(30, bool))
                values[kind, seed].update(feature_change=np.full(30, 0.1), logit_change=np.full(30, 0.2))
            for step in (plans.Step(2, plans.Condition(32, 8, 1)), plans.Step(2, plans.Condition(16, 8, 2), True)):
                file = step.file(plans.Run(kind, seed).folder(tmp_path))
                file.parent.mkdir(parents=True, exist_ok=True)
                np.savez(file, **values[kind, seed])
    return values


def test_rows_are_means_over_seeds_and_paired_differences(report, plans, measured, tmp_path):
    rows = report.summarise(report.read_measurements(tmp_path), plans.Condition(32, 8, 1))
    assert len(rows) == 6
    first = {row.arm: row for row in rows if not row.finetuned}
    assert {row.place() for row in first.values()} == {(2, False, plans.Condition(32, 8, 1))}
    entropies = {key: value['cross_entropy'] for key, value in measured.items()}
    assert first['parameterized'].seeds == 3 and first['log_cpb'].seeds == 2
    assert first['log_cpb'].cross_entropy.mean == pytest.approx(np.mean([entropies['log_cpb', s] for s in (0, 1)]))
    assert first['log_cpb'].top1.mean == pytest.approx(
        100 * np.mean([measured['log_cpb', s]['correct'] for s in (0, 1)])
    )
    assert first['log_cpb'].cross_entropy_difference is None
    differences = [entropies['parameterized', s] - entropies['log_cpb', s] for s in (0, 1)]  # the seeds of both
    assert first['parameterized'].cross_entropy_difference == report.interval(np.stack(differences))
    wrong = first['log_cpb, wrong window']
    assert wrong.cross_entropy_difference.mean == pytest.approx(0.25, abs=0.01)
    assert wrong.cross_entropy_difference.half < 0.05  # paired: unpaired differences are of photos, up to 1
    assert (wrong.top1.mean, wrong.logit_change.mean, wrong.feature_change.mean) == (
        0,
        pytest.approx(0.2),
        pytest.approx(0.1),
    )


def test_the_csv_and_the_table_say_what_is_enlarged(report, plans, measured, tmp_path):
    rows = report.summarise(report.read_measurements(tmp_path), plans.Condition(32, 8, 1))
    report.write_csv(rows, tmp_path / 'results.csv', photo_size=24)
    with (tmp_path / 'results.csv').open() as file:
        written = list(csv.DictReader(file))
    assert [(row['image_size'], row['enlarged'], row['finetuned']) for row in written[::3]] == [
        ('32', '1', '0'),
        ('16', '0', '1'),
    ]
    for row, line in zip(rows, written, strict=True):
        assert float(line['top1']) == pytest.approx(row.top1.mean, rel=1e-5)
        assert float(line['cross_entropy_half']) == pytest.approx(row.cross_entropy.half, rel=1e-5)
    text = report.table(rows, 2, 24)
    assert '| parameterized, 3 seeds | log_cpb, 2 seeds |' in text
    lines = {line.split('|')[1].strip(): line for line in text.splitlines() if line.startswith('| ')}
    assert set(lines) == {'image', '32 enlarged', '16'}
    wrong = next(row for row in rows if row.arm == 'log_cpb, wrong window')
    assert f'({1000 * wrong.cross_entropy_difference.mean:+.0f} ± ' in lines['32 enlarged']


def test_what_moving_costs_is_compared_with_what_it_costs_the_reference(report, plans, tmp_path):
    start, moved = plans.Condition(16, 4), plans.Condition(32, 8)
    entropies = dict(log_cpb=(1.0, 1.5), parameterized=(1.2, 2.0))  # the table loses 0.8, and log_cpb 0.5
    for kind, of_kind in entropies.items():
        for condition, value in zip((start, moved), of_kind):
            file = plans.Step(1, condition).file(plans.Run(kind, 0).folder(tmp_path))
            file.parent.mkdir(parents=True, exist_ok=True)
            wrong = dict(wrong_cross_entropy=np.full(4, value + 0.1), wrong_correct=np.zeros(4, bool))
            wrong.update(logit_change=np.ones(4), feature_change=np.ones(4))
            has_wrong = kind == 'log_cpb' and condition == moved
            np.savez(file, cross_entropy=np.full(4, value), correct=np.zeros(4, bool), **(wrong if has_wrong else {}))
    rows = report.summarise(report.read_measurements(tmp_path), start)
    found = {row.arm: row.moving_difference.mean for row in rows if row.condition == moved and row.arm != 'log_cpb'}
    assert found == pytest.approx({'parameterized': 0.3, 'log_cpb, wrong window': 0.1})


def test_a_study_that_has_measured_little_is_reported(tool, plans, settings, tmp_path, capsys):
    file = plans.Step(3, plans.training_condition(settings)).file(plans.Run('log_cpb', 0).folder(tmp_path))
    file.parent.mkdir(parents=True)
    shape = dict(bias_std=np.ones(3), bias_centre=np.ones(3), bias_by_distance=np.random.rand(3, 8))
    np.savez(file, cross_entropy=np.ones(4), correct=np.ones(4, bool), **shape)
    tool.report(tmp_path, settings)
    assert '| 16 | 4 | 1 | no | 100.0 ± 0.0 |' in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob('*.png')) == ['biases.png']
    with pytest.raises(ValueError, match='nothing is measured in'):
        tool.report(tmp_path / 'empty', settings)


def test_all_work_is_done_when_all_files_are_there(plans, settings, tmp_path):
    runs, planned = [plans.Run(kind, 0) for kind in KINDS], plans.plan(settings, 4, (2,))
    work = plans.Work(settings, runs, planned, dict(train=18, val=10), tmp_path)
    assert work.done() == 0
    for run in runs:
        folder = run.folder(tmp_path)
        folder.mkdir()
        (folder / 'epoch_1.pth').touch()
    training = 3 * 18 * 16**2  # pixels of an epoch, three times
    assert work.done() == 3 * training
    for run in runs:
        (run.folder(tmp_path) / 'epoch_5.pth').touch()  # of an earlier call with more epochs
        for step in planned:
            step.file(run.folder(tmp_path)).parent.mkdir(exist_ok=True)
            step.file(run.folder(tmp_path)).touch()
    assert work.done() == work.total() > 3 * 4 * training


# From end to end.


@pytest.fixture(scope='module')
def study(tool, root, tmp_path_factory):
    """The folder of a small study, and its command line."""
    out = tmp_path_factory.mktemp('study')
    command = [str(root), '--out', str(out), '--seeds', '0', '--epochs', '2', '--curve', '1', '--ratios', '1.5']
    command += [
        '--grids',
        '2',
        '--finetune-iters',
        '1',
        '--photo-size',
        '24',
        '--image-size',
        '16',
        '--window-size',
        '4',
    ]
    command += ['--embed-dims', '8', '--depths', '1', '1', '--num-heads', '1', '2', '--batch-size', '6', '--jobs', '2']
    run_jobs = tool.run_jobs

    def run_one(jobs, *args):
        run_jobs(jobs[:1], *args)
        for job in jobs[1:]:  # in this process, without the seconds of importing
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, 'argv', list(job.command))
                assert tool.main() == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, 'run_jobs', run_one)
        patch.setattr(sys, 'argv', ['compare_position_biases.py', *command])
        assert tool.main() == 0
    return out, command


def test_a_study_leaves_table_and_plots(study):
    out, _ = study
    with (out / 'results.csv').open() as file:
        rows = list(csv.DictReader(file))
    arms = {'parameterized', 'linear_cpb', 'log_cpb', 'log_cpb, wrong window'}
    assert {row['arm'] for row in rows} == arms
    # after one epoch: training, two on a canvas, a larger image; after two also the old window on it and a larger
    # window at the old size; and all but the last again, fine-tuned
    places = {(row['epochs'], row['image_size'], row['window_size'], row['grid'], row['finetuned']) for row in rows}
    assert len(places) == 4 + 6 + 5
    assert all(np.isfinite(float(row['cross_entropy'])) for row in rows)
    for name in ('windows_after_1_epochs.png', 'windows_after_2_epochs.png', 'epochs.png', 'biases.png'):
        assert cv2.imread(str(out / name)).std() > 5
    assert (out / 'results.md').read_text().count('\n| ') == (1 + 4) + (1 + 6 + 5)


def test_the_code_of_the_docs_measures_a_study_without_what_is_far(study, plans, monkeypatch, capsys):
    out, _ = study
    page = (ROOT / 'docs/transfer.md').read_text()
    (block,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    given = "Path('work_dirs/biases'), 20, (0, 1, 2)"
    assert given in block
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr(MMLogger, '_instance_dict', MMLogger._instance_dict.copy())
    names = {}
    exec(block.replace(given, f'Path({str(out)!r}), 2, (0,)'), names)
    printed = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert [words[0] for words in printed] == [
        f'{kind} 8 {way}' for kind in ('log_cpb', 'linear_cpb') for way in ('as it is', 'edge', 'none_beyond')
    ]
    for kind, (_, *values) in zip(('log_cpb', 'linear_cpb'), printed[::3]):
        step = plans.Step(2, plans.Condition(16, 8, 2))
        with np.load(step.file(out / f'{kind}_seed_0')) as measured:
            means = 100 * measured['correct'].mean(), measured['cross_entropy'].mean()
        assert values == [f'{means[0]:.1f}', f'{means[1]:.2f}']

    beyond = torch.arange(-7, 8).abs() > 3
    beyond = beyond[:, None] | beyond
    biases = [bias(8, 8) for bias in names['model'].modules() if isinstance(bias, names['PositionBias'])]
    assert len(biases) == 2  # those of the last model, with nothing beyond
    assert all((bias[:, beyond] == -1e4).all() and (bias[:, ~beyond] > -1e4).all() for bias in biases)

    table = torch.arange(2 * 7 * 9.0).reshape(2, 7, 9)  # of a window of 4 x 5 tokens
    names['last'] = 2
    limited, cut = names['edge'](None, (4, 5), table), names['none_beyond'](None, (4, 5), table)
    for (i, row), (j, column) in itertools.product(enumerate(range(-3, 4)), enumerate(range(-4, 5))):
        nearest = 3 + max(-2, min(row, 2)), 4 + max(-2, min(column, 2))
        assert torch.equal(limited[:, i, j], table[:, nearest[0], nearest[1]])
        far = max(abs(row), abs(column)) > 2
        assert torch.equal(cut[:, i, j], torch.full((2,), -1e4) if far else table[:, i, j])


def test_a_study_that_is_done_is_reported_again_and_not_repeated(study, tool, monkeypatch, capsys):
    out, command = study
    before = {path: path.stat().st_mtime_ns for path in out.rglob('*.npz')}
    monkeypatch.setattr(sys, 'argv', ['compare_position_biases.py', *command])
    assert tool.main() == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*.npz')} == before
    printed = capsys.readouterr().out.strip().split('\n\nwrote tables')[0]
    assert 'After 2 epochs' in printed and (out / 'results.md').read_text().endswith(f'{printed}\n')


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--window-size', '8'], 'was begun with window_size 4, not 8: name another --out'),
        (['--window-size', '9'], '--window-size 9 is larger than the map of 8 x 8 tokens'),
        (['--curve', '1', '0'], '--curve must be at least 1, got 0'),
        (['--seeds', '-1'], '--seeds must be at least 0, got -1'),
        (['--ratios', 'inf'], '--ratios must be finite, got inf'),
        (['--lr', 'nan'], '--lr must be finite, got nan'),
        (['--window-size', '1'], '--window-size must be at least 2, got 1'),
        (['--ratios', '1.3'], 'images of 21 pixels do not fill a map of stride 4: change --image-size or --ratios'),
        (['--ratios', '0.5'], '--ratios must be at least 1, got 0.5'),
        (['--grids', '1'], '--grids must be at least 2, got 1'),
        (['--grids', '3'], '--batch-size 6 does not fill a canvas of 3 x 3 photos'),
        (['--batch-size', '100'], '--batch-size 100 is more than the 18 photos of train'),
        (['--num-heads', '3', '2'], 'stage 0 of arch has 8 channels, not divisible by 3 heads'),
        (['--epochs', '0'], '--epochs must be at least 1, got 0'),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith('-') else None,
)
def test_a_wrong_setting_is_named(study, tool, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, 'argv', ['compare_position_biases.py', *study[1], *flags])
    assert tool.main() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and message in line


def test_splits_must_have_the_same_classes(tool, photos_tool, settings, photos):
    other = photos['val']._replace(classes=('above', 'right'))
    with pytest.raises(ValueError, match='class left has no folder in both train and val'):
        tool.check_photos(dict(train=photos['train'], val=other), settings)


def test_the_settings_of_a_study_stand_beside_it(study):
    kept = json.loads((study[0] / 'settings.json').read_text())
    assert (kept['window_size'], kept['depths'], kept['ratios']) == (4, [1, 1], [1.5])


def test_the_script_for_a_gpu_calls_the_tools_with_flags_that_they_have(load_tool, tool, tmp_path):
    python = tmp_path / 'bin/python'
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf \'%s\\037\' "$@"\necho\n')
    python.chmod(0o755)
    script = ROOT / 'tools/misc/study_transfer_on_gpu.sh'
    path = {**os.environ, 'PATH': f'{python.parent}:{os.environ["PATH"]}'}
    calls = subprocess.run(
        ['bash', script, 'photos', 'out', 'camvid'], env=path, capture_output=True, text=True, check=True
    )
    study, starts = (line.split('\x1f')[:-1] for line in calls.stdout.splitlines())
    assert study[0] == 'tools/analysis_tools/compare_position_biases.py'
    args = tool.parse_args(study[1:])
    assert (args.data_root, args.device, args.epochs) == (os.path.abspath('photos'), 'cuda', 100)
    assert tool.read_settings(args).window_size == 8
    compare = load_tool('compare_starts')
    args = compare.parse_args(starts[1:])
    assert args.data_root == 'camvid'
    rates = []
    for start in compare.read_starts(args.start):
        cfg = launch.load_config(ROOT / args.config)
        parser = argparse.ArgumentParser()
        launch.add_arguments(parser)
        cfg.merge_from_dict(parser.parse_args(['--cfg-options', *start.settings]).cfg_options)
        pipeline = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
        assert tuple(pipeline['RandomResize'].scale) == (480, 360)
        assert tuple(pipeline['RandomCrop'].crop_size) == tuple(cfg.model.data_preprocessor.size) == (360, 480)
        rates.append(cfg.optim_wrapper.optimizer.lr)
    assert rates == [6e-3, 3e-3, 3e-3]  # from scratch and from classifiers, as docs/transfer.md chose them
