"""Run the tests of the package with another Python and PyTorch, in an environment of their own, `.venv-pyX-torchY`.

It holds no mmdet, mmseg or mmcv: these tests need only the package and mmengine. An existing environment is used again.
It takes about 5 GB with a CUDA build of PyTorch, which uv installs by default.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from swinv2_tools import ending  # isort: split

import argparse
import os
import re
import subprocess

from install import ROOT, ensure_environment, read_pins, say
from swinv2_tools.machine import processes_at_once

TESTS = (
    'amp arch arguments attention backbone backbone_reference backbone_training checkpoint checkpoint_mutation '
    'checkpoint_tools compat compile distributed files formats linear mmengine_reading model_weights ops optim '
    'other_names position_bias pretrained_windows registry unpickling ways_of_use windows writing'
)
NOT_HERE = ('mmengine', 'mmcv')  # of the core: mmengine is installed without its dependencies, mmcv is not needed
TEST_LIBRARIES = ('hypothesis', 'pycocotools', 'pytest', 'pytest-xdist', 'transformers')
CEILINGS = {  # libraries that support an older PyTorch, by the first PyTorch that needs no ceiling
    (2, 3): ('numpy<2', 'transformers<4.47'),  # built with NumPy 1
    (2, 6): ('transformers<5',),
}
GIGABYTES = 4  # of memory for a worker


def uv(*arguments: str) -> None:
    """Run uv, which also finds every Python of pyenv. If it fails, the tool ends."""
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv'))
    path = os.pathsep.join([*map(str, sorted(pyenv.glob('versions/*/bin'))), os.environ['PATH']])
    command = [sys.executable, '-m', 'uv', *arguments]
    if subprocess.run(command, env={**os.environ, 'PATH': path}).returncode:
        sys.exit(f'error: uv {" ".join(arguments)} failed for the reason above')


def libraries() -> list[str]:
    """List what the tests and mmengine need, with the upper bounds of `setup.cfg`: its lower ones need a new Python."""
    pins = read_pins()
    needed = [line for line in pins['core'] if line.name not in NOT_HERE]
    needed += [line for extra in ('det', 'test') for line in pins[extra] if line.name in TEST_LIBRARIES]
    return [line.name + ','.join(str(bound) for bound in line.specifier if bound.operator == '<') for line in needed]


def make_environment(python: str, torch: str) -> Path:
    """Make the environment, or complete an existing one. Returns its folder."""
    version = tuple(map(int, torch.split('.')[:2]))
    ceilings = [ceiling for first, those in CEILINGS.items() if version < first for ceiling in those]
    folder = ROOT / f'.venv-py{python}-torch{torch}'
    if not folder.exists():
        uv('venv', '--quiet', '--python', python, str(folder))
    inside = ('pip', 'install', '--quiet', '--python', str(folder / 'bin' / 'python'))
    uv(*inside, f'torch=={torch}', *ceilings, *libraries())
    (mmengine,) = (str(line) for line in read_pins()['core'] if line.name == 'mmengine')
    uv(*inside, '--no-deps', '--reinstall-package', 'swinv2-mm', mmengine, str(ROOT))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='example: python3 tools/misc/test_versions.py --python 3.8 --torch 2.0.1'
    )
    parser.add_argument('--python', required=True, help='for example 3.8, from pyenv, uv or the PATH')
    parser.add_argument('--torch', required=True, help='for example 2.1.2')
    parser.add_argument('tests', nargs='*', help='arguments of pytest (default: all tests of the package)')
    args = parser.parse_args()
    if not re.match(r'\d+\.\d+', args.torch):
        parser.error(f'--torch {args.torch}: give a version, for example 2.1.2')
    ensure_environment()
    os.chdir(ROOT)
    say(f'Making an environment of Python {args.python} and PyTorch {args.torch}')
    folder = make_environment(args.python, args.torch)
    code = 'import sys, torch, numpy, mmengine; print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, '
    code += 'NumPy {numpy.__version__}, mmengine {mmengine.__version__}", flush=True)'
    python = str(folder / 'bin' / 'python')
    subprocess.run([python, '-c', code], check=True)
    workers = min(processes_at_once(GIGABYTES), 4)
    os.environ['OMP_NUM_THREADS'] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    tests = args.tests or [f'tests/test_{name}.py' for name in TESTS.split()]
    # `python -m pytest` would import the package from the checkout, not the installed one; the console script does not.
    pytest = str(folder / 'bin' / 'pytest')
    os.execv(pytest, [pytest, '-n', str(workers), '--dist', 'worksteal', '-p', 'no:cacheprovider', *tests])


if __name__ == '__main__':
    ending.run(main)
