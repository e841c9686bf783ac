"""Every path of attention inside windows against a loop over windows, and which path is taken."""

import os
import subprocess
import sys

import pytest
import torch
from across_versions import strict_zip

from swinv2_mm import compat, ops
from swinv2_mm.ops import flash_cpu, reference
from swinv2_mm.windows import WindowGroup, Windows, map_windows, pad_windows, partition

PATHS = {name: path.attention for name, path in ops.PATHS.items() if path.ORDER == 'window'}
FAST = [name for name in PATHS if name != 'reference']
GROUPS = {
    'one token': [(1, 1, 1)],
    'one window': [(5, 3, 1)],
    'ragged': [(4, 4, 3), (4, 2, 2), (1, 4, 2), (1, 2, 1)],
    'rows': [(1, 9, 2)],
    'columns': [(9, 1, 2)],
    'larger': [(12, 11, 2), (12, 3, 1)],
}
HEADS, HEAD_DIM = 3, 8


def operands(sizes, dtype=torch.float64, heads=HEADS, head_dim=HEAD_DIM):
    """Leaves ``qkv``, ``scale`` and ``table``, the table larger than the windows need, and the groups."""
    groups = [WindowGroup(*size) for size in sizes]
    height, width = (max(size[i] for size in sizes) + 2 for i in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    qkv = torch.randn(sum(group.num_tokens for group in groups), 3 * heads * head_dim, dtype=dtype)
    scale = torch.linspace(1, 100, heads, dtype=wide).view(-1, 1, 1)
    table = 16 * torch.rand(heads, 2 * height - 1, 2 * width - 1, dtype=wide)
    return [x.requires_grad_() for x in (qkv, scale, table)], groups


def attend(qkv, scale, table, groups, dropout=0.0):
    """`ops.attention` of tokens in window order."""
    return ops.attention(qkv, scale, table, Windows(groups, window=None, shift=None, index=None), dropout)


def attend_window_by_window(qkv, scale, table, groups):
    """Equations 2 to 4 of the paper for one window and head at a time, every bias looked up by its offset."""
    heads, (rows, columns) = len(table), (side // 2 for side in table.shape[1:])
    q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    outs, start = [], 0
    for group in groups:
        tokens = [(i, j) for i in range(group.height) for j in range(group.width)]
        offsets = torch.tensor([[(a - c + rows, b - d + columns) for c, d in tokens] for a, b in tokens])
        for _ in range(group.count):
            window = slice(start, start := start + len(tokens))
            of_heads = []
            for h in range(heads):
                query, key = (x[window, h] / x[window, h].norm(dim=-1, keepdim=True) for x in (q, k))
                logits = query @ key.T * scale[h] + table[h][offsets[..., 0], offsets[..., 1]]
                of_heads.append(logits.softmax(-1) @ v[window, h])
            outs.append(torch.cat(of_heads, -1))
    return torch.cat(outs)


def values_and_gradients(function, leaves, groups):
    out = function(*leaves, groups)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out))]


def assert_same(actual, expected, relative):
    for a, e in strict_zip(actual, expected):
        assert e.abs().max() > 0
        assert (a.double() - e.double()).abs().max() <= relative * e.double().abs().max()


@pytest.fixture(params=['as they are', 'tiny'])
def tiles(request, monkeypatch):
    """Tiles as they are; or so small that heads, windows and rows of queries are all taken a few at a time."""
    if request.param == 'tiny':
        monkeypatch.setattr(flash_cpu, 'TILE', 300)
        monkeypatch.setattr(flash_cpu, 'WEIGHTS', 50)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('sizes', GROUPS.values(), ids=GROUPS)
def test_values_and_gradients_are_those_of_a_loop_over_windows(tiles, path, sizes):
    leaves, groups = operands(sizes)
    expected = values_and_gradients(attend_window_by_window, leaves, groups)
    if sizes == [(1, 1, 1)]:
        expected[2:] = []  # attention to one token depends on nothing but its value
        actual = values_and_gradients(PATHS[path], leaves, groups)
        assert all((grad.abs() < 1e-12).all() for grad in actual[2:])
        assert_same(actual[:2], expected, 1e-10)
    else:
        assert_same(values_and_gradients(PATHS[path], leaves, groups), expected, 1e-10)


@pytest.mark.parametrize('path', FAST)
@pytest.mark.parametrize('sizes', [[(16, 16, 3), (16, 7, 2)], [(32, 32, 1), (32, 5, 1)], [(8, 8, 20)]], ids=str)
@pytest.mark.parametrize('head_dim', [32, 44])
def test_values_and_gradients_in_float32_are_those_of_the_reference(path, sizes, head_dim):
    leaves, groups = operands(sizes, torch.float32, head_dim=head_dim)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = values_and_gradients(ops.reference.attention, exact, groups)
    assert_same(values_and_gradients(PATHS[path], leaves, groups), expected, 1e-5)


