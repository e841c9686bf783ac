"""Ctrl-C and SIGTERM: one line and no traceback, exit code 130 or 143, no process and no partial file left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_infer

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(path for path in (ROOT / 'tools').rglob('*.py') if "__name__ == '__main__'" in path.read_text())
WORDS = {signal.SIGINT: 'interrupted', signal.SIGTERM: 'terminated'}
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
BOTH = pytest.mark.parametrize('number', WORDS, ids=lambda number: number.name)

detector = test_infer.detector


@pytest.fixture
def end(tmp_path):
    """Run a command, and signal it as soon as a text is in its output or a file is there.

    Ctrl-C goes to all processes of a terminal, a SIGTERM to one. None may be left. Returns the exit code and the
    standard error.
    """

    def end(number, *command, when, env=ENV):
        out, err = tmp_path / 'stdout.txt', tmp_path / 'stderr.txt'
        with out.open('w') as stdout, err.open('w') as stderr:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                **dict(cwd=ROOT, env=env, stdout=stdout, stderr=stderr, start_new_session=True),
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
            )
        try:
            deadline = time.monotonic() + 120
            while not (when.exists() if isinstance(when, Path) else when in out.read_text() + err.read_text()):
                assert process.poll() is None, err.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            code = process.wait(100)
            with pytest.raises(ProcessLookupError):
                while time.monotonic() < deadline:  # what it leaves to the system ends at once, but not before it
                    os.killpg(process.pid, 0)
                    time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return code, err.read_text()

    return end


def check(ended, tool, number, text=''):
    code, err = ended
    assert code == 128 + number, err
    assert 'Traceback' not in err and 'Exception ignored' not in err
    words = tuple(WORDS.values())
    lines = [line for line in err.splitlines() if any(word in line for word in words)]
    assert lines == [err.splitlines()[-1]] == [f'{tool}.py: {WORDS[number]}{text}']


@BOTH
@pytest.mark.parametrize('tool', COMMANDS, ids=lambda path: path.stem)
def test_a_tool_that_imports_ends_in_one_line(end, tmp_path, tool, number):
    # Python notices a signal between two operations: one that comes right before a long sleep waits for its end.
    busy = 'while True:\n    time.sleep(0.02)\n'
    (tmp_path / 'argparse.py').write_text(f"import time\nprint('importing', flush=True)\n{busy}")
    env = {**ENV, 'PYTHONPATH': str(tmp_path)}
    code, err = end(number, tool, when='importing', env=env)
    assert (code, err) == (128 + number, f'{tool.name}: {WORDS[number]}\n')


@BOTH
def test_half_a_data_set_is_removed(end, tmp_path, number):
    out = tmp_path / 'data'
    out.mkdir()
    command = ('tools/misc/draw_dataset.py', out / 'shapes', '--train', 100000)
    code = f"""import pathlib, runpy, sys
sys.path.insert(0, 'tools')
sys.argv = {list(map(str, command))}
write = pathlib.Path.write_bytes
pathlib.Path.write_bytes = lambda *args: (write(*args), print('written', flush=True))
runpy.run_path(sys.argv[0], run_name='__main__')"""
    check(end(number, '-c', code, when='written'), 'draw_dataset', number)
    assert not list(out.iterdir())


def test_results_so_far_are_kept(end, detector, shapes, tmp_path):
    photos, out = tmp_path / 'photos', tmp_path / 'out'
    photos.mkdir()
    for i in range(5000):
        (photos / f'{i}.jpg').symlink_to(shapes / 'val2017/000000000001.jpg')
    command = ('tools/infer.py', *detector, photos, '--out', out, '--score-thr', 0)
    check(end(signal.SIGTERM, *command, when=out / 'overlays/10.jpg'), 'infer', signal.SIGTERM)
    done = [image['id'] for image in json.loads((out / 'image_info.json').read_text())['images']]
    results = json.loads((out / 'predictions.json').read_text())
    assert {result['image_id'] for result in results} == set(done)
    assert len(results) == 8 * len(done)
    pictures = {int(path.stem) for path in (out / 'overlays').iterdir()}
    assert {0, 1} <= set(done) <= pictures and len(pictures) <= len(done) + 1
    assert {path.name for path in out.iterdir()} == {'image_info.json', 'overlays', 'predictions.json'}


def test_an_evaluation_ends_with_the_workers_that_load_its_data(end, detector, shapes, tmp_path):
    data = tmp_path / 'data'
    (data / 'annotations').mkdir(parents=True)
    (data / 'val2017').symlink_to(shapes / 'val2017')
    coco = json.loads((shapes / 'annotations/instances_val2017.json').read_text())
    coco.update(images=[dict(coco['images'][0], id=i) for i in range(1, 2000)], annotations=[])
    (data / 'annotations/instances_val2017.json').write_text(json.dumps(coco))
    command = ('tools/test.py', *detector, '--data-root', data, '--work-dir', tmp_path / 'run')
    command += ('--out', tmp_path / 'out/predictions.pkl', '--show-dir', tmp_path / 'pictures')
    command += ('--skip-data-checks', '--cfg-options')  # no image has an object
    command += ('default_hooks.logger.interval=1', 'test_dataloader.num_workers=2')
    check(end(signal.SIGINT, *command, when='Iter(test)'), 'test', signal.SIGINT)
    assert not list((tmp_path / 'out').iterdir())
    assert {path.suffix for path in (tmp_path / 'pictures').iterdir() if path.name[0] == '.'} == set()


def test_workers_end_with_a_tool_that_is_killed(end):
    """Also those that could not tell: one that hands over an image waits for a reader for ever."""
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / 'tools')!r})
from swinv2_tools import ending
def main():
    if not os.fork():
        print('forked', flush=True)
    time.sleep(300)
ending.run(main)"""
    assert end(signal.SIGKILL, '-c', code, when='forked')[0] == -signal.SIGKILL


