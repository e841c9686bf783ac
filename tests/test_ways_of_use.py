"""Ways of using the backbone that people know from elsewhere give the numbers of a plain forward pass, or an error."""

import copy
import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from across_versions import ASSIGN, strict_zip
from mmengine.analysis import FlopAnalyzer
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

from swinv2_mm import SwinTransformerV2, compat, load_pretrained, ops
from swinv2_mm import backbone as backbone_module
from swinv2_mm.ops import linear as linear_module
from swinv2_mm.windows import axis_segments

needs_export = pytest.mark.skipif(torch.__version__ < (2, 7), reason='export is told from compilation from 2.7 on')
SIZE = 52, 84  # of the image: padded, and with shifted windows of every kind


@pytest.fixture
def build(build_small):
    """Build a small backbone of two stages."""

    def build(**kwargs):
        arch = {'embed_dims': 16, 'depths': (2, 2), 'num_heads': (1, 2)}
        return build_small(**{'arch': arch, 'out_indices': (0, 1), **kwargs})

    return build


def images(batch=1, dtype=torch.float32):
    return torch.randn(batch, 3, *SIZE, dtype=dtype)


def assert_same(actual, wanted, tolerance=1e-5):
    for a, w in strict_zip(actual, wanted):
        torch.testing.assert_close(a, w, rtol=0, atol=tolerance * w.abs().max().item())


def gradients(backbone, image):
    backbone.zero_grad()
    sum(out.square().sum() for out in backbone(image)).backward()
    return {name: p.grad for name, p in backbone.named_parameters()}


# Graphs


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that tracing is deprecated
        yield


@pytest.mark.parametrize('with_grad', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_a_trace_serves_any_batch_and_refuses_other_sizes(build, quiet, with_grad, training):
    backbone = build().train(training)
    with torch.set_grad_enabled(with_grad):
        traced = torch.jit.trace(backbone, images())  # which compares with a second run
        for batch in (1, 2, 5):
            image = images(batch)
            assert_same(traced(image), backbone(image))
        for height, width in ((SIZE[0] + 1, SIZE[1]), (SIZE[0], SIZE[1] - 4), SIZE[::-1], (1, SIZE[1])):
            with pytest.raises(RuntimeError, match='split_with_sizes'):
                traced(torch.randn(1, 3, height, width))


def run_onnx(path, image):
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return [torch.from_numpy(out) for out in session.run(None, {session.get_inputs()[0].name: image.numpy()})]


@needs_export
@pytest.mark.parametrize('frozen', [False, True])
def test_onnx_in_the_tutorial_form_has_the_values(build, quiet, frozen, tmp_path):
    pytest.importorskip('onnxscript')
    backbone, image = build().eval().requires_grad_(not frozen), images(2)
    torch.onnx.export(backbone, (image,), tmp_path / 'new.onnx', dynamo=True, verbose=False)
    assert_same(run_onnx(tmp_path / 'new.onnx', image), [out.detach() for out in backbone(image)], 1e-4)


@needs_export
def test_onnx_by_the_older_exporter_serves_any_batch_and_refuses_other_sizes(build, quiet, tmp_path):
    pytest.importorskip('onnx')
    backbone, path = build().eval(), tmp_path / 'old.onnx'
    dynamic = {name: {0: 'batch', 2: 'height', 3: 'width'} for name in ('image', 'first', 'second')}
    torch.onnx.export(
        backbone,
        (images(2),),
        path,
        dynamo=False,
        input_names=['image'],
        output_names=['first', 'second'],
        dynamic_axes=dynamic,
        opset_version=17,
    )
    for batch in (1, 2, 5):
        image = images(batch)
        assert_same(run_onnx(path, image), [out.detach() for out in backbone(image)], 1e-4)
    for height, width in ((SIZE[0] + 1, SIZE[1]), SIZE[::-1]):
        with pytest.raises(Exception, match=r'[Ss]plit'):
            run_onnx(path, torch.randn(2, 3, height, width))


@needs_export
def test_an_exported_program_of_any_size_has_the_values_at_every_size(build):
    backbone = build(arch=dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))).double().eval().requires_grad_(False)
    axes = {0: torch.export.Dim('batch'), 2: torch.export.Dim('height', min=8), 3: torch.export.Dim('width', min=8)}
    with compat.open_sizes():
        image = images(2, torch.float64)
        exported = torch.export.export(backbone, (image,), dynamic_shapes=(axes,)).module()
    for batch, height, width in ((2, *SIZE), (1, 16, 16), (3, 17, 40), (1, 8, 8), (4, 65, 33)):
        image = torch.randn(batch, 3, height, width, dtype=torch.float64)
        assert_same(exported(image), backbone(image), 1e-12)