def test_values_and_gradients_in_bfloat16_are_those_of_the_reference_to_its_rounding():
    leaves, groups = operands([(16, 16, 3), (16, 7, 2)], torch.bfloat16, head_dim=32)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = values_and_gradients(ops.reference.attention, exact, groups)
    with torch.autocast('cpu', torch.bfloat16):
        actual = values_and_gradients(ops.flash_cpu.attention, leaves, groups)
    assert [x.dtype for x in actual] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert_same(actual, expected, 2**-7)  # operands of the computation are exact; results, and their weights, rounded


def test_sdpa_in_bfloat16_is_the_formula_but_for_the_rounding_of_its_operands():
    (qkv, scale, table), groups = operands([(16, 16, 3), (16, 7, 2)], torch.bfloat16, head_dim=32)
    leaves = [x.detach().requires_grad_() for x in (qkv, scale / 10, table)]  # at 100 it moves logits by tenths
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = values_and_gradients(ops.reference.attention, exact, groups)
    assert_same(values_and_gradients(ops.sdpa.attention, leaves, groups), expected, 0.03)


def test_gradients_are_those_of_finite_differences(tiles):
    leaves, groups = operands([(2, 3, 2), (1, 3, 1)], head_dim=4)
    with torch.no_grad():
        leaves[1].copy_(torch.tensor([1.0, 3.0, 10.0]).view(-1, 1, 1))
    assert torch.autograd.gradcheck(lambda *leaves: flash_cpu.attention(*leaves, groups), leaves)


@pytest.mark.parametrize('path', PATHS)
def test_a_zero_query_and_key_attend_by_the_bias_alone(path):
    (qkv, scale, table), groups = operands([(2, 2, 1)])
    qkv = qkv.detach().clone()
    qkv[:, : 2 * HEADS * HEAD_DIM] = 0
    bias = torch.stack([table[:, 3 + a - c, 3 + b - d] for a, b, c, d in torch.cartesian_prod(*[torch.arange(2)] * 4)])
    weights = bias.T.unflatten(1, (4, 4)).softmax(-1)  # (heads, queries, keys)
    values = qkv[:, 2 * HEADS * HEAD_DIM :].unflatten(1, (HEADS, -1)).transpose(0, 1)
    expected = (weights @ values).transpose(0, 1).flatten(1)
    torch.testing.assert_close(PATHS[path](qkv, scale, table, groups), expected, rtol=1e-12, atol=1e-12)


def test_what_is_kept_for_backward_is_linear_in_tokens():
    def kept(windows):
        (qkv, scale, table), groups = operands([(8, 8, windows)], torch.float32)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda _: None):
            flash_cpu.attention(qkv, scale, table, groups)
        return sum(sizes), qkv.shape[0]

    (once, tokens), (twice, _) = kept(3), kept(6)
    assert twice - once == tokens * 3 * HEADS * HEAD_DIM


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='opcheck takes no tolerance')
def test_operators_are_what_a_compiler_is_told():
    leaves, groups = operands([(4, 4, 2), (2, 4, 1)], torch.float32)
    flat = [size for group in groups for size in group]
    torch.library.opcheck(flash_cpu.window_attention, (*leaves, flat), rtol=1e-4, atol=1e-4)
    qkv, scale, table = (x.detach() for x in leaves)
    grad = torch.randn(len(qkv), HEADS * HEAD_DIM)
    torch.library.opcheck(flash_cpu.window_attention_backward, (grad, qkv, scale, table, flat))


def test_a_second_derivative_is_an_error_with_flash_and_right_with_the_reference(monkeypatch):
    (qkv, scale, table), groups = operands([(2, 2, 1)])

    def second_derivative():
        out = attend(qkv, scale, table, groups)
        (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), qkv)

    with pytest.raises(RuntimeError, match='set SWINV2_MM_ATTENTION=reference'):
        second_derivative()
    monkeypatch.setattr(ops, 'forced', 'reference')
    assert second_derivative()[0].isfinite().all()


def taken(monkeypatch, *args, **kwargs):
    """The path that a call takes."""
    paths = []
    for name, path in ops.PATHS.items():
        monkeypatch.setattr(path, 'attention', lambda *_, name=name: paths.append(name))
    attend(*args, **kwargs)
    return paths


