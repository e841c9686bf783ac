"""The tool that makes an environment. A pip that only writes down what it installs stands in for the real one."""

import ast
import configparser
import email
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import swinv2_mm

ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools' / 'install.py'
LIBRARIES = ('__init__.py', 'ending.py', 'machine.py')  # of tools/swinv2_tools, which the tool imports
UPSTREAM = {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0', 'mmsegmentation': '1.2.2'}
ONEDL = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
}
CONFIG = configparser.ConfigParser(interpolation=None)
CONFIG.read(ROOT / 'setup.cfg')
PINS = {
    extra: [Requirement(line) for line in lines.strip().split('\n')]
    for extra, lines in CONFIG['options.extras_require'].items()
}
PEERS = sorted(map(str, PINS['peers']))


@pytest.fixture(scope='module')
def install(load_tool):
    return load_tool('install')


@pytest.fixture(scope='module')
def machine(load_tool):
    return load_tool('machine')


@pytest.fixture
def complete_environment():
    """Tests that install nothing because nothing is missing."""
    origin = importlib.metadata.distribution('swinv2-mm').read_text('direct_url.json')
    if json.loads(origin or '{}').get('url') != ROOT.as_uri():
        pytest.skip('this environment does not come from tools/install.py')


# ---------------------------------------------------------------- an environment, as far as the tool sees one

