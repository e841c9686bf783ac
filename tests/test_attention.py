"""Attention and block against a loop over tokens, written from the paper's equations."""

import math

import pytest
import torch
from across_versions import half_dtypes
from torch import nn

from swinv2_mm import ops
from swinv2_mm.blocks import Block, WindowAttention
from swinv2_mm.windows import WindowGroup, gather, partition, scatter

MAPS = [
    # height, width, window, shift
    (7, 5, 3, 0),
    (7, 5, 3, 1),
    (7, 5, 4, 2),
    (7, 5, 5, 2),  # the width fits and is not shifted
    (7, 5, 16, 8),
    (1, 9, 4, 0),
    (1, 9, 4, 2),
    (25, 42, 8, 4),
    (25, 42, 16, 0),
]


def window_of(token, length, window, shift):
    return 0 if length <= window else (token - shift) // window


def bias_of_offsets(p, height, width, pretrained_window):
    """The bias of every offset within the map, (2H-1, 2W-1, heads), or within the window of a table."""
    if 'relative_position_bias_table.weight' in p:
        return p['relative_position_bias_table.weight'].unflatten(0, (2 * pretrained_window - 1, -1))
    mlp = 'cpb_mlp' if 'cpb_mlp.0.weight' in p else 'linear_cpb_mlp'
    dtype = p[f'{mlp}.0.weight'].dtype
    rows, columns = (torch.arange(1 - n, n, dtype=dtype) / (pretrained_window - 1) for n in (height, width))
    offsets = torch.stack([rows[:, None].expand(-1, len(columns)), columns.expand(len(rows), -1)], dim=-1)
    if mlp == 'cpb_mlp':
        offsets = torch.sign(offsets) * torch.log2(1 + 8 * offsets.abs()) / 3
    hidden = torch.relu(offsets @ p[f'{mlp}.0.weight'].T + p[f'{mlp}.0.bias'])
    return 16 / (1 + torch.exp(-hidden @ p[f'{mlp}.2.weight'].T))


def attend_token_by_token(p, x, num_heads, pretrained_window, window, shift):
    """Equations 2 to 4 for one query at a time. p: parameters of `WindowAttention` by name; x: (B, H, W, C)."""
    batch, height, width, channels = x.shape
    no_bias = x.new_zeros(channels)
    weights = p['qkv.weight'].view(3, channels, channels)
    biases = (p.get('q_bias', no_bias), no_bias, p.get('v_bias', no_bias))
    q, k, v = ((x @ w.T + b).view(batch, height, width, num_heads, -1) for w, b in zip(weights, biases))
    scale = p['logit_scale'].flatten().clamp(max=math.log(100)).exp()

    bias = bias_of_offsets(p, height, width, pretrained_window)
    row_0, column_0 = (side // 2 for side in bias.shape[:2])

    out = []
    for i in range(height):
        rows = [r for r in range(height) if window_of(r, height, window, shift) == window_of(i, height, window, shift)]
        for j in range(width):
            columns = [
                c for c in range(width) if window_of(c, width, window, shift) == window_of(j, width, window, shift)
            ]
            r, c = torch.tensor([(r, c) for r in rows for c in columns]).unbind(1)
            query, keys, values = q[:, i, j, None], k[:, r, c], v[:, r, c]  # (B, 1 or M, heads, d)
            cosine = (query * keys).sum(-1) / (query.norm(dim=-1) * keys.norm(dim=-1))
            logits = cosine * scale + bias[i - r + row_0, j - c + column_0]
            weight = logits.exp() / logits.exp().sum(1, keepdim=True)  # (B, M, heads)
            out.append((weight[..., None] * values).sum(1).flatten(1))
    return torch.stack(out, 1).view_as(x) @ p['proj.weight'].T + p['proj.bias']


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def block_token_by_token(p, x, *args):
    attention = {name[len('attn.') :]: value for name, value in p.items() if name.startswith('attn.')}
    x = x + layer_norm(attend_token_by_token(attention, x, *args), p['norm1.weight'], p['norm1.bias'])
    hidden = x @ p['mlp.fc1.weight'].T + p['mlp.fc1.bias']
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + layer_norm(hidden @ p['mlp.fc2.weight'].T + p['mlp.fc2.bias'], p['norm2.weight'], p['norm2.bias'])


def values_and_gradients(function, x, parameters):
    """Output and the gradients of a random projection of it, one per parameter that requires one and one of x."""
    x = x.clone().requires_grad_()
    out = function(x)
    projection = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    names = [name for name, p in parameters.items() if p.requires_grad]
    grads = torch.autograd.grad((out * projection).sum(), [x, *(parameters[name] for name in names)])
    return out.detach(), dict(zip(['x', *names], grads))


def assert_same(actual, expected, relative=1e-11):
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * expected.abs().max().item())


