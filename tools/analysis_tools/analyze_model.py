"""Show the parameters, FLOPs and training memory of a backbone, stage by stage, without allocating it.

FLOPs are multiply-adds, as in papers. As in the official `flops()`, linear layers, the two products of attention and
norms (one per value) count, and position MLPs do not. Stage i is layers[i] (its blocks and the patch merging after
them) and its output norm. The backbone has no classifier.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from swinv2_tools.benchmark_work import peak_memory, reset_memory
from swinv2_tools.model_costs import Cost, Row, Training, analyze, largest_batch, peak, total
from swinv2_tools.sharding_costs import multiply_adds, share

from swinv2_mm import SwinTransformerV2
from swinv2_mm.arch import ARCHS
from swinv2_mm.engine.launch import bad_input, check_backbone, is_ours, load_config, set_initial_weights

GIB, MIB = 2**30, 2**20

EPILOG = """\
memory:
  Measured in a training step on fake tensors, which have shapes but no memory. On cuda attention is that of
  ops/flash_cuda.py, on cpu that of ops/flash_cpu.py; SWINV2_MM_ATTENTION=sdpa shows that of ops/sdpa.py. bf16 is
  autocast: parameters, the residual stream and norms stay in float32. The largest batch is for the backbone alone. Not
  counted: neck, head, losses, the CUDA context, workspaces of kernels, temporaries of the optimizer, fragmentation and
  rounding of the allocator. Leave room for them.

sharded training:
  --gpus N says what each of N GPUs holds and sends where SwinV2FSDPStrategy shards the backbone, in float32.
  "gathered" is the largest unit, five times: what is gathered of it and of the next, its gradient, and two buffers.
  "sent" is what each GPU sends in a step, however large its batch is. --bandwidth and --tflops turn that into seconds.
  "share" is the part of sending in the time of a step if nothing overlaps. PyTorch overlaps the two, and as long as
  sending takes less time than computing, most of it can be hidden.

example: python tools/analysis_tools/analyze_model.py tiny --size 800 1333 --window-size 16 --dtype bf16 --memory 16 24
         python tools/analysis_tools/analyze_model.py configs/mask_rcnn_swinv2.py --size 1024
         python tools/analysis_tools/analyze_model.py giant --size 1536 --window-size 32 --dtype bf16 --with-cp
           --memory 80 --gpus 8 16 32 64 --bandwidth 50 --tflops 200
"""
HEADER = ('part', 'map', 'channels', 'blocks', 'heads', 'window', 'windows (sizes)', 'params M', 'GFLOPs')
HEADER += ('attention', 'official', 'kept MiB', 'kernels')
LEGEND = """\
windows (sizes)  of even / odd blocks: how many, in how many sizes
GFLOPs           multiply-adds / 1e9: linear layers, norms and the products of attention in ragged windows
attention        of them, the products of attention
official         GFLOPs as the official code counts, with every window whole: rolled and masked where it is shifted;
                 without its classifier and with the norms of all maps, not of the last alone, which at 256 pixels
                 changes nothing that a decimal place shows
kept MiB         memory that stays for the backward pass of one image, without parameters and their gradients
kernels          operators of a training step that compute something; on cuda each launches a kernel, some a few"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG
    )
    parser.add_argument(
        'model', metavar='ARCH_OR_CONFIG', help=f'{", ".join(ARCHS)}, or a config with one as model.backbone'
    )
    parser.add_argument(
        '--size', nargs='+', type=int, required=True, metavar='N', help='image in pixels: height and width, or one side'
    )
    parser.add_argument(
        '--window-size',
        nargs='+',
        type=int,
        metavar='N',
        help="in tokens, one for all stages or one per stage (default: the model's)",
    )
    parser.add_argument(
        '--dtype', choices=('fp32', 'bf16'), default='fp32', help='precision of training; bf16 is autocast'
    )
    parser.add_argument('--with-cp', action='store_true', help='activation checkpointing of every block')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='where it trains (default: cuda)')
    parser.add_argument(
        '--memory', nargs='+', type=float, default=[], metavar='GIB', help='also find the largest batch that fits'
    )
    parser.add_argument(
        '--measure', action='store_true', help='also run steps on one image, and say what they took of the memory'
    )
    parser.add_argument(
        '--gpus', nargs='+', type=int, default=[], metavar='N', help='also sharded among so many, with --memory each'
    )
    parser.add_argument('--bandwidth', type=float, metavar='GB/S', help='that each GPU can send to others, with --gpus')
    parser.add_argument(
        '--tflops', type=float, metavar='N', help='of a GPU, as it reaches them in training, with --gpus'
    )
    return parser.parse_args(argv)


