"""Reading files of ``torch.save`` without running code from them.

``torch.load(weights_only=True)`` does so too. But before PyTorch 2.6 it passes TorchScript archives to a loader that
runs them (CVE-2025-32434), and every version fails on a file with a single class that it does not know. Here no
function of a library can be reached from a file: what the file names is looked up in a list, and each call goes to a
function in `unpickled_values`, which checks its arguments. What is not on the list is never made: it is left out, and
named. Storages take no more memory than the file has data for.

There are two kinds of file (`torch/serialization.py`): an archive with a pickle and a record for each storage, and
before PyTorch 1.6 several pickles in a row, followed by the storages.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .unpickled_values import TENSOR_NAME, Unread, check, is_size, itemsize
from .unpickler import Unpickler

LEGACY_START = 0x1950A86A20F9469CFC6C, 1001  # magic number and version
PLAIN_PICKLE = 'a plain pickle'


def load(path: str | os.PathLike, allowed: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """Read a file of tensors and plain containers onto the CPU without running code from it.

    Args:
        path (str): a file that ``torch.save`` wrote.
        allowed (Mapping): what else the file may hold, by the name that the file has for it: classes, of which only
            the attributes are read, and functions of such classes and plain values.

    Returns:
        tuple: what the file holds, and the names of other classes and functions in it by their places, such as
        ``{'meta/path': 'pathlib.PosixPath'}``. Such an item of a dict or set, or attribute, is removed; in a list it
        becomes None.

    Raises:
        pickle.UnpicklingError: the file is damaged or not one of ``torch.save``; or all of it, a weight, or everything
            in a file without tensors is of another class, which the message names after ``GLOBAL``.
    """
    with open(path, 'rb') as file:
        is_zip = file.read(4) == b'PK\x03\x04'
        file.seek(0)
        result, unfilled = _load_archive(file, allowed) if is_zip else _load_legacy(file, allowed)
    return result, _take_out_unread(result, unfilled)


def _take_out_unread(root, unfilled):
    """Remove from containers, in place, what was not read. Returns its names by its places."""
    names = {}

    def name_of(value):
        """The name of what was not read: the value itself, or something in it that cannot be removed."""
        if id(value) not in names:
            names[id(value)] = None  # also of what holds itself
            if isinstance(value, Unread):
                names[id(value)] = value.name
            elif id(value) in unfilled:
                names[id(value)] = 'numpy.ndarray'
            elif type(value) in (tuple, frozenset):
                names[id(value)] = next(filter(None, map(name_of, value)), None)
        return names[id(value)]

    if name_of(root):
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {name_of(root)}')
    left_out, num_tensors, seen, pending = {}, 0, set(), [(root, None)]
    while pending:
        value, place = pending.pop()  # the place is that of its container, and its key there
        if id(value) in seen:
            continue
        seen.add(id(value))
        num_tensors += isinstance(value, Tensor)
        if isinstance(value, dict):
            is_of_weights = _is_of_weights(value, name_of)
            for key, held in list(value.items()):
                name = name_of(key) or name_of(held)
                if name and type(key) is str and is_of_weights + ('.' in key) + bool(TENSOR_NAME.match(name)) > 1:
                    raise pickle.UnpicklingError(f'Unsupported weight: GLOBAL {name}')
                if name:
                    left_out[_text(place, '?' if name_of(key) else key)] = name
                    del value[key]
                else:
                    pending.append((held, (place, key)))
        elif type(value) in (list, tuple, frozenset):
            for i, held in enumerate(value):
                if name_of(held):
                    left_out[_text(place, i)] = name_of(held)
                    value[i] = None
                else:
                    pending.append((held, (place, i)))
        elif type(value) is set:
            for held in [held for held in value if name_of(held)]:
                left_out[_text(place, '?')] = name_of(held)
                value.remove(held)
        if not isinstance(value, (Tensor, np.ndarray, np.generic, np.dtype)) and hasattr(value, '__dict__'):
            pending.append((vars(value), place))
    if left_out and not num_tensors:
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {next(iter(left_out.values()))}')
    return left_out


def _is_of_weights(items, name_of):
    """Whether a dict holds weights: one value is a tensor, or all are, including kinds that are not read."""
    is_tensor = [isinstance(held, Tensor) or bool(TENSOR_NAME.match(name_of(held) or '')) for held in items.values()]
    return all(is_tensor) or any(isinstance(held, Tensor) for held in items.values())


def _text(place, key):
    """The last keys of the path to a value."""
    keys = [key]
    while place and len(keys) < 8:
        place, key = place
        keys.append(key)
    return '/'.join(str(key)[:80] for key in reversed(keys))


def _load_archive(file, allowed):
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        roots = {name.partition('/')[0] for name in names}
        check(len(roots) == 1 and len({name.lower() for name in names}) == len(names), 'names in an archive')
        root = f'{roots.pop()}/'
        if f'{root}constants.pkl' in names:
            raise RuntimeError('it is a TorchScript archive')
        check(all(entry.compress_type == zipfile.ZIP_STORED for entry in entries), 'compression')
        check(sum(entry.file_size for entry in entries) <= os.fstat(file.fileno()).st_size, 'sizes in an archive')
        if f'{root}byteorder' in names and archive.read(f'{root}byteorder') != b'little':
            raise pickle.UnpicklingError('written on a big-endian machine')
        memory = {}

        def storage(dtype, key, location, num_elements):
            if key not in memory:
                check(isinstance(key, str) and re.fullmatch(r'\d+', key), 'storage')
                memory[key] = _memory(archive.read(f'{root}data/{key}'))
            return _elements(memory[key], dtype, num_elements)

        pickled = io.BytesIO(archive.read(f'{root}data.pkl'))  # all of it, so that its checksum is compared
        unpickler = Unpickler(pickled, allowed, storage)
        return unpickler.load(), unpickler.unfilled


def _load_legacy(file, allowed):
    start = Unpickler(file).load()
    if isinstance(start, dict):
        raise pickle.UnpicklingError(PLAIN_PICKLE)
    if (start, Unpickler(file).load()) != LEGACY_START:
        raise pickle.UnpicklingError('not a file of PyTorch')
    Unpickler(file).load()  # about the machine that wrote it
    left, memory = os.fstat(file.fileno()).st_size, {}

    def storage(dtype, key, location, num_elements, view):
        nonlocal left
        if key not in memory:
            check(type(key) is str and is_size(num_elements), 'storage')
            left -= num_elements * itemsize(dtype)
            check(left >= 0, 'size of a storage')
            memory[key] = torch.zeros(num_elements * itemsize(dtype), dtype=torch.uint8), itemsize(dtype)
        elements = _elements(memory[key][0], dtype, num_elements)
        if view is None:
            return elements
        _, start, length = view
        check(is_size(start) and is_size(length) and start + length <= num_elements, 'view')
        return elements[start : start + length]

    unpickler = Unpickler(file, allowed, storage)
    result = unpickler.load()
    keys = Unpickler(file).load()
    check(type(keys) is list and len(keys) == len(memory) and set(keys) == set(memory), 'list of storages')
    for key in keys:
        held, element_size = memory[key]
        check(file.read(8) == struct.pack('<q', len(held) // element_size), 'storage')
        data = file.read(len(held))
        check(len(data) == len(held), 'end of the file')
        held.copy_(_memory(data))
    return result, unpickler.unfilled


def _memory(data):
    """Bytes as a tensor, (N,)."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _elements(memory, dtype, num_elements):
    check(is_size(num_elements) and num_elements * itemsize(dtype) == len(memory), 'size of a storage')
    return memory.view(dtype)
