"""Every command of the README and the docs runs: as it stands, but on small models, small images and few of them.

What recipes do in bfloat16 is done in float32, unless a command says `--amp`; test_configs.py trains them as they are.
Benchmarks and the demo's comparison take long: their flags are checked here. `test_benchmark.py` runs benchmarks small,
and `test_demo.py` and `test_measure_gpu.py` check what the others would run. So are those of sharded training, which
needs several processes (`test_sharding.py`), and of what computes with 3 billion parameters. Of the short runs on real
photos that of Mask R-CNN is trained; of the others the checked config is made.
"""

import importlib
import re
import runpy
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from test_configs import SMALL, shrink_config

from swinv2_mm import SwinTransformerV2
from swinv2_mm.checkpoints.downloads import cached_path
from swinv2_mm.checkpoints.files import write_checkpoint
from swinv2_mm.checkpoints.formats import export
from swinv2_mm.engine import launch

ROOT = Path(__file__).parents[1]
PAGES = (
    'README.md',
    'CONTRIBUTING.md',
    *(f'docs/{name}.md' for name in ('getting_started', 'compatibility', 'checkpoints', 'transfer', 'recipes', 'faq')),
    *('docs/performance.md', 'docs/reliability.md', 'docs/architecture.md', 'docs/scale.md', 'docs/gallery.md'),
    'docs/export.md',
)
BY_CI = (
    'python3 tools/demo.py',
    'python3 tools/run_tests.py',
    'python3 tools/misc/test_versions.py --python 3.8 --torch 2.0.1',
    'python -m ruff check .',
    'python -m ruff format --check .',
)
LONG = (
    *('tools/analysis_tools/benchmark.py', 'tools/misc/measure_gpu.py', 'tools/demo.py'),
    *('tools/analysis_tools/compare_position_biases.py', 'tools/analysis_tools/compare_starts.py'),
    'tools/misc/measure_sharding.py',
)
PRINTED = """
python() { printf '%s\\x1f' python "$@"; echo; }
python3() { printf '%s\\x1f' python3 "$@"; echo; }
pip() { printf '%s\\x1f' pip "$@"; echo; }
torchrun() { printf '%s\\x1f' torchrun "$@"; echo; }
"""


STANDS_FOR = dict(
    CONFIG='configs/mask_rcnn_swinv2.py',
    CHECKPOINT='work_dirs/mask_rcnn_swinv2/epoch_12.pth',
    CONFIG_OR_ARCH='tiny',
    IMAGE_OR_FOLDER_OR_GLOB='photos',
    DIR='results',
    OUT='drawn',
)
SMALLER = {'800': '64', '1344': '96'}  # pixels; exporting takes time for every size of windows


def commands(page):
    """The commands in the blocks and in the text of a page, as the shell gives them to the programs."""
    text = (ROOT / page).read_text()
    script = '\n'.join([PRINTED, *re.findall(r'```bash\n(.*?)```', text, re.DOTALL)])
    for inline in re.findall(r'`(python tools/[^`]+ [^`]+)`', text):
        script += '\n' + ' '.join(STANDS_FOR.get(word, word) for word in inline.split())
    printed = subprocess.run(['bash', '-euf', '-c', script], capture_output=True, text=True, check=True).stdout
    return [tuple(line.split('\x1f')[:-1]) for line in printed.splitlines()]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


HOSTS = re.findall(r'`python \$(MMDET|MMSEG)/([^` ]+) ([^`]+)`', (ROOT / 'docs/hosts.md').read_text())


@pytest.mark.parametrize(('host', 'tool', 'arguments'), HOSTS, ids=[' '.join(words[:2]) for words in HOSTS])
def test_a_command_of_a_host_is_one(host, tool, arguments, monkeypatch):
    """It has such a tool, which takes these arguments. The page says which of them were run, and when."""
    path = Path(importlib.import_module(host.lower()).__path__[0], '.mim/tools', tool)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'seaborn', types.ModuleType('seaborn'))  # which is not installed
    monkeypatch.setenv('LOCAL_RANK', '0')  # else it sets that
    monkeypatch.setattr(sys, 'argv', [tool, *arguments.split()])
    if (host, tool) == ('MMDET', 'analysis_tools/benchmark.py'):
        pytest.importorskip('psutil')
    spec.loader.exec_module(module)
    module.parse_args()  # which ends at a mistake


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """A small Swin V2 as the official repository saves one; its tables say window 16 at 256 pixels."""
    folder = tmp_path_factory.mktemp('released')
    backbone = SwinTransformerV2(SMALL, window_size=(16, 16, 16, 8), out_indices=(3,))
    weights = export(backbone.state_dict(), backbone.pretrained_window_sizes, 'official')
    write_checkpoint(dict(model=weights), folder / 'released.pth')
    return folder / 'released.pth'


