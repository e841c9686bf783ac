"""Reading and writing checkpoint files, without ever running code from one."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from mmengine.logging import HistoryBuffer

from ..messages import first_line, printable, warn
from ..writing import whole
from . import sharded, unpickling
from .downloads import DownloadError, download, named_by_mmengine
from .sharded import is_sharded_checkpoint

SHARD = re.compile(r'(-\d{5}-of-(?!00001)\d{5}\.\w+|\.index\.json)$')  # of transformers
SUFFIXES = ('.safetensors', '.pth', '.bin')  # that we write; .bin is what transformers calls a .pth


class CheckpointError(ValueError):
    """A checkpoint can't be read, is not one, or does not fit the backbone; the message says what to do."""


def _history_buffer_method(cls, name):
    """The only use of `getattr` in what mmengine writes: methods of `HistoryBuffer` by name."""
    if cls is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError('Unsupported global: GLOBAL builtins.getattr of another class or name')
    return getattr(HistoryBuffer, name)


HistoryBuffer()  # The class gets its statistics with the first instance that is made, not with one that is read.

# What training code saves beside tensors and plain containers, by the name that a file has for it: mmengine its log
# history, the official repository (yacs) and timm (argparse) their settings. Only their attributes are read. Settings
# of yacs become a dict, so that yacs is not needed.
ALLOWED = {
    f'{HistoryBuffer.__module__}.HistoryBuffer': HistoryBuffer,
    'builtins.getattr': _history_buffer_method,
    'argparse.Namespace': argparse.Namespace,
    'yacs.config.CfgNode': OrderedDict,
}


def read_checkpoint(source: str | os.PathLike) -> dict:
    """Read a checkpoint file onto the CPU without running any code from it.

    Args:
        source (str): a path, a URL, which is downloaded once to the cache of `torch.hub`, or mmengine's name for one,
            such as ``torchvision://swin_v2_t``. The content shows whether PyTorch or safetensors wrote the file. A
            folder that a sharded run wrote is read whole.

    Returns:
        dict: the tensors, arrays, plain values and containers of the file, with training settings and what mmengine
        writes. Objects of other classes beside the weights are left out, and named in the log.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, one part of several, holds anything but
            tensors in the place of weights, or can't be downloaded.
    """
    path = local_path(source)
    if is_sharded_checkpoint(path):
        return _read_sharded(path)
    if os.path.isdir(path):
        raise CheckpointError(f'checkpoint {path} is a folder: name the file of weights in it')
    if not os.path.isfile(path):
        raise CheckpointError(f'checkpoint {path} does not exist or is not a file')
    if SHARD.search(path):
        raise CheckpointError(
            f'checkpoint {path} is a part of a model that was saved in several files: load the folder with the library '
            'that wrote it and save it whole, in transformers with save_pretrained(FOLDER, max_shard_size="100GB")'
        )
    return _read(path, 'delete it, and it is downloaded again' if _is_url(source) else 'download or save it again')


def read_training_state(folder: str | os.PathLike) -> tuple[dict, dict[str, tuple[torch.Size, torch.dtype]]]:
    """What a sharded checkpoint holds beside tensors (meta, log history, schedulers, ...), and the tensors' `shapes`.

    Raises:
        CheckpointError: the folder is damaged, or PyTorch is too old for it.
    """
    with damaged(folder):
        shapes = sharded.shapes(folder)
    return _read(os.path.join(folder, sharded.REST), 'resume another one'), shapes


def _read_sharded(folder):
    """Read a sharded checkpoint whole, as if it had been saved so."""
    rest, shapes = read_training_state(folder)
    with damaged(folder):
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        sharded.load_tensors(folder, tensors, together=False)
        return sharded.with_state(rest, tensors)


