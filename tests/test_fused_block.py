"""The two branches of a block on CUDA against the layers of the same block, and where they give way to those."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from across_versions import strict_zip
from map_kernels import (  # before anything that imports Triton
    DEVICE,
    HALF,
    ON_GPU,
    Launches,
    error,
    kernels,  # noqa: F401
    needs_triton,  # noqa: F401
    on_gpu,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from swinv2_mm import SwinTransformerV2, blocks, ops
from swinv2_mm.backbone import Stage
from swinv2_mm.blocks import Block, LayerNorm
from swinv2_mm.ops import flash_cuda, fused_block
from swinv2_mm.windows import partition

pytestmark = pytest.mark.usefixtures('kernels')
MAP = (3, 20, 24, 8, 4) if ON_GPU else (3, 3, 5, 4, 2)  # batch, height, width, window and shift
SMALL = dict(embed_dims=16, num_heads=1, pretrained_window=4)
ARCH = dict(embed_dims=16, depths=(2, 1), num_heads=(1, 2))
ONE_STAGE = dict(embed_dims=16, depths=(2,), num_heads=(1,))


def randomized(module):
    """Random weights, of which none stays 0 or 1, on the device."""
    for name, parameter in module.named_parameters():
        if name.endswith('logit_scale'):
            nn.init.uniform_(parameter, 0, 3)
        elif name.endswith('weight') and parameter.ndim == 1:  # of a norm
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.1)
    return module.to(DEVICE)


def block_and_map(cut=MAP, **kwargs):
    block = randomized(Block(**{**SMALL, **kwargs}))
    return block, torch.randn(*cut[:3], block.norm1.weight.numel(), device=DEVICE), partition(*cut, DEVICE)


def drop_scales(batch, dtype=torch.float32):
    """Scales of both branches: the first image without attention, the second without MLP."""
    scales = torch.full((2, batch, 1, 1, 1), 1.25, dtype=dtype, device=DEVICE)
    scales[0, 0] = scales[1, 1] = 0
    return scales.unbind()


def values_and_gradients(block, x, windows, scales=(None, None), half=None):
    """The output, and the gradients of the map and the parameters, by name; of those that need one."""
    x = x.detach().requires_grad_(x.requires_grad or all(p.requires_grad for p in block.parameters()))
    with torch.autocast(DEVICE, half, enabled=half is not None):
        out = block(x, windows, None, *scales)
    assert out.dtype == x.dtype
    leaves = {name: p for name, p in [('x', x), *block.named_parameters()] if p.requires_grad}
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return {'out': out.detach(), **dict(zip(leaves, torch.autograd.grad(out, leaves.values(), weights)))}


def exact(block, x, windows, scales=(None, None)):
    """In float64, by the layers and the specification."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, 'forced', 'reference')
        patch.setattr(Block, '_is_fused', lambda *args: False)
        scales = [scale if scale is None else scale.double() for scale in scales]
        return values_and_gradients(copy.deepcopy(block).double(), x.double(), windows, scales)


