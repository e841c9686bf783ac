"""Run the tests, after installing what they need, in a few processes at once (one with `-n 0`, as `-s` needs)."""

import argparse
import os
import sys

from install import ROOT, ensure_environment

MAX_WORKERS = 4
MEMORY = 4 * 2**30  # bytes, of a worker


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
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    workers = max(1, min(cores, MAX_WORKERS, memory // MEMORY))
    os.environ.setdefault('PYTEST_XDIST_AUTO_NUM_WORKERS', str(workers))
    os.environ.setdefault('OMP_NUM_THREADS', str(cores // workers))
    os.execv(sys.executable, [sys.executable, '-m', 'pytest', '-n', 'auto', '--dist', 'worksteal', *arguments])


if __name__ == '__main__':
    main()
