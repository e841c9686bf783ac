"""The windows that a checkpoint was trained with, told from its tables, its name and the config.json beside it."""

import itertools
import json
import logging

import numpy as np
import pytest
import torch
from across_versions import strict_zip
from transformers import Swinv2Config, Swinv2Model

from swinv2_mm import CheckpointError, load_pretrained
from swinv2_mm.checkpoints.windows import (
    COMPUTED_HERE,
    TrainedWindows,
    windows_from_config,
    windows_from_name,
    windows_from_tables,
)

SMALL = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
TIMM_CONFIG = {
    'architecture': 'swinv2_tiny_window16_256',
    'model_args': {'embed_dim': 8, 'depths': [1, 1, 1, 1], 'num_heads': [1, 1, 1, 1]},
}
TABLE = 'layers.0.blocks.0.attn.relative_coords_table'


def official_table(pretrained, window):
    """`relative_coords_table` as the official code computes it, in float32: (1, 2W-1, 2W-1, 2)."""
    offsets = np.arange(1 - window, window, dtype=np.float32)
    table = np.stack(np.meshgrid(offsets, offsets, indexing='ij'), -1)[None] / np.float32(pretrained - 1)
    table *= 8
    return torch.from_numpy(np.sign(table) * np.log2(np.abs(table) + 1) / np.float32(np.log2(8)))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_pair_of_windows_is_told_from_its_table(dtype):
    for pretrained, window in itertools.product(range(2, 49), repeat=2):
        table = official_table(pretrained, window).to(dtype)
        for shaped in (table, table[0]):
            assert windows_from_tables({TABLE: shaped}, 1)[:2] == ((pretrained,), (window,))


def test_a_window_of_one_token_was_trained_with_itself():
    assert windows_from_tables({TABLE: torch.zeros(1, 1, 1, 2)}, 1)[:2] == ((1,), (1,))


def test_each_stage_has_windows_of_its_own():
    tables = {
        f'layers.{i}.blocks.{j}.attn.relative_coords_table': official_table(pretrained, window)
        for i, pretrained, window in ((3, 6, 8), (0, 12, 16), (2, 10, 16), (1, 11, 15))
        for j in range(2)
    }
    assert windows_from_tables(tables, 4)[:2] == ((12, 11, 10, 6), (16, 15, 16, 8))


@pytest.mark.parametrize('stages', [(), (0,), (1, 2), (0, 2), (0, 1, 2, 3)])
def test_tables_of_other_stages_than_those_of_the_file_say_nothing(stages):
    tables = {f'layers.{i}.blocks.0.attn.relative_coords_table': official_table(8, 8) for i in stages}
    assert windows_from_tables(tables, 3) == TrainedWindows(None, None, None)


def with_one(table, value):
    table = table.clone()
    table[0, 3, 4, 1] = value
    return table


def linear_spaced(table):
    side = table.shape[1]
    axis = torch.linspace(-1, 1, side)
    return torch.stack([axis[:, None].expand(side, side), axis.expand(side, side)], -1)[None]


