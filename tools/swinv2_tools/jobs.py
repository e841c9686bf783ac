"""Several commands at a time, each with its share of the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from swinv2_tools import ending

INTERVAL = 5  # seconds between two looks at what is done


class Job(NamedTuple):
    """A command of Python, a name for messages, and a file for what it prints."""

    name: str
    command: Sequence[str]
    log: Path


def run_jobs(jobs: Sequence[Job], at_once: int, progress: Callable[[], None], limit: float | None = None) -> None:
    """Run all jobs, so many at once, or as many as a time limit allows.

    Args:
        jobs (Sequence[Job]): the first ones are begun first.
        at_once (int): how many. If it is more than one, each gets an equal share of the cores.
        progress (Callable): shows what is done; called every few seconds.
        limit (float, optional): seconds after which those that run are ended, and no more are begun.

    Raises:
        ChildProcessError: a job failed. The others have been ended.
    """
    env = {**os.environ, ending.SILENT: '1'}
    if at_once > 1:
        env['OMP_NUM_THREADS'] = str(max(1, len(os.sched_getaffinity(0)) // at_once))
    waiting, running, start = list(jobs), [], time.monotonic()
    shown = start
    try:
        while (waiting or running) and not (limit is not None and time.monotonic() - start > limit):
            while waiting and len(running) < at_once:
                running.append(_start(waiting.pop(0), env))
            time.sleep(1)
            for job, process in running:
                if process.poll():
                    raise ChildProcessError(f'{job.name} failed: {_last_line(job.log)} (see {job.log})')
            running = [(job, process) for job, process in running if process.returncode is None]
            if time.monotonic() - shown >= INTERVAL:
                progress()
                shown = time.monotonic()
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()


def _start(job, env):
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open('ab') as log:
        command = [sys.executable, *job.command]
        return job, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env)


def _last_line(log):
    lines = log.read_text(errors='replace').strip().splitlines()
    return lines[-1].replace('error: ', '', 1) if lines else 'no output'
