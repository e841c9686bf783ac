"""Checkpoints that other libraries write, loaded here, and ours loaded there: the same features after every stage.

The models are small, all their weights are random, and their maps divide into windows at every stage, so that padding,
which the others let take part in attention, never does. Everything is float64.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from across_versions import strict_zip
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from transformers import Swinv2Backbone, Swinv2Config, Swinv2ForImageClassification, Swinv2Model

from swinv2_mm import CheckpointError, SwinTransformerV2, load_pretrained
from swinv2_mm.checkpoints import formats
from swinv2_mm.checkpoints.files import write_checkpoint
from swinv2_mm.checkpoints.formats import EXPORTS, export, export_config
from swinv2_mm.checkpoints.loading import read_weights

DEPTHS, HEADS = (2, 2, 3, 2), (1, 2, 4, 8)
ARCH = dict(embed_dims=16, depths=DEPTHS, num_heads=HEADS)
ZEROS = (0, 0, 0, 0)  # timm, transformers and mmpretrain: a position bias trained with the window itself
# window, pretrained windows for the others, pretrained windows for us, image size
SETTINGS = [
    (8, ZEROS, (8, 8, 8, 8), 256),
    (16, ZEROS, (16, 16, 16, 8), 256),
    (16, (12, 12, 12, 6), (12, 12, 12, 6), 512),
]


def test_every_library_in_the_folder_is_listed_and_every_format_has_a_name_of_its_own():
    files = {path.stem for path in Path(formats.__file__).parent.glob('*.py')} - {'__init__', 'base'}
    assert {library.__name__.rpartition('.')[2] for library in formats.LIBRARIES} == files
    assert len({one.name for one in formats.FORMATS}) == len(formats.FORMATS)


def timm_arguments(window, pretrained, image):
    return dict(
        img_size=image,
        embed_dim=16,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=window,
        pretrained_window_sizes=pretrained,
    )


def build_timm(libraries, *setting):
    return libraries.timm.create_model('swinv2_tiny_window8_256', num_classes=3, **timm_arguments(*setting))


def build_timm_features(libraries, *setting):
    return libraries.timm.create_model('swinv2_tiny_window8_256', features_only=True, **timm_arguments(*setting))


def build_transformers(kind):
    def build(libraries, window, pretrained, image):
        return kind(
            Swinv2Config(
                image_size=image,
                embed_dim=16,
                depths=DEPTHS,
                num_heads=HEADS,
                window_size=window,
                pretrained_window_sizes=pretrained,
                out_features=['stage1', 'stage2', 'stage3', 'stage4'],
            )
        )

    return build


def build_mmpretrain(libraries, window, pretrained, image):
    return libraries.mmpretrain.SwinTransformerV2(
        arch=dict(ARCH, extra_norm_every_n_blocks=0),
        img_size=image,
        window_size=[min(window, image // 4 // 2**i) for i in range(4)],  # it does not shrink windows to maps
        pretrained_window_sizes=pretrained,
    )


def build_torchvision(libraries, window, pretrained, image):
    assert pretrained == ZEROS, 'it has no such argument'
    blocks = libraries.torchvision.models.swin_transformer
    return blocks.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=DEPTHS,
        num_heads=HEADS,
        window_size=[window, window],
        num_classes=3,
        block=blocks.SwinTransformerBlockV2,
        downsample_layer=blocks.PatchMergingV2,
    )


BUILDERS = {
    'timm': build_timm,
    'timm features_only': build_timm_features,
    'transformers model': build_transformers(Swinv2Model),
    'transformers classifier': build_transformers(Swinv2ForImageClassification),
    'transformers backbone': build_transformers(Swinv2Backbone),
    'mmpretrain': build_mmpretrain,
    'torchvision': build_torchvision,
}


def blocks_of(model):
    """The blocks of each stage."""
    if hasattr(model, 'features'):
        return [model.features[i] for i in (1, 3, 5, 7)]
    encoder = getattr(model, 'swinv2', model)
    stages = getattr(encoder, 'encoder', encoder)
    stages = stages.stages if hasattr(stages, 'stages') else getattr(stages, 'layers', None)
    return [stage.blocks for stage in stages or [model[f'layers_{i}'] for i in range(4)]]


def stage_outputs(model, image):
    """The map after the last block of each stage, (B, H*W, C)."""
    outs = []

    def keep(module, inputs, out):
        out = out[0] if isinstance(out, tuple) else out
        outs.append(out.reshape(len(image), -1, out.shape[-1]))

    hooks = [blocks[-1].register_forward_hook(keep) for blocks in blocks_of(model)]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return outs


def use_exact_coordinates(model, pretrained_windows):
    """They compute the coordinates in float32: do it again in float64."""
    for blocks, pretrained_window in zip(blocks_of(model), pretrained_windows):
        for module in blocks.modules():
            if hasattr(module, 'relative_coords_table'):
                table = module.relative_coords_table
                window = (table.shape[-2] + 1) // 2
                offsets = torch.arange(1 - window, window, dtype=torch.float64) * 8 / (pretrained_window - 1)
                axis = offsets.sign() * torch.log2(offsets.abs() + 1) / 3
                module.relative_coords_table = torch.stack(torch.meshgrid(axis, axis, indexing='ij'), -1).view_as(table)


def assert_same_features(theirs, ours, image_size):
    image = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    theirs.eval(), ours.eval()
    expected, actual = stage_outputs(theirs, image), stage_outputs(ours, image)
    assert len(actual) == 4
    for stage, (wanted, got) in enumerate(strict_zip(expected, actual)):
        assert (got - wanted).abs().max() < 1e-9 * wanted.abs().max(), f'stage {stage}'


def copy_parameters(source, target):
    target.load_state_dict(dict(source.named_parameters()), strict=False)


# torchvision pads maps that are smaller than the window, and always normalises by the window.
COMBINATIONS = [(library, setting) for library in BUILDERS for setting in SETTINGS if library != 'torchvision']


@pytest.mark.parametrize(('library', 'setting'), [*COMBINATIONS, ('torchvision', SETTINGS[0])], ids=str)
def test_a_file_of_another_library_gives_its_features(libraries, randomize, tmp_path, library, setting):
    window, their_windows, windows, image_size = setting
    theirs = randomize(BUILDERS[library](libraries, window, their_windows, image_size), std=0.2)
    torch.save(theirs.state_dict(), tmp_path / 'weights.pth')
    says_windows = library in ('mmpretrain', 'torchvision')  # they save the tables
    ours = SwinTransformerV2(ARCH, window_size=window, pretrained_window_sizes=None if says_windows else windows)
    report = load_pretrained(ours, tmp_path / 'weights.pth')
    assert report.format == (library if library.startswith('timm') else library.split()[0])
    assert ours.pretrained_window_sizes == report.pretrained_window_sizes == windows
    use_exact_coordinates(theirs.double(), windows)
    assert_same_features(theirs, ours.double(), image_size)


@pytest.mark.parametrize('library', ['timm', 'transformers backbone', 'mmpretrain'])
def test_a_file_moved_to_a_larger_window_gives_the_features_of_its_library_moved(
    libraries, randomize, tmp_path, library
):
    small = randomize(BUILDERS[library](libraries, 12, ZEROS, 192), std=0.2)
    torch.save(small.state_dict(), tmp_path / 'swinv2_window12_192.pth')
    theirs = BUILDERS[library](libraries, 24, (12, 12, 12, 6), 768)
    copy_parameters(small, theirs)
    ours = SwinTransformerV2(ARCH, window_size=24)
    report = load_pretrained(ours, tmp_path / 'swinv2_window12_192.pth')
    assert report.checkpoint_window_size == (12, 12, 12, 6)
    assert report.window_size == (24, 24, 24, 24)
    use_exact_coordinates(theirs.double(), (12, 12, 12, 6))
    assert_same_features(theirs, ours.double(), 768)


@pytest.mark.parametrize(
    ('library', 'norm'),
    [
        ('timm', 'norm'),
        ('transformers classifier', 'swinv2.layernorm'),
        ('mmpretrain', 'norm3'),
        ('torchvision', 'norm'),
    ],
)
def test_the_norm_before_a_classifier_is_that_of_the_last_stage(libraries, randomize, library, norm):
    theirs = randomize(BUILDERS[library](libraries, 8, ZEROS, 256))
    ours = SwinTransformerV2(ARCH, window_size=8, pretrained_window_sizes=8)
    report = load_pretrained(ours, theirs.state_dict())
    assert torch.equal(ours.norm3.weight, theirs.get_submodule(norm).weight)
    assert torch.equal(ours.norm3.bias, theirs.get_submodule(norm).bias)
    assert set(report.initial) == {f'norm{i}.{kind}' for i in range(3) for kind in ('weight', 'bias')}
    assert set(report.initial.values()) == {'output norm that the file does not have'}
    without = SwinTransformerV2(ARCH, window_size=8, pretrained_window_sizes=8, out_indices=(0, 1))
    report = load_pretrained(without, theirs.state_dict())
    assert report.left_out[f'{norm}.weight'] == 'of a stage after the last of out_indices, which is not built'


# The names of the official repository's SwinTransformerV2 (models/swin_transformer_v2.py), stage by stage.
OFFICIAL_BLOCK = {
    'attn.logit_scale': lambda c, h: (h, 1, 1),
    'attn.q_bias': lambda c, h: (c,),
    'attn.v_bias': lambda c, h: (c,),
    'attn.cpb_mlp.0.weight': lambda c, h: (512, 2),
    'attn.cpb_mlp.0.bias': lambda c, h: (512,),
    'attn.cpb_mlp.2.weight': lambda c, h: (h, 512),
    'attn.qkv.weight': lambda c, h: (3 * c, c),
    'attn.proj.weight': lambda c, h: (c, c),
    'attn.proj.bias': lambda c, h: (c,),
    'norm1.weight': lambda c, h: (c,),
    'norm1.bias': lambda c, h: (c,),
    'mlp.fc1.weight': lambda c, h: (4 * c, c),
    'mlp.fc1.bias': lambda c, h: (4 * c,),
    'mlp.fc2.weight': lambda c, h: (c, 4 * c),
    'mlp.fc2.bias': lambda c, h: (c,),
    'norm2.weight': lambda c, h: (c,),
    'norm2.bias': lambda c, h: (c,),
}


def official_state_dict(pretrained_windows, windows):
    """Random weights under the official names, with the buffers that official files hold."""
    state = {
        'patch_embed.proj.weight': (16, 3, 4, 4),
        'patch_embed.proj.bias': (16,),
        'patch_embed.norm.weight': (16,),
        'patch_embed.norm.bias': (16,),
        'norm.weight': (128,),
        'norm.bias': (128,),
        'head.weight': (3, 128),
        'head.bias': (3,),
    }
    for i, (depth, heads) in enumerate(zip(DEPTHS, HEADS)):
        channels = 16 * 2**i
        for j in range(depth):
            state.update(
                {f'layers.{i}.blocks.{j}.{name}': shape(channels, heads) for name, shape in OFFICIAL_BLOCK.items()}
            )
        if i < 3:
            state[f'layers.{i}.downsample.reduction.weight'] = (2 * channels, 4 * channels)
            state[f'layers.{i}.downsample.norm.weight'] = (2 * channels,)
            state[f'layers.{i}.downsample.norm.bias'] = (2 * channels,)
    state = {name: 0.2 * torch.randn(shape) for name, shape in state.items()}
    for i, (pretrained, window) in enumerate(zip(pretrained_windows, windows)):
        offsets = np.arange(1 - window, window, dtype=np.float32) / np.float32(pretrained - 1) * 8
        axis = np.sign(offsets) * np.log2(np.abs(offsets) + 1) / np.log2(8)
        table = torch.tensor(np.stack(np.meshgrid(axis, axis, indexing='ij'), -1), dtype=torch.float32)
        for j in range(DEPTHS[i]):
            state[f'layers.{i}.blocks.{j}.attn.relative_coords_table'] = table[None]
            state[f'layers.{i}.blocks.{j}.attn.relative_position_index'] = torch.zeros(window**2, window**2).long()
            if j % 2 and i < 3:
                state[f'layers.{i}.blocks.{j}.attn_mask'] = torch.zeros(4, window**2, window**2)
    return state


@pytest.fixture
def timm_of_official(libraries):
    """The model of timm with weights in the official format, as timm itself converts them."""

    def build(state_dict, window, pretrained, image_size):
        model = build_timm(libraries, window, pretrained, image_size)
        convert = libraries.timm.models.swin_transformer_v2.checkpoint_filter_fn
        model.load_state_dict(convert({'model': state_dict}, model))
        use_exact_coordinates(model.double(), pretrained)
        return model

    return build


@pytest.mark.parametrize('kind', ['fine-tuned 12 to 16', 'pre-trained by SimMIM'])
def test_an_official_file_gives_the_features_of_timm_with_it(timm_of_official, tmp_path, kind):
    state_dict = official_state_dict((12, 12, 12, 6), (16, 16, 16, 8))
    file, reasons = state_dict, {'computed anew', 'classifier'}
    if kind == 'pre-trained by SimMIM':
        file = {f'encoder.{name}': value for name, value in state_dict.items() if not name.startswith('head')}
        file = {name.replace('cpb_mlp', 'rpe_mlp'): value for name, value in file.items()}  # its name there
        file.update({'encoder.mask_token': torch.rand(1, 1, 16)})
        file.update({'decoder.0.weight': torch.rand(3072, 128, 1, 1), 'decoder.0.bias': torch.rand(3072)})
        reasons = {'computed anew', 'for SimMIM pre-training'}
    torch.save({'model': file, 'epoch': 30, 'lr_scheduler': {}}, tmp_path / 'official.pth')
    ours = SwinTransformerV2(ARCH, window_size=16)
    report = load_pretrained(ours, tmp_path / 'official.pth')
    assert report.format == ('SimMIM' if kind == 'pre-trained by SimMIM' else 'official')
    assert report.checkpoint_window_size == (16, 16, 16, 8)
    assert set(report.left_out.values()) == reasons
    assert set(report.left_out) | set(file) == set(file)
    assert len(report.loaded) + len(report.left_out) == len(file)
    assert_same_features(timm_of_official(state_dict, 16, (12, 12, 12, 6), 512), ours.double(), 512)


@pytest.mark.parametrize('prefix', ['module.', 'backbone.', 'model.backbone.', '_orig_mod.', 'detector.backbone.'])
def test_names_may_have_any_prefix(build_small, prefix):
    source, backbone = build_small(), build_small()
    state_dict = {f'{prefix}{name}': value for name, value in source.state_dict().items()}
    report = load_pretrained(backbone, {'state_dict': {**state_dict, 'neck.weight': torch.rand(2)}})
    assert report.left_out == {'neck.weight': 'outside the backbone'}
    for name, value in source.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name


def test_two_backbones_in_a_file_are_refused(build_small):
    state_dict = build_small().state_dict()
    both = {f'{prefix}{name}': value for prefix in ('student.', 'teacher.') for name, value in state_dict.items()}
    with pytest.raises(CheckpointError, match=r"several backbones, with the prefixes 'student\.', 'teacher\.'"):
        load_pretrained(build_small(), both)


def test_a_swin_v1_is_told_apart(build_small, tmp_path):
    torch.save(
        {
            'model': {
                'patch_embed.proj.weight': torch.rand(16, 3, 4, 4),
                'layers.0.blocks.0.attn.relative_position_bias_table': torch.rand(49, 1),
                'layers.0.blocks.0.attn.qkv.weight': torch.rand(48, 16),
            }
        },
        tmp_path / 'swin_tiny_patch4_window7_224.pth',
    )
    with pytest.raises(CheckpointError, match=r"swin_tiny.*it is a Swin V1.*use type='SwinTransformer'"):
        load_pretrained(build_small(), tmp_path / 'swin_tiny_patch4_window7_224.pth')


def test_of_a_training_checkpoint_of_timm_the_averaged_weights_are_loaded(libraries, randomize, tmp_path):
    plain, averaged = (randomize(build_timm(libraries, 8, ZEROS, 256)) for _ in range(2))
    torch.save(
        {
            'epoch': 3,
            'arch': 'swinv2_tiny_window8_256',
            'state_dict': plain.state_dict(),
            'state_dict_ema': averaged.state_dict(),
            'args': argparse.Namespace(model='swinv2_tiny_window8_256', lr=1e-3),
        },
        tmp_path / 'model_best.pth.tar',
    )
    ours = SwinTransformerV2(ARCH, window_size=8, pretrained_window_sizes=8)
    load_pretrained(ours, tmp_path / 'model_best.pth.tar')
    assert torch.equal(ours.patch_embed.proj.weight, averaged.patch_embed.proj.weight)


class Segmentor(BaseModel):
    """The least that a Runner trains."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.decode_head = nn.Linear(1, 1)

    def forward(self, inputs, mode='loss'):
        return {'loss': sum(out.square().mean() for out in self.backbone(torch.stack(inputs)))}