def attend(module, x, parts):
    """`WindowAttention` or a `Block` on a map ``(B, H, W, C)``, part by part; on the map itself if it has one part."""
    if len(parts) == 1:
        return module(x, parts[0])
    table = getattr(module, 'attn', module).position_bias(*map(max, zip(*(part.largest for part in parts))))
    tokens = [module(tokens, part, table) for tokens, part in zip(gather(x, parts), parts)]
    return scatter(tokens, parts, *x.shape[:3])


def assert_matches(module, brute_force, args, shape, window, shift):
    """Values of the inference path, then values and gradients of the training path, against the loop.

    In one part, and in several of at most 20 tokens or one window each.
    """
    module.double()
    x = torch.randn(*shape, dtype=torch.float64)
    windows = partition(*shape[:3], window, shift)
    leaves = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    expected, expected_grads = values_and_gradients(lambda x: brute_force(leaves, x, *args, window, shift), x, leaves)
    for parts in ([windows], windows.split(20)):
        with torch.no_grad():
            for _ in range(2):  # the second time with the kept bias
                assert_same(attend(module.eval(), x, parts), expected)
        parameters = dict(module.named_parameters())
        actual, grads = values_and_gradients(lambda x, parts=parts: attend(module.train(), x, parts), x, parameters)
        assert_same(actual, expected)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            assert expected_grads[name].abs().max() > 0, name
            assert_same(grad, expected_grads[name], 1e-9)


@pytest.mark.parametrize('height, width, window, shift', MAPS)
def test_window_attention_is_the_loop_over_tokens(randomize, height, width, window, shift):
    module = randomize(WindowAttention(12, num_heads=3, pretrained_window=6), std=0.5)
    with torch.no_grad():
        module.logit_scale.copy_(torch.tensor([1.0, 4.6, 6.0])[:, None, None])  # limit at log(100) = 4.605
    assert_matches(module, attend_token_by_token, (3, 6), (2, height, width, 12), window, shift)


@pytest.mark.parametrize('height, width, window, shift', MAPS[:-2])
def test_block_is_the_loop_over_tokens(randomize, height, width, window, shift):
    module = randomize(Block(8, num_heads=2, pretrained_window=4), std=0.5)
    assert_matches(module, block_token_by_token, (2, 4), (2, height, width, 8), window, shift)


def test_window_attention_without_qkv_bias_is_the_loop_over_tokens(randomize):
    module = randomize(WindowAttention(8, num_heads=2, pretrained_window=4, qkv_bias=False), std=0.5)
    assert not {'q_bias', 'v_bias'} & set(module.state_dict())
    assert_matches(module, attend_token_by_token, (2, 4), (2, 7, 5, 8), 4, 2)


def test_window_attention_with_frozen_position_bias_is_the_loop_over_tokens(randomize):
    module = randomize(WindowAttention(8, num_heads=2, pretrained_window=4), std=0.5)
    module.cpb_mlp.requires_grad_(False)  # the table then needs no gradient
    assert_matches(module, attend_token_by_token, (2, 4), (2, 7, 5, 8), 4, 2)


