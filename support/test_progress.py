"""Work that is spread over processes."""

import time
from functools import partial

import pytest

from support.processes import in_parallel


def double(folder, number):
    (folder / str(number)).touch()
    time.sleep(0.01)
    return 2 * number


def test_answers_come_in_order(tmp_path):
    work = partial(double, tmp_path)
    assert list(in_parallel(work, range(10), "doubling", workers=2)) == list(range(0, 20, 2))


def test_what_has_not_begun_is_called_off_when_the_caller_fails(tmp_path):
    def fail_at_once():
        for _ in in_parallel(partial(double, tmp_path), range(200), "doubling", workers=1):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail_at_once()
    assert len(list(tmp_path.iterdir())) < 50


def fail_first(folder, number):
    if number == 0:
        raise OSError("the disk is full")
    time.sleep(0.2)
    (folder / str(number)).touch()


def test_nothing_is_still_being_written_when_a_failure_arrives(tmp_path):
    with pytest.raises(OSError, match="full"):
        list(in_parallel(partial(fail_first, tmp_path), range(8), "writing", workers=2))
    there = len(list(tmp_path.iterdir()))
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == there
