"""Compare the time and the memory of this backbone with those of its peers, other implementations of Swin V2.

On a CPU each measurement runs in its own process, on a GPU each row of the table. The implementations take turns, round
after round, so that a slow minute of the machine affects all of them. `gemm` is not an implementation: it runs the
matrix products of the backbone alone, a bound on what any implementation can reach. On a GPU that bound holds for
attention that writes its weights to memory, which a fused kernel does not do.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import importlib.util
import itertools
import json
import time

import torch
from swinv2_tools import peers
from swinv2_tools.benchmark_processes import measure_row, serve
from swinv2_tools.benchmark_report import machine, summarise, table
from swinv2_tools.benchmark_work import DETECTORS, Work
from swinv2_tools.progress import Progress

from swinv2_mm.arch import ARCHS
from swinv2_mm.engine.launch import bad_input
from swinv2_mm.writing import unwritten, whole


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python tools/analysis_tools/benchmark.py --sizes 800x1333 1024x1024 --windows 16 32 '
        '--mode infer train --peers all --out work_dirs/benchmark',
    )
    parser.add_argument('--sizes', nargs='+', type=_size, default=[(800, 1333)], metavar='HxW', help='images in pixels')
    parser.add_argument(
        '--windows', nargs='+', type=_positive, default=[16], metavar='N', help='window sizes in tokens'
    )
    parser.add_argument('--arch', choices=ARCHS, default='tiny')
    parser.add_argument('--mode', nargs='+', choices=('infer', 'train'), default=['infer'])
    parser.add_argument('--dtype', nargs='+', choices=('fp32', 'bf16'), default=['fp32'], help='bf16 is autocast')
    parser.add_argument(
        '--compile',
        nargs='*',
        choices=('no', 'yes'),
        default=['no'],
        help='torch.compile every implementation (yes, also if nothing follows); no yes measures both',
    )
    parser.add_argument('--device', nargs='+', choices=('cpu', 'cuda'), default=['cpu'])
    parser.add_argument('--batch', type=_positive, default=1, help='images per batch')
    parser.add_argument(
        '--peers', nargs='+', choices=('all', 'none', *peers.PEERS), default=['all'], help='what to compare with'
    )
    parser.add_argument('--official', help='models/swin_transformer_v2.py in a clone of the official repository')
    parser.add_argument('--detector', action='store_true', help='time Mask R-CNN with this backbone and with Swin V1')
    parser.add_argument(
        '--profile', action='store_true', help='also show which kinds of operators, on a GPU of kernels, take the time'
    )
    parser.add_argument('--rounds', type=_positive, default=3, help='turns of each implementation (default: 3)')
    parser.add_argument(
        '--steps', type=_positive, default=3, help='timed steps per turn, after one to warm up, or three on a GPU'
    )
    parser.add_argument(
        '--limit', type=_positive, metavar='SECONDS', help='give up on a measurement that takes longer (default: none)'
    )
    parser.add_argument('--threads', type=_positive, help='CPU threads (default: as PyTorch chooses)')
    parser.add_argument('--out', type=Path, help='folder for benchmark.json and benchmark.png')
    parser.add_argument('--work', help=argparse.SUPPRESS)  # what one process measures, as JSON
    args = parser.parse_args(argv)
    args.compile = args.compile or ['yes']
    if 'cuda' in args.device and not torch.cuda.is_available():
        raise ValueError('--device cuda: PyTorch sees no GPU; leave it out, or install a PyTorch with CUDA')
    if args.official and not Path(args.official).is_file():
        raise ValueError(f'--official {args.official} does not exist: name the swin_transformer_v2.py of a clone')
    if 'none' in args.peers and len(args.peers) > 1:
        raise ValueError(f'--peers {" ".join(args.peers)}: none excludes all others')
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f'--out {args.out} cannot be created as a folder: {error.strerror}') from error
    return args


def _size(text):
    try:
        height, width = (_positive(side) for side in text.split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f'invalid image size {text!r}: write it as 800x1333') from None
    return height, width


def _positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


_positive.__name__ = 'positive number'


def plan(args) -> list[list[Work]]:
    """List what to measure: for each row of the table all implementations."""
    if args.detector:
        names = list(DETECTORS)
    else:
        chosen = [] if 'none' in args.peers else peers.PEERS if 'all' in args.peers else args.peers
        names = ['swinv2_mm', *chosen]
    columns = [(name, option == 'yes') for option in dict.fromkeys(args.compile) for name in names]
    columns += [] if args.detector else [('gemm', False)]
    rows = itertools.product(args.device, args.mode, args.dtype, args.windows, args.sizes)
    shared = dict(arch=args.arch, batch=args.batch, steps=args.steps, threads=args.threads)
    shared.update(profile=args.profile, official=args.official)
    return [
        [Work(name, mode, *size, window, dtype, device, compile=compiled, **shared) for name, compiled in columns]
        for device, mode, dtype, window, size in rows
    ]


def plot(rows: list[list[dict]], out: Path) -> None:
    """Write a PNG: time and memory against the window and against the image's area."""
    import matplotlib

    matplotlib.use('Agg')  # no display needed
    import matplotlib.pyplot as plt

    results = [r for row in rows for r in row if r['seconds'] and r['name'] != 'gemm']
    kinds = [
        ('window in tokens', lambda r: r['window'], lambda r: f'{r["height"]}x{r["width"]}'),
        ('image in megapixels', lambda r: r['height'] * r['width'] / 1e6, lambda r: f'window {r["window"]}'),
    ]
    names = list(dict.fromkeys(r['name'] for r in results))
    kinds = [kind for kind in kinds if len(set(map(kind[1], results))) > 1] or kinds[:1]
    figure, axes = plt.subplots(2, len(kinds), figsize=(6 * len(kinds), 8), layout='constrained', squeeze=False)
    for (xlabel, x, other), column in zip(kinds, axes.T):
        curves = {}
        for r in results:
            key = ', '.join((other(r), r['mode'], r['dtype'], r['device'])) + ', compiled' * r['compile']
            curves.setdefault(key, {}).setdefault(r['name'], []).append((x(r), r['best'], r['memory_mb'] / 1e3))
        for (key, of_names), style in zip(curves.items(), itertools.cycle(['-', '--', ':', '-.'])):
            for name, points in of_names.items():
                xs, *ys = zip(*sorted(points))
                for ax, y in zip(column, ys):
                    ax.plot(
                        xs, y, style, marker='o', markersize=4, color=f'C{names.index(name)}', label=f'{name}, {key}'
                    )
        for ax, ylabel in zip(column, ('seconds', 'peak memory in GB')):
            ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None), xlim=(0, None))
            ax.grid(alpha=0.3)
        column[0].legend(fontsize=7)
    with whole(out) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)


