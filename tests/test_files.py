"""Reading, writing and downloading checkpoint files: no code of a file runs, and what is damaged is one clear line."""

import argparse
import collections
import enum
import errno
import fcntl
import functools
import hashlib
import http.server
import os
import pathlib
import pickle
import resource
import socket
import struct
import subprocess
import sys
import threading
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.logging import MessageHub

from swinv2_mm import CheckpointError
from swinv2_mm.checkpoints import downloads
from swinv2_mm.checkpoints.downloads import LOCK, cached_path
from swinv2_mm.checkpoints.files import read_checkpoint, write_checkpoint


class Malicious:
    """Writes a file when it is unpickled freely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


class Getattr:
    """Asks for an attribute of a class, as a pickle of mmengine does for its log history."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return getattr, self.args


def error_of(function, *args):
    """The message of the CheckpointError that a call must raise, which is one line."""
    with pytest.raises(CheckpointError) as error:
        function(*args)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.bin'])
def test_safetensors_are_told_by_content(tmp_path, suffix):
    path = tmp_path / f'x{suffix}'
    safetensors.torch.save_file({'w': torch.tensor([1.0, 2.5]), 'n': torch.tensor([3])}, path)
    checkpoint = read_checkpoint(path)
    assert {name: value.tolist() for name, value in checkpoint.items()} == {'w': [1, 2.5], 'n': [3]}


@pytest.mark.parametrize('suffix', ['.pth', '.bin', '.pt'])
@pytest.mark.parametrize('as_zip', [True, False])
def test_both_formats_of_pytorch_are_read(tmp_path, suffix, as_zip):
    torch.save({'model': {'w': torch.ones(2)}}, tmp_path / f'x{suffix}', _use_new_zipfile_serialization=as_zip)
    assert read_checkpoint(tmp_path / f'x{suffix}')['model']['w'].tolist() == [1, 1]


def header(text, *payload):
    return struct.pack('<Q', len(text)) + text + b''.join(payload)


TENSOR = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'
DAMAGED = {
    'truncated in the data': header(TENSOR % (4, 16), bytes(9)),
    'truncated in the header': header(TENSOR % (4, 16))[:20],
    'truncated in the length': b'\x10\0\0',
    'empty': b'',
    'text': b'weights of a model\n',
    'a header of 3 GB': struct.pack('<Q', 3 << 30) + b'{"w":',
    'a tensor of 3 GB': header(TENSOR % (750_000_000, 3_000_000_000), bytes(16)),
    'a shape of more than its bytes': header(TENSOR % (5, 16), bytes(16)),
    'more bytes than the tensors': header(TENSOR % (4, 16), bytes(20)),
    'a header that is no JSON': header(b'{"w":;;;}', bytes(16)),
}


@pytest.mark.parametrize('content', DAMAGED)
@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_damaged_safetensors_are_one_clear_line(tmp_path, content, suffix):
    path = tmp_path / f'x{suffix}'
    path.write_bytes(DAMAGED[content])
    message = error_of(read_checkpoint, path)
    assert message.startswith(f'checkpoint {path} is truncated or not a checkpoint (')
    assert message.endswith('): download or save it again')


@pytest.mark.parametrize('content', ['missing', 'folder', 'empty', 'text', 'truncated', 'legacy truncated', 'list'])
def test_what_is_no_checkpoint_is_one_clear_line(tmp_path, content):
    path = tmp_path / 'x.pth'
    if content == 'folder':
        path.mkdir()
    elif content == 'empty':
        path.touch()
    elif content == 'text':
        path.write_text('weights\n')
    elif 'truncated' in content:
        torch.save({'w': torch.rand(1000)}, path, _use_new_zipfile_serialization='legacy' not in content)
        path.write_bytes(path.read_bytes()[:2000])
    elif content == 'list':
        torch.save([torch.ones(1)], path)
    expected = {'missing': 'does not exist', 'folder': 'is a folder', 'list': 'holds a list, not a state dict'}
    message = error_of(read_checkpoint, path)
    assert message.startswith(f'checkpoint {path} {expected.get(content, "is truncated or not a checkpoint")}')


