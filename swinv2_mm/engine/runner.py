"""An mmengine Runner that resumes an interrupted run as if it had not been interrupted.

Checkpoints are whole or absent, and one stays until the next is whole. Training draws its random numbers by position,
not by history: an iteration and a sample are seeded by their place in the run. So no state of a generator needs to be
saved, and data that was trained on before is not loaded again.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mmengine
import torch
from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, CheckpointLoader, IterBasedTrainLoop, Runner, find_latest_checkpoint
from mmengine.utils import digit_version

from ..checkpoints.files import CheckpointError
from ..checkpoints.formats import unwrap
from ..checkpoints.loading import named_in_errors
from ..messages import first_line
from ..writing import whole
from .model_weights import load_model
from .run_folder import find_resume
from .seeding import SeedHook, number_batches
from .training_state import check_progress, check_training_state, count_states, unresumable

PARTIAL = '.checkpoint.partial'  # while it is written; a killed run leaves it, and the next one replaces it
DISK_IS_FULL_OR_READ_ONLY = errno.ENOSPC, errno.EDQUOT, errno.EROFS
OF_A_RUN = re.compile(r'(iter|epoch)_\d+\.pth')
FAST_FORWARDS = digit_version(mmengine.__version__) >= digit_version('0.10.3')  # resumed loops reload trained batches


@RUNNERS.register_module()
class SwinV2Runner(Runner):
    """A Runner whose checkpoints are whole and whose resumed runs equal uninterrupted ones.

    A config names it with ``runner_type = 'SwinV2Runner'``. The config's ``allow_missing``, a list of names, says which
    parts of the model the checkpoint of ``load_from`` may lack.
    """

    _ahead = (None, None)  # a checkpoint that was read and is not loaded yet: its name and what it holds

    @classmethod
    def from_cfg(cls, cfg: Config) -> SwinV2Runner:
        """Build a runner from a config, and make its folder.

        Raises:
            CheckpointError: the disk is full or read-only.
        """
        with _disk_errors(cfg['work_dir']):
            return super().from_cfg(cfg)

    def register_hooks(self, default_hooks=None, custom_hooks=None) -> None:
        """Register the hooks of the config, and two that every run needs."""
        super().register_hooks(default_hooks, custom_hooks)
        self.outdated = {}  # functions that remove a checkpoint, by its path
        self.register_hook(SeedHook())
        self.register_hook(LateRemovalHook())

    def train(self) -> torch.nn.Module:
        """Train.

        Raises:
            CheckpointError: a checkpoint can't be read, does not fit or can't be written.
        """
        with _disk_errors(self.work_dir):
            return super().train()

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the training loop. That of a resumed run starts with the batch after the last trained one."""
        if not isinstance(loop, dict):
            return super().build_train_loop(loop)
        epoch, iteration = self._resume_progress()
        endless = 'max_iters' in loop
        config = self._train_dataloader
        if isinstance(config, dict):
            differs = self._randomness_cfg.get('diff_rank_seed', False)
            loader = self.build_dataloader(config, seed=self.seed - self.rank * differs)  # the same for all ranks
        else:
            loader = config
        skip = iteration if endless else max(0, iteration - epoch * len(loader))
        number_batches(loader, (self.seed, self.rank), iteration, skip, endless)
        self._train_dataloader = loader
        loop = super().build_train_loop(loop)
        self._train_dataloader = config
        if hasattr(loop, 'fast_forward_on_resume'):  # OneDL's
            loop.fast_forward_on_resume = True
        elif iteration and FAST_FORWARDS and isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = itertools.chain(itertools.repeat(None, iteration), loop.dataloader_iterator)
        return loop

    def _resume_progress(self):
        """Epoch and iteration of the checkpoint to resume. Its seed becomes that of the run."""
        if self._resume and self._load_from is None:
            found = any(OF_A_RUN.fullmatch(path.name) for path in Path(self.work_dir).glob('*.pth'))
            self._load_from = find_resume(self.work_dir, 'auto') if found else find_latest_checkpoint(self.work_dir)
        if not self._resume or self._load_from is None:
            return 0, 0
        meta = check_progress(self._read(self._load_from), self._load_from)
        seed, asked = meta.get('seed'), self._randomness_cfg.get('seed')
        if seed is not None and seed != asked:
            if asked is not None:
                self.logger.warning(f'The run is resumed with its own seed, {seed}, and not with {asked}.')
            self._randomness_cfg = dict(self._randomness_cfg, seed=seed)
            self.set_randomness(**self._randomness_cfg)
        return meta['epoch'], meta['iter']

    def _read(self, filename):
        """What a checkpoint holds. It is kept until it is loaded."""
        if self._ahead[0] != filename:
            self._ahead = filename, CheckpointLoader.load_checkpoint(filename, 'cpu', self.logger)  # which is ours
        return self._ahead[1]

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: str | Callable = 'default',
    ) -> None:
        """Continue the run that wrote a checkpoint.

        Raises:
            CheckpointError: it can't be read, or is not of this config.
        """
        self._load_from, self._resume = filename, True
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        if self.param_schedulers is not None:
            self.param_schedulers = self.build_param_scheduler(self.param_schedulers)
        check_training_state(
            self._read(filename),
            filename,
            self.optim_wrapper if resume_optimizer else None,
            self.param_schedulers if resume_param_scheduler else False,
        )
        try:
            super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
        except CheckpointError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise unresumable(filename, f'{type(e).__name__}: {first_line(e)}') from e

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r'^module\.', ''),),
    ) -> dict:
        """Load the weights of a checkpoint, all of them or those that a transfer takes, onto the model's device.

        Raises:
            CheckpointError: it can't be read or does not fit; then the model is as before.
        """
        checkpoint = self._read(filename)
        self._ahead = (None, None)
        if not isinstance(checkpoint.get('state_dict'), Mapping):  # which hooks expect
            with named_in_errors(filename):
                checkpoint = dict(state_dict=unwrap(checkpoint)[0])
        for pattern, by in revise_keys:
            _rename(checkpoint['state_dict'], pattern, by)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        transfer = not self._resume and isinstance(self._train_loop, BaseLoop)
        load_model(self.model, checkpoint, filename, transfer=transfer, allow_missing=self.cfg.get('allow_missing', ()))
        self._has_loaded = True
        return checkpoint

    @master_only
    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
    ) -> None:
        """Save a checkpoint with mmengine's options, on a local disk whole or not at all.

        Raises:
            CheckpointError: it can't be written; existing files stay.
        """
        meta = dict(meta or {}, num_optimizer_states=count_states(self.optim_wrapper)) if save_optimizer else meta
        options = dict(
            file_client_args=file_client_args,
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler,
            meta=meta,
            by_epoch=by_epoch,
            backend_args=backend_args,
        )
        if file_client_args or not isinstance(get_file_backend(out_dir, backend_args=backend_args), LocalBackend):
            super().save_checkpoint(out_dir, filename, **options)
            return
        path = os.path.join(out_dir, filename)
        try:
            with whole(Path(path), PARTIAL, sync=True):
                super().save_checkpoint(out_dir, PARTIAL, **options)
        except OSError as error:
            raise _unwritable(path, error) from error
        self.outdated.pop(path, None)


