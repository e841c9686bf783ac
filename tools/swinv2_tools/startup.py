"""How training and testing begin: from the flags to a checked config, with a user's mistakes in one line."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from swinv2_mm.checks.data import check_contents
from swinv2_mm.checks.options import check_arguments
from swinv2_mm.checks.settings import check_settings
from swinv2_mm.engine import launch
from swinv2_mm.engine.runner import runner_class


@contextlib.contextmanager
def errors_in_one_line(kind: type[Exception] = ValueError) -> Iterator[None]:
    """Print an error of a kind in one line, and exit with code 2."""
    try:
        yield
    except kind as error:
        sys.exit(launch.bad_input(error))


def read_config(args: Namespace, *base: type) -> Config:
    """Read the config that the flags name, with its work dir and the folder of its data.

    Args:
        args (Namespace): the flags ``config``, ``cfg_options``, ``work_dir`` and ``data_root``.
        base (type): the runner if the config names none, as in `runner_class`.

    Raises:
        ValueError: the config can't be read, or its runner is of another kind.
    """
    cfg = launch.load_config(args.config, args.cfg_options)
    runner_class(cfg, *base)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    if args.data_root:
        launch.set_data_root(cfg, args.data_root)
    return cfg


def check_config(cfg: Config, args: Namespace, splits: tuple[str, ...]) -> None:
    """Check the settings of a config and that the files of some splits exist.

    Raises:
        ValueError: something is wrong; the message says what to do.
    """
    check_arguments(cfg, args.cfg_options)
    check_settings(cfg, splits)
    launch.check_data(cfg, splits)


def check_data_contents(cfg: Config, args: Namespace, splits: tuple[str, ...]) -> None:
    """Look into the data of some splits, unless ``--skip-data-checks`` is given.

    Raises:
        ValueError: something is wrong; the message says what to do.
    """
    if not args.skip_data_checks:
        check_contents(cfg, splits)
