"""What our runners share: runs that resume as if never interrupted, and checkpoints that stay until the next is whole.

Training draws its random numbers by position, not by history: an iteration and a sample are seeded by their place in
the run. So no state of a generator needs to be saved, and data that was trained on before is not loaded again.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import mmengine
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import BaseLoop, CheckpointLoader, IterBasedTrainLoop, find_latest_checkpoint
from mmengine.utils import digit_version
from torch import nn

from ..checkpoints.files import CheckpointError
from ..checkpoints.formats import unwrap
from ..checkpoints.loading import named_in_errors
from ..main_process import in_main_process
from .model_weights import load_model
from .run_folder import find_resume
from .seeding import SeedHook, check_batches, number_batches
from .training_state import check_progress, count_states

PARTIAL = '.checkpoint.partial'  # while it is written; a killed run leaves it, and the next one replaces it
DISK_IS_FULL_OR_READ_ONLY = errno.ENOSPC, errno.EDQUOT, errno.EROFS
OF_A_RUN = re.compile(r'(iter|epoch)_\d+\.pth')
FAST_FORWARDS = digit_version(mmengine.__version__) >= digit_version('0.10.3')  # resumed loops reload trained batches
WRAPPER = ((r'^module\.', ''),)  # the prefix that it gives to names, and what replaces it


class Resumable:
    """The part of a runner that makes runs resumable; goes before mmengine's class in the bases of ours."""

    _ahead = (None, None)  # a checkpoint that was read and is not loaded yet: its name and what it holds
    _resumed_iteration = None  # at which training goes on, in epochs as long as those of this run

    @classmethod
    def from_cfg(cls, cfg: Config) -> Resumable:
        """Build a runner from a config, and make its folder.

        Raises:
            CheckpointError: the disk is full or read-only.
        """
        with disk_errors(cfg['work_dir']):
            return super().from_cfg(cfg)

    def train(self) -> nn.Module:
        """Train.

        Raises:
            CheckpointError: a checkpoint can't be read, does not fit or can't be written.
        """
        with disk_errors(self.work_dir):
            return super().train()

    def register_hooks(self, default_hooks=None, custom_hooks=None) -> None:
        """Register the hooks of the config, and two that every run needs."""
        super().register_hooks(default_hooks, custom_hooks)
        self.outdated = {}  # functions that remove a checkpoint, by its path
        self.register_hook(SeedHook())
        self.register_hook(LateRemovalHook())

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the training loop. That of a resumed run starts with the batch after the last trained one."""
        if not isinstance(loop, dict):
            return super().build_train_loop(loop)
        epoch, iteration, length = self._resume_progress()
        endless = 'max_iters' in loop
        config = self._train_dataloader
        if isinstance(config, dict):
            differs = self._randomness_cfg.get('diff_rank_seed', False)
            loader = self.build_dataloader(config, seed=self.seed - self.rank * differs)  # the same for all ranks
        else:
            loader = config
        if endless:
            skip = iteration
        else:
            check_batches(loader)
            length = length or len(loader)  # of an epoch when it was saved
            skip = max(0, iteration - epoch * length)
            if length != len(loader):  # as with another number of processes
                skip = skip * len(loader) // length
                iteration = epoch * len(loader) + skip
        self._resumed_iteration = iteration
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
        """Epoch, iteration and epoch length of the checkpoint to resume. Its seed becomes that of the run."""
        if self._resume and self._load_from is None:
            found = any(OF_A_RUN.fullmatch(path.name) for path in Path(self.work_dir).glob('*.pth'))
            find = partial(find_resume, resume='auto') if found else find_latest_checkpoint
            self._load_from = in_main_process(lambda: find(self.work_dir))
        if not self._resume or self._load_from is None:
            return 0, 0, None
        meta = self._read_meta(self._load_from)
        seed, asked = meta.get('seed'), self._randomness_cfg.get('seed')
        if seed is not None and seed != asked:
            if asked is not None:
                self.logger.warning(f'The run is resumed with its own seed, {seed}, and not with {asked}.')
            self._randomness_cfg = dict(self._randomness_cfg, seed=seed)
            self.set_randomness(**self._randomness_cfg)
        return meta['epoch'], meta['iter'], meta.get('epoch_length')

    def describe_training(self) -> dict[str, int]:
        """What the meta of a checkpoint with training state says beside epoch and iteration."""
        described = dict(num_optimizer_states=count_states(self.optim_wrapper))
        with contextlib.suppress(TypeError):  # of a data set that does not know its length
            described['epoch_length'] = len(self.train_dataloader)
        return described

    def _count_on(self):
        """Have a resumed run count iterations in epochs as long as its own. A loop that was given built stays."""
        if self._resumed_iteration is not None:
            self.train_loop._iter = self._resumed_iteration

    def _read_meta(self, filename):
        return check_progress(self._read(filename), filename)

    def _read(self, filename):
        """What a checkpoint holds. It is kept until it is loaded."""
        if self._ahead[0] != filename:
            self._ahead = filename, CheckpointLoader.load_checkpoint(filename, 'cpu', self.logger)  # which is ours
        return self._ahead[1]

    def read_weights(self, model: nn.Module, filename: str, revise_keys: Sequence[tuple[str, str]] = WRAPPER) -> dict:
        """Load the weights of a checkpoint into a model: all of them, or those that a transfer takes.

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
        load_model(model, checkpoint, filename, transfer=transfer, allow_missing=self.cfg.get('allow_missing', ()))
        return checkpoint


def _rename(weights, pattern, by):
    """Rename weights in place, in their order, as mmengine's ``revise_keys`` ask."""
    renamed = {re.sub(pattern, by, str(name)): value for name, value in weights.items()}
    weights.clear()
    weights.update(renamed)


@contextlib.contextmanager
def disk_errors(folder):
    """Turn the error of a full or read-only disk into one line, whatever file was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL_OR_READ_ONLY:
            raise
        raise unwritable(error.filename or folder, error) from error


def unwritable(path, error):
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
