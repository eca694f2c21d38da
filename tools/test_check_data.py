"""The data checker names what is wrong, as it finds it."""

import os
import shutil

import pytest

from conftest import micro_set
from support.datasets import SPLITS
from support.test_datasets import benchmark
from tools import check_data


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """In an empty folder: runs the checker → (its exit status, the lines that it prints)."""
    monkeypatch.chdir(tmp_path)

    def run(data, root, *words):
        status = check_data.main(["--data", data, "--root", root, *words])
        return status, capsys.readouterr().out.splitlines()

    return run


def test_videos_that_are_short_are_no_failure(micro, check):
    status, out = check("folder", micro, "--frames", "8", "--sampling", "dense")
    assert status == 0 and out[1] == "16 training and 8 validation videos, 8 classes"
    short = [line for line in out if line.startswith("short: ") and line.endswith(": 16 frames")]
    assert len(short) == 24 and out[-2].endswith("samples/s per worker")
    assert out[-1] == "24 videos read; problems: 24 x short"


def test_an_unreadable_video_and_an_empty_class_are_named(check):
    micro_set("set")
    shutil.rmtree("set/val/up_vertical")
    old = os.path.join("set/train/up_vertical", os.listdir("set/train/up_vertical")[0])
    bad = os.fsdecode(b"set/train/up_vertical/caf\xe9.mp4")
    os.rename(old, bad)
    open(bad, "w").close()
    status, out = check("folder", "set")
    assert status == 1 and "no val video: up_vertical" in out
    assert any(line.startswith("unreadable: cannot read set/train/up_v") for line in out)
    assert out[-1] == "23 videos read; problems: 1 x no val video, 1 x unreadable"


def test_missing_videos_are_named_and_the_others_read(micro, check):
    folder = os.path.join(micro, "train", "up_vertical")
    os.mkdir("lists")
    for split in SPLITS:
        with open(f"lists/{split}.txt", "w") as file:
            file.write(f"{folder}/{os.listdir(folder)[0]} 0\nnone.mp4 1\n")
    status, out = check("list", "lists", "--limit", "5")
    assert status == 1 and "missing val video: lists/none.mp4" in out
    assert out[-1].startswith("1 videos read; problems: 1 x missing train video, 1 x missing val")


def test_a_benchmark_that_is_whole_has_no_problems(check, tmp_path):
    for name in ("ssv2", "diving48"):  # whose corrected labels do not use all of its names
        benchmark(name, tmp_path / name)
        status, out = check(name, name)
        assert status == 0 and out[-1].endswith("problems: none")


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("folder /no/where", "/no/where is not there"),
        ("k400 .", "there is no train list: looked for train.csv, "),
        ("folder . --frames 0", "'0' is not a whole number of at least 1"),
    ],
)
def test_user_errors_get_a_sentence(words, sentence, check, capsys):
    with pytest.raises(SystemExit) as error:
        check(*words.split())
    assert sentence in f"{error.value.code}{capsys.readouterr().err}"