@pytest.mark.parametrize(
    'settings, path',
    [
        (dict(), 'flash_cpu'),
        (dict(gradients=False), 'flash_cpu'),
        (dict(dropout=0.1), 'reference'),
        (dict(compiling=True), 'flash_cpu' if compat.HAS_CUSTOM_OP else 'sdpa'),
        (dict(compiling=True, gradients=False), 'sdpa'),
        (dict(tracing=True), 'sdpa'),
        (dict(compiling=True, exporting=True), 'sdpa'),
        (dict(device='meta'), 'sdpa'),
        (dict(forced='reference'), 'reference'),
        (dict(forced='sdpa'), 'sdpa'),
        (dict(forced='flash_cpu', compiling=True, gradients=False), 'flash_cpu'),
    ],
    ids=str,
)
def test_the_path_is_picked_by_what_the_call_needs(monkeypatch, settings, path):
    leaves, groups = operands([(2, 2, 1)])
    leaves = [x.detach().to(settings.get('device', 'cpu')).requires_grad_() for x in leaves]
    monkeypatch.setattr(compat, 'is_compiling', lambda: settings.get('compiling', False))
    monkeypatch.setattr(compat, 'is_exporting', lambda: settings.get('exporting', False))
    monkeypatch.setattr(torch.jit, 'is_tracing', lambda: settings.get('tracing', False))
    monkeypatch.setattr(ops, 'forced', settings.get('forced'))
    with torch.set_grad_enabled(settings.get('gradients', True)):
        assert taken(monkeypatch, *leaves, groups, settings.get('dropout', 0.0)) == [path]


def test_flash_is_not_forced_upon_another_device(monkeypatch):
    leaves, groups = operands([(2, 2, 1)])
    monkeypatch.setattr(ops, 'forced', 'flash_cpu')
    with pytest.raises(
        ValueError, match='SWINV2_MM_ATTENTION=flash_cpu is for CPU, and the tensors are on meta: unset it'
    ):
        attend(*(x.to('meta') for x in leaves), groups)


def test_a_traced_backbone_has_the_operators_of_pytorch_alone(build_small):
    backbone, image = build_small().eval(), torch.randn(1, 3, 40, 33)
    traced = torch.jit.trace(backbone, image, check_trace=False)
    for actual, expected in strict_zip(traced(image), backbone(image)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    graph = str(traced.inlined_graph)
    assert 'scaled_dot_product_attention' in graph or torch.__version__ < compat.ACCURATE_WITH_BIAS['cpu']
    assert not any(name in graph for name in ('swinv2_mm::', 'mkldnn::', '_Linear', 'PythonOp'))


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='before PyTorch 2.7 nothing tells export from compilation')
def test_an_exported_backbone_has_the_operators_of_pytorch_alone(build_small):
    backbone, image = build_small().eval(), torch.randn(1, 3, 40, 33)
    exported = torch.export.export(backbone, (image,)).graph
    targets = {str(node.target) for node in exported.nodes}
    assert not any('swinv2_mm' in target or 'mkldnn' in target for target in targets)


def values_and_gradients_on_cuda(leaves, groups):
    leaves = [x.detach().cuda().requires_grad_() for x in leaves]
    return [x.cpu() for x in values_and_gradients(attend, leaves, groups)]


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
# 8 x 24 tokens are 64 modulo 128, with which cuDNN has had trouble
windows_on_cuda = pytest.mark.parametrize('height, width', [(8, 8), (16, 16), (7, 5), (8, 24), (32, 32)])


@on_cuda
@windows_on_cuda
def test_values_and_gradients_on_cuda_are_those_of_the_formula(height, width):
    leaves, groups = operands([(height, width, 3)], torch.float32, head_dim=32)
    in_float64 = [x.detach().double().requires_grad_() for x in leaves]
    expected = values_and_gradients(ops.reference.attention, in_float64, groups)
    assert_same(values_and_gradients_on_cuda(leaves, groups), expected, 1e-3)


@on_cuda
@windows_on_cuda
def test_values_and_gradients_on_cuda_in_bfloat16_are_those_on_cpu(height, width):
    """Not those of the formula: in both, rounding operands moves logits by tenths where the scale is 100.

    The gradient of the scale is a sum that cancels, of which rounding can be a tenth; float32 above has it.
    """
    leaves, groups = operands([(height, width, 3)], torch.bfloat16, head_dim=32)
    out, of_qkv, _, of_table = values_and_gradients_on_cuda(leaves, groups)
    expected_out, expected_of_qkv, _, expected_of_table = values_and_gradients(ops.sdpa.attention, leaves, groups)
    assert_same([out, of_qkv, of_table], [expected_out, expected_of_qkv, expected_of_table], 0.03)


