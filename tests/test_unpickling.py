"""The reader of PyTorch files: no pickle gets further than plain values and what the reader lists."""

import argparse
import io
import os
import pickle
import tarfile
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from swinv2_mm.checkpoints import unpickler, unpickling
from swinv2_mm.checkpoints.files import ALLOWED
from swinv2_mm.checkpoints.formats import unwrap


def read(path):
    """What a file holds that is read whole."""
    result, left_out = unpickling.load(path, ALLOWED)
    assert left_out == {}
    return result


@pytest.fixture
def read_pickle(tmp_path):
    """Read a pickle given as bytes, in the archive that ``torch.save`` would write around it."""

    def read_pickle(*opcodes, read=read):
        with zipfile.ZipFile(tmp_path / 'x.pth', 'w') as file:
            file.writestr('archive/data.pkl', b''.join(opcodes) + pickle.STOP)
            file.writestr('archive/version', b'3\n')
            file.writestr('archive/data/0', np.float32([1, 2]).tobytes())
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
        'numpy': [
            *(np.float32(2.5), np.float16(0.5), np.int64(3), np.uint8(255), np.bool_(True), np.str_('ab'), np.str_('')),
            *(np.arange(6).reshape(2, 3), np.array([]), np.array(['a', 'bc']), np.array([b'a', b'bc'])),
            *(np.array([[True], [False]]), np.uint8([[1, 2]]).T, np.array(2j)),
        ],
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
    ('swinv2_mm.checkpoints.unpickling', 'load'),
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
    unknown_opcode = opcode in ('INST', 'OBJ')
    refused = None if unknown_opcode else rf'^Unsupported global: GLOBAL {module}\.{attribute}$'
    with pytest.raises(KeyError if unknown_opcode else pickle.UnpicklingError, match=refused):
        read_pickle(opcodes[opcode])
    assert not (tmp_path / 'ran').exists()


TENSOR = call(
    name('torch._utils', '_rebuild_parameter'),
    call(
        name('torch._utils', '_rebuild_tensor_v2'),
        pickle.MARK + constant('storage') + name('torch', 'FloatStorage') + constant('0') + constant('cpu'),
        constant(2) + pickle.TUPLE + pickle.BINPERSID,
        constant(0),
        constant((2,)),
        constant((1,)),
    ),
)
FILLS = {
    'nothing': b'',
    'a state': constant({'a': 1}) + pickle.BUILD,
    'an element': constant(1) + pickle.APPEND,
    'elements': pickle.MARK + constant(1) + constant(2) + pickle.APPENDS,
    'an item': constant('a') + constant(1) + pickle.SETITEM,
    'items': pickle.MARK + constant('a') + constant(1) + pickle.SETITEMS,
    'members': pickle.MARK + constant(1) + pickle.ADDITEMS,
}


@pytest.mark.parametrize('fill', FILLS)
@pytest.mark.parametrize('made', ['called', 'instance', 'instance with names', 'called with another'])
def test_what_is_made_of_another_name_is_left_out_and_named(read_pickle, tmp_path, made, fill):
    """And what stands beside it is read."""
    other = name('os', 'system')
    argument = pickle.MARK + constant(f'touch {tmp_path / "ran"}') + pickle.TUPLE
    opcodes = {
        'called': other + argument + pickle.REDUCE,
        'instance': other + argument + pickle.NEWOBJ,
        'instance with names': other + argument + pickle.EMPTY_DICT + pickle.NEWOBJ_EX,
        'called with another': call(name('torch', 'device'), other),
    }
    places = {
        'item': opcodes[made] + FILLS[fill],
        'list': pickle.EMPTY_LIST + opcodes[made] + FILLS[fill] + pickle.APPEND,
        'nested': pickle.EMPTY_LIST + opcodes[made] + FILLS[fill] + pickle.TUPLE1 + pickle.TUPLE1 + pickle.APPEND,
        'tensor': TENSOR,
    }
    items = b''.join(constant(place) + value for place, value in places.items())
    key = opcodes[made] + FILLS[fill] + constant(1)
    result, left_out = read_pickle(
        pickle.EMPTY_DICT + pickle.MARK + items + key + pickle.SETITEMS,
        read=lambda path: unpickling.load(path, ALLOWED),
    )
    assert result.pop('tensor').tolist() == [1, 2]
    assert result == {'list': [None], 'nested': [None]}
    assert left_out == dict.fromkeys(('item', 'list/0', 'nested/0', '?'), 'os.system')
    assert not (tmp_path / 'ran').exists()


