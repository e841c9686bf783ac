"""Whatever names a checkpoint, mmengine reads it without running code; so it does YAML."""

import functools
import http.server
import os
import threading

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from swinv2_mm import CheckpointError
from swinv2_mm.checkpoints import downloads, mmengine_reading
from swinv2_mm.checkpoints.downloads import cached_path


class Malicious:
    """Writes a file when it is unpickled freely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


class Neck(BaseModule):
    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(1, 1, 1)


@pytest.fixture
def malicious(tmp_path):
    """A file of weights of a `Neck` that is all 2, with code beside them; and the file that the code would write."""
    ran = tmp_path / 'ran'
    weights = {name: torch.full_like(value, 2) for name, value in Neck().state_dict().items()}
    meta = {'config': f'open({str(ran)!r}, "w")', 'x': Malicious(ran)}
    torch.save({'state_dict': weights, 'meta': meta}, tmp_path / 'x.pth')
    return tmp_path / 'x.pth', ran


@pytest.fixture
def url(malicious, tmp_path, monkeypatch):
    """The URL of that file."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f'http://127.0.0.1:{server.server_port}/x.pth'
        server.shutdown()
        thread.join()


@pytest.fixture(params=['path', 'URL', 'name of mmengine'])
def source(request, malicious, monkeypatch):
    """What a config names the file by."""
    if request.param == 'path':
        return str(malicious[0])
    url = request.getfixturevalue('url')
    if request.param == 'URL':
        return url
    monkeypatch.setitem(downloads.TABLES, 'torchvision', lambda: {'neck': url})
    return 'torchvision://neck'


@pytest.mark.parametrize('forced', [False, True])
def test_any_part_of_a_model_is_initialised_without_running_code(source, malicious, monkeypatch, forced):
    if forced:
        monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    for part in (Neck(dict(type='Pretrained', checkpoint=source)), Neck()):
        if part.init_cfg:
            part.init_weights()
        else:
            load_checkpoint(part, source)
        assert part.conv.weight.item() == part.conv.bias.item() == 2
    assert not malicious[1].exists()


def test_what_is_downloaded_is_kept_by_us(url, malicious):
    for _ in range(2):
        CheckpointLoader.load_checkpoint(url)
        malicious[0].unlink(missing_ok=True)
    assert cached_path(url).is_file()


def test_the_program_that_old_runs_saved_is_left_out(source):
    """mmengine runs it when it resumes."""
    assert CheckpointLoader.load_checkpoint(source)['meta'] == {}


def test_a_deprecated_name_of_mmengine_is_still_one(malicious, monkeypatch):
    monkeypatch.setitem(downloads.TABLES, 'open-mmlab', lambda: {'new': str(malicious[0])})
    monkeypatch.setattr(downloads.mmengine_checkpoint, 'get_deprecated_model_names', lambda: {'old': 'new'})
    assert 'state_dict' in CheckpointLoader.load_checkpoint('open-mmlab://old')


@pytest.mark.parametrize('name', ['torchvision://nothing', 'open-mmlab://nothing', 'mmcls://nothing', 'pavi://nothing'])
def test_a_name_that_nobody_knows_is_one_line(name, monkeypatch):
    monkeypatch.setitem(downloads.TABLES, 'torchvision', dict)
    with pytest.raises(CheckpointError, match=rf'^checkpoint {name}: [^\n]*$'):
        CheckpointLoader.load_checkpoint(name)


def test_an_object_store_is_read_without_running_code(malicious, monkeypatch):
    class Opened:
        def __enter__(self):
            return str(malicious[0])

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(mmengine_reading, 'get_local_path', lambda path, backend_args: Opened())
    assert CheckpointLoader.load_checkpoint('s3://bucket/x.pth')['state_dict']['conv.bias'].item() == 2
    assert not malicious[1].exists()


@pytest.mark.parametrize('ending', ['yaml', 'yml'])
@pytest.mark.parametrize('tag', ['object/apply:os.system', 'object/new:os.system', 'name:os.system', 'module:os'])
def test_a_yaml_config_runs_no_code(tmp_path, ending, tag):
    path = tmp_path / f'config.{ending}'
    value = f'["touch {tmp_path}/ran"]' if 'object' in tag else "''"
    path.write_text(f'model:\n  type: !!python/{tag} {value}\n')
    with pytest.raises(Exception, match='could not determine a constructor'):
        Config.fromfile(path)
    assert not (tmp_path / 'ran').exists()


def test_a_yaml_config_of_plain_values_is_read(tmp_path):
    Config(dict(a=(1, 2), b=dict(c=[1.5, None, 'd'], e=True))).dump(tmp_path / 'config.yaml')
    cfg = Config.fromfile(tmp_path / 'config.yaml')
    assert cfg.to_dict() == dict(a=(1, 2), b=dict(c=[1.5, None, 'd'], e=True))
