"""Run the tests, after installing what they need, in a few processes at once (`-n 0`: in one)."""

import argparse
import os
import sys

from install import ROOT, ensure_environment

MAX_WORKERS = 4  # each takes up to 3 GB


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
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, MAX_WORKERS)
    os.environ.setdefault('OMP_NUM_THREADS', str(cores // workers))
    os.execv(sys.executable, [sys.executable, '-m', 'pytest', '-n', str(workers), '--dist', 'worksteal', *arguments])


if __name__ == '__main__':
    main()
