import ast
import dataclasses
import email
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
import venv
from pathlib import Path

import pytest

import swinv2_mm

ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools' / 'install.py'
SPEC = importlib.util.spec_from_file_location('install', TOOL)
install = importlib.util.module_from_spec(SPEC)
sys.modules['install'] = install  # where dataclasses look it up
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(TOOL.parent)
    SPEC.loader.exec_module(install)

PINS = install.read_pins()
NAMES = [install.split_requirement(line)[0] for lines in PINS.values() for line in lines]
UPSTREAM = {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0', 'mmsegmentation': '1.2.2'}
PEERS = dict(line.split('==') for line in PINS['peers'])
ONEDL = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
}


@pytest.fixture(scope='module')
def here():
    return install.survey([*NAMES, *install.OPENCV])


@pytest.fixture
def complete_environment(here):
    """Tests that install nothing because nothing is missing."""
    if here.source != ROOT.as_uri():
        pytest.skip('this environment does not come from tools/install.py')


def whole(stack):
    """Versions by distribution of an environment that lacks nothing: the lowest that are allowed."""
    lines = install.requirements_of(PINS, stack).items()
    return {name: install.split_requirement(line)[1].split(',')[0].strip('=><') or '1' for name, line in lines}


@pytest.fixture
def fake_environment(tmp_path):
    """Create an environment that holds nothing but distributions and modules made up here. Returns its Python."""

    def create(versions, modules):
        venv.create(tmp_path / 'env', with_pip=False)
        packages = next((tmp_path / 'env').glob('lib/python*/site-packages'))
        for name, version in versions.items():
            info = packages / f'{name}-{version}.dist-info'
            info.mkdir()
            (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
        for path, source in modules.items():
            (packages / path).parent.mkdir(parents=True, exist_ok=True)
            (packages / path).write_text(source)
        return str(tmp_path / 'env' / 'bin' / 'python')

    return create


# ---------------------------------------------------------------- the tool itself


def test_the_installer_parses_on_python_3_10_and_imports_the_standard_library_alone():
    for tool in (TOOL, TOOL.with_name('ending.py')):
        tree = ast.parse(tool.read_text(), feature_version=(3, 10))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split('.')[0] for name in imported} <= {'ending', *sys.stdlib_module_names}


# ---------------------------------------------------------------- versions


def test_the_pins_are_those_of_the_two_stacks():
    for stack, versions in (('upstream', UPSTREAM), ('onedl', ONEDL)):
        needed = install.requirements_of(PINS, stack)
        assert {name: needed[name] for name in install.STACKS[stack]} == {n: f'{n}=={v}' for n, v in versions.items()}
    assert not set(install.requirements_of(PINS, 'upstream')) & set(ONEDL)
    assert not set(install.requirements_of(PINS, 'onedl')) & set(UPSTREAM)


def test_every_dependency_is_bounded_and_appears_once():
    lines = [line for extra, lines in PINS.items() if extra != 'kept' for line in lines]
    lines = [line for line in lines if not line.startswith('swinv2-mm[')]
    names = [install.split_requirement(line)[0] for line in lines]
    assert sorted(names) == sorted(set(names))
    assert all(install.split_requirement(line)[1] for line in lines)


def test_this_environment_holds_what_is_pinned(here):
    stack = install.settle_stack(None, here.installed)
    assert install.missing(PINS, stack, here.installed) == []
    assert install.missing_peers(PINS, here) == []
    assert here.ops is None
    modules = ('mmengine', 'mmcv', 'mmdet', 'mmseg')
    imported = [importlib.import_module(module).__version__ for module in modules]
    pinned = [install.requirements_of(PINS, stack)[name].partition('==')[2] for name in install.STACKS[stack]]
    assert imported == pinned


@pytest.mark.parametrize(
    ('version', 'specifier', 'expected'),
    [
        ('2.13.0+cpu', '==2.13.0', True),
        ('2.13', '==2.13.0', True),
        ('2.13.1', '==2.13.0', False),
        ('2.6.0+cu124', '>=2.6', True),
        ('2.10.0', '>=2.6', True),
        ('2.5.1', '>=2.6', False),
        ('3.0.0', '>=2,<3', False),
        ('2.4.6', '>=2,<3', True),
        ('1.26.4', '>=2,<3', False),
        ('4.14.0.94', '>=4.10,<5', True),
        ('82.0', '>=77,<81', False),
        ('3.0', '', True),
    ],
)
def test_versions_are_compared_as_numbers(version, specifier, expected):
    assert install.satisfies(version, specifier) is expected


