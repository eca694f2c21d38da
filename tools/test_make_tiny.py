"""The demo's image model can be made again, on a miniature of its data."""

import os
import shutil

import numpy as np
import open_clip
import torch

from model import load_checkpoint
from support.demo import TEXTURES, Scene
from support.test_demo import centre
from tools import make_tiny


def test_the_tiny_image_model_can_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(make_tiny.TINY, "tiny")
    before = open_clip.create_model("local-dir:tiny").visual.state_dict()
    make_tiny.make("tiny", (128, 41), 1)
    visual = open_clip.create_model("local-dir:tiny").visual
    trained = load_checkpoint("runs/stills/last.pt")[0].visual
    made = visual.state_dict()
    assert all(torch.equal(v, made[k]) for k, v in trained.state_dict().items())
    assert not torch.equal(before["conv1.weight"], trained.conv1.weight)
    assert tuple(visual.image_mean) == (0.5, 0.5, 0.5)
    assert os.path.getsize("tiny/open_clip_model.safetensors") < 6e6


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