def test_a_tensor_that_a_damaged_file_calls_a_folder_is_read(tmp_path):
    """PyTorch reads whatever memory held before: its zip reader extracts nothing for a folder, and does not say so."""
    path = tmp_path / 'x.pth'
    weight = torch.rand(1000)
    torch.save({'w': weight}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b'PK\x01\x02', 0, content.rindex(b'/data/0'))  # in the directory at the end of the file
    content[entry + 38] |= 0x10  # the external attributes
    path.write_bytes(content)
    assert torch.equal(read_checkpoint(path)['w'], weight)


@pytest.mark.parametrize('place', [b'data.pkl', b'data/0'])
def test_the_checksums_in_a_file_are_compared(tmp_path, place):
    path = tmp_path / 'x.pth'
    torch.save({'w': torch.zeros(1000), 'name': 'aaaaaaaa'}, path)
    content = bytearray(path.read_bytes())
    content[content.index(b'aaaaaaaa') if place == b'data.pkl' else content.index(place) + 2000] ^= 1
    path.write_bytes(content)
    assert 'is truncated or not a checkpoint (Bad CRC-32 for file' in error_of(read_checkpoint, path)


def test_what_mmengine_writes_is_read_back(tmp_path):
    hub = MessageHub('test')
    hub.update_scalar('train/loss', 2.5)
    hub.update_scalar('val/AP', np.float64(0.25))
    hub.update_info('iter', 7)
    torch.save({'state_dict': {'w': torch.ones(2)}, 'message_hub': hub.state_dict()}, tmp_path / 'run.pth')
    scalars = read_checkpoint(tmp_path / 'run.pth')['message_hub']['log_scalars']
    assert scalars['train/loss'].current() == 2.5
    assert scalars['val/AP'].statistics('mean') == 0.25


@pytest.mark.parametrize(('owner', 'name'), [(np.ndarray, 'tofile'), (dict, 'get'), (np.ndarray, 'min')])
def test_getattr_is_allowed_for_the_log_history_alone(tmp_path, owner, name):
    torch.save({'w': torch.ones(1), 'x': [Getattr(owner, name)]}, tmp_path / 'getattr.pth')
    if owner is dict:
        assert read_checkpoint(tmp_path / 'getattr.pth')['x'] == [None]
    else:
        assert 'refused' in error_of(read_checkpoint, tmp_path / 'getattr.pth')


WRAPPERS = [
    'state_dict',
    'model',
    'state_dict_ema',
    'model_ema',
    'ema_state_dict',
    'module',
    'meta',
    'message_hub',
    'optimizer',
    'optimizers',
    'param_schedulers',
    'lr_scheduler',
    'config',
    'args',
    'epoch',
    'model.encoder',
    'state_dict.backbone.encoder',
]


@pytest.fixture
def warnings(monkeypatch):
    """What `read_checkpoint` warns of."""
    messages = []
    monkeypatch.setattr('swinv2_mm.messages.print_log', lambda message, **_: messages.append(message))
    return messages


@pytest.mark.parametrize('suffix', ['.pth', '.bin', '.pt', '.ckpt', '.pkl'])
@pytest.mark.parametrize('as_zip', [True, False])
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_what_could_run_code_beside_the_weights_is_left_out_and_named(tmp_path, warnings, wrapper, as_zip, suffix):
    ran, path = tmp_path / 'ran', tmp_path / f'malicious{suffix}'
    content = {'w': torch.ones(2), 'x': Malicious(ran)}
    for name in reversed(wrapper.split('.')):
        content = {name: content}
    torch.save({'model': {'w': torch.ones(2)}, **content}, path, _use_new_zipfile_serialization=as_zip)
    checkpoint = read_checkpoint(path)
    for name in wrapper.split('.'):
        checkpoint = checkpoint[name]
    assert {name: value.tolist() for name, value in checkpoint.items()} == {'w': [1, 1]}
    place = f'{wrapper.replace(".", "/")}/x'
    assert warnings == [f'Left out of {path}, because they are not plain values: {place} ({os.name}.system)']
    assert not ran.exists()


