"""Run the tests, after installing what they need."""

import argparse
import os
import sys

from install import ROOT, ensure_environment


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
    os.execv(sys.executable, [sys.executable, '-m', 'pytest', *arguments])


if __name__ == '__main__':
    main()
