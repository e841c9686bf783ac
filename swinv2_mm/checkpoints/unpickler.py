"""A reader of pickles that makes plain values, tensors and arrays, and never calls what a file names."""

from __future__ import annotations

import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from .unpickled_values import (
    CLASSES,
    DTYPES,
    FUNCTIONS,
    OF_KEYS,
    TENSOR_NAME,
    Name,
    Storage,
    Unread,
    check,
    fill_array,
    is_metadata,
)

OPCODES = re.findall(  # left as they are: they put plain values onto the stack and into the memo
    r'\w+',
    """PROTO FRAME STOP MARK POP POP_MARK GET BINGET LONG_BINGET BINPUT MEMOIZE
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT EMPTY_SET GLOBAL STACK_GLOBAL BINPERSID""",
)
PLAIN = (str, bytes, int, float, bool, type(None))  # types of keys
MAX_GUESSABLE_KEYS = 5_000  # a file can make their hashes collide, and then a dict of n takes n * n steps


class Unpickler(pickle._Unpickler):
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
        return (Name if name in FUNCTIONS or name in CLASSES or name in self.allowed else Unread)(name)

    def load_reduce(self):
        args, called = self.stack.pop(), self.stack[-1]
        check(isinstance(called, Unread) and type(args) is tuple, 'call')
        unread = next((value for value in (called, *args) if type(value) is Unread), None)
        if called.name == 'collections.defaultdict':  # without the function that makes its defaults
            self.stack[-1] = {}
        elif unread:
            # A tensor of a kind that is not read is still a tensor.
            self.stack[-1] = Unread(called.name if TENSOR_NAME.match(called.name) else unread.name)
        elif called.name in FUNCTIONS:
            if called.name in OF_KEYS and args:
                args = (OF_KEYS[called.name](args[0], self._safe_keys), *args[1:])
            self.stack[-1] = FUNCTIONS[called.name](*args)
            if called.name.endswith('._reconstruct'):
                self.unfilled[id(self.stack[-1])] = self.stack[-1]
        else:
            function = self.allowed.get(called.name)
            check(function is not None and not isinstance(function, type), 'call')
            self.stack[-1] = function(*(self.allowed.get(a.name) if type(a) is Name else a for a in args))

    def load_newobj(self):
        args, made = self.stack.pop(), self.stack.pop()
        if type(made) is Unread:
            self.append(Unread(made.name))
            return
        made = self.allowed.get(made.name) if type(made) is Name else None
        check(isinstance(made, type) and args == (), 'instance')
        self.append(made.__new__(made))

    def load_newobj_ex(self):
        self.stack.pop()
        self.load_newobj()

    def load_build(self):
        state, built = self.stack.pop(), self.stack[-1]
        if type(built) is Unread:
            return
        if isinstance(built, np.dtype):
            check(type(state) is tuple and len(state) > 1 and state[1] in ('<', '>', '|', '='), 'state of a dtype')
            check(all(part is None for part in state[2:5]), 'dtype with fields')
            built.__setstate__((3, state[1], None, None, None, built.itemsize, built.alignment, 0))
        elif type(built) is np.ndarray:
            check(id(built) in self.unfilled, 'array that is filled twice')
            if not any(type(part) is Unread for part in state):
                del self.unfilled[id(built)]
                fill_array(built, *state)
        else:
            filled = (OrderedDict, *(item for item in self.allowed.values() if isinstance(item, type)))
            check(type(built) in filled and type(state) is dict, f'state of a {type(built).__name__}')
            for key, value in state.items():
                # No attribute takes the place of a method, or is one that libraries look for.
                allowed = type(key) is str and not key.startswith('__') and not hasattr(type(built), key)
                if allowed and (type(built) is not OrderedDict or (key == '_metadata' and is_metadata(value))):
                    built.__dict__[key] = value

    def persistent_load(self, pid):
        check(self.storage and type(pid) is tuple and len(pid) > 1, 'persistent id')
        check(pid[0] in ('storage', 'module') and isinstance(pid[1], Unread), 'persistent id')
        if pid[0] == 'module':  # a class, in the old format
            return Unread(pid[1].name)
        dtype = CLASSES.get(pid[1].name)
        return Storage(self.storage(dtype, *pid[2:])) if dtype else Unread(pid[1].name)

    def _safe_keys(self, keys, held=0):
        """New keys of a dict, or members of a set, that has ``held`` already; what is not plain becomes `Unread`."""
        return [self._safe_key(key, 4 * (held + len(keys)) + 1000) for key in keys]

    def _safe_key(self, key, bound):
        if isinstance(key, Unread) or type(key) in (str, bytes, bool, type(None)):  # hashes of text are random
            return key
        if type(key) is int and 0 <= key < bound:  # such as indices of parameters: so close, few of them collide
            return key
        self.num_guessable_keys += 1
        plain = type(key) in PLAIN or (type(key) is tuple and all(type(part) in PLAIN for part in key))
        if plain and self.num_guessable_keys <= MAX_GUESSABLE_KEYS:
            return key
        return Unread(f'{type(key).__module__}.{type(key).__qualname__}')

    def load_put(self):
        self._check_memo(int(self.readline()[:20]))

    def load_long_binput(self):
        self._check_memo(*struct.unpack('<I', self.read(4)))

    def _check_memo(self, index):
        check(0 <= index <= len(self.memo), 'memo')  # its keys are guessable too
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
        """Whether to fill a container. It must be of one of these kinds, or of a class that is not read."""
        check(type(container) in (*kinds, Unread), kinds[0].__name__)
        return type(container) is not Unread

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
