"""The drawn videos ask for what the demo is about."""

import os
from functools import partial

import numpy as np
import pytest
import torch

import grid
from conftest import pixels
from support import demo
from support.demo import Scene, draw_data, draw_moving, write_video


def test_twins_show_the_same_sampled_frames_in_opposite_order():
    sampled = list(demo.SAMPLED)
    for seed in range(20):
        for motion, opposite in (("left", "right"), ("up", "down")):
            one = draw_moving([5, seed], motion, "vertical")[sampled]
            other = draw_moving([5, seed], opposite, "vertical")[sampled]
            assert np.array_equal(one, other[::-1]) and not np.array_equal(one, other)


def centre(image, background):
    """Where the thing is: row and column."""
    y, x = np.nonzero(abs(image.astype(float).mean(-1) - background.mean(-1)) > 20)
    return np.array([(y.min() + y.max()) / 2, (x.min() + x.max()) / 2])


def test_motion_covers_half_the_frame_in_the_direction_of_its_name():
    for motion, direction in demo.MOTIONS.items():
        for seed in range(10):
            background = Scene(np.random.default_rng(seed)).background
            clip = draw_moving(seed, motion, "vertical")
            # In frames 0 and 12 the thing is whole within the picture.
            path = centre(clip[12], background) - centre(clip[0], background)
            assert path @ direction * 15 / 12 >= demo.SIZE / 2 - 1
            assert abs(path @ direction[::-1]) < 1.5


def mean_within(difference, where):
    return (difference.abs() * where).sum() / where.sum()


def test_texture_is_seen_at_full_size_and_vanishes_in_the_frameset(tmp_path):
    path = str(tmp_path / "a.mp4")
    for seed in range(10):
        clips = []
        for texture in demo.TEXTURES:
            drawn = draw_moving([6, seed], "left", texture)
            write_video(path, drawn)
            decoded = torch.from_numpy(pixels(path, range(16)))
            clips.append(decoded.permute(0, 3, 1, 2).float())
        background = Scene(np.random.default_rng([6, seed])).background.mean(-1)
        thing = torch.from_numpy(abs(drawn.mean(-1) - background) > 5).float()
        thing = thing[:, None].expand(-1, 3, -1, -1)
        assert mean_within(clips[0] - clips[1], thing) >= 30
        small = [grid.frameset(clip[None]) for clip in clips]
        inside = (grid.frameset(thing[None]) > 0.5).float()
        assert mean_within(small[0] - small[1], inside) <= 4


def stop_midway(*args):
    raise RuntimeError("stopped midway")


def draw_beside(folder, *args):
    """As if another run had drawn the folder meanwhile."""
    os.makedirs(folder, exist_ok=True)
    return draw_moving(*args)


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_drawing_is_deterministic_and_whole_or_absent(tmp_path):
    for name in "ab":
        draw_data(str(tmp_path / name), (16, 8))
    files = files_under(tmp_path / "a")
    assert len(files) == 24
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    with pytest.raises(RuntimeError, match="stopped midway"):
        draw_data(str(tmp_path / "c"), (16, 8), draw=stop_midway)
    assert not os.path.exists(tmp_path / "c" / "train")
    draw_data(str(tmp_path / "c"), (16, 8))
    assert files_under(tmp_path / "c") == files
    draw_data(str(tmp_path / "d"), (1, 1), partial(draw_beside, str(tmp_path / "d" / "train")))
    assert os.listdir(tmp_path / "d" / "train") == [] and len(os.listdir(tmp_path / "d")) == 2