DAMAGE = {
    'zero': lambda table: 0 * table,
    'NaN': lambda table: table * float('nan'),
    'infinity': lambda table: table / 0,
    'one NaN': lambda table: with_one(table, float('nan')),
    'one number': lambda table: with_one(table, table[0, 3, 4, 1] + 0.1),
    'negative': lambda table: -table,
    'double': lambda table: 2 * table,
    'natural logarithms': lambda table: table * np.log(2),
    'transposed': lambda table: table.transpose(1, 2),
    'columns of another window': lambda table: torch.cat(
        [table[..., :1], official_table(9, (table.shape[1] + 1) // 2)[..., 1:]], -1
    ),
    'linear-spaced': linear_spaced,
    'integers': lambda table: table.long(),
    'without values': lambda table: table.to('meta'),
    'sparse': lambda table: table.to_sparse(),
    'cropped to a corner': lambda table: table[:, 2:, 2:],
    'cropped to an even side': lambda table: table[:, 1:, 1:],
    'cropped in height': lambda table: table[:, 1:-1],
    'empty': lambda table: table[:, :0, :0],
    'one coordinate': lambda table: table[..., :1],
    'no coordinates': lambda table: table[..., 0],
    'two of them': lambda table: table.repeat(2, 1, 1, 1),
    'flat': lambda table: table.flatten(),
    'one number alone': lambda table: table[0, 0, 0, 0],
}


@pytest.mark.parametrize('window', [8, 12])
@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_table_is_one_line_that_names_it(damage, window):
    tables = {TABLE.replace('0', '1', 1): official_table(8, 8), TABLE: damage(official_table(12, window))}
    with pytest.raises(CheckpointError, match=rf'^{TABLE} (must be \(1, 2W-1, 2W-1, 2\)|holds) .*') as error:
        windows_from_tables(tables, 2)
    assert '\n' not in str(error.value)


def test_linear_spaced_coordinates_are_named_as_such():
    with pytest.raises(CheckpointError, match='holds linear-spaced coordinates'):
        windows_from_tables({TABLE: linear_spaced(official_table(8, 8))}, 1)


@pytest.mark.parametrize('other', [(9, 16), (8, 15)])
def test_tables_of_one_stage_that_differ_are_an_error_that_names_the_block(other):
    tables = {f'layers.0.blocks.{j}.attn.relative_coords_table': official_table(8, 16) for j in range(3)}
    tables['layers.0.blocks.2.attn.relative_coords_table'] = official_table(*other)
    with pytest.raises(CheckpointError, match=rf'^layers\.0\.blocks\.2\..*\({other[0]}, {other[1]}\).*\(8, 16\): '):
        windows_from_tables(tables, 1)


@pytest.mark.parametrize('name', ['relative_coords_table', 'layers.0.attn.relative_coords_table'])
def test_a_table_of_no_block_is_an_error_that_names_it(name):
    with pytest.raises(CheckpointError, match=f'^{name} '):
        windows_from_tables({TABLE: official_table(8, 8), name: official_table(8, 8)}, 1)


NAMES = [
    # name, pretrained windows, windows
    ('swinv2_tiny_patch4_window8_256.pth', (8, 8, 8, 8), (8, 8, 8, 8)),
    ('swinv2_tiny_patch4_window16_256.pth', (16, 16, 16, 8), (16, 16, 16, 8)),
    ('swinv2_base_patch4_window12_192_22k.pth', (12, 12, 12, 6), (12, 12, 12, 6)),
    ('swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth', (12, 12, 12, 6), (16, 16, 16, 8)),
    ('swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth', (12, 12, 12, 6), (24, 24, 24, 12)),
    ('swinv2_base_window12to16_192to256.ms_in22k_ft_in1k', (12, 12, 12, 6), (16, 16, 16, 8)),
    ('swinv2_base_window12to24_192to384_22kft1k-8d2ea9f6.pth', (12, 12, 12, 6), (24, 24, 24, 12)),
    ('swinv2_small_window8_256.ms_in1k.safetensors', (8, 8, 8, 8), (8, 8, 8, 8)),
    ('swinv2-tiny-patch4-window8-256', (8, 8, 8, 8), (8, 8, 8, 8)),
    ('swinv2-base-patch4-window12to16-192to256-22kto1k-ft.bin', (12, 12, 12, 6), (16, 16, 16, 8)),
    ('microsoft--swinv2-base-patch4-window16-256--resolve--main--model.safetensors', (16, 16, 16, 8), (16, 16, 16, 8)),
]
NAMES_THAT_STATE_NOTHING = [
    'epoch_12.pth',
    'model.safetensors',
    'swinv2_tiny_256.pth',
    'swinv2_window16_finetuned.pth',
    'swinv2_window16.pth',
    'swinv2_window_256.pth',
    'window0_256.pth',
    'window8_0.pth',
    'window8_16.pth',  # the last map would be empty
    'window0to16_192to256.pth',
    'window12to0_192to256.pth',
    'window8to_256.pth',
    'swinv2_window8_160k.pth',  # iterations
    'mask_rcnn_swinv2_window16_36e_coco.pth',  # epochs
    'upernet_swinv2_window16_512x512.pth',  # a crop, not the image of the pre-training
    'swinv2_window16_20260101.pth',
    'swinv2_window16-12345678.pth',  # eight digits of a hash
    'swinv2_window16-1234567a.pth',
]


@pytest.mark.parametrize('name, pretrained, windows', NAMES)
def test_published_names_state_the_windows(name, pretrained, windows):
    assert windows_from_name(name, 4)[:2] == (pretrained, windows)


@pytest.mark.parametrize('name', NAMES_THAT_STATE_NOTHING)
def test_other_names_state_nothing(name):
    assert windows_from_name(name, 4) == TrainedWindows(None, None, None)


@pytest.mark.parametrize(
    'num_stages, patch_size, windows', [(3, 4, (24, 24, 16)), (4, 8, (24, 16, 8, 4)), (1, 2, (24,))]
)
def test_a_window_is_as_large_as_the_map_of_its_stage_at_most(num_stages, patch_size, windows):
    assert windows_from_name('window24_256', num_stages, patch_size)[:2] == (windows, windows)


@pytest.fixture
def config(tmp_path):
    """Write a config.json, and give its path."""

    def config(content):
        path = tmp_path / 'config.json'
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return config


@pytest.mark.parametrize(
    'fields',
    [
        dict(),
        dict(image_size=256, window_size=8),
        dict(image_size=256, window_size=16),
        dict(image_size=[256, 256], window_size=16),
        dict(image_size=[512, 256], window_size=16),
        dict(image_size=[256, 512], window_size=16),
        dict(image_size=256, window_size=16, pretrained_window_sizes=[12, 12, 12, 6]),
        dict(image_size=384, window_size=24, pretrained_window_sizes=[12, 12, 0, 6]),
        dict(image_size=256, window_size=8, patch_size=8),
        dict(image_size=250, window_size=16, depths=[1, 1, 1], num_heads=[1, 1, 1]),
    ],
    ids=str,
)
def test_the_config_of_transformers_states_the_windows_of_its_model(tmp_path, fields):
    config = Swinv2Config(**{**dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]), **fields})
    config.save_pretrained(tmp_path)
    pretrained, windows, _ = windows_from_config(tmp_path / 'config.json', len(config.depths), config.patch_size)
    for stage, *sizes in strict_zip(Swinv2Model(config).encoder.layers, pretrained, windows):
        theirs = stage.blocks[0].attention.self.relative_coords_table
        torch.testing.assert_close(theirs.view_as(official_table(*sizes)), official_table(*sizes))