@needs_export
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('with_grad', [False, True])
def test_an_exported_program_has_the_values_and_gradients(build, with_grad, training):
    backbone, image = build().double().train(training), images(2, torch.float64)
    with torch.set_grad_enabled(with_grad):
        batch = torch.export.Dim('batch')
        exported = torch.export.export(backbone, (image,), dynamic_shapes=({0: batch},)).module()
        for size in (2, 3):
            other = images(size, torch.float64)
            assert_same(exported(other), backbone(other), 1e-12)
    if with_grad:
        sum(out.square().sum() for out in exported(image)).backward()
        wanted = gradients(backbone, image)
        for name, parameter in exported.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-9)


# Layers that are replaced, wrapped or hooked

LAYERS = 'attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2', 'attn.cpb_mlp.0', 'attn.cpb_mlp.2'


class LowRank(nn.Module):
    """A linear layer with a low-rank adapter beside it; it shows the weight of the layer, as those of peft do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.a = nn.Parameter(torch.randn(2, layer.in_features, dtype=layer.weight.dtype) / 4)
        self.b = nn.Parameter(torch.randn(layer.out_features, 2, dtype=layer.weight.dtype) / 4)

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.b.T


def layers_of(backbone, which):
    for name, module in list(backbone.named_modules()):
        if name.endswith(which):
            parent, _, child = name.rpartition('.')
            yield backbone.get_submodule(parent), child, module


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('which', [*LAYERS, 'downsample.reduction'])
def test_an_adapter_in_the_place_of_a_layer_is_used_and_trained(build, which, training):
    backbone, image = build().double().train(training), images(2, torch.float64)
    merged = copy.deepcopy(backbone)
    adapters = []
    for (parent, child, layer), (_, _, other) in strict_zip(layers_of(backbone, which), layers_of(merged, which)):
        adapters.append((LowRank(layer), other))
        setattr(parent, child, adapters[-1][0])
        other.weight.data += adapters[-1][0].b.detach() @ adapters[-1][0].a.detach()
    with torch.no_grad():
        assert_same(backbone(image), merged(image), 1e-12)
    assert_same(backbone(image), merged(image), 1e-12)
    gradients(backbone, image), gradients(merged, image)
    for adapter, other in adapters:
        of_weight = other.weight.grad
        torch.testing.assert_close(adapter.a.grad, adapter.b.detach().T @ of_weight, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(adapter.b.grad, of_weight @ adapter.a.detach().T, rtol=1e-8, atol=1e-9)
        assert adapter.a.grad.abs().max() > 0


def test_every_gradient_reaches_adapters_on_all_layers(build):
    backbone = build()
    for which in LAYERS[:4]:
        for parent, child, layer in layers_of(backbone, which):
            setattr(parent, child, LowRank(layer))
    gradients(backbone, images())
    assert not [name for name, p in backbone.named_parameters() if p.grad is None]


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('which', LAYERS)
def test_a_forward_of_its_own_is_called(build, which, training):
    backbone, image = build().double().train(training), images(2, torch.float64)
    doubled = copy.deepcopy(backbone)
    for _, _, layer in layers_of(backbone, which):
        layer.forward = lambda x, layer=layer: F.linear(x, 2 * layer.weight, layer.bias)
    for _, _, layer in layers_of(doubled, which):
        layer.weight.data *= 2
    assert_same(backbone(image), doubled(image), 1e-12)
    with torch.no_grad():
        assert_same(backbone(image), doubled(image), 1e-12)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('of_all', [False, True])
def test_hooks_see_every_layer_and_may_change_it(build, of_all, training):
    backbone, image = build().double().train(training), images(2, torch.float64)
    doubled, seen, handles = copy.deepcopy(backbone), set(), []
    for module in doubled.modules():
        if isinstance(module, nn.Linear):  # all, position MLPs included
            for parameter in module.parameters():
                parameter.data *= 2

    def hook(module, inputs, out):
        seen.add(module)
        return 2 * out if type(module) is nn.Linear else None

    try:
        if of_all:
            handles.append(nn.modules.module.register_module_forward_hook(hook))
        else:
            handles += [module.register_forward_hook(hook) for module in backbone.modules()]
        outs = backbone(image)
    finally:
        for handle in handles:
            handle.remove()
    # The bias of queries and values is added after the layer that the hook doubles, as in the copy.
    assert_same(outs, doubled(image), 1e-12)
    containers = nn.ModuleList, type(backbone)
    uncalled = {name for name, m in backbone.named_modules() if m not in seen and not isinstance(m, containers)}
    assert {name.rpartition('.')[2] for name in uncalled} <= {
        'drop',
        'drop_path',
        'downsample',
    }  # they would do nothing


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('with_cp', [False, True])
def test_hooks_on_blocks_see_the_map(build, monkeypatch, with_cp, training):
    monkeypatch.setattr(backbone_module, 'PART_SIZE', 600)  # several parts a block
    backbone = build(with_cp=with_cp, drop_path_rate=0.5).double().train(training)
    image, seen = images(2, torch.float64), []
    torch.manual_seed(1)
    wanted = gradients(backbone, image)
    for stage in backbone.layers:
        for block in stage.blocks:
            block.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0].shape, out.shape)))
    torch.manual_seed(1)
    for name, grad in gradients(backbone, image).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-9)
    # From 2.1 on, recomputation stops at the last tensor that backward needs, before the hook.
    runs = 2 if with_cp and training and torch.__version__ < (2, 1) else 1
    assert sorted(seen) == sorted([((2, 13, 21, 16),) * 2, ((2, 7, 11, 32),) * 2] * 2 * runs)


def test_hooks_on_blocks_may_change_the_map(build):
    backbone, image = build().double().eval(), images(2, torch.float64)
    x = backbone.layers[0].downsample(backbone.layers[0](backbone.patch_embed(image)))
    for block in backbone.layers[1].blocks:
        block.register_forward_hook(lambda module, inputs, out: inputs[0] + 1)
    assert_same([backbone(image)[1]], [backbone.norm1(x + 2).permute(0, 3, 1, 2)], 1e-12)


class Sharded(nn.Module):
    """A block whose parameters are there while it is called alone, as a sharding engine has it."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        block.attn.position_bias.forward = self.refuse

    def __getattr__(self, name):
        return super().__getattr__(name) if name == 'block' else getattr(super().__getattr__('block'), name)

    def refuse(self, *_):
        raise AssertionError('the position bias was computed outside of the block')

    def forward(self, *args):
        del self.block.attn.position_bias.forward
        try:
            return self.block(*args)
        finally:
            self.block.attn.position_bias.forward = self.refuse