@pytest.mark.parametrize('position_bias', ['linear_cpb', 'parameterized'])
@pytest.mark.parametrize('height, width, window, shift', [(7, 5, 3, 1), (7, 5, 4, 2), (7, 5, 6, 0), (1, 9, 4, 2)])
def test_window_attention_with_another_position_bias_is_the_loop_over_tokens(
    randomize, position_bias, height, width, window, shift
):
    module = randomize(WindowAttention(8, 2, pretrained_window=6, position_bias=position_bias), std=0.5)
    assert not any(name.startswith('cpb_mlp') for name in module.state_dict())
    assert_matches(module, attend_token_by_token, (2, 6), (2, height, width, 8), window, shift)


def test_gradients_of_window_attention_are_those_of_finite_differences(randomize):
    module = randomize(WindowAttention(4, num_heads=2, pretrained_window=3), std=0.5).double()
    windows = partition(1, 3, 2, 2, 1)
    names = [name for name, _ in module.named_parameters()]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, tokens):
            return self.attention(tokens, windows)

    whole = Whole()

    def attend(tokens, *parameters):
        renamed = {f'attention.{name}': value for name, value in zip(names, parameters)}
        return torch.func.functional_call(whole, renamed, (tokens,))

    tokens = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attend, (tokens, *(p.detach().requires_grad_() for p in module.parameters())))


def operands(num_tokens, dtype, windows=3, heads=2, head_dim=32):
    """``qkv``, ``scale``, ``table`` and groups of windows of one row."""
    wide = torch.promote_types(dtype, torch.float32)
    qkv = torch.randn(windows * num_tokens, 3 * heads * head_dim, dtype=torch.float64).to(dtype)
    table = 16 * torch.rand(heads, 1, 2 * num_tokens - 1, dtype=torch.float64).to(wide)
    return qkv, torch.tensor([10.0, 100.0], dtype=wide).view(-1, 1, 1), table, [WindowGroup(1, num_tokens, windows)]


def heads_of(qkv, num_tokens):
    """Unit queries, unit keys and values, (windows, heads, N, d), with the norms of float32 or wider."""
    q, k, v = qkv.view(-1, num_tokens, 3, 2, 32).permute(2, 0, 3, 1, 4)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return *(nn.functional.normalize(x.to(wide), dim=-1) for x in (q, k)), v


def bias_of_rows(table, num_tokens):
    """(heads, N, N) of a (heads, 1, 2N-1) table: query minus key."""
    tokens = torch.arange(num_tokens)
    return table[:, 0, tokens[:, None] - tokens + num_tokens - 1]


def formula(q, k, v, bias):
    """Attention of scaled queries in float64, (windows*N, heads*d)."""
    logits = torch.einsum('whqd,whkd->whqk', q.double(), k.double()) + bias.double()
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return torch.einsum('whqk,whkd->wqhd', weights, v.double()).flatten(2).flatten(0, 1)


@pytest.mark.parametrize('num_tokens', [1, 2, 7, 33, 64, 145])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_attention_equals_the_formula(num_tokens, dtype, tolerance):
    qkv, scale, table, groups = operands(num_tokens, dtype)
    q, k, v = heads_of(qkv.double(), num_tokens)
    expected = formula(q * scale, k, v, bias_of_rows(table, num_tokens)).to(dtype)
    for path in (ops.sdpa.attention, ops.reference.attention, ops.flash_cpu.attention):
        assert_same(path(qkv, scale, table, groups), expected, tolerance)


@pytest.mark.parametrize('num_tokens', [1, 7, 33, 64])
@pytest.mark.parametrize('autocast', [False, True])
def test_fused_attention_in_bfloat16_equals_the_formula_of_its_operands_within_rounding(num_tokens, autocast):
    qkv, scale, table, groups = operands(num_tokens, torch.bfloat16)
    q, k, v = heads_of(qkv, num_tokens)
    expected = formula(*(x.bfloat16() for x in (q * scale, k, v, bias_of_rows(table, num_tokens))))
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        out = ops.sdpa.attention(qkv, scale, table, groups)
    assert out.dtype == torch.bfloat16
    assert_same(out.double(), expected, 2**-7)  # half a step for the weights, half a step for the result