def windows_of_timm(timm, name, **arguments):
    """Pretrained windows and windows of a model of timm; for 0, which stands for the window, the window."""
    with torch.device('meta'):
        model = timm.create_model(name, **arguments)
    attentions = [stage.blocks[0].attn for stage in model.layers]
    assert all(attn.window_size[0] == attn.window_size[1] for attn in attentions)
    windows = tuple(attn.window_size[0] for attn in attentions)
    return tuple(attn.pretrained_window_size[0] or w for attn, w in zip(attentions, windows)), windows


def test_names_and_configs_of_timm_state_the_windows_of_its_models(libraries, config):
    names = libraries.timm.list_models('swinv2_*window*')
    assert len(names) >= 12
    for name in names:
        expected = windows_of_timm(libraries.timm, name)
        assert windows_from_name(f'{name}.ms_in1k', 4)[:2] == expected, name
        assert windows_from_config(config({'architecture': name, 'num_classes': 10}), 4)[:2] == expected, name


@pytest.mark.parametrize(
    'arguments',
    [
        dict(),
        dict(img_size=512),
        dict(img_size=[512, 1024]),
        dict(window_size=8),
        dict(window_size=[8, 8]),
        dict(img_size=384, window_size=24),
        dict(img_size=384, window_size=24, pretrained_window_sizes=[10, 9, 8, 7]),
        dict(pretrained_window_sizes=[0, 0, 0, 0]),
        dict(always_partition=True),
        dict(always_partition=True, img_size=128, window_size=24),
    ],
    ids=str,
)
@pytest.mark.parametrize('name', ['swinv2_tiny_window16_256', 'swinv2_base_window12to16_192to256'])
def test_arguments_in_the_config_of_timm_replace_what_the_architecture_says(libraries, config, name, arguments):
    expected = windows_of_timm(libraries.timm, name, **arguments)
    assert windows_from_config(config({'architecture': name, 'model_args': arguments}), 4)[:2] == expected