def test_of_a_run_of_mmengine_with_ema_the_averaged_weights_are_loaded(build_small, tmp_path):
    model = Segmentor(build_small(pretrained_window_sizes=(12, 12, 12, 6)))
    hook = EMAHook(momentum=0.5)
    Runner(
        model,
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=1,
            dataset=[dict(inputs=torch.rand(3, 32, 32))] * 3,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=3),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[hook],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3)),
        experiment_name='ema',
    ).train()
    averaged = hook.ema_model.module.backbone.state_dict()
    assert not torch.equal(averaged['norm0.weight'], model.backbone.norm0.weight)
    backbone = build_small()
    load_pretrained(backbone, tmp_path / 'iter_3.pth')
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, averaged[name]), name
    assert backbone.pretrained_window_sizes == (12, 12, 12, 6)


@pytest.fixture
def ours(build_small):
    """A backbone as it is after fine-tuning at window 8 from a checkpoint of window 12."""
    return build_small(arch=ARCH, window_size=8, pretrained_window_sizes=(12, 12, 12, 6))


def write_export(backbone, path, to):
    weights, windows = backbone.state_dict(), backbone.pretrained_window_sizes
    write_checkpoint(export(weights, windows, to), path)
    config = export_config(weights, windows, to)
    if config:
        (path.parent / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize('to', EXPORTS)
def test_weights_that_went_elsewhere_come_back_the_same(ours, build_small, tmp_path, to):
    write_export(ours, tmp_path / 'model.safetensors', to)
    back = build_small(arch=ARCH, window_size=8)
    report = load_pretrained(back, tmp_path / 'model.safetensors')
    assert report.format == to
    for name, value in ours.state_dict().items():
        if not name.startswith(('norm0', 'norm1', 'norm2')):  # there is no place for them
            assert torch.equal(back.state_dict()[name], value), name
    assert back.pretrained_window_sizes == (12, 12, 12, 6)


@pytest.mark.parametrize('library', ['timm', 'transformers model'])
def test_weights_of_another_library_go_back_the_same(libraries, randomize, library):
    theirs = randomize(BUILDERS[library](libraries, 8, ZEROS, 256)).state_dict()
    converted, _ = read_weights(theirs)
    back = export(converted.weights, (8, 8, 8, 8), library.split()[0])
    expected = {name: value for name, value in theirs.items() if not name.startswith('head')}
    assert set(back) == set(expected)
    for name, value in expected.items():
        assert torch.equal(back[name], value), name


def test_official_weights_go_back_the_same():
    official = official_state_dict((12, 12, 12, 6), (12, 12, 12, 6))
    converted, windows = read_weights(official)
    back = export(converted.weights, windows.pretrained_window_sizes, 'official')
    kept = [name for name in official if not name.startswith('head') and not name.endswith(('_index', '_mask'))]
    assert set(back) == set(kept)
    for name in kept:
        torch.testing.assert_close(back[name], official[name], rtol=0, atol=1e-6 if 'table' in name else 0)


def test_timm_serves_our_weights_from_a_folder(libraries, ours, tmp_path):
    write_export(ours, tmp_path / 'model.safetensors', 'timm')
    theirs = libraries.timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=256, window_size=8)
    use_exact_coordinates(theirs.double(), (12, 12, 12, 6))
    assert_same_features(theirs, ours.double(), 256)
    assert torch.equal(theirs.norm.weight, ours.norm3.weight)


