"""The page walkthrough.md runs from top to bottom, and prints what it says."""

import contextlib
import io
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import HERE

PAGE = os.path.join(HERE, "docs", "walkthrough.md")
DRAWN = "position_code.png"
PICTURE = os.path.join(HERE, "assets", DRAWN)


def steps(page):
    """(code, what the page says that it prints, "" where it says nothing) for each python block."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S)
    found = []
    for kind, text in blocks:
        if kind == "python":
            found.append((text, ""))
        elif kind == "text":
            code, said = found.pop()
            assert said == "", f"two texts follow this code:\n{code}"
            found.append((code, text))
    return found


def run(page):
    """What each python block prints, beside what the page says, and the variables at the end."""
    variables, printed, said = {}, [], []
    for code, text in steps(page):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "walkthrough.md", "exec"), variables)
        printed.append(out.getvalue())
        said.append(text)
    return printed, said, variables


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    with open(PAGE, encoding="utf-8") as file, pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("walkthrough")
        patch.chdir(folder)
        return folder, *run(file.read())


def test_every_block_prints_what_the_page_says(walked):
    _, printed, said, _ = walked
    assert printed == said
    assert len(printed) > 15 and sum(map(bool, said)) > 12


def test_the_page_ends_in_the_features_of_both_paths_and_the_logits(walked):
    *_, variables = walked
    y_sp, y_tp, logits = (variables[name] for name in ("y_sp", "y_tp", "logits"))
    assert y_sp.shape == y_tp.shape == (1, 128) and logits.shape == (1, 8)
    with torch.no_grad():
        torch.testing.assert_close(variables["net"](variables["clip"]), logits)
        for one, other in zip(variables["net"].features(variables["clip"]), (y_sp, y_tp)):
            torch.testing.assert_close(one, other)


def test_the_picture_of_the_position_code_is_the_one_that_the_page_draws(walked):
    folder, *_ = walked
    drawn, kept = (np.asarray(Image.open(path), int) for path in (folder / DRAWN, PICTURE))
    assert drawn.shape == kept.shape and abs(drawn - kept).max() <= 1
    assert os.path.getsize(PICTURE) < 60_000


def test_a_wrong_text_would_be_seen():
    """The first test can fail."""
    page = "```python\nx = 3\n```\nand\n```python\nprint(x)\n```\n\n```text\n4\n```\n"
    printed, said, _ = run(page)
    assert printed == ["", "3\n"] and said == ["", "4\n"]