@pytest.mark.parametrize('arguments', [dict(img_size=[512, 256]), dict(window_size=[16, 8]), dict(window_size=[8, 16])])
def test_windows_of_timm_that_are_not_squares_have_no_single_pretrained_window(config, arguments):
    content = {'architecture': 'swinv2_tiny_window16_256', 'model_args': arguments}
    assert windows_from_config(config(content), 4) == TrainedWindows()


OTHER_CONTENT = [
    '',
    'window8_256',
    '{',
    '[' * 100_000,
    'null',
    '3',
    '[]',
    '{}',
    '"swinv2"',
    '{"model_type": "swin", "window_size": 7, "image_size": 224}',
    '{"model_type": ["swinv2"]}',
    '{"model_type": "swinv2"}',
    '{"model_type": "upernet", "backbone_config": {"model_type": "swin", "window_size": 8, "image_size": 256}}',
    '{"architecture": "resnet50"}',
    '{"architecture": "swinv2_cr_tiny_ns_224"}',
    '{"architecture": "swinv2_tiny_window0_256"}',
    '{"architecture": null}',
    '{"architecture": ["swinv2_tiny_window8_256"]}',
]


@pytest.mark.parametrize('content', OTHER_CONTENT, ids=[content[:60] for content in OTHER_CONTENT])
def test_a_config_of_something_else_says_nothing(config, content):
    assert windows_from_config(config(content), 4) == TrainedWindows()


def test_a_config_that_is_missing_or_no_text_says_nothing(tmp_path):
    path = tmp_path / 'config.json'
    assert windows_from_config(path, 4) == TrainedWindows()
    path.write_bytes(b'\xff\xfe\x00{')
    assert windows_from_config(path, 4) == TrainedWindows()
    path.unlink()
    path.mkdir()
    assert windows_from_config(path, 4) == TrainedWindows()


NO_SIZES = [None, True, 0, -8, 8.5, float('nan'), float('inf'), '8', '', [], ['8', '8'], [8, None], [[8]], {'8': 8}]
NO_SIZES_PER_STAGE = [
    8,
    True,
    'none',
    '8888',
    [8, 8, 8],
    {'8': 8, '9': 8, '10': 8, '11': 8},
    *([8, 8, 8, size] for size in (None, True, -8, 8.5, float('nan'), float('inf'), '8', [], ['8'], {'8': 8}, 2**70)),
]


@pytest.mark.parametrize(
    'key, value',
    [(key, value) for key in ('window_size', 'image_size') for value in NO_SIZES]
    + [('pretrained_window_sizes', value) for value in NO_SIZES_PER_STAGE],
    ids=str,
)
@pytest.mark.parametrize('library', ['transformers', 'timm'])
def test_malformed_values_in_a_config_say_nothing(config, library, key, value):
    content = {'model_type': 'swinv2', 'window_size': 16, 'image_size': 256, key: value}
    if library == 'timm':
        arguments = {'img_size' if key == 'image_size' else key: value}
        content = {'architecture': 'swinv2_base_window12to16_192to256', 'model_args': arguments}
    assert windows_from_config(config(content), 4) == TrainedWindows()


@pytest.mark.parametrize('arguments', [[], [16], 'window_size', 16, True])
def test_malformed_arguments_in_a_config_of_timm_are_no_arguments(config, arguments):
    content = {'architecture': 'swinv2_tiny_window16_256', 'model_args': arguments}
    without_arguments = TrainedWindows((16, 16, 16, 8), (16, 16, 16, 8), 'config.json beside the file')
    assert windows_from_config(config(content), 4) == (TrainedWindows() if arguments else without_arguments)


