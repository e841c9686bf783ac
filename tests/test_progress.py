"""Progress: lines in a file are few, and every item comes once, in order."""

import io
import re
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


@pytest.fixture
def clock(progress, monkeypatch):
    """Makes the clock, read once at the start and once for each item, show the seconds given."""

    def clock(*seconds):
        monkeypatch.setattr(progress.time, 'monotonic', iter(seconds).__next__)

    return clock


def test_a_file_gets_a_line_now_and_then(progress, clock, capsys):
    clock(0, 1, 9.9, 10, 12, 19.9, 20.5)
    list(progress.track(range(6)))
    assert capsys.readouterr().out == '50% done after 10 s, about 10 s left (3 of 6)\n100% done after 20 s (6 of 6)\n'


def test_a_terminal_gets_a_bar(progress, clock, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', Terminal())
    monkeypatch.setenv('COLUMNS', '60')
    clock(0, 300, 300.05, 400)
    list(progress.track(range(3)))
    start, *states, end = re.split('[\r\n]', sys.stdout.getvalue())
    assert (start, end) == ('', '')
    assert [state.rstrip() for state in states] == [
        '[######              ] 33% done after 5 min, about 10 min left'[:59],  # a longer line would wrap
        '[####################] 100% done after 7 min (3 of 3)',
    ]
    assert {len(state) for state in states} == {59}  # each covers the one before


def test_the_time_left_is_that_of_the_work_of_this_call(progress, clock, capsys):
    clock(100, 101, 102, 160, 280, 100 + 5 * 3600, 200 + 5 * 3600)
    with progress.Progress(total=50, done=10) as shown:
        shown.show(10, 'too early')
        shown.show(10, 'beginning', at_once=True)
        shown.show(15)
        shown.show(40)
        shown.show(41)
        shown.show(42)  # a hundred seconds later, less than a hundredth of the time
    assert capsys.readouterr().out.splitlines() == [
        '20% done after 2 s (beginning)',
        '30% done after 60 s, about 7 min left',  # 5 a minute, 35 are left
        '80% done after 3 min, about 60 s left',
        '82% done after 5 h, about 87 min left',
    ]
