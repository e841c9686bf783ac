"""Install what the commands of the README need: into the active virtual environment, else into `.venv`.

The tools call `ensure_environment()` first. It runs before anything is installed, so it needs the standard library
alone. The versions are in `setup.cfg`.
"""

from __future__ import annotations

from lib import ending  # isort: split

import argparse
import configparser
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ((3, 10), (3, 11), (3, 12))
STACKS = {  # the distributions of mmengine, mmcv, mmdet and mmseg
    'upstream': ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation'),
    'onedl': ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'),
}
WITHOUT_DEPENDENCIES = ('imaug',)  # asks for opencv-python, as the hosts do
BUILD_TOOLS = ('setuptools', 'wheel', 'ninja')
OPENCV = ('opencv-python-headless', 'opencv-python', 'opencv-contrib-python-headless', 'opencv-contrib-python')
GIGABYTE = 10**9
ENVIRONMENT_SIZE = 2.5 * GIGABYTE  # with a torch without CUDA: measured 1.8
TORCH_SIZE = 1 * GIGABYTE  # of that
CUDA_SIZE = 8 * GIGABYTE  # what torch with CUDA takes instead
TEMPORARY_SIZE = 1 * GIGABYTE  # what pip and the compiler have in the temporary folder
CPU_TORCH = 'pip install torch --index-url https://download.pytorch.org/whl/cpu'
HEARTBEAT = 30  # seconds between two signs of life
PATIENCE = 10  # seconds for what is interrupted to tidy up

say = functools.partial(print, flush=True)


class InstallError(Exception):
    """Stops the installation. The message is one line: the cause and the cure."""


# ---------------------------------------------------------------- versions


def read_pins(path: Path = ROOT / 'setup.cfg') -> dict[str, list[str]]:
    """Requirements by the name of their extra."""
    config = configparser.ConfigParser(interpolation=None)
    config.read_string(Path(path).read_text())
    return {name: value.strip().split('\n') for name, value in config['options.extras_require'].items()}


def split_requirement(requirement: str) -> tuple[str, str]:
    """`numpy>=2,<3` to `('numpy', '>=2,<3')`; an extra in brackets is dropped."""
    name, specifier = re.fullmatch(r'([\w.-]+)(?:\[\w+])?\s*(.*)', requirement).groups()
    return name, specifier


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version meets a comma-separated list of `==`, `>=` and `<`; local parts as in `2.13.0+cpu` are moot."""

    def release(text):
        numbers = [int(number) for number in re.match(r'\d+(?:\.\d+)*', text).group().split('.')]
        return numbers + [0] * (6 - len(numbers))

    meets = {'==': list.__eq__, '>=': list.__ge__, '<': list.__lt__}
    clauses = [re.fullmatch(r'(==|>=|<)(.+)', clause).groups() for clause in specifier.split(',') if clause]
    return all(meets[operator](release(version), release(bound)) for operator, bound in clauses)


def requirements_of(pins: Mapping[str, list[str]], stack: str) -> dict[str, str]:
    """Everything that an environment needs, the requirement by the name of the distribution."""
    extras = ('build', 'core', 'det', 'seg', 'test', *(('onedl',) if stack == 'onedl' else ()))
    needed = {split_requirement(line)[0]: line for extra in extras for line in pins[extra]}
    others = [name for other, names in STACKS.items() if other != stack for name in names]
    return {name: line for name, line in needed.items() if name not in others and name != 'swinv2-mm'}


def missing(pins: Mapping[str, list[str]], stack: str, installed: Mapping[str, str]) -> list[str]:
    """Names of the distributions that are absent or of a wrong version. A torch that may be kept will do."""
    needed = requirements_of(pins, stack)
    (needed['torch'],) = pins['kept']

    def is_met(name, requirement):
        versions = [installed.get(other) for other in (OPENCV if name in OPENCV else (name,))]
        return any(version and satisfies(version, split_requirement(requirement)[1]) for version in versions)

    return [name for name, requirement in needed.items() if not is_met(name, requirement)]


def missing_peers(pins: Mapping[str, list[str]], found: Survey) -> list[str]:
    """Requirements of the libraries that tests compare with which their folder does not meet."""

    def is_met(requirement):
        name, specifier = split_requirement(requirement)
        return name in found.peers and satisfies(found.peers[name], specifier)

    return [requirement for requirement in pins['peers'] if not is_met(requirement)]


def settle_stack(stack: str | None, installed: Mapping[str, str]) -> str:
    """The stack that was asked for; without a wish the one that is there, else upstream's.

    Raises:
        InstallError: the environment holds the other one. Both provide the same modules.
    """
    present = [name for name, hosts in STACKS.items() if any(host in installed for host in hosts)]
    settled = stack or (present[0] if present else 'upstream')
    for other in present:
        if other != settled:
            host = next(host for host in STACKS[other] if host in installed)
            raise InstallError(
                f'this environment holds {host} {installed[host]}, and the {settled} stack provides the same modules: '
                f'use a fresh environment, e.g. python3 -m venv .venv-{settled} && . .venv-{settled}/bin/activate'
            )
    return settled


# ---------------------------------------------------------------- what can be wrong with the machine


def python_problem(version: tuple = sys.version_info[:2]) -> str | None:
    """The running Python is not one that the stack works with."""
    if tuple(version[:2]) in PYTHONS:
        return None
    names = [f'python{major}.{minor}' for major, minor in reversed(PYTHONS)]
    works = next((name for name in names if _runs(name)), None)
    cure = f'run {works} {sys.argv[0]}' if works else 'install one of these, e.g. with pyenv, uv or conda, and run that'
    return f'Python {version[0]}.{version[1]} is not supported, 3.10, 3.11 and 3.12 are: {cure}'


def _runs(command):
    path = shutil.which(command)
    return path is not None and subprocess.run([path, '-c', ''], capture_output=True).returncode == 0


def venv_problem() -> str | None:
    """Python cannot create virtual environments, as Debian's without its package for that."""
    if importlib.util.find_spec('venv') and importlib.util.find_spec('ensurepip'):
        return None
    package = f'python{sys.version_info[0]}.{sys.version_info[1]}-venv'
    return f'this Python cannot create a virtual environment: apt install {package}'


