"""Downloading checkpoint files, each once, into a folder of the cache of `torch.hub`."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import re
import socket
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch
from mmengine.logging import print_log
from mmengine.runner import checkpoint as mmengine_checkpoint

from ..writing import whole

TIMEOUT = 30  # seconds without an answer
NETWORK_ERRORS = OSError, HTTPException, UnicodeError  # those of urllib are OSErrors
HASH_IN_NAME = re.compile(r'-(?!\d+\.)([0-9a-f]{8,64})\.\w+$')  # only digits are a date or a number of iterations
LOCK = '.lock'
TABLES = {  # the checkpoints that mmengine has names for, by what stands before ``://``
    'torchvision': mmengine_checkpoint.get_torchvision_models,
    'modelzoo': mmengine_checkpoint.get_torchvision_models,
    'open-mmlab': mmengine_checkpoint.get_external_models,
    'openmmlab': mmengine_checkpoint.get_external_models,
    'mmcls': mmengine_checkpoint.get_mmcls_models,
}


class DownloadError(Exception):
    """A file can't be downloaded; the message says why."""


def download(url: str, check: Callable[[str], object]) -> str:
    """Download a file once. Other processes that want it wait meanwhile.

    A file gets its name once it is whole. The next download removes what a killed one left.

    Args:
        url (str): a URL of http or https.
        check (Callable): called with the temporary path of the downloaded file. If it raises an error, the file is
            removed.

    Returns:
        str: the path of the file.

    Raises:
        DownloadError: there is no such file, the server does not answer, or the hash is not the one in the name, as in
            ``swin_v2_t-b137f0e2.pth``.
    """
    try:
        path = cached_path(url)
    except ValueError as error:
        raise DownloadError(str(error)) from None
    try:
        if path.exists():
            return str(path)
        shared = Path(torch.hub.get_dir(), 'checkpoints', path.name)  # where PyTorch and mmengine download to
        if _has_hash_of_name(shared):  # else it may be a file of this name from another server
            return str(shared)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parents[1])
        with _locked(path.parent):
            if not path.exists():  # nobody downloaded it while we waited
                _fetch(url, path, check)
    except NETWORK_ERRORS as error:
        raise DownloadError(str(error) or type(error).__name__) from error
    return str(path)


def named_by_mmengine(source: str) -> str:
    """The URL or path that mmengine has a name for, such as ``torchvision://swin_v2_t``; any other source as it is.

    Raises:
        DownloadError: mmengine does not know the name.
    """
    scheme, _, name = source.partition('://')
    if scheme not in TABLES:
        return source
    name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    found = TABLES[scheme]().get(name)
    if found is None:
        raise DownloadError('mmengine does not know this name')
    # The private function is the same from mmengine 0.8.0 to 0.10.7.
    return found if '://' in found else os.path.join(mmengine_checkpoint._get_mmengine_home(), found)


def cached_path(url: str) -> Path:
    """Where a downloaded file is kept: under its own name, which may say its windows, in a folder for its URL.

    Raises:
        ValueError: the URL names no host.
    """
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError('it names no host')
    name = re.sub(r'[^\w.-]', '_', os.path.basename(parts.path)).lstrip('.')[-128:] or 'checkpoint'
    return Path(torch.hub.get_dir(), 'swinv2_mm', hashlib.sha256(url.encode()).hexdigest()[:16], name)


def _has_hash_of_name(path):
    match = HASH_IN_NAME.search(path.name)
    if not match or not path.is_file():
        return False
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for part in iter(lambda: file.read(2**20), b''):
            digest.update(part)
    return digest.hexdigest().startswith(match[1])


def _fetch(url, path, check):
    print_log(f'Downloading {url} to {path}', logger='current')
    name = f'{path.name}.{os.getpid()}.partial'  # where no lock holds, another process may download too
    try:
        with whole(path, name) as partial:
            _download_to(partial, url, HASH_IN_NAME.search(path.name))
            check(str(partial))
    finally:
        for left in path.parent.glob(f'{glob.escape(name)}*'):  # PyTorch adds to the name while it writes
            left.unlink()


def _download_to(path, url, digest):
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        torch.hub.download_url_to_file(url, path, hash_prefix=digest and digest[1], progress=sys.stderr.isatty())
    except RuntimeError as error:
        raise DownloadError(f'it does not have the hash in its name, {error}') from None
    except NETWORK_ERRORS as error:
        raise DownloadError(str(error) or type(error).__name__) from error
    finally:
        socket.setdefaulttimeout(timeout)


@contextmanager
def _locked(folder, wait=True):
    """Hold the lock of a folder, which the kernel releases if the process dies. Yields whether it is held."""
    with open(folder / LOCK, 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:  # another process has it, or the file system has no locks
            held = False
        yield held


def _remove_leftovers(cache):
    """Remove what killed downloads left: partial files in folders that no process has locked."""
    for folder in {path.parent for path in cache.glob('*/*.partial')}:
        with suppress(OSError), _locked(folder, wait=False) as held:
            for path in folder.glob('*.partial') if held else ():
                path.unlink()
