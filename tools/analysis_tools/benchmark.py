"""Compare the time and the memory of this backbone with those of its peers, other implementations of Swin V2.

Each measurement runs in its own process. The implementations take turns, round after round, so that a slow minute of
the machine affects all of them. `gemm` is not an implementation: it runs the matrix products of the backbone alone, a
bound on what any implementation can reach.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import itertools
import json
import os
import statistics
import subprocess
import time
from importlib import metadata

import torch
from swinv2_tools import peers
from swinv2_tools.benchmark_work import DETECTORS, Work, measure

from swinv2_mm.arch import ARCHS
from swinv2_mm.engine.launch import bad_input
from swinv2_mm.writing import unwritten, whole

DISTRIBUTIONS = ('torch', 'mmengine', 'mmcv', 'mmdet', 'transformers', 'timm', 'mmpretrain', 'torchvision')


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
    parser.add_argument('--compile', action='store_true', help='torch.compile every implementation')
    parser.add_argument('--device', nargs='+', choices=('cpu', 'cuda'), default=['cpu'])
    parser.add_argument('--batch', type=_positive, default=1, help='images per batch')
    parser.add_argument(
        '--peers', nargs='+', choices=('all', 'none', *peers.PEERS), default=['all'], help='what to compare with'
    )
    parser.add_argument('--official', help='models/swin_transformer_v2.py in a clone of the official repository')
    parser.add_argument('--detector', action='store_true', help='time Mask R-CNN with this backbone and with Swin V1')
    parser.add_argument('--profile', action='store_true', help='also show which kinds of operators take the time')
    parser.add_argument('--rounds', type=_positive, default=3, help='processes per implementation (default: 3)')
    parser.add_argument(
        '--steps', type=_positive, default=3, help='timed steps per process, after a warm-up step (default: 3)'
    )
    parser.add_argument('--threads', type=_positive, help='CPU threads (default: as PyTorch chooses)')
    parser.add_argument('--out', type=Path, help='folder for benchmark.json and benchmark.png')
    parser.add_argument('--work', help=argparse.SUPPRESS)  # what one process measures, as JSON
    args = parser.parse_args(argv)
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
        names = ['swinv2_mm', *chosen, 'gemm']
    rows = itertools.product(args.device, args.mode, args.dtype, args.windows, args.sizes)
    shared = dict(arch=args.arch, batch=args.batch, compile=args.compile, steps=args.steps, threads=args.threads)
    shared.update(profile=args.profile, official=args.official)
    return [
        [Work(name, mode, *size, window, dtype, device, **shared) for name in names]
        for device, mode, dtype, window, size in rows
    ]


def run_in_process(work: Work) -> dict:
    """Run `measure` in a new process. A failure is a result too."""
    command = [sys.executable, __file__, '--work', json.dumps(work._asdict())]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, 'TOKENIZERS_PARALLELISM': 'false'}
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reasons = done.stderr.strip().splitlines() or [f'killed by signal {-done.returncode}, perhaps out of memory']
        return {'skipped': reasons[-1]}
    return json.loads(lines[-1])


def measure_row(row: list[Work], rounds: int) -> list[dict]:
    """Measure all implementations of a row in turns. One that fails is not tried again."""
    results = [dict(work._asdict(), seconds=[], peak_mb=[]) for work in row]
    try:
        for turn, (work, result) in itertools.product(range(rounds), list(zip(row, results))):
            if 'skipped' in result:
                continue
            print(f'\r{work.name}: round {turn + 1} of {rounds} '.ljust(60), end='', file=sys.stderr, flush=True)
            measured = run_in_process(work)
            if 'skipped' in measured:
                result['skipped'] = measured['skipped']
                continue
            result['seconds'] += measured.pop('seconds')
            result['peak_mb'].append(measured.pop('peak_mb'))
            result.update(measured)
    finally:
        print('\r'.ljust(61), end='\r', file=sys.stderr, flush=True)
    return results


def summarise(results: list[dict]) -> None:
    """Add the derived figures to each result of a row."""
    bound = next((min(r['seconds']) for r in results if r['name'] == 'gemm' and r['seconds']), None)
    for result in results:
        if not result['seconds']:
            continue
        result['best'], result['median'] = min(result['seconds']), statistics.median(result['seconds'])
        result['spread'] = (max(result['seconds']) - result['best']) / result['median']
        result['memory_mb'] = min(result['peak_mb'])
        if 'flops' in result:
            result['tflops'] = result['flops'] / result['best'] / 1e12
        if bound:
            result['gemm_share'] = bound / result['best']
    first, *rest = (r for r in results if r['name'] != 'gemm')
    for result in rest:
        if first['seconds'] and result['seconds']:
            result['times_first'] = result['best'] / first['best']
            result['memory_of_first'] = result['memory_mb'] / first['memory_mb']


def table(results: list[dict]) -> str:
    """Format a row of the benchmark: its title and a line for each implementation."""
    r = results[0]
    title = f'{r["arch"]}, {r["mode"]}, {r["height"]}x{r["width"]}, window {r["window"]}, {r["dtype"]}, {r["device"]}'
    title += f', batch {r["batch"]}' + (', compiled' if r['compile'] else '')
    lines = [title, f'{"":24}    best   median spread  TFLOP/s  GEMM    memory   time, memory of the first']
    for r in results:
        if not r['seconds']:
            lines.append(f'{r["name"]:24} {r["skipped"]}')
            continue
        line = f'{r["name"]:24}{r["best"]:7.3f}s {r["median"]:7.3f}s {r["spread"]:5.0%}'
        line += f' {r["tflops"]:8.3f}' if 'tflops' in r else ' ' * 9
        line += f' {r["gemm_share"]:5.0%}' if 'gemm_share' in r else ' ' * 6
        line += f' {r["memory_mb"]:6.0f} MB' if r['name'] != 'gemm' else ''
        line += f'   {r["times_first"]:.2f}x, {r["memory_of_first"]:.2f}x' if 'times_first' in r else ''
        lines.append(line + (f'   then: {r["skipped"]}' if 'skipped' in r else ''))
        if 'shares' in r and r['name'] != 'gemm':
            shares = sorted(r['shares'].items(), key=lambda item: -item[1])
            lines.append('   ' + ', '.join(f'{kind} {share:.0%}' for kind, share in shares))
    return '\n'.join(lines)


def machine() -> dict:
    """Describe the hardware and the versions of libraries."""
    cpu = 'unknown CPU'
    if Path('/proc/cpuinfo').exists():
        models = [line for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')]
        cpu = models[0].partition(':')[2].strip() if models else cpu
    versions = {'python': sys.version.split()[0]}
    sys.path.append(str(peers.FOLDER))
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    sys.path.remove(str(peers.FOLDER))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    simd = torch.backends.cpu.get_cpu_capability()
    return dict(cpu=cpu, simd=simd, cores=os.cpu_count(), gpu=gpu, versions=versions)


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
            key = ', '.join((other(r), r['mode'], r['dtype'], r['device']))
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
        print(json.dumps(measure(Work(**json.loads(args.work)))))
        return 0
    about = machine()
    print(f'{about["cpu"]} ({about["cores"]} cores, {about["simd"]}), GPU: {about["gpu"] or "none"}')
    print(', '.join(f'{name} {version}' for name, version in about['versions'].items()))
    print('memory: peak of the process, less what it held before the model was built')
    rows = []
    for row in plan(args):
        rows.append(measure_row(row, args.rounds))
        summarise(rows[-1])
        print(f'\n{table(rows[-1])}', flush=True)
        if args.out:
            record = dict(command=sys.argv, date=time.strftime('%Y-%m-%d'), machine=about, rows=rows)
            try:
                with whole(args.out / 'benchmark.json') as partial:
                    partial.write_text(json.dumps(record, indent=1))
                plot(rows, args.out / 'benchmark.png')
            except OSError as error:
                return bad_input(unwritten(error))
    if args.out:
        print(f'\nwrote {args.out / "benchmark.json"} and {args.out / "benchmark.png"}')
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