def layers(block, *args, **kwargs):
    """What the layers give, with `sdpa`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, 'forced', 'sdpa')
        patch.setattr(Block, '_is_fused', lambda *args: False)
        return values_and_gradients(block, *args, **kwargs)


def assert_close(actual, expected, limit=1e-5):
    assert list(actual) == list(expected)
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < limit, errors


def counted(function, calls):
    def call(*args):
        calls.append(function.__name__)
        return function(*args)

    return call


@pytest.fixture
def branches(monkeypatch):
    """How often each branch is computed by its function."""
    calls = []
    for name in ('attention_branch', 'mlp_branch'):
        monkeypatch.setattr(fused_block, name, counted(getattr(fused_block, name), calls))
    return calls


ONCE = ['attention_branch', 'mlp_branch']
KINDS = {  # settings, and whether images are dropped
    'plain': ({}, False),
    'images dropped': ({}, True),
    '48 channels': (dict(embed_dims=48, num_heads=3), False),
    '96 channels': (dict(embed_dims=96, num_heads=3), True),
    'without a bias of queries': (dict(qkv_bias=False), True),
    'extra norm': (dict(extra_norm=True, mlp_ratio=1.5), True),
    'learned table': (dict(position_bias='parameterized'), True),
}


@pytest.mark.parametrize('kwargs, drops', KINDS.values(), ids=KINDS)
def test_values_and_gradients_are_those_of_the_layers(branches, kwargs, drops):
    block, x, windows = block_and_map(**kwargs)
    scales = drop_scales(len(x)) if drops else (None, None)
    actual = values_and_gradients(block, x, windows, scales)
    assert branches == ONCE
    assert len(actual) == 2 + len(list(block.parameters()))
    assert_close(actual, exact(block, x, windows, scales))


def assert_as_good(actual, composed, true, dtype):
    """As good as what the layers give, or as the dtype.

    Of the gradient of the scale most cancels: `test_flash_cuda.py` has what is left.
    """
    assert {name: value.dtype for name, value in actual.items()} == {name: x.dtype for name, x in composed.items()}
    for name in true:
        ours, theirs = (error(results[name], true[name]) for results in (actual, composed))
        limit = 0.5 if name.endswith('logit_scale') else max(1.5 * theirs, 2 * torch.finfo(dtype).eps)
        assert ours <= limit, (name, ours, theirs)


@pytest.mark.parametrize('half', HALF, ids=str)
@pytest.mark.parametrize('drops', [False, True])
def test_under_autocast_they_are_as_good_as_those_of_the_layers(branches, half, drops):
    block, x, windows = block_and_map(extra_norm=True, **dict(embed_dims=48, num_heads=3) if drops else {})
    scales = drop_scales(len(x)) if drops else (None, None)
    actual = values_and_gradients(block, x, windows, scales, half)
    assert branches == ONCE
    assert_as_good(actual, layers(block, x, windows, scales, half), exact(block, x, windows, scales), half)


def test_half_weights_and_maps_are_as_good_as_with_the_layers(branches):
    block, x, windows = block_and_map()
    block, x = block.bfloat16(), x.bfloat16()
    actual = values_and_gradients(block, x, windows)
    assert branches == ONCE
    assert_as_good(actual, layers(block, x, windows), exact(block, x, windows), torch.bfloat16)


@pytest.mark.parametrize(
    'frozen, half', [('attn.qkv', torch.float16), ('norm', None), ('attn', torch.bfloat16), ('', None)]
)
def test_frozen_parameters_leave_the_other_gradients_as_they_are(branches, frozen, half):
    block, x, windows = block_and_map()
    expected = values_and_gradients(block, x, windows, half=half)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    actual = values_and_gradients(block, x.requires_grad_(), windows, half=half)
    assert branches == 2 * ONCE
    assert {*expected} - {*actual} == {name for name, _ in block.named_parameters() if name.startswith(frozen)}
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_a_map_that_needs_no_gradient_gets_none(branches):
    block, x, windows = block_and_map()
    expected = values_and_gradients(block, x, windows, half=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = block(x, windows)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, block.parameters(), weights)
    assert branches == 2 * ONCE and not x.requires_grad
    for (name, _), gradient in strict_zip(block.named_parameters(), gradients):
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def test_a_map_may_have_any_strides(branches):
    block, x, windows = block_and_map()
    expected = values_and_gradients(block, x, windows)
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not strided.is_contiguous()
    assert_close(values_and_gradients(block, strided, windows), expected, 1e-12)
    assert branches == 2 * ONCE


def test_frozen_weights_get_no_gradient_and_change_no_other(branches):
    block, x, windows = block_and_map()
    x.requires_grad_()
    expected = values_and_gradients(block, x, windows)
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        layer.weight.requires_grad_(False)
    actual = values_and_gradients(block, x, windows)
    assert len(actual) == len(expected) - 4
    assert_close(actual, {name: expected[name] for name in actual}, 1e-12)


def test_flops_are_counted_forward_and_backward(branches):
    block, x, windows = block_and_map()
    with FlopCounterMode(display=False) as counter:
        block(x, windows).sum().backward()
    assert not branches  # the counter hooks all modules
    counts = {
        str(operator).rpartition('.')[2]: count for operator, count in counter.get_flop_counts()['Global'].items()
    }
    pairs = sum(group.count * (group.height * group.width) ** 2 for group in windows.groups)
    assert counts['map_attention'] == 2 * 2 * 16 * pairs
    assert counts['map_attention_backward'] == 5 * 2 * 16 * pairs


def test_an_empty_batch_gives_zero_gradients(branches):
    block, x, windows = block_and_map((0, 3, 5, 4, 2))
    results = values_and_gradients(block, x, windows, [scale[:0] for scale in drop_scales(2)])
    assert branches == ONCE
    assert results.pop('out').shape == results.pop('x').shape == x.shape
    assert len(results) == len(list(block.parameters()))
    assert not any(gradient.any() for gradient in results.values())


def test_checkpointing_and_a_copy_change_nothing(branches):
    block, x, _ = block_and_map()
    expected = values_and_gradients(stage_of(block, False), x, None)
    for stage in (stage_of(block, True), stage_of(copy.deepcopy(block), False)):
        actual = values_and_gradients(stage, x, None)
        assert list(actual) == list(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert branches == 4 * ONCE  # with checkpointing again in backward


class OneBlock(Stage):
    """A stage of one block, called as a block is."""

    def forward(self, x, *args):
        return super().forward(x)


def stage_of(block, with_cp):
    return OneBlock([block], nn.Identity(), MAP[3], with_cp).train()


def test_a_second_derivative_is_an_error():
    block, x, windows = block_and_map((1, 2, 3, 4, 0))
    (first,) = torch.autograd.grad(block(x.requires_grad_(), windows).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        first.square().sum().backward()


# where the layers are called


def ramped(out):
    """Another output, also after a norm."""
    return out + torch.linspace(-1, 1, out.shape[-1]).to(out)


class OtherLinear(nn.Linear):
    def forward(self, x):
        return ramped(super().forward(x))


class OtherNorm(LayerNorm):
    def forward(self, x):
        return ramped(super().forward(x))


def replace(block, name, kind):
    """Make a layer one of another kind, with the same weights."""
    block.get_submodule(name).__class__ = kind


def hook(block, name):
    block.get_submodule(name).register_forward_hook(lambda module, args, out: ramped(out))


CHANGES = {
    **{
        f'a hook on {name}': partial(hook, name=name)
        for name in ('attn', 'attn.qkv', 'attn.proj', 'norm1', 'mlp', 'mlp.fc1', 'mlp.fc2', 'norm2')
    },
    'another linear': partial(replace, name='attn.proj', kind=OtherLinear),
    'another linear in the MLP': partial(replace, name='mlp.fc2', kind=OtherLinear),
    'another norm': partial(replace, name='norm2', kind=OtherNorm),
}


@pytest.mark.parametrize('change', CHANGES)
def test_what_is_not_plain_is_called(branches, change):
    block, x, windows = block_and_map((1, 3, 5, 4, 2))
    before = exact(block, x, windows)['out']
    CHANGES[change](block)
    with torch.no_grad():
        out = block(x, windows)
    assert not branches
    expected = exact(block, x, windows)['out']
    assert error(out, expected) < 1e-5 < 0.01 < error(before, expected)


@pytest.mark.parametrize('autocast', [False, True])
def test_float64_is_computed_by_the_layers(branches, autocast):
    block, x, windows = block_and_map((1, 3, 5, 4, 2))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = block.double()(x.double(), windows).detach()
    assert error(out, exact(block, x, windows)['out']) < 1e-12
    assert not branches


def turn_on_dropout(block):
    """As for samples of a network with dropout, while all else is in evaluation."""
    for module in block.eval().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
            module.train()


def test_dropout_that_is_turned_on_alone_drops(branches):
    block, x, windows = block_and_map((1, 3, 5, 4, 2))
    turn_on_dropout(block)
    with torch.no_grad():
        assert error(block(x, windows), block(x, windows)) > 0.01
    assert not branches


def test_a_layer_with_a_bias_of_its_own_has_it(branches):
    block, x, windows = block_and_map((1, 3, 5, 4, 2))
    block.attn.qkv = randomized(nn.Linear(16, 48))
    block.attn.q_bias = block.attn.v_bias = None
    assert_close(values_and_gradients(block, x, windows), exact(block, x, windows))
    assert not branches


@pytest.mark.skipif(torch.__version__ < (2, 1), reason='norms have no such argument before PyTorch 2.1')
def test_a_norm_without_a_bias_is_called(branches):
    block, x, windows = block_and_map((1, 3, 5, 4, 2))
    block.norm1 = randomized(LayerNorm(16, bias=False))
    assert_close(values_and_gradients(block, x, windows), exact(block, x, windows))
    assert not branches


def test_scales_of_branches_that_learn_or_are_not_of_images_are_those_of_the_layers(branches):
    block, x, windows = block_and_map()
    gate = torch.rand(len(x), 1, 1, 1, device=DEVICE).requires_grad_()
    of_rows = torch.rand(len(x), x.shape[1], 1, 1, device=DEVICE)
    for scales in ((gate, None), (None, of_rows)):
        assert_close(values_and_gradients(block, x, windows, scales), exact(block, x, windows, scales))
    (of_gate,) = torch.autograd.grad(block(x, windows, None, gate, None).sum(), gate)
    assert of_gate.any() and not branches


@pytest.mark.parametrize('drop', [dict(drop=0.5), dict(attn_drop=0.5)], ids=str)
def test_dropout_is_called_in_training_alone(branches, drop):
    block, x, windows = block_and_map((1, 3, 5, 4, 2), **drop)
    with torch.no_grad():
        out = block(x, windows)
        assert not branches
        assert error(out, block.eval()(x, windows)) > 0.01
        assert branches == ONCE
    assert error(block(x, windows), exact(block, x, windows)['out']) < 1e-5


def test_a_forced_path_is_taken(branches, monkeypatch):
    block, x, windows = block_and_map((1, 3, 5, 4, 2))
    expected = values_and_gradients(block, x, windows)
    assert branches == ONCE
    monkeypatch.setattr(ops, 'forced', 'sdpa')
    monkeypatch.setattr(flash_cuda, 'attention', None)
    assert_close(values_and_gradients(block, x, windows), expected)
    assert branches == ONCE


def test_transforms_and_traces_see_the_layers(branches):
    block, x, windows = block_and_map((2, 3, 5, 4, 2))
    expected = values_and_gradients(block, x, windows)
    assert branches == ONCE
    frozen = copy.deepcopy(block).requires_grad_(False)
    traced = torch.jit.trace(lambda x: frozen(x, windows), x, check_trace=False)
    assert error(traced(x), expected['out']) < 1e-5
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    of_x = torch.func.grad(lambda x: (block(x, windows) * weights).sum())(x)
    assert error(of_x, expected['x']) < 1e-5
    _, along = torch.func.jvp(lambda x: block(x, windows), (x,), (x,))
    assert error((along * weights).sum(), (x * of_x).sum()) < 1e-4
    assert branches == ONCE


# the post-norm


def formula(x, branch, weight, bias, scale, eps):
    out = F.layer_norm(branch, weight.shape, weight, bias, eps)
    return x + (out if scale is None else out * scale.view(-1, *[1] * (x.ndim - 1)))


POST_NORMS = {  # the shape, whether images are dropped
    'one token': ((1, 1, 16), False),
    '48 channels': ((3, 5, 7, 48), True),
    '96 channels': ((2, 3, 96), False),
    'many tokens': ((2, 9, 31, 64), True),
    '4096 channels': ((2, 2, 4096), True),
}


@pytest.mark.parametrize('shape, drops', POST_NORMS.values(), ids=POST_NORMS)
@pytest.mark.parametrize('half', [torch.float32, *HALF], ids=str)
def test_the_post_norm_is_the_formula(monkeypatch, shape, drops, half):
    monkeypatch.setattr(fused_block, 'PROGRAMS', 3)  # so that each sums over tokens far from each other
    channels = shape[-1]
    x, branch = torch.randn(2, *shape, device=DEVICE).unbind()
    branch = (3 * branch + 1).to(half)
    weight, bias = torch.randn(2, channels, device=DEVICE).unbind()
    scale = torch.linspace(0, 1.5, shape[0], device=DEVICE).view(-1, 1) if drops else None
    out, copied = fused_block.post_norm(x, branch, weight, bias, scale, 1e-5, half)
    leaves = [y.double().requires_grad_() for y in (x, branch, weight, bias)]
    true = formula(*leaves, None if scale is None else scale.double(), 1e-5)
    assert error(out, true) < 1e-6
    grad, grad_half = torch.randn(2, *shape, device=DEVICE).unbind()
    grad_half = None if half == torch.float32 else grad_half.to(half)
    whole = grad.double() if grad_half is None else grad.double() + grad_half.double()
    of_x, of_branch, of_weight, of_bias = torch.autograd.grad(true, leaves, whole)
    total, actual, sums = fused_block.post_norm_backward(grad, grad_half, branch, weight, scale, 1e-5)
    of_linear_bias = of_branch.flatten(0, -2).sum(0)
    rounding = 1e-6 if half == torch.float32 else torch.finfo(half).eps / 2
    if grad_half is None:
        assert copied.numel() == total.numel() == 0
    else:
        assert torch.equal(copied, out.to(half))
        assert error(total, of_x) < 1e-6
    assert actual.dtype == half and error(actual, of_branch) < rounding
    for value, expected in strict_zip(sums.sum(0), (of_weight, of_bias, of_linear_bias)):
        size = whole.square().mean().sqrt() if expected is of_linear_bias else None
        assert error(value, expected, size) < 1e-5


def test_one_compiled_post_norm_serves_all_sizes(monkeypatch):
    from swinv2_mm.ops import post_norm_kernels

    launches = Launches.of(monkeypatch, post_norm_kernels)
    for i in range(20):
        x = torch.zeros(1 + i % 5, 1 + 7 * i, 16 * (i % 3 + 1), 64, device=DEVICE)
        scale, weight = x.new_ones(len(x), 1), x.new_ones(64)
        out, half = fused_block.post_norm(x, x.bfloat16(), weight, weight, scale, 1e-5, torch.bfloat16)
        fused_block.post_norm_backward(out, half, x.bfloat16(), weight, scale, 1e-5)
    for launched in launches.values():
        assert len(launched.calls) == 20 and len(launched.variants()) == 1


@pytest.mark.parametrize('half', [torch.float32, torch.bfloat16], ids=str)
def test_its_operators_are_what_a_compiler_is_told(half):
    x, scale = torch.randn(2, 3, 16, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    branch, weight = x.to(half), torch.ones(16, device=DEVICE)
    tests = 'test_schema', 'test_faketensor'
    opcheck = partial(torch.library.opcheck, test_utils=tests)
    opcheck(fused_block.post_norm, (x, branch, weight, weight, scale, 1e-5, half))
    grad_half = None if half == torch.float32 else branch
    opcheck(fused_block.post_norm_backward, (x, grad_half, branch, weight, None, 1e-5))


# the backbone


def backbone_and_image(**kwargs):
    settings = dict(arch=ARCH, window_size=4, drop_path_rate=0.0, out_indices=(0, 1))
    backbone = randomized(SwinTransformerV2(**{**settings, **kwargs}))
    return backbone.train(), torch.randn(2, 3, 20, 13, device=DEVICE)


def of_backbone(backbone, image, run=None, half=None):
    """Outputs, and gradients of the parameters."""
    with torch.autocast(DEVICE, half, enabled=half is not None):
        outs = (backbone if run is None else run)(image)
    weights = [torch.randn(out.shape, generator=torch.Generator().manual_seed(i)).to(out) for i, out in enumerate(outs)]
    gradients = torch.autograd.grad(outs, [p for p in backbone.parameters() if p.requires_grad], weights)
    return [*(out.detach() for out in outs), *gradients]


def exact_backbone(backbone, image):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, 'forced', 'reference')
        return of_backbone(copy.deepcopy(backbone).double(), image.double())


@pytest.mark.parametrize(
    'half', [None, pytest.param(torch.bfloat16, marks=on_gpu), pytest.param(torch.float16, marks=on_gpu)]
)
def test_a_backbone_has_the_values_and_gradients_of_its_layers(branches, half):
    backbone, image = backbone_and_image()
    actual = of_backbone(backbone, image, half=half)
    assert branches == 3 * ONCE
    true = exact_backbone(backbone, image)
    limit = 1e-5 if half is None else 16 * torch.finfo(half).eps
    assert max(error(a, e) for a, e in strict_zip(actual, true)) < limit


def test_stochastic_depth_drops_images_of_a_batch(branches, monkeypatch):
    backbone, image = backbone_and_image(
        drop_path_rate=0.9, arch=dict(embed_dims=16, depths=(2,), num_heads=(1,)), out_indices=(0,)
    )
    scales = torch.tensor([[0.0, 4.0], [4.0, 0.0]], device=DEVICE)
    monkeypatch.setattr(blocks.DropPath, 'draw', lambda self, x, branches: scales.to(x.dtype).view(2, 2, 1).unbind())
    actual = of_backbone(backbone, image)
    assert branches == 2 * ONCE
    assert max(error(a, e) for a, e in strict_zip(actual, exact_backbone(backbone, image))) < 1e-5


@pytest.mark.skipif(torch.__version__ < (2, 7), reason='before PyTorch 2.7 the graph breaks')
def test_one_compiled_graph_serves_all_batches_and_calls_the_kernels_of_attention(branches):
    from torch._dynamo import lookup_backend, mark_dynamic

    torch._dynamo.reset()
    graphs = []

    def aot_eager(graph, inputs):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        graphs.append({str(node.target) for part in parts for node in part.graph.nodes})
        return lookup_backend('aot_eager')(graph, inputs)

    backbone, _ = backbone_and_image(arch=ONE_STAGE, out_indices=(0,))
    compiled = torch.compile(backbone, backend=aot_eager, fullgraph=True)
    for batch in (2, 3, 5):
        image = torch.randn(batch, 3, 8, 12, device=DEVICE)
        mark_dynamic(image, 0)
        actual = of_backbone(backbone, image, compiled)
        errors = [error(a, e) for a, e in strict_zip(actual, exact_backbone(backbone, image))]
        assert max(errors) < 1e-4, errors
    assert not branches and len(graphs) == 1
    operators = {name for name in graphs[0] if 'swinv2_mm' in name}
    assert operators == {'swinv2_mm.map_attention.default', 'swinv2_mm.map_attention_backward.default'}


# on a GPU


@on_gpu
@pytest.mark.skipif(torch.__version__ < (2, 7), reason='before PyTorch 2.7 the graph breaks')
@pytest.mark.parametrize('half', [None, torch.bfloat16], ids=str)
def test_inductor_gives_the_same(half):
    torch._dynamo.reset()
    backbone, image = backbone_and_image()
    compiled = torch.compile(backbone, fullgraph=True)
    limit = 1e-4 if half is None else 16 * torch.finfo(half).eps
    actual, expected = of_backbone(backbone, image, compiled, half), exact_backbone(backbone, image)
    assert max(error(a, e) for a, e in strict_zip(actual, expected)) < limit


@on_gpu
def test_a_step_with_a_gradient_scaler_trains(branches):
    backbone, image = backbone_and_image(drop_path_rate=0.2)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler('cuda')
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        torch.manual_seed(0)
        with torch.autocast('cuda', torch.float16):
            loss = sum(out.float().square().mean() for out in backbone(image))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert branches == 15 * ONCE
    assert scaler.get_scale() >= 2**13 and losses[-1] < losses[0]


@on_gpu
def test_a_cuda_graph_of_the_backbone_gives_the_same(branches):
    backbone, image = backbone_and_image()
    expected = of_backbone(backbone, image)
    graphed = torch.cuda.make_graphed_callables(backbone, (image,))
    calls = len(branches)
    actual = of_backbone(backbone, image, graphed)
    assert len(branches) == calls  # it replays
    assert max(error(a, e) for a, e in strict_zip(actual, expected)) < 1e-5


@on_gpu
def test_data_parallel_on_one_gpu_gives_the_same(branches):
    backbone, image = backbone_and_image()
    expected = of_backbone(backbone, image)
    actual = of_backbone(backbone, image, nn.DataParallel(backbone, device_ids=[0]))
    assert branches == 6 * ONCE
    assert max(error(a, e) for a, e in strict_zip(actual, expected)) < 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_data_parallel_on_two_gpus_gives_the_same(branches):
    backbone, image = backbone_and_image()
    expected = of_backbone(backbone, image)
    actual = of_backbone(backbone, image, nn.DataParallel(backbone, device_ids=[0, 1]))
    assert len(branches) == 18
    assert max(error(a, e) for a, e in strict_zip(actual, expected)) < 1e-5


@on_gpu
def test_distributed_training_of_one_process_gives_the_same(branches, tmp_path):
    torch.distributed.init_process_group('nccl', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        backbone, image = backbone_and_image()
        expected = of_backbone(backbone, image)
        wrapped = nn.parallel.DistributedDataParallel(backbone, device_ids=[0])
        outs = wrapped(image)
        weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outs)]
        torch.autograd.backward(outs, weights)
        assert branches == 6 * ONCE
        actual = [*outs, *(p.grad for p in backbone.parameters())]
        assert max(error(a, e) for a, e in strict_zip(actual, expected)) < 1e-5
    finally:
        torch.distributed.destroy_process_group()
