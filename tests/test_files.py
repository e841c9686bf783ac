"""Reading, writing and downloading checkpoint files: no code of a file runs, and what is damaged is one clear line."""

import argparse
import hashlib
import http.server
import os
import pickle
import resource
import struct
import sys
import threading
import types
import zipfile
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.logging import MessageHub

from swinv2_mm import CheckpointError, compat
from swinv2_mm.files import read_checkpoint, write_checkpoint


@pytest.fixture(autouse=True, params=['PyTorch', 'swinv2_mm'])
def reader(request, monkeypatch):
    """Files are read by PyTorch, and by the package as before PyTorch 2.6."""
    if request.param == 'swinv2_mm':
        monkeypatch.setattr(compat, 'HAS_SAFE_LOAD', False)
    elif not compat.HAS_SAFE_LOAD:
        pytest.skip('this PyTorch does not read safely')


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
    assert message.startswith(f'checkpoint {path} is truncated or no checkpoint (')
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
    assert message.startswith(f'checkpoint {path} {expected.get(content, "is truncated or no checkpoint")}')


def test_a_tensor_that_a_damaged_file_calls_a_folder_is_refused(tmp_path):
    """PyTorch reads whatever memory held before: its zip reader extracts nothing for a folder, and does not say so."""
    path = tmp_path / 'x.pth'
    torch.save({'w': torch.rand(1000)}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b'PK\x01\x02', 0, content.rindex(b'/data/0'))  # in the directory at the end of the file
    content[entry + 38] |= 0x10  # the external attributes
    path.write_bytes(content)
    assert error_of(read_checkpoint, path).startswith(f'checkpoint {path} is truncated or no checkpoint (')


def test_what_mmengine_writes_is_read_back(tmp_path):
    hub = MessageHub('test')
    hub.update_scalar('train/loss', 2.5)
    hub.update_scalar('val/AP', np.float64(0.25))
    hub.update_info('iter', 7)
    torch.save({'state_dict': {'w': torch.ones(2)}, 'message_hub': hub.state_dict()}, tmp_path / 'run.pth')
    scalars = read_checkpoint(tmp_path / 'run.pth')['message_hub']['log_scalars']
    assert scalars['train/loss'].current() == 2.5
    assert scalars['val/AP'].statistics('mean') == 0.25


def test_reading_a_file_leaves_resuming_as_it_is(tmp_path):
    hub = MessageHub('test')
    hub.update_scalar('train/loss', 2.5)
    torch.save({'state_dict': {'w': torch.ones(2)}, 'message_hub': hub.state_dict()}, tmp_path / 'run.pth')
    for _ in range(2):
        read_checkpoint(tmp_path / 'run.pth')
        assert torch.load(tmp_path / 'run.pth')['message_hub']['log_scalars']['train/loss'].current() == 2.5


@pytest.mark.parametrize(('owner', 'name'), [(np.ndarray, 'tofile'), (dict, 'get'), (np.ndarray, 'min')])
def test_getattr_is_allowed_for_the_log_history_alone(tmp_path, owner, name):
    torch.save({'x': Getattr(owner, name)}, tmp_path / 'getattr.pth')
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


@pytest.mark.parametrize('suffix', ['.pth', '.bin'])
@pytest.mark.parametrize('as_zip', [True, False])
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_a_file_that_could_run_code_is_refused_by_name(tmp_path, wrapper, as_zip, suffix):
    ran, path = tmp_path / 'ran', tmp_path / f'malicious{suffix}'
    content = {'w': torch.ones(2), 'x': Malicious(ran)}
    for name in reversed(wrapper.split('.')):
        content = {name: content}
    torch.save({'model': {'w': torch.ones(2)}, **content}, path, _use_new_zipfile_serialization=as_zip)
    assert f'{path} holds {os.name}.system, which could run code, and is refused' in error_of(read_checkpoint, path)
    assert not ran.exists()


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
    assert error_of(read_checkpoint, path).startswith(f'checkpoint {path} is truncated or no checkpoint')
    assert not ran.exists()


def test_a_file_does_not_write_to_the_terminal_through_an_error(tmp_path):
    folder = zipfile.ZipInfo('a\x1b[31m\rb')
    folder.external_attr = 0x10
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w') as file:
        file.writestr(folder, b'')
    message = error_of(read_checkpoint, tmp_path / 'x.pth')
    assert 'a?[31m?b in it is damaged' in message and message.isprintable()


class Runs(torch.nn.Module):
    def forward(self, x):
        return x


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(Runs()).save(str(tmp_path / 'script.pth'))
    message = error_of(read_checkpoint, tmp_path / 'script.pth')
    assert 'no checkpoint (it is a TorchScript archive)' in message


