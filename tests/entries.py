"""Every entry of a checkpoint: what calls and command lines do with one, in this process.

Each takes ``source``, a path or URL, ``load_tool`` and ``shapes`` of conftest.py, and ``tmp_path``, where it may write.
Command lines give their exit code, calls raise their errors.
"""

import functools
import sys
import uuid
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from swinv2_mm import SwinTransformerV2, load_pretrained
from swinv2_mm.engine import launch

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / 'configs/demo/upernet_swinv2_shapes.py')


def options(iters, *more):
    return ['--cfg-options', f'train_cfg.max_iters={iters}', f'train_cfg.val_interval={iters}', *more]


def run_tool(load_tool, name, *args):
    """Run a command line in this process. Returns its exit code."""
    tool = load_tool(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [name, *map(str, args)])
        try:
            return tool.main() or 0
        except SystemExit as end:
            return end.code or 0


IN_PROCESS = [
    f'{split}_dataloader.{key}'
    for split in ('train', 'val', 'test')
    for key in ('num_workers=0', 'persistent_workers=False')
]


def train(load_tool, shapes, work_dir, *args, iters=1, more=()):
    quick = ['default_hooks.checkpoint.interval=1', 'train_dataloader.batch_size=2', f'experiment_name={uuid.uuid4()}']
    flags = '--data-root', shapes / 'ade', '--work-dir', work_dir, *args
    return run_tool(load_tool, 'train', DEMO, *flags, *options(iters, *quick, *IN_PROCESS, *more))


def build(part):
    """A function that builds the demo's segmentor, with the weights that a config names for a part of it."""

    def build_from(source, **_):
        cfg = Config.fromfile(DEMO)
        init_default_scope('mmseg')
        node = cfg.model.get(part) if part else cfg.model
        node.init_cfg = dict(type='Pretrained', checkpoint=source)
        if part == 'decode_head':
            node.init_cfg.prefix = 'decode_head.'
        MODELS.build(cfg.model).init_weights()

    return build_from


def enter_host_runner(source, shapes, tmp_path, resume, **_):
    """mmengine's own Runner, as the hosts' tools have it."""
    cfg = launch.load_config(DEMO)
    launch.set_data_root(cfg, str(shapes / 'ade'))
    launch.set_initial_weights(cfg, 'none')
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    cfg.train_cfg.update(max_iters=2, val_interval=5)
    cfg.update(work_dir=str(tmp_path / 'host'), load_from=source, resume=resume, experiment_name=str(uuid.uuid4()))
    Runner.from_cfg(cfg).train()


def evaluate(source, load_tool, shapes, tmp_path):
    flags = '--data-root', shapes / 'ade', '--work-dir', tmp_path / 'run', '--cfg-options', *IN_PROCESS
    return run_tool(load_tool, 'test', DEMO, source, *flags, f'experiment_name={uuid.uuid4()}')


def infer(source, load_tool, shapes, tmp_path):
    image = next((shapes / 'val2017').iterdir())
    return run_tool(load_tool, 'infer', DEMO, source, image, '--out', tmp_path / 'out')


DEMO_ARCH = dict(embed_dims=32, depths=(1, 1, 2, 2), num_heads=(1, 2, 4, 8))
ENTRIES = {
    'load_pretrained': lambda source, **_: load_pretrained(SwinTransformerV2(DEMO_ARCH, window_size=8), source),
    'init_cfg of the backbone': build('backbone'),
    'init_cfg of a head': build('decode_head'),
    'init_cfg of the model': build(None),
    '--checkpoint': lambda source, load_tool, shapes, tmp_path: train(
        load_tool, shapes, tmp_path / 'run', '--checkpoint', source
    ),
    '--resume': lambda source, load_tool, shapes, tmp_path: train(
        load_tool, shapes, tmp_path / 'run', '--resume', source, iters=2
    ),
    'load_from': lambda source, load_tool, shapes, tmp_path: train(
        load_tool, shapes, tmp_path / 'run', more=[f'load_from={source}']
    ),
    'load_from of a host': functools.partial(enter_host_runner, resume=False),
    'resume of a host': functools.partial(enter_host_runner, resume=True),
    'test': evaluate,
    'infer': infer,
    'inspect_checkpoint': lambda source, load_tool, **_: run_tool(load_tool, 'inspect_checkpoint', source),
    'convert_checkpoint': lambda source, load_tool, tmp_path, **_: run_tool(
        load_tool, 'convert_checkpoint', source, tmp_path / 'out.pth'
    ),
    'plot_position_bias': lambda source, load_tool, tmp_path, **_: run_tool(
        load_tool, 'plot_position_bias', source, '--window', 8, '--out', tmp_path / 'out.png'
    ),
}
CALLS = [entry for entry in ENTRIES if 'load_pretrained' in entry or 'init_cfg' in entry or 'host' in entry]
