"""Files that are whole or absent, whatever ends the tool that writes them."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

NUMBERS = itertools.count()  # make the names of temporary files unique


@contextlib.contextmanager
def whole(path: Path, partial: str | None = None, make_folder: bool = True, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename its file to ``path`` once it is whole.

    Args:
        path (Path): the file to write. An existing one is replaced.
        partial (str, optional): name of the temporary file. The next write replaces what a killed process left under
            it. By default the name is unique and has the ending of ``path``.
        make_folder (bool): whether to create the folder of the file.
        sync (bool): whether to wait until the file is on the disk, so that it survives a power failure.

    Raises:
        OSError: it can't be written, as on a full disk; its ``filename`` is ``path``.
    """
    # A default name is short, whatever the name of the file, and hidden.
    temporary = path.with_name(partial or f'.{os.getpid()}.{next(NUMBERS)}.partial{path.suffix[:8]}')
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if sync:
        with contextlib.suppress(OSError):  # not all file systems can sync a folder
            sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritten(error: OSError) -> str:
    """What an error of writing says: the file, which without a name is the standard output, and the reason."""
    return f'{error.filename or "standard output"} cannot be written: {error.strerror}'


def check_file(path: Path, flag: str) -> None:
    """Check, by trying it, that a file can be written, and create its folder. For use before long work.

    Raises:
        ValueError: it can't be; the message names the flag that asks for it.
    """
    if path.is_dir():
        raise ValueError(f'{flag} {path} is a folder: name a file')
    _check(path.parent, f'{flag} {path}')


def check_folder(folder: Path, flag: str) -> None:
    """Create a folder, and check, by trying it, that files can be created there.

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
