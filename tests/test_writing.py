"""Files that are whole or absent, whatever ends the writing."""

import os

import pytest

from swinv2_mm.writing import whole


def test_a_file_has_its_name_once_it_is_written(tmp_path):
    path = tmp_path / 'new/x.png'
    with whole(path) as partial:
        partial.write_text('new')
        assert partial.parent == path.parent and partial.suffix == '.png' and not path.exists()
    assert path.read_text() == 'new' and os.listdir(path.parent) == ['x.png']


@pytest.mark.parametrize('error', [ValueError('wrong'), KeyboardInterrupt(), OSError(28, 'No space left on device')])
def test_what_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / 'x.json'
    path.write_text('old')
    with pytest.raises(type(error)) as raised, whole(path) as partial:
        partial.write_text('half')
        raise error
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['x.json']
    if isinstance(error, OSError):
        assert raised.value.filename == str(path) and raised.value.strerror == 'No space left on device'


def test_two_that_are_written_at_once_do_not_meet(tmp_path):
    with whole(tmp_path / 'x') as first, whole(tmp_path / 'x') as second:
        first.write_text('first')
        second.write_text('second')
    assert (tmp_path / 'x').read_text() == 'first'  # which is renamed last


def test_a_fixed_name_is_that_of_a_file_which_a_killed_process_left(tmp_path):
    (tmp_path / '.partial').write_text('what a killed process left, and longer')
    with whole(tmp_path / 'x', '.partial') as partial:
        assert partial == tmp_path / '.partial'
        partial.write_text('new')
    assert (tmp_path / 'x').read_text() == 'new' and os.listdir(tmp_path) == ['x']


def test_a_missing_folder_is_an_error_where_it_is_not_to_be_made(tmp_path):
    with pytest.raises(FileNotFoundError), whole(tmp_path / 'no/x', make_folder=False) as partial:
        partial.write_text('new')
    assert os.listdir(tmp_path) == []


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: done.append(os.readlink(f'/proc/self/fd/{fd}')) or fsync(fd))
    monkeypatch.setattr(os, 'replace', lambda *paths: done.append('replace') or replace(*paths))
    with whole(tmp_path / 'x', '.partial', sync=True) as partial:
        partial.write_text('new')
    assert done == [str(tmp_path / '.partial'), 'replace', str(tmp_path)]
    with whole(tmp_path / 'y') as partial:
        partial.write_text('new')
    assert done[3:] == ['replace']