@pytest.fixture
def save(build_small, tmp_path):
    """Write weights as the official repository does, with tables if asked, and give the path of the file."""

    def save(name='epoch_12.pth', tables=()):
        state_dict = build_small(arch=SMALL).state_dict()
        del state_dict['pretrained_windows']
        for i, (pretrained, window) in enumerate(tables):
            state_dict[f'layers.{i}.blocks.0.attn.relative_coords_table'] = official_table(pretrained, window)
        torch.save({'model': state_dict}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def warnings(monkeypatch):
    """What is logged while the windows are inferred."""
    logged = []
    monkeypatch.setattr('swinv2_mm.messages.print_log', lambda text, level, **kwargs: logged.append((level, text)))
    return logged


TABLES = [(12, 16), (12, 16), (12, 16), (6, 8)]
ORIGINS = {
    # the windows that each of them says in the next test
    'the argument pretrained_window_sizes': (7, 7, 7, 4),
    'relative_coords_table in the file': (12, 12, 12, 6),
    'the name of the file': (16, 16, 16, 8),
    'config.json beside the file': (8, 8, 8, 8),
}


@pytest.mark.parametrize('number, origin', [*enumerate(ORIGINS)])
def test_the_argument_goes_before_the_tables_these_before_the_name_and_it_before_the_config(
    build_small, save, config, number, origin
):
    config({'model_type': 'swinv2', 'window_size': 8, 'image_size': 256})
    file = save(name='swinv2_window16_256.pth' if number <= 2 else 'epoch_12.pth', tables=TABLES if number <= 1 else ())
    backbone = build_small(arch=SMALL, pretrained_window_sizes=(7, 7, 7, 4) if number == 0 else None)
    report = load_pretrained(backbone, file)
    assert report.origin == origin
    assert backbone.pretrained_window_sizes == report.pretrained_window_sizes == ORIGINS[origin]
    assert backbone.pretrained_windows.tolist() == [*ORIGINS[origin]]
    assert backbone.window_size == (4, 4, 4, 4)


def test_a_config_beside_a_file_without_a_folder_in_its_name_is_found(build_small, save, config, monkeypatch):
    monkeypatch.chdir(config(TIMM_CONFIG).parent)
    assert load_pretrained(build_small(arch=SMALL), save().name).pretrained_window_sizes == (16, 16, 16, 8)


def test_the_config_of_a_segmentor_of_transformers_states_the_windows_of_its_backbone(config):
    backbone = {
        'model_type': 'swinv2',
        'window_size': 16,
        'image_size': 256,
        'pretrained_window_sizes': [12, 12, 12, 6],
    }
    path = config({'model_type': 'upernet', 'backbone_config': backbone})
    assert windows_from_config(path, 4)[:2] == ((12, 12, 12, 6), (16, 16, 16, 8))


@pytest.mark.parametrize(
    'content',
    [
        {'architecture': 'swinv2_tiny_window16_256'},
        {**TIMM_CONFIG, 'model_args': {**TIMM_CONFIG['model_args'], 'depths': [1, 1, 2, 1]}},
        {'model_type': 'swinv2', 'window_size': 16, 'image_size': 256, 'embed_dim': 96},
        {'model_type': 'swinv2', 'window_size': 16, 'image_size': 256, 'num_heads': [1, 1, 1, 2]},
        {'model_type': 'swinv2', 'window_size': 16, 'image_size': 256, 'patch_size': 2},
    ],
)
def test_the_config_of_another_model_is_ignored_with_a_warning(build_small, save, config, warnings, content):
    config(content)
    with pytest.raises(CheckpointError, match='pass pretrained_window_sizes'):
        load_pretrained(build_small(arch=SMALL), save())
    assert ['another model' in text for _, text in warnings] == [True]


TINY = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], image_size=64, window_size=4)
SAID_BY_TRANSFORMERS = [
    *(dict(hidden_act=name) for name in ('gelu', 'gelu_python', 'gelu_new', 'gelu_pytorch_tanh', 'relu', 'silu')),
    *(dict(layer_norm_eps=epsilon) for epsilon in (1e-5, 1e-6, 1e-3)),
    *(dict(use_absolute_embeddings=value) for value in (False, True)),
    dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, drop_path_rate=0.5),
    dict(initializer_range=0.5, encoder_stride=16, num_labels=7, output_hidden_states=True),
    dict(out_features=['stage2'], problem_type='regression'),
]


