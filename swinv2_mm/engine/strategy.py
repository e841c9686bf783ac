"""Sharded training as a strategy of mmengine's `FlexibleRunner`, and which strategies can run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine._strategy import BaseStrategy, DDPStrategy
from mmengine.config import Config
from mmengine.device import get_device, is_cuda_available
from mmengine.dist import get_rank, is_distributed
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS, STRATEGIES
from torch import nn

from .. import compat
from ..backbone import SwinTransformerV2
from ..checkpoints import sharded
from ..checkpoints.files import read_checkpoint, read_training_state, sharded_shapes
from ..checks.registered import did_you_mean
from ..writing import whole
from .main_process import in_main_process
from .resumable import PARTIAL
from .sharding import gather, is_sharded, named_tensors, scatter, shard, with_backbones_on_meta
from .training_state import check_training_state, unresumable

CHECKPOINTS = 'sharded', 'whole'
NEEDS = {'DeepSpeedStrategy': 'deepspeed', 'ColossalAIStrategy': 'colossalai'}  # package of a strategy of mmengine
SHARDED = 'SwinV2FSDPStrategy', 'FSDPStrategy'


@STRATEGIES.register_module()
class SwinV2FSDPStrategy(DDPStrategy):
    """Trains with parameters, gradients and optimizer state sharded among all processes, by PyTorch's `fully_shard`.

    Each block of the backbone is a unit (`sharding.units`). For `SwinV2FlexibleRunner`. Initial weights are in the
    memory of the first process alone, which scatters them; the backbones of the others are built without memory.

    Args:
        checkpoints (str): how checkpoints are saved. ``sharded``: as a folder that all processes write. ``whole``: as a
            file that the first process writes, the same as a run without sharding; the model and the optimizer have to
            fit into its memory.
        sync_bn (str, optional), work_dir (str), ...: as of mmengine's `DDPStrategy`; without ``model_wrapper``, because
            nothing is wrapped.

    Raises:
        ValueError: an argument is wrong, PyTorch is too old, or there is one process.
    """

    def __init__(self, *, checkpoints: str = 'sharded', **kwargs):
        compat.require(sharded.NEEDED, 'strategy SwinV2FSDPStrategy')
        if checkpoints not in CHECKPOINTS:
            raise ValueError(
                f'checkpoints of SwinV2FSDPStrategy must be {" or ".join(CHECKPOINTS)}, got {checkpoints!r}'
            )
        try:
            super().__init__(**kwargs)
        except TypeError as error:
            raise ValueError(f'strategy SwinV2FSDPStrategy of the config: {error}') from error
        if self.model_wrapper is not None:
            raise ValueError('strategy SwinV2FSDPStrategy wraps nothing: leave model_wrapper out')
        if self.world_size < 2:
            raise ValueError(_start_several('SwinV2FSDPStrategy'))
        self.checkpoints = checkpoints
        # The runner may replace both. The first process calls them: to read a whole checkpoint, and before sharding.
        self.read: Callable[[str], dict] = read_checkpoint
        self.load_weights: Callable[[nn.Module], None] = lambda model: None

    def build_model(self, model: nn.Module | Mapping) -> nn.Module:
        """Build the model: whole in the first process, in others with backbones on the meta device."""
        if isinstance(model, nn.Module):
            return model
        return MODELS.build(model if get_rank() == 0 else with_backbones_on_meta(model))

    def _init_model_weights(self, model):
        def init():
            if hasattr(model, 'init_weights'):
                model.init_weights()
            self.load_weights(model)

        in_main_process(init)
        return model

    def _wrap_model(self, model):
        device = torch.device(get_device())
        model = self.convert_model(model)
        for module in model.modules():
            if isinstance(module, BaseDataPreprocessor):
                module.to(device)
        values = named_tensors(model) if get_rank() == 0 else {}
        shard(model, device)
        backbones = [module for module in model.modules() if isinstance(module, SwinTransformerV2)]
        for backbone in backbones:
            if any(parameter.is_meta for parameter in backbone.parameters()):
                backbone.to_empty(device=device)
        model.to(device)
        for name, own in named_tensors(model).items():
            scatter(own, values.pop(name, None))  # so that the whole model leaves the first process piece by piece
        _know_windows(backbones)
        return model

    def model_state_dict(self) -> dict:
        """The state dict of the model, of sharded parameters the pieces of this process."""
        return self.model.state_dict()

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Callable[[dict], None] | None = None,
    ) -> None:
        """Save a checkpoint, whole or not at all; all processes call it. Arguments as of `BaseStrategy`.

        Raises:
            OSError: it can't be written.
        """
        checkpoint = dict(extra_ckpt or {}, state_dict=self.model_state_dict())
        checkpoint['meta'] = dict(checkpoint.get('meta') or {}, seed=self.seed)
        if save_optimizer:
            checkpoint['optimizer'] = self.optim_state_dict()
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            checkpoint['param_schedulers'] = self.scheduler_state_dict()
        if callback is not None:
            callback(checkpoint)
        if self.checkpoints == 'sharded':
            sharded.write_sharded(checkpoint, filename, PARTIAL)
            return
        rest, tensors = sharded.without_state(checkpoint)
        tensors = gather(tensors)
        if get_rank() == 0:
            with whole(Path(filename), PARTIAL, sync=True) as partial:
                torch.save(sharded.with_state(rest, tensors), partial)

    def resume(
        self,
        filename: str,
        *,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: str = 'default',
        callback: Callable[[dict], None] | None = None,
    ) -> dict:
        """Continue from a checkpoint that any number of processes wrote, sharded or whole; all processes call it.

        The weights of a whole one are those of the model already, by ``load_weights``.

        Args:
            filename (str), resume_optimizer (bool), resume_param_scheduler (bool), map_location (str), callback
                (Callable): as of `BaseStrategy`; ``map_location`` has no effect.

        Returns:
            dict: what it holds beside weights.

        Raises:
            CheckpointError: it can't be read, or is not of this config.
        """
        schedulers = getattr(self, 'param_schedulers', None) if resume_param_scheduler else False

        def checked(checkpoint):
            check_training_state(checkpoint, filename, self.optim_wrapper if resume_optimizer else None, schedulers)
            return checkpoint

        if sharded.is_sharded_checkpoint(filename):
            checkpoint = checked(self._load_sharded(filename, resume_optimizer))
            if callback is not None:
                callback(checkpoint)
        else:
            checkpoint = self._scattered(lambda: checked(self.read(filename)))
        if resume_optimizer:
            self.load_optim_state_dict(checkpoint.pop('optimizer'))
        if schedulers:
            self.load_scheduler_state_dict(checkpoint.pop('param_schedulers'))
        if getattr(self.optim_wrapper, '_accumulative_counts', 1) > 1:
            iteration, last = checkpoint['meta']['iter'], self.dispatch_kwargs['max_iters']
            self.optim_wrapper.initialize_count_status(self.model, iteration, last)
        return checkpoint

    def _load_sharded(self, folder, resume_optimizer):
        """Load the weights of a sharded checkpoint, each process its pieces. Returns its contents, in such pieces."""
        rest, held = read_training_state(folder), sharded_shapes(folder)
        tensors = {f'{sharded.WEIGHT}{name}': own for name, own in self.model.state_dict().items()}
        theirs = {name for name in held if name.startswith(sharded.WEIGHT)}
        for name in sorted(theirs ^ set(tensors)):
            who = 'it lacks' if name in tensors else 'the model has no'
            raise unresumable(folder, f'{who} {name[len(sharded.WEIGHT) :]}')
        if resume_optimizer:
            for name in sorted(set(held) - theirs):  # in the same order in all processes, as whatever they gather
                tensors[name] = self._like(name, *held[name])
        for name, own in tensors.items():
            if own.shape != held[name][0] or own.dtype != held[name][1]:
                shown = tuple(held[name][0]), held[name][1], tuple(own.shape), own.dtype
                raise unresumable(folder, '{} has shape {} and {}, here {} and {}'.format(name, *shown))
        sharded.load_tensors(folder, tensors, together=True)
        _know_windows(module for module in self.model.modules() if isinstance(module, SwinTransformerV2))
        return sharded.with_state(rest, tensors)

    def _scattered(self, read):
        """The contents of a whole checkpoint without weights. The first process reads it, and scatters the state."""
        tensors = {}

        def described():
            rest, found = sharded.without_state(read())
            tensors.update((name, value) for name, value in found.items() if name.startswith(sharded.STATE))
            return rest, [(name, value.shape, value.dtype) for name, value in tensors.items()]

        rest, names = in_main_process(described)
        state = {name: self._like(name, shape, dtype) for name, shape, dtype in names}
        for name, own in state.items():
            scatter(own, tensors.get(name))
        return sharded.with_state(rest, state)

    def _like(self, name, shape, dtype):
        """An empty tensor for a value of the optimizer's state: sharded as the parameter whose shape it has."""
        index = int(name[len(sharded.STATE) :].partition('.')[0])
        parameters = [p for group in self.optim_wrapper.optimizer.param_groups for p in group['params']]
        parameter = parameters[index] if index < len(parameters) else None
        if parameter is not None and is_sharded(parameter) and parameter.shape == shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)


