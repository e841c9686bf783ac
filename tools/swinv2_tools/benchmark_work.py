"""What one process of the benchmark does: build one implementation, run it, and measure time and memory."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.registry import init_default_scope
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from swinv2_mm.arch import parse_arch
from swinv2_mm.engine import launch
from swinv2_mm.engine.amp import bfloat16_features
from swinv2_mm.ops.linear import linear
from swinv2_mm.windows import WindowGroup, partition
from swinv2_tools import peers

DETECTORS = ('mask-rcnn swinv2_mm', 'mask-rcnn swin v1 w7')
FRONT_DOOR = Path(__file__).resolve().parents[2] / 'configs/mask_rcnn_swinv2.py'
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16}
KINDS = {  # of operators
    'matrix products': 'mm addmm bmm baddbmm baddbmm_ _linear_pointwise mkldnn_convolution mkldnn_linear',
    'fused attention': '_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention '
    '_efficient_attention_forward _efficient_attention_backward',
    'softmax': '_softmax _softmax_backward_data exp_',
    'copies': 'copy_ clone index index_select index_copy_ index_put_ _index_put_impl_ cat flip roll constant_pad_nd '
    'fill_ stack',
    'norms and GELU': 'native_layer_norm native_layer_norm_backward gelu gelu_backward linalg_vector_norm div div_',
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
ROWS = 4096  # of a matrix product of `gemm`; larger ones do not fit the cache and are slower
WEIGHTS = 2**21  # attention weights of a product of `gemm`


class Work(NamedTuple):
    """One implementation at one setting. Sizes are in pixels, windows in tokens."""

    name: str
    mode: str
    height: int
    width: int
    window: int
    dtype: str = 'fp32'
    device: str = 'cpu'
    arch: str = 'tiny'
    batch: int = 1
    compile: bool = False
    steps: int = 3
    threads: int | None = None
    profile: bool = False
    official: str | None = None


def measure(work: Work) -> dict:
    """Measure the seconds of each step after the first, and the peak memory beyond what the process held before, in MB.

    Returns:
        dict: the figures, or only ``skipped``, the reason why the implementation can't do it.
    """
    if work.threads:
        torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    try:
        if work.name == 'gemm':
            step = gemm_step(work)
        elif work.name.startswith('mask-rcnn'):
            step = detector_step(work)
        else:
            step = backbone_step(work)
        first, *seconds = timed(step, 1 + work.steps, work.device)
    except peers.NotAvailableError as error:
        return {'skipped': str(error)}
    result = {'seconds': seconds, 'first': first, 'peak_mb': (peak_memory(work.device) - step.before) / 2**20}
    if not work.name.startswith('mask-rcnn'):
        result['flops'] = flops(work)
    if work.profile:
        result['shares'] = shares_of_time(step, work.device)
    return result


def shares_of_time(step: Callable[[], None], device: str) -> dict[str, float]:
    """The share of each kind of operator in the time of all operators of a step, from the profiler."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == 'cuda')
    with profile(activities=activities) as profiler:
        step()
    field = 'self_device_time_total' if device == 'cuda' else 'self_cpu_time_total'
    shares = {}
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU and not event.is_user_annotation:  # each kernel also has an event
            kind = KIND_OF.get(event.key.rpartition('::')[2], 'rest')
            shares[kind] = shares.get(kind, 0) + getattr(event, field)
    total = sum(shares.values())
    return {kind: spent / total for kind, spent in shares.items()}


class Step:
    """A callable that runs one step, and the bytes that the process held before the model was built."""

    def __init__(self, run: Callable[[], None], before: int):
        self.run, self.before = run, before

    def __call__(self):
        self.run()


def backbone_step(work: Work) -> Step:
    peers.build(work.name, work.arch, (64, 64), 2, work.official)  # imports what it needs before memory is measured
    before = reset_memory(work.device)
    model = peers.build(work.name, work.arch, (work.height, work.width), work.window, work.official).to(work.device)
    image = torch.randn(work.batch, 3, work.height, work.width, device=work.device)
    model.train(work.mode == 'train')
    forward = torch.compile(model) if work.compile else model

    def maps():
        with torch.autocast(work.device, torch.bfloat16, enabled=work.dtype == 'bf16'):
            return forward(image)

    return Step(with_or_without_training(work, model, lambda: sum(x.float().square().mean() for x in maps())), before)


def detector_step(work: Work) -> Step:
    """Mask R-CNN of the front door's config, or of the recipe of mmdet that it inherits, on a drawn image."""
    if work.compile:
        raise peers.NotAvailableError('Mask R-CNN is not compiled: its heads break the graph')
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs

    init_default_scope('mmdet')
    cfg = launch.load_config(FRONT_DOOR)
    if work.name != DETECTORS[0]:
        if work.arch != 'tiny':
            raise peers.NotAvailableError('the recipe of mmdet is of Swin-T: take --arch tiny')
        from mmengine.hub import get_config

        cfg = get_config('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py')
        cfg.model.backbone.init_cfg = None
    else:
        cfg.model.backbone.update(arch=work.arch, window_size=work.window, init_cfg=None)
    MODELS.build(cfg.model)  # imports what it needs before memory is measured
    before = reset_memory(work.device)
    model = MODELS.build(cfg.model).to(work.device)
    model.train(work.mode == 'train')
    shape = (3, work.height, work.width)
    inputs = demo_mm_inputs(work.batch, [shape] * work.batch, num_items=[20] * work.batch, with_mask=True)

    def run():
        data = model.data_preprocessor(inputs, training=work.mode == 'train')
        if work.mode == 'infer':
            return model(**data, mode='predict')
        return model.parse_losses(model(**data, mode='loss'))[0]

    def in_bfloat16():
        with bfloat16_features(model):
            return run()

    return Step(with_or_without_training(work, model, in_bfloat16 if work.dtype == 'bf16' else run), before)