def test_without_safetensors_its_files_alone_are_an_error(tmp_path, monkeypatch):
    write_checkpoint({'w': torch.ones(1)}, tmp_path / 'x.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)  # importing it fails
    assert error_of(read_checkpoint, tmp_path / 'x.safetensors').endswith(
        'takes the library safetensors, which is not installed: pip install safetensors'
    )
    assert error_of(write_checkpoint, {'w': torch.ones(1)}, tmp_path / 'y.safetensors').endswith(
        'pip install safetensors'
    )
    write_checkpoint({'w': torch.ones(1)}, tmp_path / 'x.pth')
    assert read_checkpoint(tmp_path / 'x.pth')['w'].tolist() == [1]
    assert sorted(os.listdir(tmp_path)) == ['x.pth', 'x.safetensors']


def test_a_whole_model_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'model.pth')
    assert 'holds torch.nn.modules.linear.Linear, which' in error_of(read_checkpoint, tmp_path / 'model.pth')


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
def test_settings_that_could_run_code_are_refused(tmp_path, monkeypatch, place, as_zip):
    ran = tmp_path / 'ran'
    settings = CfgNode()
    if place == 'namespace':
        settings = argparse.Namespace(lr=Malicious(ran))
    elif place == 'item':
        settings['LR'] = Malicious(ran)
    elif place == 'attribute':
        settings.__dict__['lr'] = Malicious(ran)
    else:
        settings = argparse.Namespace(cfg=CfgNode(MODEL=CfgNode(LR=[Malicious(ran)])))
    path = save_settings(settings, tmp_path / 'run.pth', monkeypatch, as_zip)
    assert f'holds {os.name}.system, which could run code, and is refused' in error_of(read_checkpoint, path)
    assert not ran.exists()


def test_reading_allows_settings_nowhere_else(tmp_path):
    torch.save({'args': argparse.Namespace(lr=1)}, tmp_path / 'run.pth')
    assert read_checkpoint(tmp_path / 'run.pth')['args'].lr == 1
    with pytest.raises(pickle.UnpicklingError, match=r'argparse\.Namespace'):
        torch.load(tmp_path / 'run.pth', weights_only=True)


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


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    write_checkpoint({'w': torch.ones(1)}, tmp_path / 'x.pth')
    (tmp_path / 'other').touch()
    assert (tmp_path / 'x.pth').stat().st_mode == (tmp_path / 'other').stat().st_mode


def test_wrapped_weights_are_written_as_pth(tmp_path):
    write_checkpoint({'model': {'w': torch.ones(1)}}, tmp_path / 'x.pth')
    assert read_checkpoint(tmp_path / 'x.pth')['model']['w'].tolist() == [1]


@pytest.mark.parametrize('name', ['x.ckpt', 'x', 'safetensors', 'x.pth.tar'])
def test_writing_another_kind_of_file_names_the_kinds(tmp_path, name):
    expected = f'{tmp_path / name} must end in .safetensors, .pth, .bin: that says how it is written'
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
        super().do_GET()

    def copyfile(self, source, output):
        content = source.read()
        output.write(content[: len(content) // 2] if self.path.startswith('/cut/') else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the files in ``served``; what is downloaded goes to ``hub/checkpoints``."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    (tmp_path / 'served').mkdir()
    handler = partial(Handler, directory=tmp_path / 'served')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.requests = []
        server.url = f'http://127.0.0.1:{server.server_port}'
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def serve(tmp_path, name, value=1.0):
    """Put a checkpoint with a tensor of one value where the server finds it."""
    path = tmp_path / 'served' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint({'w': torch.full((1000,), value)}, path)
    return path


def cached(tmp_path):
    return sorted(os.listdir(tmp_path / 'hub' / 'checkpoints'))


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
    assert message.startswith(f'{server.url}/x-0123456a.pth is not the file that its name says, invalid hash value (')
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
    assert cached(tmp_path) == [name if name.startswith('swinv2') else f'127.0.0.1--{name}']


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
    assert cached(tmp_path) == [f'127.0.0.1--{model}--resolve--main--{name}' for model in 'ab']
    assert len(server.requests) == 2


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_a_truncated_file_in_the_cache_is_named_and_downloaded_again_once_deleted(server, tmp_path, suffix):
    serve(tmp_path, f'swinv2{suffix}', 5.0)
    url, file = f'{server.url}/swinv2{suffix}', tmp_path / 'hub' / 'checkpoints' / f'swinv2{suffix}'
    read_checkpoint(url)
    file.write_bytes(file.read_bytes()[:1000])
    message = error_of(read_checkpoint, url)
    assert message.startswith(f'checkpoint {file} is truncated or no checkpoint (')
    assert message.endswith('): delete it, and it is downloaded again')
    file.unlink()
    assert read_checkpoint(url)['w'][0] == 5
    assert len(server.requests) == 2


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_a_download_that_breaks_off_is_one_clear_line(server, tmp_path, suffix):
    serve(tmp_path, f'cut/x{suffix}')
    for _ in range(2):
        message = error_of(read_checkpoint, f'{server.url}/cut/x{suffix}')
        assert message.startswith(f'the download of {server.url}/cut/x{suffix} broke off or is no checkpoint: ')
        assert cached(tmp_path) == []


def test_a_page_instead_of_a_file_is_not_kept(server, tmp_path):
    (tmp_path / 'served' / 'swinv2.pth').write_text('<html>Please log in</html>')
    assert 'broke off or is no checkpoint' in error_of(read_checkpoint, f'{server.url}/swinv2.pth')
    assert cached(tmp_path) == []


@pytest.mark.parametrize('url', ['http://[::1/x.pth', 'http://'])
def test_what_is_no_url_is_one_clear_line(server, url):
    assert error_of(read_checkpoint, url).startswith(f'cannot download {url} (')


def test_without_network_the_error_says_how_to_get_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    url = 'http://127.0.0.1:9/swinv2.pth'  # nothing listens on the discard port
    with pytest.raises(CheckpointError, match=rf'cannot download {url}.*wget {url}.*--checkpoint FILE'):
        read_checkpoint(url)
    assert not list(tmp_path.glob('checkpoints/*'))
