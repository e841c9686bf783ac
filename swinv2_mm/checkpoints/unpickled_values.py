"""Stand-ins for the values and functions that a pickle names. Each checks its arguments.

No function of a library can be reached from a file. What a file names is looked up in `FUNCTIONS` and `CLASSES`, and
each call goes to a function here. Arguments come from the file, so they may be anything.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import Counter, OrderedDict

import numpy as np
import torch
from torch import Tensor, nn

STORAGES = {
    'Double': torch.float64,
    'Float': torch.float32,
    'Half': torch.float16,
    'BFloat16': torch.bfloat16,
    'Long': torch.int64,
    'Int': torch.int32,
    'Short': torch.int16,
    'Char': torch.int8,
    'Byte': torch.uint8,
    'Bool': torch.bool,
    'ComplexFloat': torch.complex64,
    'ComplexDouble': torch.complex128,
}
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
MAX_EXPANSION = 16, 2**20  # elements of a tensor: per element in the file, and how many are always allowed
TENSOR_NAME = re.compile(r'torch\._(utils|tensor)\._rebuild|torch\.Tensor')


class Unread:
    """Stands on the stack for something that a file names, and for everything made from it. It can't be called."""

    def __init__(self, name: str):
        self.name = name


class Name(Unread):
    """The name of something that can be read."""


class Storage(Unread):
    """The elements of a storage, (N,), in the memory that all its tensors share."""

    def __init__(self, elements: Tensor):
        super().__init__('torch.storage')
        self.elements = elements


def is_size(number):
    """Whether a value is a whole number of at least 0."""
    return type(number) is int and number >= 0


def check(holds, what):
    """Refuse a file unless a condition holds; the message names what is wrong with it."""
    if not holds:
        raise pickle.UnpicklingError(f'Unsupported {what}')


def itemsize(dtype):
    """Bytes of an element."""
    return torch.empty(0, dtype=dtype).element_size()


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    check(type(storage) is Storage, 'storage of a tensor')
    if metadata:  # a conjugate or negative view
        return Unread('torch.Tensor')
    check(type(size) is tuple and type(stride) is tuple and len(size) == len(stride), 'shape')
    check(all(is_size(number) for number in (offset, *size, *stride)), 'shape')
    if 0 in size:
        return storage.elements.new_empty(size)
    times, always = MAX_EXPANSION
    if math.prod(size) > max(times * len(storage.elements), always):  # with strides of 0 a small file fills the memory
        return Unread('torch.Tensor')
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    check(last < len(storage.elements), 'tensor that is larger than its storage')
    return storage.elements.as_strided(size, stride, storage.elements.storage_offset() + offset)


