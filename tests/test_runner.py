"""A run that ends early leaves whole checkpoints, and is resumed as if it had not ended."""

import contextlib
import copy
import enum
import errno
import gc
import itertools
import os
import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import mmengine.runner.runner
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict, ReduceOnPlateauLR
from mmengine.registry import DATA_SAMPLERS, RUNNERS
from torch.utils.data import BatchSampler, DataLoader

import swinv2_mm.engine.runner
from swinv2_mm import CheckpointError
from swinv2_mm.checkpoints.files import read_checkpoint
from swinv2_mm.engine import run_folder
from swinv2_mm.engine.model_weights import load_model
from swinv2_mm.engine.runner import SwinV2Runner
from swinv2_mm.engine.seeding import NumberedBatches, number_batches
from swinv2_mm.engine.training_state import check_training_state

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('no_traces')
names = itertools.count()


class Noise:
    """Twelve samples, each with noise of all generators, wide ones and high ones."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(())], dtype=torch.float64)

    def get_data_info(self, index):
        return dict(width=1 + index % 3, height=2)


class Model(BaseModel):
    """A layer whose loss has dropout and noise of all generators."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3).double()
        self.seen = []

    def forward(self, batch, mode='loss'):
        batch = torch.stack(batch)
        if mode != 'loss':
            return [float(self.layer(batch).sum())]
        out = torch.nn.functional.dropout(self.layer(batch), 0.3)
        loss = (out - random.random() - np.random.rand()).square().mean()
        self.seen.append((batch.tolist(), loss.item()))
        return dict(loss=loss)

    def train_step(self, data, optim_wrapper):
        return super().train_step(dict(batch=data), optim_wrapper)

    def val_step(self, data):
        return self(data, 'predict')


class Score(BaseMetric):
    """Better with every validation."""

    score = 0

    def process(self, data_batch, data_samples):
        self.results.append(random.random())

    def compute_metrics(self, results):
        Score.score += 1
        return dict(acc=Score.score)


class Stop(Hook):
    """Notes losses, and ends a run when so many iterations are over."""

    priority = 'LOWEST'

    def __init__(self, after):
        self.after = after
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())
        if runner.iter + 1 == self.after:
            raise KeyboardInterrupt