def test_wrapped_blocks_compute_their_position_bias_when_they_are_called(build):
    backbone, image = build().double(), images(2, torch.float64)
    wanted = gradients(backbone, image)
    for stage in backbone.layers:
        for i, block in enumerate(stage.blocks):
            stage.blocks[i] = Sharded(block)
    for name, grad in gradients(backbone, image).items():
        torch.testing.assert_close(grad, wanted[name.replace('.block.', '.')], rtol=1e-9, atol=1e-9)


def weight_norm(layer):
    torch.nn.utils.weight_norm(layer)
    return lambda: layer.weight_v * (layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True))


def pruned(layer):
    prune.l1_unstructured(layer, 'weight', 0.5)
    return lambda: layer.weight_orig * layer.weight_mask


def parametrized(layer):
    torch.nn.utils.parametrizations.weight_norm(layer)
    parts = layer.parametrizations.weight
    return lambda: parts.original1 * (parts.original0 / parts.original1.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    'change', [weight_norm, pruned, *([parametrized] if torch.__version__ >= (2, 1) else [])], ids=lambda f: f.__name__
)
@pytest.mark.parametrize('which', LAYERS)
def test_weights_that_are_computed_anew_are_those_of_now(build, quiet, which, change):
    backbone, image = build().double(), images(2, torch.float64)
    plain = copy.deepcopy(backbone)
    computed = [change(layer) for _, _, layer in layers_of(backbone, which)]
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-3)
    for training in (True, True, False):
        backbone.train(training)
        gradients(backbone, image)
        optimizer.step()
        ours, theirs = dict(backbone.named_parameters()), dict(plain.named_parameters())
        for name in ours.keys() & theirs.keys():
            theirs[name].data.copy_(ours[name])
        for (_, _, layer), weight in strict_zip(layers_of(plain, which), computed):
            layer.weight.data.copy_(weight())
        with torch.no_grad():
            assert_same(backbone(image), plain(image), 1e-12)


