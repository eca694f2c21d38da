"""The comparison of readers reads what it says, and takes turns."""

import argparse
import json
import os
import sys

import numpy as np
import pytest
import torch

from conftest import numbered_frames, read_numbers
from support.demo import write_video
from tools import reading


@pytest.fixture
def video(tmp_path):
    path = str(tmp_path / "a.mp4")
    write_video(path, numbered_frames(100))
    return path


def test_the_reference_reads_the_frames_asked_for(video):
    assert read_numbers(reading.whole_file(video, [7, 3, 7, 99])) == [7, 3, 7, 99]
    assert np.array_equal(reading.whole_file(video, [5, 6]), reading.ours(video, [5, 6]))


@pytest.mark.parametrize(
    "count, numbers", [(100, [45, 49, 53]), (9, [0, 4, 8]), (8, list(range(8))), (1, [0])]
)
def test_the_middle_of_a_video_is_read_or_all_of_a_short_one(count, numbers):
    got = reading.wanted_frames(count, 3, 4)
    assert len(got) == len(numbers) and abs(got[0] - numbers[0]) <= 1
    assert np.diff(got).tolist() == np.diff(numbers).tolist()


def test_what_is_not_installed_is_said_and_the_others_are_compared(
    video, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "decord", None)  # importing it raises ImportError
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    path = str(tmp_path / "a.json")
    reading.main([video, "--frames", "4", "--rounds", "3", "--json", path])
    printed = capsys.readouterr().out
    for name in ("decord", "torchcodec"):
        assert f"{name} is not installed: pip install -r tools/requirements.txt" in printed
    with open(path) as file:
        rows = json.load(file)
    assert [row["reader"] for row in rows] == ["ours", "whole file"]
    for row in rows:
        assert row["largest difference"] == 0 and row["identical"] == "yes"
        assert row["frames"] == "4 of 100" and row["ms"] > 0
        assert f"{row['ms']:.5g}" in printed
    assert rows[0]["ours ÷ it"] == 1


def test_a_reader_that_fails_is_named_and_one_that_differs_is_seen(video, monkeypatch, capsys):
    def broken(path, numbers):
        raise RuntimeError("no libraries\nof FFmpeg")

    def brighter(path, numbers):
        return np.minimum(reading.ours(path, numbers), 250) + 3

    def cropped(path, numbers):
        return reading.ours(path, numbers)[:, 1:]

    readers = {"ours": reading.ours, "broken": broken, "brighter": brighter, "cropped": cropped}
    monkeypatch.setattr(reading, "READERS", readers)
    args = argparse.Namespace(frames=4, stride=4, rounds=1)
    rows = {row["reader"]: row for row in reading.compare(video, args)}
    assert capsys.readouterr().out == f"broken cannot read {video}: no libraries\n"
    assert list(rows) == ["ours", "brighter", "cropped"]
    assert (rows["brighter"]["largest difference"], rows["brighter"]["identical"]) == (3, "no")
    assert (rows["cropped"]["largest difference"], rows["cropped"]["identical"]) == ("size", "no")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux can say so")
def test_readers_share_one_core_and_then_have_all_again():
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with reading.on_one_core():
        assert len(os.sched_getaffinity(0)) == torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == cores and torch.get_num_threads() == threads


def test_what_breaks_off_is_a_sentence(video, tmp_path, capsys):
    with open(video, "rb") as file:
        content = file.read()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(SystemExit, match="^reading.py: .*broken.mp4"):
        reading.main([str(broken)])


def test_what_is_no_video_is_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="reading.py: cannot read .*absent.mp4"):
        reading.main([str(tmp_path / "absent.mp4")])
