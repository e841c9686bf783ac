"""Progress: lines in a file are few, and every item comes once, in order."""

import io
import sys

import pytest


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def progress(load_tool):
    return load_tool('progress')


@pytest.mark.parametrize('stream', [io.StringIO, Terminal])
@pytest.mark.parametrize('items', [range(1, 6), [], ['a']], ids=str)
def test_every_item_comes_once_in_order(progress, monkeypatch, stream, items):
    monkeypatch.setattr(sys, 'stdout', stream())
    assert list(progress.track(items)) == list(items)


def test_a_file_gets_a_line_now_and_then(progress, monkeypatch, capsys):
    seconds = iter([0, 1, 9.9, 10, 10, 12, 19.9, 20.5, 20.5])  # the clock, which is read again after a line
    monkeypatch.setattr(progress.time, 'monotonic', lambda: next(seconds))
    list(progress.track(range(6)))
    assert capsys.readouterr().out == '3 of 6\n6 of 6\n'


def test_a_terminal_gets_a_bar(progress, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', Terminal())
    list(progress.track(range(3)))
    assert '3/3' in sys.stdout.getvalue()


def test_the_time_left_is_that_of_the_work_of_this_call(progress, monkeypatch):
    seconds = iter([100.0, 100.0, 160.0, 280.0])
    monkeypatch.setattr(progress.time, 'monotonic', lambda: next(seconds))
    left = progress.TimeLeft(total=50, done=10)
    assert left.line(10) == '20 percent done after 0 minutes, time left not known yet'
    assert left.line(15) == '30 percent done after 1 minutes, about 7 minutes left'  # 5 a minute, 35 are left
    assert left.line(40) == '80 percent done after 3 minutes, about 1 minutes left'