def test_transformers_serves_our_weights_from_a_folder(libraries, ours, tmp_path):
    write_export(ours, tmp_path / 'model.safetensors', 'transformers')
    theirs = Swinv2Model.from_pretrained(tmp_path, image_size=256, window_size=8, dtype=torch.float32)
    assert theirs.config.pretrained_window_sizes == [12, 12, 12, 6]
    use_exact_coordinates(theirs.double(), (12, 12, 12, 6))
    assert_same_features(theirs, ours.double(), 256)
    assert torch.equal(theirs.layernorm.weight, ours.norm3.weight)


def test_the_official_code_serves_our_weights(timm_of_official, ours):
    exported = export(ours.state_dict(), ours.pretrained_window_sizes, 'official')
    exported.update({'head.weight': torch.rand(3, 128), 'head.bias': torch.rand(3)})
    assert_same_features(timm_of_official(exported, 8, (12, 12, 12, 6), 256), ours.double(), 256)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(position_bias='linear_cpb'), 'no position bias of the kind linear_cpb'),
        (dict(arch=dict(ARCH, extra_norm_every_n_blocks=2)), 'no extra norms'),
    ],
)
@pytest.mark.parametrize('to', EXPORTS)
def test_what_another_library_cannot_compute_is_not_exported(build_small, change, message, to):
    backbone = build_small(**change)
    with pytest.raises(CheckpointError, match=f'{to} has {message}'):
        export(backbone.state_dict(), backbone.pretrained_window_sizes, to)