@pytest.mark.parametrize('fields', SAID_BY_TRANSFORMERS, ids=str)
def test_what_transformers_computes_otherwise_is_refused(build_small, randomize, tmp_path, fields):
    plain = randomize(Swinv2Model(Swinv2Config(**TINY)), 0.5).eval().double()
    model = randomize(Swinv2Model(Swinv2Config(**{**TINY, **fields})), 0.5).eval().double()
    model.load_state_dict(plain.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 64).double()
    with torch.no_grad():
        expected = plain(image)[0]
        try:
            same = torch.allclose(model(image)[0], expected, rtol=1e-9, atol=1e-9)
        except RuntimeError:  # transformers 5 adds one position too many, and fails
            same = not fields['use_absolute_embeddings']
    model.float().save_pretrained(tmp_path)
    backbone = build_small(arch=SMALL)
    if same:
        assert load_pretrained(backbone, tmp_path / 'model.safetensors').origin == 'config.json beside the file'
        assert backbone.pretrained_window_sizes == (4, 4, 4, 2)
        return
    ((key, value),) = fields.items()
    with pytest.raises(CheckpointError, match=f'config.json says {key}={value!r}, and this backbone computes') as error:
        load_pretrained(backbone, tmp_path / 'model.safetensors')
    assert '\n' not in str(error.value)


def test_some_of_these_are_computed_otherwise():
    assert (
        {key for fields in SAID_BY_TRANSFORMERS for key in fields if len(fields) == 1}
        == {*('hidden_act', 'layer_norm_eps', 'use_absolute_embeddings')}
        == {key for key in COMPUTED_HERE if key not in ('act_layer', 'norm_layer')}
    )


@pytest.mark.parametrize('act_layer', ['gelu', 'gelu_tanh', 'relu', 'silu'])
def test_what_timm_computes_otherwise_is_refused(libraries, build_small, randomize, config, tmp_path, act_layer):
    arguments = {**TIMM_CONFIG['model_args'], 'img_size': 64, 'window_size': 4}
    plain, model = (
        randomize(libraries.timm.create_model('swinv2_tiny_window16_256', **arguments, **changes)).eval()
        for changes in ({}, dict(act_layer=act_layer))
    )
    model.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        same = torch.allclose(model.forward_features(image), plain.forward_features(image), rtol=1e-6, atol=1e-6)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    config({**TIMM_CONFIG, 'model_args': {**arguments, 'act_layer': act_layer}})
    backbone = build_small(arch=SMALL)
    if same:
        assert load_pretrained(backbone, tmp_path / 'model.pth').pretrained_window_sizes == (4, 4, 4, 2)
        return
    message = rf"config.json says act_layer='{act_layer}', and this backbone computes act_layer='gelu': use the library"
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(backbone, tmp_path / 'model.pth')


@pytest.mark.parametrize(
    ('key', 'value'),
    [('hidden_act', ['gelu']), ('layer_norm_eps', 'x'), ('use_absolute_embeddings', 'no'), ('norm_layer', 'layernorm')],
)
def test_what_no_library_takes_there_is_refused_too(build_small, save, config, key, value):
    config({'model_type': 'swinv2', key: value})  # which says no windows
    with pytest.raises(CheckpointError, match=rf'config\.json says {key}='):
        load_pretrained(build_small(arch=SMALL), save(tables=TABLES))


@pytest.mark.parametrize(
    'fields', [dict(qkv_bias=False), dict(mlp_ratio=3), dict(num_channels=4), dict(patch_size=[2, 2])], ids=str
)
def test_a_config_of_other_weights_refuses_nothing(build_small, save, config, warnings, fields):
    content = {'model_type': 'swinv2', 'window_size': 16, 'image_size': 256, 'hidden_act': 'relu'}
    config({**content, **fields})
    backbone = build_small(arch=SMALL)
    assert load_pretrained(backbone, save(tables=TABLES)).origin == 'relative_coords_table in the file'
    assert [f'another model than the checkpoint ({next(iter(fields))} ' in text for _, text in warnings] == [True]


@pytest.mark.parametrize('fields', [dict(patch_size=[4, 4]), dict(mlp_ratio=4), dict(qkv_bias=True, num_channels=3)])
def test_a_config_that_says_what_the_weights_show_is_of_them(build_small, save, config, warnings, fields):
    config({'model_type': 'swinv2', 'window_size': 16, 'image_size': 256, **fields})
    assert load_pretrained(build_small(arch=SMALL), save()).pretrained_window_sizes == (16, 16, 16, 8)
    assert warnings == []


