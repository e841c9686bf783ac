"""Reading files of tensors without running code from them, for PyTorch before 2.6.

There ``weights_only=True`` hands TorchScript archives to a loader that runs them (CVE-2025-32434), and knows no class
beside those of tensors. Here no function of a library can be reached from a file: what it names is looked up in a list,
and each call goes to a function below, which checks what it is given. Memory is taken of the size that is in the file.

The formats are those of ``torch.save`` (`torch/serialization.py`): an archive with a pickle and a record for each
storage, and before PyTorch 1.6 pickles one after the other with the storages behind them.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

LEGACY_START = 0x1950A86A20F9469CFC6C, 1001  # magic number and version
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
OPCODES = re.findall(  # that do what they always do: put plain values onto the stack and into the memo
    r'\w+',
    """PROTO FRAME STOP MARK POP POP_MARK GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT EMPTY_SET GLOBAL STACK_GLOBAL BINPERSID""",
)
PLAIN = (str, bytes, int, float, bool, type(None))  # what keys are


class _Name(NamedTuple):
    """What a file names, as it is on the stack: nothing that can be called."""

    name: str


class _Storage(NamedTuple):
    """The elements of a storage, (N,), in the memory that all its tensors share."""

    elements: Tensor


def load(path: str | os.PathLike, allowed: list):
    """What `compat.load` returns and raises; of ``allowed`` classes the attributes alone are read."""
    named = [item if isinstance(item, tuple) else (item, f'{item.__module__}.{item.__qualname__}') for item in allowed]
    allowed = {name: item for item, name in named if not name.startswith('numpy')}
    with open(path, 'rb') as file:
        is_zip = file.read(4) == b'PK\x03\x04'
        file.seek(0)
        return _load_archive(file, allowed) if is_zip else _load_legacy(file, allowed)


def _load_archive(file, allowed):
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        roots = {name.partition('/')[0] for name in names}
        _check(len(roots) == 1 and len({name.lower() for name in names}) == len(names), 'names in an archive')
        root = f'{roots.pop()}/'
        if f'{root}constants.pkl' in names:
            raise RuntimeError('it is a TorchScript archive')
        _check(all(entry.compress_type == zipfile.ZIP_STORED for entry in entries), 'compression')
        _check(sum(entry.file_size for entry in entries) <= os.fstat(file.fileno()).st_size, 'sizes in an archive')
        if f'{root}byteorder' in names and archive.read(f'{root}byteorder') != b'little':
            raise pickle.UnpicklingError('written on a big-endian machine')
        memory = {}

        def storage(dtype, key, location, num_elements):
            if key not in memory:
                _check(isinstance(key, str) and re.fullmatch(r'\d+', key), 'storage')
                memory[key] = _memory(archive.read(f'{root}data/{key}'))
            return _elements(memory[key], dtype, num_elements)

        with archive.open(f'{root}data.pkl') as pickled:
            return _Unpickler(pickled, allowed, storage).load()


def _load_legacy(file, allowed):
    if tuple(_Unpickler(file).load() for _ in LEGACY_START) != LEGACY_START:
        raise pickle.UnpicklingError('no file of PyTorch')
    _Unpickler(file).load()  # about the machine that wrote it
    left, memory = os.fstat(file.fileno()).st_size, {}

    def storage(dtype, key, location, num_elements, view):
        nonlocal left
        if key not in memory:
            _check(type(key) is str and _is_size(num_elements), 'storage')
            left -= num_elements * _itemsize(dtype)
            _check(left >= 0, 'size of a storage')
            memory[key] = torch.zeros(num_elements * _itemsize(dtype), dtype=torch.uint8), _itemsize(dtype)
        elements = _elements(memory[key][0], dtype, num_elements)
        if view is None:
            return elements
        _, start, length = view
        _check(_is_size(start) and _is_size(length) and start + length <= num_elements, 'view')
        return elements[start : start + length]

    result = _Unpickler(file, allowed, storage).load()
    keys = _Unpickler(file).load()
    _check(type(keys) is list and len(keys) == len(memory) and set(keys) == set(memory), 'list of storages')
    for key in keys:
        held, itemsize = memory[key]
        _check(file.read(8) == struct.pack('<q', len(held) // itemsize), 'storage')
        data = file.read(len(held))
        _check(len(data) == len(held), 'end of the file')
        held.copy_(_memory(data))
    return result


def _memory(data):
    """Bytes as a tensor, (N,)."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _itemsize(dtype):
    return torch.empty(0, dtype=dtype).element_size()


