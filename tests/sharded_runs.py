"""What test_sharding.py runs in several processes, and in one to compare with: a small model, trained by a runner.

As a command, ``torchrun --nproc_per_node=N tests/sharded_runs.py FOLDER ACTION [ACTION ...]``, an action being one of
`RUNS` or a function below. What each process notes is in ``FOLDER/ACTION/RANK.json``.
"""

import itertools
import json
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine._strategy import BaseStrategy
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import nn
from torch.utils.data import Dataset

import swinv2_mm.backbone
from swinv2_mm.engine.launch import init_distributed
from swinv2_mm.engine.model_weights import unwrapped
from swinv2_mm.engine.runner import runner_class
from swinv2_mm.engine.sharding import bytes_held

ROOT = Path(__file__).parents[1]
IMAGES, BATCH, STEPS = 8, 4, 4
BACKBONE = dict(
    type='SwinTransformerV2',
    arch=dict(embed_dims=16, depths=(1, 2, 1, 2), num_heads=(1, 2, 4, 8), extra_norm_every_n_blocks=2),
    window_size=4,
    drop_path_rate=0.0,
)
NUMBERS = itertools.count()  # make names of experiments unique, of which mmengine keeps state
ADAMW = dict(type='AdamW', lr=1e-2, weight_decay=0.1)
OURS = dict(constructor='SwinV2OptimWrapperConstructor')
RUNS = {
    'killed': {},
    'clipped': dict(optim_wrapper=dict(clip_grad=dict(max_norm=0.05))),
    'accumulated': dict(optim_wrapper=dict(accumulative_counts=2), strategy=dict(checkpoints='whole')),
    'layer decay': dict(
        model=dict(backbone=dict(frozen_stages=2, with_cp=True)),
        optim_wrapper=dict(**OURS, paramwise_cfg=dict(decay_rate=0.8, custom_keys=dict(head=dict(lr_mult=2)))),
        auto_scale_lr=dict(enable=True, base_batch_size=8),
    ),
    'unused parts': dict(
        model=dict(backbone=dict(out_indices=(0, 1), frozen_stages=1, with_cp=True), spare='none'),
        dataset=dict(unequal=True),
    ),
    'parts of some processes': dict(model=dict(spare='even'), find_unused_parameters=True),
    'bfloat16': dict(
        model=dict(half=True, backbone=dict(with_cp=True)),
        optim_wrapper=dict(type='BFloat16OptimWrapper', optimizer=dict(type='SGD', lr=1e-2)),
    ),
}


RESUMED = 'clipped', 'accumulated', 'layer decay'


