"""Reading files of tensors without running code from them, for PyTorch before 2.6.

There ``weights_only=True`` hands TorchScript archives to a loader that runs them (CVE-2025-32434), and knows no class
beside those of tensors. Here such an archive is refused by the reader that would open it. A pickle can make plain
values, call what is in a list of functions and classes, and fill instances of some of these; no more. The list is
PyTorch's own, what the caller allows, and the stand-ins below in the place of NumPy's functions.
"""

from __future__ import annotations

import codecs
import os
import pickle
import re
import tarfile
from collections import Counter, OrderedDict
from types import SimpleNamespace

import numpy as np
import torch
from torch import serialization


def load(path: str | os.PathLike, allowed: list):
    """What `compat.load` returns and raises.

    The functions of `torch.serialization` are those that ``torch.load`` calls, once it has chosen between them.
    """
    pickle_module = _restricted_pickle(allowed)
    with open(path, 'rb') as file:
        if serialization._is_zipfile(file):
            with serialization._open_zipfile_reader(file) as archive:
                if serialization._is_torchscript_zip(archive):
                    raise RuntimeError('it is a TorchScript archive')
                return serialization._load(archive, 'cpu', pickle_module, encoding='utf-8')
        if tarfile.is_tarfile(path):  # a format of 2016, which is extracted to disk
            raise RuntimeError('it is a tar file')
        return serialization._legacy_load(file, 'cpu', pickle_module, encoding='utf-8')


def _names(allowed):
    """Everything that a pickle may name, by module and name."""
    named = (item if isinstance(item, tuple) else (item, f'{item.__module__}.{item.__qualname__}') for item in allowed)
    return {
        **torch._weights_only_unpickler._get_allowed_globals(),
        **{f'{plain.__module__}.{plain.__qualname__}': plain for plain in (bytes, bytearray, complex, set, Counter)},
        **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
        'torch.device': torch.device,
        **{name: item for item, name in named if not (isinstance(item, type) and issubclass(item, np.dtype))},
        **STAND_INS,
    }


def _restricted_pickle(allowed):
    """What PyTorch takes for the module `pickle`."""
    names = _names(allowed)

    class Unpickler(_RestrictedUnpickler):
        filled = (OrderedDict, *(item for item in allowed if isinstance(item, type)))

        def find_class(self, module, name):
            module = {'__builtin__': 'builtins'}.get(module, module)  # PyTorch writes it as Python 2 does
            if f'{module}.{name}' not in names:
                raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {module}.{name}')
            return names[f'{module}.{name}']

    def load(file, **kwargs):
        return Unpickler(file, **kwargs).load()

    return SimpleNamespace(Unpickler=Unpickler, load=load)


class _RestrictedUnpickler(pickle._Unpickler):
    """Fills instances of the classes ``filled`` with attributes, and NumPy's with numbers; no others."""

    dispatch = pickle._Unpickler.dispatch.copy()

    def load_build(self):
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, np.dtype):
            _fill_dtype(built, *state)
        elif isinstance(built, np.ndarray):
            _fill_array(built, *state)
        elif type(built) in self.filled and isinstance(state, dict):
            built.__dict__.update(state)
        else:
            raise pickle.UnpicklingError(f'Unsupported state of a {type(built).__name__}')

    def load_binpersid(self):
        if not (isinstance(self.stack[-1], tuple) and self.stack[-1][:1] == ('storage',)):
            raise pickle.UnpicklingError('Unsupported persistent id')  # of a module, whose source would be compared
        super().load_binpersid()

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BINPERSID[0]] = load_binpersid


def _dtype(code, *_):
    """In the place of `numpy.dtype`: numbers and booleans alone. An object in an array would be a pointer."""
    if not (isinstance(code, str) and re.fullmatch(r'[<>|=]?[biufc]\d+', code)):
        raise pickle.UnpicklingError(f'Unsupported NumPy dtype {code!r}')
    return np.dtype(code, False, True)  # a copy, which gets its byte order below


def _fill_dtype(dtype, version, byte_order, *rest):
    if rest[:3] != (None, None, None):  # an array, names and fields in it
        raise pickle.UnpicklingError('Unsupported NumPy dtype with fields')
    dtype.__setstate__((version, byte_order, *rest))


class _Array:
    """In the place of `numpy.ndarray`, which is not to be called."""


def _array(*_):
    """In the place of NumPy's `_reconstruct`: an array that `_fill_array` fills."""
    return np.empty(0, np.int8)


def _fill_array(array, version, shape, dtype, is_fortran, values):
    if not isinstance(values, bytes) or any(side < 0 for side in shape):
        raise pickle.UnpicklingError('Unsupported NumPy array')
    array.__setstate__((version, shape, dtype, is_fortran, values))


def _encode(text, encoding):
    """In the place of `_codecs.encode`, by which bytes are written in pickles that Python 2 can read."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'Unsupported encoding {encoding!r}')
    return codecs.encode(text, 'latin1')


STAND_INS = {
    '_codecs.encode': _encode,
    'numpy.dtype': _dtype,
    'numpy.ndarray': _Array,
    'numpy.core.multiarray._reconstruct': _array,
    'numpy._core.multiarray._reconstruct': _array,
}
