"""Measure what every process of sharded training holds: while weights load, after it, and in a training step.

Run it with torchrun, in as many processes as the model is to be sharded among. On a machine without GPUs they are
processes on the CPU. The step is that of the backbone alone, with activation checkpointing and AdamW.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import contextlib
import os
import tempfile

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import MMLogger
from swinv2_tools.benchmark_work import peak_memory, reset_memory
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_mm.arch import ARCHS
from swinv2_mm.engine.launch import bad_input, init_distributed
from swinv2_mm.engine.sharding import bytes_held
from swinv2_mm.engine.strategy import SwinV2FSDPStrategy

MIB = 2**20
LINE = '{:>7} {:>10} {:>10} {:>10} {:>11} {:>11} {:>10} {:>10} {:>10}'
HEADER = ('process', 'before', 'load peak', 'after', 'parameters', 'gradients', 'AdamW', 'step peak', 'sent')
EPILOG = """\
MiB of each process: resident on the CPU, on a GPU what PyTorch allocated.
  before       with all imports and no model
  load peak    the most while the weights were initialised or read, and sharded
  after        what stayed
  parameters, gradients, AdamW
               counted, the pieces of this process
  step peak    the most in the last of three steps
  sent         to others in a step, counted

example: torchrun --nproc_per_node=2 tools/misc/measure_sharding.py base --size 256 --window-size 16
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG
    )
    parser.add_argument('arch', choices=ARCHS)
    parser.add_argument('--checkpoint', metavar='FILE', help='initial weights (default: from scratch)')
    parser.add_argument('--size', type=int, default=256, help='side of the image in pixels (default: 256); 0: no step')
    parser.add_argument('--window-size', type=int, default=16, help='in tokens (default: 16)')
    parser.add_argument('--dtype', choices=('fp32', 'bf16'), default='fp32', help='bf16 is autocast')
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace, folder: str) -> SwinV2FSDPStrategy:
    """Build a sharded backbone and its optimizer."""
    init_cfg = dict(type='Pretrained', checkpoint=args.checkpoint) if args.checkpoint else None
    backbone = dict(type='SwinTransformerV2', arch=args.arch, window_size=args.window_size, with_cp=True)
    strategy = SwinV2FSDPStrategy(work_dir=folder, env_kwargs=dict(launcher='pytorch'))
    optimizer = dict(type='AdamW', lr=1e-4, weight_decay=0.05)
    strategy.prepare(
        Config(dict(backbone, init_cfg=init_cfg))._cfg_dict,
        optim_wrapper=dict(optimizer=optimizer, constructor='SwinV2OptimWrapperConstructor'),
    )
    return strategy


def step(strategy: SwinV2FSDPStrategy, size: int, half: bool) -> dict[str, int]:
    """Train for a step. Returns the bytes that the optimizer has in this process, by kind."""
    held, wrapper = {}, strategy.optim_wrapper
    parameters = [p for group in wrapper.optimizer.param_groups for p in group['params']]
    device = next(strategy.model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        maps = strategy.model(torch.randn(1, 3, size, size, device=device))
    sum(x.float().square().mean() for x in maps).backward()
    held['parameters'] = bytes_held(parameters)
    held['gradients'] = bytes_held(p.grad for p in parameters if p.grad is not None)
    wrapper.step()
    wrapper.zero_grad()
    held['AdamW'] = bytes_held(x for entry in wrapper.optimizer.state.values() for x in entry.values() if x.ndim)
    return held


class Sent(TorchDispatchMode):
    """Counts the bytes that this process sends to others whenever FSDP gathers parameters and scatters gradients."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ('c10d::_allgather_base_', 'c10d::_reduce_scatter_base_'):
            self.bytes += abs(args[0].nbytes - args[1].nbytes)  # the whole less this process's piece
        return function(*args, **(kwargs or {}))


def measure(args: argparse.Namespace) -> list:
    """The numbers of one line, in MiB."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    MMLogger.get_current_instance().setLevel('ERROR')
    with tempfile.TemporaryDirectory() as folder:
        before = reset_memory(device)
        dist.barrier()
        strategy = prepare(args, folder)
        loaded, after = peak_memory(device), reset_memory(device)
        held, most, sent = dict.fromkeys(('parameters', 'gradients', 'AdamW'), 0), 0, Sent()
        for _ in range(3 if args.size else 0):
            reset_memory(device)
            held = step(strategy, args.size, args.dtype == 'bf16')
            most = peak_memory(device)
        if args.size:
            with sent:
                step(strategy, args.size, args.dtype == 'bf16')
    return [round(number / MIB) for number in (before, loaded, after, *held.values(), most, sent.bytes)]


def main() -> int:
    args = parse_args()
    try:
        if args.size < 0 or args.window_size < 1:
            raise ValueError('--size and --window-size must be positive')
        init_distributed(Config(), 'pytorch')
        with contextlib.redirect_stdout(sys.stderr):
            numbers = measure(args)
    except ValueError as error:
        return bad_input(error)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, numbers)
    if dist.get_rank() == 0:
        print(LINE.format(*HEADER), *(LINE.format(i, *row) for i, row in enumerate(every)), sep='\n', flush=True)
    dist.barrier()
    os._exit(0)  # gloo can deadlock where it is torn down


if __name__ == '__main__':
    sys.exit(ending.run(main))
