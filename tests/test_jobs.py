"""Jobs: all are done, so many at once, and a failure ends the others with one line."""

import pytest

FAILS = 'import sys; print("working"); sys.exit("error: no such photo")'


@pytest.fixture(scope='module')
def jobs(load_tool):
    return load_tool('jobs')


def job(jobs, folder, name, code):
    return jobs.Job(name, ['-c', code], folder / f'{name}.log')


def test_all_are_done_and_leave_what_they_print(jobs, tmp_path):
    todo = [job(jobs, tmp_path, str(i), f'print({i} ** 2)') for i in range(3)]
    jobs.run_jobs(todo, 2, lambda: None)
    assert [job.log.read_text() for job in todo] == ['0\n', '1\n', '4\n']


def test_those_that_run_at_once_share_the_cores(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.os, 'sched_getaffinity', lambda pid: range(8))
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    todo = [job(jobs, tmp_path, str(i), 'import os; print(os.environ.get("OMP_NUM_THREADS"))') for i in range(2)]
    for at_once in (2, 1):
        jobs.run_jobs(todo, at_once, lambda: None)
    assert todo[0].log.read_text() == '4\nNone\n'  # alone it gets what PyTorch takes by itself


@pytest.mark.parametrize('at_once', [1, 2])
def test_no_more_than_asked_run_at_once(jobs, tmp_path, at_once):
    code = 'import time; print(time.time()); time.sleep(1.5); print(time.time())'
    todo = [job(jobs, tmp_path, str(i), code) for i in range(3)]
    jobs.run_jobs(todo, at_once, lambda: None)
    spans = [tuple(map(float, job.log.read_text().split())) for job in todo]
    most = max(sum(begin <= start < end for begin, end in spans) for start, _ in spans)
    assert most == at_once


def test_a_failure_says_why_and_ends_the_others(jobs, tmp_path):
    endless = job(jobs, tmp_path, 'endless', 'import time, os; print(os.getpid(), flush=True); time.sleep(600)')
    with pytest.raises(ChildProcessError, match=r'^bad failed: no such photo \(see .*bad\.log\)$'):
        jobs.run_jobs([endless, job(jobs, tmp_path, 'bad', 'import time; time.sleep(2);' + FAILS)], 2, lambda: None)
    pid = int(endless.log.read_text())
    assert not jobs.os.path.exists(f'/proc/{pid}')


def test_what_is_left_is_printed_now_and_then(jobs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, 'INTERVAL', 0)
    jobs.run_jobs([job(jobs, tmp_path, 'slow', 'import time; time.sleep(2)')], 1, lambda: print('a line'))
    assert set(capsys.readouterr().out.splitlines()) == {'a line'}


def test_a_limit_ends_what_runs_and_begins_no_more(jobs, tmp_path):
    endless = job(jobs, tmp_path, 'endless', 'import time, os; print(os.getpid(), flush=True); time.sleep(600)')
    later = job(jobs, tmp_path, 'later', 'print("begun")')
    jobs.run_jobs([endless, later], 1, lambda: None, limit=2)
    assert not jobs.os.path.exists(f'/proc/{int(endless.log.read_text())}')
    assert not later.log.exists()