@pytest.mark.parametrize('stack', install.STACKS)
def test_nothing_is_missing_from_a_whole_environment_and_what_is_wrong_is_named(stack):
    installed = whole(stack)
    assert install.missing(PINS, stack, installed) == []
    host = install.STACKS[stack][2]
    wrong = {**installed, host: '3.2.0', 'numpy': '1.26.4', 'torch': '2.6.0'}
    del wrong['ftfy']
    assert sorted(install.missing(PINS, stack, wrong)) == sorted([host, 'numpy', 'ftfy'])


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize(('stack', 'hosts'), [('upstream', UPSTREAM), ('onedl', ONEDL)])
def test_an_empty_environment_gets_everything_once_and_in_order(stack, hosts):
    steps = install.plan(PINS, stack, install.Survey())
    everything = [argument for step in steps for argument in step.arguments if not argument.startswith('-')]
    needed = [*install.requirements_of(PINS, stack).values(), *PINS['peers'], str(ROOT), f'{sys.prefix}/peers']
    assert sorted(everything) == sorted(needed)

    mmcv = f'{list(hosts)[1]}=={list(hosts.values())[1]}'
    assert [step.compiles for step in steps] == [False, False, False, False, True, False, False]
    assert steps[2].title == f'{len(steps[2].arguments)} libraries'
    assert steps[0].arguments[0] == 'setuptools>=77,<81'
    assert steps[1].arguments == ('torch==2.13.0',)
    assert steps[4].arguments[-1] == mmcv
    assert {'--no-deps', '--no-build-isolation'} <= set(steps[4].arguments)
    also = {'imaug>=0.4.3'} if stack == 'onedl' else set()  # asks for opencv-python, as the hosts do
    assert set(steps[3].arguments) == {'--no-deps', '--no-build-isolation'} | also | {
        f'{name}=={version}' for name, version in hosts.items() if name != list(hosts)[1]
    }
    assert steps[5].arguments == ('--no-deps', '--upgrade', '--target', f'{sys.prefix}/peers', *PINS['peers'])
    assert steps[6].arguments[-2:] == ('-e', str(ROOT))


def test_a_torch_that_is_there_is_kept_and_so_is_another_build_of_opencv():
    installed = {'torch': '2.9.1+cu128', 'opencv-python': '4.11.0.86'}
    arguments = [
        argument for step in install.plan(PINS, 'upstream', install.Survey(installed)) for argument in step.arguments
    ]
    assert not any(argument.startswith(('torch>', 'torch=', 'opencv')) for argument in arguments)
    assert 'numpy>=2,<3' in arguments


def test_a_complete_environment_needs_no_step_and_one_of_another_checkout_only_ours():
    installed = {**whole('upstream'), 'swinv2-mm': '0.1.0'}
    assert install.plan(PINS, 'upstream', install.Survey(installed, ROOT.as_uri(), peers=PEERS)) == []
    (step,) = install.plan(PINS, 'upstream', install.Survey(installed, 'file:///elsewhere', peers=PEERS))
    assert step.arguments == ('--no-deps', '--no-build-isolation', '-e', str(ROOT))


def test_of_the_libraries_that_tests_compare_with_only_what_is_missing_goes_into_their_folder():
    installed = {**whole('upstream'), 'swinv2-mm': '0.1.0'}
    found = install.Survey(installed, ROOT.as_uri(), peers={**PEERS, 'timm': '0.9.0'})
    (step,) = install.plan(PINS, 'upstream', found)
    assert step.arguments == ('--no-deps', '--upgrade', '--target', f'{sys.prefix}/peers', f'timm=={PEERS["timm"]}')


def test_a_library_that_is_missing_is_named_and_the_others_keep_their_bounds():
    installed = {**whole('upstream'), 'six': '1.0', 'swinv2-mm': '0.1.0'}
    (step,) = install.plan(PINS, 'upstream', install.Survey(installed, ROOT.as_uri(), peers=PEERS))
    assert step.title == 'six>=1.16'
    assert {'six>=1.16', 'numpy>=2,<3', 'ruff==0.17.6'} <= set(step.arguments)