@pytest.mark.parametrize(('number', 'gpu'), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_the_demo_ends_with_the_tools_that_it_runs(end, tmp_path, number, gpu):
    out = tmp_path / 'data'
    code = f"""import sys
sys.path.insert(0, 'tools')
sys.argv = ['demo.py']
import demo
from swinv2_tools import ending
demo.has_gpu = lambda: {gpu}
draw = lambda name: ('misc/draw_dataset.py', {str(out)!r} + '/' + name, '--train', 100000)
ending.run(lambda: demo.run_side_by_side({{draw('a'): None, draw('b'): demo.Path({str(tmp_path)!r}, 'b.log')}}))"""
    out.mkdir()

    class BothDraw(type(tmp_path)):
        def exists(self):
            return len({path.parent for path in self.glob('.draw_dataset_*/data/train2017/*.jpg')}) > 1

    check(end(number, '-c', code, when=BothDraw(out)), 'demo', number)
    assert not list(out.iterdir())
    assert (tmp_path / 'b.log').read_text() == ''


@BOTH
def test_an_installation_ends_with_what_pip_started(end, tmp_path, number):
    pids, fake = tmp_path / 'pids', tmp_path / 'python'
    fake.write_text(f'#!/bin/sh\nsleep 300 &\necho $$ $! > {pids}.new\nmv {pids}.new {pids}\nwait\n')
    fake.chmod(0o755)
    code = f"""import sys
sys.path.insert(0, 'tools')
sys.argv = ['install.py']
from swinv2_tools import ending
import install
install.PATIENCE = 1  # the sleeping shell job ignores Ctrl-C
def main():
    sys.executable, sys.prefix = {str(fake)!r}, {str(tmp_path)!r}
    install.choose_environment = lambda: install.Path(sys.prefix)
    install.complete = lambda _: install.pip_install('six')
    install.ensure_environment()
ending.run(main)"""
    check(end(number, '-c', code, when=pids), 'install', number, ': run again to go on')
    for pid in map(int, pids.read_text().split()):
        assert not Path(f'/proc/{pid}').exists() or ') Z ' in Path(f'/proc/{pid}/stat').read_text()


def test_a_benchmark_ends_with_the_process_that_measures(end):
    command = (
        'tools/analysis_tools/benchmark.py',
        '--sizes',
        '256x256',
        '--windows',
        8,
        '--peers',
        'none',
        '--steps',
        100000,
    )
    check(end(signal.SIGTERM, *command, when='round 1 of'), 'benchmark', signal.SIGTERM)


def test_a_second_signal_does_not_stop_the_tidying_up(end, tmp_path):
    code = """import sys, time
sys.path.insert(0, 'tools')
sys.argv = ['tool.py']
import signal
from swinv2_tools import ending
def main():
    try:
        print('started', flush=True)
        while True:
            time.sleep(0.02)
    finally:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        print('tidy', flush=True)
ending.run(main)"""
    check(end(signal.SIGINT, '-c', code, when='started'), 'tool', signal.SIGINT)
    assert (tmp_path / 'stdout.txt').read_text() == 'started\ntidy\n'