def test_the_official_coordinates_reach_one_and_a_bit_within_the_pretrained_window(ours):
    table = export(ours.state_dict(), (12, 12, 12, 6), 'official')['layers.3.blocks.1.attn.relative_coords_table']
    assert table.shape == (1, 11, 11, 2)
    assert table[0, -1, 0].tolist() == pytest.approx([math.log2(9) / 3, -math.log2(9) / 3])


@pytest.mark.parametrize(
    ('averaged', 'plain'),
    [
        ('state_dict_ema', 'state_dict'),
        ('model_ema', 'model'),
        ('ema_model', 'state_dict'),
        ('ema', 'model'),
        ('ema_state_dict', 'model'),
        ('state_dict', 'ema_state_dict'),  # mmengine swaps them
    ],
)
def test_averaged_weights_go_before_plain_ones(build_small, averaged, plain):
    wanted, other, backbone = build_small(), build_small(), build_small()
    report = load_pretrained(
        backbone, {plain: other.state_dict(), averaged: {'module': wanted.state_dict()}, 'epoch': 3}
    )
    assert torch.equal(backbone.patch_embed.proj.weight, wanted.patch_embed.proj.weight)
    assert report.place == f'{averaged}/module'
    assert f'found at {averaged}/module)' in str(report)


@pytest.mark.parametrize(
    'key',
    [
        *(
            'model_state_dict',
            'model_state',
            'net',
            'network',
            'backbone',
            'encoder',
            'weights',
            'params',
            'params_ema',
        ),
        *('swin', 'my_model'),  # any, where it is the only one that holds a backbone
    ],
)
def test_the_wrappers_of_plain_training_loops_are_taken_off(build_small, key):
    wanted, backbone = build_small(), build_small()
    weights = {f'module.{name}': value for name, value in wanted.state_dict().items()}
    moments = {'state': {0: {'exp_avg': torch.rand(2)}}, 'param_groups': [{'lr': 0.1}]}
    file = {
        'epoch': 3,
        'head': {'weight': torch.rand(2)},
        key: weights,
        'optimizer': moments,
        'loss': torch.tensor(0.1),
    }
    report = load_pretrained(backbone, file)
    assert report.place == f'{key}/module.'
    assert all(torch.equal(backbone.state_dict()[name], value) for name, value in wanted.state_dict().items())