def test_pip_finds_the_ninja_of_the_environment_and_not_the_packages_of_the_user():
    environ = install.pip_environ({'PATH': '/bin', 'PYTHONPATH': '/somewhere', 'MAX_JOBS': '7', 'LANG': 'C'})
    assert environ['PATH'] == f'{sys.prefix}/bin:/bin'
    assert 'PYTHONPATH' not in environ
    assert (environ['MAX_JOBS'], environ['LANG'], environ['MMCV_WITH_OPS']) == ('7', 'C', '1')
    assert '-O2' in environ['CFLAGS'].split() and '-g0' in environ['CXXFLAGS'].split()
    assert 1 <= int(install.pip_environ({})['MAX_JOBS']) <= os.cpu_count()


# ---------------------------------------------------------------- the stack


@pytest.mark.parametrize(
    ('wish', 'installed', 'expected'),
    [
        (None, {}, 'upstream'),
        ('onedl', {}, 'onedl'),
        (None, UPSTREAM, 'upstream'),
        (None, ONEDL, 'onedl'),
        ('onedl', ONEDL, 'onedl'),
        (None, {'onedl-mmcv': '2.3.6'}, 'onedl'),
    ],
)
def test_the_stack_is_the_one_asked_for_or_the_one_that_is_there(wish, installed, expected):
    assert install.settle_stack(wish, installed) == expected


@pytest.mark.parametrize(
    ('wish', 'installed', 'named'),
    [
        ('onedl', UPSTREAM, 'mmengine 0.10.7'),
        ('upstream', ONEDL, 'onedl-mmengine 0.10.12'),
        ('upstream', {'onedl-mmcv': '2.3.6'}, 'onedl-mmcv 2.3.6'),
        (None, {**UPSTREAM, **ONEDL}, 'onedl-mmengine 0.10.12'),
    ],
)
def test_a_stack_is_not_put_beside_the_other(wish, installed, named):
    with pytest.raises(install.InstallError) as caught:
        install.settle_stack(wish, installed)
    stack = wish or 'upstream'
    assert named in str(caught.value)
    assert f'python3 -m venv .venv-{stack} && . .venv-{stack}/bin/activate' in str(caught.value)


# ---------------------------------------------------------------- what can be wrong


