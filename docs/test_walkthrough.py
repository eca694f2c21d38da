"""The page walkthrough.md runs from top to bottom, and prints what it says."""

import contextlib
import io
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.utils import make_grid, save_image

from conftest import HERE

PAGE = os.path.join(HERE, "docs", "walkthrough.md")
PICTURE = os.path.join(HERE, "assets", "position_code.png")


def run(page):
    """What the python blocks print, what the page says that they print, and their variables."""
    variables, printed, said = {}, [], []
    for kind, text in re.findall(r"^```(python|text)\n(.*?)^```$", page, re.M | re.S):
        if kind == "text":
            said[-1] += text
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(text, "walkthrough.md", "exec"), variables)
        printed.append(out.getvalue())
        said.append("")
    return printed, said, variables


@pytest.fixture(scope="module")
def walked():
    with open(PAGE, encoding="utf-8") as file:
        return run(file.read())


def test_every_block_prints_what_the_page_says(walked):
    printed, said, _ = walked
    assert printed == said
    assert sum(map(bool, said)) >= 5


def test_the_page_ends_in_the_models_own_features(walked):
    variables = walked[-1]
    y_sp, y_tp, logits = (variables[name] for name in ("y_sp", "y_tp", "logits"))
    with torch.no_grad():
        torch.testing.assert_close(variables["net"](variables["clip"]), logits)
        for one, other in zip(variables["net"].features(variables["clip"]), (y_sp, y_tp)):
            torch.testing.assert_close(one, other)


def test_the_picture_shows_the_pages_position_code(walked, tmp_path):
    code = walked[-1]["code"][0]  # (P, d): the channels of y, those of x, those of t
    channels = code.T[[0, 42, 84, 88, 92]].view(5, 1, 8, 8)
    cells = interpolate(channels / 2 + 0.5, scale_factor=20)
    drawn = tmp_path / "position_code.png"
    save_image(make_grid(cells, nrow=5, padding=8, pad_value=1), drawn)
    drawn, kept = (np.asarray(Image.open(path), int) for path in (drawn, PICTURE))
    assert drawn.shape == kept.shape and abs(drawn - kept).max() <= 1


def test_a_wrong_text_would_be_seen():
    page = "```python\nx = 3\n```\nand\n```python\nprint(x)\n```\n\n```text\n4\n```\n"
    printed, said, _ = run(page)
    assert printed == ["", "3\n"] and said == ["", "4\n"]