def runner_class(cfg: Config, base: type[Runner] = SwinV2Runner) -> type[Runner]:
    """The class of runner that a config asks for by ``runner_type``.

    Args:
        cfg (Config): the config.
        base (type): the class if the config names none, or mmengine's `Runner`; any other must derive from it.

    Raises:
        ValueError: the runner does not derive from it, or the config has a strategy for mmengine's `FlexibleRunner`.
    """
    named, strategy = cfg.get('runner_type') or 'Runner', cfg.get('strategy')
    with RUNNERS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        found = registry.get(named) if isinstance(named, str) else named
    cure = f'use the tools of {cfg.get("default_scope")} itself for this config, tools/train.py and tools/test.py'
    if strategy:
        kind = strategy.get('type') if isinstance(strategy, Mapping) else strategy
        raise ValueError(f'strategy {kind!r} of the config needs a FlexibleRunner, which does not run here: {cure}')
    if found is not Runner and not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f'runner_type {named!r} of the config does not derive from {base.__name__}: {cure}')
    return base if found is Runner else found


def _rename(weights, pattern, by):
    """Rename weights in place, in their order, as mmengine's ``revise_keys`` ask."""
    renamed = {re.sub(pattern, by, str(name)): value for name, value in weights.items()}
    weights.clear()
    weights.update(renamed)


@contextlib.contextmanager
def _disk_errors(folder):
    """Turn the error of a full or read-only disk into one line, whatever file was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL_OR_READ_ONLY:
            raise
        raise _unwritable(error.filename or folder, error) from error


def _unwritable(path, error):
    reason = error.strerror or error
    return CheckpointError(f'{path} cannot be written: {reason}: make room or allow it, and continue with --resume')


class LateRemovalHook(Hook):
    """Makes checkpoint hooks remove an old file only after the new one is whole."""

    priority = 'LOWEST'  # after checkpoint hooks

    def before_train(self, runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                hook.file_backend = _LateRemoval(hook.file_backend, runner.outdated)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        while runner.outdated:
            path, remove = runner.outdated.popitem()
            remove(path)

    def after_train_epoch(self, runner) -> None:
        self.after_train_iter(runner, 0)

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.after_train_iter(runner, 0)


class _LateRemoval:
    """A file backend that notes what it should remove, for later."""

    def __init__(self, backend, outdated):
        self._backend = backend
        self._outdated = outdated

    def __getattr__(self, name):
        if name == '_backend':  # while it is copied
            raise AttributeError(name)
        return getattr(self._backend, name)

    def remove(self, path):
        self._outdated[path] = self._backend.remove

    def rmtree(self, path):
        self._outdated[path] = self._backend.rmtree
