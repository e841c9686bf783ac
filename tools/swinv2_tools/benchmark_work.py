"""What a process of the benchmark does: build implementations, run them, and measure time and memory."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.registry import init_default_scope
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from swinv2_mm.engine import launch
from swinv2_mm.engine.amp import bfloat16_features
from swinv2_mm.ops.linear import linear
from swinv2_tools import peers
from swinv2_tools.benchmark_operations import flops, matrix_products
from swinv2_tools.kernel_kinds import is_kernel, kind_of_kernel, kind_of_operator

DETECTORS = ('mask-rcnn swinv2_mm', 'mask-rcnn swin v1 w7')
FRONT_DOOR = Path(__file__).resolve().parents[2] / 'configs/mask_rcnn_swinv2.py'
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16}
WARM_UP = {'cpu': 1, 'cuda': 3}  # steps: a GPU's memory and its choice of kernels settle in a few


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


def measure(works: list[Work], turns: list[int], rounds: int) -> Iterator[tuple[int, dict]]:
    """Measure implementations in turns, and profile them last: a profiler slows down what a process launches later.

    Args:
        works (list[Work]): what to measure.
        turns (list[int]): the rounds to measure now, from 0.
        rounds (int): how many there are in all.

    Yields:
        tuple: the place of an implementation in ``works``, and either ``doing``, what comes next, or figures:
        ``seconds`` of each timed step, ``peak_mb``, the peak memory beyond what was held before the model was built,
        what `profiled` gives, and so on; or ``skipped``, the reason why the implementation can't do it.
    """
    steps = {}
    for turn in turns:
        for place, work in enumerate(works):
            if turn == turns[0] or place in steps:
                yield place, dict(doing=f'round {turn + 1} of {rounds}')
                try:
                    steps[place] = steps.get(place) or prepare(work)
                    yield place, timing(work, steps[place])
                except peers.NotAvailableError as error:
                    yield place, dict(skipped=str(error))
    for place, step in steps.items():
        if works[place].name != 'gemm' and (works[place].profile or works[place].device == 'cuda'):
            yield place, dict(doing='profile')
            yield place, profiled(step, works[place].device)


def prepare(work: Work) -> Step:
    """Build an implementation.

    Raises:
        NotAvailableError: it is not installed, or does not support this.
    """
    if work.threads:
        torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    if work.name == 'gemm':
        return gemm_step(work)
    return (detector_step if work.name.startswith('mask-rcnn') else backbone_step)(work)


def timing(work: Work, step: Step) -> dict:
    """Time the steps of one round. The first round begins with steps to warm up, and also measures memory."""
    result = {}
    if step.is_cold:
        result['first'] = timed(step, WARM_UP[work.device], work.device)[0]
    start = time.perf_counter()
    result['seconds'] = timed(step, work.steps, work.device)
    result['wall'] = (time.perf_counter() - start) / work.steps
    if step.is_cold:
        result['peak_mb'] = (peak_memory(work.device) - step.before) / 2**20
        step.is_cold = False
    if not work.name.startswith('mask-rcnn'):
        result['flops'] = flops(work)
    return result


def profiled(step: Callable[[], None], device: str) -> dict:
    """Profile a step.

    Returns:
        dict: ``shares``, of each kind of operator in the time of all operators; on a GPU, of each kind of kernel in the
        time of all kernels, ``gpu_seconds``, that time, and ``launches``, the number of kernels.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == 'cuda')
    with profile(activities=activities) as profiler:
        step()
        if device == 'cuda':
            torch.cuda.synchronize()
    if device == 'cuda':
        ran = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        spent = [(event.name, event.time_range.elapsed_us()) for event in ran]
        total = sum(microseconds for _, microseconds in spent)
        launches = sum(is_kernel(name) for name, _ in spent)
        return dict(shares=shares(spent, kind_of_kernel), gpu_seconds=total / 1e6, launches=launches)
    operators = [e for e in profiler.key_averages() if not e.is_user_annotation]
    return dict(shares=shares(((e.key, e.self_cpu_time_total) for e in operators), kind_of_operator))


def shares(spent: Iterable[tuple[str, float]], kind_of: Callable[[str], str]) -> dict[str, float]:
    """The share of each kind in the time that is spent under names, the largest first."""
    sums = {}
    for name, time_spent in spent:
        sums[kind_of(name)] = sums.get(kind_of(name), 0) + time_spent
    total = sum(sums.values())
    return {kind: part / total for kind, part in sorted(sums.items(), key=lambda item: -item[1])}


class Step:
    """A callable that runs one step, the bytes that the process held before the model was built, and if it ever ran."""

    def __init__(self, run: Callable[[], None], before: int):
        self.run, self.before, self.is_cold = run, before, True

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


def timed(step: Callable[[], None], times: int, device: str) -> list[float]:
    """Seconds of each of so many calls.

    On a GPU these are the times between CUDA events, which the GPU notes between the steps, and the CPU waits only for
    the last one. So a step is timed as a training loop runs it, which does not wait either: while the GPU computes, the
    CPU launches ahead, and where launching takes longer than computing, the time is that of launching.
    """
    if device == 'cuda':
        return _timed_by_events(step, times)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def _timed_by_events(step, times):
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in zip(events, events[1:])]


def reset_memory(device: str) -> int:
    """Reset the peak of memory. Returns the bytes that the process, or PyTorch on the GPU, holds now."""
    gc.collect()
    if device == 'cuda':
        torch._C._cuda_clearCublasWorkspaces()  # each implementation has its own
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
