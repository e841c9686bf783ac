"""Reading and writing checkpoint files, without ever running code from one."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from http.client import HTTPException
from urllib.parse import urlsplit

import numpy as np
import torch
from mmengine.dist import barrier
from mmengine.logging import HistoryBuffer, print_log

from . import compat

HASH_IN_NAME = re.compile(r'-(?!\d+\.)([0-9a-f]{8,64})\.\w+$')  # digits alone are a date or a number of iterations
SUFFIXES = ('.safetensors', '.pth', '.bin')  # that we write; .bin is what transformers calls a .pth


class CheckpointError(ValueError):
    """A checkpoint that can't be read, is none, or does not fit the backbone; the message says what to do."""


def _history_buffer_method(cls, name):
    """The one use of `getattr` in what mmengine writes: the methods of `HistoryBuffer` by name."""
    if cls is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError('Unsupported global: GLOBAL builtins.getattr of another class or name')
    return getattr(HistoryBuffer, name)


HistoryBuffer()  # The class has no statistics before it is made once, and those that are read come without.

# What mmengine's Runner writes beside tensors and plain containers: its log history, numbers in NumPy arrays.
# Registered on import, because PyTorch reads with `weights_only=True` and the Runner's resume would fail.
MMENGINE_GLOBALS = [
    HistoryBuffer,
    (_history_buffer_method, 'builtins.getattr'),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32')),
    *(
        (function, f'numpy.{core}.multiarray.{function.__name__}')  # NumPy 1 and 2 name the same module differently
        for function in (np.zeros(1).__reduce__()[0], np.float64().__reduce__()[0])
        for core in ('core', '_core')
    ),
]
compat.allow_globals(MMENGINE_GLOBALS)

# The settings that the training code of the official repository (yacs) and of timm (argparse) saves beside its
# weights. Both hold plain values; the first is read as a dict, so that yacs is not needed.
SETTINGS_GLOBALS = [(OrderedDict, 'yacs.config.CfgNode'), argparse.Namespace]


def read_checkpoint(source: str | os.PathLike) -> dict:
    """Read a checkpoint file onto the CPU without running any code from it.

    Args:
        source (str): a path, or a URL, which is downloaded to the cache of `torch.hub` once. Whether the file is of
            PyTorch or of safetensors is told by what it holds.

    Returns:
        dict: what the file holds.

    Raises:
        CheckpointError: the file is missing, truncated, no checkpoint, holds anything but tensors, plain containers,
            training settings and what mmengine writes, or can't be downloaded.
    """
    path = local_path(source)
    if os.path.isdir(path):
        raise CheckpointError(f'checkpoint {path} is a folder: name the file of weights in it')
    if not os.path.isfile(path):
        raise CheckpointError(f'checkpoint {path} does not exist or is no file')
    cure = 'download or save it again' if path == os.fspath(source) else 'delete it, and it is downloaded again'
    return _read(path, cure)


def _read(path, cure):
    """What a file holds. If it is damaged the error tells the cure."""
    try:
        if _is_safetensors(path):
            return _safetensors(path).load_file(path)
        _check_zip(path)
        checkpoint = compat.load(path, [*MMENGINE_GLOBALS, *SETTINGS_GLOBALS])
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f'checkpoint {path} cannot be read: {error.strerror or error}') from error
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        refused = isinstance(error, pickle.UnpicklingError) and re.search(r'GLOBAL (\S+)', str(error))
        if refused:
            raise CheckpointError(
                f'checkpoint {path} holds {_printable(refused[1])}, which could run code, and is refused: '
                'save the tensors alone, as a state dict'
            ) from None
        reason = _printable(str(error) or type(error).__name__)
        if isinstance(error, pickle.UnpicklingError) and not reason.startswith('Unsupported '):
            # PyTorch's text advises to read it with weights_only=False
            reason = 'it is no file of tensors'
        if 'TorchScript' in reason:  # the same
            reason = 'it is a TorchScript archive'
        raise CheckpointError(f'checkpoint {path} is truncated or no checkpoint ({reason}): {cure}') from None
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'checkpoint {path} holds a {type(checkpoint).__name__}, not a state dict')
    return checkpoint


def _printable(text):
    """The first line of a text that a file may have chosen, without what moves the cursor of a terminal."""
    return ''.join(letter if letter.isprintable() else '?' for letter in text.split('\n')[0])