@half_dtypes
@pytest.mark.parametrize('path', ['reference', 'flash_cpu'])
def test_logits_and_softmax_stay_in_float32_under_autocast(dtype, path):
    heads, tokens = 2, 33
    qkv, scale = torch.randn(tokens, 3 * heads * 32).to(dtype), torch.tensor([10.0, 100.0]).view(-1, 1, 1)
    table, groups = 16 * torch.rand(heads, 1, 2 * tokens - 1), [WindowGroup(1, tokens, 1)]
    with torch.autocast('cpu', dtype):
        out = ops.PATHS[path].attention(qkv, scale, table, groups)
    assert out.dtype == dtype
    expected = ops.reference.attention(*(t.double() for t in (qkv, scale, table)), groups)
    assert_same(out.double(), expected, torch.finfo(dtype).eps)


@half_dtypes
def test_scale_and_table_stay_in_float32_under_autocast_and_the_scale_has_a_limit(randomize, monkeypatch, dtype):
    module = randomize(WindowAttention(32, num_heads=2, pretrained_window=4))
    with torch.no_grad():
        module.logit_scale.copy_(torch.tensor([3.0, 9.0])[:, None, None])
    calls, attention = [], ops.attention
    monkeypatch.setattr(ops, 'attention', lambda *args: calls.append(args) or attention(*args))
    with torch.autocast('cpu', dtype):
        attend(module, torch.randn(2, 4, 4, 32), [partition(2, 4, 4, 4, 0)])
    ((qkv, scale, table, *_),) = calls
    assert [t.dtype for t in (qkv, scale, table)] == [dtype, torch.float32, torch.float32]
    torch.testing.assert_close(scale.flatten(), torch.tensor([math.exp(3), 100.0]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_unit_vectors_are_in_float32(dtype):
    x = torch.randn(50, 32).to(dtype)
    unit = ops.common.cosine(x)
    torch.testing.assert_close(unit, x.float() / x.float().norm(dim=-1, keepdim=True))
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(50))


def test_attention_weights_are_dropped_in_training_alone():
    # In windows of one token the attention weight is 1: every head of a token is dropped or scaled by 1 / (1 - p).
    module = WindowAttention(8, num_heads=4, pretrained_window=4, attn_drop=0.25)
    nn.init.eye_(module.proj.weight)
    nn.init.zeros_(module.proj.bias)
    x, parts = torch.randn(4, 5, 5, 8), [partition(4, 5, 5, 1, 0)]
    values = (x @ module.qkv.weight[16:].T).unflatten(-1, (4, 2))
    torch.testing.assert_close(attend(module.eval(), x, parts), values.flatten(-2))
    out = attend(module.train(), x, parts).unflatten(-1, (4, 2))
    dropped = (out == 0).all(-1, keepdim=True)
    torch.testing.assert_close(out, torch.where(dropped, 0, values / 0.75))
    assert 0.15 < dropped.float().mean() < 0.35


def test_output_is_dropped_in_training_alone():
    module = WindowAttention(8, num_heads=4, pretrained_window=4, proj_drop=0.25)
    x, parts = torch.randn(4, 5, 5, 8), [partition(4, 5, 5, 4, 2)]
    expected = attend(module.eval(), x, parts)
    without_dropout = WindowAttention(8, num_heads=4, pretrained_window=4)
    without_dropout.load_state_dict(module.state_dict())
    torch.testing.assert_close(expected, attend(without_dropout, x, parts))
    out = attend(module.train(), x, parts)
    torch.testing.assert_close(out, torch.where(out == 0, 0, expected / 0.75))
    assert 0.15 < (out == 0).float().mean() < 0.35


def test_mlp_is_dropped_in_training_alone(randomize):
    block = randomize(Block(8, num_heads=2, pretrained_window=4, drop=0.25))
    x = torch.randn(4, 5, 5, 8)
    hidden = block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(x)))
    torch.testing.assert_close(block.eval().mlp(x), hidden)
    out = block.train().mlp(x)
    assert 0.15 < (out == 0).float().mean() < 0.35
    draws = torch.stack([block.mlp(x) for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), hidden, rtol=0, atol=6 * (draws.std(0) / 4000**0.5).max().item())
