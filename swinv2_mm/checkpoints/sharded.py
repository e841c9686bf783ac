"""Sharded checkpoints: folders that all processes of a run write, in the format of `torch.distributed.checkpoint`.

Such a folder has the weights and the tensors of the optimizer's state, each process's pieces in a file of its own, and
everything else in `training_state.pth`. Read whole, it gives what a checkpoint file of the same run would hold. As with
files, no code in it can run: its table of contents is a pickle, of which only the classes of that format are read.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .. import compat

CONTENTS, REST = '.metadata', 'training_state.pth'
WEIGHT, STATE = 'state_dict.', 'optimizer.'  # what the names of tensors begin with
NEEDED = 2, 6  # PyTorch: DTensors whose parts torch.load(weights_only=True) reads without running code
FORMAT = {  # classes of the format, and the plain values in them
    'torch.distributed.checkpoint.metadata': (
        'BytesStorageMetadata',
        'ChunkStorageMetadata',
        'Metadata',
        'MetadataIndex',
        'StorageMeta',
        'TensorProperties',
        'TensorStorageMetadata',
        '_MEM_FORMAT_ENCODING',
    ),
    'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
    'torch': ('Size', 'bfloat16', 'bool', 'float16', 'float32', 'float64', 'int32', 'int64', 'uint8'),
    'torch.serialization': ('_get_layout',),
    'pathlib': ('PosixPath', 'PurePosixPath'),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in FORMAT.get(module, ()):
            raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {module}.{name}')
        return super().find_class(module, name)


def is_sharded_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a path is a folder of this kind."""
    return os.path.isfile(os.path.join(path, CONTENTS)) and os.path.isfile(os.path.join(path, REST))


def shapes(folder: str | os.PathLike) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a sharded checkpoint, by its name: ``state_dict.NAME``, ``optimizer.I.NAME``.

    Raises:
        ValueError: PyTorch is too old.
        Exception: of any kind; the folder is damaged.
    """
    contents = _reader(folder).read_metadata()
    described = {}
    for name, value in contents.state_dict_metadata.items():
        if not hasattr(value, 'size'):
            raise pickle.UnpicklingError(f'{name} is a {type(value).__name__}, not a tensor')
        described[name] = value.size, value.properties.dtype
    for info in contents.storage_data.values():
        file = Path(folder, info.relative_path)
        if file.parent != Path(folder) or not file.is_file() or file.stat().st_size < info.offset + info.length:
            raise OSError(None, f'{info.relative_path} is missing or truncated', str(folder))
    return described


def load_tensors(folder: str | os.PathLike, tensors: dict[str, Tensor], together: bool) -> None:
    """Read tensors in place, of those that are sharded only the pieces of this process.

    Args:
        folder (str): the checkpoint.
        tensors (dict[str, Tensor]): by their names in it, in the shapes of `shapes`.
        together (bool): whether all processes call this.
    """
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # which is what is asked for
        dcp.load(tensors, storage_reader=_reader(folder), no_dist=not together)


def _reader(folder):
    compat.require(NEEDED, f'checkpoint {os.fspath(folder)} is sharded, and reading it')
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(os.path.join(folder, CONTENTS), 'rb') as file:
                contents = _Unpickler(file).load()
            contents.storage_meta = contents.storage_meta or StorageMeta()
            contents.storage_meta.load_id = self.load_id
            return contents

    return Reader(os.fspath(folder))


def with_state(rest: Mapping, tensors: Mapping[str, Tensor]) -> dict:
    """What `training_state.pth` holds, with the tensors put back in their places: what a whole checkpoint holds."""
    checkpoint = dict(rest)
    weights = OrderedDict((name[len(WEIGHT) :], x) for name, x in tensors.items() if name.startswith(WEIGHT))
    weights._metadata = checkpoint.pop('versions', None)
    if isinstance(checkpoint.get('optimizer'), Mapping):
        state = {index: dict(entry) for index, entry in checkpoint['optimizer']['state'].items()}
        for name, value in tensors.items():
            if name.startswith(STATE):
                index, _, key = name[len(STATE) :].partition('.')
                state.setdefault(int(index), {})[key] = value
        checkpoint['optimizer'] = dict(checkpoint['optimizer'], state=state)
    return dict(checkpoint, state_dict=weights)


def without_state(checkpoint: Mapping) -> tuple[dict, dict[str, Tensor]]:
    """The reverse of `with_state`: what `training_state.pth` gets, and the tensors by name."""
    rest = {key: value for key, value in checkpoint.items() if key != 'state_dict'}
    rest['versions'] = getattr(checkpoint['state_dict'], '_metadata', None)
    tensors = {f'{WEIGHT}{name}': value for name, value in checkpoint['state_dict'].items()}
    if 'optimizer' in rest:
        state = {}
        for index, entry in rest['optimizer']['state'].items():
            tensors.update({f'{STATE}{index}.{key}': x for key, x in entry.items() if isinstance(x, Tensor)})
            state[index] = {key: x for key, x in entry.items() if not isinstance(x, Tensor)}
        rest['optimizer'] = dict(rest['optimizer'], state=state)
    return rest, tensors


def write_sharded(checkpoint: Mapping, folder: str | os.PathLike, partial: str) -> None:
    """Write a checkpoint as a folder, whole or not at all. All processes call it, and need to see the same disk.

    Args:
        checkpoint (Mapping): with ``state_dict``, and as with mmengine's; tensors may be sharded.
        folder (str): the folder. An existing one, or a file, is replaced.
        partial (str): name of the temporary folder beside it. The next write replaces what a killed run left under it.

    Raises:
        OSError: it can't be written.
    """
    import torch.distributed.checkpoint as dcp

    folder = Path(folder)
    temporary, is_first = folder.with_name(partial), dist.get_rank() == 0
    if is_first:
        _remove(temporary)
        temporary.mkdir(parents=True)
    dist.barrier()
    rest, tensors = without_state(checkpoint)
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary))
    except dcp.CheckpointException as error:  # in all processes, of what went wrong in any
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise OSError(failure.errno, failure.strerror, str(folder)) from error
        raise
    if is_first:
        with open(temporary / REST, 'wb') as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
        old = folder.with_name(f'{partial}.old')
        _remove(old)
        with suppress(FileNotFoundError):
            os.replace(folder, old)
        os.replace(temporary, folder)
        _remove(old)
    dist.barrier()


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
