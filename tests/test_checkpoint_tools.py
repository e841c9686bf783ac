"""The command lines around checkpoints: convert, inspect, plot."""

import json
import sys

import matplotlib.image
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from swinv2_mm import SwinTransformerV2, load_pretrained
from swinv2_mm.position_bias import ContinuousPositionBias, LinearContinuousPositionBias

ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
WINDOWS = (12, 12, 12, 6)


@pytest.fixture
def run(load_tool, monkeypatch, capsys):
    """Run a tool with arguments. Returns its exit code, what it printed, and its errors."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        code = load_tool(name).main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def backbone(build_small):
    return build_small(pretrained_window_sizes=WINDOWS)


@pytest.fixture
def detector(backbone, tmp_path):
    """A checkpoint as a Runner writes it."""
    state_dict = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    torch.save({'meta': {}, 'state_dict': {**state_dict, 'neck.weight': torch.rand(2)}}, tmp_path / 'epoch_12.pth')
    return tmp_path / 'epoch_12.pth'


@pytest.fixture
def silent(backbone, tmp_path):
    """A checkpoint that does not say its windows."""
    state_dict = {name: value for name, value in backbone.state_dict().items() if name != 'pretrained_windows'}
    torch.save(state_dict, tmp_path / 'silent.pth')
    return tmp_path / 'silent.pth'


def assert_one_line(errors, *parts):
    assert errors.startswith('error: ') and errors.count('\n') == 1, errors
    for part in parts:
        assert part in errors


@pytest.mark.parametrize('name', ['plain.safetensors', 'plain.pth', 'new_folder/plain.bin'])
def test_a_detector_becomes_a_plain_file_that_says_its_windows(run, backbone, detector, tmp_path, name):
    code, printed, _ = run('convert_checkpoint', detector, tmp_path / name)
    assert code == 0
    assert '1 outside the backbone' in printed
    read = safetensors.torch.load_file if name.endswith('.safetensors') else torch.load
    written = read(tmp_path / name)
    assert set(written) == set(backbone.state_dict())
    for key, value in backbone.state_dict().items():
        assert torch.equal(written[key], value), key
    assert not list(tmp_path.rglob('*.partial'))


@pytest.mark.parametrize('to', ['official', 'timm', 'transformers'])
def test_a_backbone_goes_elsewhere_and_comes_back(run, backbone, detector, tmp_path, to):
    out, back = tmp_path / 'there' / 'model.safetensors', tmp_path / 'back.safetensors'
    assert run('convert_checkpoint', detector, out, '--to', to)[0] == 0
    assert (out.parent / 'config.json').exists() == (to != 'official')
    code, printed, _ = run('convert_checkpoint', out, back)
    assert code == 0 and f': {to}, arch=' in printed
    written = safetensors.torch.load_file(back)
    for key, value in backbone.state_dict().items():
        if key.startswith(('norm0', 'norm1', 'norm2')):
            assert key not in written
        else:
            assert torch.equal(written[key], value), key


def test_official_pth_files_hold_their_weights_as_model(run, detector, tmp_path):
    assert run('convert_checkpoint', detector, tmp_path / 'out.pth', '--to', 'official')[0] == 0
    written = torch.load(tmp_path / 'out.pth')
    assert set(written) == {'model'} and 'norm.weight' in written['model']


def test_windows_that_nothing_says_are_asked_for_and_stored(run, silent, tmp_path):
    code, _, errors = run('convert_checkpoint', silent, tmp_path / 'out.pth')
    assert code == 2 and not (tmp_path / 'out.pth').exists()
    assert_one_line(errors, 'pass --pretrained-window-sizes')
    code, _, _ = run('convert_checkpoint', silent, tmp_path / 'out.pth', '--pretrained-window-sizes', 12, 12, 12, 6)
    assert code == 0
    moved = SwinTransformerV2(ARCH, window_size=32)
    load_pretrained(moved, tmp_path / 'out.pth')
    assert moved.pretrained_window_sizes == WINDOWS
    run('convert_checkpoint', silent, tmp_path / 'out.pth', '--pretrained-window-sizes', 9)
    assert torch.load(tmp_path / 'out.pth')['pretrained_windows'].tolist() == [9, 9, 9, 9]


@pytest.mark.parametrize('windows', [(12, 12), (12, 12, 12, 0), (-1,)])
def test_windows_that_are_none_are_refused(run, silent, tmp_path, windows):
    code, _, errors = run('convert_checkpoint', silent, tmp_path / 'out.pth', '--pretrained-window-sizes', *windows)
    assert code == 2 and not (tmp_path / 'out.pth').exists()
    assert_one_line(errors, '--pretrained-window-sizes must be ', f', got {list(windows)}')


def test_a_config_of_other_weights_is_not_replaced(run, detector, tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
    code, _, errors = run('convert_checkpoint', detector, tmp_path / 'model.safetensors', '--to', 'transformers')
    assert code == 2 and not (tmp_path / 'model.safetensors').exists()
    assert_one_line(errors, 'config.json exists and describes other weights')
    assert json.loads((tmp_path / 'config.json').read_text()) == {'model_type': 'bert'}


@pytest.mark.parametrize(
    ('source', 'out', 'parts'),
    [
        ('missing.pth', 'out.pth', ['missing.pth does not exist']),
        ('epoch_12.pth', 'out.onnx', ['out.onnx must end in .safetensors, .pth, .bin']),
        ('partly.pth', 'out.pth', ['partly.pth: it lacks layers.2.blocks.1.attn.proj.weight']),
        ('diverged.pth', 'out.pth', ['diverged.pth: layers.0.blocks.0.mlp.fc1.bias holds NaN']),
        ('epoch_12.pth', 'epoch_12.pth/out.pth', ['epoch_12.pth']),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(run, backbone, detector, tmp_path, source, out, parts):
    state_dict = backbone.state_dict()
    partly = {name: value for name, value in state_dict.items() if name != 'layers.2.blocks.1.attn.proj.weight'}
    torch.save(partly, tmp_path / 'partly.pth')
    state_dict['layers.0.blocks.0.mlp.fc1.bias'][3] = float('nan')
    torch.save(state_dict, tmp_path / 'diverged.pth')
    before = sorted(tmp_path.rglob('*'))
    code, _, errors = run('convert_checkpoint', tmp_path / source, tmp_path / out)
    assert code == 2
    assert_one_line(errors, *parts)
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    'arguments',
    [
        dict(),
        dict(in_channels=4, patch_size=2, mlp_ratio=2.0, qkv_bias=False),
        dict(arch=dict(ARCH, extra_norm_every_n_blocks=2)),
        dict(position_bias='linear_cpb'),
    ],
    ids=str,
)
def test_what_inspection_says_builds_a_backbone_that_the_file_loads_into(run, build_small, tmp_path, arguments):
    source = build_small(pretrained_window_sizes=WINDOWS, **arguments)
    torch.save(source.state_dict(), tmp_path / 'own.pth')
    code, printed, _ = run('inspect_checkpoint', tmp_path / 'own.pth')
    lines = {line[:18].strip(): line[19:].strip() for line in printed.splitlines()}
    assert code == 0
    assert lines['format'] == 'swinv2_mm'
    assert lines['pretrained window'].split() == ['12', '12', '12', '6']
    assert lines['heads'].split() == ['1', '2', '4', '8']
    assert lines['output norms'] == 'norm0, norm1, norm2, norm3'
    built = eval(lines['loads'].replace('into ', '', 1), {'SwinTransformerV2': SwinTransformerV2})
    load_pretrained(built, tmp_path / 'own.pth')
    for name, value in source.state_dict().items():
        assert torch.equal(built.state_dict()[name], value), name


def test_inspection_of_a_published_arch_gives_its_name(run, tmp_path):
    torch.save(SwinTransformerV2('small', window_size=8).state_dict(), tmp_path / 'small.pth')
    _, printed, _ = run('inspect_checkpoint', tmp_path / 'small.pth')
    assert "into SwinTransformerV2(arch='small')" in printed
    assert '48.96 M in' in printed  # the paper's 50 M less the classifier


def test_inspection_says_that_the_windows_must_be_given(run, silent):
    code, printed, _ = run('inspect_checkpoint', silent)
    assert code == 0
    assert 'pretrained_window_sizes=...)' in printed and 'windows said by    nothing' in printed


def test_inspection_of_what_does_not_load_says_what_is_known_and_why(run, backbone, tmp_path):
    state_dict = backbone.state_dict()
    del state_dict['layers.2.blocks.1.attn.proj.weight']
    torch.save({'model': state_dict}, tmp_path / 'partly.pth')
    code, printed, errors = run('inspect_checkpoint', tmp_path / 'partly.pth')
    assert code == 2
    assert 'format             swinv2_mm' in printed and 'loads' not in printed
    assert_one_line(errors, 'it lacks layers.2.blocks.1.attn.proj.weight')
    (tmp_path / 'text.pth').write_text('weights')
    code, printed, errors = run('inspect_checkpoint', tmp_path / 'text.pth')
    assert code == 2 and not printed
    assert_one_line(errors, 'text.pth')


def test_inspection_and_conversion_make_no_room_for_a_model(run, detector, tmp_path, monkeypatch):
    devices = []
    register = torch.nn.Module.register_parameter

    def watch(module, name, parameter):
        devices.extend([] if parameter is None else [parameter.device.type])
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, 'register_parameter', watch)
    assert run('inspect_checkpoint', detector)[0] == 0
    assert run('convert_checkpoint', detector, tmp_path / 'out.pth')[0] == 0
    assert set(devices) == {'meta'}


def test_the_plot_shows_the_bias_of_the_head_that_was_asked_for(run, backbone, detector, tmp_path):
    out = tmp_path / 'bias.png'
    options = ('--window', 8, '--stage', 2, '--block', 1, '--head', 3, '--out', out)
    assert run('plot_position_bias', detector, *options)[0] == 0
    picture = matplotlib.image.imread(out)
    assert picture.shape[0] > 500 and picture.std() > 0.1
    options = ('--window', 8, '--stage', 2, '--block', 1, '--head', 2, '--out', tmp_path / 'other.png')
    run('plot_position_bias', detector, *options)
    assert (matplotlib.image.imread(tmp_path / 'other.png') != picture).any()


def test_the_ways_of_moving_a_bias_are_what_they_are_called(load_tool, backbone, detector):
    tool = load_tool('plot_position_bias')
    mlp = tool.read_position_bias(detector, stage=1, block=0, head=1)
    moved = tool.tables(mlp, 20)
    original = backbone.double().layers[1].blocks[0].attn.cpb_mlp
    torch.testing.assert_close(moved['log-spaced'], original.table(20, 20)[1].detach())
    pretrained = original.table(12, 12)[1].detach()
    resized = F.interpolate(pretrained[None, None], size=(39, 39), mode='bicubic')[0, 0]
    torch.testing.assert_close(moved['bicubic'], resized)
    # Fitted within the pretrained window, the bias on linear-spaced coordinates is nearly the same there.
    (title,) = set(moved) - {'log-spaced', 'bicubic'}
    inner = moved[title][8:-8, 8:-8]
    error = (inner - pretrained).square().mean().sqrt()
    assert error < 0.03 * pretrained.std()
    assert title == f'linear-spaced, fitted to RMSE {error:.2g}'
    assert (moved[title] - moved['log-spaced']).abs().max() > 10 * error


def test_of_a_linear_spaced_checkpoint_the_log_spaced_bias_is_fitted(load_tool, build_small, tmp_path):
    source = build_small(pretrained_window_sizes=WINDOWS, position_bias='linear_cpb')
    torch.save(source.state_dict(), tmp_path / 'linear.pth')
    tool = load_tool('plot_position_bias')
    mlp = tool.read_position_bias(tmp_path / 'linear.pth', 0, 0, 0)
    assert type(mlp) is LinearContinuousPositionBias
    moved = tool.tables(mlp, 14)
    assert {title.split(',')[0] for title in moved} == {'log-spaced', 'linear-spaced', 'bicubic'}
    expected = source.double().layers[0].blocks[0].attn.linear_cpb_mlp.table(14, 14)[0].detach()
    torch.testing.assert_close(moved['linear-spaced'], expected)
    assert type(tool.refit(mlp, ContinuousPositionBias)) is ContinuousPositionBias


@pytest.mark.parametrize(
    ('options', 'part'),
    [
        (('--head', 1), 'has no head 1 in block 0 of stage 0'),
        (('--stage', 4), 'has no head 0 in block 0 of stage 4'),
        (('--window', 1), '--window must be at least 2 tokens, got 1'),
        (('--out', 'bias.pdf'), '--out must end in .png, got bias.pdf'),
    ],
)
def test_a_head_that_is_not_there_is_one_line_and_no_picture(run, detector, tmp_path, options, part):
    code, _, errors = run('plot_position_bias', detector, '--out', tmp_path / 'bias.png', *options)
    assert code == 2 and not (tmp_path / 'bias.png').exists()
    assert_one_line(errors, part)


def test_a_plot_needs_windows_and_a_position_mlp(run, build_small, silent, tmp_path):
    code, _, errors = run('plot_position_bias', silent)
    assert code == 2
    assert_one_line(errors, 'convert_checkpoint.py --pretrained-window-sizes')
    torch.save(build_small(position_bias='parameterized').state_dict(), tmp_path / 'table.pth')
    code, _, errors = run('plot_position_bias', tmp_path / 'table.pth')
    assert code == 2
    assert_one_line(errors, 'no position MLP')


@pytest.mark.parametrize('to', [None, 'official', 'timm', 'transformers'])
@pytest.mark.parametrize('windows', [[99_999_999], [2**16], [2**64], [16, 16, 16, 2**200]], ids=str)
def test_windows_that_no_file_may_say_are_one_line_and_no_file(run, silent, tmp_path, to, windows):
    flags = ['--to', to] if to else []
    code, _, errors = run(
        'convert_checkpoint', silent, tmp_path / 'o.pth', *flags, '--pretrained-window-sizes', *windows
    )
    assert code == 2 and not (tmp_path / 'o.pth').exists()
    assert_one_line(
        errors, f'--pretrained-window-sizes must be ints of at least 1 token and at most 65535, got {windows}'
    )


def test_the_largest_window_is_written_and_read_back(run, silent, build_small, tmp_path):
    out = tmp_path / 'out.pth'
    assert run('convert_checkpoint', silent, out, '--pretrained-window-sizes', 65535)[0] == 0
    assert load_pretrained(build_small(), out).pretrained_window_sizes == (65535,) * 4
    code, _, errors = run('convert_checkpoint', out, tmp_path / 'official.pth', '--to', 'official')
    assert code == 2 and not (tmp_path / 'official.pth').exists()  # it would hold tables of 137 GB
    assert_one_line(errors, 'official files hold tables of the windows, of 1024 tokens at most here')


def test_windows_against_what_the_file_says_are_stored_with_a_warning(run, detector, tmp_path):
    out = tmp_path / 'out.pth'
    code, _, errors = run('convert_checkpoint', detector, out, '--pretrained-window-sizes', 16)
    assert code == 0 and torch.load(out)['pretrained_windows'].tolist() == [16] * 4
    assert errors.startswith('warning: pretrained_windows in the file says windows (12, 12, 12, 6), and --pretrained')


def test_timm_gets_a_norm_that_the_file_does_not_have(run, build_small, tmp_path):
    weights = {name: value for name, value in build_small().state_dict().items() if not name.startswith('norm3')}
    torch.save(weights, tmp_path / 'own.pth')
    code, _, errors = run('convert_checkpoint', tmp_path / 'own.pth', tmp_path / 'model.safetensors', '--to', 'timm')
    written = safetensors.torch.load_file(tmp_path / 'model.safetensors')
    assert code == 0 and written['norm.weight'].tolist() == [1] * 128 and written['norm.bias'].tolist() == [0] * 128
    assert 'has no norm after its last stage: one is written as timm needs it, untrained' in errors


def test_one_of_several_backbones_is_converted(run, build_small, tmp_path):
    nets = {'teacher': build_small(), 'student': build_small()}
    both = {f'{who}.backbone.{name}': value for who, net in nets.items() for name, value in net.state_dict().items()}
    torch.save({'state_dict': both}, tmp_path / 'both.pth')
    code, _, err = run('convert_checkpoint', tmp_path / 'both.pth', tmp_path / 'one.pth')
    assert code == 2 and "choose one, as prefix='student.backbone.'" in err
    for who, net in nets.items():
        run('convert_checkpoint', tmp_path / 'both.pth', tmp_path / f'{who}.pth', '--prefix', who)
        written = torch.load(tmp_path / f'{who}.pth', weights_only=True)
        assert all(torch.equal(written[name], value) for name, value in net.state_dict().items())
    code, out, _ = run('inspect_checkpoint', tmp_path / 'both.pth', '--prefix', 'student')
    assert code == 0 and 'loads' in out