def executable(path, text='#!/bin/sh\n'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_cpp_compiler_is_asked_for_and_gcc_is_none(tmp_path):
    executable(tmp_path / 'gcc')
    environ = {'PATH': str(tmp_path)}
    assert install.compiler_problem(environ) == (
        'no C++ compiler to build mmcv with: c++ is not on the PATH: apt install g++'
    )
    assert 'clang++, which CXX names,' in install.compiler_problem({**environ, 'CXX': 'clang++ -m64'})
    executable(tmp_path / 'c++')
    assert install.compiler_problem(environ) is None
    executable(tmp_path / 'clang++')
    assert install.compiler_problem({**environ, 'CXX': 'clang++ -m64'}) is None


def test_the_headers_of_python_are_asked_for(tmp_path):
    package = f'python3.{sys.version_info[1]}-dev'
    problem = install.header_problem(str(tmp_path))
    assert problem == f'mmcv does not build without Python.h, and there is none in {tmp_path}: apt install {package}'
    (tmp_path / 'Python.h').touch()
    assert install.header_problem(str(tmp_path)) is None


def test_free_space_is_asked_for_where_it_is_needed():
    environment, temporary = Path('/work'), Path('/tmp')
    device = {environment: 1, temporary: 2}

    def problem(free, free_temporary):
        usage = {environment: types.SimpleNamespace(free=free * 10**9)}
        usage[temporary] = types.SimpleNamespace(free=free_temporary * 10**9)
        stat = {path: types.SimpleNamespace(st_dev=number) for path, number in device.items()}
        return install.space_problem(environment, 2 * 10**9, temporary, usage.get, stat.get)

    assert problem(2, 1) is None
    assert problem(1.9, 1) == '/work has 1.9 GB of free space, 2.0 GB are needed: free some'
    assert problem(2, 0.4) == (
        '/tmp has 0.4 GB of free space, 1.0 GB are needed: free some or set TMPDIR to a folder with more'
    )
    device[temporary] = 1
    assert problem(2.5, 2.5) == '/work has 2.5 GB of free space, 3.0 GB are needed: free some'


@pytest.mark.parametrize('version', [(3, 9), (3, 13)])
def test_a_python_that_is_not_supported_is_told_which_are(version, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['tools/demo.py'])
    monkeypatch.setenv('PATH', str(tmp_path))
    number = f'3.{version[1]}'
    assert install.python_problem(version) == (
        f'Python {number} is not supported, 3.10, 3.11 and 3.12 are: install one of these, e.g. with pyenv, uv or '
        'conda, and run that'
    )
    executable(tmp_path / 'python3.11')
    executable(tmp_path / 'python3.12', '#!/bin/sh\nexit 1\n')  # pyenv's stand-in for one that is not selected
    assert install.python_problem(version).endswith('are: run python3.11 tools/demo.py')
    assert [install.python_problem((3, minor)) for minor in (10, 11, 12)] == [None] * 3


def test_a_python_without_ensurepip_is_told_the_package(monkeypatch):
    assert install.venv_problem() is None
    monkeypatch.setattr(install.importlib.util, 'find_spec', lambda name: None if name == 'ensurepip' else name)
    assert install.venv_problem() == (
        f'this Python cannot create a virtual environment: apt install python3.{sys.version_info[1]}-venv'
    )


def test_an_old_torch_is_not_replaced():
    assert install.torch_problem(PINS, {}) is None
    assert install.torch_problem(PINS, {'torch': '2.6.0+cu124'}) is None
    problem = install.torch_problem(PINS, {'torch': '2.5.1'})
    assert problem.startswith(f'torch 2.5.1 in {sys.prefix} is too old: pip install "torch>=2.6"')


def test_a_gpu_needs_an_nvcc_of_the_cuda_of_torch():
    assert install.gpu_problem(None, None) is None
    assert install.gpu_problem('13.0', '13.1') is None
    assert 'needs the CUDA 13.0 toolkit, but there is no nvcc: ' in install.gpu_problem('13.0', None)
    assert 'but the nvcc there is of CUDA 12.4: ' in install.gpu_problem('13.0', '12.4')
    assert 'CUDA_VISIBLE_DEVICES= ' in install.gpu_problem('13.0', None)


FAKE_TORCH = {
    'torch/__init__.py': "class version: cuda = '13.0'\nclass cuda: is_available = staticmethod(lambda: {gpu})\n",
    'torch/utils/cpp_extension.py': 'CUDA_HOME = {home!r}\n',
}


@pytest.mark.parametrize(
    ('gpu', 'nvcc', 'expected'),
    [(False, '12.4', (None, None)), (True, '12.4', ('13.0', '12.4')), (True, None, ('13.0', None))],
)
def test_the_versions_of_torch_and_nvcc_are_read(gpu, nvcc, expected, tmp_path, fake_environment, monkeypatch):
    monkeypatch.delenv('FORCE_CUDA', raising=False)
    if nvcc:
        executable(tmp_path / 'cuda' / 'bin' / 'nvcc', f'#!/bin/sh\necho Cuda compilation tools, release {nvcc}, V1\n')
    modules = {name: text.format(gpu=gpu, home=str(tmp_path / 'cuda')) for name, text in FAKE_TORCH.items()}
    assert install.build_versions(fake_environment({}, modules)) == expected


def run_in_copy(folder, *arguments, **environ):
    """Run a copy of the installer, outside any virtual environment."""
    (folder / 'tools').mkdir()
    for name in ('install.py', 'ending.py'):
        shutil.copy(TOOL.parent / name, folder / 'tools')
    shutil.copy(ROOT / 'setup.cfg', folder)
    command = [sys._base_executable, str(folder / 'tools' / 'install.py'), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, stdin=subprocess.DEVNULL)


def test_a_machine_without_compiler_gets_one_line_and_no_half_environment(tmp_path):
    process = run_in_copy(tmp_path, PATH=str(tmp_path))
    assert process.returncode == 2
    assert process.stderr == 'error: no C++ compiler to build mmcv with: c++ is not on the PATH: apt install g++\n'
    assert not (tmp_path / '.venv').exists()


def test_a_stack_that_does_not_exist_is_refused_from_the_flag_and_from_the_environment_variable(tmp_path):
    process = run_in_copy(tmp_path, PATH='/bin', SWINV2_MM_STACK='openmmlab')
    assert process.returncode == 2
    assert process.stderr.count('\n') == 1
    assert "stack 'openmmlab' does not exist: SWINV2_MM_STACK takes upstream or onedl" in process.stderr
    assert subprocess.run([sys.executable, TOOL, '--stack', 'openmmlab'], capture_output=True).returncode == 2


def test_an_environment_whose_python_is_gone_is_named(tmp_path):
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').symlink_to(tmp_path / 'gone')
    with pytest.raises(install.InstallError, match=f'the Python of {tmp_path} is gone: remove that folder'):
        install.create(tmp_path)


# ---------------------------------------------------------------- what is there


def test_an_mmcv_without_ops_is_found_out(fake_environment):
    python = fake_environment({'mmcv': '2.1.0'}, {'mmcv/__init__.py': ''})
    found = install.survey(['mmcv', 'torch'], python)
    assert found == install.Survey({'mmcv': '2.1.0'}, None, "ModuleNotFoundError: No module named 'mmcv.ops'")


def test_an_mmcv_that_crashes_is_found_out(fake_environment):
    python = fake_environment({'mmcv': '2.1.0'}, {'mmcv/__init__.py': 'import os; os.abort()'})
    assert install.survey(['mmcv'], python).ops == 'exit code -6'


@pytest.mark.parametrize(
    ('gpu', 'ops_cuda', 'expected'),
    [
        (True, 'not available', 'it was built without CUDA, and torch sees a GPU'),
        (True, '13.0', None),
        (False, 'not available', None),
    ],
)
def test_an_mmcv_without_cuda_beside_a_gpu_is_found_out(gpu, ops_cuda, expected, fake_environment):
    modules = {
        'mmcv/ops.py': f'get_compiling_cuda_version = lambda: {ops_cuda!r}',
        'torch/__init__.py': FAKE_TORCH['torch/__init__.py'].format(gpu=gpu),
    }
    assert install.survey(['mmcv'], fake_environment({'mmcv': '2.1.0'}, modules)).ops == expected


def test_the_folder_that_swinv2_mm_comes_from_is_read(fake_environment):
    python = fake_environment({'swinv2_mm': '0.1.0'}, {})
    info = next(Path(python).parents[1].glob('lib/python*/site-packages/swinv2_mm-*'))
    assert install.survey([], python).source is None
    for editable, expected in ((True, ROOT.as_uri()), (False, None)):
        origin = {'url': ROOT.as_uri(), 'dir_info': {'editable': True} if editable else {}}
        (info / 'direct_url.json').write_text(json.dumps(origin))
        assert install.survey([], python) == install.Survey({'swinv2-mm': '0.1.0'}, expected)


# ---------------------------------------------------------------- running it


def test_the_environment_is_the_running_one_the_active_one_or_our_own(tmp_path):
    (tmp_path / 'pyvenv.cfg').touch()
    active = {'VIRTUAL_ENV': str(tmp_path)}
    assert install.choose_environment('/env', '/usr', active) == Path('/env')
    assert install.choose_environment('/usr', '/usr', active) == tmp_path
    assert install.choose_environment('/usr', '/usr', {'VIRTUAL_ENV': '/removed'}) == ROOT / '.venv'
    assert install.choose_environment('/usr', '/usr', {}) == ROOT / '.venv'
    conda = {'CONDA_PREFIX': '/conda/envs/mm', 'CONDA_DEFAULT_ENV': 'mm'}
    assert install.choose_environment('/conda/envs/mm', '/conda/envs/mm', conda) == Path('/conda/envs/mm')
    base = {'CONDA_PREFIX': '/conda', 'CONDA_DEFAULT_ENV': 'base'}
    assert install.choose_environment('/conda', '/conda', base) == ROOT / '.venv'


def test_outside_an_environment_the_script_starts_anew_in_it(tmp_path, monkeypatch):
    python = executable(tmp_path / '.venv' / 'bin' / 'python')
    monkeypatch.setattr(install, 'ROOT', tmp_path)
    monkeypatch.setattr(sys, 'prefix', sys.base_prefix)
    monkeypatch.setattr(sys, 'argv', ['tools/demo.py', '--seed', '3'])
    monkeypatch.delenv('VIRTUAL_ENV', raising=False)
    monkeypatch.delenv('CONDA_PREFIX', raising=False)
    monkeypatch.delenv('SWINV2_MM_STACK', raising=False)

    def execv(path, arguments):
        raise InterruptedError(path, arguments)

    monkeypatch.setattr(os, 'execv', execv)
    with pytest.raises(InterruptedError) as caught:
        install.ensure_environment()
    assert caught.value.args == (str(python), [str(python), 'tools/demo.py', '--seed', '3'])


@pytest.fixture
def execv(monkeypatch):
    """The calls that would replace this process."""
    calls = []
    monkeypatch.setattr(os, 'execv', lambda *args: calls.append(args))
    return calls


@pytest.mark.parametrize('has_installed', [False, True])
def test_what_has_been_installed_is_used_by_an_interpreter_started_after_it(monkeypatch, execv, has_installed):
    monkeypatch.setattr(sys, 'argv', ['tools/demo.py', '--seed', '3'])
    monkeypatch.setattr(install, 'choose_environment', lambda *_: Path(sys.prefix))
    monkeypatch.setattr(install, 'complete', lambda _: has_installed)
    install.ensure_environment()
    assert execv == [(sys.executable, [sys.executable, 'tools/demo.py', '--seed', '3'])] * has_installed


@pytest.mark.parametrize('lacks', [[], [install.Step('six', ('six',))]])
def test_completing_an_environment_says_whether_it_installed(monkeypatch, tmp_path, lacks):
    steps = []
    monkeypatch.setattr(install, 'survey', lambda names: WHOLE)
    monkeypatch.setattr(install, 'plan', lambda *_: lacks)
    monkeypatch.setattr(install, 'run_step', lambda step, *_: steps.append(step))
    monkeypatch.setattr(install, 'verify', lambda *_: None)
    assert install.complete('upstream') == bool(lacks)
    assert steps == lacks


def test_ci_begins_as_a_user_does_whatever_environment_is_active(tmp_path):
    (tmp_path / '.ci').mkdir()
    shutil.copy(ROOT / '.ci' / 'run', tmp_path / '.ci')
    record = 'import os, sys; print(os.path.basename(sys.argv[0]), *sys.argv[1:], sys.prefix == sys.base_prefix, '
    record += 'os.environ.get("VIRTUAL_ENV"), flush=True)\n'
    for tool in ('demo', 'run_tests', 'test_versions'):
        (tmp_path / 'tools').mkdir(exist_ok=True)
        (tmp_path / 'tools' / f'{tool}.py').write_text(record)
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


def test_a_complete_environment_costs_one_look_and_no_pip(complete_environment, monkeypatch, capsys):
    commands = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, 'run', lambda command, **kwargs: commands.append(command) or run(command, **kwargs))
    monkeypatch.setattr(install, 'run_step', None)
    monkeypatch.delenv('SWINV2_MM_STACK', raising=False)
    install.ensure_environment()
    assert [command[:3] for command in commands] == [[sys.executable, '-I', '-c']]
    assert capsys.readouterr().out.startswith(f'{sys.prefix} is complete: ')