PIP = r"""
import json, os, pathlib, shutil, sys, sysconfig
from pip._vendor.packaging.requirements import Requirement

arguments = sys.argv[2:]
with open(os.path.join(sys.prefix, 'calls'), 'a') as file:
    print(json.dumps(arguments), file=file)
with open(arguments[arguments.index('--log') + 1], 'a') as log:
    print('a line of the log', file=log)
    if os.environ.get('FAIL') and any(argument.startswith(os.environ.get('FAIL_AT', '')) for argument in arguments):
        sys.exit(print(os.environ['FAIL'], file=log) or 1)
site = pathlib.Path(sysconfig.get_path('purelib'))
folder = site if '--target' not in arguments else pathlib.Path(arguments[arguments.index('--target') + 1])

def write(name, version, **files):
    info = folder / f'{name}-{version}.dist-info'
    info.mkdir(parents=True, exist_ok=True)
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    for file, text in files.items():
        (info / f'{file}.json').write_text(text)

for argument in arguments:
    if argument.startswith(('-', '/')):
        continue
    requirement = Requirement(argument)
    name = requirement.name.replace('-', '_')
    there = [path.stem.split('-')[1] for path in folder.glob(f'{name}-*.dist-info')]
    if '--force-reinstall' not in arguments and any(map(requirement.specifier.contains, there)):
        continue
    for path in folder.glob(f'{name}-*.dist-info'):
        shutil.rmtree(path)
    if requirement.name != os.environ.get('LEAVE_OUT'):
        write(name, min(bound.version for bound in requirement.specifier if bound.operator in ('==', '>=')))
    if 'mmcv' in name:
        works = 'get_compiling_cuda_version = lambda: "not available"'
        is_fresh = '--no-cache-dir' in arguments and not os.environ.get('NEVER_WORKS')
        (site / 'mmcv/ops.py').write_text(works if is_fresh else os.environ.get('MMCV_OPS', works))
if '-e' in arguments:
    origin = {'url': pathlib.Path(arguments[-1]).as_uri(), 'dir_info': {'editable': True}}
    write('swinv2_mm', '0.1.0', direct_url=json.dumps(origin))
"""
MODULES = {
    'mmcv/__init__.py': '',
    'mmdet/datasets.py': '',
    'mmdet/models.py': '',
    'mmseg/models.py': '',
    'swinv2_mm/__init__.py': '',
    'torch/__init__.py': 'class cuda: is_available = lambda: False',
    'pip/__init__.py': '',
    'pip/_vendor/__init__.py': '',
    'pip/__main__.py': PIP,
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def executable(path):
    write(path.parent, {path.name: '#!/bin/sh\n'})
    path.chmod(0o755)


class Sandbox:
    """A copy of the tool with an empty environment in `.venv`."""

    def __init__(self, folder):
        self.root, self.environment = folder, folder / '.venv'
        copy_tool(folder)
        venv.create(self.environment, with_pip=False)
        (self.site,) = self.environment.glob('lib/python*/site-packages')
        write(self.site, MODULES)
        shutil.copytree(Path(sys.modules['packaging'].__file__).parent, self.site / 'pip/_vendor/packaging')
        executable(folder / 'bin' / 'c++')

    def run(self, *arguments, **environ):
        """Run the tool as a user does, outside the environment. Returns the process and the new calls of pip."""
        environ = {'PATH': str(self.root / 'bin'), **environ}
        calls = self.environment / 'calls'
        calls.write_text('')
        command = [sys._base_executable, str(self.root / 'tools' / 'install.py'), *arguments]
        process = subprocess.run(command, capture_output=True, text=True, env=environ, stdin=subprocess.DEVNULL)
        lines = [json.loads(line) for line in calls.read_text().splitlines()]
        log = ['--disable-pip-version-check', '--log', str(self.environment / 'install.log')]
        assert all(line[:3] == log for line in lines)
        return process, [line[3:] for line in lines]

    def install(self, folder=None, **versions):
        """Write the metadata of distributions, in place of other versions of them."""
        for name, version in versions.items():
            self.remove(name, folder)
            metadata = f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
            write(folder or self.site, {f'{name}-{version}.dist-info/METADATA': metadata})

    def remove(self, name, folder=None):
        for path in (folder or self.site).glob(f'{name}-*.dist-info'):
            shutil.rmtree(path)

    def version(self, name):
        (path,) = self.site.glob(f'{name}-*.dist-info')
        return path.stem.split('-')[1]


def copy_tool(folder):
    (folder / 'tools' / 'swinv2_tools').mkdir(parents=True)
    shutil.copy(TOOL, folder / 'tools')
    shutil.copy(ROOT / 'setup.cfg', folder)
    for name in LIBRARIES:
        shutil.copy(TOOL.parent / 'swinv2_tools' / name, folder / 'tools' / 'swinv2_tools')


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


@pytest.fixture
def complete(sandbox):
    process, _ = sandbox.run()
    assert process.returncode == 0, process.stderr
    return sandbox


def needed(stack):
    """All requirements of an empty environment but the peers."""
    hosts = UPSTREAM if stack == 'onedl' else ONEDL
    extras = ('build', 'core', 'det', 'seg', 'test', *(['onedl'] if stack == 'onedl' else []))
    return sorted(str(line) for extra in extras for line in PINS[extra] if line.name not in (*hosts, 'swinv2-mm'))


# ---------------------------------------------------------------- versions


def test_before_anything_is_installed_the_tool_imports_the_standard_library_and_pip_alone():
    for tool in (TOOL, *(TOOL.parent / 'swinv2_tools' / name for name in LIBRARIES)):
        tree = ast.parse(tool.read_text(), feature_version=(3, 8))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split('.')[0] for name in imported} <= {'swinv2_tools', 'pip', *sys.stdlib_module_names}


def test_the_pins_are_those_of_the_two_stacks():
    pinned = {line.name: str(line.specifier) for lines in PINS.values() for line in lines}
    assert {**UPSTREAM, **ONEDL}.items() <= {name: version[2:] for name, version in pinned.items()}.items()


def test_every_dependency_is_bounded_and_appears_once():
    lines = [line for extra, lines in PINS.items() if extra != 'kept' for line in lines if line.name != 'swinv2-mm']
    names = [line.name for line in lines]
    assert sorted(names) == sorted(set(names))
    assert all(line.specifier for line in lines)


def test_this_environment_holds_what_is_pinned(install, complete_environment):
    pins = install.read_pins()
    found = install.find_installed(pins)
    stack = install.settle_stack(None, found)
    assert install.plan(pins, stack, found) == {}
    modules = ('mmengine', 'mmcv', 'mmdet', 'mmseg')
    imported = [importlib.import_module(module).__version__ for module in modules]
    assert imported == [*{'upstream': UPSTREAM, 'onedl': ONEDL}[stack].values()]


# ---------------------------------------------------------------- what is installed


