"""The stills on which the demo's image model was pretrained."""

import numpy as np

import train
from support.demo import TEXTURES, Scene
from support.test_demo import centre
from tools import make_tiny


def test_stills_show_their_class():
    assert train.parse(make_tiny.OPTIONS).method == "full"
    assert make_tiny.draw_still(0, "sheet", 0).shape == (1, 64, 64, 3)
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