def main() -> int:
    try:
        args = parse_args()
    except ValueError as error:
        return bad_input(error)
    if args.work:
        serve(args.work)
        return 0
    about = machine()
    print(f'{about["cpu"]} ({about["cores"]} cores, {about["simd"]}), GPU: {about["gpu"] or "none"}')
    print(', '.join(f'{name} {version}' for name, version in about['versions'].items()))
    print('memory: peak of the process, on a GPU of PyTorch, less what was held before the model was built')
    rows, planned, has_plot = [], plan(args), importlib.util.find_spec('matplotlib') is not None
    total, begun = args.rounds * sum(map(len, planned)), itertools.count()
    progress = Progress(total, file=sys.stderr)

    def show(doing):
        progress.show(min(next(begun), total), doing, at_once=True)

    for row in planned:
        with progress:
            rows.append(measure_row(row, args.rounds, args.limit, show))
        summarise(rows[-1])
        print(f'\n{table(rows[-1])}', flush=True)
        if args.out:
            record = dict(command=sys.argv, date=time.strftime('%Y-%m-%d'), machine=about, rows=rows)
            try:
                with whole(args.out / 'benchmark.json') as partial:
                    partial.write_text(json.dumps(record, indent=1))
                if has_plot:
                    plot(rows, args.out / 'benchmark.png')
            except OSError as error:
                return bad_input(unwritten(error))
    if args.out:
        drawn = f'and {args.out / "benchmark.png"}' if has_plot else 'and no plot: matplotlib is not installed'
        print(f'\nwrote {args.out / "benchmark.json"} {drawn}')
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