@pytest.mark.parametrize('as_zip', [True, False])
@pytest.mark.parametrize('place', ['weight', 'state dict', 'all'])
def test_what_could_run_code_in_the_place_of_weights_is_refused_by_name(tmp_path, place, as_zip):
    ran, path = tmp_path / 'ran', tmp_path / 'malicious.pth'
    content = {
        'weight': {'model': {'layers.0.weight': torch.ones(2), 'layers.1.weight': Malicious(ran)}},
        'state dict': {'model': Malicious(ran), 'epoch': 3},
        'all': Malicious(ran),
    }
    torch.save(content[place], path, _use_new_zipfile_serialization=as_zip)
    message = error_of(read_checkpoint, path)
    assert f'holds {os.name}.system in the place of weights, which could run code, and is refused' in message
    assert not ran.exists()


class Mode(enum.Enum):
    TRAIN = 1


BESIDE = {
    'an enum': Mode.TRAIN,
    'a path': pathlib.Path('a', 'b'),
    'a user dict': collections.UserDict(a=1),
    'a partial': functools.partial(int, '3'),
    'objects': np.array([None, 'a'], dtype=object),
    'fields': np.zeros(2, dtype=[('a', 'f4')]),
    'a date': np.datetime64('2020-01-01'),
    'a class': torch.nn.ReLU,
    'a module': torch.nn.Linear(1, 1),
    'a generator': np.random.default_rng(0),
}


@pytest.mark.parametrize('kind', BESIDE)
@pytest.mark.parametrize('as_zip', [True, False])
def test_what_training_code_saves_beside_the_weights_does_not_hide_them(tmp_path, warnings, kind, as_zip):
    content = {'state_dict': {'a.w': torch.ones(2)}, 'meta': {'x': BESIDE[kind], 'y': [1, BESIDE[kind]], 'z': 3}}
    torch.save(content, tmp_path / 'run.ckpt', _use_new_zipfile_serialization=as_zip)
    checkpoint = read_checkpoint(tmp_path / 'run.ckpt')
    assert checkpoint['state_dict']['a.w'].tolist() == [1, 1]
    assert checkpoint['meta'] == {'y': [1, None], 'z': 3}
    assert len(warnings) == 1 and 'meta/x (' in warnings[0] and 'meta/y/1 (' in warnings[0]


def test_a_defaultdict_is_read_as_a_dict(tmp_path):
    content = {'state_dict': collections.defaultdict(int, w=torch.ones(1)), 'x': collections.defaultdict(list, a=[1])}
    torch.save(content, tmp_path / 'run.pth')
    read = read_checkpoint(tmp_path / 'run.pth')
    assert type(read['x']) is dict and read['x'] == {'a': [1]}
    assert read['state_dict']['w'].tolist() == [1]


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_the_state_of_a_random_generator_is_read(tmp_path, protocol):
    state = np.random.RandomState(3).get_state()
    torch.save({'w': torch.ones(1), 'state': state}, tmp_path / 'run.pth', pickle_protocol=protocol)
    read = read_checkpoint(tmp_path / 'run.pth')['state']
    assert (read[0], read[2:]) == (state[0], state[2:]) and np.array_equal(read[1], state[1])


def test_float8_is_read(tmp_path):
    if not hasattr(torch, 'float8_e4m3fn'):
        pytest.skip('this PyTorch has no float8')
    weight = torch.randn(3, 4).to(torch.float8_e4m3fn)
    torch.save({'w': weight, 't': weight.T, 'last': weight[2]}, tmp_path / 'x.pth')
    read = read_checkpoint(tmp_path / 'x.pth')
    for name, value in (('w', weight), ('t', weight.T), ('last', weight[2])):
        assert read[name].dtype == value.dtype and torch.equal(read[name].float(), value.float())


def test_a_pickle_of_detectron2_is_called_so(tmp_path):
    content = {
        'model': {'w': np.ones(2, np.float32)},
        '__author__': 'Detectron2 Model Zoo',
        'matching_heuristics': True,
    }
    (tmp_path / 'model.pkl').write_bytes(pickle.dumps(content))
    message = error_of(read_checkpoint, tmp_path / 'model.pkl')
    assert message.endswith('not a file of torch.save: save its weights with torch.save, as a dict of tensors')
    assert 'detectron2' in message and 'truncated' not in message