@contextlib.contextmanager
def damaged(path: str | os.PathLike, cure: str = 'resume or load another one') -> Iterator[None]:
    """Turn whatever reading a damaged checkpoint raises into a `CheckpointError` of one line, with the cure."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f'checkpoint {path} cannot be read: {error.strerror or error}') from error
    except ValueError as error:
        if f'checkpoint {os.fspath(path)}' in str(error):  # it says what is wrong itself
            raise CheckpointError(str(error)) from None
        raise CheckpointError(f'checkpoint {path} {_why_unreadable(error, cure)}') from None
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        raise CheckpointError(f'checkpoint {path} {_why_unreadable(error, cure)}') from None


def _read(path, cure):
    """Read what a file holds. If it is damaged, the error names the cure."""
    with damaged(path, cure):
        if _is_safetensors(path):
            return _safetensors(path).load_file(path)
        checkpoint, left_out = unpickling.load(path, ALLOWED)
    if left_out:
        named = [f'{printable(place)} ({printable(name)})' for place, name in left_out.items()]
        more = f' and {len(named) - 5} more' if len(named) > 5 else ''
        warn(f'Left out of {path}, because they are not plain values: {", ".join(named[:5])}{more}')
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'checkpoint {path} holds a {type(checkpoint).__name__}, not a state dict')
    return checkpoint


def _why_unreadable(error, cure):
    """What an error of the unpickler says about a file, and the cure."""
    refused = isinstance(error, pickle.UnpicklingError) and re.search(r'GLOBAL (\S+)', str(error))
    if refused:
        return (
            f'holds {printable(refused[1])} in the place of weights, which could run code, and is refused: save the '
            'tensors alone, as a state dict'
        )
    reason = printable(first_line(error))
    if reason == unpickling.PLAIN_PICKLE:
        return (
            'is a plain pickle, as detectron2 writes, not a file of torch.save: save its weights with torch.save, as a '
            'dict of tensors'
        )
    return f'is truncated or not a checkpoint ({reason}): {cure}'


def write_checkpoint(state_dict: Mapping, path: str | os.PathLike) -> None:
    """Write tensors to a file whole or not at all.

    Args:
        state_dict (Mapping): tensors by name; for a ``.pth`` or ``.bin`` also a dict of them.
        path (str): must end in ``.safetensors``, ``.pth`` or ``.bin``. An existing file is replaced.

    Raises:
        CheckpointError: the path has another ending, or can't be written.
    """
    check_suffix(path)
    path = Path(path)
    try:
        with whole(path, make_folder=False) as partial:
            if path.name.endswith('.safetensors'):
                partial.touch()
                mode = partial.stat().st_mode
                tensors = {name: value.contiguous().clone() for name, value in state_dict.items()}  # no shared memory
                _safetensors(path).save_file(tensors, partial, metadata={'format': 'pt'})
                partial.chmod(mode)  # safetensors makes private files
            else:
                with open(partial, 'wb') as file:  # given a path, PyTorch does not say why it can't be written
                    torch.save(state_dict, file)
    except CheckpointError:
        raise
    except Exception as error:  # each library raises its own kind
        cause = error if isinstance(error, OSError) else error.__context__  # PyTorch's error hides that of the file
        reason = getattr(cause, 'strerror', None) or first_line(error)
        raise CheckpointError(f'{path} cannot be written: {reason}') from error


def check_suffix(path: str | os.PathLike) -> None:
    """Raise a `CheckpointError` unless the path ends like a file that `write_checkpoint` writes."""
    if not os.fspath(path).endswith(SUFFIXES):
        raise CheckpointError(f'{path} must end in {", ".join(SUFFIXES)}: the ending says how it is written')


def local_path(source: str | os.PathLike) -> str:
    """The local path of a checkpoint, downloaded if need be.

    Args:
        source (str): a path, which may start with ``~``, a URL of http, https or file, or mmengine's name for one.

    Raises:
        CheckpointError: it can't be downloaded.
    """
    try:
        path = named_by_mmengine(os.fspath(source))
    except DownloadError as error:
        raise CheckpointError(f'checkpoint {source}: {error}: pass a path or URL') from None
    if _is_url(path):
        return _download(path)
    if path.lower().startswith('file://'):
        path = url2pathname(urlsplit(path).path)
    return os.path.expanduser(path)


def _is_url(source):
    return os.fspath(source).lower().startswith(('http://', 'https://'))


def _download(url):
    def check(path):
        try:
            _read(path, 'run again')
        except CheckpointError as error:
            raise CheckpointError(f'the download of {url} broke off or is not a checkpoint: {error}') from None

    try:
        return download(url, check)
    except DownloadError as error:
        raise CheckpointError(
            f'cannot download {url} ({printable(str(error))}): download it on a machine with network, for example with '
            f'"wget {url}", and pass the file (tools/train.py: --checkpoint FILE, or none to start from scratch)'
        ) from error


def _is_safetensors(path):
    with open(path, 'rb') as file:
        start = file.read(9)  # the length of the header in 8 bytes, and the header, which is JSON
    return start[8:] == b'{' or path.endswith('.safetensors')


def _safetensors(path):
    """The library for files of safetensors, which may not be installed."""
    try:
        import safetensors.torch
    except ImportError:
        cure = 'pip install safetensors'
        raise CheckpointError(f'{path} needs the library safetensors, which is not installed: {cure}') from None
    return safetensors.torch
