"""grid.py's picture: the right frames in the right places, with their numbers."""

import numpy as np
import pytest
import torch
from PIL import Image

import grid
from conftest import (
    SHARED,
    decode_whole,
    needs_shared,
    pixels,
    video_of,
)
from support.demo import draw_moving, write_video


@pytest.fixture
def stripes(monkeypatch):
    """What grid.py draws: (images, their numbers, (rows, cols), the stripe made of them)."""
    stripes, original = [], grid.numbered

    def recorded(images, numbers, rows=1, cols=1):
        stripe = original(images, numbers, rows, cols)
        stripes.append((images, list(numbers), (rows, cols), stripe))
        return stripe

    monkeypatch.setattr(grid, "numbered", recorded)
    return stripes


def test_grid_as_a_script(tmp_path, capsys, stripes):
    clip, picture = str(tmp_path / "a:b$1$.mp4"), str(tmp_path / "grid.png")
    write_video(clip, draw_moving(1, "left", "vertical"))
    grid.main([clip, picture])
    assert "16 moments of" in capsys.readouterr().out
    frames = torch.from_numpy(np.stack(decode_whole(clip))).permute(0, 3, 1, 2)
    (above, numbers, cells, upper), (below, all_numbers, all_cells, lower) = stripes
    assert torch.equal(above, frames[::2]) and numbers == list(range(0, 16, 2)) and cells == (1, 1)
    assert torch.equal(below, grid.frameset(frames[None])[0])
    assert all_numbers == list(range(16)) and all_cells == (4, 4)
    drawn = torch.from_numpy(np.array(Image.open(picture).convert("RGB"))).permute(2, 0, 1)
    assert 1000 < drawn.shape[2] == upper.shape[2] < 1080
    assert torch.equal(drawn[:, : upper.shape[1]], upper)
    assert torch.equal(drawn[:, upper.shape[1] :, : lower.shape[2]], lower)
    assert len(drawn.flatten(1).unique(dim=1).T) > 100  # colours


def test_the_grids_picture_of_a_longer_video_is_of_32_moments(tmp_path, capsys, stripes):
    grid.main([video_of(tmp_path / "long.mp4", 40), str(tmp_path / "grid.png")])
    assert "32 moments of" in capsys.readouterr().out
    (above, numbers, _, _), (below, all_numbers, _, _) = stripes
    assert len(above) == 8 and numbers == [i * 4 * 40 // 32 for i in range(8)]
    assert len(below) == 2 and all_numbers == [i * 40 // 32 for i in range(32)]


@needs_shared
def test_the_grids_picture_is_upright_as_the_models_see_it(tmp_path, stripes):
    clip = f"{SHARED}/videos/rot90.mov"
    grid.main([clip, str(tmp_path / "a.png")])
    first = torch.from_numpy(pixels(clip, [0]))[0]
    images, numbers, _, _ = stripes[0]
    (H, W), side = first.shape[:2], images.shape[-1]
    assert H > W and W - 4 < side <= W and side == images.shape[-2]  # the middle of a tall frame
    top, left = (H - side) // 2, (W - side) // 2
    middle = first[top : top + side, left : left + side]
    assert numbers[0] == 0 and torch.equal(images[0], middle.permute(2, 0, 1))