@DATA_SAMPLERS.register_module(force=True)
class ByShape(BatchSampler):
    """Batches of one shape, with batches that are begun in one pass and ended in none."""

    def __iter__(self):
        begun = {}
        for index in self.sampler:
            batch = begun.setdefault(self.sampler.dataset.get_data_info(index)['width'] < 2, [])
            batch.append(index)
            if len(batch) == self.batch_size:
                yield batch[:]
                batch.clear()
        yield from filter(None, begun.values())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out what takes mmengine seconds: a description of the machine, and the layout of configs in logs."""
    monkeypatch.setattr(mmengine.runner.runner, 'collect_env', dict)
    monkeypatch.setattr(Config, 'pretty_text', '')
    monkeypatch.setattr(torch.utils.data._utils, 'MP_STATUS_CHECK_INTERVAL', 0.2)  # seconds that a worker gets to end
    yield
    gc.collect()  # ends workers


def build_runner(
    work_dir,
    by_epoch=False,
    length=8,
    sampler='InfiniteSampler',
    batch_sampler=None,
    workers=0,
    checkpoint=None,
    stop=None,
    seed=None,
    **options,
):
    """A runner of a model of one layer; options go to the class."""
    data = dict(batch_size=5, num_workers=workers, persistent_workers=workers > 0, dataset=Noise())
    val = dict(data, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=False))
    data.update(sampler=dict(type=sampler, shuffle=True), batch_sampler=batch_sampler)
    unit = 'epochs' if by_epoch else 'iters'
    return SwinV2Runner(
        **{
            'model': Model(),
            'work_dir': str(work_dir),
            'experiment_name': f'run_{next(names)}',
            'train_dataloader': data,
            'train_cfg': {'by_epoch': by_epoch, f'max_{unit}': length, 'val_interval': 2},
            'val_dataloader': val,
            'val_cfg': {},
            'val_evaluator': [Score()],
            'optim_wrapper': dict(optimizer=dict(type='AdamW', lr=0.01)),
            'param_scheduler': [
                dict(type='LinearLR', by_epoch=False, end=5),
                dict(type='ConstantLR', by_epoch=False, begin=5, end=9),
            ],
            'default_hooks': dict(
                checkpoint=checkpoint or dict(type='CheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 3),
                sampler_seed=dict(type='DistSamplerSeedHook'),
            ),
            'custom_hooks': [Stop(stop)] if stop else None,
            'randomness': dict(seed=seed),
            **options,
        }
    )


@pytest.fixture
def build(tmp_path):
    return lambda **options: build_runner(**{'work_dir': tmp_path, **options})


def weights(path):
    return read_checkpoint(path)['state_dict']


def test_a_config_may_name_the_runner():
    assert RUNNERS.get('SwinV2Runner') is SwinV2Runner


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize(
    ('by_epoch', 'sampler', 'batch_sampler', 'stop', 'resumed'),
    [
        (False, 'InfiniteSampler', None, 5, 3),
        (False, 'DefaultSampler', None, 8, 6),  # in its third pass
        (False, 'DefaultSampler', dict(type='ByShape', drop_last=False), 8, 6),
        (True, 'DefaultSampler', None, 8, 6),
        (True, 'DefaultSampler', dict(type='ByShape', drop_last=False), 8, None),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    build, tmp_path, by_epoch, sampler, batch_sampler, stop, resumed, workers
):
    options = dict(by_epoch=by_epoch, length=4 if by_epoch else 10, sampler=sampler, batch_sampler=batch_sampler)
    whole = build(**options, seed=None, work_dir=tmp_path / 'whole')
    whole.train()
    same = build(**options, seed=whole.seed, work_dir=tmp_path / 'same', workers=workers, stop=stop)
    with pytest.raises(KeyboardInterrupt):
        same.train()
    continued = build(**options, work_dir=tmp_path / 'same', workers=workers, resume=True)
    continued.train()
    first = read_checkpoint(continued._load_from)['meta']['iter']
    assert resumed in (first, None)
    assert 0 < first < stop
    assert same.model.seen == whole.model.seen[:stop]
    assert continued.model.seen == whole.model.seen[first:]
    assert len(whole.model.seen) >= 10
    for one, other in zip(whole.model.state_dict().values(), continued.model.state_dict().values()):
        assert torch.equal(one, other)
    noise = [sample[1] for batch, _ in whole.model.seen for sample in batch]
    assert len(set(noise)) == len(noise)  # no two samples have the same


def test_a_run_that_ends_within_an_epoch_is_resumed_there(build, tmp_path):
    hook = dict(type='CheckpointHook', by_epoch=False, interval=2)
    options = dict(by_epoch=True, length=2, sampler='DefaultSampler', checkpoint=hook, seed=3)
    whole = build(**options, work_dir=tmp_path / 'whole')
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(**options, stop=5).train()
    continued = build(**options, resume=True)
    continued.train()
    assert continued._load_from.endswith('iter_4.pth')  # of three to an epoch
    assert continued.model.seen == whole.model.seen[4:]
    assert (continued.epoch, continued.iter) == (2, 6)


def test_a_learning_rate_is_scaled_once_by_the_batch_size(build):
    """0.01 is for batches of 20, and those of this run have 5. Resumed, it goes on as it was, whatever is asked."""

    def rates(**options):
        runner = build(param_scheduler=None, **options)
        runner.train()
        return [group['lr'] for group in runner.optim_wrapper.param_groups]

    scaling = dict(enable=True, base_batch_size=20)
    assert rates() == [0.01]
    assert rates(auto_scale_lr=dict(scaling, enable=False)) == [0.01]
    assert rates(auto_scale_lr=scaling) == [0.0025]
    assert rates(auto_scale_lr=scaling, resume=True, length=9) == [0.0025]
    assert rates(resume=True, length=10) == [0.0025]


@pytest.mark.parametrize(('before', 'after'), [(2, 4), (4, 2)])
def test_a_run_resumed_with_epochs_of_another_length_trains_all_that_is_left(build, before, after):
    """As with another number of processes: an epoch then has fewer or more batches."""

    def loader(batch_size):
        sampler = dict(type='DefaultSampler', shuffle=False)
        return dict(batch_size=batch_size, num_workers=0, dataset=Noise(), sampler=sampler)

    wrapper = dict(optimizer=dict(type='AdamW', lr=0.01), accumulative_counts=2)
    build(by_epoch=True, length=2, train_dataloader=loader(before), optim_wrapper=wrapper).train()
    for length in (4, 6):  # the second with epochs as long as the first
        continued = build(
            by_epoch=True, length=length, train_dataloader=loader(after), optim_wrapper=wrapper, resume=True
        )
        continued.train()
        assert [sample[0] for batch, _ in continued.model.seen for sample in batch] == 2 * list(range(12))
        assert continued.iter == length * 12 // after


def test_resuming_loads_no_sample_that_was_trained(build, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        build(stop=7).train()
    loaded = []
    load = Noise.__getitem__
    monkeypatch.setattr(Noise, '__getitem__', lambda self, index: loaded.append(index) or load(self, index))
    build(length=7, resume=True, val_dataloader=None, val_cfg=None, val_evaluator=None).train()
    assert len(loaded) == 5  # one batch, after six


def test_batches_are_numbered_on_and_passes_shuffled_anew():
    class Sampler:
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([10 * self.epoch + i for i in range(5)])

        def __len__(self):
            return 5

    batches = BatchSampler(Sampler(), 2, drop_last=False)
    endless = NumberedBatches(batches, number=4, skip=4, endless=True)
    taken = list(itertools.islice(endless, 4))
    assert taken == [[12, 13], [14], [20, 21], [22, 23]]
    assert [batch.number for batch in taken] == [4, 5, 6, 7]
    passes = NumberedBatches(batches, number=2, skip=2)
    assert [[batch.number for batch in passes] for _ in range(2)] == [[2], [3, 4, 5]]
    assert (len(passes), passes.batch_size, passes.sampler) == (3, 2, batches.sampler)
    with pytest.raises(ValueError, match='train_dataloader gives no batch'):
        next(iter(NumberedBatches([], endless=True)))


def test_another_loader_of_the_same_data_is_as_before(build):
    runner = build()
    dataset = runner.train_loop.dataloader.dataset
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    batch = next(iter(DataLoader(dataset, batch_size=1, collate_fn=pseudo_collate)))
    torch.manual_seed(1)
    torch.empty((), dtype=torch.int64).random_()  # what an iterator draws
    assert batch[0][3] == torch.rand(()) != expected


def hook(**options):
    return dict(type='CheckpointHook', by_epoch=False, interval=2, **options)


@pytest.mark.parametrize('name', ['iter_{}.pth', 'latest.pth'])
def test_the_old_checkpoint_goes_after_the_new_one_is_whole(build, tmp_path, monkeypatch, name):
    there = []
    put = LocalBackend.put

    def watch(backend, data, path):
        there.append(sorted(file.name for file in tmp_path.glob('*.pth')))
        put(backend, data, path)
        for file in tmp_path.glob('*.pth'):
            weights(file)  # all are whole

    monkeypatch.setattr(LocalBackend, 'put', watch)
    build(checkpoint=hook(max_keep_ckpts=1, save_best='acc', filename_tmpl=name), length=6).train()
    last = name.format
    # at 2, the best at 2, 2 again, and so on
    assert there[:3] == [[], [last(2)], sorted({'best_acc_' + last(2), last(2)})]
    assert there[3] == there[2]
    assert there[4] == sorted({'best_acc_' + last(2), last(4)})
    assert there[5] == sorted({'best_acc_' + last(2), 'best_acc_' + last(4), last(4)})
    assert sorted(file.name for file in tmp_path.glob('*.pth')) == ['best_acc_' + last(6), last(6)]
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / last(6))


@pytest.mark.parametrize('call', ['torch.save', 'os.replace', 'os.fsync'])
def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_last_one_stays(build, tmp_path, monkeypatch, call):
    build(checkpoint=hook(max_keep_ckpts=1), length=2).train()
    before = (tmp_path / 'iter_2.pth').read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(call, full)
    with pytest.raises(CheckpointError) as error:
        build(checkpoint=hook(max_keep_ckpts=1), length=4, resume=True).train()
    assert str(error.value).startswith(f'{tmp_path}/iter_4.pth cannot be written: No space left on device: ')
    assert '\n' not in str(error.value)
    assert [file.name for file in tmp_path.iterdir() if 'pth' in file.name or 'partial' in file.name] == ['iter_2.pth']
    assert (tmp_path / 'iter_2.pth').read_bytes() == before


def test_a_full_disk_beside_the_checkpoint_is_one_line(build, tmp_path, monkeypatch):
    (tmp_path / 'last_checkpoint').symlink_to('/dev/full')
    with pytest.raises(CheckpointError, match=f'^{tmp_path} cannot be written: No space left on device'):
        build(length=3).train()
    weights(tmp_path / 'iter_3.pth')


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_runner
from mmengine.fileio import LocalBackend

put = LocalBackend.put
def killed(backend, data, path):
    put(backend, data[:len(data) // 2] if os.path.exists({work_dir!r} + '/iter_2.pth') else data, path)
    if os.path.exists({work_dir!r} + '/iter_2.pth'):
        os.kill(os.getpid(), signal.SIGKILL)
LocalBackend.put = killed
test_runner.Config.pretty_text = ''
test_runner.build_runner({work_dir!r}, checkpoint=test_runner.hook(max_keep_ckpts=1), seed=5).train()
"""


