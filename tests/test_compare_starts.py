"""Comparing starts: what is trained and tested for each, and what the table says."""

import json
import sys
import uuid

import cv2
import numpy as np
import pytest
import torch
from entries import DEMO, IN_PROCESS, ROOT, run_tool
from mmengine.registry import MODELS, DefaultScope
from scipy import stats

from swinv2_mm.engine import launch

FEW = [
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.logger.interval=1',
    'log_processor.window_size=1',
]


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('compare_starts')


@pytest.fixture
def in_process(tool, load_tool, monkeypatch):
    """Have tools run in this process, without the seconds of importing a host. Keeps their command lines."""
    called = []

    def call(name, *args):
        called.append([name, *map(str, args)])
        names = (
            f'{key}={uuid.uuid4()}' for key in ('experiment_name', 'visualizer.name')
        )  # mmengine keeps logs by them
        return run_tool(load_tool, name[: -len('.py')], *args, *names)

    monkeypatch.setattr(tool, 'run_tool', call)
    return called


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """The backbone of the demo's segmentor, as file of a seed."""
    folder = tmp_path_factory.mktemp('weights')
    cfg = launch.load_config(DEMO)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = MODELS.build(cfg.model).backbone
    torch.nn.init.constant_(backbone.patch_embed.proj.bias, 7.0)
    torch.save(backbone.state_dict(), folder / 'seed_3.pth')
    return folder


def first_loss(folder):
    [path] = folder.glob('*/vis_data/scalars.json')
    return json.loads(path.read_text().splitlines()[0])['loss']


def test_every_start_is_trained_and_tested_with_its_checkpoint_and_settings(
    tool, in_process, weights, shapes, tmp_path, monkeypatch
):
    lines = {
        'scratch': ['none', *FEW, *IN_PROCESS],
        'moved': [str(weights / 'seed_{seed}.pth'), *FEW, *IN_PROCESS, 'optim_wrapper.optimizer.lr=0'],
    }
    command = ['compare_starts', DEMO, '--out', str(tmp_path), '--data-root', str(shapes / 'ade'), '--seeds', '3']
    for name, words in lines.items():
        command += ['--start', name, *words]
    for name in lines:
        monkeypatch.setattr(sys, 'argv', [*command, '--run', name, '3'])
        assert tool.main() == 0
    assert [call[0] for call in in_process] == ['train.py', 'test.py'] * 2
    results = {name: json.loads((tmp_path / name / 'seed_3/result.json').read_text()) for name in lines}
    metrics = {'aAcc', 'mIoU', 'mAcc'}
    validated = {f'val/{name}' for name in metrics}
    parts = {'decode.loss_ce', 'aux.loss_ce'}
    assert all(result.keys() == {'loss', *parts, *metrics, *validated} for result in results.values())
    assert all(result['loss'] == pytest.approx(sum(result[name] for name in parts)) for result in results.values())
    for call in in_process[::2]:
        assert call[call.index('--seed') + 1] == '3' and '--resume' not in call
    trained = torch.load(tmp_path / 'moved/seed_3/iter_2.pth', weights_only=False)['state_dict']
    assert (trained['backbone.patch_embed.proj.bias'] == 7).all()  # the checkpoint of this seed, and a rate of 0
    assert results['scratch']['loss'] != first_loss(tmp_path / 'scratch/seed_3')  # the last one is meant

    monkeypatch.setattr(sys, 'argv', command)
    assert tool.main() == 0  # all is there: only the report is written
    assert len(in_process) == 4
    monkeypatch.setattr(sys, 'argv', [*command, '--run', 'moved', '3'])
    assert tool.main() == 0 and '--resume' in in_process[4]
    assert f'| moved | {results["moved"]["loss"]:.3f} (' in (tmp_path / 'results.md').read_text()
    assert cv2.imread(str(tmp_path / 'losses.png')).std() > 5


def test_the_table_has_means_intervals_and_paired_differences(tool):
    values = dict(first=[1.0, 2.0, 4.0], second=[1.5, 2.4, 4.6])
    results = {name: {seed: dict(mIoU=value) for seed, value in enumerate(list)} for name, list in values.items()}
    lines = tool.table(results).splitlines()
    difference = stats.ttest_rel(values['second'], values['first'])
    low, high = difference.confidence_interval(0.95)
    mean, error = stats.sem(values['first']), stats.t.ppf(0.975, 2)
    assert lines[-2] == f'| first | 2.33 ± {mean * error:.2f} |'
    assert lines[-1].endswith(f'({(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}) |')


def test_one_seed_has_no_interval(tool):
    lines = tool.table(dict(first={0: dict(loss=1.0)}, second={0: dict(loss=0.5)})).splitlines()
    assert lines[-2:] == ['| first | 1.000 |', '| second | 0.500 (-0.500) |']


