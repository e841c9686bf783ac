"""Training with sharded parameters gives the losses and weights of one process, in a fraction of its memory."""

import fcntl
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_runs
import torch
from mmengine.config import Config
from mmengine.runner import FlexibleRunner
from sharded_runs import RUNS, STEPS
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from swinv2_mm import CheckpointError, SwinTransformerV2, SwinV2FlexibleRunner, compat
from swinv2_mm.checkpoints import sharded
from swinv2_mm.checkpoints.files import read_checkpoint
from swinv2_mm.engine import run_folder
from swinv2_mm.engine.runner import runner_class
from swinv2_mm.engine.strategy_checks import check_strategy, strategy_class

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(compat.torch_version < sharded.NEEDED, reason='needs a newer PyTorch')
COMPARED = [run for run in RUNS if run != 'killed']


def start(processes, folder, *actions):
    """Run actions of sharded_runs.py in several processes. Returns the exit code and the output."""
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--standalone']
    command += [str(ROOT / 'tests/sharded_runs.py'), str(folder), *actions]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    return done.returncode, done.stdout


@pytest.fixture(scope='session')
def many(tmp_path_factory):
    """The folders of runs in 2 and in 4 processes, of which the latter continue some of the former."""
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent  # of all workers: one of them starts the runs, and others wait for it
    folders = {processes: folder / f'processes{processes}' for processes in (2, 4)}
    with open(folder / 'sharding.lock', 'a+') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            lock.write('begun')
            lock.flush()
            run_all(*folders.values())
            lock.write(', done')
        lock.seek(0)
        assert lock.read() == 'begun, done', 'the runs failed in another worker or for another test'
    return folders


def run_all(two, four):
    two.mkdir()
    backbone = {**sharded_runs.BACKBONE, 'arch': dict(sharded_runs.BACKBONE['arch'], depths=(1, 1, 1, 2))}
    backbone.pop('type')
    torch.save(SwinTransformerV2(**backbone).state_dict(), two / 'small.pth')
    trained = SwinTransformerV2(**{**backbone, 'arch': sharded_runs.BACKBONE['arch'], 'window_size': 3})
    torch.save(trained.state_dict(), two / 'trained.pth')
    code, output = start(
        2, two, *COMPARED, 'mistakes', 'window_after_loading', 'sent_in_a_step', 'data_parallel', 'kill_one'
    )
    assert code == 1, output[-4000:]
    last = f'iter_{STEPS + 2}.pth'
    shutil.copytree(two / 'clipped', four / 'other/clipped', ignore=lambda *_: [last])
    shutil.copytree(two / 'killed', four / 'killed')
    second = start(4, four, 'clipped', 'resume_clipped', 'resume_killed', 'sent_in_a_step')
    assert second[0] == 0, second[1][-4000:]
    (two / 'output.txt').write_text(output)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """What one process notes in a run of two more steps, and its folder."""
    folder, noted = tmp_path_factory.mktemp('one'), {}

    def one(run):
        if run not in noted:
            noted[run] = sharded_runs.train(run, folder, steps=STEPS + 2)
        return noted[run], folder / run

    return one


def noted_by(folder, action, processes):
    return [json.loads((folder / action / f'{rank}.json').read_text()) for rank in range(processes)]


def mean(losses):
    return torch.tensor(losses, dtype=torch.float64).mean(0)


@pytest.mark.parametrize(('run', 'processes'), [*((run, 2) for run in COMPARED), ('clipped', 4)])
def test_losses_and_weights_are_those_of_one_process(many, one, run, processes):
    expected, folder = one(run)
    noted = noted_by(many[processes], run, processes)
    exact = dict(rtol=1e-9, atol=1e-12) if run != 'bfloat16' else dict(rtol=1e-3, atol=1e-4)
    losses = torch.tensor(expected['losses'][:STEPS], dtype=torch.float64)
    torch.testing.assert_close(mean([one['losses'] for one in noted]), losses, **exact)
    assert [one['norms'] for one in noted] == [pytest.approx(expected['norms'][:STEPS], rel=1e-9)] * processes
    name = f'iter_{STEPS}.pth'
    ours, theirs = (read_checkpoint(path / name) for path in (many[processes] / run, folder))
    assert list(ours['state_dict']) == list(theirs['state_dict'])
    torch.testing.assert_close(dict(ours['state_dict']), dict(theirs['state_dict']), **exact)
    assert ours['optimizer']['param_groups'] == theirs['optimizer']['param_groups']
    if run == 'layer decay':  # 1e-2 is for 8 images, of which all processes have 4; that of the head is twice as high
        assert max(group['lr'] for group in ours['optimizer']['param_groups']) == 2 * 1e-2 * 4 / 8
    torch.testing.assert_close(ours['optimizer']['state'], theirs['optimizer']['state'], **exact)