def test_killed_within_a_save_a_run_goes_on_from_the_one_before(build, tmp_path):
    whole = build(checkpoint=hook(max_keep_ckpts=1), seed=5, work_dir=tmp_path / 'whole')
    whole.train()
    work_dir = tmp_path / 'killed'
    code = KILLED.format(tests=str(ROOT / 'tests'), root=str(ROOT), work_dir=str(work_dir))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    partial = work_dir / swinv2_mm.engine.runner.PARTIAL
    assert partial.exists()
    assert [file.name for file in work_dir.glob('*.pth')] == ['iter_2.pth']
    continued = build(checkpoint=hook(max_keep_ckpts=1), resume=True, work_dir=work_dir)
    continued.train()
    assert continued.model.seen == whole.model.seen[2:]
    assert [file.name for file in work_dir.glob('*.pth')] == ['iter_8.pth']
    assert not partial.exists()
    for name, value in weights(work_dir / 'iter_8.pth').items():
        assert torch.equal(value, weights(tmp_path / 'whole/iter_8.pth')[name])


def test_the_seed_of_the_run_is_that_of_its_checkpoint(build, caplog):
    first = build(stop=4)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    continued = build(resume=True, seed=1)
    continued.train()
    assert continued.seed == first.seed != 1
    assert continued.train_loop.dataloader.batch_sampler.sampler.seed == first.seed