@pytest.mark.parametrize(
    'name', ['model-00002-of-00003.safetensors', 'pytorch_model-00001-of-00002.bin', 'model.safetensors.index.json']
)
def test_a_part_of_a_model_is_called_so(tmp_path, name):
    safetensors.torch.save_file({'w': torch.ones(1)}, tmp_path / name)
    assert 'is a part of a model that was saved in several files' in error_of(read_checkpoint, tmp_path / name)


def test_a_model_in_one_part_is_read(tmp_path):
    safetensors.torch.save_file({'w': torch.ones(1)}, tmp_path / 'model-00001-of-00001.safetensors')
    assert read_checkpoint(tmp_path / 'model-00001-of-00001.safetensors')['w'].tolist() == [1]


def test_a_path_may_be_of_the_home_folder_or_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save({'w': torch.ones(1)}, tmp_path / 'a b%.pth')
    for source in ('~/a b%.pth', f'file://{tmp_path}/a%20b%25.pth', f'FILE://localhost{tmp_path}/a%20b%25.pth'):
        assert read_checkpoint(source)['w'].tolist() == [1]


@pytest.mark.parametrize('suffix', ['.pth', '.bin', '.safetensors'])
@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_does_not_run_and_nobody_is_told_to_run_it(tmp_path, protocol, suffix):
    ran, path = tmp_path / 'ran', tmp_path / f'malicious{suffix}'
    path.write_bytes(pickle.dumps({'state_dict': Malicious(ran)}, protocol))
    message = error_of(read_checkpoint, path)
    assert message.startswith(f'checkpoint {path} ')
    assert 'will likely succeed' not in message  # what PyTorch says of reading it with weights_only=False
    assert not ran.exists()


@pytest.mark.parametrize('as_zip', [True, False])
def test_a_malicious_file_named_safetensors_does_not_run(tmp_path, as_zip):
    ran, path = tmp_path / 'ran', tmp_path / 'malicious.safetensors'
    torch.save({'w': Malicious(ran)}, path, _use_new_zipfile_serialization=as_zip)
    assert error_of(read_checkpoint, path).startswith(f'checkpoint {path} is truncated or not a checkpoint')
    assert not ran.exists()


def test_a_file_does_not_write_to_the_terminal_through_an_error(tmp_path):
    folder = zipfile.ZipInfo('a\x1b[31m\rb')
    folder.external_attr = 0x10
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w') as file:
        file.writestr(folder, b'')
    message = error_of(read_checkpoint, tmp_path / 'x.pth')
    assert 'is truncated or not a checkpoint' in message and message.isprintable()


class Runs(torch.nn.Module):
    def forward(self, x):
        return x


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(Runs()).save(str(tmp_path / 'script.pth'))
    message = error_of(read_checkpoint, tmp_path / 'script.pth')
    assert 'not a checkpoint (it is a TorchScript archive)' in message


def test_without_safetensors_its_files_alone_are_an_error(tmp_path, monkeypatch):
    write_checkpoint({'w': torch.ones(1)}, tmp_path / 'x.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)  # importing it fails
    assert error_of(read_checkpoint, tmp_path / 'x.safetensors').endswith(
        'needs the library safetensors, which is not installed: pip install safetensors'
    )
    assert error_of(write_checkpoint, {'w': torch.ones(1)}, tmp_path / 'y.safetensors').endswith(
        'pip install safetensors'
    )
    write_checkpoint({'w': torch.ones(1)}, tmp_path / 'x.pth')
    assert read_checkpoint(tmp_path / 'x.pth')['w'].tolist() == [1]
    assert sorted(os.listdir(tmp_path)) == ['x.pth', 'x.safetensors']


def test_a_whole_model_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'model.pth')
    message = error_of(read_checkpoint, tmp_path / 'model.pth')
    assert 'holds torch.nn.modules.linear.Linear in the place of weights' in message