@DATASETS.register_module()
class Noise(Dataset):
    """Images of random values, in sizes that differ from step to step, or between the images of a step."""

    def __init__(self, unequal=False):
        self.unequal = unequal

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        height = 24 + 16 * (i % BATCH if self.unequal else i // BATCH)
        return dict(index=i, inputs=torch.randn(3, height, 56, generator=torch.Generator().manual_seed(i)))


@MODELS.register_module()
class Regressor(BaseModel):
    """A backbone and a linear head on each map; the loss is the mean over the images, each taken on its own.

    A spare layer is for images of even index, which the first of two processes gets, or for none.
    """

    def __init__(self, backbone, spare=None, half=False, scalar=False):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        channels = [self.backbone.arch.embed_dims * 2**i for i in self.backbone.out_indices]
        self.head = nn.ModuleList(nn.Conv2d(size, 2, 1) for size in channels)
        self.spare, self.for_even = nn.Linear(3, 5) if spare else None, spare == 'even'
        self.scale = nn.Parameter(torch.ones(())) if scalar else None
        self.to(torch.float32 if half else torch.float64)

    def init_weights(self):
        super().init_weights()
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def extract_feat(self, image):
        self.keeps_casts = torch.is_autocast_cache_enabled()
        return self.backbone(image)

    def forward(self, inputs, index, mode):
        losses = []
        for i, image in zip(index, inputs):
            maps = self.extract_feat(image.to(self.head[0].weight.dtype)[None])
            losses.append(sum((head(x) - 1).square().mean() for head, x in zip(self.head, maps)))
            if self.for_even and i % 2 == 0:
                losses[-1] = losses[-1] + self.spare(image.to(losses[-1].dtype).mean((1, 2))).square().mean()
        return dict(loss=torch.stack(losses).mean())


class Count(Hook):
    """Notes the loss of each step, the norm of its gradients, and the bytes of what the optimizer has."""

    def before_train(self, runner):
        self.noted = dict(losses=[], norms=[], keeps_casts=[])
        runner.optim_wrapper.optimizer.register_step_pre_hook(self.count)

    def count(self, optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        self.noted['parameters'] = bytes_held(parameters)
        self.noted['gradients'] = bytes_held(p.grad for p in parameters if p.grad is not None)
        state = [x for entry in optimizer.state.values() for x in entry.values() if x.ndim]
        self.noted['state'] = bytes_held(state)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.noted['keeps_casts'].append(unwrapped(runner.model).keeps_casts)
        self.noted['losses'].append(float(outputs['loss'].detach()))
        if 'train/grad_norm' in runner.message_hub.log_scalars:
            self.noted['norms'].append(runner.message_hub.get_scalar('train/grad_norm').current())


class Killed(Hook):
    """Kills the last process in the third step."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2 and runner.rank == runner.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def build(run, folder, launcher='none', steps=STEPS, resume=False, sharded=True, **backbone):
    """The runner of a run. It saves a checkpoint after `STEPS` steps; those that are looked at, after every second."""
    changes = RUNS[run]
    every = 2 if run in ('killed', 'clipped') else STEPS
    processes = dist.get_world_size() if dist.is_initialized() else 1
    cfg = Config(
        dict(
            model=dict(
                dict(type='Regressor', **changes.get('model', {})),
                backbone=dict(BACKBONE, **changes.get('model', {}).get('backbone', {}), **backbone),
            ),
            work_dir=str(Path(folder, run)),
            experiment_name=f'{run} {next(NUMBERS)}',
            train_dataloader=dict(
                batch_size=BATCH // processes,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(type='Noise', **changes.get('dataset', {})),
            ),
            optim_wrapper=dict(dict(type='OptimWrapper', optimizer=ADAMW), **changes.get('optim_wrapper', {})),
            train_cfg=dict(by_epoch=False, max_iters=steps),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=every, save_last=False)),
            env_cfg=dict(),
            randomness=dict(seed=0),
            launcher=launcher,
            resume=resume,
            default_scope='mmengine',
            find_unused_parameters=changes.get('find_unused_parameters', False),
            auto_scale_lr=changes.get('auto_scale_lr'),
        ),
        format_python_code=False,  # for the log, which takes long
    )
    if not sharded:
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, find_unused_parameters=True)
    elif processes > 1:
        cfg.runner_type = 'FlexibleRunner'
        cfg.strategy = dict(type='SwinV2FSDPStrategy', **changes.get('strategy', {}))
    return runner_class(cfg).from_cfg(cfg)


def train(*args, **kwargs):
    """Train. Returns what `Count` noted."""
    runner, count = build(*args, **kwargs), Count()
    runner.register_hook(count)
    runner.prepare()
    runner.train()
    return count.noted


def run_and_resume(run, folder):
    noted = train(run, folder, 'pytorch')
    if run in RESUMED:
        noted['resumed'] = train(run, folder, 'pytorch', STEPS + 2, resume=True)['losses']
    return noted


def data_parallel(folder):
    """Train by DDP what has parts without gradients, with blocks that run on several parts of the map."""
    swinv2_mm.backbone.PART_SIZE = 600
    return train('unused parts', folder / 'ddp', 'pytorch', sharded=False)


def kill_one(folder):
    """Train until one process is killed."""
    runner = build('killed', folder, 'pytorch')
    runner.register_hook(Killed())
    runner.prepare()
    runner.train()


def resume_killed(folder):
    """Continue after `kill_one`."""
    return train('killed', folder, 'pytorch', resume=True)


def resume_clipped(folder):
    """Continue a run of another number of processes, from a sharded checkpoint."""
    return train('clipped', folder / 'other', 'pytorch', STEPS + 2, resume=True)


def mistakes(folder):
    """The errors of checkpoints that do not fit, each in a fresh runner, in this process."""
    init_cfg = dict(type='Pretrained', checkpoint=str(folder / 'small.pth'))
    small = dict(BACKBONE['arch'], depths=(1, 1, 1, 2))
    scalar = build('clipped', folder / 'wrong', 'pytorch')
    scalar.model['scalar'] = True
    return [
        error_of(scalar),
        error_of(build('clipped', folder / 'wrong', 'pytorch', init_cfg=init_cfg)),
        error_of(build('clipped', folder, 'pytorch', STEPS + 2, resume=True, arch=small)),
        error_of(build('accumulated', folder, 'pytorch', STEPS + 2, resume=True, arch=small)),
    ]


def error_of(runner):
    try:
        runner.prepare()
        runner.train()
    except ValueError as error:
        return str(error)
    return None


def window_after_loading(folder):
    """The pretrained windows that each process uses, of weights that one process has read."""
    init_cfg = dict(type='Pretrained', checkpoint=str(folder / 'trained.pth'))
    runner = build('clipped', folder / 'loaded', 'pytorch', init_cfg=init_cfg)
    runner.prepare()
    backbone = runner.strategy.model.backbone
    return list(backbone.pretrained_window_sizes), backbone.pretrained_windows.tolist()


def sent_in_a_step(folder):
    """The bytes that this process sends in a training step of a backbone."""
    sys.path[:0] = [str(ROOT / 'tools'), str(ROOT / 'tools/misc')]
    import measure_sharding

    arch = {key: value for key, value in BACKBONE['arch'].items() if key != 'type'}
    strategy = measure_sharding.prepare(Namespace(arch=arch, window_size=4, checkpoint=None), str(folder / 'sent'))
    with measure_sharding.Sent() as sent:
        measure_sharding.step(strategy, 64, half=False)
    return sent.bytes


if __name__ == '__main__':
    torch.set_num_threads(1)
    BaseStrategy.collect_env = lambda self: ({}, {})  # which takes a second per run
    init_distributed(Config(), 'pytorch')
    folder = Path(sys.argv[1])
    for action in sys.argv[2:]:
        noted = run_and_resume(action, folder) if action in RUNS else globals()[action](folder)
        (folder / action).mkdir(exist_ok=True)
        (folder / action / f'{dist.get_rank()}.json').write_text(json.dumps(noted))
        dist.barrier()
    os._exit(0)  # gloo can deadlock where it is torn down