@pytest.fixture
def site(coco, shapes, released, tmp_path, monkeypatch):
    """A folder like a clone with data, downloaded checkpoints and photos in it."""
    for name in ('configs', 'tools', 'swinv2_mm', 'docs'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/coco').symlink_to(coco)
    (tmp_path / 'data/ade').mkdir()
    (tmp_path / 'data/ade/ADEChallengeData2016').symlink_to(shapes / 'ade')
    (tmp_path / 'data/shapes').symlink_to(shapes)
    (tmp_path / 'photos').symlink_to(shapes / 'val2017')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    return tmp_path


def provide(word, command, site, released):
    """Make the file that a word of a command names, if it is one that a user would have."""
    word = word.replace('load_from=', '')
    path = site / word
    if path.exists() or word.startswith('-'):
        return
    if word == 'WORK_DIR':
        path = site / 'WORK_DIR/20260101_000000/vis_data/scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('{"loss": 1.0, "iter": 1, "step": 1}\n')
    elif re.fullmatch(r'(swinv2_\w+\.pth|FILE)', word):
        shutil.copy(released, path)
    elif re.fullmatch(r'work_dirs/\w+/(epoch|iter)_\d+\.pth|other\.pth', word):
        cfg = launch.load_config(next(argument for argument in command if argument.startswith('configs/')))
        launch.set_initial_weights(cfg, 'none')
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            weights = MODELS.build(cfg.model).state_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(meta={}, state_dict=weights), path)


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
@pytest.mark.usefixtures('no_traces')
def test_a_command_runs(command, site, released, load_tool, monkeypatch, capsys):
    if command[1] == 'tools/run_tests.py' and command[2:]:  # these run in this suite, with fewer draws
        assert all((ROOT / word).is_file() for word in command[2:] if word.startswith('tests/'))
        return
    if ' '.join(command) in BY_CI:
        lines = (ROOT / '.ci/run').read_text().splitlines()
        assert ' '.join(command) in [line.replace('.venv/bin/', '') for line in lines]
        return
    if command[1] == 'docs/draw_figures.py':  # test_figures.py draws
        monkeypatch.setattr(sys, 'argv', list(command[1:]))
        assert runpy.run_path(command[1], run_name='draw_figures')['main']() == 2
        assert 'run tools/demo.py to its end' in capsys.readouterr().err
        return
    if command[0] == 'pip':
        assert command == ('pip', 'install', '.')
        shutil.copytree(ROOT / 'swinv2_mm', site / 'clone/swinv2_mm')
        for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
            shutil.copy(ROOT / name, site / 'clone')
        options = ('--no-deps', '--no-build-isolation', '--target', str(site / 'target'))
        run = (sys.executable, '-m', 'pip', 'install', *options, str(site / 'clone'))
        subprocess.run(run, check=True, capture_output=True)
        assert (site / 'target/swinv2_mm/backbone.py').exists()
        return
    original = launch.load_config

    def load_small(path, overrides=None):
        cfg = original(path)
        shrink_config(cfg)
        if cfg.optim_wrapper.type == 'BFloat16OptimWrapper':
            cfg.optim_wrapper.type = 'OptimWrapper'  # CPUs without bfloat16 take minutes for a convolution in it
        cfg.merge_from_dict(dict(overrides or {}))
        url = (cfg.model.backbone.init_cfg or {}).get('checkpoint', '')
        if url.startswith('https:'):  # as if downloaded before
            cached_path(url).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(released, cached_path(url))
        return cfg

    monkeypatch.setattr(launch, 'load_config', load_small)
    monkeypatch.setattr(Config, 'pretty_text', 'unformatted')  # for the log; yapf takes long
    script = next(i for i, word in enumerate(command) if word.startswith('tools/'))
    for word in command[script + 1 :]:
        provide(word, command, site, released)
    if command[0] == 'torchrun':
        processes = next(word.partition('=')[2] for word in command if word.startswith('--nproc_per_node'))
        assert int(processes) > 1
        with socket.create_server(('127.0.0.1', 0)) as server:  # another test may have a port that is fixed
            port = server.getsockname()[1]
        for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=port).items():
            monkeypatch.setenv(name, str(value))
    tool = load_tool(Path(command[script]).stem)
    is_sharded = any('fsdp' in word for word in command)
    is_of_demo = command[script] == 'tools/test.py' and command[script + 1].startswith('configs/demo/')  # README's runs
    if command[script] in LONG or is_sharded or is_of_demo or {'giant', '--measure'} & set(command):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)  # these are refused where no GPU is
        tool.parse_args(command[script + 1 :])
        return
    is_short_run = command[script] == 'tools/train.py' and {'--seed', 'none'} <= set(command)
    if is_short_run and command[script + 1] != 'configs/mask_rcnn_swinv2.py':
        cfg = tool.prepare(tool.parse_args(command[script + 1 :]))  # test_configs.py trains such a recipe for a step
        assert cfg.train_cfg.get('max_epochs', 1) == 1 and cfg.train_cfg.get('max_iters', 2) == 2
        return
    if command[script] == 'tools/deployment/export_onnx.py':
        command = [SMALLER.get(word, word) for word in command]
        if '--part' in command or '--repeat' in command:  # test_export_onnx.py exports these
            args = tool.parse_args(command[script + 1 :])
            tool.check_request(args)
            tool.build(tool.read_config(args), args)
            return
    monkeypatch.setattr(sys, 'argv', list(command[script:]))
    try:
        code = tool.main()
    except SystemExit as ended:
        code = ended.code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert code in (None, 0), capsys.readouterr().err