class CfgNode(dict):
    """Keeps attributes beside its items, like that of yacs."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__.update({'__immutable__': False, '__deprecated_keys__': {'A'}, '__renamed_keys__': {}})


CfgNode.__module__ = 'yacs.config'


def save_settings(settings, path, monkeypatch, as_zip=True):
    """What training code saves, on a machine that has yacs; this one has none afterwards."""
    with monkeypatch.context() as patch:
        config = types.ModuleType('yacs.config')
        config.CfgNode = CfgNode
        patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
        patch.setitem(sys.modules, 'yacs.config', config)
        content = {'model': {'w': torch.ones(2)}, 'config': settings}
        torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    for name in ('yacs', 'yacs.config'):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    return path


@pytest.mark.parametrize('as_zip', [True, False])
def test_the_settings_of_training_code_do_not_hide_the_weights(tmp_path, monkeypatch, as_zip):
    node = CfgNode(MODEL=CfgNode(NAME='swinv2', DEPTHS=[2, 2]), LR=0.5, TAGS=('a', None))
    settings = argparse.Namespace(cfg=node, lr=1e-3, betas=(0.9, 0.999))
    checkpoint = read_checkpoint(save_settings(settings, tmp_path / 'run.pth', monkeypatch, as_zip))
    assert checkpoint['model']['w'].tolist() == [1, 1]
    assert checkpoint['config'].lr == 1e-3
    assert checkpoint['config'].cfg == {'MODEL': {'NAME': 'swinv2', 'DEPTHS': [2, 2]}, 'LR': 0.5, 'TAGS': ('a', None)}


@pytest.mark.parametrize('place', ['namespace', 'item', 'attribute', 'nested'])
@pytest.mark.parametrize('as_zip', [True, False])
def test_what_could_run_code_in_settings_is_left_out(tmp_path, monkeypatch, warnings, place, as_zip):
    ran = tmp_path / 'ran'
    settings = CfgNode(B=1)
    if place == 'namespace':
        settings = argparse.Namespace(lr=Malicious(ran))
    elif place == 'item':
        settings['LR'] = Malicious(ran)
    elif place == 'attribute':
        settings.__dict__['lr'] = Malicious(ran)
    else:
        settings = argparse.Namespace(cfg=CfgNode(MODEL=CfgNode(LR=[Malicious(ran)])))
    read = read_checkpoint(save_settings(settings, tmp_path / 'run.pth', monkeypatch, as_zip))
    assert read['model']['w'].tolist() == [1, 1]
    if place == 'namespace':
        assert read['config'] == argparse.Namespace()
    elif place == 'nested':
        assert read['config'].cfg == {'MODEL': {'LR': [None]}}
    else:
        assert read['config'] == {'B': 1} and not hasattr(read['config'], 'lr')
    assert place == 'attribute' or (len(warnings) == 1 and f'({os.name}.system)' in warnings[0])
    assert not ran.exists()


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.bin'])
def test_what_is_written_is_read_back(tmp_path, suffix):
    whole = torch.arange(6.0).view(2, 3)
    written = {'w': whole, 't': whole.T, 'row': whole[1], 'half': torch.tensor([0.5]).half(), 'n': torch.tensor(7)}
    path = tmp_path / f'x{suffix}'
    path.write_text('something else')
    write_checkpoint(written, path)
    checkpoint = read_checkpoint(path)
    assert set(checkpoint) == set(written)
    for name, value in written.items():
        assert checkpoint[name].dtype == value.dtype
        assert torch.equal(checkpoint[name], value), name
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.bin'])
def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path, suffix):
    path = tmp_path / f'x{suffix}'
    write_checkpoint({'w': torch.ones(1)}, path)
    (tmp_path / 'other').touch()
    assert path.stat().st_mode == (tmp_path / 'other').stat().st_mode


def test_wrapped_weights_are_written_as_pth(tmp_path):
    write_checkpoint({'model': {'w': torch.ones(1)}}, tmp_path / 'x.pth')
    assert read_checkpoint(tmp_path / 'x.pth')['model']['w'].tolist() == [1]


@pytest.mark.parametrize('name', ['x.ckpt', 'x', 'safetensors', 'x.pth.tar'])
def test_writing_another_kind_of_file_names_the_kinds(tmp_path, name):
    expected = f'{tmp_path / name} must end in .safetensors, .pth, .bin: the ending says how it is written'
    assert error_of(write_checkpoint, {}, tmp_path / name) == expected
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ('folder', 'reason'), [('missing', 'No such file'), ('file', 'Not a dir'), ('/proc', 'No such')]
)
@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_a_folder_that_cannot_be_written_to_is_one_clear_line(tmp_path, folder, reason, suffix):
    (tmp_path / 'file').touch()
    path = tmp_path / folder / f'x{suffix}'
    assert error_of(write_checkpoint, {'w': torch.ones(1)}, path).startswith(f'{path} cannot be written: {reason}')
    assert os.listdir(tmp_path) == ['file']


def test_a_folder_in_the_place_of_the_file_stays(tmp_path):
    (tmp_path / 'x.pth').mkdir()
    assert 'cannot be written: Is a directory' in error_of(write_checkpoint, {}, tmp_path / 'x.pth')
    assert os.listdir(tmp_path) == ['x.pth']


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_a_full_disk_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f'x{suffix}'
    write_checkpoint({'w': torch.ones(1)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        message = error_of(write_checkpoint, {'w': torch.rand(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f'{path} cannot be written: ')
    assert read_checkpoint(path)['w'].tolist() == [1]
    assert os.listdir(tmp_path) == [path.name]


UNWRITABLE = {
    'a dtype': ('.safetensors', torch.ones(1, dtype=torch.complex128)),
    'a sparse tensor': ('.safetensors', torch.ones(1).to_sparse()),
    'a tensor without data': ('.safetensors', torch.ones(1, device='meta')),
    'a dict': ('.safetensors', {'w': torch.ones(1)}),
    'a text': ('.safetensors', 'text'),
    'a function': ('.pth', lambda: None),
}


@pytest.mark.parametrize('kind', UNWRITABLE)
def test_a_value_that_cannot_be_written_leaves_the_old_file(tmp_path, kind):
    suffix, value = UNWRITABLE[kind]
    path = tmp_path / f'x{suffix}'
    write_checkpoint({'w': torch.ones(1)}, path)
    assert error_of(write_checkpoint, {'w': value}, path).startswith(f'{path} cannot be written: ')
    assert read_checkpoint(path)['w'].tolist() == [1]
    assert os.listdir(tmp_path) == [path.name]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and half of each file in the folder ``cut``; remembers what it was asked for."""

    def do_GET(self):
        self.server.requests.append(self.path)
        self.path = self.path.replace('?id=', '')
        super().do_GET()

    def copyfile(self, source, output):
        content = source.read()
        output.write(content[: len(content) // 2] if self.path.startswith('/cut/') else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the files in ``served``; what is downloaded goes to ``hub``."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    (tmp_path / 'served').mkdir()
    handler = functools.partial(Handler, directory=tmp_path / 'served')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.requests = []
        server.url = f'http://127.0.0.1:{server.server_port}'
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def serve(tmp_path, name, value=1.0, written_as=None):
    """Put a checkpoint with a tensor of one value where the server finds it."""
    path = tmp_path / 'served' / (written_as or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint({'w': torch.full((1000,), value)}, path)
    return path.rename(tmp_path / 'served' / name)


def cached(tmp_path):
    """The names of the files in the cache."""
    return sorted(path.name for path in (tmp_path / 'hub').rglob('*') if path.is_file() and path.name != LOCK)


@pytest.mark.parametrize('name', ['swinv2.pth', 'swinv2.safetensors', 'swinv2.pth?download=true'])
def test_a_file_is_downloaded_once(server, tmp_path, name):
    file = name.split('?')[0]
    serve(tmp_path, file, 3.0)
    for _ in range(3):
        assert read_checkpoint(f'{server.url}/{name}')['w'][:2].tolist() == [3, 3]
    assert server.requests == [f'/{name}']
    assert cached(tmp_path) == [file]


@pytest.mark.parametrize('digits', [8, 12, 64])
def test_a_name_with_the_right_hash_is_downloaded(server, tmp_path, digits):
    digest = '0' * 64
    while digest[:digits].isdigit():  # which would be taken for a date; each time that a file is written it differs
        digest = hashlib.sha256(serve(tmp_path, 'x.pth', 2.0).read_bytes()).hexdigest()
    name = f'x-{digest[:digits]}.pth'
    os.rename(tmp_path / 'served' / 'x.pth', tmp_path / 'served' / name)
    assert read_checkpoint(f'{server.url}/{name}')['w'][0] == 2
    assert cached(tmp_path) == [name]


def test_a_file_with_another_hash_than_its_name_says_is_not_kept(server, tmp_path):
    serve(tmp_path, 'x-0123456a.pth')
    message = error_of(read_checkpoint, f'{server.url}/x-0123456a.pth')
    assert message.startswith(f'cannot download {server.url}/x-0123456a.pth (it does not have the hash in its name, ')
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    'name',
    [
        'x-20231105.pth',
        'x_20220803-19991231.pth',
        'x-00012000.pth',
        'swinv2-tiny-patch4-window8-256.pth',
        'x-0123456.pth',
        'x-abcdefgh.pth',
    ],
)
def test_what_is_no_hash_is_not_taken_for_one(server, tmp_path, name):
    serve(tmp_path, name, 4.0)
    assert read_checkpoint(f'{server.url}/{name}')['w'][0] == 4
    assert cached(tmp_path) == [name]


def test_a_file_that_is_not_there_is_one_clear_line(server, tmp_path):
    url = f'{server.url}/missing.pth'
    message = error_of(read_checkpoint, url)
    assert message.startswith(f'cannot download {url} (HTTP Error 404: ')
    assert cached(tmp_path) == []


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin', 'epoch_12.pth', 'best.pth'])
def test_files_that_hubs_call_the_same_are_told_apart(server, tmp_path, name):
    for model, value in (('a', 1.0), ('b', 2.0)):
        serve(tmp_path, f'{model}/resolve/main/{name}', value)
    for _ in range(2):
        for model, value in (('a', 1.0), ('b', 2.0)):
            assert read_checkpoint(f'{server.url}/{model}/resolve/main/{name}')['w'][0] == value
    assert cached(tmp_path) == [name, name]
    assert len(server.requests) == 2


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_a_truncated_file_in_the_cache_is_named_and_downloaded_again_once_deleted(server, tmp_path, suffix):
    serve(tmp_path, f'swinv2{suffix}', 5.0)
    url = f'{server.url}/swinv2{suffix}'
    file = cached_path(url)
    read_checkpoint(url)
    file.write_bytes(file.read_bytes()[:1000])
    message = error_of(read_checkpoint, url)
    assert message.startswith(f'checkpoint {file} is truncated or not a checkpoint (')
    assert message.endswith('): delete it, and it is downloaded again')
    file.unlink()
    assert read_checkpoint(url)['w'][0] == 5
    assert len(server.requests) == 2


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_a_download_that_breaks_off_is_one_clear_line(server, tmp_path, suffix):
    serve(tmp_path, f'cut/x{suffix}')
    for _ in range(2):
        message = error_of(read_checkpoint, f'{server.url}/cut/x{suffix}')
        assert message.startswith(f'the download of {server.url}/cut/x{suffix} broke off or is not a checkpoint: ')
        assert cached(tmp_path) == []


def test_files_of_one_name_are_told_apart_by_their_whole_url(server, tmp_path):
    """By what follows the question mark, as hosts of files have it, and by the host."""
    for i in (1, 2):
        serve(tmp_path, f'download{i}', float(i), 'swinv2.pth')
    urls = {
        f'{server.url}/download?id=1': 1,
        f'{server.url}/download?id=2': 2,
        f'{server.url.replace("127.0.0.1", "localhost")}/download?id=2': 2,
    }
    for _ in range(2):
        for url, value in urls.items():
            assert read_checkpoint(url)['w'][0] == value
    assert server.requests == ['/download?id=1', '/download?id=2', '/download?id=2']


def test_what_killed_downloads_left_is_removed_by_the_next(server, tmp_path):
    serve(tmp_path, 'x.pth', 2.0)
    for url in ('http://elsewhere/a.pth', f'{server.url}/x.pth'):
        path = cached_path(url)
        path.parent.mkdir(parents=True)
        path.with_name(f'{path.name}.partial').write_bytes(b'half')
        path.with_name(f'{path.name}.partial.0123abcd.partial').write_bytes(b'half')
    assert read_checkpoint(f'{server.url}/x.pth')['w'][0] == 2
    assert cached(tmp_path) == ['x.pth']


def test_what_another_process_is_downloading_stays(server, tmp_path):
    serve(tmp_path, 'x.pth', 2.0)
    partial = cached_path('http://elsewhere/a.pth').with_name('a.pth.partial')
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b'half')
    with open(partial.with_name(LOCK), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        read_checkpoint(f'{server.url}/x.pth')
    assert cached(tmp_path) == ['a.pth.partial', 'x.pth']


def test_processes_that_want_a_file_download_it_once(server, tmp_path):
    serve(tmp_path, 'x.pth', 2.0)
    code = f"""
import sys, torch
torch.hub.get_dir = lambda: {str(tmp_path / 'hub')!r}
from swinv2_mm.checkpoints.files import read_checkpoint
print(read_checkpoint({server.url + '/x.pth'!r})['w'][0].item())
"""
    processes = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].split()[-1] for process in processes] == ['2.0'] * 3
    assert server.requests == ['/x.pth']


