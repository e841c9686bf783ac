"""The reader for PyTorch before 2.6: no pickle gets further than plain values and what the reader lists."""

import argparse
import io
import pickle
import tarfile
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from swinv2_mm import unpickling
from swinv2_mm.files import MMENGINE_GLOBALS, SETTINGS_GLOBALS


def read(path):
    return unpickling.load(path, [*MMENGINE_GLOBALS, *SETTINGS_GLOBALS])


@pytest.fixture
def read_pickle(tmp_path):
    """Read a pickle given as bytes, in the archive that ``torch.save`` would write around it."""

    def read_pickle(*opcodes):
        with zipfile.ZipFile(tmp_path / 'x.pth', 'w') as file:
            file.writestr('archive/data.pkl', b''.join(opcodes) + pickle.STOP)
            file.writestr('archive/version', b'3\n')
        return read(tmp_path / 'x.pth')

    return read_pickle


def constant(value):
    """The opcodes that put a plain value onto the stack."""
    return pickle.dumps(value, 2)[2:-1]


def name(module, name):
    """The opcodes that put a function or class onto the stack."""
    return pickle.GLOBAL + f'{module}\n{name}\n'.encode()


def call(function, *args):
    """The opcodes that call a function with values that are opcodes, too."""
    return function + pickle.MARK + b''.join(args) + pickle.TUPLE + pickle.REDUCE


DTYPE = name('numpy', 'dtype')
FLOAT = call(DTYPE, constant('f8'))
ARRAY = call(name('numpy.core.multiarray', '_reconstruct'), name('numpy', 'ndarray'), constant((0,)), constant(b'b'))


def test_the_opcodes_above_are_those_of_values_that_are_read(read_pickle):
    assert read_pickle(constant({'a': [1, 'b', None, (2.5, True)]})) == {'a': [1, 'b', None, (2.5, True)]}
    assert read_pickle(name('torch', 'float16')) == torch.float16
    dtype = read_pickle(FLOAT, constant((3, '>', None, None, None, -1, -1, 0)), pickle.BUILD)
    assert dtype == np.dtype('>f8') != np.dtype('f8')
    state = pickle.MARK, constant(1), constant((2,)), FLOAT, constant(False), constant(np.array([1.5, 2]).tobytes())
    array = read_pickle(ARRAY, *state, pickle.TUPLE, pickle.BUILD)
    assert (type(array), array.dtype, array.tolist()) == (np.ndarray, np.float64, [1.5, 2])


@pytest.mark.parametrize('as_zip', [True, False])
def test_what_training_writes_is_read_back(tmp_path, as_zip):
    weights = OrderedDict(w=torch.randn(3, 4).T, half=torch.randn(5).bfloat16(), n=torch.tensor(3))
    weights['p'] = torch.nn.Parameter(torch.randn(2))
    weights._metadata = {'': {'version': 2}}
    shared = torch.arange(6.0)
    written = {
        'weights': weights,
        'views': [shared[:2], shared[2:]],
        'optimizer': torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict(),
        'args': argparse.Namespace(lr=1e-3, betas=(0.9, 0.999)),
        'plain': [{1, 2}, Counter('aab'), 1j, bytearray(b'a'), torch.float16, torch.device('cpu'), torch.Size([1, 2])],
        'numpy': [np.float32(2.5), np.int64(3), np.bool_(True), np.arange(6).reshape(2, 3), np.array([])],
    }
    torch.save(written, tmp_path / 'x.pth', _use_new_zipfile_serialization=as_zip)
    result = read(tmp_path / 'x.pth')
    assert list(result['weights']) == list(weights)
    for key, value in weights.items():
        assert torch.equal(result['weights'][key], value) and result['weights'][key].dtype == value.dtype
    assert result['weights']._metadata == weights._metadata
    assert [view.tolist() for view in result['views']] == [[0, 1], [2, 3, 4, 5]]
    assert result['optimizer'] == written['optimizer']
    assert result['args'] == written['args']
    assert result['plain'] == written['plain']
    assert [(type(value), value.dtype) for value in result['numpy']] == [(type(v), v.dtype) for v in written['numpy']]
    assert [value.tolist() for value in result['numpy']] == [value.tolist() for value in written['numpy']]


FORBIDDEN = [
    ('os', 'system'),
    ('posix', 'system'),
    ('subprocess', 'Popen'),
    ('builtins', 'eval'),
    ('__builtin__', 'exec'),
    ('builtins', '__import__'),
    ('builtins', 'open'),
    ('io', 'open'),
    ('pickle', 'loads'),
    ('functools', 'partial'),
    ('operator', 'attrgetter'),
    ('copyreg', '_reconstructor'),
    ('torch', 'load'),
    ('torch.jit', 'load'),
    ('torch.hub', 'load'),
    ('torch.serialization', 'load'),
    ('torch._utils', '_rebuild_tensor_v2.__globals__'),
    ('torch', 'nn.Module'),
    ('numpy', 'load'),
    ('numpy', 'fromfile'),
    ('numpy.lib.npyio', 'load'),
    ('swinv2_mm.unpickling', 'load'),
]