def build(model: str, window_size: Sequence[int] | None = None, with_cp: bool = False) -> SwinTransformerV2:
    """Build a backbone on the meta device, where it takes no memory.

    Args:
        model (str): the name of an architecture, or the path of a config.
        window_size (Sequence[int], optional): in tokens, one for all stages or one per stage, instead of its own.
        with_cp (bool): turn activation checkpointing on, whatever the config says.

    Raises:
        ValueError: there is no such model, it has another backbone, or an argument is invalid.
    """
    if model in ARCHS:
        cfg = Config(dict(model=dict(backbone=dict(type='SwinTransformerV2', arch=model))))
    elif model.endswith('.py'):
        cfg = load_config(model)
    else:
        raise ValueError(f'{model} is neither an architecture ({", ".join(ARCHS)}) nor a config, which ends in .py')
    set_initial_weights(cfg, 'none')
    backbone = cfg.model.get('backbone') or {}
    if not is_ours(backbone, cfg):
        raise ValueError(f'model.backbone of {model} is {backbone.get("type")!r}, not SwinTransformerV2')
    if window_size:
        backbone.window_size = list(window_size)
    if with_cp:
        backbone.with_cp = True
    check_backbone(cfg)
    with torch.device('meta'), DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        return MODELS.build(backbone)