def _know_windows(backbones):
    """Have backbones use the pretrained windows that their buffers got."""
    for backbone in backbones:
        backbone.set_pretrained_window_sizes(backbone.pretrained_windows.tolist())


def _name(kind):
    """The name of a class that a config names, by text or by itself."""
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def strategy_class(strategy: Mapping | None) -> type[BaseStrategy] | None:
    """The class of a strategy in a config; None if there is none.

    Raises:
        ValueError: there is no such strategy, or what it needs is too old or not installed.
    """
    if not strategy:
        return None
    named = strategy.get('type') if isinstance(strategy, Mapping) else strategy
    name = _name(named)
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
    optim_wrapper = cfg.get('optim_wrapper') or {}
    if issubclass(kind, SwinV2FSDPStrategy):
        for i, hook in enumerate(cfg.get('custom_hooks') or []):
            if _name(hook.get('type')) == 'EMAHook':
                raise ValueError(
                    f'custom_hooks.{i} of the config is EMAHook, which copies the whole model, and a sharded model '
                    'cannot be copied: leave it out, or train unsharded'
                )
        saving = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
        if saving.get('backend_args') or saving.get('file_client_args') or '://' in str(saving.get('out_dir')):
            raise ValueError(
                'default_hooks.checkpoint of the config saves through a file backend, and a sharded model is saved to '
                'a disk: leave out_dir, backend_args and file_client_args out'
            )
        if _name(optim_wrapper.get('type')) == 'AmpOptimWrapper':
            raise ValueError(
                'optim_wrapper AmpOptimWrapper of the config scales the loss, which is not made for sharded gradients: '
                'use --amp bf16'
            )
    elif kind.__name__ == 'FSDPStrategy':
        if not is_cuda_available():
            raise ValueError("strategy FSDPStrategy needs GPUs: use strategy.type='SwinV2FSDPStrategy', which does not")
        if optim_wrapper.get('clip_grad'):
            raise ValueError(
                'optim_wrapper.clip_grad of the config with strategy FSDPStrategy: each process would clip by the norm '
                "of its own piece: use strategy.type='SwinV2FSDPStrategy'"
            )
    if kind.__name__ != 'SingleDeviceStrategy' and not is_distributed():
        raise ValueError(_start_several(kind.__name__))
    if kind.__name__ in SHARDED and torch.distributed.get_world_size() < 2:
        raise ValueError(_start_several(kind.__name__))


def _start_several(kind):
    return (
        f'strategy {kind} of the config is for several processes, and there is one: start them with torchrun '
        '--nproc_per_node=N and --launcher pytorch, or train in one with --cfg-options runner_type=Runner strategy=None'
    )