def test_where_no_lock_holds_a_file_is_downloaded_all_the_same(server, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, 'flock', unsupported)
    serve(tmp_path, 'x.pth', 2.0)
    other = cached_path(f'{server.url}/x.pth').with_name('x.pth.1.partial')  # of a process that downloads too
    other.parent.mkdir(parents=True)
    other.touch()
    assert read_checkpoint(f'{server.url}/x.pth')['w'][0] == 2
    assert cached(tmp_path) == ['x.pth', 'x.pth.1.partial']


def test_a_file_that_others_downloaded_is_taken_if_it_has_the_hash_in_its_name(server, tmp_path):
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    torch.save({'w': torch.ones(1)}, tmp_path / 'x.pth')
    digest = hashlib.sha256((tmp_path / 'x.pth').read_bytes()).hexdigest()
    there = tmp_path / f'hub/checkpoints/x-{digest}.pth'
    (tmp_path / 'x.pth').rename(there)
    assert read_checkpoint(f'{server.url}/{there.name}')['w'].tolist() == [1]
    assert server.requests == []
    there.write_bytes(there.read_bytes() + b' ')
    assert 'HTTP Error 404' in error_of(read_checkpoint, f'{server.url}/{there.name}')


def test_a_server_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(downloads, 'TIMEOUT', 0.2)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with socket.create_server(('127.0.0.1', 0)) as silent:
        url = f'http://127.0.0.1:{silent.getsockname()[1]}/x.pth'
        assert error_of(read_checkpoint, url).startswith(f'cannot download {url} (timed out): ')
    assert socket.getdefaulttimeout() is None
    assert cached(tmp_path) == []


