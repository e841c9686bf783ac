"""Run the tests, after installing what they need, in a few processes at once (one with `-n 0`, as `-s` needs)."""

from swinv2_tools import ending  # isort: split

import argparse
import os
import sys

from install import ROOT, ensure_environment
from swinv2_tools.machine import processes_at_once

MAX_WORKERS = 4
GIGABYTES = 4  # of memory, for a worker


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage='%(prog)s [-h] [arguments of pytest]',
        epilog='example: python3 tools/run_tests.py -x tests/test_windows.py (paths start from the repository root)',
        allow_abbrev=False,
    )
    _, arguments = parser.parse_known_args()
    ensure_environment()
    os.chdir(ROOT)
    workers = min(processes_at_once(GIGABYTES), MAX_WORKERS)
    os.environ.setdefault('PYTEST_XDIST_AUTO_NUM_WORKERS', str(workers))
    os.environ.setdefault('OMP_NUM_THREADS', str(len(os.sched_getaffinity(0)) // workers))
    os.execv(sys.executable, [sys.executable, '-m', 'pytest', '-n', 'auto', '--dist', 'worksteal', *arguments])


if __name__ == '__main__':
    ending.run(main)
