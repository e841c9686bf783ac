"""Sharded checkpoints: folders that all processes of a run write, in the format of `torch.distributed.checkpoint`.

Such a folder has the weights and the tensors of the optimizer's state, each process's pieces in a file of its own, and
everything else in `training_state.pth`. Read whole, it gives what a checkpoint file of the same run would hold. As with
files, no code in it can run: its table of contents is a pickle, of which only the classes of that format are read.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from .. import compat
from ..main_process import in_main_process
from ..messages import first_line
from ..writing import sync_to_disk

PARTIAL = '.checkpoint.partial.folder'  # while it is written; a killed run leaves it, and the next one replaces it
CONTENTS, REST = '.metadata', 'training_state.pth'
WEIGHT, STATE = 'state_dict.', 'optimizer.'  # what the names of tensors begin with
TENSOR_NAME = re.compile(r'state_dict\.|optimizer\.\d{1,9}\.')
NEEDED = 2, 7  # PyTorch: from 2.6 on, torch.load(weights_only=True) runs no code; FSDP on a CPU needs 2.7
FORMAT = {  # classes of the format, and the plain values in them
    'torch.distributed.checkpoint.metadata': (
        'ChunkStorageMetadata',
        'Metadata',
        'MetadataIndex',
        'StorageMeta',
        'TensorProperties',
        'TensorStorageMetadata',
        '_MEM_FORMAT_ENCODING',
    ),
    'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
    'torch': (
        *('Size', 'bfloat16', 'bool', 'complex64', 'complex128', 'float16', 'float32', 'float64'),
        *('int8', 'int16', 'int32', 'int64', 'uint8'),
    ),
    'torch.serialization': ('_get_layout',),
    'pathlib': ('PosixPath', 'PurePosixPath'),
}


class _Unpickler(pickle._Unpickler):
    """Makes objects of the format, and gives no state to its classes and functions themselves."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def load_build(self):
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError('Unsupported: state of a class or function')
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module, name):
        module = 'pathlib' if module == 'pathlib._local' else module  # its name in Python 3.13
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
    from torch.distributed.checkpoint.metadata import MetadataIndex

    contents, described = _reader(folder).read_metadata(), {}
    for name, value in contents.state_dict_metadata.items():
        described[name] = value.size, value.properties.dtype
        held = [chunk for chunk in value.chunks if MetadataIndex(name, chunk.offsets) in contents.storage_data]
        if sum(chunk.sizes.numel() for chunk in held) != value.size.numel():
            raise ValueError(f'pieces of {name} are missing')
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

    class Planner(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item, value):  # which would be unpickled freely
            raise pickle.UnpicklingError(f'{read_item.dest_index.fqn} is not a tensor')

    with warnings.catch_warnings(), _first_failure():
        warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # which is what is asked for
        dcp.load(tensors, storage_reader=_reader(folder), planner=Planner(), no_dist=not together)


@contextmanager
def _first_failure():
    """Raise what went wrong in any process, and not PyTorch's collection of it, which is no `Exception`."""
    import torch.distributed.checkpoint as dcp

    try:
        yield
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _reader(folder):
    compat.require(NEEDED, f'checkpoint {os.fspath(folder)} is sharded, and reading it')
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(os.path.join(folder, CONTENTS), 'rb') as file:
                contents = _Unpickler(file).load()
            if type(contents) is not Metadata:
                raise pickle.UnpicklingError(f'it holds a {type(contents).__name__}')
            for name, value in contents.state_dict_metadata.items():
                if type(value) is not TensorStorageMetadata or not TENSOR_NAME.match(name):
                    raise pickle.UnpicklingError(f'{name} is not a tensor of a model or optimizer')
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


def write_sharded(checkpoint: Mapping, folder: str | os.PathLike) -> None:
    """Write a checkpoint as a folder, whole or not at all. All processes call it, and need to see the same disk.

    Args:
        checkpoint (Mapping): with ``state_dict``, and as with mmengine's; tensors may be sharded.
        folder (str): the folder. An existing one, or a file, is replaced.

    Raises:
        OSError: it can't be written.
    """
    import torch.distributed.checkpoint as dcp

    folder, rest_and_tensors = Path(folder), without_state(checkpoint)
    temporary, old = folder.with_name(PARTIAL), folder.with_name(f'{PARTIAL}.old')

    def begin():
        if old.exists() and not folder.exists():  # a killed run was replacing it
            os.replace(old, folder)
        for path in (temporary, old):
            _remove(path)
        temporary.mkdir(parents=True)

    def end():
        with open(temporary / REST, 'wb') as file:
            torch.save(rest_and_tensors[0], file)
        shapes(temporary)  # on disks that processes do not share, the pieces of others are missing
        sync_to_disk(temporary / REST)
        with suppress(OSError):  # not all file systems can sync a folder
            sync_to_disk(temporary)
        with suppress(FileNotFoundError):
            os.replace(folder, old)
        os.replace(temporary, folder)
        with suppress(OSError):
            sync_to_disk(folder.parent)
        _remove(old)

    in_main_process(begin)
    with as_os_error(folder), _first_failure():
        dcp.save(
            rest_and_tensors[1],
            storage_writer=dcp.FileSystemWriter(temporary),
            planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),  # of buffers, those of the first process
        )
    with as_os_error(folder):
        in_main_process(end)


@contextmanager
def as_os_error(path: str | os.PathLike) -> Iterator[None]:
    """Turn what PyTorch raises where a disk is full, which may be a RuntimeError, into an OSError of a path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    except RuntimeError as error:
        raise OSError(None, first_line(error), os.fspath(path)) from error


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
