"""The folder of a run: its lock, and the checkpoint in it to resume from."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..checkpoints.files import CheckpointError, read_checkpoint, read_training_state
from ..checkpoints.sharded import is_sharded_checkpoint
from ..main_process import in_main_process

_locks = []  # lock files, open for as long as the process lives


def find_resume(work_dir: str | os.PathLike, resume: str) -> str:
    """The checkpoint to resume from.

    Args:
        work_dir (str): folder of the run.
        resume (str): a path, or ``auto`` for the checkpoint in ``work_dir`` that is whole and has the most iterations.
            Of names that differ only in their number, as ``iter_*.pth``, the highest is read first.

    Raises:
        CheckpointError: there is none, or the one that ``resume`` names can't be read or holds no training state.
    """
    if resume != 'auto':
        _check_resumable(resume)
        return resume
    families = {}
    for path in Path(work_dir).glob('*.pth'):
        if not path.name.startswith('best_'):  # those hold weights alone
            family, number = re.fullmatch(r'(.*?)(\d*)\.pth', path.name, re.DOTALL).groups()
            families.setdefault(family, []).append((int(number or 0), path))
    found = [_highest_whole(sorted(paths, reverse=True)) for paths in families.values()]
    if not any(found):
        raise CheckpointError(
            f'nothing to resume: {work_dir} holds no whole checkpoint; leave --resume out to start from the beginning'
        )
    return str(max(filter(None, found))[-1])


def _highest_whole(candidates):
    """Iterations, time and path of the first candidate that can be resumed; None if none can."""
    for _, path in candidates:
        try:
            return _check_resumable(path), path.stat().st_mtime, path
        except CheckpointError as error:
            print(f'Skipping {path}: {error}')
    return None


def _check_resumable(path):
    """How many iterations a checkpoint with training state was trained for."""
    checkpoint = read_training_state(path)[0] if is_sharded_checkpoint(path) else read_checkpoint(path)
    meta = checkpoint.get('meta')
    iteration = meta.get('iter') if isinstance(meta, Mapping) else None
    if 'optimizer' not in checkpoint or not isinstance(iteration, int):
        raise CheckpointError(f'checkpoint {path} holds no training state to resume: pass it as --checkpoint instead')
    return iteration


def lock_work_dir(work_dir: str | os.PathLike) -> None:
    """Make a folder and keep other runs out of it until this process ends, in whatever way.

    In a distributed run the first process locks it, and all processes raise its error.

    Raises:
        ValueError: another run writes to the folder, or it can't be written to.
    """
    in_main_process(lambda: _lock(Path(work_dir)))


def _lock(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / '.lock', 'a')  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f'{folder} cannot be written to: {error.strerror}: name another folder with --work-dir'
        ) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: workers that outlive it hold nothing
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(
                f'another run is writing to {folder}: wait for its end or name another folder with --work-dir'
            ) from None
        print(f'{folder} cannot be locked ({error.strerror}): make sure that no other run writes there')
    _locks.append(file)
