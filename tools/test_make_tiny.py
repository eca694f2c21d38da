"""The demo's image model can be made again, on a miniature of its data."""

import os

import numpy as np
import open_clip
import pytest
import torch

from model import load_checkpoint
from support.demo import TEXTURES, Scene
from support.test_demo import centre
from tools import make_tiny


def test_the_tiny_image_model_can_be_made(tmp_path):
    out, stills, run = (str(tmp_path / name) for name in ("out", "stills", "run"))
    before = open_clip.create_model(f"local-dir:{make_tiny.TINY}").visual.state_dict()
    make_tiny.make(out, (128, 41), 1, stills, run)
    visual = open_clip.create_model(f"local-dir:{out}").visual
    trained = load_checkpoint(f"{run}/last.pt")[0].visual
    made = visual.state_dict()
    assert all(torch.equal(v, made[k]) for k, v in trained.state_dict().items())
    assert not torch.equal(before["conv1.weight"], trained.conv1.weight)
    assert tuple(visual.image_mean) == (0.5, 0.5, 0.5)
    assert os.path.getsize(f"{out}/open_clip_model.safetensors") < 6e6


def test_asking_for_help_makes_nothing(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(make_tiny, "make", made.append)
    with pytest.raises(SystemExit):
        make_tiny.main(["--help"])
    assert "where to write" in capsys.readouterr().out and made == []
    make_tiny.main([])
    make_tiny.main(["--folder", "elsewhere"])
    assert made == [make_tiny.TINY, "elsewhere"]


def test_stills_show_their_class():
    for cell in range(16):
        for texture in TEXTURES:
            background = Scene(np.random.default_rng([2, cell])).background
            still = make_tiny.draw_still([2, cell], texture, cell)
            assert still.shape == (1, 64, 64, 3)
            y, x = centre(still[0], background)
            if cell in (5, 6, 9, 10):  # not cut off by the border
                assert abs(y - cell // 4 * 16 - 8) <= 9 and abs(x - cell % 4 * 16 - 8) <= 9
                patch = still[0].mean(-1)[int(y) - 4 : int(y) + 4, int(x) - 4 : int(x) + 4]
                down, across = (abs(np.diff(patch, axis=axis)).max() for axis in (0, 1))
                assert (down > 40 > across) if texture == "horizontal" else (across > 40 > down)


def test_sheets_show_their_class():
    for cell in range(9):
        background = Scene(np.random.default_rng([1, cell])).background[::4, ::4]
        sheet = make_tiny.draw_still([1, cell], "sheet", cell)[0]
        for row in range(0, 64, 16):
            for col in range(0, 64, 16):
                y, x = centre(sheet[row : row + 16, col : col + 16], background)
                assert abs(y - 2 - cell // 3 * 4 - 2) <= 4 and abs(x - 2 - cell % 3 * 4 - 2) <= 4
