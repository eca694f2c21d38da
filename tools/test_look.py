"""Pictures show what they say: what the paths see, attention, classes, curves."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import evaluate
import train
from adapters import METHODS
from conftest import SMALL, lines, random_video, randomise, tiny, vit_folder
from data import VideoViews
from grid import frameset
from model import load_checkpoint
from support.datasets import find_videos
from support.processes import UserError
from tools import look

matplotlib_figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def drawn(monkeypatch):
    """The pictures that are written, as matplotlib's figures."""
    pictures, write = [], matplotlib_figure.Figure.savefig

    def recorded(figure, path):
        pictures.append(figure)
        write(figure, path)

    monkeypatch.setattr(matplotlib_figure.Figure, "savefig", recorded)
    return pictures


def shown(part):
    """The images in a part of a picture (n, H, W, 3), their heats, and their captions."""
    used = [axes for axes in part.axes if axes.images]
    images = np.stack([axes.images[0].get_array() for axes in used])
    heats = [axes.images[1].get_array() for axes in used if len(axes.images) > 1]
    return images, heats, [axes.get_title() for axes in used]


def bars_of(axes):
    names = [label.get_text() for label in axes.get_yticklabels()]
    return names, [bar.get_width() for bar in axes.patches]


@pytest.fixture(scope="module")
def run(micro, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("look") / "run")
    train.main(SMALL + ["--root", micro, "--out", folder])
    return folder


def test_framesets_shows_what_the_model_samples(micro, tmp_path, drawn):
    video, picture = find_videos("folder", micro).val[0][0], str(tmp_path / "a.png")
    look.main(["framesets", video, picture])
    view = VideoViews([(video, -1)], 32, 224, "uniform")[0]  # of 16 frames
    above, below = drawn[0].subfigs
    images, _, captions = shown(above)
    assert np.array_equal(images, view.pixels[0, ::4].permute(0, 2, 3, 1))
    assert captions == [f"spatial path: frame {i}" for i in view.numbers[::4]]
    images, _, captions = shown(below)
    assert np.array_equal(images, frameset(view.pixels)[0].permute(0, 2, 3, 1))
    assert captions[1].split()[3:] == [str(i) for i in view.numbers[16:]]
    assert Image.open(picture).size[0] == 1000


# ---------------------------------------------------------------- attention
def test_attention_is_that_of_the_last_blocks_class_tokens():
    model = randomise(tiny()).eval()
    video, inputs = random_video(1), []
    hook = model.blocks[-1].register_forward_pre_hook(lambda _, args: inputs.append(args))
    frames, framesets = look.attention(model, video)
    hook.remove()
    assert frames.shape == (4, 8, 8) and framesets.shape == (1, 8, 8)
    block, *tokens = inputs[0]
    heads = block.attn.num_heads
    for got, x in zip((frames, framesets), tokens):
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        scores = torch.einsum("nhd,nlhd->nhl", q[:, 0], k) / q.shape[-1] ** 0.5
        weights = scores.softmax(-1).mean(1)[:, 1:]  # of the patches
        want = weights / weights.sum(1, keepdim=True)
        torch.testing.assert_close(got.flatten(1), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [*METHODS, "spatial", "temporal"])
def test_attention_of_every_method(method):
    options = {"method": method} if method in METHODS else {"paths": method}
    frames, framesets = look.attention(tiny(**options), random_video(1))
    assert len(frames) == (0 if method == "temporal" else 4)
    assert len(framesets) == (1 if method in ("temporal", "dualpath") else 0)
    for shares in (frames, framesets):
        torch.testing.assert_close(shares.sum((1, 2)), torch.ones(len(shares)))


def test_attention_that_keeps_its_weights_is_a_sentence(tmp_path):
    folder = vit_folder(tmp_path / "custom", block_type="custom", scale_attn=True)
    with pytest.raises(UserError, match="custom.*cannot return its weights"):
        look.attention(tiny(backbone=folder, pretrained=None), random_video(1, size=32))


def test_where_a_model_looks_in_a_clip(run, micro, tmp_path, drawn, capsys):
    sample, picture = find_videos("folder", micro).val[0], str(tmp_path / "look.png")
    checkpoint = f"{run}/last.pt"
    look.main(["attention", checkpoint, sample[0], picture])
    assert f"wrote {picture}" in capsys.readouterr().out
    above, below = drawn[0].subfigs
    view = VideoViews([sample], 16, 64)[0].pixels
    spatial, temporal = look.attention(load_checkpoint(checkpoint)[0], view)
    images, heats, _ = shown(above)
    assert np.array_equal(images, view[0, ::4].permute(0, 2, 3, 1))
    np.testing.assert_allclose(np.stack(heats), spatial / spatial.max(), rtol=1e-4)
    _, heats, captions = shown(below)
    np.testing.assert_allclose(heats[0], temporal[0] / temporal.max(), rtol=1e-4)
    assert captions[0].split()[3:] == [str(i) for i in range(16)]
    evaluate.main([checkpoint, sample[0], "--views", "1x1", "--amp", "off"])
    printed = re.findall(r"(\d+\.\d %)  (.*)", capsys.readouterr().out)
    likeliest = ", ".join(f"{name} {score}" for score, name in printed)
    assert len(printed) == 5 and drawn[0].get_suptitle().endswith(f"\n{likeliest}")


# ---------------------------------------------------------------- classes, curves, user errors
def test_classes_are_drawn_by_accuracy_and_confusion(tmp_path, drawn):
    labels, guesses = "xxxxyyyyzz", "xxxyyzzx  "  # the last two are unreadable
    rows = []
    for i, (label, guess) in enumerate(zip(labels, guesses)):
        found = ([], [], "unreadable") if guess == " " else (["xyz".index(guess)], [0.9], None)
        rows.append(evaluate.Prediction(i, "xyz".index(label), *found))
    path = str(tmp_path / "p.csv")
    evaluate.write_predictions(path, rows, [(f"{i}.mp4", 0) for i in range(10)], "xyz")
    look.main(["classes", path, str(tmp_path / "a.png")])
    above, below = drawn[0].axes
    assert bars_of(above) == (["z (2)", "y (4)", "x (4)"], [0, 0.25, 0.75])
    names = ["y → z (2 of 4)", "x → y (1 of 4)", "y → x (1 of 4)"]
    assert bars_of(below) == (names, [0.5, 0.25, 0.25])
    assert above.get_position().x0 == below.get_position().x0  # one zero line
    assert drawn[0].get_suptitle().startswith("top-1 40.00 %")


def test_curves_of_a_run(run, tmp_path, drawn):
    look.main(["curves", run, str(tmp_path / "curves.png")])
    log, keys = lines(run), ("train_loss", "lr", "val_top1")
    for axes, key in zip(drawn[0].axes, keys, strict=True):
        want = [[row["epoch"], row[key]] for row in log]
        assert axes.lines[0].get_xydata().tolist() == want
        assert axes.get_legend().get_texts()[0].get_text() == key
        assert all(tick == round(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("attention absent.pt a.mp4 a.png", "there is no checkpoint absent.pt"),
        ("curves absent a.png", "No such file .*absent/log.jsonl"),
        (f"framesets {__file__} a.png", "cannot read .*test_look.py"),
        ("curves RUN no/where/a.png", "No such file .*no/where/a.png"),
        ("curves RUN a.png", "matplotlib.figure .*: pip install -r tools/req"),
    ],
)
def test_user_errors_get_a_sentence(words, sentence, run, tmp_path, monkeypatch):
    if "matplotlib" in sentence:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=f"look.py: .*{sentence}"):
        look.main(words.replace("RUN", run).split())
