"""Install what the commands of the README need: into the active virtual environment, or else into `.venv`.

`setup.cfg` pins the versions. Tools call `ensure_environment()` first, so this needs only the standard library and pip.
"""

from __future__ import annotations

from swinv2_tools import ending  # isort: split

import argparse
import configparser
import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from swinv2_tools import machine

if TYPE_CHECKING:
    from importlib.metadata import Distribution

    from pip._vendor.packaging.requirements import Requirement

    Pins = dict[str, list[Requirement]]  # by extra
    Found = dict[str, Distribution]  # by name

ROOT = Path(__file__).resolve().parents[1]
STACKS = {  # the distributions of mmengine, mmcv, mmdet and mmseg
    'upstream': ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation'),
    'onedl': ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'),
}
NO_DEPENDENCIES = ('imaug',)  # asks for opencv-python, as the hosts do
OTHER_OPENCVS = ('opencv-python', 'opencv-contrib-python-headless', 'opencv-contrib-python')
SIZE = 3.5  # gigabytes of an environment with a torch without CUDA: 1.8 measured, and what pip unpacks meanwhile
PATIENCE = 10  # seconds that an interrupted pip may take to tidy up
CPU_TORCH = 'in an active environment: pip install torch --index-url https://download.pytorch.org/whl/cpu'
CURES = {  # of a failure, by what pip's log shows
    'No space left on device': f'the disk is full: free some space, or set TMPDIR if {tempfile.gettempdir()} is the '
    f'full one; torch with CUDA takes 8 GB, so without a GPU install the small one first, {CPU_TORCH}',
    'Killed signal|fatal error: Killed|Cannot allocate memory': 'out of memory: set MAX_JOBS=1 and run again',
    r"CUDA_HOME environment variable is not set|nvcc not found|nvcc'$|detected CUDA version \(\S+\) mismatches": (
        'torch sees a GPU, so mmcv needs a CUDA toolkit of the same major version as that of torch: install it and set '
        'CUDA_HOME to its folder, or set CUDA_VISIBLE_DEVICES= (empty) to do without the GPU'
    ),
    'No matching distribution found for torch': f'no such torch for this machine: install another >=2.6, {CPU_TORCH}',
}
CHECK_OPS = """
import mmcv.ops, sys, torch
if torch.cuda.is_available() and mmcv.ops.get_compiling_cuda_version() == 'not available':
    sys.exit('mmcv was built without CUDA, and torch sees a GPU')
"""

say = functools.partial(print, flush=True)


def stop_on(problem: str | None) -> None:
    """If there is a problem, end the program with one line: the cause and the cure."""
    if problem:
        print(f'error: {problem}', file=sys.stderr)
        sys.exit(2)


def read_pins() -> Pins:
    """Read the extras of `setup.cfg`: requirements by the name of the extra."""
    from pip._vendor.packaging.requirements import Requirement  # the Python of the system may have no pip

    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / 'setup.cfg')
    extras = config['options.extras_require'].items()
    return {extra: [Requirement(line) for line in lines.strip().split('\n')] for extra, lines in extras}


def find_installed(pins: Pins, folders: list[str] | None = None) -> Found:
    """Find the distributions that the pins name, and all builds of OpenCV, in folders (default: the environment)."""
    from importlib.metadata import distributions  # Python 3.7 has no such module, and must get to its error message

    if folders is None:  # isolated (-I): without PYTHONPATH, the working directory and the user's own packages
        command = [sys.executable, '-I', '-c', 'import sys; print(*sys.path, sep="\\n")']
        folders = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    importlib.invalidate_caches()
    names = {*OTHER_OPENCVS, *(requirement.name for extra in pins.values() for requirement in extra)}
    found = {name: next(iter(distributions(name=name, path=folders)), None) for name in names}
    return {name: distribution for name, distribution in found.items() if distribution and distribution.version}


def missing(requirements: list[Requirement], found: Found) -> list[str]:
    """Select the requirements whose distribution is absent or has a wrong version."""

    def is_met(requirement):
        distribution = found.get(requirement.name)
        return distribution and requirement.specifier.contains(distribution.version, prereleases=True)

    return [str(requirement) for requirement in requirements if not is_met(requirement)]


def settle_stack(stack: str | None, found: Found) -> str:
    """Choose the stack: the one asked for, else the one that is installed, else upstream.

    It stops if the environment holds the other one, since both provide the same modules.
    """
    present = {name: host for name, hosts in STACKS.items() for host in reversed(hosts) if host in found}
    stack = stack or next(iter(present), 'upstream')
    for other in present.keys() - {stack}:
        stop_on(
            f'this environment holds {present[other]} {found[present[other]].version}, and the {stack} stack provides '
            f'the same modules: use a fresh one, e.g. python3 -m venv .venv-{stack} && . .venv-{stack}/bin/activate'
        )
    return stack


