"""The processes in which the benchmark measures: what they get, and what they give.

On a CPU each measurement has a process of its own, because its memory is that of the process. On a GPU PyTorch counts
memory itself, so one process measures all implementations of a row, which saves imports and compiling them twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from swinv2_tools.benchmark_work import Work, measure

BENCHMARK = Path(__file__).resolve().parents[1] / 'analysis_tools/benchmark.py'


def measure_row(row: list[Work], rounds: int, limit: float | None, show: Callable[[str], None]) -> list[dict]:
    """Measure all implementations of a row in turns. One that fails is not tried again.

    Args:
        row (list[Work]): the implementations.
        rounds (int): how often each is measured.
        limit (float, optional): seconds that a process may take for one measurement.
        show (Callable): gets what comes next, in words.

    Returns:
        list[dict]: for each its `Work`, ``seconds``, ``peak_mb`` and more figures of `measure`, and ``skipped``, the
        reason, if it failed.
    """
    results = [dict(work._asdict(), seconds=[], peak_mb=[]) for work in row]
    pairs = list(zip(row, results))
    if row[0].device == 'cuda':
        while pairs:  # after a failure the rest gets a new process
            _measure(pairs, list(range(rounds)), rounds, limit, show)
            pairs = [(work, result) for work, result in pairs if not result['seconds'] and 'skipped' not in result]
    else:
        for turn in range(rounds):
            for pair in pairs:
                if 'skipped' not in pair[1]:
                    _measure([pair], [turn], rounds, limit, show)
    return results


def _measure(pairs, turns, rounds, limit, show):
    """Add the figures of one process to the results. The ``pairs`` are of `Work` and result."""
    works, results = zip(*pairs)
    with contextlib.closing(run(works, turns, rounds, limit)) as measured:
        for place, figures in measured:
            if 'doing' in figures:
                show(f'{works[place].name}: {figures["doing"]}')
                continue
            results[place]['seconds'] += figures.pop('seconds', [])
            results[place]['peak_mb'] += [figures.pop('peak_mb')] if 'peak_mb' in figures else []
            results[place].update(figures)


def run(works: list[Work], turns: list[int], rounds: int, limit: float | None) -> Iterator[tuple[int, dict]]:
    """Yield what `measure` yields in a new process. A failure is a result too: ``skipped``, its reason."""
    task = json.dumps([[work._asdict() for work in works], turns, rounds])
    command = [sys.executable, str(BENCHMARK), '--work', task]
    env = {**os.environ, 'TOKENIZERS_PARALLELISM': 'false'}
    place = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env)
        try:
            while select.select([process.stdout], [], [], limit)[0]:
                line = process.stdout.readline()
                if not line:
                    break
                place, figures = json.loads(line)
                yield place, figures
            else:
                yield place, dict(skipped=f'took longer than {limit:g} seconds')
                return
            if process.wait():
                errors.seek(0)
                lines = errors.read().decode(errors='replace').strip().splitlines()
                killed = f'killed by signal {-process.returncode}, perhaps out of memory'
                yield place, dict(skipped=lines[-1] if lines else killed)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def serve(task: str) -> None:
    """Measure in this process, and print what `measure` yields, a line each. Other output joins the errors."""
    works, turns, rounds = json.loads(task)
    with contextlib.redirect_stdout(sys.stderr), os.fdopen(os.dup(1), 'w') as out:
        os.dup2(2, 1)
        for figures in measure([Work(**work) for work in works], turns, rounds):
            print(json.dumps(figures), file=out, flush=True)