def test_the_other_stack_is_refused_in_this_environment(here):
    other = {'upstream': 'onedl', 'onedl': 'upstream'}[install.settle_stack(None, here.installed)]
    process = subprocess.run([sys.executable, TOOL, '--stack', other], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, '')
    assert process.stderr.count('\n') == 1
    assert f'python3 -m venv .venv-{other}' in process.stderr


def test_a_failed_step_shows_the_end_of_the_output_and_names_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.delenv('PIP_FIND_LINKS', raising=False)
    log = tmp_path / 'install.log'
    log.write_text('No space left on device, in an earlier step\n')
    step = install.Step('nothing', (str(tmp_path / 'nowhere'),))
    with pytest.raises(install.InstallError) as caught:
        install.run_step(step, log, '1/1')
    assert (
        str(caught.value)
        == f'pip failed for the reason above: run again once it is cured; all of the output is in {log}'
    )
    output = capsys.readouterr().out
    assert output.startswith('[1/1] nothing\n')
    assert f"Invalid requirement: '{tmp_path}/nowhere'" in output
    assert 'earlier step' not in output
    assert f'-m pip install {tmp_path}/nowhere' in log.read_text()


def test_a_long_step_gives_signs_of_life(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install, 'HEARTBEAT', 0.02)
    log = tmp_path / 'install.log'
    log.write_text('[7/9] a file of an earlier step\n')
    install.run_step(install.Step('help', ('--help',)), log, '2/3')
    first, *between, last = capsys.readouterr().out.split('\n')[:-1]
    assert first == '[2/3] help'
    assert set(between) <= {'      0:00', '      0:01', '      0:02', '      0:03'} and between
    assert last.startswith('      done in 0:0')