def compiler_problem(environ: Mapping[str, str] = os.environ) -> str | None:
    """There is no C++ compiler for mmcv. gcc alone does not compile C++."""
    compiler = shlex.split(environ.get('CXX') or 'c++')[0]
    if shutil.which(compiler, path=environ.get('PATH')):
        return None
    origin = ', which CXX names,' if environ.get('CXX') else ''
    return f'no C++ compiler to build mmcv with: {compiler}{origin} is not on the PATH: apt install g++'


def header_problem(include: str = sysconfig.get_paths()['include']) -> str | None:
    """Python's C headers are not there."""
    if (Path(include) / 'Python.h').is_file():
        return None
    package = f'python{sys.version_info[0]}.{sys.version_info[1]}-dev'
    return f'mmcv does not build without Python.h, and there is none in {include}: apt install {package}'


def space_problem(environment: Path, size: int, temporary: Path, usage=shutil.disk_usage, stat=os.stat) -> str | None:
    """Less free space than the environment, of a size in bytes, and pip's temporary files take."""
    needs = {environment: size, temporary: TEMPORARY_SIZE}
    if stat(environment).st_dev == stat(temporary).st_dev:
        needs = {environment: size + TEMPORARY_SIZE}
    for folder, need in needs.items():
        free = usage(folder).free
        if free < need:
            cure = 'free some' if folder == environment else 'free some or set TMPDIR to a folder with more'
            return f'{folder} has {free / GIGABYTE:.1f} GB of free space, {need / GIGABYTE:.1f} GB are needed: {cure}'
    return None


def torch_problem(pins: Mapping[str, list[str]], installed: Mapping[str, str]) -> str | None:
    """The environment holds a torch that is too old. It is somebody's choice, so it is not replaced."""
    (requirement,) = pins['kept']
    if 'torch' not in installed or satisfies(installed['torch'], split_requirement(requirement)[1]):
        return None
    return (
        f'torch {installed["torch"]} in {sys.prefix} is too old: pip install "{requirement}" there, '
        'or leave that environment (deactivate) and run again'
    )


def gpu_problem(torch_cuda: str | None, nvcc: str | None) -> str | None:
    """torch sees a GPU, so mmcv builds for CUDA, and there is no compiler of the right version for it.

    Args:
        torch_cuda (str, optional): the CUDA version that torch was built with; None if mmcv does not build for CUDA.
        nvcc (str, optional): the CUDA version of the toolkit; None if there is none.
    """
    if torch_cuda is None or (nvcc and nvcc.split('.')[0] == torch_cuda.split('.')[0]):
        return None
    found = f'the nvcc there is of CUDA {nvcc}' if nvcc else 'there is no nvcc'
    return (
        f'torch sees a GPU, and to build mmcv for it needs the CUDA {torch_cuda} toolkit, but {found}: install the '
        'toolkit and set CUDA_HOME to its folder, or set CUDA_VISIBLE_DEVICES= (empty) to do without the GPU'
    )


