"""Files that are whole or absent, whatever ends the tool that writes them."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

NUMBERS = itertools.count()  # of files that are being written


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, with the same ending, whose file becomes that of ``path`` when all is written.

    Raises:
        OSError: it can't be written, as on a full disk; its ``filename`` is ``path``.
    """
    partial = path.with_name(f'.{os.getpid()}.{next(NUMBERS)}.partial{path.suffix[:8]}')  # short, whatever the name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def check_file(path: Path, flag: str) -> None:
    """Check by use, before long work, that a file can be written, and make its folder.

    Raises:
        ValueError: it can't be; the message names the flag that asks for it.
    """
    if path.is_dir():
        raise ValueError(f'{flag} {path} is a folder: name a file')
    _check(path.parent, f'{flag} {path}')


def check_folder(folder: Path, flag: str) -> None:
    """Check by use that files can be made in a folder, and make it.

    Raises:
        ValueError: they can't be; the message names the flag that asks for it.
    """
    _check(folder, f'{flag} {folder}')


def _check(folder, named):
    partial = folder / f'.{os.getpid()}.partial'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ValueError(f'{named} cannot be written: {error.strerror} ({error.filename})') from error
