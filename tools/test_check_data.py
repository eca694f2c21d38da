"""The data checker names what is wrong, as it finds it."""

import csv
import os
import shutil
import signal

import pytest

import train
from conftest import micro_set
from support import demo
from support.datasets import SPLITS
from support.test_datasets import benchmark
from tools import check_data


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(name):
    with open(f"problems-{name}.csv", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_videos_that_are_short_are_no_failure(micro, here, capsys):
    options = ["--data", "folder", "--root", micro, "--frames", "8", "--sampling", "dense"]
    assert check_data.main(options) == 0
    out = capsys.readouterr().out
    assert "16 training and 8 validation videos, 8 classes" in out
    assert "samples/s per worker" in out and "24 read; problems-folder.csv: 24 x short" in out
    assert len(problems("folder")) == 25
    assert all(row[0] == "short" and row[2] == "16 frames" for row in problems("folder")[1:])


def test_an_unreadable_video_and_an_empty_class_are_named(here, capsys):
    micro_set("set")
    shutil.rmtree("set/val/up_vertical")
    old = os.path.join("set/train/up_vertical", os.listdir("set/train/up_vertical")[0])
    bad = os.fsdecode(b"set/train/up_vertical/caf\xe9.mp4")
    os.rename(old, bad)
    open(bad, "w").close()
    assert check_data.main(["--data", "folder", "--root", "set"]) == 1
    said = "23 read; problems-folder.csv: 1 x no val video, 1 x unreadable"
    assert said in capsys.readouterr().out
    assert problems("folder")[1] == ["no val video", "up_vertical", ""]
    assert problems("folder")[2][:2] == ["unreadable", bad] and len(problems("folder")) == 3


def test_missing_videos_are_named_and_the_others_read(micro, here, capsys):
    folder = os.path.join(micro, "train", "up_vertical")
    video = os.path.join(folder, os.listdir(folder)[0])
    os.mkdir("lists")
    for split in SPLITS:
        with open(f"lists/{split}.txt", "w") as file:
            file.write(f"{video} 0\nnone.mp4 1\n")
    assert check_data.main(["--data", "list", "--root", "lists", "--limit", "5"]) == 1
    out = capsys.readouterr().out
    assert "1 read; problems-list.csv: 2 x missing, 1 x no train video, 1 x no val video" in out


def test_a_benchmark_that_is_whole_has_no_problems(here):
    benchmark("k400", here / "k400")
    assert check_data.main(["--data", "k400", "--root", "k400"]) == 0
    assert problems("k400") == [["problem", "video or class", "details"]]
    benchmark("diving48", here / "diving48")  # whose corrected labels do not use all of its names
    assert check_data.main(["--data", "diving48", "--root", "diving48"]) == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (["--root", "/no/where"], "/no/where is not there"),
        (["--data", "k400", "--root", "."], "train.csv is not there, nor"),
    ],
)
def test_mistakes_get_a_sentence(options, words, here):
    with pytest.raises(SystemExit, match=words):
        check_data.main(["--data", "folder", *options])


def killed(*job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_check_that_is_killed_says_so_and_keeps_what_it_found(here, monkeypatch):
    micro_set("set")
    shutil.rmtree("set/val/up_vertical")
    monkeypatch.setattr(check_data, "try_video", killed)
    with pytest.raises(SystemExit, match="check_data.py: .*terminated"):
        check_data.main(["--data", "folder", "--root", "set"])
    assert problems("folder")[1:] == [["no val video", "up_vertical", ""]]
    monkeypatch.setattr(demo, "draw_file", killed)
    with pytest.raises(SystemExit, match="terminated"):
        train.main(["--root", "drawn", "--out", "run"])
    assert not os.path.exists("drawn/train")
