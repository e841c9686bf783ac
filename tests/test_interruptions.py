"""Runs that are killed at any moment, and disks that fill up: what was whole stays whole."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from draws import DRAWS
from entries import DEMO, IN_PROCESS, ROOT

from swinv2_mm.checkpoints.files import CheckpointError, read_checkpoint

QUICK = (
    *('train_dataloader.batch_size=2', 'default_hooks.logger.interval=1', 'train_cfg.val_interval=1000000'),
    *IN_PROCESS,
)
SAVING = re.compile(rb'Saving checkpoint at (\d+) iterations')


def command(tool, *args):
    (path,) = (ROOT / 'tools').rglob(f'{tool}.py')
    return [sys.executable, str(path), DEMO, *map(str, args)]


def environment():
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def whole_iterations(folder):
    """The iterations of the checkpoints that can be read, and the number of those that can't."""
    iterations, damaged = [], 0
    for path in folder.glob('*.pth'):
        try:
            iterations.append(read_checkpoint(path)['meta']['iter'])
        except CheckpointError:
            damaged += 1
    return iterations, damaged


@pytest.mark.parametrize('keep', [1, 3] if DRAWS > 1 else [1])
def test_a_run_that_is_killed_loses_one_interval_at_most(shapes, tmp_path, keep):
    """It saves every step, so it is killed while it writes as often as not; then it is resumed, and killed again."""
    draw, lost, damaged = random.Random(keep), [], 0
    flags = '--data-root', shapes / 'ade', '--work-dir', tmp_path / 'run', '--seed', 0
    save = 'default_hooks.checkpoint.interval=1', f'default_hooks.checkpoint.max_keep_ckpts={keep}'
    options = '--cfg-options', 'train_cfg.max_iters=1000000', *QUICK, *save
    for i in range(2 * DRAWS):
        resume = ('--resume',) if i else ()
        process = subprocess.Popen(
            command('train', *flags, *resume, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        log, announced = [], 0
        for line in process.stdout:
            log.append(line)
            if SAVING.search(line):
                announced = int(SAVING.search(line)[1])
                if len([line for line in log if SAVING.search(line)]) == 2:
                    threading.Timer(draw.uniform(0, 1), process.send_signal, (signal.SIGKILL,)).start()
        assert process.wait() == -signal.SIGKILL, b''.join(log)[-3000:]
        iterations, broken = whole_iterations(tmp_path / 'run')
        assert iterations, 'nothing is left'
        lost.append(announced - max(iterations))
        damaged += broken
    print(f'max_keep_ckpts={keep}: {len(lost)} kills, intervals lost {sorted(lost)}, truncated files {damaged}')
    assert min(lost) >= 0 and max(lost) <= 1 and damaged == 0


IN_TURN = """
import json, os, runpy, sys
import mmdet.models, mmseg.models
for i, arguments in enumerate(json.loads(sys.argv[2])):
    if not os.fork():
        for name, number in (('out', 1), ('err', 2)):
            os.dup2(os.open(f'{sys.argv[1]}/{name}_{i}', os.O_WRONLY | os.O_CREAT), number)
        if arguments[0] != sys.executable:
            os.execvp(arguments[0], arguments)
        sys.argv, sys.path[0] = arguments[1:], os.path.dirname(arguments[1])
        runpy.run_path(arguments[1], run_name='__main__')
        sys.exit()
    code = os.waitstatus_to_exitcode(os.wait()[1])
    with open(f'{sys.argv[1]}/code_{i}', 'w') as file:
        file.write(str(code))
"""  # each in a process of its own, which need not import a host


def on_a_small_disk(folder, megabytes, *commands):
    """Run commands while ``folder`` is a file system of its own. Gives their exit codes, outputs and what it holds."""
    (folder.parent / 'in_turn.py').write_text(IN_TURN)
    words = sys.executable, folder.parent / 'in_turn.py', folder.parent, json.dumps(list(commands), default=str)
    script = f"""
mount -t tmpfs -o size={megabytes}m tmpfs {folder} || exit 77
{' '.join(f"'{word}'" for word in words)} || exit
tar cf {folder.parent}/disk.tar -C {folder} ."""
    done = subprocess.run(['unshare', '-rm', 'sh', '-c', script], env=environment(), capture_output=True, text=True)
    if done.returncode == 77 or 'unshare' in done.stderr:
        pytest.skip('this system lets nobody mount a small disk')
    assert done.returncode == 0, done.stderr
    subprocess.run(['tar', 'xf', folder.parent / 'disk.tar', '-C', folder], check=True)
    read = [
        (folder.parent / f'{name}_{i}').read_text() for i in range(len(commands)) for name in ('code', 'out', 'err')
    ]
    return [(int(code), out, err) for code, out, err in zip(read[::3], read[1::3], read[2::3])]


@pytest.fixture
def disk(tmp_path):
    if not shutil.which('unshare'):
        pytest.skip('there is no unshare')
    (tmp_path / 'disk').mkdir()
    return tmp_path / 'disk'


def assert_full(code, err):
    assert code == 2, err
    assert 'Traceback' not in err
    assert re.search(r'^error: \S+ cannot be written: No space left on device', err, re.MULTILINE), err


@pytest.mark.parametrize('megabytes, least', [(4, 0), (50, 1), *((10 + 5 * i, 0) for i in range(DRAWS - 1))])
def test_a_disk_that_fills_up_in_training_leaves_whole_checkpoints(shapes, disk, megabytes, least):
    flags = '--data-root', shapes / 'ade', '--work-dir', disk, '--cfg-options', 'train_cfg.max_iters=9', *QUICK
    keep = 'default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=9'
    ((code, _, err),) = on_a_small_disk(disk, megabytes, command('train', *flags, *keep))
    assert_full(code, err)
    iterations, damaged = whole_iterations(disk)
    assert sorted(iterations) == list(range(1, len(iterations) + 1))
    assert len(iterations) >= least
    assert damaged == 0 and not [path for path in disk.rglob('*') if 'partial' in path.name]


def test_a_disk_that_fills_up_costs_other_tools_a_line(shapes, disk, trained_segmentor, tmp_path):
    torch.save(trained_segmentor, tmp_path / 'run.pth')
    convert = command('convert_checkpoint', tmp_path / 'run.pth', disk / 'out.pth')
    convert.remove(DEMO)
    images = sorted((shapes / 'val2017').iterdir())
    infer = command('infer', tmp_path / 'run.pth', *images, '--out', disk / 'out')
    half = ['dd', 'if=/dev/zero', f'of={disk}/half', 'bs=1024', 'count=940']  # of one megabyte
    fill = ['dd', 'if=/dev/zero', f'of={disk}/rest', 'bs=1024']
    for code, _, err in on_a_small_disk(disk, 1, half, convert, fill, infer)[1::2]:
        assert_full(code, err)
    assert not [path.name for path in disk.rglob('*') if 'partial' in path.name]
    assert not (disk / 'out.pth').exists()


def test_a_folder_that_cannot_be_written_to_is_one_line(shapes, disk, trained_segmentor, tmp_path):
    torch.save(trained_segmentor, tmp_path / 'run.pth')
    image = next((shapes / 'val2017').iterdir())
    read_only = ['mount', '-o', 'remount,ro', disk]
    train = command('train', '--data-root', shapes / 'ade', '--work-dir', disk / 'run')
    convert = command('convert_checkpoint', tmp_path / 'run.pth', disk / 'out.pth')
    convert.remove(DEMO)
    infer = command('infer', tmp_path / 'run.pth', image, '--out', disk / 'out')
    test = command('test', tmp_path / 'run.pth', '--data-root', shapes / 'ade', '--work-dir', tmp_path / 'w', '--out')
    results = on_a_small_disk(disk, 1, read_only, train, convert, infer, [*test, disk / 'out.pkl'])
    assert results[0][0] == 0, results[0]
    for code, _, err in results[1:]:
        assert code == 2 and 'Traceback' not in err, err
        assert err.strip().splitlines()[-1].startswith('error: ') and 'Read-only file system' in err
