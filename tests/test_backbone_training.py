"""The backbone in training: initialisation, drop path, checkpointing, freezing, mixed precision."""

import copy
import math

import pytest
import torch
from across_versions import half_dtypes, strict_zip
from torch import nn

from swinv2_mm import SwinTransformerV2
from swinv2_mm.backbone import Stage
from swinv2_mm.blocks import Block, DropPath
from swinv2_mm.windows import gather, partition, scatter


def values_and_gradients(backbone, image):
    backbone.zero_grad()
    maps = backbone(image)
    sum(x.square().mean() for x in maps).backward()
    return [x.detach() for x in maps], {name: p.grad for name, p in backbone.named_parameters()}


def blocks_of(backbone):
    return [block for stage in backbone.layers for block in stage.blocks]


def test_features_are_the_same_in_training_and_eval_without_drop_path(build_small):
    backbone = build_small().double()
    image = torch.randn(2, 3, 70, 45, dtype=torch.float64)
    trained = backbone.train()(image)
    with torch.no_grad():
        for a, b in strict_zip(trained, backbone.eval()(image)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def count_runs(backbone):
    """How often attention of each block runs from now on, a list that grows by itself."""
    runs = []
    for i, block in enumerate(blocks_of(backbone)):
        block.attn.register_forward_hook(lambda *_, i=i: runs.append(i))
    return runs


@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
@pytest.mark.parametrize('part_size', [2**19, 600])
def test_checkpointing_reruns_blocks_and_changes_neither_values_nor_gradients(
    build_small, monkeypatch, drop_path_rate, part_size
):
    monkeypatch.setattr('swinv2_mm.backbone.PART_SIZE', part_size)
    plain = build_small(drop_path_rate=drop_path_rate).double()
    checkpointed = build_small(drop_path_rate=drop_path_rate, with_cp=True).double()
    checkpointed.load_state_dict(plain.state_dict())
    plain_runs, runs = count_runs(plain), count_runs(checkpointed)
    image = torch.randn(4, 3, 70, 45, dtype=torch.float64)
    torch.manual_seed(1)
    expected, expected_grads = values_and_gradients(plain, image)
    torch.manual_seed(1)
    actual, grads = values_and_gradients(checkpointed, image)
    assert [runs.count(i) for i in range(8)] == [2 * plain_runs.count(i) for i in range(8)]
    assert (plain_runs == list(range(8))) == (part_size == 2**19)
    for a, e in strict_zip([*actual, *grads.values()], [*expected, *expected_grads.values()]):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def test_drop_path_drops_whole_images_and_scales_the_others():
    x = torch.randn(500, 3, 2, 4)
    drop_path = DropPath(0.2)
    assert drop_path.eval()(x) is x
    out = drop_path.train()(x)
    dropped = (out == 0).flatten(1).all(1)
    torch.testing.assert_close(out[~dropped], x[~dropped] / 0.8)
    assert not out[dropped].any()
    assert 0.12 < dropped.float().mean() < 0.28  # 0.2 by four standard deviations


@pytest.mark.parametrize('branch', ['attention', 'mlp'])
@pytest.mark.parametrize('max_tokens', [2000, 7])
def test_each_branch_of_a_block_is_dropped_or_scaled_image_by_image(randomize, monkeypatch, branch, max_tokens):
    monkeypatch.setattr('swinv2_mm.backbone.PART_SIZE', max_tokens * 8)
    block = randomize(Block(8, num_heads=2, pretrained_window=4, drop_path=0.4)).double().train()
    off = block.norm2 if branch == 'attention' else block.norm1
    nn.init.zeros_(off.weight)
    nn.init.zeros_(off.bias)
    x, windows = torch.randn(100, 3, 4, 8, dtype=torch.float64), partition(100, 3, 4, 2, 0)
    attended = block.attn(*gather(x, [windows]), windows)
    attended = scatter([attended], [windows], *x.shape[:3])
    residual = block.norm1(attended) if branch == 'attention' else block.norm2(block.mlp(x))
    added = Stage([block], nn.Identity(), window_size=2, with_cp=False)(x) - x
    dropped = (added == 0).flatten(1).all(1)
    assert 0.2 < dropped.float().mean() < 0.6  # 0.4 by four standard deviations
    torch.testing.assert_close(added[~dropped], residual[~dropped] / 0.6)


def test_drop_path_grows_linearly_over_the_blocks():
    arch = {'embed_dims': 8, 'depths': (1, 2, 3), 'num_heads': (1, 2, 4)}
    backbone = SwinTransformerV2(arch, drop_path_rate=0.3, out_indices=(2,))
    probabilities = [block.drop_path.drop_prob for block in blocks_of(backbone)]
    assert probabilities == pytest.approx([0, 0.06, 0.12, 0.18, 0.24, 0.3])


def test_dropout_rates_reach_every_block(build_small):
    for block in blocks_of(build_small(drop_rate=0.1, attn_drop_rate=0.2)):
        assert (block.attn.attn_drop, block.attn.proj_drop.p, block.mlp.drop.p) == (0.2, 0.1, 0.1)


def test_initialisation_is_the_official_one_from_scratch():
    arch = {'embed_dims': 64, 'depths': (2, 2), 'num_heads': (2, 4), 'extra_norm_every_n_blocks': 2}
    backbone = SwinTransformerV2(arch, out_indices=(0, 1))
    backbone.init_weights()
    post_norms = {norm for block in blocks_of(backbone) for norm in (block.norm1, block.norm2)}
    assert len(post_norms) == 8
    for name, module in backbone.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == (0 if module in post_norms else 1)).all(), name
            assert (module.bias == 0).all(), name
        elif isinstance(module, nn.Linear):
            count = module.weight.numel()
            assert abs(module.weight.mean()) < 4 * 0.02 / count**0.5, name
            assert abs(module.weight.std() / 0.02 - 1) < 4 / (2 * count) ** 0.5, name
            assert module.bias is None or (module.bias == 0).all(), name
    for block in blocks_of(backbone):
        assert (block.attn.q_bias == 0).all() and (block.attn.v_bias == 0).all()
        torch.testing.assert_close(block.attn.logit_scale, torch.full_like(block.attn.logit_scale, math.log(10)))