@pytest.mark.parametrize(('stack', 'hosts'), [('upstream', UPSTREAM), ('onedl', ONEDL)])
def test_an_empty_environment_gets_everything_once_and_in_order(sandbox, stack, hosts):
    process, calls = sandbox.run('--stack', stack)
    assert (process.returncode, process.stderr) == (0, '')
    libraries, built, peers, ours = calls

    pinned = {f'{name}=={version}' for name, version in hosts.items()}
    also = {'imaug>=0.4.3'} if stack == 'onedl' else set()  # asks for opencv-python, as the hosts do
    assert {'torch==2.13.0', 'setuptools<81,>=77', 'ninja>=1.11'} <= set(libraries)
    assert set(built) == {'--no-deps', '--no-build-isolation'} | pinned | also
    assert sorted([*libraries, *built[2:]]) == needed(stack)
    assert peers[:4] == ['--no-deps', '--upgrade', '--target', str(sandbox.environment / 'peers')]
    assert sorted(peers[4:]) == PEERS
    assert ours == ['--no-deps', '--no-build-isolation', '-e', str(sandbox.root)]

    process, calls = sandbox.run()  # which stack is there, it sees
    assert (process.returncode, calls) == (0, [])
    assert process.stdout.startswith(f'{sandbox.environment} is complete: {stack} stack\n')


def test_a_torch_that_is_there_is_kept_and_so_is_another_build_of_opencv(sandbox):
    sandbox.install(torch='2.9.1+cu128', opencv_python='4.11.0.86')
    process, calls = sandbox.run()
    assert (process.returncode, process.stderr) == (0, '')
    assert sandbox.version('torch') == '2.9.1+cu128'
    assert not any(argument.startswith('opencv') for call in calls for argument in call)
    assert sandbox.run()[1] == []


def test_only_the_steps_that_lack_something_run_and_what_is_there_keeps_its_bounds(complete):
    sandbox = complete
    sandbox.install(numpy='1.26.4')
    sandbox.remove('ftfy')
    sandbox.install(sandbox.environment / 'peers', timm='0.9.0')
    process, (libraries, peers) = sandbox.run()
    assert '[1/2] numpy<3,>=2, ftfy>=6.1\n' in process.stdout
    assert {'numpy<3,>=2', 'ftfy>=6.1', 'ruff==0.17.6', 'torch>=2.6'} <= set(libraries)
    assert peers[4:] == [line for line in PEERS if line.startswith('timm')]


@pytest.mark.parametrize(
    ('name', 'version', 'is_met'),
    [
        ('torch', '2.6.0+cu124', True),
        ('torch', '2.10.0', True),
        ('torch', '2.13.0a0+git1234', True),
        ('mmcv', '2.1', True),
        ('mmcv', '2.1.1', False),
        ('numpy', '3.0.0', False),
        ('numpy', '2.4.6', True),
        ('setuptools', '82.0', False),
    ],
)
def test_versions_are_compared_as_packaging_does(install, tmp_path, name, version, is_met):
    pins = install.read_pins()
    metadata = f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
    write(tmp_path, {f'{name}-{version}.dist-info/METADATA': metadata})
    found = install.find_installed(pins, [str(tmp_path)])
    kind = install.requirements_of(pins, 'upstream', found)
    (requirement,) = (group[name] for group in kind if name in group)
    assert install.missing([requirement], found) == ([] if is_met else [str(requirement)])


@pytest.mark.parametrize('origin', [{'url': 'file:///elsewhere', 'dir_info': {'editable': True}}, {'dir_info': {}}, {}])
def test_an_environment_of_another_checkout_gets_this_one(complete, origin):
    (path,) = complete.site.glob('swinv2_mm-*/direct_url.json')
    path.write_text(json.dumps({'url': complete.root.as_uri(), **origin} if origin else origin))
    process, calls = complete.run()
    assert calls == [['--no-deps', '--no-build-isolation', '-e', str(complete.root)]]
    assert process.returncode == 0


def test_what_is_on_the_path_of_the_user_does_not_count_as_installed(complete, tmp_path):
    complete.remove('six')
    write(tmp_path / 'user', {'six-1.17.dist-info/METADATA': 'Metadata-Version: 2.1\nName: six\nVersion: 1.17\n'})
    assert any('six>=1.16' in call for call in complete.run(PYTHONPATH=str(tmp_path / 'user'))[1])