def _elements(memory, dtype, num_elements):
    _check(_is_size(num_elements) and num_elements * _itemsize(dtype) == len(memory), 'size of a storage')
    return memory.view(dtype)


def _is_size(number):
    return type(number) is int and number >= 0


def _check(holds, what):
    if not holds:
        raise pickle.UnpicklingError(f'Unsupported {what}')


def _check_keys(keys):
    for key in keys:
        flat = key if type(key) is tuple else (key,)
        _check(all(type(part) in PLAIN for part in flat), 'key')


class _Unpickler(pickle._Unpickler):
    """Makes plain values, tensors and arrays of numbers, and instances of the classes that are allowed.

    Args:
        file (BinaryIO): at the start of a pickle.
        allowed (dict, optional): classes, and functions of such classes and plain values, by the name in the pickle.
        storage (Callable, optional): from the dtype of a storage and the rest of its id to its elements.
    """

    def __init__(self, file: BinaryIO, allowed: dict[str, Any] | None = None, storage=None):
        super().__init__(file, encoding='utf-8')
        self.allowed, self.storage = allowed or {}, storage
        self.arrays = []  # that wait for their numbers

    def find_class(self, module, name):
        module = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(module, module)  # names of Python 2
        name = f'{module}.{name}'
        if name in DTYPES:
            return DTYPES[name]
        if not (name in FUNCTIONS or name in CLASSES or name in self.allowed):
            raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {name}')
        return _Name(name)

    def load_reduce(self):
        args, called = self.stack.pop(), self.stack[-1]
        _check(type(called) is _Name and type(args) is tuple, 'call')
        if called.name in FUNCTIONS:
            self.stack[-1] = FUNCTIONS[called.name](*args)
            if type(self.stack[-1]) is np.ndarray:
                self.arrays.append(self.stack[-1])
        else:
            function = self.allowed.get(called.name)
            _check(function is not None and not isinstance(function, type), 'call')
            self.stack[-1] = function(*(self.allowed.get(a.name) if type(a) is _Name else a for a in args))

    def load_newobj(self):
        args, made = self.stack.pop(), self.stack.pop()
        made = self.allowed.get(made.name) if type(made) is _Name else None
        _check(isinstance(made, type) and args == (), 'instance')
        self.append(made.__new__(made))

    def load_build(self):
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, np.dtype):
            _check(type(state) is tuple and len(state) > 1 and state[1] in ('<', '>', '|', '='), 'state of a dtype')
            _check(all(part is None for part in state[2:5]), 'dtype with fields')
            built.__setstate__((3, state[1], None, None, None, -1, -1, 0))
        elif type(built) is np.ndarray:
            _check(any(array is built for array in self.arrays), 'array that is filled twice')
            self.arrays = [array for array in self.arrays if array is not built]
            _fill_array(built, *state)
        else:
            filled = (OrderedDict, *(item for item in self.allowed.values() if isinstance(item, type)))
            _check(type(built) in filled and type(state) is dict, f'state of a {type(built).__name__}')
            _check_keys(state)
            for key, value in state.items():
                # No attribute takes the place of a method, or is one that libraries look for.
                if type(key) is str and not key.startswith('__') and not hasattr(type(built), key):
                    built.__dict__[key] = value

    def persistent_load(self, pid):
        _check(self.storage and type(pid) is tuple and len(pid) > 1 and pid[0] == 'storage', 'persistent id')
        _check(type(pid[1]) is _Name and pid[1].name in CLASSES, 'storage')
        dtype = CLASSES[pid[1].name]
        _check(dtype, 'storage')
        return _Storage(self.storage(dtype, *pid[2:]))

    def load_append(self):
        _check(type(self.stack[-2]) is list, 'list')
        super().load_append()

    def load_appends(self):
        _check(type(self.metastack[-1][-1]) is list, 'list')
        super().load_appends()

    def load_setitem(self):
        _check(type(self.stack[-3]) in (dict, OrderedDict), 'dict')
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        _check(type(self.metastack[-1][-1]) in (dict, OrderedDict), 'dict')
        _check_keys(self.stack[::2])
        super().load_setitems()

    def load_additems(self):
        _check(type(self.metastack[-1][-1]) is set, 'set')
        _check_keys(self.stack)
        super().load_additems()

    dispatch = {  # noqa: RUF012
        **{getattr(pickle, opcode)[0]: pickle._Unpickler.dispatch[getattr(pickle, opcode)[0]] for opcode in OPCODES},
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
    }