def is_frozen(name, frozen_stages):
    stages = range(frozen_stages)
    prefixes = (
        [f'layers.{i}.' for i in stages] + [f'norm{i}.' for i in stages] + ['patch_embed.'] * (frozen_stages >= 0)
    )
    return name.startswith(tuple(prefixes))


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages_neither_train_nor_change(build_small, frozen_stages):
    backbone = build_small(frozen_stages=frozen_stages, drop_path_rate=0.0)
    assert backbone.train() is backbone
    for name, module in backbone.named_modules():
        assert module.training != is_frozen(f'{name}.', frozen_stages), name
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != is_frozen(name, frozen_stages), name
    if frozen_stages == 4:
        return
    before = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1.0, weight_decay=0.1)
    sum((x * torch.randn_like(x)).sum() for x in backbone(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    for name, parameter in backbone.named_parameters():
        frozen = is_frozen(name, frozen_stages)
        assert (parameter.grad is None) == frozen, name
        if not frozen and not name.endswith('logit_scale'):  # its gradient is 0 above the limit
            assert parameter.grad.abs().max() > 0, name
        assert torch.equal(parameter, before[name]) == frozen, name


def test_frozen_stages_drop_no_path_in_training(build_small):
    backbone = build_small(frozen_stages=2, drop_path_rate=0.9).train()
    image = torch.randn(4, 3, 64, 64)
    first, second = backbone(image), backbone(image)
    assert [torch.equal(a, b) for a, b in zip(first, second)] == [True, True, False, False]


@half_dtypes
@pytest.mark.parametrize('logit_scale', [math.log(100), 12.0])
def test_autocast_stays_finite_for_large_activations_and_logit_scales(build_small, dtype, logit_scale):
    backbone = build_small()
    with torch.no_grad():
        backbone.patch_embed.norm.weight.mul_(1e3)
        for block in blocks_of(backbone):
            block.attn.logit_scale.fill_(logit_scale)
    image = 1e3 * torch.randn(2, 3, 70, 90)
    with torch.autocast('cpu', dtype):
        maps, grads = values_and_gradients(backbone, image)
        with torch.no_grad():
            inference = backbone.eval()(image)
    for x in [*maps, *inference, *grads.values()]:
        assert x.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('window', [4, 7, 16])
@pytest.mark.parametrize('half', [False, True])
def test_maps_and_gradients_on_a_gpu_are_those_of_float64(build_small, monkeypatch, window, half):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)  # the patch embedding is a convolution
    backbone, image = build_small(window_size=window), torch.randn(2, 3, 150, 203)
    with torch.no_grad():
        for block in blocks_of(backbone):
            block.attn.logit_scale.clamp_(max=2)  # scales near 100 amplify rounding
    expected, expected_grads = values_and_gradients(copy.deepcopy(backbone).double(), image.double())
    with torch.autocast('cuda', torch.bfloat16, enabled=half):
        actual, grads = values_and_gradients(backbone.cuda(), image.cuda())
    assert grads.keys() == expected_grads.keys()
    grads, expected_grads = ([grad.flatten().cpu() for grad in x.values()] for x in (grads, expected_grads))
    # The gradient of a logit scale is a sum that cancels: rounding to bfloat16 can be a quarter of it.
    for a, e in strict_zip(grads, expected_grads):
        assert (a - e).norm() <= (0.5 if half else 1e-4) * e.norm()
    for a, e in strict_zip([*actual, torch.cat(grads)], [*expected, torch.cat(expected_grads)]):
        assert (a.cpu() - e).norm() <= (0.03 if half else 1e-4) * e.norm()