def test_pip_finds_the_ninja_of_the_environment_and_not_the_packages_of_the_user(install, monkeypatch):
    monkeypatch.setattr(os, 'environ', {'PATH': '/bin', 'PYTHONPATH': '/somewhere', 'MAX_JOBS': '7', 'LANG': 'C'})
    environ = install.pip_environ()
    assert environ['PATH'] == f'{sys.prefix}/bin:/bin'
    assert not environ['PYTHONPATH'] and environ['PYTHONNOUSERSITE'] == '1'
    assert (environ['MAX_JOBS'], environ['LANG'], environ['MMCV_WITH_OPS']) == ('7', 'C', '1')
    assert '-O2' in environ['CFLAGS'].split() and '-g0' in environ['CXXFLAGS'].split()
    monkeypatch.setattr(os, 'environ', {})
    assert 1 <= int(install.pip_environ()['MAX_JOBS']) <= os.cpu_count()


@pytest.mark.parametrize(
    ('wish', 'installed', 'named'),
    [
        ('onedl', {'mmengine': '0.10.7', 'mmcv': '2.1.0'}, 'mmengine 0.10.7'),
        ('upstream', {'onedl_mmcv': '2.3.6'}, 'onedl-mmcv 2.3.6'),
        ('', {'mmengine': '0.10.7', 'onedl_mmcv': '2.3.6'}, 'onedl-mmcv 2.3.6'),
    ],
)
def test_a_stack_is_not_put_beside_the_other(sandbox, wish, installed, named):
    sandbox.install(**installed)
    process, calls = sandbox.run(SWINV2_MM_STACK=wish)
    stack = wish or 'upstream'
    assert (process.returncode, calls, process.stdout) == (2, [], '')
    assert process.stderr == (
        f'error: this environment holds {named}, and the {stack} stack provides the same modules: use a fresh one, '
        f'e.g. python3 -m venv .venv-{stack} && . .venv-{stack}/bin/activate\n'
    )


# ---------------------------------------------------------------- what can be wrong with the machine