def test_averaged_weights_are_resumed(build, tmp_path):
    ema = dict(type='EMAHook', momentum=0.1)
    whole = build(custom_hooks=[ema], seed=2, work_dir=tmp_path / 'whole')
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(custom_hooks=[ema, Stop(5)], seed=2).train()
    build(custom_hooks=[ema], resume=True).train()
    one, other = (read_checkpoint(path / 'iter_8.pth') for path in (tmp_path, tmp_path / 'whole'))
    for part in ('state_dict', 'ema_state_dict'):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    assert not torch.equal(one['state_dict']['layer.bias'], one['ema_state_dict']['module.layer.bias'])


@pytest.mark.parametrize('wrapped', [True, False])
def test_a_transfer_takes_what_fits(build, tmp_path, wrapped):
    held = {'layer.weight': torch.ones(3, 4, dtype=torch.float64), 'layer.bias': torch.zeros(5, dtype=torch.float64)}
    torch.save({'state_dict': held} if wrapped else held, tmp_path / 'other.pth')
    runner = build(load_from=str(tmp_path / 'other.pth'), custom_hooks=[dict(type='EMAHook')], stop=None)
    bias = runner.model.layer.bias.detach().clone()
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.call_hook('before_run')
    runner.load_or_resume()
    assert torch.equal(runner.model.layer.weight, held['layer.weight'])
    assert torch.equal(runner.model.layer.bias, bias)
    with pytest.raises(CheckpointError):  # not to continue from, and not to test
        build().load_checkpoint(str(tmp_path / 'other.pth'))