def requirements_of(pins: Pins, stack: str, found: Found) -> tuple[dict[str, Requirement], dict[str, Requirement]]:
    """List libraries, and hosts, which pip installs without their dependencies, by name.

    An installed torch stays, even an older one. So does another build of OpenCV, since two overwrite each other.
    """
    extras = ('build', 'core', 'det', 'seg', 'test', *(['onedl'] if stack == 'onedl' else []))
    libraries = {requirement.name: requirement for extra in extras for requirement in pins[extra]}
    if 'torch' in found:
        (libraries['torch'],) = pins['kept']
    if any(build in found for build in OTHER_OPENCVS):
        del libraries['opencv-python-headless']
    for name in ('swinv2-mm', *(name for other in STACKS.keys() - {stack} for name in STACKS[other])):
        libraries.pop(name, None)
    hosts = {name: libraries.pop(name) for name in (*STACKS[stack], *NO_DEPENDENCIES) if name in libraries}
    return libraries, hosts


def plan(pins: Pins, stack: str, found: Found) -> dict[str, list[str]]:
    """Plan the calls of `pip install` that complete an environment: their arguments by what is missing, in order.

    Libraries come first, since mmcv compiles with the torch and the setuptools of the environment. A call names all
    its requirements, so that pip moves none out of its bounds; pip leaves alone what is there.
    """
    libraries, hosts = (list(kind.values()) for kind in requirements_of(pins, stack, found))
    folder = str(Path(sys.prefix, 'peers'))
    peers = missing(pins['peers'], find_installed(pins, [folder]))
    origin = json.loads(('swinv2-mm' in found and found['swinv2-mm'].read_text('direct_url.json')) or '{}')
    is_ours = origin.get('url') == ROOT.as_uri() and origin.get('dir_info', {}).get('editable')
    built = ['--no-deps', '--no-build-isolation']
    steps = (
        (missing(libraries, found), [str(library) for library in libraries]),
        (missing(hosts, found), [*built, *(str(host) for host in hosts)]),
        (peers, ['--no-deps', '--upgrade', '--target', folder, *peers]),
        ([] if is_ours else [f'swinv2_mm of {ROOT}'], [*built, '-e', str(ROOT)]),
    )
    return {', '.join(lacking[:4]) + ', ...' * (len(lacking) > 4): arguments for lacking, arguments in steps if lacking}


def pip_install(*arguments: str) -> None:
    """Run `pip install`. An interrupt also ends all that pip has started, such as compilers."""
    log = Path(sys.prefix, 'install.log')
    log.write_text('')
    command = [sys.executable, '-m', 'pip', 'install', '--disable-pip-version-check', '--log', str(log), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=pip_environ(), start_new_session=True)
    try:
        process.wait()
    except BaseException:
        for number in (signal.SIGINT, signal.SIGKILL):  # after the first, pip removes its temporary folders
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):  # the first: nobody is left
                os.killpg(process.pid, number)
                process.wait(PATIENCE)
        raise
    if process.returncode:
        text = log.read_text(errors='replace')
        cures = (cure for pattern, cure in CURES.items() if re.search(pattern, text, re.MULTILINE))
        stop_on(f'{next(cures, "pip failed for the reason above: run again once it is cured")}; see {log}')


def pip_environ() -> dict[str, str]:
    """Return the environment variables of pip and of the build of mmcv.

    CFLAGS replace Python's own, `-O3 -g` among them. Debugging symbols would make the build of mmcv take twice as long
    and its wheel 15 times as large.
    """
    jobs = str(machine.processes_at_once(2))  # a compiler takes up to 2 GB
    flags = '-O2 -g0 -fwrapv -DNDEBUG'
    path = os.pathsep.join([str(Path(sys.prefix, 'bin')), os.environ.get('PATH', os.defpath)])  # for ninja
    ours = dict(PATH=path, PYTHONNOUSERSITE='1', PYTHONPATH='', MMCV_WITH_OPS='1')
    return {'MAX_JOBS': jobs, 'CFLAGS': flags, 'CXXFLAGS': flags, **os.environ, **ours}


def failure_of(code: str) -> str | None:
    """Say why code fails in a process of its own, since a broken mmcv may crash it; None if it works."""
    process = subprocess.run([sys.executable, '-I', '-c', code], capture_output=True, text=True)
    if process.returncode == 0:
        return None
    return process.stderr.strip().split('\n')[-1] or f'exit code {process.returncode}'