def test_a_cpp_compiler_is_asked_for_and_gcc_is_none(machine, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    executable(tmp_path / 'gcc')
    cure = 'is not on the PATH: apt install g++, or set CXX to yours'
    assert machine.find_problem(tmp_path, 0) == f'mmcv needs a C++ compiler, and c++ {cure}'
    executable(tmp_path / 'c++')
    assert machine.find_problem(tmp_path, 0) is None
    monkeypatch.setenv('CXX', 'clang++ -m64')
    assert machine.find_problem(tmp_path, 0) == f'mmcv needs a C++ compiler, and clang++ {cure}'
    executable(tmp_path / 'clang++')
    assert machine.find_problem(tmp_path, 0) is None


def test_the_headers_of_python_are_asked_for(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    package = f'python3.{sys.version_info[1]}-dev'
    assert machine.find_problem(tmp_path, 0) == f'mmcv needs Python.h, and {tmp_path} has none: apt install {package}'
    (tmp_path / 'Python.h').touch()
    assert machine.find_problem(tmp_path, 0) is None


@pytest.mark.parametrize(
    ('free', 'free_temporary', 'problem'),
    [
        (2, 1, None),
        (1.9, 1, '/env has 1.9 GB of free space, 2.0 GB are needed: free some'),
        (2, 0.4, '/tmp has 0.4 GB of free space, 1.0 GB are needed: free some, or set TMPDIR to a folder with more'),
    ],
)
def test_free_space_is_asked_for_where_it_is_needed(machine, monkeypatch, free, free_temporary, problem):
    free = {Path('/env'): free * 10**9, Path('/tmp'): free_temporary * 10**9}
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: types.SimpleNamespace(free=free[folder]))
    monkeypatch.setattr(machine.tempfile, 'gettempdir', lambda: '/tmp')
    found = machine.find_problem(Path('/env'), 2)
    assert found == problem


@pytest.mark.parametrize('version', [(3, 9), (3, 13)])
def test_a_python_that_is_not_supported_is_told_which_are(machine, version, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['tools/demo.py'])
    monkeypatch.setattr(sys, 'version_info', version)
    assert machine.find_problem(tmp_path, 0) == (
        f'Python 3.{version[1]} is not supported, 3.10 to 3.12 are: leave its environment if one is active '
        '(deactivate), and run e.g. python3.12 tools/demo.py'
    )


def test_a_python_without_ensurepip_is_told_the_package(install, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(install.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='2'):
        install.create(tmp_path / '.venv')
    assert capsys.readouterr().err.endswith('cannot create a virtual environment: apt install python3-venv\n')
    assert not (tmp_path / '.venv').exists()


def test_a_machine_without_compiler_gets_one_line_and_no_half_environment(tmp_path):
    copy_tool(tmp_path)
    command = [sys._base_executable, str(tmp_path / 'tools' / 'install.py')]
    process = subprocess.run(command, capture_output=True, text=True, env={'PATH': str(tmp_path)})
    assert (process.returncode, process.stdout) == (2, '')
    assert process.stderr.startswith('error: mmcv needs a C++ compiler, and c++ is not on the PATH')
    assert process.stderr.count('\n') == 1
    assert not (tmp_path / '.venv').exists()


def test_a_machine_without_compiler_has_nothing_installed_that_mmcv_would_follow(complete):
    complete.remove('mmcv')
    complete.remove('six')
    process, calls = complete.run(PATH='')
    assert (process.returncode, calls) == (2, [])
    assert process.stderr.startswith('error: mmcv needs a C++ compiler')
    complete.install(mmcv='2.1.0')
    process, calls = complete.run(PATH='')
    assert (process.returncode, len(calls)) == (0, 1)


def test_an_old_torch_is_not_replaced(sandbox):
    sandbox.install(torch='2.5.1')
    process, calls = sandbox.run()
    assert (process.returncode, calls) == (2, [])
    assert process.stderr == (
        f'error: torch 2.5.1 in {sandbox.environment} is too old: pip install "torch>=2.6" there, or leave that '
        'environment (deactivate) and run again\n'
    )


def test_a_stack_that_does_not_exist_is_refused_from_the_flag_and_from_the_environment_variable(sandbox):
    process, _ = sandbox.run(SWINV2_MM_STACK='openmmlab')
    assert process.returncode == 2
    assert process.stderr == "error: stack 'openmmlab' does not exist: SWINV2_MM_STACK takes upstream or onedl\n"
    process, _ = sandbox.run('--stack', 'openmmlab')
    assert process.returncode == 2


# ---------------------------------------------------------------- what pip does


def test_a_failure_names_its_cure_and_the_next_run_goes_on_from_there(sandbox):
    log = sandbox.environment / 'install.log'
    made = []
    for output, cure in (
        ('OSError: [Errno 28] No space left on device', 'the disk is full: free some space, or set TMPDIR'),
        ('g++: fatal error: Killed signal terminated program cc1plus', 'out of memory: set MAX_JOBS=1 and run again'),
        ('No matching distribution found for torch==2.13.0', 'no such torch for this machine: install another >=2.6'),
        ('/cuda/bin/nvcc -c a.cu', 'pip failed for the reason above: run again once it is cured'),
    ):
        process, calls = sandbox.run(FAIL=output, FAIL_AT='mmdet')
        made += calls
        assert process.returncode == 2
        assert process.stderr.startswith(f'error: {cure}') and process.stderr.endswith(f'; see {log}\n')
        assert process.stderr.count('\n') == 1
        assert log.read_text() == f'a line of the log\n{output}\n'
    process, calls = sandbox.run()
    assert process.returncode == 0
    made += calls
    assert ['mmdet==3.3.0' in call for call in made] == [False, True, True, True, True, True, False, False]


BUILD = """
import sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = '13.0', sys.argv[1] or None
cpp_extension.library_paths('cuda')
cpp_extension._check_cuda_version('g++', torch.torch_version.TorchVersion('12'))
"""


@pytest.mark.parametrize(('release', 'is_right'), [(None, False), ('', False), ('12.4', False), ('13.1', True)])
def test_what_torch_says_of_a_gpu_without_the_right_toolkit_has_a_cure(install, tmp_path, release, is_right):
    (cure,) = (cure for cure in install.CURES.values() if 'CUDA toolkit' in cure)
    if release:
        executable(tmp_path / 'bin' / 'nvcc')
        (tmp_path / 'bin' / 'nvcc').write_text(f'#!/bin/sh\necho Cuda compilation tools, release {release}, V1\n')
    command = [sys.executable, '-c', BUILD, '' if release is None else str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    cures = [text for pattern, text in install.CURES.items() if re.search(pattern, process.stderr, re.MULTILINE)]
    assert (process.returncode, cures) == ((0, []) if is_right else (1, [cure])), process.stderr


def test_an_mmcv_that_does_not_fit_is_compiled_once_more_without_the_cache(sandbox):
    process, calls = sandbox.run(MMCV_OPS='import mmcv._ext')
    assert process.returncode == 0
    assert "mmcv.ops does not work (ModuleNotFoundError: No module named 'mmcv._ext')" in process.stdout
    again = ['--no-deps', '--no-build-isolation', '--no-cache-dir', '--force-reinstall', 'mmcv==2.1.0']
    assert calls[-1] == again and len(calls) == 5

    for broken in ('import os; os.abort()', 'raise ImportError("undefined symbol")'):
        write(sandbox.site, {'mmcv/ops.py': broken})
        process, calls = sandbox.run()
        assert (process.returncode, calls) == (0, [again])
    write(sandbox.site, {'torch/__init__.py': MODULES['torch/__init__.py'].replace('False', 'True')})
    write(sandbox.site, {'mmcv/ops.py': 'get_compiling_cuda_version = lambda: "13.0"'})
    assert sandbox.run()[1] == []
    write(sandbox.site, {'mmcv/ops.py': 'get_compiling_cuda_version = lambda: "not available"'})
    process, calls = sandbox.run()
    assert calls == [again]
    assert '(mmcv was built without CUDA, and torch sees a GPU)' in process.stdout


def test_what_does_not_work_after_all_is_named(sandbox):
    process, calls = sandbox.run(LEAVE_OUT='numpy')
    assert (process.returncode, len(calls)) == (2, 4)
    assert process.stderr.startswith(f'error: pip has run, and {sandbox.environment} still lacks numpy<3,>=2: ')
    process, calls = sandbox.run(MMCV_OPS='import mmcv._ext', NEVER_WORKS='1')
    assert (process.returncode, len(calls)) == (0, 1)  # only numpy was missing
    sandbox.remove('mmcv')
    process, calls = sandbox.run(MMCV_OPS='import mmcv._ext', NEVER_WORKS='1')
    assert (process.returncode, len(calls)) == (2, 2)
    assert process.stderr == (
        f"error: {sandbox.environment} does not work (ModuleNotFoundError: No module named 'mmcv._ext'): use a fresh "
        'environment\n'
    )
    sandbox.remove('mmcv')
    (sandbox.site / 'mmseg/models.py').write_text('import ftfy')
    process, _ = sandbox.run()
    assert process.returncode == 2
    assert "No module named 'ftfy'" in process.stderr


# ---------------------------------------------------------------- which environment


def test_the_environment_is_the_running_one_the_active_one_or_our_own(install, tmp_path, monkeypatch):
    (tmp_path / 'pyvenv.cfg').touch()

    def choose(prefix, **environ):
        monkeypatch.setattr(sys, 'prefix', prefix)
        monkeypatch.setattr(sys, 'base_prefix', '/usr' if prefix == '/env' else prefix)
        monkeypatch.setattr(os, 'environ', environ)
        return install.choose_environment()

    assert choose('/env', VIRTUAL_ENV=str(tmp_path)) == Path('/env')
    assert choose('/usr', VIRTUAL_ENV=str(tmp_path)) == tmp_path
    assert choose('/usr', VIRTUAL_ENV='/removed') == ROOT / '.venv'
    assert choose('/usr') == ROOT / '.venv'
    conda = Path('/conda/envs/mm')
    assert choose(str(conda), CONDA_PREFIX=str(conda), CONDA_DEFAULT_ENV='mm') == conda
    assert choose('/conda', CONDA_PREFIX='/conda', CONDA_DEFAULT_ENV='base') == ROOT / '.venv'


def test_a_tool_starts_again_in_the_environment_with_its_arguments(sandbox):
    tool = 'import sys\nfrom install import ensure_environment\nensure_environment()\nprint(sys.argv[1:], sys.prefix)\n'
    (sandbox.root / 'tools' / 'install.py').rename(sandbox.root / 'tools' / 'real.py')
    (sandbox.root / 'tools' / 'install.py').write_text(tool.replace('from install', 'from real'))
    for calls in (4, 0):
        process, made = sandbox.run('--seed', '3')
        assert len(made) == calls
        assert process.stdout.endswith(f"complete: upstream stack\n['--seed', '3'] {sandbox.environment}\n")


def test_a_complete_environment_costs_no_pip(install, complete_environment, monkeypatch, capsys):
    monkeypatch.setattr(install, 'pip_install', None)
    monkeypatch.delenv('SWINV2_MM_STACK', raising=False)
    install.ensure_environment()
    assert capsys.readouterr().out.startswith(f'{sys.prefix} is complete: ')


def test_ci_begins_as_a_user_does_whatever_environment_is_active(tmp_path):
    (tmp_path / '.ci').mkdir()
    shutil.copy(ROOT / '.ci' / 'run', tmp_path / '.ci')
    record = 'import os, sys; print(os.path.basename(sys.argv[0]), *sys.argv[1:], sys.prefix == sys.base_prefix, '
    record += 'os.environ.get("VIRTUAL_ENV"), flush=True)\n'
    write(tmp_path / 'tools', {f'{tool}.py': record for tool in ('demo', 'run_tests', 'misc/test_versions')})
    active = tmp_path / 'active'
    venv.create(active, with_pip=False)
    path = os.pathsep.join([str(active / 'bin'), *os.environ['PATH'].split(os.pathsep)])
    if sys.prefix != sys.base_prefix:  # neither this one
        path = path.replace(f'{Path(sys.prefix, "bin")}{os.pathsep}', '')
    env = {**os.environ, 'VIRTUAL_ENV': str(active), 'PATH': path}
    run = subprocess.run(['bash', '.ci/run'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert [line for line in run.stdout.split('\n') if not line.startswith('==')] == [
        'demo.py True None',
        'run_tests.py True None',
        'test_versions.py --python 3.8 --torch 2.0.1 True None',
        '',
    ]
    assert '.venv/bin/python' in run.stderr  # which the first of them makes
    (tmp_path / '.venv').mkdir()
    run = subprocess.run(['bash', '.ci/run'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, '')
    assert run.stderr.startswith('error: .venv exists')


def test_run_tests_passes_its_arguments_to_pytest_and_gives_its_exit_code(complete_environment, tmp_path):
    (tmp_path / 'test_folder.py').write_text('import os\ndef test_a(): assert 0\ndef test_b(): assert 0, os.getcwd()\n')
    command = [sys.executable, ROOT / 'tools' / 'run_tests.py', '--noconftest', '-k', 'test_b', tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == pytest.ExitCode.TESTS_FAILED
    assert f'AssertionError: {ROOT}\n' in process.stdout
    assert '1 failed in' in process.stdout


# ---------------------------------------------------------------- the package


def test_the_metadata_needs_no_torch_to_build_and_asks_for_nothing(tmp_path):
    for name in ('setup.cfg', 'pyproject.toml', 'LICENSE'):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'README.md').touch()
    shutil.copytree(ROOT / 'swinv2_mm', tmp_path / 'swinv2_mm', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'out').mkdir()
    build = "import sys; sys.modules['torch'] = None; from setuptools import build_meta; "
    build += "build_meta.prepare_metadata_for_build_wheel('out')"
    subprocess.run([sys.executable, '-c', build], cwd=tmp_path, check=True, capture_output=True)
    (path,) = tmp_path.glob('out/*.dist-info/METADATA')
    metadata = email.message_from_string(path.read_text())

    assert (metadata['Name'], metadata['Version']) == ('swinv2-mm', swinv2_mm.__version__)
    assert (metadata['License'] or metadata['License-Expression']) == 'Apache-2.0'
    assert metadata['Requires-Python'] == '>=3.8'
    assert set(metadata.get_all('Provides-Extra')) >= {'det', 'seg', 'test'}
    required = metadata.get_all('Requires-Dist')
    assert [line for line in required if 'extra ==' not in line] == []  # pip would install over what is there
    assert 'mmdet==3.3.0; extra == "det"' in required
    assert 'mmsegmentation==1.2.2; extra == "seg"' in required
