"""Pictures show what they say: attention, classes, curves."""

import inspect
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import adapters
import evaluate
import train
from adapters import METHODS
from conftest import SMALL, TINY, lines, random_video, randomise, vit_folder
from data import VideoViews, Views
from grid import frameset
from model import build_model, load_checkpoint
from support.datasets import find_videos
from support.processes import UserError
from tools import figures, look

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


def shown(stripe):
    """The images of a stripe, and the texts on each."""
    texts = [[text.get_text() for text in axes.texts] for axes in stripe.axes]
    return list(zip([axes.images[0].get_array() for axes in stripe.axes], texts))


def bars_of(stripe):
    axes = stripe.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    return names, [bar.get_width() for bar in axes.patches]


@pytest.fixture(scope="module")
def run(micro, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("look") / "run")
    train.main(SMALL + ["--root", micro, "--out", folder])
    return folder


# ---------------------------------------------------------------- attention
def test_attention_is_that_of_the_last_blocks_class_tokens():
    model = randomise(build_model(**TINY)).eval()
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
    assert torch.equal(model(video), model(video))
    assert not block.attn._forward_hooks and not block.attn._forward_pre_hooks


@pytest.mark.parametrize(
    "options",
    [
        {"paths": "spatial"},
        {"paths": "temporal"},
        *[{"method": method} for method in METHODS if method != "dualpath"],
    ],
)
def test_attention_of_every_method(options):
    method = METHODS[options.get("method", "dualpath")]
    if "attend(" in inspect.getsource(method.forward):
        pytest.skip("adapters.attend keeps no attention weights")
    model = build_model(**TINY | options).eval()
    frames, framesets = look.attention(model, random_video(1))
    temporal = options.get("paths") == "temporal"
    assert frames.shape == (0 if temporal else 4, 8, 8)
    assert framesets.shape == (1 if temporal else 0, 8, 8)
    for shares in (frames, framesets):
        torch.testing.assert_close(shares.sum((1, 2)), torch.ones(len(shares)))
        assert (shares > 0).all()


def test_attention_that_nn_multihead_attention_does_not_compute_is_a_sentence(monkeypatch):
    monkeypatch.setattr(adapters.LinearBlock, "forward", lambda self, block, x: x)
    model = build_model(**TINY | {"method": "linear"})
    with pytest.raises(UserError, match="linear computes attention without weights: no picture"):
        look.attention(model, random_video(1))


def test_attention_that_keeps_its_weights_is_a_sentence(tmp_path):
    folder = vit_folder(tmp_path / "custom", block_type="custom", scale_attn=True)
    model = build_model(**TINY | {"backbone": folder, "pretrained": None}).eval()
    with pytest.raises(UserError, match="custom.*cannot return its weights"):
        look.attention(model, random_video(1, size=32))
    with pytest.raises(UserError, match="on meta cannot return its weights"):
        look.attention(build_model(**TINY), random_video(1).to("meta"))


def test_where_a_model_looks_in_a_clip(run, micro, tmp_path, drawn, capsys):
    sample, picture = find_videos("folder", micro).val[0], str(tmp_path / "look.png")
    checkpoint = f"{run}/last.pt"
    look.main(["attention", checkpoint, sample[0], picture, "--views", "3x3"])
    assert len(drawn) == 2  # the one before the work says whether it can be written
    assert f"wrote {picture}" in capsys.readouterr().out
    above, below, bars = drawn[1].subfigs
    view = VideoViews([sample], 16, 64, views=(3, 3))[0].pixels[4]
    spatial, temporal = look.attention(load_checkpoint(checkpoint)[0], view[None])
    for i, (image, texts) in enumerate(shown(above)):
        assert np.array_equal(image.transpose(2, 0, 1), view[4 * i]) and texts == [str(4 * i)]
        heat = above.axes[i].images[1].get_array()
        np.testing.assert_allclose(heat, spatial[i] / spatial.max(), rtol=1e-4)
    ((image, texts),) = shown(below)
    assert np.array_equal(image.transpose(2, 0, 1), frameset(view[None])[0, 0])
    heat = below.axes[0].images[1].get_array()
    np.testing.assert_allclose(heat, temporal[0] / temporal.max(), rtol=1e-4)
    # Of 8 x 8 patches each lies in one little frame.
    shares = temporal[0].unflatten(0, (4, 2)).unflatten(2, (4, 2)).sum((1, 3)).flatten()
    assert texts == [f"{i}: {100 * share:.0f} %" for i, share in enumerate(shares)]
    assert Image.open(picture).size[0] == 1000
    assert evaluate.main([checkpoint, sample[0], "--views", "3x3"]) == 0
    printed, (names, widths) = capsys.readouterr().out, bars_of(bars)
    assert len(names) == 5
    assert all(f"{100 * w:.1f} %  {name}" in printed for name, w in zip(names, widths))