def test_a_wrapper_that_holds_something_else_is_passed_over(build_small):
    wanted, backbone = build_small(), build_small()
    load_pretrained(backbone, {'model': {'temperature': torch.rand(1)}, 'my_model': wanted.state_dict()})
    assert torch.equal(backbone.patch_embed.proj.weight, wanted.patch_embed.proj.weight)


def test_settings_of_averaging_are_no_weights(build_small):
    wanted, backbone = build_small(), build_small()
    state_dict = {f'backbone.{name}': value for name, value in wanted.state_dict().items()}
    report = load_pretrained(backbone, {'ema': {'decay': 0.999}, 'model': state_dict})
    assert torch.equal(backbone.patch_embed.proj.weight, wanted.patch_embed.proj.weight)
    assert report.place == 'model/backbone.'


@pytest.mark.parametrize(
    'name',
    [
        'blocks.0.attn.relative_position_bias_table',  # BEiT
        'stages.0.blocks.0.attn.logit_scale',  # swinv2_cr of timm
        'logit_scale',  # CLIP
    ],
)
def test_another_model_is_not_called_a_swin(build_small, name):
    weights = {'patch_embed.proj.weight': torch.rand(16, 3, 4, 4), name: torch.rand(1)}
    with pytest.raises(CheckpointError, match=r'it is not a Swin V2: its tensors are patch_embed\.proj\.weight'):
        load_pretrained(build_small(), weights)