def test_a_weight_of_another_name_is_refused(read_pickle):
    items = constant('layers.0.weight') + TENSOR + constant('layers.1.weight') + call(name('os', 'system'))
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported weight: GLOBAL os\.system$'):
        read_pickle(pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS)


@pytest.mark.parametrize('kind', ['dict', 'set', 'ordered', 'members'])
def test_keys_whose_hashes_collide_do_not_take_all_time(read_pickle, monkeypatch, kind):
    """A file has a few of them; what is too much is left out."""
    monkeypatch.setattr(unpickler, 'MAX_GUESSABLE_KEYS', limit := 1000)
    for number in (10, 4000):
        keys = [i * (2**61 - 1) for i in range(1, number + 1)]  # the modulus of hashes of ints
        opcodes = {
            'dict': constant(dict.fromkeys(keys)),
            'set': call(name('builtins', 'set'), constant(keys)),
            'ordered': call(name('collections', 'OrderedDict'), constant([[key, 0] for key in keys])),
            'members': pickle.EMPTY_SET + pickle.MARK + b''.join(map(constant, keys)) + pickle.ADDITEMS,
        }
        opcodes = pickle.EMPTY_LIST + TENSOR + pickle.APPEND + opcodes[kind] + pickle.APPEND
        result, left_out = read_pickle(opcodes, read=lambda path: unpickling.load(path, ALLOWED))
        assert set(result[1]) == set(keys[:limit])
        assert left_out == ({} if number <= limit else {'1/?': 'builtins.int'})


def test_ints_that_are_close_together_may_be_many(read_pickle):
    """As of parameters in an optimizer."""
    keys = dict.fromkeys(range(50_000))
    assert read_pickle(constant(keys)) == keys


def test_places_in_the_memo_do_not_collide(read_pickle):
    for index in (2**61 - 1, 2):
        with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported memo$'):
            read_pickle(constant(1) + pickle.PUT + f'{index}\n'.encode())
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported memo$'):
        read_pickle(constant(1) + pickle.LONG_BINPUT + (2**31).to_bytes(4, 'little'))
    assert read_pickle(constant(1) + pickle.PUT + b'0\n' + pickle.POP + pickle.GET + b'0\n') == 1


def test_a_small_file_does_not_fill_the_memory(tmp_path):
    """By strides of 0, or by what is told of what is left out."""
    torch.save({'a.w': torch.ones(1), 'x': [torch.ones(1).expand(10**12)]}, tmp_path / 'x.pth')
    result, left_out = unpickling.load(tmp_path / 'x.pth', ALLOWED)
    assert result['x'] == [None] and left_out == {'x/0': 'torch.Tensor'}
    torch.save({'a.w': torch.ones(1), 'b.w': torch.ones(1).expand(10**12)}, tmp_path / 'x.pth')
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported weight: GLOBAL torch\.Tensor$'):
        read(tmp_path / 'x.pth')
    deep = place = []
    for _ in range(300):
        place.append([])
        place = place[0]
    place.append(argparse.ArgumentParser)
    torch.save({'w': torch.ones(1), 'x': deep}, tmp_path / 'x.pth')
    _, left_out = unpickling.load(tmp_path / 'x.pth', ALLOWED)
    assert left_out == {'0/0/0/0/0/0/0/0': 'argparse.ArgumentParser'}