def table(rows: Sequence[Row]) -> str:
    """Align the rows and their total as text."""
    cost = total(row.cost for row in rows)
    lines = [HEADER, *map(cells, rows), ('total', '', '', '', '', '', '', *cells_of_cost(cost))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join(
        '  '.join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def cells(row: Row) -> tuple[str, ...]:
    """Format a row of the table, with the windows of even blocks and of odd blocks, if there are any."""
    windows = [f'{sum(group.count for group in groups)} ({len(groups)})' for groups in row.groups]
    blocks = (row.depth, row.heads, row.window) if row.depth else ('', '', '')
    return (
        row.name,
        f'{row.height}x{row.width}',
        str(row.channels),
        *map(str, blocks),
        ' / '.join(windows),
        *cells_of_cost(row.cost),
    )


def cells_of_cost(cost: Cost) -> tuple[str, ...]:
    gigas = (cost.flops / 1e9, cost.attention / 1e9, (cost.linear + cost.masked) / 1e9)
    numbers = (f'{value:.2f}' for value in (cost.parameters / 1e6, *gigas))
    return *numbers, f'{cost.at(1) / MIB:.1f}', str(cost.kernels)


def describe_batch(rows: Sequence[Row], memory: float) -> str:
    """Describe the largest batch that fits so many GiB, and what takes the memory."""
    batch = largest_batch(rows, int(memory * GIB))
    held, more = peak(rows, max(batch, 1)), peak(rows, batch + 1)
    needed = f'{batch + 1} would take {more.total / GIB:.2f} GiB'
    parts = [
        (held.parameters, "parameters, gradients and AdamW's two moments"),
        (held.outputs, 'output maps and their gradients'),
        (held.kept, f'kept for the backward pass when it is in {held.stage}, where the memory peaks'),
        (held.working, 'temporary memory there, at most'),
    ]
    return '\n'.join(
        [
            f'{memory:g} GiB: the largest batch is {batch} for the backbone alone; {needed}',
            *(f'{size / GIB:9.2f} GiB  {what}' for size, what in parts),
            f'{held.total / GIB:9.2f} GiB  in all for a batch of {max(batch, 1)}',
        ]
    )


def describe_measured(
    backbone: SwinTransformerV2, size: tuple[int, int], training: Training, rows: Sequence[Row]
) -> str:
    """Train for two steps on one image of random values, and say how much memory that took, beside what `peak` says."""
    before = reset_memory(training.device)
    backbone.to_empty(device=training.device)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for stage in backbone.layers:
        stage.with_cp = training.with_cp
    trained = [p for p in backbone.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    image = torch.randn(1, backbone.patch_embed.proj.in_channels, *size, device=training.device)
    for _ in range(2):
        with torch.autocast(training.device, torch.bfloat16, enabled=training.half):
            maps = [x for x in backbone(image) if x.requires_grad]
        torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    taken, expected = peak_memory(training.device) - before, peak(rows, 1).total
    return f'measured for a batch of 1: {taken / GIB:.2f} GiB in all; calculated: {expected / GIB:.2f} GiB'


SHARDED = ('GPUs', 'batch per GPU', 'shards GiB', 'gathered GiB', 'activations GiB', 'in all GiB', 'sent GB')
TIMED = ('sending s', 'computing s', 'share %', 'share % at batch 1')


def describe_sharding(
    backbone: SwinTransformerV2, rows: Sequence[Row], training: Training, memory: float, args: argparse.Namespace
) -> str:
    """A table of what each GPU holds and sends, a row for each number of GPUs."""
    lines = [SHARDED + (TIMED if args.bandwidth and args.tflops else ())]
    for number in args.gpus:
        one = share(backbone, rows, number, int(memory * GIB))
        sizes = (one.shards, one.gathered, one.activations, one.total)
        line = [str(number), str(one.batch), *(f'{size / GIB:.2f}' for size in sizes), f'{one.sent / 1e9:.1f}']
        if args.bandwidth and args.tflops:
            sending = one.sent / args.bandwidth / 1e9
            of_one = 2 * multiply_adds(rows, training.with_cp) / args.tflops / 1e12
            computing = max(one.batch, 1) * of_one
            shares = (f'{100 * sending / (sending + seconds):.0f}' for seconds in (computing, of_one))
            line += [f'{sending:.2f}', f'{computing:.2f}', *shares]
        lines.append(tuple(line))
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)
    assumed = f', at {args.bandwidth:g} GB/s and {args.tflops:g} TFLOPS' if len(lines[0]) > len(SHARDED) else ''
    return f'sharded, {memory:g} GiB per GPU{assumed}:\n{text}'


def main() -> int:
    args = parse_args()
    try:
        if len(args.size) > 2 or min(args.size) < 1:
            raise ValueError(
                f'--size must be one or two positive numbers of pixels, got {" ".join(map(str, args.size))}'
            )
        if args.memory and not 0 < min(args.memory) <= max(args.memory) < float('inf'):
            raise ValueError(f'--memory must be positive numbers of GiB, got {" ".join(map(str, args.memory))}')
        if args.gpus and (min(args.gpus) < 2 or not args.memory):
            raise ValueError(
                f'--gpus must be 2 or more, with --memory GIB of each, got {" ".join(map(str, args.gpus))}'
            )
        if args.measure and args.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError('--measure on cuda needs a GPU, and PyTorch finds none: add --device cpu')
        if any(value is not None and not 0 < value < float('inf') for value in (args.bandwidth, args.tflops)):
            raise ValueError(f'--bandwidth and --tflops must be positive, got {args.bandwidth} and {args.tflops}')
        backbone = build(args.model, args.window_size, args.with_cp)
        training = Training(args.dtype == 'bf16', args.device, backbone.layers[0].with_cp)
        height, width = args.size[0], args.size[-1]
        rows = analyze(backbone, (height, width), training)
    except ValueError as error:
        return bad_input(error)
    checkpointing = ', activation checkpointing' if training.with_cp else ''
    print(
        f'{args.model} at {height}x{width} pixels, batch 1, training in {args.dtype} on {args.device}{checkpointing}\n'
    )
    print(f'{table(rows)}\n\n{LEGEND}')
    if args.measure:
        print(f'\n{describe_measured(backbone, (height, width), training, rows)}')
    for memory in args.memory:
        print(f'\n{describe_batch(rows, memory)}')
        if args.gpus:
            print(f'\n{describe_sharding(backbone, rows, training, memory, args)}')
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
