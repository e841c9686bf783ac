"""Malicious files and URLs through every entry that takes one: nothing in them runs, and nobody gets a traceback."""

import argparse
import contextlib
import functools
import http.server
import io
import os
import pickle
import random
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from draws import DRAWS
from entries import CALLS, ENTRIES, enter_host_runner
from mmengine.logging import HistoryBuffer
from torch import nn

from swinv2_mm.checkpoints import mmengine_reading
from swinv2_mm.checkpoints.files import read_checkpoint

FILES_PER_ENTRY = 4 * DRAWS


class Calls:
    """Calls a function when it is unpickled freely."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


class Runs(nn.Module):
    def forward(self, x):
        return x


# ---------------------------------------------------------------- what files hold


def payloads(mark):
    """Objects that write the file ``mark`` when they are made freely, by kind."""
    command = Calls(os.system, f'touch {mark}')
    history = HistoryBuffer()
    history._statistics_methods = {'mean': command}
    return {
        'a command': command,
        'a program': Calls(eval, f'open({mark!r}, "w")'),
        'an import': Calls(exec, f'import os; os.system("touch {mark}")'),
        'a pickle in a pickle': Calls(pickle.loads, pickle.dumps(command)),
        'a map': Calls(list, Calls(map, os.system, [f'touch {mark}'])),
        'a log history': history,
        'settings': argparse.Namespace(lr=command),
        'a state': Calls(set, [1], state={'x': command}),
        'an array of objects': np.array([command, None], dtype=object),
        'a key': {command: 1},
    }


BESIDE = ('meta', 'message_hub', 'optimizer', 'param_schedulers', 'ema_state_dict', 'hyper_parameters', 'args')


def poisoned(good, payload, mark, place, draw):
    """A checkpoint with a payload beside the weights or in their place."""
    file = {**good, 'state_dict': dict(good['state_dict']), 'meta': dict(good['meta'])}
    if place == 'program':  # what mmengine runs when it resumes
        file['meta']['config'] = f'__import__("os").system("touch {mark}")'
        file['meta']['x'] = payload
    elif place == 'weight':
        file['state_dict'][draw.choice(list(file['state_dict']))] = payload
    elif place == 'all':
        file = payload
    elif place == 'weights':
        file['state_dict'] = payload
    elif isinstance(file.get(place), dict):
        file[place] = {**file[place], 'x': payload}
    elif isinstance(file.get(place), list):
        file[place] = [*file[place], payload]
    else:
        file[place] = payload
    return file


PLACES = (*BESIDE, 'program', 'weight', 'weights', 'all')


def write(file, path, form):
    """Write a checkpoint in a form of file."""
    if form in ('zip', 'legacy'):
        torch.save(file, path, _use_new_zipfile_serialization=form == 'zip')
    elif form.startswith('protocol'):
        torch.save(file, path, pickle_protocol=int(form[-1]))
    elif form.startswith('plain'):
        path.write_bytes(pickle.dumps(file, int(form[-1])))
    elif form == 'tar':
        with tarfile.open(path, 'w') as archive:
            entry = tarfile.TarInfo('storages')
            content = pickle.dumps(file)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    else:  # a TorchScript archive, in which the pickle stands too
        torch.jit.script(Runs()).save(str(path))
        with zipfile.ZipFile(path, 'a') as archive:
            archive.writestr(f'{path.stem}/data.pkl.bak', pickle.dumps(file))


FORMS = 'zip', 'legacy', 'protocol 3', 'protocol 4', 'protocol 5', 'plain 0', 'plain 2', 'plain 4', 'tar', 'script'
SUFFIXES = ('.pth', '.pt', '.bin', '.ckpt', '.pkl', '.safetensors')


# ---------------------------------------------------------------- servers


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder: as it is, by way of another URL, half of it, or another file after the first request."""

    def do_GET(self):
        way, _, name = self.path[1:].partition('/')
        self.server.requests[self.path] += 1
        if way == 'redirects':
            self.send_response(302)
            self.send_header('Location', f'/serves/{name}')
            self.end_headers()
            return
        if way == 'changes' and self.server.requests[self.path] == 1:
            name = 'good.pth'
        content = Path(self.directory, name).read_bytes()
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if way == 'truncates' else content)

    def log_message(self, *args):
        pass


WAYS = ('serves', 'redirects', 'truncates', 'changes')


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.requests = Counter()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize('entry', ENTRIES)
def test_nothing_runs_whatever_takes_the_file(
    trained_segmentor, server, no_traces, load_tool, shapes, tmp_path, monkeypatch, entry
):
    draw = random.Random(entry)
    torch.save(trained_segmentor, tmp_path / 'good.pth')
    mark = str(tmp_path / 'ran')
    outcomes = Counter()
    for i in range(FILES_PER_ENTRY):
        kind, place, form = draw.choice(list(payloads(mark))), draw.choice(PLACES), draw.choice(FORMS)
        path = tmp_path / f'file_{i}{draw.choice(SUFFIXES)}'
        way = draw.choice((None, None, *WAYS))
        (tmp_path / f'results_{i}').mkdir()
        write(poisoned(trained_segmentor, payloads(mark)[kind], mark, place, draw), path, form)
        source = str(path) if way is None else f'http://127.0.0.1:{server.server_port}/{way}/{path.name}'
        monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', str(i % 2))
        drawn = kind, place, form, way, path.suffix
        try:
            code = ENTRIES[entry](source, load_tool=load_tool, shapes=shapes, tmp_path=tmp_path / f'results_{i}')
            outcome = 'refused' if code == 2 else 'read'
            assert (isinstance(code, int) and code in (0, 2)) or entry in CALLS, drawn
        except ValueError as error:  # a CheckpointError; mmengine adds where it came from
            assert entry in CALLS and 'checkpoint' in str(error), drawn
            outcome = 'refused'
        except (KeyError, RuntimeError, TypeError, AttributeError):  # mmengine's, of what is not there
            assert entry in CALLS, drawn
            outcome = 'refused'
        assert not os.path.exists(mark), drawn
        outcomes[outcome] += 1
    print(f'{entry}: {sum(outcomes.values())} files, {dict(outcomes)}, no code run')


@pytest.mark.parametrize('as_zip', [True, False])
@pytest.mark.parametrize('kind', payloads(''))
def test_the_payloads_run_where_files_are_unpickled_freely(tmp_path, monkeypatch, kind, as_zip):
    """Else the tests above would say nothing."""
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', dict(HistoryBuffer._statistics_methods))
    mark = str(tmp_path / 'ran')
    torch.save({'x': payloads(mark)[kind]}, tmp_path / 'x.pth', _use_new_zipfile_serialization=as_zip)
    with contextlib.suppress(AttributeError):  # after it has run
        torch.load(tmp_path / 'x.pth', weights_only=False)
    assert os.path.exists(mark)


def test_a_program_that_a_checkpoint_holds_runs_where_nobody_takes_it_out(
    trained_segmentor, server, no_traces, shapes, tmp_path
):
    """Of mmengine before it reads by us; else the place 'program' above would say nothing."""
    mark = str(tmp_path / 'ran')
    torch.save(poisoned(trained_segmentor, None, mark, 'program', random), tmp_path / 'x.pth')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine_reading, '_read', read_checkpoint)
        enter_host_runner(str(tmp_path / 'x.pth'), shapes, tmp_path, resume=True)
    assert os.path.exists(mark)