def test_parts_without_gradients_do_not_stop_data_parallel_training(many, one):
    losses = mean([one['losses'] for one in noted_by(many[2], 'data_parallel', 2)])
    expected = torch.tensor(one('unused parts')[0]['losses'][:STEPS], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)


def test_autocast_keeps_no_casts_of_sharded_weights(many, one):
    assert one('bfloat16')[0]['keeps_casts'] == [True] * (STEPS + 2)
    assert [one['keeps_casts'] for one in noted_by(many[2], 'bfloat16', 2)] == [[False] * STEPS] * 2


@pytest.mark.parametrize('processes', [2, 4])
def test_each_process_holds_its_part_of_parameters_gradients_and_state(many, one, processes):
    whole = one('clipped')[0]
    assert whole['state'] == 2 * whole['parameters'] == 2 * whole['gradients']
    noted = noted_by(many[processes], 'clipped', processes)
    for kind in ('parameters', 'gradients', 'state'):
        assert sum(one[kind] for one in noted) == whole[kind]
        # rows of a tensor are not divided, so the first process may have one more of each
        assert max(one[kind] for one in noted) < 1.02 * whole[kind] / processes


@pytest.mark.parametrize('run', sharded_runs.RESUMED)
def test_a_resumed_run_goes_on_as_an_uninterrupted_one(many, one, tmp_path, run):
    noted = noted_by(many[2], run, 2)
    whole = one(run)[0]['losses'][STEPS:]
    tolerance = dict(rtol=1e-9, atol=0)
    resumed = mean([one['resumed'] for one in noted])
    torch.testing.assert_close(resumed, torch.tensor(whole, dtype=torch.float64), **tolerance)
    if run == 'clipped':  # continued in four processes
        resumed = mean([one['losses'] for one in noted_by(many[4], 'resume_clipped', 4)])
        torch.testing.assert_close(resumed, torch.tensor(whole, dtype=torch.float64), **tolerance)
    if run in ('clipped', 'accumulated'):  # sharded and whole, continued in one
        shutil.copytree(many[2] / run, tmp_path / run, ignore=lambda *_: [f'iter_{STEPS + 2}.pth'])
        resumed = sharded_runs.train(run, tmp_path, steps=STEPS + 2, resume=True)['losses']
        assert resumed == pytest.approx(whole, rel=1e-9)


def test_one_process_that_is_killed_ends_all_and_the_run_can_be_continued(many, one):
    assert 'Signal 9 (SIGKILL) received' in (many[2] / 'output.txt').read_text()
    kept = sorted(path.name for path in (many[2] / 'killed').glob('*.pth'))
    assert kept == ['iter_2.pth']
    losses = mean([one['losses'] for one in noted_by(many[4], 'resume_killed', 4)])
    expected = torch.tensor(one('killed')[0]['losses'][2:STEPS], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)


def test_a_checkpoint_that_does_not_fit_is_one_line_in_all_processes(many):
    first, second = noted_by(many[2], 'mistakes', 2)
    assert first == second
    scalar, initial, sharded_resume, whole_resume = first
    assert scalar.startswith('scale of the model has no dimension to cut it along')
    assert "small.pth: it has arch={'embed_dims': 16, 'depths': (1, 1, 1, 2)" in initial
    assert 'clipped/iter_6.pth cannot be resumed with this config: the model has no backbone.layers.1' in sharded_resume
    assert "iter_4.pth: backbone: it has arch={'embed_dims': 16, 'depths': (1, 2, 1, 2)" in whole_resume
    assert not any('\n' in error for error in first)


def test_all_processes_know_the_windows_that_one_has_read(many):
    assert noted_by(many[2], 'window_after_loading', 2) == [[[3, 3, 3, 3]] * 2] * 2


@pytest.mark.parametrize('processes', [2, 4])
def test_a_step_sends_what_is_calculated(many, load_tool, processes):
    costs = load_tool('sharding_costs')
    backbone = {key: value for key, value in sharded_runs.BACKBONE.items() if key not in ('type', 'drop_path_rate')}
    with torch.device('meta'):
        backbone = SwinTransformerV2(**backbone)
    expected = sum(unit.sent for unit in costs.list_units(backbone, processes))
    assert noted_by(many[processes], 'sent_in_a_step', processes) == [expected] * processes