@pytest.mark.parametrize('mlp_ratio', [2.67, 3.3])
def test_a_ratio_that_is_rounded_in_the_weights_is_theirs(build_small, tmp_path, warnings, mlp_ratio):
    model = Swinv2Model(Swinv2Config(**TINY, mlp_ratio=mlp_ratio))
    model.save_pretrained(tmp_path)
    backbone = build_small(arch=SMALL, mlp_ratio=mlp_ratio)
    assert load_pretrained(backbone, tmp_path / 'model.safetensors').pretrained_window_sizes == (4, 4, 4, 2)
    assert warnings == []


def test_a_config_that_contradicts_the_name_is_ignored_with_a_warning(build_small, save, config, warnings):
    config(TIMM_CONFIG)
    backbone = build_small(arch=SMALL)
    load_pretrained(backbone, save('swinv2_window12_192.pth'))
    assert backbone.pretrained_window_sizes == (12, 12, 12, 6)
    ((_, text),) = warnings
    assert 'config.json beside the file says (16, 16, 16, 8): the first is used' in text


def test_a_state_dict_has_neither_name_nor_config(build_small, save, config, monkeypatch):
    monkeypatch.chdir(config(TIMM_CONFIG).parent)
    state_dict = torch.load(save(tables=TABLES))['model']
    assert load_pretrained(build_small(arch=SMALL), state_dict).pretrained_window_sizes == (12, 12, 12, 6)
    state_dict = {name: value for name, value in state_dict.items() if not name.endswith('coords_table')}
    with pytest.raises(CheckpointError, match='pass pretrained_window_sizes'):
        load_pretrained(build_small(arch=SMALL), state_dict)


def test_a_name_that_contradicts_the_file_is_ignored_with_a_warning(build_small, save, warnings):
    backbone = build_small(arch=SMALL)
    load_pretrained(backbone, save('swinv2_tiny_window16_256.pth', TABLES))
    assert backbone.pretrained_window_sizes == (12, 12, 12, 6)
    ((level, text),) = warnings
    assert level == logging.WARNING
    assert 'swinv2_tiny_window16_256.pth' in text and '(12, 12, 12, 6)' in text and '(16, 16, 16, 8)' in text


def test_the_windows_in_our_own_files_go_before_the_name(build_small, warnings, tmp_path):
    source = build_small(arch=SMALL, pretrained_window_sizes=(12, 12, 12, 6))
    torch.save(source.state_dict(), tmp_path / 'swinv2_tiny_window16_256.pth')
    backbone = build_small(arch=SMALL)
    report = load_pretrained(backbone, tmp_path / 'swinv2_tiny_window16_256.pth')
    assert report.origin == 'pretrained_windows in the file'
    assert backbone.pretrained_window_sizes == (12, 12, 12, 6)
    assert len(warnings) == 1


@pytest.mark.parametrize('name', ['swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth', 'epoch_12.pth'])
def test_a_name_that_says_the_same_or_nothing_gives_no_warning(build_small, save, warnings, name):
    load_pretrained(build_small(arch=SMALL), save(name, TABLES))
    assert warnings == []


def test_where_nothing_says_the_windows_the_error_says_what_to_pass_and_nothing_is_loaded(build_small, save, tmp_path):
    backbone = build_small(arch=SMALL)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'epoch_12\.pth.* pass pretrained_window_sizes.*\(16, 16, 16, 8\)'):
        load_pretrained(backbone, save())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_weights_fine_tuned_in_other_windows_keep_the_windows_of_their_first_training(build_small, save):
    file = save('swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth', TABLES)
    backbone = build_small(arch=SMALL, window_size=32).eval()
    report = load_pretrained(backbone, file)
    assert report.checkpoint_window_size == (16, 16, 16, 8)
    assert report.window_size == backbone.window_size == (32, 32, 32, 32)
    assert report.pretrained_window_sizes == backbone.pretrained_window_sizes == (12, 12, 12, 6)
    for i, window in enumerate((12, 12, 12, 6)):
        attn = backbone.layers[i].blocks[0].attn
        table = official_table(window, 32)[0].double()
        hidden, _, out = attn.cpb_mlp.double()
        expected = 16 / (1 + torch.exp(-out(hidden(table).relu())))
        torch.testing.assert_close(attn.position_bias.table(32, 32), expected.permute(2, 0, 1), rtol=0, atol=1e-4)