@pytest.fixture
def state(build, tmp_path):
    """A checkpoint after three iterations, and the runner whose it is."""
    runner = build(length=3, seed=0)
    runner.train()
    return read_checkpoint(tmp_path / 'iter_3.pth'), runner


def put(checkpoint, place, value):
    """Change one value of nested dicts and lists; ``del`` removes it."""
    *path, last = place
    for key in path:
        checkpoint = checkpoint[key]
    if value == 'del':
        del checkpoint[last]
    else:
        checkpoint[last] = value


def test_damage_to_the_training_state_is_found_before_it_is_used(state):
    checkpoint, runner = state
    check_training_state(checkpoint, 'x.pth', runner.optim_wrapper, runner.param_schedulers)
    assert checkpoint['meta']['num_optimizer_states'] == 2
    adam = ('optimizer', 'state', 0)
    nan = torch.full((3, 4), torch.nan, dtype=torch.float64)
    for place, value, reason in [
        (('meta',), 'del', 'its meta is None, not a dict'),
        (adam, 'del', 'its optimizer has 1 states, and was saved with 2'),
        (('meta', 'iter'), -1, 'its iter is -1, not 0 to 4294967295'),
        (('meta', 'epoch'), 1.5, 'its epoch is 1.5'),
        (('meta', 'iter'), True, 'its iter is True'),
        (('meta', 'seed'), 'x', "its seed is 'x'"),
        (('message_hub',), 'del', 'its message_hub has no log_scalars'),
        (('message_hub', 'runtime_info'), [], 'its message_hub has no runtime_info'),
        (('message_hub', 'log_scalars', 'train/loss'), 3, "has no history of 'train/loss'"),
        (('optimizer',), 'del', 'its optimizer has no state and param_groups'),
        (('optimizer', 'state'), {}, 'the state of its optimizer is empty'),
        (('optimizer', 'state', 7), {}, 'a state of parameter 7, which is in no group'),
        (adam, {}, 'the state of parameter 0 is incomplete'),
        ((*adam, 'exp_avg_sq'), 'del', 'the state of parameter 0 is incomplete'),
        ((*adam, 'exp_avg'), torch.zeros(4, 3), r'exp_avg of parameter 0 .* shape \(4, 3\), in this run \(3, 4\)'),
        ((*adam, 'exp_avg'), nan, 'exp_avg of parameter 0 in its optimizer is not finite'),
        ((*adam, 'exp_avg'), 1.0, 'exp_avg of parameter 0 in its optimizer is 1.0, not a tensor'),
        ((*adam, 'step'), torch.tensor(torch.inf), 'step of parameter 0 in its optimizer is not finite'),
        (('optimizer', 'param_groups'), [], 'its optimizer has 0 parameter groups, this run 1'),
        (('optimizer', 'param_groups', 0, 'params'), [0], 'group 0 of its optimizer has 1 parameters, this run 2'),
        (('optimizer', 'param_groups', 0, 'params'), [[], 1], 'group 0 of its optimizer is damaged'),
        (('optimizer', 'param_groups', 0, 'lr'), 'del', 'lr of group 0 is None, not a finite number'),
        (('optimizer', 'param_groups', 0, 'lr'), torch.nan, 'lr of group 0 is nan, not a finite number'),
        (('param_schedulers',), 'del', 'it has 0 parameter schedulers, and this config makes 2'),
        (('param_schedulers',), {}, 'it has 0 parameter schedulers'),
        (('param_schedulers',), 'x', 'its param_schedulers is a str'),
        (('meta', 'seed'), 2**32, 'its seed is 4294967296, not 0 to 4294967295'),
        (('meta', 'iter'), 2**70, 'its iter is 1180591620717411303424, not 0 to'),
        (
            ('message_hub', 'resumed_keys', 'train/loss'),
            False,
            "resumed_keys of its message_hub do not have 'train/loss'",
        ),
        (('message_hub', 'resumed_keys'), {}, 'resumed_keys of its message_hub do not have'),
        (
            ('param_schedulers', 0, 'begin'),
            OrderedDict(),
            'begin of its parameter scheduler 0 is a OrderedDict, here 0',
        ),
        (('param_schedulers', 1, 'end'), torch.ones(2), 'end of its parameter scheduler 1 is a Tensor, here 9'),
        (('param_schedulers', 1, 'factor'), torch.nan, 'factor of its parameter scheduler 1 is nan, here'),
        (
            ('param_schedulers', 0, 'param_name'),
            1j,
            "param_name of its parameter scheduler 0 is a complex, here 'lr'",
        ),
        (
            ('param_schedulers', 0, 'param_name'),
            'x',
            "param_name of its parameter scheduler 0 is 'x', here 'lr'",
        ),
        (('ema_state_dict',), {1: 2}, "TypeError: 'int' object is not subscriptable"),
        (('param_schedulers', 0), None, 'last_step of its parameter scheduler 0 is None, not -1 or more'),
    ]:
        damaged = copy.deepcopy(checkpoint)
        put(damaged, place, value)
        with pytest.raises(CheckpointError, match=f'checkpoint x.pth cannot be resumed with this config: .*{reason}'):
            check_training_state(damaged, 'x.pth', runner.optim_wrapper, runner.param_schedulers)