def test_the_environment_variable_forces_a_path():
    code = 'import swinv2_mm.ops as ops; print(ops.forced)'
    env = {**os.environ, 'SWINV2_MM_ATTENTION': 'sdpa'}
    run = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == 'sdpa'


@pytest.mark.parametrize(
    'forced, dropout, message',
    [
        (
            'triton',
            0.0,
            'unknown attention path SWINV2_MM_ATTENTION=triton: '
            'set one of flash_cuda, flash_cpu, sdpa, reference, or unset it',
        ),
        (
            'flash_cpu',
            0.1,
            'SWINV2_MM_ATTENTION=flash_cpu cannot drop attention weights: unset it, or set attn_drop_rate=0',
        ),
    ],
)
def test_a_path_that_cannot_be_forced_is_an_error(monkeypatch, forced, dropout, message):
    leaves, groups = operands([(2, 2, 1)])
    monkeypatch.setattr(ops, 'forced', forced)
    with pytest.raises(ValueError) as error:
        attend(*leaves, groups, dropout)
    assert str(error.value) == message


def cudnn_is_on():
    return getattr(torch.backends.cuda, 'cudnn_sdp_enabled', lambda: False)()  # before PyTorch 2.3 it never is


@pytest.fixture
def calls_on_cuda(monkeypatch):
    """What `scaled_dot_product_attention` is called with, and whether with cuDNN, as if tensors were on a GPU."""
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, attn_mask, scale):
        calls.append((q, k, v, attn_mask, cudnn_is_on()))
        return attend(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(ops.sdpa, '_on_cuda', lambda _: True)
    monkeypatch.setitem(compat.ACCURATE_WITH_BIAS, 'cpu', compat.ACCURATE_WITH_BIAS['cuda'])
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', record)
    return calls


@pytest.mark.skipif(torch.__version__ < compat.ACCURATE_WITH_BIAS['cuda'], reason='no kernel takes a bias')
@pytest.mark.parametrize('num_columns', [8, 7, 3, 1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_on_cuda_rows_of_the_bias_are_aligned_and_cudnn_stays_off(calls_on_cuda, num_columns, dtype):
    leaves, groups = operands([(3, num_columns, 2)], dtype, head_dim=32)
    was_on = cudnn_is_on()
    out = ops.sdpa.attention(*leaves, groups)
    ((q, k, v, bias, cudnn),) = calls_on_cuda
    assert not cudnn and cudnn_is_on() == was_on
    assert was_on == (torch.__version__ >= (2, 5))
    if torch.__version__ < (2, 2):  # pytorch issue 112577
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    assert {x.dtype for x in (q, k, v, bias)} == {dtype}
    assert bias.shape == (1, HEADS, 3 * num_columns, 3 * num_columns)
    assert bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in bias.stride()[1:3])
    torch.testing.assert_close(
        out, ops.reference.attention(*leaves, groups), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2
    )


@pytest.mark.parametrize('num_tokens', [8, 12, 1])
def test_an_aligned_bias_has_its_values_and_gradients(num_tokens):
    bias = torch.randn(2, num_tokens, num_tokens, dtype=torch.float64, requires_grad=True)
    assert torch.equal(ops.sdpa._aligned(bias), bias)
    assert torch.autograd.gradcheck(ops.sdpa._aligned, bias)


@pytest.mark.parametrize(('window', 'shift'), [(1, 0), (3, 1), (4, 0), (4, 2), (5, 2)])
def test_padded_windows_are_ragged_ones(window, shift):
    for height in range(1, 2 * window + 3):
        for width in {1, window - 1, window, window + 1, 2 * window + shift, 2 * window + shift + 1} - {0}:
            (_, scale, table), _ = operands([(window, window, 1)])
            qkv = torch.randn(2, height, width, 3 * HEADS * HEAD_DIM, dtype=torch.float64, requires_grad=True)
            ragged = partition(2, height, width, window, shift)

            def attend_map(qkv, scale, table, windows):
                return ops.attention(qkv, scale, table, windows)

            def attend_ragged(qkv, scale, table, windows):
                def attend_part(tokens, part):
                    return reference.attention(tokens, scale, table, part.groups)

                return map_windows(attend_part, qkv, [windows])

            leaves = qkv, scale, table
            padded = values_and_gradients(attend_map, leaves, pad_windows(height, width, window, shift))
            expected = values_and_gradients(attend_ragged, leaves, ragged)
            assert expected[0].abs().max() > 0.1 and expected[1].abs().max() > 0.1
            for actual, value in strict_zip(padded, expected):  # a window of one token has gradients of 0
                torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-9)
