"""What training and evaluation do besides what the paper says."""

import inspect
import json
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import train
from conftest import (
    SMALL,
    TINY,
    lines,
    randomise,
    save,
    untimed,
)
from data import VideoViews
from model import build_model
from support.datasets import find_videos
from support.runs import read_checkpoint, saved_weights
from support.test_datasets import benchmark


@pytest.mark.parametrize("name", ["ssv2", "hmdb51"])
def test_a_run_uses_its_recipe(name, tmp_path, monkeypatch):
    seen = []

    def recorded(original):
        """Keeps the arguments that the class is called with."""

        def make(*args, **kwargs):
            bound = inspect.signature(original).bind(*args, **kwargs)
            bound.apply_defaults()
            seen.append(bound.arguments)
            return original(*args, **kwargs)

        return make

    for module, dataset in (
        (train, "TrainingClips"),
        (train, "VideoViews"),
        (evaluate, "VideoViews"),
    ):
        monkeypatch.setattr(module, dataset, recorded(getattr(data, dataset)))
    recipe, root, out = train.parse(["--data", name]), tmp_path / name, str(tmp_path / "out")
    benchmark(name, root)
    options = (
        "--backbone tiny --spatial-frames 4 --bottleneck 8 --batch 2 --workers 0 --epochs 1"
        " --test-stride 3 --seed 5 --crop-area 0.25"
    ).split()
    train.main(["--data", name, "--root", str(root), "--out", out, *options])
    evaluate.main([f"{out}/best.pt", "--workers", "0"])

    clips, validation, evaluation = seen
    for made in seen:
        want = (recipe.frames, 64, recipe.sampling)
        assert (made["num_frames"], made["size"], made["sampling"]) == want
    assert (clips["strides"], clips["augment"], clips["seed"]) == (recipe.stride, "rand", 5)
    assert clips["options"] == {
        "flip": recipe.flip,
        "erasing": recipe.erasing,
        "crop_area": 0.25,
    }
    assert (validation["stride"], validation["views"]) == (3, (1, 1))
    assert (evaluation["stride"], evaluation["views"]) == (3, recipe.views)


def test_micro_batches_give_the_same_step(micro, tmp_path):
    states = []
    for name, options in (("a", []), ("b", ["--micro-batch", "3"])):
        out = str(tmp_path / name)
        one_epoch = ["--dropout", "0", "--epochs", "1", "--clip-grad", "0.1"]
        train.main(SMALL + ["--root", micro, "--out", out, *one_epoch, *options])
        states.append(read_checkpoint(f"{out}/last.pt")["training"]["optimizer"]["state"])
    averages = [state["exp_avg"] for state in states[0].values()]
    assert torch.nn.utils.get_total_norm(averages) <= 0.1 * (1 - 0.9**2) + 1e-6  # of two steps
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-3, atol=1e-7)


def test_every_step_drops_others(micro, tmp_path, monkeypatch):
    seeds, cross_entropy = [], F.cross_entropy

    def recorded(*args, **kwargs):
        seeds.append(torch.initial_seed())
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", recorded)
    run = [*SMALL, "--root", micro, "--out", str(tmp_path / "run"), "--micro-batch", "8"]
    train.main(run)
    assert len(seeds) >= 4 and len(set(seeds)) == len(seeds)


def test_options_for_speed_change_no_result(micro, tmp_path, monkeypatch, capsys):
    compile_it = torch.compile

    def quickly(function):
        return compile_it(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", quickly)
    frames = torch._dynamo.utils.counters["frames"]
    logs = {}
    for option in ("--seed 0", "--checkpoint-activations", "--compile"):
        out = str(tmp_path / option.strip("-"))
        torch.compiler.reset()
        frames.clear()
        options = ["--micro-batch", "3", "--epochs", "1", *option.split()]
        train.main(SMALL + ["--root", micro, "--out", out, *options])
        assert (frames["ok"] > 1) == (option == "--compile")
        logs[option] = untimed(out)
    plain, checkpointed, compiled = logs.values()
    assert plain == checkpointed
    assert compiled[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=1e-4)

    capsys.readouterr()
    for option in ([], ["--compile"]):
        torch.compiler.reset()
        frames.clear()
        assert evaluate.main([f"{tmp_path}/compile/last.pt", "--workers", "0", *option]) == 0
        assert frames["ok"] == 2 * len(option)  # a block, and what tries the compiler
    first, second = (line for line in capsys.readouterr().out.splitlines() if "top-1" in line)
    assert first == second
    torch.compiler.reset()


def test_init_starts_from_another_runs_weights_with_a_new_head(micro, tmp_path):
    out, two = str(tmp_path / "run"), str(tmp_path / "two")
    model = randomise(build_model(**(TINY | {"num_classes": 3, "bottleneck": 8})))
    init = ["--root", micro, "--init", save(model, tmp_path / "a.pt")]
    train.main(SMALL + [*init, "--out", out, "--lr", "0", "--epochs", "1"])
    weights = read_checkpoint(f"{out}/last.pt")["weights"]
    for name, weight in saved_weights(model).items():
        if not name.startswith("head."):
            assert torch.equal(weight, weights[name])
    assert weights["head.2.weight"].shape[0] == 8
    with pytest.raises(SystemExit, match="does not fit this dualpath.*missing"):
        train.main(SMALL + [*init, "--out", two, "--pre-attention-adapter"])


def test_evaluation_reports_unreadable_videos(micro, tmp_path, capsys):
    root, out = str(tmp_path / "data"), str(tmp_path / "run")
    shutil.copytree(micro, root)
    bad = find_videos("folder", root).val[2][0]
    open(bad, "w").close()
    train.main(SMALL + ["--root", root, "--out", out, "--epochs", "1"])
    assert "0 + 1 unreadable, see failed.txt" in capsys.readouterr().out
    with open(f"{out}/failed.txt") as file:
        assert bad in file.read()
    assert (lines(out)[0]["failed"], lines(out)[0]["val_failed"]) == (0, 1)
    evaluate.main([f"{out}/last.pt", "--workers", "0"])
    printed = capsys.readouterr().out
    assert "1 videos could not be read and count as wrong" in printed and bad in printed
    with open(f"{out}/last.folder.json") as file:
        assert json.load(file)["unreadable"] == [bad]


def test_evaluate_refuses_other_classes(micro, tmp_path):
    settings = {"data": "folder", "root": micro, "views": (1, 1), "sampling": "dense"}
    path = save(build_model(**TINY), tmp_path / "a.pt", test_stride=1, **settings)
    with pytest.raises(SystemExit, match="the classes of folder .8. are not the 8 that"):
        evaluate.main([path, "--root", micro])
    with pytest.raises(SystemExit, match="no checkpoint"):
        evaluate.main([str(tmp_path / "b.pt")])


def test_evaluation_does_not_hold_the_pixels_of_all_videos(micro, monkeypatch):
    alive, most = weakref.WeakSet(), [0]
    views_of = VideoViews.__getitem__

    def recorded(self, index):
        views = views_of(self, index)
        alive.add(views.pixels)
        most[0] = max(most[0], len(alive))
        return views

    monkeypatch.setattr(VideoViews, "__getitem__", recorded)
    samples = find_videos("folder", micro).val * 3
    model = build_model(**TINY)
    rows = evaluate.predict(model, VideoViews(samples, 16, 64), torch.device("cpu"), batch=2)
    assert len(rows) == 24 and 2 <= most[0] <= 6  # of three batches
