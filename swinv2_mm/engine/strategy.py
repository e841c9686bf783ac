"""Sharded training as a strategy of mmengine's `FlexibleRunner`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import mmengine
import torch
from mmengine._strategy import DDPStrategy
from mmengine.device import get_device
from mmengine.dist import get_rank
from mmengine.optim import OptimWrapperDict
from mmengine.registry import MODELS, STRATEGIES
from mmengine.utils import get_git_hash
from torch import nn

from .. import compat
from ..backbone import SwinTransformerV2
from ..checkpoints import sharded
from ..checkpoints.files import damaged, read_checkpoint, read_training_state
from ..checkpoints.fitting import all_finite
from ..main_process import in_main_process
from ..writing import whole
from .resumable import PARTIAL
from .sharding import gather, is_sharded, named_tensors, scatter, shard, with_backbones_on_meta
from .strategy_checks import start_several
from .training_state import check_training_state, unresumable

CHECKPOINTS = 'sharded', 'whole'


@STRATEGIES.register_module()
class SwinV2FSDPStrategy(DDPStrategy):
    """Trains with parameters, gradients and optimizer state sharded among all processes, by PyTorch's `fully_shard`.

    Each block of the backbone is a unit (`sharding.units`). For `SwinV2FlexibleRunner`. Initial weights are in the
    memory of the first process alone, which scatters them; the backbones of the others are built without memory.

    Args:
        checkpoints (str): how checkpoints are saved. ``sharded``: as a folder that all processes write. ``whole``: as a
            file that the first process writes, the same as a run without sharding; the model and the optimizer have to
            fit into its memory.
        find_unused_parameters (bool): whether processes may use different parts of the model in a step, as
            `DistributedDataParallel` has it. Parts that no process uses need it not.
        sync_bn (str, optional), work_dir (str), ...: as of mmengine's `DDPStrategy`; without ``model_wrapper``, because
            nothing is wrapped.

    Raises:
        ValueError: an argument is wrong, PyTorch is too old, or there is one process.
    """

    def __init__(self, *, checkpoints: str = 'sharded', find_unused_parameters: bool = False, **kwargs):
        compat.require(sharded.NEEDED, 'strategy SwinV2FSDPStrategy')
        if checkpoints not in CHECKPOINTS:
            raise ValueError(
                f'checkpoints of SwinV2FSDPStrategy must be {" or ".join(CHECKPOINTS)}, got {checkpoints!r}'
            )
        if find_unused_parameters:
            compat.require((2, 13), 'find_unused_parameters with SwinV2FSDPStrategy')
        if kwargs.get('model_wrapper') is not None:
            raise ValueError('strategy SwinV2FSDPStrategy wraps nothing: leave model_wrapper out')
        super().__init__(**kwargs)
        if self.world_size < 2:
            raise ValueError(start_several('SwinV2FSDPStrategy'))
        self.checkpoints, self.find_unused_parameters = checkpoints, find_unused_parameters
        # The runner may replace both. The first process calls them: to read a whole checkpoint, and before sharding.
        self.read: Callable[[str], dict] = read_checkpoint
        self.load_weights: Callable[[nn.Module], None] = lambda model: None

    def build_model(self, model: nn.Module | Mapping) -> nn.Module:
        """Build the model: whole in the first process, in others with backbones on the meta device."""
        if not isinstance(model, nn.Module):
            model = MODELS.build(model if get_rank() == 0 else with_backbones_on_meta(model))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0:
                raise ValueError(
                    f'{name} of the model has no dimension to cut it along, and SwinV2FSDPStrategy cannot shard that: '
                    'train unsharded, or with another head'
                )
        return model

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
        values = named_tensors(model) if get_rank() == 0 else {}
        shard(model, device)
        if self.find_unused_parameters:
            model.set_reduce_scatter_unused_params(True)
        backbones = [module for module in model.modules() if isinstance(module, SwinTransformerV2)]
        for backbone in backbones:
            if any(parameter.is_meta for parameter in backbone.parameters()):
                backbone.to_empty(device=device)
        model.to(device)
        for name, own in named_tensors(model).items():
            scatter(own, values.pop(name, None))  # so that the whole model leaves the first process piece by piece
        _know_windows(backbones)
        return model

    def build_optim_wrapper(self, optim_wrapper, model: nn.Module | None = None):
        """Build the optim wrapper, as mmengine does.

        Raises:
            ValueError: it has several optimizers.
        """
        built = super().build_optim_wrapper(optim_wrapper, model)
        if isinstance(built, OptimWrapperDict):
            raise ValueError('SwinV2FSDPStrategy trains with one optimizer, and optim_wrapper has several')
        return built

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
        checkpoint['meta'] = dict(
            checkpoint.get('meta') or {},
            seed=self.seed,
            time=time.strftime('%Y%m%d_%H%M%S'),
            mmengine=mmengine.__version__ + get_git_hash(),
        )
        if save_optimizer:
            checkpoint['optimizer'] = self.optim_state_dict()
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            checkpoint['param_schedulers'] = self.scheduler_state_dict()
        if callback is not None:
            callback(checkpoint)
        if self.checkpoints == 'sharded':
            sharded.write_sharded(checkpoint, filename)
            return
        rest, tensors = sharded.without_state(checkpoint)
        tensors = gather(tensors)

        def write():
            with whole(Path(filename), PARTIAL, sync=True) as partial, sharded.as_os_error(filename):
                torch.save(sharded.with_state(rest, tensors), partial)

        in_main_process(write)

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

        if in_main_process(lambda: sharded.is_sharded_checkpoint(filename)):
            checkpoint = checked(self._load_sharded(filename, resume_optimizer))
            if callback is not None:
                callback(checkpoint)
        else:
            checkpoint = self._scattered(lambda: checked(self.read(filename)))
        if resume_optimizer:
            self.load_optim_state_dict(checkpoint.pop('optimizer'))
        if schedulers:
            self.load_scheduler_state_dict(checkpoint.pop('param_schedulers'))
        return checkpoint

    def _load_sharded(self, folder, resume_optimizer):
        """Load the weights of a sharded checkpoint, each process its pieces. Returns its contents, in such pieces."""
        rest, held = in_main_process(lambda: read_training_state(folder))
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
        with damaged(folder):
            sharded.load_tensors(folder, tensors, together=True)
        for name, own in tensors.items():
            if not all_finite(own):
                raise unresumable(folder, f'{name} holds NaN or infinity')
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
