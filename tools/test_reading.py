"""The benchmark of reading runs, and says where a reader differs."""

import re

import numpy as np
import pytest

from conftest import SHARED, needs_shared, video_of
from tools import reading


def test_readers_take_turns_on_the_same_frames(tmp_path, capsys, monkeypatch):
    def wrong(path, numbers):
        return np.zeros((32, 48, 64, 3), np.uint8)

    monkeypatch.setattr(reading, "READERS", [reading.ours, reading.whole_file, wrong])
    reading.main([video_of(tmp_path / "a.mp4", 150), "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.replace("|", " ").split() for line in lines if line.startswith("| ")]
    identical = {row[0]: row[1] for row in rows}
    assert identical["ours"] == identical["whole_file"] == "True" and identical["wrong"] == "False"
    assert [row[3] for row in rows if row[:1] == ["ours"]] == ["1"]


@needs_shared
def test_a_clip_of_kinetics_is_read_exactly(capsys):
    pytest.importorskip("decord")
    reading.main([f"{SHARED}/videos/k400_clip2.mp4", "--rounds", "1"])
    assert re.search(r"ours \| +True", capsys.readouterr().out)


def test_a_file_that_is_no_video_gets_a_sentence():
    with pytest.raises(SystemExit, match="reading.py: cannot read .*test_reading.py"):
        reading.main([__file__])
