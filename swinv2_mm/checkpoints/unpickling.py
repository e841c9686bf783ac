"""Reading files of tensors without running code from them.

``torch.load(weights_only=True)`` does so too, but before PyTorch 2.6 it hands TorchScript archives to a loader that
runs them (CVE-2025-32434), and at any version it gives up where a file holds one class that it does not know. Here no
function of a library can be reached from a file: what it names is looked up in a list, and each call goes to a function
below, which checks what it is given. What is not on the list is never made: it is left out, and named. Memory is taken
of the size that is in the file.

The formats are those of ``torch.save`` (`torch/serialization.py`): an archive with a pickle and a record for each
storage, and before PyTorch 1.6 pickles one after the other with the storages behind them.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, BinaryIO

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
    """PROTO FRAME STOP MARK POP POP_MARK GET BINGET LONG_BINGET BINPUT MEMOIZE
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT EMPTY_SET GLOBAL STACK_GLOBAL BINPERSID""",
)
PLAIN_PICKLE = 'a plain pickle'
PLAIN = (str, bytes, int, float, bool, type(None))  # what keys are
MAX_GUESSABLE_KEYS = 5_000  # whose hashes a file can make collide, so that a dict of n of them takes n * n steps
MAX_EXPANSION = 16, 2**20  # elements of a tensor, over those in the file, and that are always allowed
TENSOR_NAME = re.compile(r'torch\._(utils|tensor)\._rebuild|torch\.Tensor')


class _Unread:
    """What a file names, as it is on the stack: nothing that can be called. Stands for all that is made of it."""

    def __init__(self, name: str):
        self.name = name


class _Name(_Unread):
    """The name of something that is read."""


class _Storage(_Unread):
    """The elements of a storage, (N,), in the memory that all its tensors share."""

    def __init__(self, elements: Tensor):
        super().__init__('torch.storage')
        self.elements = elements


def load(path: str | os.PathLike, allowed: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """Read a file of tensors and plain containers onto the CPU without running code from it.

    Args:
        path (str): a file that ``torch.save`` wrote.
        allowed (Mapping): what else the file may hold, by the name that it has for it: classes, of which the attributes
            alone are read, and functions of such classes and plain values.

    Returns:
        tuple: what the file holds, and the classes and functions by the places where it holds another, as
        ``{'meta/path': 'pathlib.PosixPath'}``. Such an item of a dict or set, or attribute, is removed; in a list it
        becomes None.

    Raises:
        pickle.UnpicklingError: the file is damaged or no such file; or it is all of another class, or a weight is, or
            it holds no tensor beside; then the message names the class after ``GLOBAL``.
    """
    with open(path, 'rb') as file:
        is_zip = file.read(4) == b'PK\x03\x04'
        file.seek(0)
        result, unfilled = _load_archive(file, allowed) if is_zip else _load_legacy(file, allowed)
    return result, _take_out_unread(result, unfilled)


def _take_out_unread(root, unfilled):
    """Take out of containers, in place, what was not read. Returns its names by its places."""
    names = {}

    def name_of(value):
        """The name of what was not read: the value itself, or something in it that cannot be taken out."""
        if id(value) not in names:
            names[id(value)] = None  # also of what holds itself
            if isinstance(value, _Unread):
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
    """Whether a dict is of weights: it has a tensor, or all are, also of kinds that are not read."""
    is_tensor = [isinstance(held, Tensor) or bool(TENSOR_NAME.match(name_of(held) or '')) for held in items.values()]
    return all(is_tensor) or any(isinstance(held, Tensor) for held in items.values())


def _text(place, key):
    """The last keys on the way to a value."""
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

        pickled = io.BytesIO(archive.read(f'{root}data.pkl'))  # all of it, so that its checksum is compared
        unpickler = _Unpickler(pickled, allowed, storage)
        return unpickler.load(), unpickler.unfilled


def _load_legacy(file, allowed):
    start = _Unpickler(file).load()
    if isinstance(start, dict):
        raise pickle.UnpicklingError(PLAIN_PICKLE)
    if (start, _Unpickler(file).load()) != LEGACY_START:
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

    unpickler = _Unpickler(file, allowed, storage)
    result = unpickler.load()
    keys = _Unpickler(file).load()
    _check(type(keys) is list and len(keys) == len(memory) and set(keys) == set(memory), 'list of storages')
    for key in keys:
        held, itemsize = memory[key]
        _check(file.read(8) == struct.pack('<q', len(held) // itemsize), 'storage')
        data = file.read(len(held))
        _check(len(data) == len(held), 'end of the file')
        held.copy_(_memory(data))
    return result, unpickler.unfilled


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


class _Unpickler(pickle._Unpickler):
    """Makes plain values, tensors and arrays of numbers, and instances of the classes that are allowed.

    Args:
        file (BinaryIO): at the start of a pickle.
        allowed (Mapping, optional): as in `load`.
        storage (Callable, optional): from the dtype of a storage and the rest of its id to its elements.
    """

    def __init__(self, file: BinaryIO, allowed: Mapping[str, Any] = MappingProxyType({}), storage=None):
        super().__init__(file, encoding='utf-8')
        self.allowed, self.storage = allowed, storage
        self.unfilled = {}  # arrays that wait for their numbers, by id
        self.num_guessable_keys = 0

    def find_class(self, module, name):
        module = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(module, module)  # names of Python 2
        name = f'{module}.{name}'
        if name in DTYPES:
            return DTYPES[name]
        return (_Name if name in FUNCTIONS or name in CLASSES or name in self.allowed else _Unread)(name)

    def load_reduce(self):
        args, called = self.stack.pop(), self.stack[-1]
        _check(isinstance(called, _Unread) and type(args) is tuple, 'call')
        unread = next((value for value in (called, *args) if type(value) is _Unread), None)
        if called.name == 'collections.defaultdict':  # whatever makes its defaults
            self.stack[-1] = {}
        elif unread:
            # A tensor of an unread kind is still one.
            self.stack[-1] = _Unread(called.name if TENSOR_NAME.match(called.name) else unread.name)
        elif called.name in FUNCTIONS:
            if called.name in OF_KEYS and args:
                args = (OF_KEYS[called.name](args[0], self._safe_keys), *args[1:])
            self.stack[-1] = FUNCTIONS[called.name](*args)
            if called.name.endswith('._reconstruct'):
                self.unfilled[id(self.stack[-1])] = self.stack[-1]
        else:
            function = self.allowed.get(called.name)
            _check(function is not None and not isinstance(function, type), 'call')
            self.stack[-1] = function(*(self.allowed.get(a.name) if type(a) is _Name else a for a in args))

    def load_newobj(self):
        args, made = self.stack.pop(), self.stack.pop()
        if type(made) is _Unread:
            self.append(_Unread(made.name))
            return
        made = self.allowed.get(made.name) if type(made) is _Name else None
        _check(isinstance(made, type) and args == (), 'instance')
        self.append(made.__new__(made))

    def load_newobj_ex(self):
        self.stack.pop()
        self.load_newobj()

    def load_build(self):
        state, built = self.stack.pop(), self.stack[-1]
        if type(built) is _Unread:
            return
        if isinstance(built, np.dtype):
            _check(type(state) is tuple and len(state) > 1 and state[1] in ('<', '>', '|', '='), 'state of a dtype')
            _check(all(part is None for part in state[2:5]), 'dtype with fields')
            built.__setstate__((3, state[1], None, None, None, built.itemsize, built.alignment, 0))
        elif type(built) is np.ndarray:
            _check(id(built) in self.unfilled, 'array that is filled twice')
            if not any(type(part) is _Unread for part in state):
                del self.unfilled[id(built)]
                _fill_array(built, *state)
        else:
            filled = (OrderedDict, *(item for item in self.allowed.values() if isinstance(item, type)))
            _check(type(built) in filled and type(state) is dict, f'state of a {type(built).__name__}')
            for key, value in state.items():
                # No attribute takes the place of a method, or is one that libraries look for.
                allowed = type(key) is str and not key.startswith('__') and not hasattr(type(built), key)
                if allowed and (type(built) is not OrderedDict or (key == '_metadata' and _is_metadata(value))):
                    built.__dict__[key] = value

    def persistent_load(self, pid):
        _check(self.storage and type(pid) is tuple and len(pid) > 1, 'persistent id')
        _check(pid[0] in ('storage', 'module') and isinstance(pid[1], _Unread), 'persistent id')
        if pid[0] == 'module':  # a class, in the old format
            return _Unread(pid[1].name)
        dtype = CLASSES.get(pid[1].name)
        return _Storage(self.storage(dtype, *pid[2:])) if dtype else _Unread(pid[1].name)

    def _safe_keys(self, keys, held=0):
        """Keys of a dict, or members of a set, that has some already; what is no plain value is not read."""
        return [self._safe_key(key, 4 * (held + len(keys)) + 1000) for key in keys]

    def _safe_key(self, key, bound):
        if isinstance(key, _Unread) or type(key) in (str, bytes, bool, type(None)):  # hashes of text nobody can guess
            return key
        if type(key) is int and 0 <= key < bound:  # as of parameters: so close together, few share a place
            return key
        self.num_guessable_keys += 1
        plain = type(key) in PLAIN or (type(key) is tuple and all(type(part) in PLAIN for part in key))
        if plain and self.num_guessable_keys <= MAX_GUESSABLE_KEYS:
            return key
        return _Unread(f'{type(key).__module__}.{type(key).__qualname__}')

    def load_put(self):
        self._check_memo(int(self.readline()[:20]))

    def load_long_binput(self):
        self._check_memo(*struct.unpack('<I', self.read(4)))

    def _check_memo(self, index):
        _check(0 <= index <= len(self.memo), 'memo')  # its keys are guessable too
        self.memo[index] = self.stack[-1]

    def load_append(self):
        if self._takes(self.stack[-2], (list,)):
            super().load_append()
        else:
            self.stack.pop()

    def load_appends(self):
        if self._takes(self.metastack[-1][-1], (list,)):
            super().load_appends()
        else:
            self.pop_mark()

    def load_setitem(self):
        if self._takes(self.stack[-3], (dict, OrderedDict)):
            self.stack[-2:-1] = self._safe_keys(self.stack[-2:-1], len(self.stack[-3]))
            super().load_setitem()
        else:
            del self.stack[-2:]

    def load_setitems(self):
        if self._takes(self.metastack[-1][-1], (dict, OrderedDict)):
            self.stack[::2] = self._safe_keys(self.stack[::2], len(self.metastack[-1][-1]))
            super().load_setitems()
        else:
            self.pop_mark()

    def load_additems(self):
        if self._takes(self.metastack[-1][-1], (set,)):
            self.stack[:] = self._safe_keys(self.stack, len(self.metastack[-1][-1]))
            super().load_additems()
        else:
            self.pop_mark()

    def load_frozenset(self):
        self.stack[:] = self._safe_keys(self.stack)
        super().load_frozenset()

    def _takes(self, container, kinds):
        """Whether a container of some kinds is there to be filled, and not one of a class that is not read."""
        _check(type(container) in (*kinds, _Unread), kinds[0].__name__)
        return type(container) is not _Unread

    dispatch = {  # noqa: RUF012
        **{getattr(pickle, opcode)[0]: pickle._Unpickler.dispatch[getattr(pickle, opcode)[0]] for opcode in OPCODES},
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.PUT[0]: load_put,
        pickle.LONG_BINPUT[0]: load_long_binput,
    }


# ---------------------------------------------------------------- what stands for functions that files name


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    _check(type(storage) is _Storage, 'storage of a tensor')
    if metadata:  # a conjugate or negative view
        return _Unread('torch.Tensor')
    _check(type(size) is tuple and type(stride) is tuple and len(size) == len(stride), 'shape')
    _check(all(_is_size(number) for number in (offset, *size, *stride)), 'shape')
    if 0 in size:
        return storage.elements.new_empty(size)
    times, always = MAX_EXPANSION
    if math.prod(size) > max(times * len(storage.elements), always):  # with strides of 0 a small file fills the memory
        return _Unread('torch.Tensor')
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    _check(last < len(storage.elements), 'tensor that is larger than its storage')
    return storage.elements.as_strided(size, stride, storage.elements.storage_offset() + offset)


def _tensor_of_bytes(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    _check(type(storage) is _Storage and isinstance(dtype, torch.dtype), 'storage of a tensor')
    _check(len(storage.elements) % _itemsize(dtype) == 0, 'size of a storage')
    return _tensor(_Storage(storage.elements.view(dtype)), offset, size, stride, metadata=metadata)


def _is_metadata(value):
    """Whether a value is what PyTorch keeps of the modules of a state dict, their versions."""
    return isinstance(value, dict) and all(
        type(name) is str and type(entry) is dict and type(entry.get('version')) in (int, type(None))
        for name, entry in value.items()
    )


def _parameter(data, requires_grad=True, hooks=None, state=None):
    _check(type(data) is Tensor and type(requires_grad) is bool, 'parameter')
    return nn.Parameter(data, requires_grad and (data.is_floating_point() or data.is_complex()))


def _of_type(function, kind, args, state):
    _check(type(function) is _Name and function.name in TENSORS and type(args) is tuple, 'tensor')
    return _Unread(function.name) if any(type(value) is _Unread for value in args) else TENSORS[function.name](*args)


def _ordered_dict(pairs=()):
    return OrderedDict(pairs)


def _set(items=()):
    return set(items)


def _with_safe_keys(pairs, safe_keys):
    _check(type(pairs) in (list, tuple) and all(type(pair) in (list, tuple) for pair in pairs), 'dict')
    _check(all(len(pair) == 2 for pair in pairs), 'dict')
    return list(zip(safe_keys([key for key, _ in pairs]), (value for _, value in pairs)))


def _safe_members(items, safe_keys):
    _check(type(items) in (list, tuple), 'set')
    return safe_keys(items)


def _frozenset(items=()):
    return frozenset(items)


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
    # Numbers, booleans and text alone: an object in an array would be a pointer.
    if type(code) is not str or not re.fullmatch(r'[<>|=]?[biufcSU]\d+', code):
        return _Unread('numpy.dtype')
    return np.dtype(code, False, True)  # a copy, which gets its byte order when it is built


def _array(*_):
    return np.empty(0, np.int8)


def _fill_array(array, version, shape, dtype, is_fortran, values):
    _check(type(shape) is tuple and len(shape) <= 32 and all(map(_is_size, shape)), 'NumPy array')
    _check(isinstance(dtype, np.dtype), 'NumPy array')
    _check(type(values) is bytes and len(values) == math.prod(shape) * dtype.itemsize, 'NumPy array')
    array.__setstate__((1, shape, dtype, bool(is_fortran), values))


def _array_of_buffer(values, dtype, shape, order, axes=None):
    """An array as protocol 5 has it."""
    _check(type(values) in (bytes, bytearray) and order in ('C', 'F') and axes is None, 'NumPy array')
    array = _array()
    _fill_array(array, 1, shape, dtype, order == 'F', bytes(values))
    return array


def _scalar(dtype, value):
    _check(isinstance(dtype, np.dtype) and type(value) is bytes and len(value) == dtype.itemsize, 'NumPy number')
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
CLASSES = {  # that are named and never called, and the dtypes of storages
    **{f'torch.{kind}Storage': dtype for kind, dtype in STORAGES.items()},
    'torch.storage.UntypedStorage': torch.uint8,
    **dict.fromkeys(('numpy.ndarray', 'torch.Tensor', 'torch.nn.parameter.Parameter')),
}