def _tensor_of_bytes(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    check(type(storage) is Storage and isinstance(dtype, torch.dtype), 'storage of a tensor')
    check(len(storage.elements) % itemsize(dtype) == 0, 'size of a storage')
    return _tensor(Storage(storage.elements.view(dtype)), offset, size, stride, metadata=metadata)


def is_metadata(value):
    """Whether a value is the metadata of a state dict, the versions of its modules."""
    return isinstance(value, dict) and all(
        type(name) is str and type(entry) is dict and type(entry.get('version')) in (int, type(None))
        for name, entry in value.items()
    )


def _parameter(data, requires_grad=True, hooks=None, state=None):
    check(type(data) is Tensor and type(requires_grad) is bool, 'parameter')
    return nn.Parameter(data, requires_grad and (data.is_floating_point() or data.is_complex()))


def _of_type(function, kind, args, state):
    check(type(function) is Name and function.name in TENSORS and type(args) is tuple, 'tensor')
    return Unread(function.name) if any(type(value) is Unread for value in args) else TENSORS[function.name](*args)


def _ordered_dict(pairs=()):
    return OrderedDict(pairs)


def _set(items=()):
    return set(items)


def _with_safe_keys(pairs, safe_keys):
    check(type(pairs) in (list, tuple) and all(type(pair) in (list, tuple) for pair in pairs), 'dict')
    check(all(len(pair) == 2 for pair in pairs), 'dict')
    return list(zip(safe_keys([key for key, _ in pairs]), (value for _, value in pairs)))


def _safe_members(items, safe_keys):
    check(type(items) in (list, tuple), 'set')
    return safe_keys(items)


def _frozenset(items=()):
    return frozenset(items)


def _counter(counts):
    check(type(counts) is dict, 'counter')
    return Counter(counts)


def _complex(real, imaginary):
    check(type(real) is float and type(imaginary) is float, 'number')
    return complex(real, imaginary)


def _bytes():
    return b''


def _bytearray(values=b''):
    check(type(values) is bytes, 'bytes')
    return bytearray(values)


def _encode(text, encoding):
    check(type(text) is str and encoding == 'latin1', 'encoding')
    return text.encode('latin1')


def _size(numbers=()):
    check(type(numbers) in (list, tuple) and all(map(is_size, numbers)), 'shape')
    return torch.Size(numbers)


def _device(kind, index=None):
    check(type(kind) is str and (index is None or is_size(index)), 'device')
    return torch.device(kind) if index is None else torch.device(kind, index)


def _dtype(code, *_):
    # Only numbers, booleans and text: an object in an array would be a pointer.
    if type(code) is not str or not re.fullmatch(r'[<>|=]?[biufcSU]\d+', code):
        return Unread('numpy.dtype')
    return np.dtype(code, False, True)  # a copy, whose byte order is set by its BUILD


def _array(*_):
    return np.empty(0, np.int8)


def fill_array(array, version, shape, dtype, is_fortran, values):
    """Give an empty array its numbers, the bytes ``values``."""
    check(type(shape) is tuple and len(shape) <= 32 and all(map(is_size, shape)), 'NumPy array')
    check(isinstance(dtype, np.dtype), 'NumPy array')
    check(type(values) is bytes and len(values) == math.prod(shape) * dtype.itemsize, 'NumPy array')
    array.__setstate__((1, shape, dtype, bool(is_fortran), values))


def _array_of_buffer(values, dtype, shape, order, axes=None):
    """An array as pickles of protocol 5 store it."""
    check(type(values) in (bytes, bytearray) and order in ('C', 'F') and axes is None, 'NumPy array')
    array = _array()
    fill_array(array, 1, shape, dtype, order == 'F', bytes(values))
    return array


def _scalar(dtype, value):
    check(isinstance(dtype, np.dtype) and type(value) is bytes and len(value) == dtype.itemsize, 'NumPy number')
    return np.frombuffer(value, dtype)[0] if value else dtype.type()


TENSORS = {
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_of_bytes,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
}
FUNCTIONS = {
    **TENSORS,
    'torch._tensor._rebuild_from_type_v2': _of_type,
    'torch.Size': _size,
    'torch.device': _device,
    'collections.OrderedDict': _ordered_dict,
    'collections.Counter': _counter,
    'builtins.set': _set,
    'builtins.frozenset': _frozenset,
    'collections.defaultdict': dict,  # made without its arguments
    'builtins.complex': _complex,
    'builtins.bytes': _bytes,
    'builtins.bytearray': _bytearray,
    '_codecs.encode': _encode,
    'numpy.dtype': _dtype,
    **{f'numpy.{core}.multiarray._reconstruct': _array for core in ('core', '_core')},
    **{f'numpy.{core}.numeric._frombuffer': _array_of_buffer for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _scalar for core in ('core', '_core')},
}
OF_KEYS = {  # functions whose argument becomes keys
    'collections.OrderedDict': _with_safe_keys,
    'builtins.set': _safe_members,
    'builtins.frozenset': _safe_members,
}
CLASSES = {  # named and never called; storages with their dtypes
    **{f'torch.{kind}Storage': dtype for kind, dtype in STORAGES.items()},
    'torch.storage.UntypedStorage': torch.uint8,
    **dict.fromkeys(('numpy.ndarray', 'torch.Tensor', 'torch.nn.parameter.Parameter')),
}