def test_the_middle_view_is_drawn_with_the_numbers_of_its_clip(tmp_path, monkeypatch):
    """Of 3 clips x 2 crops the fourth view: the first crop of the second clip is the third."""
    folder = vit_folder(tmp_path / "vit", image_size=48)
    model = build_model(**TINY | {"backbone": folder, "pretrained": None}).eval()
    views = random_video(6, 16, 48)
    given = []

    class Given(VideoViews):
        def __getitem__(self, index):
            return Views(0, -1, views, list(range(48)), None)

    settings = {"classes": [str(i) for i in range(8)], "sampling": "dense", "test_stride": 1}
    content = {"run": settings | {"views": (3, 2)}}
    monkeypatch.setattr(look, "VideoViews", Given)
    monkeypatch.setattr(look, "load_checkpoint", lambda *args: (model, content))
    monkeypatch.setattr(look, "attention_stripes", lambda *args: given.append(args) or [])
    args = look.parse(["attention", "a.pt", "a.mp4", str(tmp_path / "a.png")])
    look.draw_attention(args)
    _, view, numbers = given[0]
    assert torch.equal(view, views[3]) and numbers == list(range(16, 32))


def test_a_little_frames_share_counts_the_parts_of_its_patches():
    """A grid of 6 x 6 patches does not divide by 4: the second is half in the first frame."""
    sets = torch.rand(2, 6, 6)
    pixels = sets.repeat_interleave(8, 1).repeat_interleave(8, 2) / 64
    want = []
    for i in range(32):
        top, left = i % 16 // 4 * 12, i % 4 * 12
        want.append(pixels[i // 16, top : top + 12, left : left + 12].sum())
    torch.testing.assert_close(look.shares_of_moments(sets, 4, 4), torch.stack(want))


def test_the_shares_of_all_framesets_add_up_to_one():
    model = build_model(**TINY | {"paths": "temporal", "num_frames": 32}).eval()
    [(*_, texts, _, _, _)] = look.attention_stripes(model, random_video(1, 32)[0], list(range(32)))
    shares = [int(re.search(r": (\d+) %", text)[1]) for text in texts]
    assert len(shares) == 32 and abs(sum(shares) - 100) <= 16  # each is rounded


# ---------------------------------------------------------------- classes
def test_classes_are_drawn_by_accuracy_and_confusion(tmp_path, drawn):
    labels = ["x"] * 4 + ["$y"] * 4 + ["z"] * 2
    guesses = ["x", "x", "x", "$y"] + ["$y", "z", "z", "x"] + ["", ""]
    picture = str(tmp_path / "a.png")
    figures.draw(picture, "title", *look.class_stripes(list(zip(labels, guesses))))
    above, below = drawn[0].subfigs
    assert bars_of(above) == (["z (2)", "$y (4)", "x (4)"], [0, 0.25, 0.75])
    names = ["$y → z (2 of 4)", "x → $y (1 of 4)", "$y → x (1 of 4)"]
    assert bars_of(below) == (names, [0.5, 0.25, 0.25])
    assert "75.0 %" in [text.get_text() for text in above.axes[0].texts]
    assert drawn[0].get_suptitle() == "title"
    figures.draw(picture, "all right", *look.class_stripes([("x", "x"), ("y", "y")]))
    assert bars_of(drawn[1].subfigs[1]) == ([], [])  # nothing is confused


def test_many_long_names_are_cut_each(tmp_path, drawn):
    long = " with a very long name, as of Something-Something, which has to be cut somewhere"
    rows = [(f"class {i}{long}", f"class 0{long}") for i in range(400)]
    figures.draw(str(tmp_path / "a.png"), "many", *look.class_stripes(rows))
    above, below = [bars_of(stripe)[0] for stripe in drawn[0].subfigs]
    assert len(above) == len(below) == 20
    text = below[0]
    assert text.startswith("class 1 with") and "… → class 0 with" in text
    assert text.endswith("… (1 of 1)")


def test_names_that_no_font_has_are_drawn(tmp_path, drawn):
    rows = [(os.fsdecode(b"\xe9t\xe9"), "x")]
    title = os.fsdecode(b"caf\xe9")
    figures.draw(str(tmp_path / "a.png"), title, *look.class_stripes(rows))
    assert drawn[0].get_suptitle() == "caf?"
    assert bars_of(drawn[0].subfigs[0])[0] == ["?t? (1)"]


def test_classes_of_a_checkpoint_on_its_data(run, tmp_path, drawn, capsys):
    picture = str(tmp_path / "classes.png")
    table = str(tmp_path / "table.csv")
    look.main(["classes", f"{run}/last.pt", picture, "--workers", "0", "--predictions", table])
    top1 = f"top-1 {100 * lines(run)[-1]['val_top1']:.2f} %"
    assert top1 in drawn[-1].get_suptitle() and top1 in capsys.readouterr().out
    assert len(bars_of(drawn[-1].subfigs[0])[0]) == 8
    with open(table) as file:
        assert len(file.readlines()) == 1 + 8
    assert Image.open(picture).size[0] == 1000


def test_of_several_processes_the_first_draws(run, tmp_path, drawn, monkeypatch, capsys):
    """The others take part in the evaluation alone."""
    calls, picture = [], str(tmp_path / "a.png")
    monkeypatch.setattr(evaluate, "main", calls.append)
    monkeypatch.setenv("RANK", "1")
    look.main(["classes", f"{run}/last.pt", picture, "--limit", "8"])
    look.main(["curves", run, picture])
    look.main(["attention", f"{run}/last.pt", "a.mp4", picture])
    assert len(calls) == 1 and calls[0][0] == f"{run}/last.pt" and calls[0][3:] == ["--limit", "8"]
    assert drawn == [] and not os.path.exists(picture) and capsys.readouterr().out == ""


# ---------------------------------------------------------------- curves, and mistakes
def test_curves_of_a_run(run, tmp_path, drawn):
    look.main(["curves", run, str(tmp_path / "curves.png")])
    log, keys = lines(run), ("train_loss", "lr", "val_top1")
    for axes, key in zip(drawn[0].subfigs[0].axes, keys, strict=True):
        (line,) = axes.lines
        want = [[row["epoch"], row[key]] for row in log]
        assert axes.get_title() == key and line.get_xydata().tolist() == want
    assert Image.open(tmp_path / "curves.png").size[0] == 1000


@pytest.mark.parametrize("picture", ["a.xyz", "absent/a.png"])
@pytest.mark.parametrize("kind", ["attention", "classes"])
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(
    kind, picture, run, micro, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "predict", None)
    video = [find_videos("folder", micro).val[0][0]] if kind == "attention" else []
    with pytest.raises(SystemExit, match=f"look.py: cannot write .*{picture}"):
        look.main([kind, f"{run}/last.pt", *video, str(tmp_path / picture)])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["attention", "absent.pt", "a.mp4", "a.png"], "there is no checkpoint absent.pt"),
        (["curves", "absent", "a.png"], "there is no log absent/log.jsonl"),
    ],
)
def test_mistakes_get_a_sentence(argv, words):
    with pytest.raises(SystemExit, match=f"look.py: {words}"):
        look.main(argv)