def test_numbers_of_eight_bits_are_checked_too(state):
    checkpoint, runner = state
    for value in (1.0, torch.nan):
        checkpoint['optimizer']['state'][0]['step'] = torch.tensor(value).to(torch.float8_e4m3fn)
        finite = contextlib.nullcontext() if value == 1 else pytest.raises(CheckpointError, match='is not finite')
        with finite:
            check_training_state(checkpoint, 'x.pth', runner.optim_wrapper, runner.param_schedulers)
        model = torch.nn.BatchNorm1d(3)
        weights = {**model.state_dict(), 'other': torch.full((2,), value).to(torch.float8_e4m3fn)}
        with pytest.raises(CheckpointError, match='other, which the model' if value == 1 else 'other holds NaN'):
            load_model(model, {'state_dict': weights}, 'x.pth')


def test_the_states_of_several_optimizers_are_checked(state):
    checkpoint, runner = state
    wrappers = OptimWrapperDict(a=runner.optim_wrapper, b=runner.optim_wrapper)
    schedulers = dict(a=runner.param_schedulers, b=runner.param_schedulers)
    both = dict(checkpoint, optimizer=wrappers.state_dict(), param_schedulers=dict(a=[{}], b=[{}]))
    both['meta'] = dict(checkpoint['meta'], num_optimizer_states=4)
    both['param_schedulers'] = {name: [one.state_dict() for one in of] for name, of in schedulers.items()}
    check_training_state(both, 'x.pth', wrappers, schedulers)
    with pytest.raises(CheckpointError, match='its optimizer is not of a, b'):
        check_training_state(checkpoint, 'x.pth', wrappers, schedulers)
    both['optimizer']['b']['param_groups'] = []
    with pytest.raises(CheckpointError, match='0 parameter groups'):
        check_training_state(both, 'x.pth', wrappers, schedulers)


def test_a_scheduler_whose_best_value_is_infinite_is_resumed(state):
    checkpoint, runner = state
    plateau = ReduceOnPlateauLR(runner.optim_wrapper.optimizer, monitor='loss')
    for best in (torch.inf, 0.5):
        plateau.best = best
        held = dict(checkpoint, param_schedulers=[plateau.state_dict()])
        own = ReduceOnPlateauLR(runner.optim_wrapper.optimizer, monitor='loss')
        check_training_state(held, 'x.pth', runner.optim_wrapper, [own])


def test_optimizers_without_a_state_are_resumed(state):
    checkpoint, runner = state
    for momentum in (0, 0.9):
        optimizer = torch.optim.SGD(runner.model.parameters(), 0.1, momentum=momentum)
        runner.model.layer(torch.ones(1, 4).double()).sum().backward()
        optimizer.step()
        held = dict(checkpoint, optimizer=optimizer.state_dict(), meta=dict(epoch=0, iter=1))
        check_training_state(held, 'x.pth', OptimWrapper(optimizer), False)


