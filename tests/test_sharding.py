"""Training with sharded parameters gives the losses and weights of one process, in a fraction of its memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_runs
import torch
from sharded_runs import RUNS, STEPS

from swinv2_mm import compat
from swinv2_mm.checkpoints import sharded
from swinv2_mm.checkpoints.files import read_checkpoint

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(compat.torch_version < sharded.NEEDED, reason='needs a newer PyTorch')


def start(processes, folder, *runs):
    """Start the runs; returns the process that starts them."""
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--master-port=0']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command = [*command, '--standalone', str(ROOT / 'tests/sharded_runs.py'), str(folder), *runs]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """The folders of runs in 2 and in 4 processes."""
    folders = {processes: tmp_path_factory.mktemp(f'processes{processes}') for processes in (2, 4)}
    runs = {2: list(RUNS), 4: ['clipped']}
    for processes, folder in folders.items():
        ended = start(processes, folder, *runs[processes])
        output = ended.communicate()[0]
        assert ended.returncode == 0, output[-4000:]
    return folders


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """What one process notes in a run, and its folder."""
    folder, noted = tmp_path_factory.mktemp('one'), {}

    def one(run):
        if run not in noted:
            noted[run] = sharded_runs.train(run, folder)
        return noted[run], folder / run

    return one


def noted_by(folder, run, processes):
    return [json.loads((folder / run / f'{rank}.json').read_text()) for rank in range(processes)]


@pytest.mark.parametrize(('run', 'processes'), [*((run, 2) for run in RUNS), ('clipped', 4)])
def test_losses_and_weights_are_those_of_one_process(many, one, run, processes):
    expected, folder = one(run)
    noted = noted_by(many[processes], run, processes)
    exact = dict(rtol=1e-9, atol=1e-12) if run != 'bfloat16' else dict(rtol=2e-3, atol=2e-4)
    losses = torch.tensor([one['losses'] for one in noted], dtype=torch.float64).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected['losses'], dtype=torch.float64), **exact)
    assert [one['norms'] for one in noted] == [pytest.approx(expected['norms'], rel=1e-9)] * processes
    name = f'iter_{STEPS}.pth'
    ours, theirs = (read_checkpoint(path / name) for path in (many[processes] / run, folder))
    assert list(ours['state_dict']) == list(theirs['state_dict'])
    torch.testing.assert_close(dict(ours['state_dict']), dict(theirs['state_dict']), **exact)
    assert ours['optimizer']['param_groups'] == theirs['optimizer']['param_groups']
    torch.testing.assert_close(ours['optimizer']['state'], theirs['optimizer']['state'], **exact)