def write_checkpoint(state_dict: Mapping, path: str | os.PathLike) -> None:
    """Write tensors to a file whole or not at all.

    Args:
        state_dict (Mapping): tensors by name; for a ``.pth`` or ``.bin`` also a dict of them.
        path (str): ends in ``.safetensors``, ``.pth`` or ``.bin``. An existing file is replaced.

    Raises:
        CheckpointError: the path has another ending, or can't be written.
    """
    path = os.fspath(path)
    check_suffix(path)
    folder = os.path.dirname(path) or '.'
    partial = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix='.', suffix='.partial', delete=False) as file:
            partial = file.name
        if path.endswith('.safetensors'):
            tensors = {name: value.contiguous().clone() for name, value in state_dict.items()}  # none shares memory
            _safetensors(path).save_file(tensors, partial, metadata={'format': 'pt'})
        else:
            torch.save(state_dict, partial)
        os.chmod(partial, 0o666 & ~_umask())  # temporary files are private
        os.replace(partial, path)
    except CheckpointError:
        raise
    except Exception as error:  # each library has its own for what it cannot write
        reason = (getattr(error, 'strerror', None) or str(error)).split('\n')[0]
        raise CheckpointError(f'{path} cannot be written: {reason}') from error
    finally:
        if partial and os.path.exists(partial):
            os.remove(partial)


def check_suffix(path: str | os.PathLike) -> None:
    """Raise a `CheckpointError` unless the path ends like a file that `write_checkpoint` writes."""
    if not os.fspath(path).endswith(SUFFIXES):
        raise CheckpointError(f'{path} must end in {", ".join(SUFFIXES)}: that says how it is written')


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def local_path(source: str | os.PathLike) -> str:
    """The path of a checkpoint, downloaded if it is named by a URL.

    Raises:
        CheckpointError: it can't be downloaded.
    """
    path = os.fspath(source)
    return _download(path) if path.startswith(('http://', 'https://')) else path


def _check_zip(path):
    """Check what PyTorch does not: the checksums, and that no tensor is a folder, whose values would be arbitrary."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = next((entry.filename for entry in file.infolist() if entry.external_attr & 0x10), file.testzip())
        if damaged:
            raise zipfile.BadZipFile(f'{damaged} in it is damaged')


def _is_safetensors(path):
    with open(path, 'rb') as file:
        start = file.read(9)  # the length of the header in 8 bytes, and the header, which is JSON
    return start[8:] == b'{' or path.endswith('.safetensors')


def _safetensors(path):
    """The library for such files, which few environments lack."""
    try:
        import safetensors.torch
    except ImportError:
        cure = 'pip install safetensors'
        raise CheckpointError(f'{path} takes the library safetensors, which is not installed: {cure}') from None
    return safetensors.torch


def _download(url):
    """Path of the downloaded file in the cache of `torch.hub`; one process of a node downloads, the others wait."""
    try:
        path = os.path.join(torch.hub.get_dir(), 'checkpoints', cached_name(url))
        if os.environ.get('LOCAL_RANK', '0') == '0' and not os.path.exists(path):
            _fetch(url, path)
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f'cannot download {url} ({error}): download it on a machine with network, for example with '
            f'"wget {url}", and pass the file (tools/train.py: --checkpoint FILE, or none to start from scratch)'
        ) from error
    finally:
        barrier()  # also where it failed: nobody waits for the process that did
    return path


def _fetch(url, path):
    """Download a file, and give it its name once it is known to be whole: `torch.hub` does not count its bytes."""
    print_log(f'Downloading {url} to {path}', logger='current')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    digest = HASH_IN_NAME.search(path)
    partial = f'{path}.{os.getpid()}.partial'
    try:
        torch.hub.download_url_to_file(url, partial, hash_prefix=digest and digest[1], progress=sys.stderr.isatty())
        _read(partial, 'run again')
        os.replace(partial, path)
    except RuntimeError as error:
        raise CheckpointError(
            f'{url} is not the file that its name says, {error}: run again, or take another'
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f'the download of {url} broke off or is no checkpoint: {error}') from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def cached_name(url: str) -> str:
    """The name of a downloaded file in the cache: its own if it is a published one of Swin V2 or has a hash, else, as
    for ``epoch_12.pth`` and ``model.safetensors``, with the host and the folders of the URL.

    Raises:
        ValueError: it is no URL.
    """
    parts = urlsplit(url)
    name = os.path.basename(parts.path)
    if re.match(r'swin_?v2', name) or HASH_IN_NAME.search(name):
        return name
    return f'{parts.hostname}{parts.path}'.replace('/', '--')