def test_sharded_checkpoints_are_those_of_a_whole_run(many, one, load_tool, tmp_path, capsys, monkeypatch):
    folder = many[2] / 'clipped' / f'iter_{STEPS}.pth'
    assert sharded.is_sharded_checkpoint(folder)
    theirs = read_checkpoint(one('clipped')[1] / folder.name)
    ours = read_checkpoint(folder)
    assert ours['meta']['iter'] == STEPS and ours['meta']['seed'] == 0
    assert set(ours) == set(theirs) - {'param_schedulers'}
    assert ours['state_dict']._metadata == theirs['state_dict']._metadata
    assert run_folder.find_resume(many[2] / 'clipped', 'auto').endswith(f'iter_{STEPS + 2}.pth')
    backbone = SwinTransformerV2(**{key: value for key, value in sharded_runs.BACKBONE.items() if key != 'type'})
    backbone.init_cfg = dict(type='Pretrained', checkpoint=str(folder))
    backbone.double().init_weights()
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, theirs['state_dict'][f'backbone.{name}'])
    for tool, *rest in (('inspect_checkpoint',), ('convert_checkpoint', str(tmp_path / 'backbone.pth'))):
        monkeypatch.setattr(sys, 'argv', [tool, str(folder), *rest])
        assert not load_tool(tool).main()
    assert "arch={'embed_dims': 16" in capsys.readouterr().out
    converted = read_checkpoint(tmp_path / 'backbone.pth')
    name = 'layers.3.blocks.1.mlp.fc2.weight'
    torch.testing.assert_close(converted[name], theirs['state_dict'][f'backbone.{name}'])