# ---------------------------------------------------------------- what stands for functions that files name


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    _check(type(storage) is _Storage, 'storage of a tensor')
    _check(not metadata, 'conjugate or negative view')
    _check(type(size) is tuple and type(stride) is tuple and len(size) == len(stride), 'shape')
    _check(all(_is_size(number) for number in (offset, *size, *stride)), 'shape')
    if 0 in size:
        return storage.elements.new_empty(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    _check(last < len(storage.elements), 'tensor that is larger than its storage')
    return storage.elements.as_strided(size, stride, offset)


def _parameter(data, requires_grad=True, hooks=None, state=None):
    _check(type(data) is Tensor and type(requires_grad) is bool, 'parameter')
    return nn.Parameter(data, requires_grad and (data.is_floating_point() or data.is_complex()))


def _of_type(function, kind, args, state):
    _check(type(function) is _Name and function.name in TENSORS and type(args) is tuple, 'tensor')
    return TENSORS[function.name](*args)


def _ordered_dict(pairs=()):
    _check(type(pairs) in (list, tuple) and all(type(pair) in (list, tuple) for pair in pairs), 'dict')
    _check_keys([pair[0] for pair in pairs])
    return OrderedDict(pairs)


def _set(items=()):
    _check(type(items) in (list, tuple), 'set')
    _check_keys(items)
    return set(items)


def _counter(counts):
    _check(type(counts) is dict, 'counter')
    return Counter(counts)


def _complex(real, imaginary):
    _check(type(real) is float and type(imaginary) is float, 'number')
    return complex(real, imaginary)


def _bytes():
    return b''


def _bytearray(values=b''):
    _check(type(values) is bytes, 'bytes')
    return bytearray(values)


def _encode(text, encoding):
    _check(type(text) is str and encoding == 'latin1', 'encoding')
    return text.encode('latin1')


def _size(numbers=()):
    _check(type(numbers) in (list, tuple) and all(map(_is_size, numbers)), 'shape')
    return torch.Size(numbers)


def _device(kind, index=None):
    _check(type(kind) is str and (index is None or _is_size(index)), 'device')
    return torch.device(kind) if index is None else torch.device(kind, index)


def _dtype(code, *_):
    # Numbers and booleans alone: an object in an array would be a pointer.
    _check(type(code) is str and re.fullmatch(r'[<>|=]?[biufc]\d+', code), 'NumPy dtype')
    return np.dtype(code, False, True)  # a copy, which gets its byte order when it is built


def _array(*_):
    return np.empty(0, np.int8)


def _fill_array(array, version, shape, dtype, is_fortran, values):
    _check(type(shape) is tuple and len(shape) <= 32 and all(map(_is_size, shape)), 'NumPy array')
    _check(isinstance(dtype, np.dtype), 'NumPy array')
    _check(type(values) is bytes and len(values) == math.prod(shape) * dtype.itemsize, 'NumPy array')
    array.__setstate__((1, shape, dtype, bool(is_fortran), values))


def _scalar(dtype, value):
    _check(isinstance(dtype, np.dtype) and type(value) is bytes and len(value) == dtype.itemsize, 'NumPy number')
    return np.frombuffer(value, dtype)[0]


TENSORS = {
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
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
    'builtins.complex': _complex,
    'builtins.bytes': _bytes,
    'builtins.bytearray': _bytearray,
    '_codecs.encode': _encode,
    'numpy.dtype': _dtype,
    **{f'numpy.{core}.multiarray._reconstruct': _array for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _scalar for core in ('core', '_core')},
}
CLASSES = {  # that are named and never called, and the dtypes of storages
    **{f'torch.{kind}Storage': dtype for kind, dtype in STORAGES.items()},
    **dict.fromkeys(('numpy.ndarray', 'torch.Tensor', 'torch.nn.parameter.Parameter')),
}
