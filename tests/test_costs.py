"""What a step costs, in operators and memory instead of seconds: a pass or a copy too many fails here."""

import math
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from swinv2_mm import SwinTransformerV2, backbone
from swinv2_mm.windows import partition

BLOCKS, CHANNELS = 2, 32
IMAGE = (1, 3, 64, 128)
TOKENS = 16 * 32  # a number of rows that goes to oneDNN
MAP = TOKENS * CHANNELS * 4  # bytes
GROUPS = sum(len(partition(1, 16, 32, 8, shift).groups) for shift in (0, 4))  # over both blocks


def build(window_size=8):
    arch = dict(embed_dims=CHANNELS, depths=(BLOCKS,), num_heads=(1,))
    return SwinTransformerV2(arch, window_size=window_size, out_indices=(0,), drop_path_rate=0.0)


def infer(model, image):
    if model.training:
        model.eval()
    with torch.no_grad():
        model(image)


def train(model, image):
    model.train()(image)[0].sum().backward()


def profiled(step, model=None, image_size=IMAGE):
    """How often each operator runs in a second step, and the sizes of its allocations and releases in bytes."""
    model, image = model or build(), torch.randn(image_size)
    step(model, image)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, image)
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == '[memory]']
    return Counter(event.name for event in profiler.events()), sizes


def peak(sizes):
    """The most bytes that were held at once, over what was held at first."""
    held = highest = 0
    for size in sizes:
        held += size
        highest = max(highest, held)
    return highest


def in_parts(monkeypatch, tokens):
    monkeypatch.setattr(backbone, 'PART_SIZE', tokens * CHANNELS)


def test_inference_makes_no_pass_too_many():
    operators, _ = profiled(infer)
    expected = {
        'aten::index_select': BLOCKS,  # one gather in
        'aten::index_copy_': BLOCKS,  # one scatter out
        'mkldnn::_linear_pointwise': 4 * BLOCKS,
        'aten::gelu': 0,  # oneDNN does it
        'aten::native_layer_norm': 2 + 2 * BLOCKS,
        'aten::add': 2 * BLOCKS,
        'aten::_scaled_dot_product_flash_attention_for_cpu': GROUPS,
        'aten::linalg_vector_norm': 2 * GROUPS,
        'aten::div': GROUPS,  # of queries
        'aten::div_': GROUPS,  # of keys
        'aten::mul_': GROUPS,  # queries by the scale
        'aten::flip': GROUPS,  # of keys and values
        'aten::unfold': 2 * GROUPS,  # a table of offsets to the bias of pairs
        'aten::cat': BLOCKS,  # of the biases of queries, keys and values
    }
    assert {name: operators[name] for name in expected} == expected


@pytest.mark.parametrize('step', [infer, train])
def test_nothing_is_done_that_the_windows_replace_or_that_depends_on_sizes_alone(step):
    operators, _ = profiled(step)
    for name in ('roll', 'constant_pad_nd', 'masked_fill', 'index', 'arange', 'meshgrid', 'log2', 'embedding'):
        assert operators[f'aten::{name}'] == 0, name


def test_the_position_bias_is_computed_once_for_inference_and_once_a_step_for_training():
    assert profiled(infer)[0]['aten::sigmoid'] == 0
    assert profiled(train)[0]['aten::sigmoid'] == BLOCKS


def test_training_makes_no_pass_too_many():
    operators, _ = profiled(train)
    expected = {
        'aten::index_select': 2 * BLOCKS,  # the gather, and backward of the scatter
        'aten::index_copy_': 2 * BLOCKS,
        'mkldnn::_linear_pointwise': 8 * BLOCKS,  # forward, and for the gradients of what they take
        'aten::gelu': 2 * BLOCKS,  # again in backward, instead of kept
        'aten::gelu_backward': BLOCKS,
        'aten::native_layer_norm': 2 + 2 * BLOCKS,
        'aten::native_layer_norm_backward': 2 + 2 * BLOCKS,
        'aten::_scaled_dot_product_flash_attention_for_cpu': GROUPS,
        'aten::_softmax': GROUPS,  # the attention weights of backward, once
        'aten::bmm': 2 * GROUPS,  # logits again, and the gradient of the weights
        'aten::baddbmm_': 3 * GROUPS,  # the gradients of queries, keys and values
    }
    assert {name: operators[name] for name in expected} == expected


def test_inference_part_by_part_holds_three_maps_and_what_a_part_needs(monkeypatch):
    image_size, map_size = (1, 3, 128, 256), 4 * MAP
    in_parts(monkeypatch, 64)
    _, sizes = profiled(infer, image_size=image_size)
    assert max(sizes) == math.prod(image_size) * 4 > map_size  # the image with its channels last
    part = 64 * 4 * CHANNELS * 4  # bytes of what its MLP computes, before and after the GELU
    assert 3 * map_size < peak(sizes) < 3 * map_size + 4 * part + 2**17
    in_parts(monkeypatch, 4 * TOKENS)
    assert peak(profiled(infer, image_size=image_size)[1]) > 6 * map_size


def kept_by_training(image_size):
    """The values that a step keeps for backward, without parameters."""
    model, image, kept = build(), torch.randn(image_size), {}
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.train()(image)
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_training_keeps_twelve_values_per_token_and_channel():
    # Of a block: the tokens, queries, keys and values, what attention gives, the inputs of two norms, of the MLP and of
    # its GELU, and two statistics of each norm. Of the embedding and the output: the image, the input of a norm each
    # and its statistics.
    per_token = BLOCKS * (12 * CHANNELS + 4) + 3 * 16 + 2 * (CHANNELS + 2)
    once, twice = (kept_by_training((1, 3, 64 * n, 128)) for n in (1, 2))
    assert twice - once == TOKENS * per_token


def test_no_allocation_of_a_training_step_grows_with_the_number_of_windows_times_their_square():
    _, sizes = profiled(train, build(window_size=32), (1, 3, 512, 512))
    attention_weights = 128 * 128 * 32**2 * 4  # bytes, of the one head
    hidden = 4 * backbone.PART_SIZE * 4
    assert max(sizes) <= hidden < attention_weights / 4


def test_frozen_blocks_keep_nothing_and_run_as_without_gradients():
    model = build()
    model.frozen_stages = 1
    model.train()
    operators, _ = profiled(lambda model, image: model(image), model)
    assert operators['mkldnn::_linear_pointwise'] == 4 * BLOCKS
    assert operators['_Gather'] == 0


def test_stochastic_depth_draws_once_a_block_for_all_parts(monkeypatch):
    in_parts(monkeypatch, 64)
    model = build()
    for block in model.layers[0].blocks:
        block.drop_path.drop_prob = 0.1
    operators, _ = profiled(train, model)
    assert operators['aten::bernoulli_'] == BLOCKS  # for both branches
    assert operators['aten::addcmul'] > 4 * BLOCKS
    assert operators['aten::floor_divide'] == 0  # the image of a token is known


@pytest.mark.parametrize('step', [infer, train])
def test_memory_grows_no_faster_than_the_image(step):
    small, large = (peak(profiled(step, image_size=(1, 3, side, side))[1]) for side in (256, 512))
    assert 2 < large / small < 4.4