class _Runs:
    """Makes a folder when it is unpickled freely."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def contents(**changes):
    """What the table of contents of a folder holds, with one tensor."""
    chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))]
    tensor = TensorStorageMetadata(TensorProperties(), torch.Size([2]), chunks)
    storage = {MetadataIndex('state_dict.x', torch.Size([0])): _StorageInfo('__0_0.distcp', 0, 1)}
    values = dict(state_dict_metadata={'state_dict.x': tensor}, planner_data={}, storage_data=storage)
    return pickle.dumps(Metadata(**{**values, **changes}))


def test_no_code_in_a_sharded_checkpoint_runs_and_no_piece_may_be_missing(many, tmp_path):
    def write(name, data):
        return lambda folder: (folder / name).write_bytes(data)

    ran, folder = str(tmp_path / 'ran'), tmp_path / 'iter_2.pth'
    buffer = io.BytesIO()
    torch.save(_Runs(ran), buffer)
    crafted = buffer.getvalue()
    patch = b'cpathlib\nPosixPath\n(N(dVname\nVx\nstb.'  # BUILD on a class
    tensor = pickle.loads(contents()).state_dict_metadata['state_dict.x']
    for damage, message in (
        (write('.metadata', pickle.dumps(_Runs(ran))), 'which could run code'),
        (write('.metadata', patch), 'Unsupported: state of a class or function'),
        (
            write('.metadata', contents(state_dict_metadata={'state_dict.x': BytesStorageMetadata()})),
            'BytesStorageMetadata in the place of weights, which could run code',
        ),
        (write('.metadata', contents(state_dict_metadata={'x': tensor})), 'x is not a tensor of a model or optimizer'),
        (write('.metadata', contents(storage_data={})), r'pieces of state_dict\.x are missing'),
        (write('.metadata', pickle.dumps(torch.Size([1]))), 'it holds a Size'),
        (write('.metadata', b'x'), 'is truncated or not a checkpoint'),
        (write('__0_0.distcp', crafted * 20_000), 'is truncated or not a checkpoint|which could run code'),
        (lambda folder: write('__0_0.distcp', bytes((folder / '__0_0.distcp').stat().st_size))(folder), 'is truncated'),
        (write('__0_0.distcp', b''), '__0_0.distcp is missing or truncated'),
        (lambda folder: (folder / '__1_0.distcp').unlink(), '__1_0.distcp is missing or truncated'),
        (
            write('training_state.pth', crafted),
            'is truncated or not a checkpoint|which could run code|not a state dict',
        ),
        (write('training_state.pth', b'x'), 'is truncated or not a checkpoint'),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(many[2] / 'killed/iter_2.pth', folder)
        damage(folder)
        with pytest.raises(CheckpointError, match=message) as error:
            read_checkpoint(folder)
        assert '\n' not in str(error.value) and not Path(ran).exists()
    with pytest.raises(CheckpointError, match='nothing to resume'):
        run_folder.find_resume(tmp_path, 'auto')
    pickle.loads(pickle.dumps(_Runs(ran)))
    assert Path(ran).exists()


def config(**keys):
    return Config(dict(dict(runner_type='FlexibleRunner', default_scope='mmengine'), **keys))


@pytest.mark.parametrize(
    ('keys', 'message'),
    [
        (dict(strategy=dict(type='SwinV2FSDPStrategy')), 'is for several processes, and there is one: start them with'),
        (dict(strategy=dict(type='DDPStrategy')), 'is for several processes, and there is one'),
        (
            dict(strategy=dict(type='SwinV2FSDPStrategy'), custom_hooks=[dict(type='EMAHook')]),
            r'custom_hooks\.0 of the config is EMAHook, which copies the whole model',
        ),
        (
            dict(strategy=dict(type='SwinV2FSDPStrategy'), optim_wrapper=dict(type='AmpOptimWrapper')),
            'use --amp bf16',
        ),
        (
            dict(
                strategy=dict(type='SwinV2FSDPStrategy'),
                default_hooks=dict(checkpoint=dict(backend_args=dict(backend='petrel'))),
            ),
            'a sharded model is saved to a disk',
        ),
        (
            dict(
                strategy=dict(type='SwinV2FSDPStrategy'),
                val_cfg=dict(type='ValLoop'),
                model=dict(test_cfg=dict(mode='slide')),
            ),
            r"model\.test_cfg\.mode of the config is 'slide'",
        ),
        (
            dict(
                strategy=dict(type='SwinV2FSDPStrategy'),
                val_cfg=dict(type='ValLoop'),
                val_dataloader=dict(sampler=dict(type='DefaultSampler', round_up=False)),
                model=dict(),
            ),
            'need equally many images',
        ),
        (dict(compile=True), 'compile of the config has no effect in a FlexibleRunner'),
        (dict(strategy=dict(type='FSDPStrategy')), 'strategy FSDPStrategy needs GPUs'),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason='about machines without a GPU')
def test_what_does_not_suit_a_strategy_is_one_line(keys, message):
    runner_class(config(**keys))
    with pytest.raises(ValueError, match=message) as error:
        check_strategy(config(**keys))
    assert '\n' not in str(error.value)


def test_clipping_by_pieces_is_refused(monkeypatch):
    monkeypatch.setattr('swinv2_mm.engine.strategy_checks.is_cuda_available', lambda: True)
    with pytest.raises(ValueError, match='each process would clip by the norm of its own piece'):
        check_strategy(config(strategy=dict(type='FSDPStrategy'), optim_wrapper=dict(clip_grad=dict(max_norm=1))))


@pytest.mark.parametrize(
    ('keys', 'message'),
    [
        (
            dict(strategy=dict(type='DeepSpeedStrategy')),
            'needs deepspeed, which is not installed: pip install deepspeed',
        ),
        (
            dict(strategy=dict(type='SwinV2FSDPStrateg')),
            "there is no strategy 'SwinV2FSDPStrateg': did you mean 'SwinV",
        ),
        (
            dict(strategy=dict(type='SwinV2FSDPStrategy'), runner_type='Runner'),
            "is for a FlexibleRunner, and runner_type is 'Runner', which would ignore it: set runner_type=",
        ),
        (
            dict(strategy='SwinV2FSDPStrategy'),
            "strategy of the config is 'SwinV2FSDPStrategy': must be a dict with its type",
        ),
        (
            dict(strategy=dict(type='DDPStrategy'), runner_type='SwinV2FlexibleRunner'),
            r"runner_type 'SwinV2FlexibleRunner' of the config needs strategy=dict\(type='SwinV2FSDPStrategy'\)",
        ),
    ],
)
def test_a_strategy_that_cannot_run_is_refused(keys, message):
    with pytest.raises(ValueError, match=message) as error:
        runner_class(config(**keys))
    assert '\n' not in str(error.value)


def test_an_old_pytorch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.5.1'))
    with pytest.raises(ValueError, match=r'strategy SwinV2FSDPStrategy of the config needs PyTorch 2\.7 or later'):
        strategy_class(dict(type='SwinV2FSDPStrategy'))


def test_a_strategy_of_the_host_is_built_as_the_host_builds_it():
    assert runner_class(config(strategy=dict(type='DDPStrategy'))) is FlexibleRunner
    assert runner_class(config()) is FlexibleRunner
    assert runner_class(config(strategy=dict(type='SwinV2FSDPStrategy'))) is SwinV2FlexibleRunner