def find_problem(environment: Path, size: int) -> str | None:
    """What keeps this machine from building an environment of a size in bytes in a folder, or None."""
    return compiler_problem() or header_problem() or space_problem(environment, size, Path(tempfile.gettempdir()))


def _stop_on(problem):
    if problem:
        raise InstallError(problem)


# ---------------------------------------------------------------- what an environment holds


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the environment holds."""

    installed: dict[str, str] = dataclasses.field(default_factory=dict)  # version by distribution
    source: str | None = None  # URL of the folder that swinv2-mm is installed from, if editable
    ops: str | None = None  # why mmcv.ops can't be used, if mmcv is installed
    peers: dict[str, str] = dataclasses.field(default_factory=dict)  # version by distribution, in their folder


_SURVEY = """
import importlib.metadata as metadata, json, os, sys
report = {}
peers = {d.name: d.version for d in metadata.distributions(path=[os.path.join(sys.prefix, 'peers')])}
for name in sys.argv[1:]:
    try:
        report[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
source = metadata.distribution('swinv2-mm').read_text('direct_url.json') if 'swinv2-mm' in report else None
print('survey:', json.dumps([report, json.loads(source or '{}'), peers]), flush=True)
if 'mmcv' in report or 'onedl-mmcv' in report:
    import mmcv.ops, torch
    print('survey:', json.dumps([torch.cuda.is_available(), mmcv.ops.get_compiling_cuda_version()]))
"""


def survey(names: list[str], python: str = sys.executable) -> Survey:
    """Look into the environment of an interpreter, in a process of its own: a broken mmcv may crash it."""
    process = _python(['-c', _SURVEY, *names, 'swinv2-mm'], python)
    lines = [json.loads(line[7:]) for line in process.stdout.split('\n') if line.startswith('survey:')]
    if not lines:
        raise InstallError(f'{python} does not work ({_last_line(process.stderr)}): use a fresh environment')
    installed, source = {name: version for name, version in lines[0][0].items() if version}, lines[0][1]
    ops = None
    if len(lines) == 1 and {'mmcv', 'onedl-mmcv'} & set(installed):
        ops = _last_line(process.stderr) or f'exit code {process.returncode}'
    elif len(lines) == 2 and lines[1] == [True, 'not available']:
        ops = 'it was built without CUDA, and torch sees a GPU'
    url = source.get('url') if source.get('dir_info', {}).get('editable') else None
    return Survey(installed, url, ops, lines[0][2])


def _python(arguments, python=sys.executable):
    """Isolated (-I): the folder that we are called from does not count as installed."""
    return subprocess.run([python, '-I', *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _last_line(text):
    return text.strip().split('\n')[-1]


def build_versions(python: str = sys.executable) -> tuple[str | None, str | None]:
    """The CUDA versions of torch, None if mmcv builds without CUDA, and of nvcc: what `gpu_problem` takes."""
    code = (
        'import os, torch; from torch.utils.cpp_extension import CUDA_HOME; '
        'cuda = torch.cuda.is_available() or os.getenv("FORCE_CUDA") == "1"; '
        'print(cuda and torch.version.cuda or "", CUDA_HOME or "", sep="\\n")'
    )
    process = _python(['-c', code], python)
    if process.returncode:
        raise InstallError(f'torch does not import ({_last_line(process.stderr)}): pip install --force-reinstall torch')
    cuda, home = process.stdout.split('\n')[-3:-1]
    nvcc = Path(home, 'bin', 'nvcc')
    if not cuda or not home or not nvcc.is_file():
        return cuda or None, None
    output = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout
    release = re.search(r'release (\d+\.\d+)', output)
    return cuda, release and release.group(1)


# ---------------------------------------------------------------- installation


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of pip install."""

    title: str
    arguments: tuple[str, ...]
    compiles: bool = False


def plan(pins: Mapping[str, list[str]], stack: str, found: Survey) -> list[Step]:
    """The steps from what is there to a complete environment, in order; none if it is complete.

    mmcv needs torch and the build tools beforehand, and all need what they find in the environment, not what pip
    would put into an isolated one: there is no torch.
    """
    needed, lacking = requirements_of(pins, stack), missing(pins, stack, found.installed)
    mmcv = STACKS[stack][1]
    hosts = [name for name in (*STACKS[stack], *WITHOUT_DEPENDENCIES) if name in needed and name != mmcv]
    libraries = [name for name in needed if name not in (*BUILD_TOOLS, 'torch', mmcv, *hosts)]
    if 'opencv-python-headless' not in lacking:  # then another build of it may be the one that is there
        libraries.remove('opencv-python-headless')

    steps = []
    if any(name in lacking for name in BUILD_TOOLS):
        steps.append(Step('build tools', tuple(needed[name] for name in BUILD_TOOLS)))
    if 'torch' in lacking:
        steps.append(Step(needed['torch'], (needed['torch'],)))
    absent = [needed[name] for name in libraries if name in lacking]
    if absent:  # all of them are named, so that none moves out of its bounds
        title = ', '.join(absent) if len(absent) < 5 else f'{len(absent)} libraries'
        steps.append(Step(title, tuple(needed[name] for name in libraries)))
    absent = [needed[name] for name in hosts if name in lacking]
    if absent:
        steps.append(Step(', '.join(absent), ('--no-deps', '--no-build-isolation', *absent)))
    if mmcv in lacking:
        steps.append(build_step(needed[mmcv]))
    peers = missing_peers(pins, found)
    if peers:
        folder = str(Path(sys.prefix, 'peers'))
        title = f'{", ".join(peers)}, for tests, into {folder}'
        steps.append(Step(title, ('--no-deps', '--upgrade', '--target', folder, *peers)))
    if found.source != ROOT.as_uri():
        steps.append(Step('swinv2_mm, editable', ('--no-deps', '--no-build-isolation', '-e', str(ROOT))))
    return steps


def build_step(mmcv: str, *options: str) -> Step:
    """Compile mmcv, against the torch that is there."""
    title = f'{mmcv} with its ops: compiles for about 7 minutes on two cores, longer with CUDA'
    if '--no-cache-dir' not in options:
        title += ', unless pip has a wheel of it'
    return Step(title, ('-v', '--no-deps', '--no-build-isolation', *options, mmcv), compiles=True)


def processes_at_once(gigabytes: int) -> int:
    """How many processes that take so much memory each this machine has cores and memory for, at least one."""
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return max(1, min(len(os.sched_getaffinity(0)), memory // (gigabytes * GIGABYTE)))


def pip_environ(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables of pip and of the build of mmcv.

    CFLAGS replace Python's own, `-O3 -g` among them. Debugging symbols would make the build of mmcv take twice as long
    and its wheel 15 times as large.
    """
    jobs = processes_at_once(2)  # a compiler takes up to 2 GB
    flags = '-O2 -g0 -fwrapv -DNDEBUG'
    path = os.pathsep.join([os.path.join(sys.prefix, 'bin'), environ.get('PATH', os.defpath)])  # ninja is looked up
    ours = dict(PATH=path, PIP_DISABLE_PIP_VERSION_CHECK='1', PIP_NO_INPUT='1', PYTHONNOUSERSITE='1', MMCV_WITH_OPS='1')
    kept = {name: value for name, value in environ.items() if name != 'PYTHONPATH'}
    return {'MAX_JOBS': str(jobs), 'CFLAGS': flags, 'CXXFLAGS': flags, **kept, **ours}


def run_step(step: Step, log: Path, label: str) -> None:
    """Run pip with its output in a log file, and say what it does and how far it is.

    Raises:
        InstallError: pip failed; the end of its output has been printed.
    """
    say(f'[{label}] {step.title}')
    if step.compiles:
        _stop_on(compiler_problem() or header_problem() or gpu_problem(*build_versions()))
    command = [sys.executable, '-m', 'pip', 'install', *step.arguments]
    started, offset = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open('a') as output:
        print('$', shlex.join(command), file=output, flush=True)
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=pip_environ(),
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            try:
                process.wait(HEARTBEAT)
            except subprocess.TimeoutExpired:
                say(f'      {clock(started)}{progress(_read_from(log, offset))}')
    except BaseException:
        end_session(process)
        raise
    if process.returncode:
        text = _read_from(log, offset)
        say(*text.strip().split('\n')[-15:], sep='\n')
        raise InstallError(f'{explain(text)}; all of the output is in {log}')
    say(f'      done in {clock(started)}')


def end_session(process: subprocess.Popen) -> None:
    """End a process that leads a session, and all that it started, as compilers: as by Ctrl-C, and by force if need be.

    Interrupted, pip removes its temporary folders.
    """
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):  # the first: nobody is left
            os.killpg(process.pid, number)
            process.wait(PATIENCE)


def _read_from(log, offset):
    with log.open('rb') as file:
        file.seek(offset)
        return file.read().decode(errors='replace')


def clock(started: float) -> str:
    """Minutes and seconds since a time of `time.monotonic`."""
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return f'{minutes}:{seconds:02}'


def progress(text: str) -> str:
    """How many files have been compiled, out of the output of a build."""
    counts = re.findall(r'^\s*\[(\d+)/(\d+)]', text, re.MULTILINE)
    return ', file {} of {}'.format(*counts[-1]) if counts else ''


def explain(text: str) -> str:
    """The cause and the cure of a failure, as far as the output of pip shows them."""
    causes = {
        'No space left on device': (
            f'the disk is full: free some space, or set TMPDIR if {tempfile.gettempdir()} is the full one; with CUDA '
            f'torch takes 8 GB, so without a GPU take the small one first, in an active environment: {CPU_TORCH}'
        ),
        r'Killed signal|fatal error: Killed|Cannot allocate memory': 'out of memory: set MAX_JOBS=1 and run again',
        r'Failed to establish a new connection|Temporary failure in name resolution|Read timed out': (
            'no network: pip reaches no package index; check the connection or the proxy and run again'
        ),
        'No matching distribution found for torch': (
            f'no such torch for this machine: install another (>=2.6) into an active environment, e.g. {CPU_TORCH}'
        ),
        'from versions: none': 'pip finds no such package: check the network, the proxy and the index pip is set to',
    }
    known = (cause for pattern, cause in causes.items() if re.search(pattern, text))
    return next(known, 'pip failed for the reason above: run again once it is cured')


# ---------------------------------------------------------------- the environment


def ensure_environment(stack: str | None = None) -> None:
    """Come back in a complete environment, installing what is missing; at no cost if nothing is.

    Outside an environment this creates `.venv` and starts the running script anew in it, and it does so once more after
    an installation, since an interpreter that runs does not see what has been installed since it started. If the
    environment can't be completed, it prints a line with the cause and the cure and exits with code 2.

    Args:
        stack (str, optional): upstream or onedl. Default: the environment variable SWINV2_MM_STACK, else the stack that
            is there, else upstream.
    """
    try:
        stack = stack or os.environ.get('SWINV2_MM_STACK') or None
        if stack not in (None, *STACKS):
            raise InstallError(f'stack {stack!r} does not exist: SWINV2_MM_STACK takes {" or ".join(STACKS)}')
        environment = choose_environment(sys.prefix, sys.base_prefix, os.environ)
        if environment != Path(sys.prefix):
            create(environment)
            _start_anew(str(environment / 'bin' / 'python'))
        if complete(stack):
            _start_anew(sys.executable)
    except InstallError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as end:
        end.args = ('run again to go on',)
        raise


def _start_anew(python):
    """Replace this process by the same script under an interpreter."""
    os.execv(python, [python, *sys.argv])


def choose_environment(prefix: str, base_prefix: str, environ: Mapping[str, str]) -> Path:
    """The folder of the environment to use: the running Python's, else the active one, else `.venv`.

    conda's base is none: it holds conda itself.
    """
    if prefix != base_prefix:
        return Path(prefix)
    if environ.get('CONDA_PREFIX') == prefix and environ.get('CONDA_DEFAULT_ENV') != 'base':
        return Path(prefix)
    active = environ.get('VIRTUAL_ENV')
    if active and Path(active, 'pyvenv.cfg').is_file():
        return Path(active)
    return ROOT / '.venv'


def create(environment: Path) -> None:
    """Create a virtual environment if there is none.

    Raises:
        InstallError: that fails, or the machine lacks what it takes to fill it.
    """
    python = environment / 'bin' / 'python'
    if python.exists():
        return
    if python.is_symlink():
        raise InstallError(f'the Python of {environment} is gone: remove that folder and run again')
    _stop_on(python_problem() or venv_problem() or find_problem(environment.parent, ENVIRONMENT_SIZE))
    say(f'Creating a virtual environment in {environment}')
    process = subprocess.run([sys.executable, '-m', 'venv', str(environment)], capture_output=True, text=True)
    if process.returncode:
        reason = _last_line(process.stderr) or _last_line(process.stdout)
        raise InstallError(f'no virtual environment in {environment}: {reason}')


def complete(stack: str | None) -> bool:
    """Install what the running interpreter's environment lacks, and check what it holds.

    Returns:
        bool: whether something was installed.
    """
    started, pins = time.monotonic(), read_pins()
    names = [split_requirement(line)[0] for lines in pins.values() for line in lines] + list(OPENCV)
    found = survey(names)
    stack = settle_stack(stack, found.installed)
    steps = plan(pins, stack, found)
    if not steps and not found.ops:
        say(f'{sys.prefix} is complete: {stack} stack, checked in {clock(started)}')
        return False
    _stop_on(python_problem() or torch_problem(pins, found.installed))
    if found.ops or any(step.compiles for step in steps):
        size = ENVIRONMENT_SIZE - ('torch' in found.installed) * TORCH_SIZE
        _stop_on(find_problem(Path(sys.prefix), size))
    if 'torch' not in found.installed:
        _warn_of_cuda()
    if importlib.util.find_spec('pip') is None and _python(['-m', 'ensurepip']).returncode:
        raise InstallError(f'{sys.prefix} has no pip: install it there, or use an environment that has it')

    log = Path(sys.prefix, 'install.log')
    say(f"Installing the {stack} stack into {sys.prefix}; pip's output goes to {log}")
    for number, step in enumerate(steps, 1):
        run_step(step, log, f'{number}/{len(steps)}')
    verify(pins, stack, names, log)
    say(f'{sys.prefix} is complete: {stack} stack, installed in {clock(started)}')
    return True


def _warn_of_cuda():
    free = shutil.disk_usage(sys.prefix).free
    if free < CUDA_SIZE + ENVIRONMENT_SIZE:
        say(
            f'Note: {free / GIGABYTE:.0f} GB are free; a torch with CUDA, if pip takes that, needs 8 of them. '
            f'Without a GPU, in an active environment: {CPU_TORCH}'
        )


def verify(pins: Mapping[str, list[str]], stack: str, names: list[str], log: Path) -> None:
    """Check that everything is there and imports; an mmcv from pip's cache that does not fit is compiled once more.

    Raises:
        InstallError: something still does not.
    """
    mmcv = STACKS[stack][1]
    found = survey(names)
    if found.ops:
        say(f'mmcv.ops does not work: {found.ops}')
        run_step(build_step(requirements_of(pins, stack)[mmcv], '--no-cache-dir', '--force-reinstall'), log, 'again')
        found = survey(names)
    if found.ops:
        raise InstallError(f'mmcv.ops still does not work: {found.ops}: use a fresh environment; see {log}')
    lacking = [(name, found.installed) for name in missing(pins, stack, found.installed)]
    lacking += [(split_requirement(line)[0], found.peers) for line in missing_peers(pins, found)]
    if lacking:
        versions = ', '.join(f'{name} {versions.get(name, "(none)")}' for name, versions in lacking)
        raise InstallError(f'pip left {versions} in {sys.prefix}: use a fresh environment; see {log}')
    if found.source != ROOT.as_uri():
        raise InstallError(f'{sys.prefix} holds swinv2_mm of {found.source}, not of {ROOT}: use a fresh environment')
    say('Importing mmdet and mmseg')
    modules = 'mmengine, mmcv, mmdet, mmseg'
    imports = f'import mmdet.datasets, mmdet.models, mmseg.models, swinv2_mm, {modules}; '
    code = f'{imports}print(*(m.__version__ for m in ({modules})))'
    process = _python(['-c', code])
    if process.returncode:
        raise InstallError(f'{_last_line(process.stderr)}: {sys.prefix} is broken, use a fresh environment')
    pinned = ' '.join(requirements_of(pins, stack)[name].partition('==')[2] for name in STACKS[stack])
    if _last_line(process.stdout) != pinned:
        raise InstallError(
            f'{modules} import as {_last_line(process.stdout)}, not {pinned}: another distribution covers them, '
            'use a fresh environment'
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0],
        epilog='The environment variable SWINV2_MM_STACK=onedl does what --stack onedl does, for every tool of this '
        'folder that installs. Example, both stacks side by side: python3 tools/install.py && '
        'python3 -m venv .venv-onedl && . .venv-onedl/bin/activate && python3 tools/install.py --stack onedl',
    )
    parser.add_argument('--stack', choices=tuple(STACKS), help='upstream (the default) or the OneDL forks of OpenMMLab')
    ensure_environment(parser.parse_args().stack)
    if 'VIRTUAL_ENV' not in os.environ:
        say(f'To use it: . {os.path.relpath(sys.prefix)}/bin/activate')


if __name__ == '__main__':
    ending.run(main)
