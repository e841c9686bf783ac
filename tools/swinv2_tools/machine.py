"""What this machine has: cores, memory, disk space, and what it takes to compile mmcv.

`tools/install.py` asks before anything is installed, so this file needs the standard library alone.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

GIGABYTE = 10**9
TEMPORARY_SIZE = 1  # gigabytes that pip and the compiler keep in the temporary folder


def find_problem(environment: Path, size: float) -> str | None:
    """Find what keeps this machine from compiling mmcv and filling an environment.

    Args:
        environment (Path): an existing folder on the disk of the environment.
        size (float): what the environment will take there, in gigabytes.

    Returns:
        str, optional: the first problem and its cure, in one line.
    """
    version = '{}.{}'.format(*sys.version_info)
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        cure = f'leave its environment if one is active (deactivate), and run e.g. python3.12 {sys.argv[0]}'
        return f'Python {version} is not supported, 3.10 to 3.12 are: {cure}'
    compiler = shlex.split(os.environ.get('CXX') or 'c++')[0]  # gcc alone does not compile C++
    if not shutil.which(compiler):
        return f'mmcv needs a C++ compiler, and {compiler} is not on the PATH: apt install g++, or set CXX to yours'
    include = sysconfig.get_paths()['include']
    if not Path(include, 'Python.h').is_file():
        return f'mmcv needs Python.h, and {include} has none: apt install python{version}-dev'
    for folder, need in {Path(tempfile.gettempdir()): TEMPORARY_SIZE, environment: size}.items():
        free = shutil.disk_usage(folder).free / GIGABYTE
        if free < need:
            cure = 'free some' if folder == environment else 'free some, or set TMPDIR to a folder with more'
            return f'{folder} has {free:.1f} GB of free space, {need:.1f} GB are needed: {cure}'
    return None


def processes_at_once(gigabytes: int) -> int:
    """Count the processes of so many gigabytes each that fit the memory, at least one and at most one per core."""
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return max(1, min(len(os.sched_getaffinity(0)), memory // (gigabytes * GIGABYTE)))