def test_a_view_of_a_storage_in_the_old_format_starts_where_it_says(tmp_path):
    """As PyTorch before 0.4 wrote it: its storages may be parts of others."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ('storage', torch.FloatStorage, '0', 'cpu', 10, ('view', 4, 3)) if value is SOURCE else None

        def reducer_override(self, value):
            if type(value) is not torch.Tensor:
                return NotImplemented
            return torch._utils._rebuild_tensor_v2, (SOURCE, 1, (2,), (1,), False, OrderedDict())

    content = io.BytesIO()
    for value in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}):
        pickle.dump(value, content, 2)
    Pickler(content, 2).dump({'w': torch.ones(1)})
    pickle.dump(['0'], content, 2)
    content.write((10).to_bytes(8, 'little') + np.arange(10, dtype=np.float32).tobytes())
    (tmp_path / 'x.pth').write_bytes(content.getvalue())
    assert torch.load(tmp_path / 'x.pth', weights_only=False)['w'].tolist() == [5, 6]
    assert read(tmp_path / 'x.pth')['w'].tolist() == [5, 6]


def test_metadata_of_a_state_dict_is_of_versions(read_pickle):
    ordered = name('collections', 'OrderedDict') + pickle.EMPTY_TUPLE + pickle.REDUCE
    state = {'_metadata': {'a': {'version': 1}, '': {}}, 'other': 1}
    assert vars(read_pickle(ordered, constant(state), pickle.BUILD)) == {'_metadata': state['_metadata']}
    for wrong in (5, {'a': 5}, {'a': {'version': 'x'}}, {1: {}}):
        assert vars(read_pickle(ordered, constant({'_metadata': wrong}), pickle.BUILD)) == {}


FILLED = {
    'a function': name('torch._utils', '_rebuild_tensor_v2'),
    'a class': name('argparse', 'Namespace'),
    'a tensor': TENSOR,
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


@pytest.mark.parametrize('code', ['O', '|O8', 'V8', 'f8,O', '3f8', 'M8[s]', 'a', '', 'f', 8, [('a', 'O')]], ids=str)
def test_no_dtype_but_numbers_and_text_is_made(read_pickle, code):
    dtype = call(DTYPE, constant(code))
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported global: GLOBAL numpy\.dtype$'):
        read_pickle(dtype)
    state = pickle.MARK, constant(1), constant((1,)), dtype, constant(False), constant(bytes(8)), pickle.TUPLE
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported global: GLOBAL numpy\.ndarray$'):
        read_pickle(ARRAY, *state, pickle.BUILD)


def test_a_dtype_gets_no_fields(read_pickle):
    state = pickle.MARK, constant(3), constant('|'), constant(None), constant(('a',))
    fields = constant({'a': 0}), constant(8), constant(1), constant(27), pickle.TUPLE
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported dtype with fields'):
        read_pickle(FLOAT, *state, *fields, pickle.BUILD)


@pytest.mark.parametrize(
    'values, shape', [([1, 2], (2,)), ('ab', (2,)), (bytes(8), (-1, -1)), (bytes(16), (-2,))], ids=str
)
def test_an_array_is_filled_with_the_bytes_of_its_numbers_alone(read_pickle, values, shape):
    state = pickle.MARK, constant(1), constant(shape), FLOAT, constant(False), constant(values), pickle.TUPLE
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported NumPy array'):
        read_pickle(ARRAY, *state, pickle.BUILD)


@pytest.mark.parametrize('shape', [(1,) * 100, (0,) + (1,) * 40], ids=len)
def test_an_array_has_no_more_dimensions_than_numpy_reads(read_pickle, shape):
    values = constant(bytes(8 * shape[0]))
    state = pickle.MARK, constant(1), constant(shape), FLOAT, constant(False), values, pickle.TUPLE
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported NumPy array'):
        read_pickle(ARRAY, *state, pickle.BUILD)


def test_tensors_of_unread_kinds_are_no_weights(tmp_path):
    kinds = [
        torch.tensor([1 + 2j]).conj(),
        torch.ones(2).to_sparse(),
        torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8),
    ]
    for tensor in kinds:
        for weights in ({'w': tensor, 'b': torch.ones(1)}, {'w': tensor}, {'0.w': tensor, 'lr': 1}):
            torch.save({'state_dict': weights, 'other': torch.ones(1)}, tmp_path / 'x.pth')
            with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported weight: GLOBAL torch\.'):
                read(tmp_path / 'x.pth')
        torch.save({'w': torch.ones(1), 'meta': {'x': tensor, 'y': 1}}, tmp_path / 'x.pth')
        result, left_out = unpickling.load(tmp_path / 'x.pth', ALLOWED)
        assert result['meta'] == {'y': 1} and list(left_out) == ['meta/x']


@pytest.mark.parametrize(
    'names',
    [['evil/DATA.PKL', 'archive/data.pkl'], ['archive/DATA.PKL', 'archive/data.pkl'], ['data.pkl', 'archive/data.pkl']],
)
def test_an_archive_has_one_pickle_however_names_are_compared(tmp_path, names):
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w') as file:
        for name in names:
            file.writestr(name, pickle.dumps({}, 2))
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported names in an archive'):
        read(tmp_path / 'x.pth')


def test_compressed_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('archive/data.pkl', pickle.dumps({'a': 'a' * 10**6}, 2))
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported compression'):
        read(tmp_path / 'x.pth')


def test_an_array_is_filled_once(read_pickle):
    state = pickle.MARK, constant(1), constant((2,)), FLOAT, constant(False), constant(bytes(16)), pickle.TUPLE
    assert read_pickle(ARRAY, *state, pickle.BUILD).tolist() == [0, 0]
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported array that is filled twice'):
        read_pickle(ARRAY, *state, pickle.BUILD, *state, pickle.BUILD)


CLASSES = [
    ('numpy', 'ndarray'),
    ('torch', 'Tensor'),
    ('torch', 'FloatStorage'),
    ('torch.nn.parameter', 'Parameter'),
    ('argparse', 'Namespace'),
    ('mmengine.logging.history_buffer', 'HistoryBuffer'),
]


@pytest.mark.parametrize('module, attribute', CLASSES)
def test_classes_are_not_called(read_pickle, module, attribute):
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported call'):
        read_pickle(call(name(module, attribute), constant((1,))))
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported instance'):
        read_pickle(name(module, attribute) + constant((8,)) + pickle.NEWOBJ)


def test_nothing_but_names_is_called(read_pickle):
    method = call(
        name('builtins', 'getattr'), name('mmengine.logging.history_buffer', 'HistoryBuffer'), constant('min')
    )
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported call'):
        read_pickle(call(method, constant(1)))


@pytest.mark.parametrize('opcode', ['OBJ', 'INST', 'EXT1', 'EXT2', 'EXT4', 'PERSID', 'DICT'])
def test_opcodes_that_nothing_needs_are_unknown(read_pickle, opcode):
    with pytest.raises(KeyError):
        read_pickle(pickle.MARK + constant(1) + constant(1) + getattr(pickle, opcode) + b'1\n')


def rebuild(offset=0, size=(2,), stride=(1,), num_elements=2, storage='FloatStorage', key='0'):
    pid = pickle.MARK + constant('storage') + name('torch', storage) + constant(key) + constant('cpu')
    pid += constant(num_elements) + pickle.TUPLE + pickle.BINPERSID
    return call(name('torch._utils', '_rebuild_tensor_v2'), pid, constant(offset), constant(size), constant(stride))


def test_a_tensor_is_made_of_the_memory_in_the_file(read_pickle):
    assert read_pickle(rebuild()).tolist() == [1, 2]
    assert read_pickle(rebuild(1, (1, 3), (5, 0))).tolist() == [[2, 2, 2]]
    assert read_pickle(rebuild(9, (3, 0), (5, 1))).shape == (3, 0)


@pytest.mark.parametrize(
    'arguments',
    [
        dict(num_elements=3),
        dict(num_elements=1),
        dict(num_elements=-2),
        dict(num_elements=2**62),
        dict(storage='DoubleStorage'),
        dict(offset=1),
        dict(offset=-1),
        dict(size=(3,)),
        dict(size=(2, 2), stride=(1, 1)),
        dict(stride=(2,)),
        dict(stride=(-1,), offset=1),
        dict(size=(2**62, 2**62), stride=(2**62, 2**62)),
        dict(size=(2.0,)),
        dict(size=(True,)),
        dict(size=[2]),
        dict(size=(2, 1)),
        dict(key='../0'),
        dict(key=0),
    ],
    ids=str,
)
def test_no_tensor_reaches_beyond_its_memory(read_pickle, arguments):
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported '):
        read_pickle(rebuild(**arguments))


def test_attributes_that_libraries_look_for_are_left_out(read_pickle):
    namespace = name('argparse', 'Namespace') + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    state = {'__array_interface__': {}, '__class__': 1, '_get_kwargs': 1, 'lr': 2}
    assert vars(read_pickle(namespace, constant(state), pickle.BUILD)) == {'lr': 2}


@pytest.mark.parametrize('key', [((1,),), torch.float16, torch.device('cpu'), torch.Size([1]), np.int64(1)], ids=repr)
def test_items_whose_keys_are_not_plain_are_left_out(tmp_path, key):
    for protocol in (2, 4, 5):
        content = {'w': torch.ones(1), 'x': {key: 1, 'a': 2}, 'y': {key, 'a'}}
        torch.save(content, tmp_path / 'x.pth', pickle_protocol=protocol)
        result, left_out = unpickling.load(tmp_path / 'x.pth', ALLOWED)
        assert (result['x'], result['y']) == ({'a': 2}, {'a'})
        assert set(left_out) == {'x/?', 'y/?'}


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_plain_values_are_read_at_every_protocol(tmp_path, protocol):
    content = {'w': torch.ones(1), 'a': frozenset({1, 'b'}), 'b': bytearray(b'ab'), 'c': np.arange(6.0).reshape(2, 3).T}
    torch.save(content, tmp_path / 'x.pth', pickle_protocol=protocol)
    result = read(tmp_path / 'x.pth')
    assert (result['a'], result['b'], result['c'].tolist()) == (content['a'], content['b'], content['c'].tolist())


@pytest.mark.parametrize('damage', ['a storage too many', 'a storage missing', 'a wrong size', 'cut', 'one byte left'])
def test_a_file_of_the_old_format_holds_all_of_its_storages(tmp_path, damage):
    torch.save({'w': torch.arange(3.0), 'n': torch.arange(2)}, tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
    content = (tmp_path / 'x.pth').read_bytes()
    assert read(tmp_path / 'x.pth')['w'].tolist() == [0, 1, 2]
    keys = content.rindex(b'\x80\x02]')  # the list of keys
    if damage == 'cut':
        content = content[:-1]
    elif damage == 'one byte left':  # of the last storage, which is not to be all of it
        last = 16 if content.endswith(torch.arange(2).numpy().tobytes()) else 12
        content = content[: len(content) - last + 1]
    elif damage == 'a wrong size':
        place = content.index(b'.', keys) + 1
        content = content[:place] + b'\x07' + content[place + 1 :]
    elif damage == 'a storage missing':
        content = content[:keys] + pickle.dumps([], 2)
    else:
        content = content[:keys] + pickle.dumps(['1', '2', '3'], 2)
    (tmp_path / 'x.pth').write_bytes(content)
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        read(tmp_path / 'x.pth')


def test_text_is_encoded_as_latin1_alone(read_pickle):
    encode = name('_codecs', 'encode')
    assert read_pickle(call(encode, constant('\xe4'), constant('latin1'))) == b'\xe4'
    with pytest.raises(pickle.UnpicklingError, match=r'^Unsupported encoding'):
        read_pickle(call(encode, constant('a'), constant('zip')))


SOURCE = object()


@pytest.mark.parametrize('as_zip', [True, False])
def test_tensors_are_without_the_attributes_that_a_file_gives_them(tmp_path, as_zip):
    """PyTorch sets them: the methods that they stand for can't be called then."""
    tensors = {'a': torch.ones(2), 'b': torch.nn.Parameter(torch.ones(3))}
    for tensor in tensors.values():
        tensor.__dict__.update(detach=1, to=2, shape_of=3)
    torch.save(tensors, tmp_path / 'x.pth', _use_new_zipfile_serialization=as_zip)
    by_torch = torch.load(tmp_path / 'x.pth', weights_only=False)
    assert by_torch['a'].detach == 1
    for name, tensor in read(tmp_path / 'x.pth').items():
        assert vars(tensor) == {} and type(tensor) is type(tensors[name])
        assert torch.equal(tensor.detach(), torch.Tensor.detach(tensors[name]))
    for tensor in unwrap(by_torch)[0].values():  # of a state dict that somebody else read
        assert vars(tensor) == {} and tensor.detach().eq(1).all()


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
    (tmp_path / 'storages').unlink()
    with pytest.raises((pickle.UnpicklingError, KeyError, IndexError)):
        read(tmp_path / 'x.pth')
    assert os.listdir(tmp_path) == ['x.pth']