@pytest.mark.parametrize(
    'start, message',
    [
        (['alone'], '--start alone has no checkpoint: add a path, or none to train from scratch'),
        (['scratch', 'none', 'lr'], "--start scratch has 'lr', which is no setting: write KEY=VALUE"),
        (['a/b', 'none'], '--start a/b must have a name of its own that can name a folder'),
        (['..', 'none'], '--start .. must have a name of its own that can name a folder'),
        (['x', 'no_{seed}.pth'], '--start x: there is no checkpoint no_0.pth'),
    ],
    ids=['no checkpoint', 'no setting', 'no name', 'no folder', 'no file'],
)
def test_a_wrong_start_is_named(tool, tmp_path, monkeypatch, capsys, start, message):
    monkeypatch.setattr(sys, 'argv', ['compare_starts', DEMO, '--out', str(tmp_path / 'out'), '--start', *start])
    assert tool.main() == 2
    assert capsys.readouterr().err == f'error: {message}\n'
    assert not (tmp_path / 'out').exists()


def test_a_setting_that_the_config_does_not_take_is_found_before_anything_is_trained(
    tool, shapes, tmp_path, monkeypatch, capsys
):
    command = ['compare_starts', DEMO, '--out', str(tmp_path / 'out'), '--data-root', str(shapes / 'ade')]
    monkeypatch.setattr(sys, 'argv', [*command, '--start', 'x', 'none', 'train_cfgs.max_iters=3'])
    assert tool.main() == 2
    assert 'train_cfgs' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_results_of_another_start_are_not_taken(tool, in_process, shapes, tmp_path, monkeypatch, capsys):
    command = ['compare_starts', DEMO, '--out', str(tmp_path), '--data-root', str(shapes / 'ade'), '--seeds', '0']
    (tmp_path / 'x').mkdir()
    kept = dict(name='x', checkpoint='none', settings=['optim_wrapper.optimizer.lr=1'], config=DEMO)
    (tmp_path / 'x/start.json').write_text(json.dumps(kept))
    monkeypatch.setattr(sys, 'argv', [*command, '--start', 'x', 'none', 'optim_wrapper.optimizer.lr=2'])
    assert tool.main() == 2
    assert 'was begun with settings' in capsys.readouterr().err
    assert in_process == []


def test_a_run_that_fails_says_why(tool, shapes, tmp_path, monkeypatch, capsys):
    missing = str(tmp_path / 'damaged.pth')
    (tmp_path / 'damaged.pth').write_bytes(b'damaged')
    command = ['compare_starts', DEMO, '--out', str(tmp_path / 'out'), '--seeds', '0', '--start', 'x', missing]
    command += ['--data-root', str(shapes / 'ade')]
    monkeypatch.setattr(sys, 'argv', command)
    assert tool.main() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith('error: x with seed 0 failed: ')


@pytest.mark.parametrize('name', ['upernet_swinv2_camvid', 'mask-rcnn_swinv2_coco-tiny'])
def test_the_models_for_photos_take_the_backbone_of_the_study(load_tool, name):
    study = load_tool('compare_position_biases')
    args = study.parse_args(['photos', '--out', 'out'])
    backbone = launch.load_config(ROOT / f'configs/demo/{name}.py').model.backbone
    arch = dict(embed_dims=args.embed_dims, depths=tuple(args.depths), num_heads=tuple(args.num_heads))
    assert {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in backbone.arch.items()} == arch
    assert (backbone.patch_size, backbone.window_size) == (args.patch_size, 2 * args.window_size)


def test_the_example_of_an_own_data_set_reads_images_and_labels(tmp_path, load_tool):
    """A step of training and a validation on frames as CamVid has them."""
    generator = np.random.default_rng(0)
    for split, number in (('train', 2), ('val', 1)):
        for kind, ending in (('images', 'jpg'), ('annotations', 'png')):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = np.kron(generator.integers(0, 11, (4, 5)), np.ones((24, 24))).astype(np.uint8)
                cv2.imwrite(
                    str(folder / f'{i}.{ending}'), pixels if ending == 'png' else np.stack([20 * pixels] * 3, -1)
                )
    flags = ['--data-root', tmp_path, '--work-dir', tmp_path / 'run', '--checkpoint', 'none', '--cfg-options']
    flags += ['train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2', *IN_PROCESS]
    assert run_tool(load_tool, 'train', 'configs/demo/upernet_swinv2_camvid.py', *flags) == 0
    [log] = (tmp_path / 'run').glob('*/*.log')
    assert 'pedestrian' in log.read_text()
