"""The tool that runs the tests of the package with another Python and PyTorch."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(load_tool):
    return load_tool('test_versions')


def test_every_test_that_is_named_exists(tool):
    assert all((ROOT / f'tests/test_{name}.py').is_file() for name in tool.TESTS.split())


@pytest.mark.parametrize(
    'torch, ceilings',
    [
        ('2.0.1', {'numpy<2', 'transformers<4.47', 'transformers<5'}),
        ('2.2.2', {'numpy<2', 'transformers<4.47', 'transformers<5'}),
        ('2.3.0', {'transformers<5'}),
        ('2.6.0', set()),
        ('2.15.0', set()),
    ],
)
def test_an_old_pytorch_gets_libraries_that_take_it(tool, monkeypatch, tmp_path, torch, ceilings):
    calls = []
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr(tool, 'uv', lambda *args: calls.append(args))
    folder = tool.make_environment('3.8', torch)
    assert folder == tmp_path / f'.venv-py3.8-torch{torch}'
    create, libraries, package = calls
    assert {'opencv-python-headless<5', 'setuptools<81', 'numpy<3', 'pytest'} <= set(libraries)
    assert create == ('venv', '--quiet', '--python', '3.8', str(folder))
    assert f'torch=={torch}' in libraries
    assert {name for name in libraries if name.startswith(('numpy<', 'transformers<'))} - {'numpy<3'} == ceilings
    assert package[-2:] == ('mmengine==0.10.7', str(tmp_path)) and '--no-deps' in package
    folder.mkdir()
    tool.make_environment('3.8', torch)
    assert calls[3:] == [libraries, package]  # an existing environment is used again


def test_an_invalid_version_is_one_line(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['test_versions.py', '--python', '3.8', '--torch', 'nightly'])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith('--torch nightly: give a version, for example 2.1.2')