@pytest.mark.parametrize('damage', ['optimizer', 'loads'])
def test_a_damaged_state_ends_a_resume_with_one_line_before_it_trains(build, tmp_path, damage, monkeypatch):
    build(length=3).train()
    checkpoint = read_checkpoint(tmp_path / 'iter_3.pth')
    if damage == 'optimizer':
        checkpoint['optimizer']['state'][0]['exp_avg'] *= torch.nan
    else:  # what only mmengine stumbles upon
        checkpoint['message_hub']['runtime_info'] = dict(checkpoint['message_hub']['runtime_info'], loss={})
        monkeypatch.setattr('mmengine.logging.MessageHub.load_state_dict', lambda *args: {}['gone'])
    torch.save(checkpoint, tmp_path / 'iter_3.pth')
    runner = build(length=6, resume=True, load_from=str(tmp_path / 'iter_3.pth'))
    with pytest.raises(CheckpointError) as error:
        runner.train()
    assert str(error.value).startswith(f'checkpoint {tmp_path}/iter_3.pth cannot be resumed with this config: ')
    assert '\n' not in str(error.value)
    assert runner.model.seen == []


def test_nothing_of_a_checkpoint_is_run(build, tmp_path):
    build(length=3).train()
    checkpoint = read_checkpoint(tmp_path / 'iter_3.pth')
    checkpoint['meta']['config'] = f'open({str(tmp_path / "ran")!r}, "w")'
    torch.save(checkpoint, tmp_path / 'iter_3.pth')
    build(length=4, resume=True).train()
    assert not (tmp_path / 'ran').exists()


SMALL = [f'{split}_dataloader.dataset.pipeline.{i}.scale=(96,96)' for split, i in (('train', 2), ('val', 1))]
DETECTOR = """
_base_ = {base!r}
model = dict(backbone=dict(drop_path_rate=0.3))
train_dataloader = dict(batch_size=2, num_workers={workers}, persistent_workers={workers} > 0, {sampler})
train_cfg = dict(_delete_=True, type={loop!r}, {length}, val_interval=1 if {by_epoch} else 3)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=6)]
default_hooks = dict(
    checkpoint=dict(by_epoch={by_epoch}, interval=1 if {by_epoch} else 2, max_keep_ckpts=1, save_best='coco/bbox_mAP'),
    logger=dict(interval=1, log_metric_by_epoch=False),
)
log_processor = dict(by_epoch=False, window_size=1)
runner_type = 'SwinV2Runner'
"""


@pytest.mark.parametrize(('by_epoch', 'workers', 'stop'), [(False, 2, 5), (True, 0, 5)])
def test_a_detector_that_is_stopped_and_resumed_is_the_one_that_is_not(
    shapes, tmp_path, load_tool, by_epoch, workers, stop
):
    config = tmp_path / 'detector.py'
    config.write_text(
        DETECTOR.format(
            base=str(ROOT / 'configs/demo/mask-rcnn_swinv2_shapes.py'),
            workers=workers,
            by_epoch=by_epoch,
            loop='EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop',
            length='max_epochs=2' if by_epoch else 'max_iters=6',
            sampler="sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True), "
            "batch_sampler=dict(_delete_=True, type='AspectRatioBatchSampler')",
        )
    )
    train = load_tool('train')

    def run(folder, *flags, stop=None):
        common = [config, '--data-root', shapes, '--work-dir', tmp_path / folder, *flags, '--cfg-options', *SMALL]
        cfg = train.prepare(train.parse_args(list(map(str, common))))
        cfg.experiment_name = f'{folder}_{len(flags)}'
        runner = SwinV2Runner.from_cfg(cfg)
        runner.register_hook(hook := Stop(stop))
        with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
            runner.train()
        return hook.losses

    whole = run('whole', '--seed', '3')
    assert len(whole) == (8 if by_epoch else 6)
    assert run('parts', '--seed', '3', stop=stop) == whole[:stop]
    assert run('parts', '--resume') == whole[4:]
    name = 'epoch_2.pth' if by_epoch else 'iter_6.pth'
    one, other = (read_checkpoint(tmp_path / folder / name) for folder in ('whole', 'parts'))
    assert all(torch.equal(one['state_dict'][name], other['state_dict'][name]) for name in one['state_dict'])
    for index, entry in one['optimizer']['state'].items():
        assert all(torch.equal(value, other['optimizer']['state'][index][name]) for name, value in entry.items())