def test_dynamic_quantization_rounds_and_no_more(build, quiet):
    if 'fbgemm' not in torch.backends.quantized.supported_engines:
        pytest.skip('PyTorch was built without quantized layers')
    backbone, image = build().eval(), images()
    for name, parameter in backbone.named_parameters():
        if name.endswith('logit_scale'):
            parameter.data.zero_()  # large ones would enlarge the rounding
    quantized = torch.ao.quantization.quantize_dynamic(backbone, {nn.Linear})
    linear = [name for name, module in backbone.named_modules() if type(module) is nn.Linear]
    assert linear and all('quantized' in type(quantized.get_submodule(name)).__module__ for name in linear)
    for out, wanted in strict_zip(quantized(image), backbone(image)):
        assert 1e-4 < (out - wanted).norm() / wanted.norm() < 0.1


def test_any_stochastic_depth_may_stand_in_the_place_of_ours(build):
    class Halve(nn.Module):
        def forward(self, x):
            return x / 2

    backbone, image = build().double(), images(2, torch.float64)
    halved, without = copy.deepcopy(backbone), copy.deepcopy(backbone)
    for parent, child, _ in layers_of(halved, 'drop_path'):
        setattr(parent, child, Halve())
    for parent, child, _ in layers_of(without, 'drop_path'):
        setattr(parent, child, nn.Identity())
    assert_same(without(image), backbone(image), 0)
    for name, parameter in backbone.named_parameters():
        if '.norm1.' in name or '.norm2.' in name:
            parameter.data /= 2
    assert_same(halved(image), backbone(image), 1e-12)


# Derivatives


def central_difference(backbone, image, tangent, step=1e-6):
    with torch.no_grad():
        ahead, behind = backbone(image + step * tangent), backbone(image - step * tangent)
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind)]


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_forward_mode_derivatives_are_differences(build, frozen, dtype, tolerance):
    backbone = build().eval().requires_grad_(not frozen)
    image, tangent = images(2, torch.float64), images(2, torch.float64)
    wanted = central_difference(copy.deepcopy(backbone).double(), image, tangent)
    backbone.to(dtype)
    outs, tangents = torch.func.jvp(backbone, (image.to(dtype),), (tangent.to(dtype),))
    assert_same([x.double() for x in tangents], wanted, tolerance)
    with forward_ad.dual_level():
        duals = backbone(forward_ad.make_dual(image.to(dtype), tangent.to(dtype)))
        tangents = [forward_ad.unpack_dual(dual).tangent for dual in duals]
    assert_same([x.double() for x in tangents], wanted, tolerance)
    with torch.no_grad():
        assert_same(outs, backbone(image.to(dtype)))