def test_progress_counts_the_compiled_files():
    assert (
        install.progress('  [1/114] c++ -c a.cpp\n  warning: [0/3] is odd\n  [2/114] c++ -c b.cpp\n  x')
        == ', file 2 of 114'
    )
    assert install.progress('Collecting mmcv') == ''


@pytest.mark.parametrize(
    ('output', 'cure'),
    [
        ('ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device', 'TMPDIR'),
        ('g++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('[Errno -3] Temporary failure in name resolution', 'no network'),
        ('(from versions: none)\nERROR: No matching distribution found for torch==2.13.0', 'install another (>=2.6)'),
        ('(from versions: none)\nERROR: No matching distribution found for six>=1.16', 'check the network'),
        ('anything else', 'the reason above'),
    ],
)
def test_the_cause_of_a_failure_comes_with_its_cure(output, cure):
    assert cure in install.explain(f'Collecting torch\n{output}\n')


@pytest.fixture
def verify(monkeypatch, tmp_path):
    """Verify an environment that is made up: what is found time after time, and what the hosts import as."""

    def verify(states, imported='0.10.7 2.1.0 3.3.0 1.2.2', error=''):
        states, steps = list(states), []
        process = types.SimpleNamespace(
            returncode=int(bool(error)), stdout=f'{imported}\n', stderr=f'Traceback\n{error}\n'
        )
        monkeypatch.setattr(install, 'survey', lambda names: states.pop(0))
        monkeypatch.setattr(install, 'run_step', lambda step, *_: steps.append(step))
        monkeypatch.setattr(install, '_python', lambda arguments: process)
        install.verify(PINS, 'upstream', NAMES, tmp_path)
        return steps

    return verify


WHOLE = install.Survey(whole('upstream'), ROOT.as_uri(), peers=PEERS)
BROKEN = dataclasses.replace(WHOLE, ops="ModuleNotFoundError: No module named 'mmcv._ext'")


def test_an_mmcv_that_does_not_fit_is_compiled_once_more_without_the_cache(verify):
    assert verify([WHOLE]) == []
    (step,) = verify([BROKEN, WHOLE])
    assert step.compiles
    assert {'--no-cache-dir', '--force-reinstall', '--no-build-isolation', 'mmcv==2.1.0'} <= set(step.arguments)
    with pytest.raises(install.InstallError, match=r"mmcv.ops still does not work: .* 'mmcv._ext': use a fresh "):
        verify([BROKEN, BROKEN])


def test_what_pip_left_wrong_is_named(verify):
    versions = {**whole('upstream'), 'numpy': '1.26.4'}
    with pytest.raises(install.InstallError, match=r'pip left numpy 1.26.4 in '):
        verify([dataclasses.replace(WHOLE, installed=versions)])
    with pytest.raises(install.InstallError, match=r'pip left timm 0.9.0 in '):
        verify([dataclasses.replace(WHOLE, peers={**PEERS, 'timm': '0.9.0'})])
    with pytest.raises(install.InstallError, match=r'holds swinv2_mm of None, not of '):
        verify([dataclasses.replace(WHOLE, source=None)])
    with pytest.raises(install.InstallError, match=r"No module named 'ftfy': .* is broken"):
        verify([WHOLE], error="ModuleNotFoundError: No module named 'ftfy'")
    with pytest.raises(
        install.InstallError, match=r'import as 0.10.7 2.2.0 3.3.0 1.2.2, not 0.10.7 2.1.0 3.3.0 1.2.2: '
    ):
        verify([WHOLE], imported='0.10.7 2.2.0 3.3.0 1.2.2')


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