def test_a_second_run_in_a_folder_is_one_line(load_tool, shapes, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'run'
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from swinv2_mm.engine import run_folder
run_folder.lock_work_dir({str(folder)!r})
print('locked', flush=True)
sys.stdin.read()
"""
    config = str(ROOT / 'configs/demo/mask-rcnn_swinv2_shapes.py')
    monkeypatch.setattr(sys, 'argv', ['train', config, '--data-root', str(shapes), '--work-dir', str(folder)])
    with subprocess.Popen(
        [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == 'locked\n'
        before = os.listdir(folder)
        with pytest.raises(SystemExit) as ended:
            load_tool('train').main()
        first.kill()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f'error: another run is writing to {folder}: wait for its end or name another folder with --work-dir\n'
    )
    assert os.listdir(folder) == before
    run_folder.lock_work_dir(folder)  # killed, it holds nothing


def test_a_folder_that_cannot_be_made_is_one_line():
    with pytest.raises(ValueError, match='/dev/null/run cannot be written to: Not a directory: name another folder'):
        run_folder.lock_work_dir('/dev/null/run')


def test_what_the_hosts_do_with_a_runner_still_works(build, tmp_path):
    """Loops and data of their own, copies of loaders, names that are revised, a folder with another file."""
    torch.save({'state_dict': {'w': torch.ones(1)}}, tmp_path / 'pretrained.pth')
    runner = build(length=2, seed=0, sampler='DefaultSampler')
    runner._resume = True  # and there is no checkpoint of a run
    runner.train()
    assert runner.iter == 2
    copied = copy.deepcopy(runner.train_dataloader)
    assert len(copied.batch_sampler) == len(runner.train_dataloader.batch_sampler)
    for hook in runner.hooks:
        copy.deepcopy(hook)
    held = read_checkpoint(tmp_path / 'iter_2.pth')
    held['state_dict'] = {f'net.{name}': value for name, value in held['state_dict'].items()}
    torch.save(held, tmp_path / 'other.pth')
    other = build(seed=1)
    other.load_checkpoint(str(tmp_path / 'other.pth'), revise_keys=[(r'^net\.', '')])
    assert torch.equal(other.model.layer.weight, runner.model.layer.weight)


def test_data_that_loads_its_batches_itself_or_is_a_list_is_seeded_as_far_as_it_goes():
    class Batched(list):
        def __getitems__(self, indices):
            return [(index, random.random()) for index in indices]

    for data in (Batched(range(6)), list(range(6))):
        loaded = []
        for _ in range(2):
            loader = DataLoader(data, batch_size=2, collate_fn=list)
            number_batches(loader, (0, 0), first=0, skip=0, endless=False)
            loaded.append(list(loader))
            if isinstance(data, Batched):
                del data.__getitems__
        assert loaded[0] == loaded[1] and len(loaded[0]) == 3


class Kind(enum.Enum):
    DAY = 1


def test_a_run_whose_metadata_holds_any_python_object_is_resumed(build, tmp_path):
    """What is a plain value comes back, the rest is left out."""
    runner = build(length=2, seed=0)
    plain = dict(
        byte=np.uint8(3),
        flag=np.bool_(True),
        half=np.float16(0.5),
        text=np.str_('a'),
        palette=np.eye(3, dtype=np.uint8),
    )
    for name, value in {**plain, 'path': Path('a'), 'kind': Kind.DAY}.items():
        runner.message_hub.update_info(name, value)
    runner.train()
    resumed = build(length=3, seed=0)
    resumed._load_from, resumed._resume = str(tmp_path / 'iter_2.pth'), True
    resumed.train()
    assert resumed.iter == 3
    held = resumed.message_hub.runtime_info
    assert {name: held[name] for name in ('byte', 'flag', 'half', 'text')} == {
        n: plain[n] for n in plain if n != 'palette'
    }
    assert np.array_equal(held['palette'], plain['palette'])
    assert not {'path', 'kind'} & set(held)