def test_a_file_that_is_another_one_the_second_time_is_fetched_once(server, tmp_path):
    file = serve(tmp_path, 'x.pth', 2.0)
    assert read_checkpoint(f'{server.url}/x.pth')['w'][0] == 2
    torch.save({'state_dict': Malicious(tmp_path / 'ran')}, file)
    assert read_checkpoint(f'{server.url}/x.pth')['w'][0] == 2
    assert server.requests == ['/x.pth']
    assert not (tmp_path / 'ran').exists()


def test_a_page_instead_of_a_file_is_not_kept(server, tmp_path):
    (tmp_path / 'served' / 'swinv2.pth').write_text('<html>Please log in</html>')
    assert 'broke off or is not a checkpoint' in error_of(read_checkpoint, f'{server.url}/swinv2.pth')
    assert cached(tmp_path) == []


@pytest.mark.parametrize('url', ['http://[::1/x.pth', 'http://'])
def test_what_is_no_url_is_one_clear_line(server, url):
    assert error_of(read_checkpoint, url).startswith(f'cannot download {url} (')


def test_without_network_the_error_says_how_to_get_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    url = 'http://127.0.0.1:9/swinv2.pth'  # nothing listens on the discard port
    with pytest.raises(CheckpointError, match=rf'cannot download {url}.*wget {url}.*--checkpoint FILE'):
        read_checkpoint(url)
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.name != LOCK]
