"""Test and measure this backbone on a GPU: all that is worth knowing, the most important first, within some minutes.

It runs the tests that need a GPU, compute-sanitizer if it is installed, the benchmark beside transformers and timm, and
Mask R-CNN if mmdet and mmcv are installed. A part that would not fit into the minutes is not started. After each part
it writes gpu.json, with everything, and gpu.md, with text and tables for docs/performance.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from typing import NamedTuple

import torch
from swinv2_tools.benchmark_report import machine
from swinv2_tools.gpu_report import markdown, not_measured

from swinv2_mm.engine.launch import bad_input
from swinv2_mm.writing import check_folder, unwritten, whole

ROOT = Path(__file__).resolve().parents[2]
TESTS = ('tests/test_flash_cuda.py', 'tests/test_fused_block.py')
PYTEST = ('python', '-m', 'pytest', *TESTS, '-q', '-p', 'no:cacheprovider', '--noconftest')
BENCHMARK = ('python', 'tools/analysis_tools/benchmark.py', '--device', 'cuda', '--batch', '2')
ALONE = 'PYTORCH_NO_CUDA_MEMORY_CACHING'  # every tensor is an allocation, outside of which the sanitizer sees accesses
MARGIN = 20  # seconds of the minutes for the imports at the start and the files at the end
RESULT = r'^(=+ )?(\d+ (passed|failed|skipped|deselected|error)|no tests ran)|ERROR SUMMARY'  # what tests say
IS_HERE = {
    'file': lambda name: (ROOT / name).is_file(),
    'program': shutil.which,
    'module': importlib.util.find_spec,
}


class Part(NamedTuple):
    """A command, the seconds that it usually takes and may take at most, and what it needs to be here."""

    name: str
    title: str
    command: tuple[str, ...]
    usual: int
    most: int
    kind: str = 'rows'
    settings: tuple[tuple, ...] = ()  # what it measures, as in `swinv2_tools.gpu_report`
    requires: tuple[tuple[str, str], ...] = ()
    env: tuple[tuple[str, str], ...] = ()


def plan() -> list[Part]:
    """List all parts, the most important first."""
    large, square, both = (800, 1333), (1024, 1024), (16, 32)
    needs = tuple(('file', name) for name in TESTS)
    sanitizer = ('compute-sanitizer', '--tool', 'memcheck', '--error-exitcode', '1', *PYTEST, '-k', 'sanitized')
    return [
        Part('tests', 'Tests on the GPU', PYTEST, 90, 240, 'test', requires=needs),
        rows('train', 'bf16', large, both),
        rows('infer', 'bf16', large, both),
        Part(
            'memcheck',
            'A small case in compute-sanitizer',
            sanitizer,
            **dict(usual=60, most=120, kind='test', env=((ALONE, '1'),)),
            requires=(*needs, ('program', 'compute-sanitizer')),
        ),
        rows('train', 'bf16', large, (16,), compiled=True),
        rows('train', 'fp32', large, both),
        rows('train', 'bf16', square, both),
        detector('train', 'bf16'),
        rows('infer', 'fp32', large, both),
        rows('infer', 'bf16', square, both),
        rows('infer', 'bf16', large, (16,), compiled=True),
        rows('train', 'fp32', square, both),
        rows('infer', 'fp32', square, both),
        detector('infer', 'bf16'),
        *(rows('train', dtype, large, (window,), compiled=True) for dtype, window in (('bf16', 32), ('fp32', 16))),
        *(rows(mode, 'bf16', square, (16,), compiled=True) for mode in ('train', 'infer')),
    ]


def rows(mode: str, dtype: str, size: tuple[int, int], windows: tuple[int, ...], compiled: bool = False) -> Part:
    """Rows of the benchmark, one per window. The size is in pixels, windows are in tokens."""
    pixels, of_windows = 'x'.join(map(str, size)), list(map(str, windows))
    flags = ['--mode', mode, '--dtype', dtype, '--sizes', pixels, '--windows', *of_windows]
    flags += ['--peers', 'transformers', 'timm', '--rounds', '2', '--steps', '10', '--profile']
    flags += ['--compile', 'yes', '--limit', '150'] if compiled else ['--limit', '90']
    name = '_'.join((mode, dtype, pixels, 'w' + '-'.join(of_windows), *['compiled'] * compiled))
    usual = (130 if compiled else 35) * len(windows)
    settings = tuple((mode, *size, window, dtype, compiled) for window in windows)
    return Part(name, 'Benchmark', (*BENCHMARK, *flags), usual, 2 * usual, settings=settings)


def detector(mode: str, dtype: str) -> Part:
    """Mask R-CNN beside mmdet's own with Swin V1."""
    flags = ['--detector', '--mode', mode, '--dtype', dtype, '--sizes', '800x1344', '--windows', '16']
    flags += ['--rounds', '1', '--steps', '6', '--profile', '--limit', '90']
    settings, requires = ((mode, 800, 1344, 16, dtype, False),), (('module', 'mmdet'), ('module', 'mmcv'))
    return Part(f'detector_{mode}_{dtype}', 'Mask R-CNN', (*BENCHMARK, *flags), 50, 120, 'detector', settings, requires)