def complete(stack: str | None) -> bool:
    """Install what the running interpreter's environment lacks. Returns whether that was anything."""
    if not importlib.util.find_spec('pip') and failure_of('import ensurepip; ensurepip.bootstrap()'):
        stop_on(f'{sys.prefix} has no pip: install it there, or use an environment that has it')
    pins = read_pins()
    found = find_installed(pins)
    stack = settle_stack(stack, found)
    steps = plan(pins, stack, found)
    if not steps and not failure_of(CHECK_OPS):
        say(f'{sys.prefix} is complete: {stack} stack')
        return False
    if 'torch' in found and missing(pins['kept'], found):  # somebody's choice, so it is not replaced
        cure = f'pip install "{pins["kept"][0]}" there, or leave that environment (deactivate) and run again'
        stop_on(f'torch {found["torch"].version} in {sys.prefix} is too old: {cure}')
    mmcv = requirements_of(pins, stack, found)[1][STACKS[stack][1]]
    if 'torch' not in found and not shutil.which('nvidia-smi'):
        say(f'No NVIDIA driver: if pip takes a torch with CUDA (8 GB), stop it and take the small one, {CPU_TORCH}')
    if missing([mmcv], found):
        stop_on(machine.find_problem(Path(sys.prefix), SIZE - ('torch' in found)))  # which takes 1 GB
        say(f'{mmcv} compiles for about 7 minutes on two cores, longer with CUDA, unless pip has a wheel of it')
    say(f'Installing the {stack} stack into {sys.prefix}; the install.log there has all that pip and the compiler say')
    for number, (lacking, arguments) in enumerate(steps.items(), 1):
        say(f'[{number}/{len(steps)}] {lacking}')
        pip_install(*arguments)
    verify(pins, stack, mmcv)
    return True


def verify(pins: Pins, stack: str, mmcv: Requirement) -> None:
    """Stop if something is missing or does not import; compile an mmcv with broken operators once more."""
    lacking = ', '.join(plan(pins, stack, find_installed(pins)))
    stop_on(lacking and f'pip has run, and {sys.prefix} still lacks {lacking}: use a fresh environment')
    problem = failure_of(CHECK_OPS)
    if problem:  # for example, pip's cache had a wheel that was built for another torch
        say(f'mmcv.ops does not work ({problem}), so mmcv is compiled again')
        stop_on(machine.find_problem(Path(sys.prefix), machine.TEMPORARY_SIZE))
        pip_install('--no-deps', '--no-build-isolation', '--no-cache-dir', '--force-reinstall', str(mmcv))
    problem = failure_of(CHECK_OPS) or failure_of('import mmdet.datasets, mmdet.models, mmseg.models, swinv2_mm')
    stop_on(problem and f'{sys.prefix} does not work ({problem}): use a fresh environment')


def ensure_environment(stack: str | None = None) -> None:
    """Install what is missing, and return in a complete environment.

    Outside an environment this creates `.venv` and starts the running script again in it. It also does so after an
    installation, since a running interpreter does not see what has been installed since it started. If the environment
    can't be completed, it prints one line with the cause and the cure, and exits with code 2.

    Args:
        stack (str, optional): upstream or onedl. Default: ``$SWINV2_MM_STACK``, else what is installed, else upstream.
    """
    stack = stack or os.environ.get('SWINV2_MM_STACK') or None
    if stack not in (None, *STACKS):
        stop_on(f'stack {stack!r} does not exist: SWINV2_MM_STACK takes {" or ".join(STACKS)}')
    try:
        environment = choose_environment()
        python = sys.executable if environment == Path(sys.prefix) else create(environment)
        if python != sys.executable or complete(stack):
            os.execv(python, [python, *sys.argv])
    except KeyboardInterrupt as end:
        end.args = ('run again to go on',)
        raise


def choose_environment() -> Path:
    """Choose the folder of the environment: the running Python's, else the active one, else `.venv`."""
    is_conda = os.environ.get('CONDA_PREFIX') == sys.prefix and os.environ.get('CONDA_DEFAULT_ENV') != 'base'
    if sys.prefix != sys.base_prefix or is_conda:  # conda's base holds conda itself
        return Path(sys.prefix)
    active = os.environ.get('VIRTUAL_ENV')
    return Path(active) if active and Path(active, 'pyvenv.cfg').is_file() else ROOT / '.venv'


def create(environment: Path) -> str:
    """Create a virtual environment if there is none. Returns its Python."""
    python = environment / 'bin' / 'python'
    if not python.exists():
        if not importlib.util.find_spec('ensurepip'):  # Debian's package of Python leaves it out
            stop_on('this Python cannot create a virtual environment: apt install python3-venv')
        stop_on(machine.find_problem(environment.parent, SIZE))
        say(f'Creating a virtual environment in {environment}')
        if subprocess.run([sys.executable, '-m', 'venv', str(environment)]).returncode:
            stop_on(f'venv failed for the reason above: cure it, remove {environment} and run again')
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0],
        epilog='For the other tools, SWINV2_MM_STACK=onedl does the same. Example, both stacks side by side: '
        'python3 tools/install.py && python3 -m venv .venv-onedl && . .venv-onedl/bin/activate && '
        'python3 tools/install.py --stack onedl',
    )
    parser.add_argument('--stack', choices=tuple(STACKS), help='upstream (the default) or the OneDL forks of OpenMMLab')
    ensure_environment(parser.parse_args().stack)
    if 'VIRTUAL_ENV' not in os.environ:
        say(f'To use it: . {os.path.relpath(sys.prefix)}/bin/activate')


if __name__ == '__main__':
    ending.run(main)