@pytest.mark.parametrize('module, attribute', FORBIDDEN)
@pytest.mark.parametrize('opcode', ['GLOBAL', 'STACK_GLOBAL', 'INST', 'OBJ', 'NEWOBJ'])
def test_no_other_name_is_looked_up(read_pickle, tmp_path, module, attribute, opcode):
    ran = constant(str(tmp_path / 'ran'))
    opcodes = {
        'GLOBAL': call(name(module, attribute), ran),
        'STACK_GLOBAL': call(constant(module) + constant(attribute) + pickle.STACK_GLOBAL, ran),
        'INST': pickle.MARK + ran + pickle.INST + f'{module}\n{attribute}\n'.encode(),
        'OBJ': pickle.MARK + name(module, attribute) + ran + pickle.OBJ,
        'NEWOBJ': name(module, attribute) + pickle.MARK + ran + pickle.TUPLE + pickle.NEWOBJ,
    }
    module = module.replace('__builtin__', 'builtins')
    with pytest.raises(pickle.UnpicklingError, match=rf'^Unsupported global: GLOBAL {module}\.{attribute}$'):
        read_pickle(opcodes[opcode])
    assert not (tmp_path / 'ran').exists()


FILLED = {
    'a function': name('torch._utils', '_rebuild_tensor_v2'),
    'a class': name('argparse', 'Namespace'),
    'a tensor': call(name('torch', 'Tensor'), constant(2)),
    'a parameter': call(name('torch.nn.parameter', 'Parameter'), call(name('torch', 'Tensor'), constant(2))),
    'a dict': constant({}),
    'a device': call(name('torch', 'device'), constant('cpu')),
}


@pytest.mark.parametrize('kind', FILLED)
@pytest.mark.parametrize('state', [{'__class__': 1}, (None, {'__class__': 1}), [1]], ids=str)
def test_instances_of_no_other_class_are_filled(read_pickle, kind, state):
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported state of a '):
        read_pickle(FILLED[kind], constant(state), pickle.BUILD)


@pytest.mark.parametrize('state', [(None, {'lr': 1}), [1], None], ids=str)
def test_settings_are_filled_with_named_attributes_alone(read_pickle, state):
    namespace = name('argparse', 'Namespace') + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    assert read_pickle(namespace, constant({'lr': 1}), pickle.BUILD) == argparse.Namespace(lr=1)
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported state of a Namespace'):
        read_pickle(namespace, constant(state), pickle.BUILD)


@pytest.mark.parametrize(
    'code', ['O', '|O8', 'V8', 'S3', 'U3', 'f8,O', '3f8', 'M8[s]', 'a', '', 'f', 8, [('a', 'O')]], ids=str
)
def test_no_dtype_but_numbers_is_made(read_pickle, code):
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported NumPy dtype '):
        read_pickle(call(DTYPE, constant(code)))


def test_a_dtype_gets_no_fields(read_pickle):
    state = pickle.MARK, constant(3), constant('|'), constant(None), constant(('a',))
    fields = constant({'a': 0}), constant(8), constant(1), constant(27), pickle.TUPLE
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported NumPy dtype with fields'):
        read_pickle(FLOAT, *state, *fields, pickle.BUILD)


@pytest.mark.parametrize(
    'values, shape', [([1, 2], (2,)), ('ab', (2,)), (bytes(8), (-1, -1)), (bytes(16), (-2,))], ids=str
)
def test_an_array_is_filled_with_the_bytes_of_its_numbers_alone(read_pickle, values, shape):
    state = pickle.MARK, constant(1), constant(shape), FLOAT, constant(False), constant(values), pickle.TUPLE
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported NumPy array'):
        read_pickle(ARRAY, *state, pickle.BUILD)


def test_more_numbers_than_bytes_are_an_error(read_pickle):
    state = pickle.MARK, constant(1), constant((3,)), FLOAT, constant(False), constant(bytes(16)), pickle.TUPLE
    with pytest.raises(ValueError):
        read_pickle(ARRAY, *state, pickle.BUILD)


def test_arrays_are_not_made_by_calling_their_class(read_pickle):
    with pytest.raises(TypeError):
        read_pickle(call(name('numpy', 'ndarray'), constant((1,)), constant('O'), constant(bytes(8))))


def test_text_is_encoded_as_latin1_alone(read_pickle):
    encode = name('_codecs', 'encode')
    assert read_pickle(call(encode, constant('\xe4'), constant('latin1'))) == b'\xe4'
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported encoding'):
        read_pickle(call(encode, constant('a'), constant('zip')))


SOURCE = object()


def test_the_source_of_a_module_is_not_compared(tmp_path):
    """PyTorch would write the differences into a file that is named as the class."""
    module = ('module', argparse.Namespace(dump_patches=True, __name__=str(tmp_path / 'patch')), 'source', 'code')

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return module if value is SOURCE else None

    content = io.BytesIO()
    for value in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}):
        pickle.dump(value, content, 2)
    Pickler(content, 2).dump([SOURCE])
    (tmp_path / 'x.pth').write_bytes(content.getvalue())
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported persistent id'):
        read(tmp_path / 'x.pth')
    assert not (tmp_path / 'patch.patch').exists()


class Adds(torch.nn.Module):
    def forward(self, x):
        return x + 1


def test_torchscript_is_refused_by_the_reader_that_would_open_it(tmp_path, monkeypatch):
    torch.jit.script(Adds()).save(str(tmp_path / 'x.pth'))
    monkeypatch.setattr(torch.jit, 'load', None)
    with pytest.raises(RuntimeError, match=r'^it is a TorchScript archive$'):
        read(tmp_path / 'x.pth')


@pytest.mark.parametrize('compression', ['', 'gz'])
def test_a_tar_file_is_not_extracted(tmp_path, compression):
    (tmp_path / 'storages').write_bytes(b'content')
    with tarfile.open(tmp_path / 'x.pth', f'w:{compression}') as file:
        file.add(tmp_path / 'storages', 'storages')
    with pytest.raises(RuntimeError, match=r'^it is a tar file$'):
        read(tmp_path / 'x.pth')
