"""An mmengine FlexibleRunner for sharded training, resumable as `SwinV2Runner` is."""

from __future__ import annotations

import os
from collections.abc import Callable

from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner
from torch import nn

from ..checkpoints.files import read_training_state
from ..checkpoints.sharded import is_sharded_checkpoint
from ..main_process import in_main_process
from .amp import BFloat16OptimWrapper, feature_extractors
from .resumable import WRAPPER, Resumable, unwritable
from .strategy import SwinV2FSDPStrategy
from .training_state import check_progress


@RUNNERS.register_module()
class SwinV2FlexibleRunner(Resumable, FlexibleRunner):
    """A FlexibleRunner with `SwinV2FSDPStrategy`, whose resumed runs equal uninterrupted ones.

    A config names it with ``runner_type = 'SwinV2FlexibleRunner'`` and ``strategy = dict(type='SwinV2FSDPStrategy')``.
    Checkpoints are whole or absent, one stays until the next is whole, and any number of processes resumes them.
    ``allow_missing`` is as for `SwinV2Runner`. Where this reads a whole checkpoint, the first process alone does.
    """

    def build_strategy(self, strategy=None, *args, **kwargs) -> SwinV2FSDPStrategy:
        """Build the strategy of the config."""
        if isinstance(strategy, dict) and self.cfg.get('find_unused_parameters'):
            strategy.setdefault('find_unused_parameters', True)
        built = super().build_strategy(strategy, *args, **kwargs)
        built.read, built.load_weights = self._read, self._load_whole
        return built

    def train(self) -> nn.Module:
        """Train. Errors are those of `prepare`; or a checkpoint can't be written."""
        self.prepare()
        return super().train()

    def prepare(self) -> None:
        """Build the model and what training needs beside it, load weights, and shard it. `train` does it if need be.

        Raises:
            ValueError: an option of the optimizer is wrong, or the model can't train in bfloat16.
            CheckpointError: a checkpoint can't be read or does not fit.
        """
        if self.model is getattr(self.strategy, 'model', None):
            return
        self._train_loop = self.build_train_loop(self._train_loop)
        self.strategy.prepare(
            self.model,
            optim_wrapper=self.optim_wrapper,
            param_scheduler=self.param_schedulers,
            dispatch_kwargs=dict(
                epoch_length=len(self.train_dataloader),
                max_epochs=self.max_epochs,
                max_iters=self.max_iters,
                train_micro_batch_size_per_gpu=self.train_dataloader.batch_sampler.batch_size,
            ),
        )
        self.model = self.strategy.model
        if isinstance(self.strategy.optim_wrapper, BFloat16OptimWrapper):
            feature_extractors(self.model)

    def set_randomness(self, **options) -> None:
        """Seed all generators, and remember the seed."""
        self.strategy._randomness = options
        self.strategy._set_randomness(**options)

    def _read_meta(self, filename):
        def meta():
            is_folder = is_sharded_checkpoint(filename)
            return check_progress(read_training_state(filename)[0] if is_folder else self._read(filename), filename)

        return in_main_process(meta)

    def _load_whole(self, model):
        """Load the weights of a checkpoint into the whole model, in the first process."""
        if self._load_from is None or (self._resume and is_sharded_checkpoint(self._load_from)):
            return
        ahead = self._ahead
        self.read_weights(model, self._load_from)
        if self._resume:
            self._ahead = ahead  # the rest of it is still to be loaded

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: list = WRAPPER,
    ) -> None:
        """Nothing is left to do: weights are loaded before the model is sharded."""

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: str | Callable = 'default',
    ) -> None:
        """Continue the run that wrote a checkpoint, with any number of processes.

        Raises:
            CheckpointError: it can't be read, or is not of this config.
        """
        super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
        self._count_on()
        if getattr(self.optim_wrapper, '_accumulative_counts', 1) > 1:
            self.optim_wrapper.initialize_count_status(self.model, self.iter, self.max_iters)
        self._ahead = (None, None)

    def save_checkpoint(self, out_dir: str, filename: str, file_client_args: dict | None = None, **options) -> None:
        """Save a checkpoint with mmengine's options, whole or not at all.

        Raises:
            CheckpointError: it can't be written; existing ones stay.
        """
        if options.get('save_optimizer', True):
            options['meta'] = dict(options.get('meta') or {}, **self.describe_training())
        path = os.path.join(out_dir, filename)
        try:
            super().save_checkpoint(out_dir, filename, file_client_args, **options)
        except OSError as error:
            raise unwritable(path, error) from error
        self.outdated.pop(path, None)