def with_or_without_training(work: Work, model: nn.Module, run: Callable) -> Callable[[], None]:
    """Make a step of ``run``: a forward pass without gradients, or training with AdamW on the loss that it returns."""
    if work.mode == 'infer':
        return torch.no_grad()(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train():
        run().backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def gemm_step(work: Work) -> Step:
    """The matrix products of the backbone, each through MKL into allocated memory, or oneDNN where that is faster."""
    dtype, out, products = DTYPES[work.dtype], {}, []
    for a, b, times in matrix_products(work):
        a, b = (torch.randn(shape, device=work.device).to(dtype) for shape in (a, b))
        shape = (*a.shape[:-1], b.shape[-1])
        if shape not in out:
            out[shape] = torch.empty(shape, device=work.device, dtype=dtype)
        ways = [partial(torch.matmul, a, b, out=out[shape])]
        if a.ndim == 2 and (work.device, work.dtype) == ('cpu', 'fp32'):
            ways.append(partial(linear, a, b.T.contiguous()))  # oneDNN, which takes no output
        products.append((min(ways, key=lambda way: min(timed(way, 3, work.device))), times))

    def run():
        for product, times in products:
            for _ in range(times):
                product()

    return Step(torch.no_grad()(run), reset_memory(work.device))


def layers(work: Work) -> Iterator[tuple[int, int, int, int]]:
    """Every kind of linear layer: tokens, input and output channels, and how many there are."""
    arch = parse_arch(work.arch)
    for i, (depth, tokens) in enumerate(zip(arch.depths, map(math.prod, map_sizes(work)))):
        channels, tokens = arch.embed_dims * 2**i, tokens * work.batch
        yield (tokens, 48, channels, 1) if i == 0 else (tokens, 2 * channels, channels, 1)
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
            yield tokens, inputs * channels, outputs * channels, depth


def attentions(work: Work) -> Iterator[tuple[WindowGroup, int, int]]:
    """Every kind of attention: a group of windows, its heads, and how many blocks have it."""
    arch = parse_arch(work.arch)
    for depth, num_heads, (height, width) in zip(arch.depths, arch.num_heads, map_sizes(work)):
        for shift, blocks in ((0, (depth + 1) // 2), (work.window // 2, depth // 2)):
            for group in partition(work.batch, height, width, work.window, shift).groups:
                yield group, num_heads, blocks


def map_sizes(work: Work) -> list[tuple[int, int]]:
    """Height and width in tokens, per stage."""
    return [(-(-work.height // stride), -(-work.width // stride)) for stride in (4, 8, 16, 32)]


def flops(work: Work) -> int:
    """Floating point operations of the matrix products of one step, without any that padding or recomputation adds."""
    linear = sum(2 * tokens * inputs * outputs * count for tokens, inputs, outputs, count in layers(work))
    attention = sum(
        4 * group.count * num_heads * (group.height * group.width) ** 2 * 32 * blocks
        for group, num_heads, blocks in attentions(work)
    )
    return (3 if work.mode == 'train' else 1) * (linear + attention)


def matrix_products(work: Work) -> Iterator[tuple[tuple, tuple, int]]:
    """Shapes of both operands and how often they are multiplied: what `flops` counts."""
    train = work.mode == 'train'
    for tokens, inputs, outputs, count in layers(work):
        for rows, times in pieces(tokens, ROWS):
            yield (rows, inputs), (inputs, outputs), count * times
            if train:  # the gradients of the input and of the weight
                yield (rows, outputs), (outputs, inputs), count * times
                yield (outputs, rows), (rows, inputs), count * times
    for group, num_heads, blocks in attentions(work):
        num_tokens = group.height * group.width
        for matrices, times in pieces(group.count * num_heads, max(WEIGHTS // num_tokens**2, 1)):
            logits = (matrices, num_tokens, 32), (matrices, 32, num_tokens)
            attended = (matrices, num_tokens, num_tokens), (matrices, num_tokens, 32)
            yield *logits, blocks * times * (2 if train else 1)  # in training also the gradient of the weights
            yield *attended, blocks * times * (4 if train else 1)  # and those of queries, keys and values


def pieces(total: int, largest: int) -> list[tuple[int, int]]:
    """Cut a number into equal pieces and a rest: sizes and how many there are."""
    whole, rest = divmod(total, largest)
    return [(size, count) for size, count in ((largest, whole), (rest, 1)) if size and count]


def timed(step: Callable[[], None], times: int, device: str) -> list[float]:
    """Seconds of each of so many calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        if device == 'cuda':
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def reset_memory(device: str) -> int:
    """Reset the peak of memory. Returns the bytes that the process, or PyTorch on the GPU, holds now."""
    gc.collect()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is still held would count as nothing when used again
    Path('/proc/self/clear_refs').write_text('5')
    return _resident('VmRSS')


def peak_memory(device: str) -> int:
    """Most bytes that were held since `reset_memory`."""
    return torch.cuda.max_memory_allocated() if device == 'cuda' else _resident('VmHWM')


def _resident(field):
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
