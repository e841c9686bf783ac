"""An mmengine Runner that resumes an interrupted run as if it had not been, and which runner a config asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from ..checkpoints.files import CheckpointError
from ..messages import first_line
from ..writing import whole
from .amp import BFloat16OptimWrapper, feature_extractors
from .flexible_runner import SwinV2FlexibleRunner
from .resumable import PARTIAL, WRAPPER, Resumable, unwritable
from .strategy import SwinV2FSDPStrategy
from .strategy_checks import strategy_class
from .training_state import check_training_state, unresumable


@RUNNERS.register_module()
class SwinV2Runner(Resumable, Runner):
    """A Runner whose checkpoints are whole and whose resumed runs equal uninterrupted ones.

    A config names it with ``runner_type = 'SwinV2Runner'``. The config's ``allow_missing``, a list of names, says which
    parts of the model the checkpoint of ``load_from`` may lack.
    """

    def prepare(self) -> None:
        """Build what training needs beside the model, so that its mistakes show before anything is trained.

        Raises:
            ValueError: an option of the optimizer is wrong, or the model can't train in bfloat16.
        """
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        if isinstance(self.optim_wrapper, BFloat16OptimWrapper):
            feature_extractors(self.model)

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
            self._count_on()
        except CheckpointError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise unresumable(filename, f'{type(e).__name__}: {first_line(e)}') from e

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = WRAPPER,
    ) -> dict:
        """Load the weights of a checkpoint, all of them or those that a transfer takes, onto the model's device.

        Raises:
            CheckpointError: it can't be read or does not fit; then the model is as before.
        """
        checkpoint = self.read_weights(self.model, filename, revise_keys)
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
        meta = dict(meta or {}, **self.describe_training()) if save_optimizer else meta
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
            raise unwritable(path, error) from error
        self.outdated.pop(path, None)


def runner_class(cfg: Config, base: type[Runner] = SwinV2Runner) -> type[Runner] | type[FlexibleRunner]:
    """The class of runner that a config asks for by ``runner_type`` and ``strategy``.

    For mmengine's `FlexibleRunner` that is `SwinV2FlexibleRunner` if the strategy is ours, and else `FlexibleRunner`
    itself. Where ``base`` is mmengine's `Runner`, as in testing, that is taken in place of a `FlexibleRunner`.

    Args:
        cfg (Config): the config.
        base (type): the class if the config names none, or mmengine's `Runner`; any other `Runner` must derive from it.

    Raises:
        ValueError: the runner is of another kind, or does not take the strategy; or `strategy_class` says why the
            strategy can't be used here.
    """
    named, strategy = cfg.get('runner_type') or 'Runner', cfg.get('strategy')
    with RUNNERS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        found = registry.get(named) if isinstance(named, str) else named
    flexible = isinstance(found, type) and issubclass(found, FlexibleRunner)
    if base is Runner and flexible:
        return Runner
    kind = strategy_class(strategy)
    if flexible:
        if kind is not None and issubclass(kind, SwinV2FSDPStrategy):
            return SwinV2FlexibleRunner if found is FlexibleRunner else found
        if issubclass(found, SwinV2FlexibleRunner):
            raise ValueError(
                f"runner_type {named!r} of the config needs strategy=dict(type='SwinV2FSDPStrategy'), and it has "
                f"{strategy!r}: set that, or runner_type='FlexibleRunner'"
            )
        return found
    if strategy and base is not Runner:
        raise ValueError(
            f'strategy {kind.__name__} of the config is for a FlexibleRunner, and runner_type is {named!r}, which '
            "would ignore it: set runner_type='FlexibleRunner', or leave the strategy out"
        )
    if found is not Runner and not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f'runner_type {named!r} of the config derives from neither {base.__name__} nor FlexibleRunner: use the '
            f'tools of {cfg.get("default_scope")} itself for this config, tools/train.py and tools/test.py'
        )
    return base if found is Runner else found
