"""Which strategies of mmengine's `FlexibleRunner` can run here, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from mmengine._strategy import BaseStrategy
from mmengine.config import Config
from mmengine.device import is_cuda_available
from mmengine.dist import is_distributed
from mmengine.registry import STRATEGIES

from .. import compat
from ..checkpoints import sharded
from ..checks.registered import class_name, did_you_mean

OURS = 'SwinV2FSDPStrategy'
NEEDS = {'DeepSpeedStrategy': 'deepspeed', 'ColossalAIStrategy': 'colossalai'}  # package of a strategy of mmengine
SHARDED = OURS, 'FSDPStrategy'


def strategy_class(strategy: Mapping | None) -> type[BaseStrategy] | None:
    """The class of a strategy in a config; None if there is none.

    Raises:
        ValueError: there is no such strategy, or what it needs is too old or not installed.
    """
    if not strategy:
        return None
    named = strategy.get('type') if isinstance(strategy, Mapping) else None
    if named is None:
        raise ValueError(f'strategy of the config is {strategy!r}: must be a dict with its type, as strategy.type=NAME')
    name = class_name(named)
    if name in SHARDED:
        compat.require(sharded.NEEDED, f'strategy {name} of the config')
    package = NEEDS.get(name)
    if package and find_spec(package) is None:
        raise ValueError(
            f'strategy {name} of the config needs {package}, which is not installed: pip install {package}, or set '
            "strategy.type='SwinV2FSDPStrategy'"
        )
    found = named if isinstance(named, type) else STRATEGIES.get(named) if isinstance(named, str) else None
    if found is None:
        raise ValueError(f'there is no strategy {named!r}{did_you_mean(name, STRATEGIES.module_dict)}')
    return found


def check_strategy(cfg: Config) -> None:
    """Check that the rest of a config suits its strategy. For a config whose runner is a `FlexibleRunner`.

    Raises:
        ValueError: the strategy needs several processes or a GPU and has none, or something in the config would have
            no effect or a wrong one under it; the message says what to do.
    """
    kind = strategy_class(cfg.get('strategy'))
    if cfg.get('compile'):
        raise ValueError('compile of the config has no effect in a FlexibleRunner: leave it out, or use a Runner')
    if kind is None:
        return
    if kind.__name__ == OURS:
        _check_ours(cfg)
    elif kind.__name__ == 'FSDPStrategy':
        if not is_cuda_available():
            raise ValueError("strategy FSDPStrategy needs GPUs: use strategy.type='SwinV2FSDPStrategy', which does not")
        if (cfg.get('optim_wrapper') or {}).get('clip_grad'):
            raise ValueError(
                'optim_wrapper.clip_grad of the config with strategy FSDPStrategy: each process would clip by the norm '
                "of its own piece: use strategy.type='SwinV2FSDPStrategy'"
            )
    if kind.__name__ != 'SingleDeviceStrategy' and not is_distributed():
        raise ValueError(start_several(kind.__name__))


def _check_ours(cfg):
    """Check what `SwinV2FSDPStrategy` can't do."""
    for i, hook in enumerate(cfg.get('custom_hooks') or []):
        if class_name(hook.get('type')) == 'EMAHook':
            raise ValueError(
                f'custom_hooks.{i} of the config is EMAHook, which copies the whole model, and a sharded model cannot '
                'be copied: leave it out, or train unsharded'
            )
    saving = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if saving.get('backend_args') or saving.get('file_client_args') or '://' in str(saving.get('out_dir')):
        raise ValueError(
            'default_hooks.checkpoint of the config saves through a file backend, and a sharded model is saved to a '
            'disk: leave out_dir, backend_args and file_client_args out'
        )
    if class_name((cfg.get('optim_wrapper') or {}).get('type')) == 'AmpOptimWrapper':
        raise ValueError(
            'optim_wrapper AmpOptimWrapper of the config scales the loss, which is not made for sharded gradients: use '
            '--amp bf16'
        )
    if not cfg.get('val_cfg'):
        return
    # Whatever calls the backbone gathers its parameters from all processes, so all have to call it equally often.
    if (cfg.model.get('test_cfg') or {}).get('mode') == 'slide':
        raise ValueError(
            "model.test_cfg.mode of the config is 'slide', which calls the backbone more often for larger images, and "
            'in sharded training all processes have to call it equally often: validate with model.test_cfg.mode=whole, '
            'and test with tools/test.py'
        )
    if ((cfg.get('val_dataloader') or {}).get('sampler') or {}).get('round_up') is False:
        raise ValueError(
            'val_dataloader.sampler.round_up of the config is False, and in sharded training all processes need '
            'equally many images: leave it out'
        )


def start_several(kind: str) -> str:
    """What to do where a strategy for several processes has one."""
    return (
        f'strategy {kind} of the config is for several processes, and there is one: start them with torchrun '
        '--nproc_per_node=N and --launcher pytorch, or train in one with --cfg-options runner_type=Runner strategy=None'
    )