def attempt(part: Part, seconds: float, folder: Path) -> dict:
    """Run a part if what it needs is here and it usually fits into so many seconds; then end it when they are over.

    Returns:
        dict: ``state``: done, failed, stopped or not run; ``why``, in words; what it ``said``; ``seconds``, its time,
        and ``rows`` of the benchmark as far as it came.
    """
    absent = [name for kind, name in part.requires if not IS_HERE[kind](name)]
    if absent:
        return dict(state='not run', why=f'{" and ".join(absent)} not found here')
    if seconds < part.usual:
        why = f'no time, because it takes about {part.usual} s and {max(seconds, 0):.0f} s were left'
        return dict(state='not run', why=why)
    return run(part, min(seconds, part.most), folder)


def run(part: Part, seconds: float, folder: Path) -> dict:
    """Run a part, as `attempt`, for so many seconds at most. What it writes goes into the folder."""
    log, out = folder / f'{part.name}.log', folder.resolve() / part.name
    command = [sys.executable if word == 'python' else word for word in part.command]
    command += [] if part.kind == 'test' else ['--out', str(out)]
    (out / 'benchmark.json').unlink(missing_ok=True)  # of an earlier run
    start = time.monotonic()
    with log.open('wb') as output:
        streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        env = {**os.environ, **dict(part.env), ending.SILENT: '1'}
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **streams)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what measures for it
            process.wait()
    lines = log.read_text(errors='replace').replace('\r', '\n').strip().splitlines()
    result = dict(seconds=round(time.monotonic() - start, 1), output=lines[-40:])
    result['said'] = [line.strip('= ') for line in lines if re.search(RESULT, line)]
    if (out / 'benchmark.json').is_file():
        result['rows'] = json.loads((out / 'benchmark.json').read_text())['rows']
    if code is None:
        return dict(result, state='stopped', why=f'stopped after {seconds:.0f} s')
    if code:
        return dict(result, state='failed', why=f'failed with exit code {code}: {lines[-1] if lines else "no output"}')
    return dict(result, state='done', why='done, without a result')


def text_of(part: Part) -> str:
    """The command as one types it."""
    return ' '.join([*map('='.join, part.env), shlex.join(part.command)])


def write(record: dict, out: Path) -> None:
    """Write gpu.json and gpu.md."""
    for name, text in (('gpu.json', json.dumps(record, indent=1)), ('gpu.md', markdown(record))):
        with whole(out / name) as partial:
            partial.write_text(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python tools/misc/measure_gpu.py --minutes 8 --out work_dirs/gpu',
    )
    parser.add_argument('--minutes', type=float, default=8, help='how long it may take (default: 8)')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/gpu'), help='folder for gpu.json and gpu.md (default: %(default)s)'
    )
    args = parser.parse_args(argv)
    if not 0 < args.minutes < float('inf'):
        parser.error(f'--minutes {args.minutes:g}: give a positive number, for example 8')
    if not torch.cuda.is_available():
        parser.exit(2, 'error: PyTorch sees no GPU: run this on a machine with one, and a PyTorch with CUDA\n')
    return args


def main() -> int:
    args, start = parse_args(), time.monotonic()
    parts, out = plan(), args.out
    try:
        check_folder(out / 'parts', '--out')
        results = [dict(part._asdict(), command=text_of(part), state='not run', why='not reached') for part in parts]
        command = shlex.join(['python', 'tools/misc/measure_gpu.py', *sys.argv[1:]])
        record = dict(command=command, date=time.strftime('%Y-%m-%d'), minutes=args.minutes, machine=machine())
        for part, result in zip(parts, results):
            left = args.minutes * 60 - (time.monotonic() - start) - MARGIN
            print(f'{part.name}, {left:.0f} s left: ', end='', flush=True)
            result.update(attempt(part, left, out / 'parts'))
            print(result['state'] if result['state'] == 'done' else result['why'], flush=True)
            write(dict(record, seconds=round(time.monotonic() - start, 1), parts=results), out)
    except ValueError as error:
        return bad_input(error)
    except OSError as error:
        return bad_input(unwritten(error))
    print(f'\nwrote {args.out / "gpu.json"} and {args.out / "gpu.md"}; not measured:')
    print('\n'.join(line for result in results for line in not_measured(result)) or 'nothing')
    return 0


if __name__ == '__main__':
    sys.exit(ending.run(main))