def test_a_file_that_is_no_video_and_a_run_without_an_epoch_get_a_sentence(run, tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(SystemExit, match="look.py: .*log.jsonl has no epoch yet"):
        look.main(["curves", str(tmp_path), "a.png"])
    with pytest.raises(SystemExit, match="look.py: cannot read .*test_look.py"):
        look.main(["attention", f"{run}/last.pt", __file__, "a.png"])


@pytest.mark.parametrize(
    "argv", [["attention", "a.pt", "a.mp4", "b.mp4", "a.png"], ["curves", "a", "a.png", "--limit"]]
)
def test_what_is_too_much_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        look.main(argv)
    assert f"unknown: {argv[-1]}" in capsys.readouterr().err


def test_a_mistake_leaves_the_picture_that_is_there(run, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"kept")
    with pytest.raises(SystemExit, match="/no/where is not there"):
        look.main(["classes", f"{run}/last.pt", str(picture), "--root", "/no/where"])
    assert picture.read_bytes() == b"kept"


@pytest.mark.parametrize(
    "argv", [["curves", "a", "b"], ["classes", "a.pt", "--limit", "8", "a.png"]]
)
def test_what_is_no_name_of_a_picture_is_refused(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        look.main(argv)
    assert "is no name of a picture, such as a.png" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_without_matplotlib_a_sentence_says_what_installs_it(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = "python -m tools.look needs matplotlib: pip install -r tools/requirements.txt"
    with pytest.raises(SystemExit, match=words):
        look.main(["curves", run, str(tmp_path / "a.png")])
    assert os.listdir(tmp_path) == []