def test_transforms_of_torch_func_are_those_of_a_plain_pass(build):
    backbone, image = build().double(), images(2, torch.float64)
    parameters = {name: p.detach() for name, p in backbone.named_parameters()}

    def loss(parameters, image):
        return sum(out.square().sum() for out in torch.func.functional_call(backbone, parameters, (image,)))

    grads = torch.func.grad(loss)(parameters, image)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, image[:, None])
    for name, wanted in gradients(backbone, image).items():
        torch.testing.assert_close(grads[name], wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(each[name].sum(0), wanted, rtol=1e-9, atol=1e-9)


def replicate(module):
    """What `torch.nn.parallel.replicate` makes for each device, here for the CPU: parameters become plain tensors."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicate(child)
    for name, parameter in module._parameters.items():
        replica._parameters.pop(name, None)
        setattr(replica, name, None if parameter is None else parameter.clone())  # keeps the way to the parameter
    return replica


@pytest.mark.parametrize('training', [False, True])
def test_replicas_of_data_parallel_train_what_is_not_frozen(build, training):
    backbone, image = build(frozen_stages=0).double().train(training), images(2, torch.float64)
    wanted = gradients(backbone, image)
    backbone.zero_grad()
    outs = [replicate(backbone)(half) for half in image.split(1)]
    sum(out.square().sum() for half in outs for out in half).backward()
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert len(trained) > 40
    for name in trained:
        torch.testing.assert_close(backbone.get_parameter(name).grad, wanted[name], rtol=1e-9, atol=1e-9)


# Stages that nothing takes


@pytest.mark.parametrize('out_indices', [(0,), (0, 1), (1, 2)])
def test_every_parameter_of_a_backbone_that_ends_early_gets_a_gradient(build_small, out_indices):
    whole, image = build_small().double(), images(2, torch.float64)
    early = build_small(out_indices=out_indices, frozen_stages=4).double()
    assert not any(p.requires_grad for p in early.parameters())
    early = build_small(out_indices=out_indices, window_size=(4, 4, 4, 2)).double()
    report = load_pretrained(early, whole.state_dict())
    built = out_indices[-1] + 1
    later = [name for name in whole.state_dict() if name.startswith(tuple(f'layers.{i}.' for i in range(built, 4)))]
    later += [name for name in whole.state_dict() if name.startswith(f'layers.{built - 1}.downsample')]
    why = 'of a stage after the last of out_indices, which is not built'
    assert set(later) <= {name for name, reason in report.left_out.items() if reason == why}
    assert not report.initial and early.window_size == early.pretrained_window_sizes == (4,) * built
    wanted = [out for i, out in enumerate(whole(image)) if i in out_indices]
    assert_same(early(image), wanted, 1e-12)
    grads = gradients(early, image)
    assert not [name for name, grad in grads.items() if grad is None]
    sum(out.square().sum() for out in wanted).backward()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, whole.get_parameter(name).grad, rtol=1e-9, atol=1e-9)


def test_a_backbone_that_ends_early_loads_its_own_and_whole_checkpoints(build_small, tmp_path):
    whole = build_small(pretrained_window_sizes=(5, 4, 3, 2))
    early = SwinTransformerV2(whole.arch._asdict(), window_size=4, out_indices=(0, 1, 2))
    early.load_state_dict(whole.state_dict(), strict=False)
    assert early.pretrained_window_sizes == (5, 4, 3)
    again = SwinTransformerV2(whole.arch._asdict(), window_size=4, out_indices=(0, 1, 2))
    torch.save(early.state_dict(), tmp_path / 'early.pth')
    assert not load_pretrained(again, tmp_path / 'early.pth').left_out
    assert again.pretrained_window_sizes == (5, 4, 3)
    again.set_window_size((6, 5, 4)), early.set_window_size((6, 5, 4, 3))
    assert again.window_size == early.window_size == (6, 5, 4)
    for wrong in ((6, 5), (6, 5, 4, 3, 2)):
        with pytest.raises(ValueError, match='window_size must be an int or'):
            again.set_window_size(wrong)
    with pytest.raises(ValueError, match=r'it has arch=.* and the backbone arch='):
        load_pretrained(build_small(), tmp_path / 'early.pth')
    other = build_small(arch={'embed_dims': 16, 'depths': (1, 2, 2), 'num_heads': (1, 2, 4)}, out_indices=(0, 1))
    with pytest.raises(ValueError, match=r"it has arch={.*'depths': .2, 2, 2, 2.*} and the backbone arch="):
        load_pretrained(other, whole.state_dict())


# Counting and odd inputs


def operations_by_hand(backbone, height, width):
    """Multiply-adds of linear layers, convolution and attention, token by token and window by window."""
    embed, linear, attention = backbone.patch_embed.proj, 0, 0
    rows, columns = (-(-side // backbone.patch_embed.patch_size) for side in (height, width))
    linear += rows * columns * embed.weight.numel()
    for stage in backbone.layers:
        largest = min(stage.window_size, rows), min(stage.window_size, columns)
        for i, block in enumerate(stage.blocks):
            layers = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
            linear += rows * columns * sum(layer.weight.numel() for layer in layers)
            offsets = (2 * largest[0] - 1) * (2 * largest[1] - 1)
            linear += offsets * (block.attn.cpb_mlp[0].weight.numel() + block.attn.cpb_mlp[2].weight.numel())
            shift = stage.window_size // 2 * (i % 2)
            for h, tops in axis_segments(rows, stage.window_size, shift).items():
                for w, lefts in axis_segments(columns, stage.window_size, shift).items():
                    attention += 2 * block.attn.qkv.in_features * (h * w) ** 2 * len(tops) * len(lefts)
        if isinstance(stage.downsample, nn.Identity):
            continue
        rows, columns = -(-rows // 2), -(-columns // 2)
        linear += rows * columns * stage.downsample.reduction.weight.numel()
    return linear, attention


@pytest.mark.skipif(torch.__version__ < (2, 4), reason='its operators are counted from 2.4 on')
@pytest.mark.parametrize('path', [None, 'sdpa', 'reference'])
@pytest.mark.parametrize('training', [False, True])
def test_the_flop_counter_of_pytorch_counts_everything(build, monkeypatch, path, training):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(ops, 'forced', path)
    backbone = build().train(training)
    linear, attention = operations_by_hand(backbone, *SIZE)
    for with_grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with FlopCounterMode(display=False) as counter, with_grad():
            backbone(images())
        assert counter.get_total_flops() == 2 * (linear + attention)
    image = images().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        sum(out.sum() for out in backbone(image)).backward()
    # Backward: two products for each linear layer, but for the coordinates, which need no gradient, and four of
    # attention, or five where our kernel computes its logits again.
    offsets = sum(49 * block.attn.cpb_mlp[0].weight.numel() for stage in backbone.layers for block in stage.blocks)
    products = 4 if path else 5
    assert counter.get_total_flops() == 2 * (3 * linear - offsets + attention * (2 + products) // 2)


@pytest.mark.parametrize('path', [None, 'sdpa', 'reference', 'flash_cpu'])
def test_the_counter_of_mmengine_counts_attention(build, quiet, monkeypatch, path):
    if path == 'flash_cpu' and not compat.HAS_CUSTOM_OP:
        pytest.skip('an operator needs a newer PyTorch')
    monkeypatch.setattr(ops, 'forced', path)
    backbone = build().eval()
    linear, attention = operations_by_hand(backbone, *SIZE)
    counted = FlopAnalyzer(backbone, images()).total()  # of get_model_complexity_info, which the hosts' tools call
    norms = counted - linear - attention
    tokens = 13 * 21 * 16 * 6 + 7 * 11 * 32 * 6  # elements of all norms: of embedding, blocks, merging and output
    assert 0 < norms <= 5 * tokens


@pytest.mark.parametrize('height, width', [(32, 32), SIZE, (7, 200)])
@pytest.mark.parametrize('options', [{}, {'position_bias': 'parameterized'}, {'attn_drop_rate': 0.1}], ids=str)
def test_an_empty_batch_gives_empty_maps_and_gradients_of_zero(build, options, height, width):
    backbone = build(**options)
    outs = backbone(torch.randn(0, 3, height, width))
    wanted = backbone(torch.randn(2, 3, height, width))
    assert [out.shape for out in outs] == [(0, *out.shape[1:]) for out in wanted]
    sum(out.sum() for out in outs).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    with torch.no_grad():
        assert [out.shape for out in backbone.eval()(torch.randn(0, 3, height, width))] == [out.shape for out in outs]


@pytest.mark.skipif(not ASSIGN, reason='assign=True came with 2.1')
def test_weights_are_assigned_to_a_backbone_without_memory(build):
    backbone, image = build(window_size=6, pretrained_window_sizes=5).eval(), images()
    arguments = dict(arch=backbone.arch._asdict(), window_size=6, out_indices=(0, 1))
    with torch.device('meta'):
        inside, outside = SwinTransformerV2(**arguments), SwinTransformerV2(**arguments)
        inside.load_state_dict(backbone.state_dict(), assign=True)
    outside.load_state_dict(backbone.state_dict(), assign=True)
    for other in (inside, outside):
        assert not any(value.is_meta for value in other.state_dict().values())
        assert other.pretrained_window_sizes == (5, 5)
        assert_same(other.eval()(image), backbone(image), 0)


def test_no_weights_are_loaded_into_a_backbone_without_memory(build):
    backbone = build()
    with torch.device('meta'):
        other = SwinTransformerV2(backbone.arch._asdict(), window_size=4, out_indices=(0, 1))
    with pytest.raises(ValueError, match=r"meta device, .*: call backbone.to_empty\(device='cpu'\)"):
        load_pretrained(other, backbone.state_dict())


# What a layer may be, and do


class Transposed(nn.Module):
    """A linear layer whose result is not row by row in memory."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        out = (self.layer.weight @ x.flatten(0, -2).T).T
        return (out if self.layer.bias is None else out + self.layer.bias).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('which', LAYERS)
def test_results_of_layers_may_have_any_strides(build, which, training):
    backbone, image = build().double().train(training), images(2, torch.float64)
    wanted = gradients(backbone, image)
    with torch.no_grad():
        maps = backbone(image)
    for parent, child, layer in layers_of(backbone, which):
        setattr(parent, child, Transposed(layer))
    with torch.no_grad():
        assert_same(backbone(image), maps, 1e-12)
    for name, grad in gradients(backbone, image).items():
        torch.testing.assert_close(grad, wanted[name.replace('.layer.', '.')], rtol=1e-9, atol=1e-9)


def test_hooks_that_change_a_bias_in_place_change_it_once_a_forward_pass(build):
    backbone, image = build().double().eval(), images(1, torch.float64)
    for parent, _, _ in layers_of(backbone, 'cpb_mlp'):
        parent.cpb_mlp.register_forward_hook(lambda module, inputs, out: out.mul_(0.5))
    wanted = backbone(image)
    with torch.no_grad():
        for _ in range(3):
            assert_same(backbone(image), wanted, 1e-12)


@pytest.mark.parametrize('place, bias', [(0, False), (2, True)])
def test_a_position_layer_with_or_without_a_bias_is_called(build, place, bias):
    backbone, image = build().double().eval(), images(1, torch.float64)
    for _, _, mlp in layers_of(backbone, 'cpb_mlp'):
        layer = nn.Linear(mlp[place].in_features, mlp[place].out_features, bias=bias).double()
        mlp[place] = layer
        nn.init.normal_(layer.weight, std=0.1)
    called = copy.deepcopy(backbone)
    for _, _, mlp in layers_of(called, 'cpb_mlp'):
        mlp[1].register_forward_hook(lambda module, inputs, out: None)  # so that none is plain
    with torch.no_grad():
        assert_same(backbone(image), called(image), 1e-12)
    gradients(backbone, image)
    assert all(p.grad is not None for p in backbone.parameters())


class Integers(nn.Module):
    """A linear layer whose weight is kept in whole numbers, as weight-only quantisation does."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), bias)


def test_position_layers_of_whole_numbers_take_coordinates_in_float32(build):
    backbone, image = build().eval(), images()
    rounded = copy.deepcopy(backbone)
    for _, _, mlp in layers_of(backbone, 'cpb_mlp'):
        mlp[0], mlp[2] = Integers(mlp[0]), Integers(mlp[2])
    for (_, _, mlp), (_, _, other) in strict_zip(layers_of(backbone, 'cpb_mlp'), layers_of(rounded, 'cpb_mlp')):
        for i in (0, 2):
            other[i].weight.data = mlp[i].weight.float() * mlp[i].scale
    with torch.no_grad():
        assert_same(backbone(image), rounded(image))


def test_what_hooks_bring_into_frozen_stages_is_trained(build):
    backbone, image = build(frozen_stages=1).double(), images(2, torch.float64)
    adapter, hooked = nn.Linear(16, 16).double(), backbone.layers[0].blocks[1].attn
    hooked.register_forward_hook(lambda module, inputs, out: out + adapter(out))
    sum(out.square().sum() for out in backbone(image)).backward()
    of_frozen, adapter.weight.grad = adapter.weight.grad, None
    backbone.requires_grad_(True)
    sum(out.square().sum() for out in backbone(image)).backward()
    torch.testing.assert_close(of_frozen, adapter.weight.grad, rtol=1e-9, atol=1e-9)


def test_a_forward_that_replaces_that_of_all_linear_layers_is_called(build, monkeypatch):
    backbone, image = build().double().eval(), images(1, torch.float64)
    doubled = copy.deepcopy(backbone)
    for module in doubled.modules():
        if type(module) is nn.Linear:
            module.weight.data *= 2
    with torch.no_grad():
        wanted = doubled(image)
        monkeypatch.setattr(nn.Linear, 'forward', lambda self, x: F.linear(x, 2 * self.weight, self.bias))
        assert_same(backbone(image), wanted, 1e-12)


class Scaled(torch.Tensor):
    """A weight that knows `torch.nn.functional.linear` alone, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear:
                return F.linear(args[0], 2 * args[1].as_subclass(torch.Tensor), *args[2:])
            if function in (torch.equal, torch.Tensor.mT.__get__):
                raise NotImplementedError(function)
            return function(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.__version__ < (2, 1), reason='its names are of 2.1')
def test_weights_of_other_kinds_are_left_to_pytorch(build):
    backbone, image = build().double().eval().requires_grad_(False), images(1, torch.float64)
    doubled = copy.deepcopy(backbone)
    for module, other in strict_zip(backbone.modules(), doubled.modules()):
        if type(module) is nn.Linear:
            weight = module.weight.detach().as_subclass(Scaled)
            del module.weight
            module.weight = weight
            other.weight.data *= 2
    wanted = doubled(image)
    for _ in range(2):
        assert_same(backbone(image), wanted, 1e-12)
    image.requires_grad_()
    grads = [torch.autograd.grad(sum(out.square().sum() for out in b(image)), image)[0] for b in (backbone, doubled)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_ensembles_over_one_layer_are_batches_of_plain_passes(build):
    backbone, image = build().double().eval().requires_grad_(False), images(1, torch.float64)
    name = 'layers.0.blocks.1.mlp.fc2.weight'
    weights = torch.randn(3, *backbone.get_parameter(name).shape, dtype=torch.float64) / 8
    outs = torch.func.vmap(lambda weight: torch.func.functional_call(backbone, {name: weight}, (image,)))(weights)
    for i, weight in enumerate(weights):
        assert_same([out[i] for out in outs], torch.func.functional_call(backbone, {name: weight}, (image,)), 1e-12)


def test_derivatives_that_a_forced_path_does_not_have_are_refused(build, monkeypatch):
    monkeypatch.setattr(ops, 'forced', 'flash_cpu')
    with pytest.raises(ValueError, match=r'SWINV2_MM_ATTENTION=flash_cpu does not support torch\.func'):
        torch.func.jvp(build().eval().requires_grad_(False), (images(),), (images(),))


def test_copies_and_pickles_carry_no_kept_bias(build):
    backbone, image = build().eval(), images()
    size = len(pickle.dumps(backbone))
    with torch.no_grad():
        wanted = backbone(image)
        assert len(pickle.dumps(backbone)) == size
        assert_same(pickle.loads(pickle.dumps(backbone))(image), wanted, 0)


@pytest.mark.skipif(not compat.HAS_ONEDNN_LINEAR, reason='PyTorch 2.0 computes linear layers by MKL')
def test_images_of_many_sizes_give_few_numbers_of_rows_to_onednn(build, monkeypatch):
    """oneDNN keeps memory for each of them, for good."""
    rows = set()

    def suits(x, weight, bias):
        suit = suits_onednn(x, weight, bias)
        rows.update([(x.shape[:-1].numel(), weight.shape)] if suit else [])
        return suit

    suits_onednn = linear_module._suits_onednn
    monkeypatch.setattr(linear_module, '_suits_onednn', suits)
    monkeypatch.setattr(backbone_module, 'PART_SIZE', 2**14)
    backbone, sizes = build(window_size=8).eval(), random.Random(0)
    with torch.no_grad():
        for _ in range(40):
            backbone(torch.randn(1, 3, sizes.randrange(100, 300), sizes.randrange(100, 300)))
    counts = {count for count, _ in rows}
    assert counts and counts <= {256 * i for i in range(1, 5)}  # of 1024 tokens, and of 512
