"""A run of train.py: what checkpoints hold, that it goes on to the bit, and what ends it."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import time
import types
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer, register_model
from torchvision.models import SwinTransformer
from torchvision.transforms._presets import ImageClassification

import data
import evaluate
import model
import train
from adapters import METHODS
from conftest import (
    FORK,
    HERE,
    MICRO_VIT,
    SMALL,
    THOROUGH,
    assert_same_run,
    ends,
    group_is_gone,
    lines,
    micro_set,
    random_video,
    randomise,
    save,
    tiny,
    untimed,
    vit_folder,
)
from model import load_checkpoint
from support import backbones
from support.datasets import SPLITS, find_videos
from support.processes import UserError
from support.runs import load_weights, read_checkpoint, saved_weights, write_checkpoint


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that `start` starts: sums then have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def position(out):
    """Where last.pt stands: whole epochs, steps of the next one."""
    training = read_checkpoint(f"{out}/last.pt")["training"]
    return training["epoch"], training["step"]


# ---------------------------------------------------------------- checkpoints
# support/fixtures has checkpoints of the first version, of miniatures that are built here.
FIXTURES = os.path.join(HERE, "support", "fixtures")
with open(os.path.join(FIXTURES, "expected.json")) as expected:
    EXPECTED = json.load(expected)


@register_model
def fixture_siglip(
    pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options
):
    """open_clip finds it by its name."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
    model = VisionTransformer(**sizes, **{"class_token": False, "global_pool": "map"} | options)
    model.default_cfg = model.pretrained_cfg = {}
    return model


@pytest.fixture
def miniatures(tmp_path, monkeypatch):
    """The image models of the fixtures, where these look for them."""
    monkeypatch.chdir(tmp_path)
    vit_folder("vit", **MICRO_VIT)
    timm = {"timm_model_name": "fixture_siglip", "timm_pool": "map", "timm_proj": "none"}
    vit_folder("timm", image_size=32, **timm)
    weights = types.SimpleNamespace(transforms=partial(ImageClassification, crop_size=32))
    swin = partial(SwinTransformer, [4, 4], 8, [1, 1], [2, 4], [4, 4], num_classes=5)
    monkeypatch.setitem(backbones.SWINS, "swin_micro", (swin, weights))


@pytest.mark.parametrize("name", EXPECTED["logits"])
def test_old_checkpoints_give_the_logits_they_gave(name, miniatures):
    model, content = load_checkpoint(f"{FIXTURES}/{name}.pt")
    with open(f"{FIXTURES}/{name}.pt", "rb") as file:
        assert b"num_frames" in file.read()  # the option's old name
    assert content["model"]["frames"] == model.config.frames == 16
    video = np.random.default_rng(7).integers(0, 256, (2, 16, 3, 32, 32)).astype(np.uint8)
    want = torch.tensor(EXPECTED["logits"][name])
    torch.testing.assert_close(model(torch.from_numpy(video)), want, rtol=0, atol=1e-5)
    # An optimiser's state knows parameters by their order.
    assert list(saved_weights(model)) == list(content["weights"])


def test_an_old_run_goes_on(miniatures, tmp_path):
    micro_set("micro")
    os.mkdir("run")
    shutil.copy(f"{FIXTURES}/dualpath_last.pt", "run/last.pt")
    run = [*SMALL, "--root", "micro", "--backbone", "local-dir:vit", "--pretrained", "none"]
    options = "--lr 0.05 --amp off --bottleneck 2 --batch 4 --no-serial-skip".split()
    train.main(run + options + ["--resume", "--out", "run"])
    for old, new in zip(EXPECTED["log"], lines("run"), strict=True):
        assert new["lr"] == pytest.approx(old["lr"], abs=1e-9)
        # RandAugment drew otherwise then.
        assert new["train_loss"] == pytest.approx(old["train_loss"], abs=0.02)


@pytest.mark.parametrize(
    "options",
    [
        *[{"method": method} for method in METHODS],
        {"paths": "temporal"},
        {"pretrained": None},
        {"method": "st_adapter", "before": "both"},
    ],
    ids=str,
)
def test_checkpoint_round_trip_gives_identical_logits(options, tmp_path):
    model = randomise(tiny(**options)).eval()
    again, content = load_checkpoint(save(model, tmp_path / "a.pt", views=(3, 1)))
    video = random_video()
    assert torch.equal(model(video), again(video)) and not again.training
    assert content["run"]["views"] == (3, 1) and again.config == model.config
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    saves_all = "pretrained" in options or not frozen  # random weights are nowhere else
    assert (frozen <= content["weights"].keys()) == saves_all
    assert os.listdir(tmp_path) == ["a.pt"]


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    save(tiny(method="linear"), path)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in (0, 100, len(whole) // 2, len(whole) - 1)]
    somewhere = np.random.default_rng(0).integers(0, len(whole), 1000 if THOROUGH else 20)
    for place in [0, 40, *somewhere, len(whole) - 1]:
        damaged.append(bytearray(whole))
        damaged[-1][place] ^= 1
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match="a.pt is not a checkpoint of this project, or is dam"):
            load_checkpoint(str(path))
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(str(tmp_path / "b.pt"))


def test_other_image_models_and_unknown_options_are_refused(tmp_path):
    path, other = save(tiny(), tmp_path / "a.pt"), tmp_path / "other"
    shutil.copytree(backbones.BACKBONES["tiny"].removeprefix("local-dir:"), other)
    assert load_checkpoint(path, backbone=f"local-dir:{other}")
    config = other / "open_clip_config.json"
    pixels = config.read_text()
    config.write_text(pixels.replace('"mean": [', '"mean": [0.1, 0.2, 0.3], "was": ['))
    again = load_checkpoint(path, backbone=f"local-dir:{other}")[0]
    assert again.visual.normalisation == [[0.5] * 3] * 2  # those of the training
    config.write_text(pixels)
    state = safetensors.torch.load_file(other / "open_clip_model.safetensors")
    state["visual.proj"][3, 5] += 1e-3
    safetensors.torch.save_file(state, other / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="other frozen weights"):
        load_checkpoint(path, backbone=f"local-dir:{other}")
    content = read_checkpoint(path)
    with pytest.raises(UserError, match="A_s1.down.weight is not expected"):
        load_weights(tiny(paths="temporal"), content, path)
    write_checkpoint(path, content | {"model": content["model"] | {"wings": 2}})
    with pytest.raises(UserError, match="an option that this version does not know: wings"):
        load_checkpoint(path)


# ---------------------------------------------------------------- cut off and resumed
@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    """24 training videos, of which one cannot be read."""
    root = micro_set(tmp_path_factory.mktemp("flawed") / "data", train=24, val=4)
    open(find_videos("folder", root).train[8][0], "w").close()
    return root


@pytest.fixture
def run(micro_run, flawed):
    """Saves before every step, and draws as much by chance as one can."""
    often = "--save-every 0 --dropout 0.5 --lr 0.1 --batch 8".split()
    return [*micro_run, "--root", flawed, *often]


class Killed(BaseException):
    """What SIGKILL does, from inside: nothing catches it."""


def survives(argv, number, monkeypatch):
    """Whether the run ends before it would write this file, and die with the half of it written."""
    replace, calls = os.replace, itertools.count(1)

    def dying(temporary, path):
        if next(calls) == number:
            os.truncate(temporary, 100)
            raise Killed
        replace(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        try:
            train.main(argv)
        except Killed:
            return False
    return True


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_cut_at_any_write_ends_the_same(precision, run, tmp_path, monkeypatch, capsys):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    if precision == "float16":  # on a CPU, with a scaler whose state changes
        monkeypatch.setattr(train, "autocast_type", lambda *_: torch.float16)
        scaler = partial(torch.amp.GradScaler, init_scale=2.0**20, growth_interval=2)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run = run + ["--amp", "bf16"] * (precision == "bfloat16")
    train.main(run + ["--out", whole])
    assert f"1 x cpu, {precision}; " in capsys.readouterr().out
    assert [line["failed"] for line in lines(whole)] == [1, 1]
    some = {1: "", 5: "in epoch 1 after step 2", 12: "in epoch 2 after step 2"}
    if precision != "float32":
        del some[1], some[12]
    for number in itertools.count(1) if THOROUGH else some:
        shutil.rmtree(parts, ignore_errors=True)
        if survives(run + ["--out", parts], number, monkeypatch):
            assert THOROUGH and number > 12
            break
        capsys.readouterr()
        train.main(run + ["--out", parts, "--resume"])
        assert some.get(number, "") in capsys.readouterr().out
        assert_same_run(whole, parts)


def test_pretrained_weights_are_prepared_again_for_the_rest(micro, tmp_path, monkeypatch):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run = [*SMALL, "--root", micro, "--limit", "8", "--device", "cpu", "--out"]
    train.main([*run, whole])
    assert not survives([*run, parts], 4, monkeypatch)  # in the second epoch
    train.main([*run, parts, "--resume"])
    assert_same_run(whole, parts)
    assert not any("c_fc" in name for name in read_checkpoint(f"{whole}/last.pt")["weights"])


def train_in_a_session(argv):
    os.setsid()
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method("fork", force=True)  # of data workers
    train.main(argv)


@pytest.mark.parametrize("number", [signal.SIGINT, *[signal.SIGKILL] * THOROUGH])
def test_a_process_that_is_killed_resumes_to_the_bit(number, run, tmp_path, capfd):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run = run + ["--epochs", "2", "--resume"]
    argv = [*run, "--out", parts, "--workers", "1"]
    process = torch.multiprocessing.get_context(FORK).Process(
        target=train_in_a_session, args=(argv,)
    )
    process.start()
    while not os.path.exists(f"{parts}/best.pt"):  # the first epoch's
        assert process.is_alive()
        time.sleep(0.02)
    os.killpg(process.pid, number)  # to its workers, too, as a terminal does
    process.join(60)
    assert process.exitcode == (130 if number == signal.SIGINT else -number)
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed and "Error" not in printed
    assert group_is_gone(process)
    assert position(parts)[0] < 2
    for out in (parts, whole):
        train.main(run + ["--out", out])
    assert_same_run(whole, parts)


def ended_by(number, passes, argv, monkeypatch, main=train.main):
    """main(argv) gets a signal in a forward pass; passes: of each up to it, is it of training?"""
    seen, forward = [], model.DualPath.forward

    def signalled(net, video):
        seen.append(net.training)
        if seen == passes:
            os.kill(os.getpid(), number)
        return forward(net, video)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(model.DualPath, "forward", signalled)
        main(argv)
    assert error.value.code == 128 + number and seen == passes


def test_signals_in_steps_and_in_validation(micro_run, tmp_path, monkeypatch, capsys):
    out, whole = str(tmp_path / "run"), str(tmp_path / "whole")
    run = micro_run + ["--out", out]
    train.main(micro_run + ["--out", whole])
    before = signal.getsignal(signal.SIGTERM)
    ended_by(signal.SIGTERM, [True, True], run, monkeypatch)  # in the second step
    assert signal.getsignal(signal.SIGTERM) is before
    assert position(out) == (0, 2) and lines(out) == []
    assert "stopped by a signal" in capsys.readouterr().out
    run.append("--resume")
    ended_by(signal.SIGINT, [True, True, False, False], run, monkeypatch)
    assert position(out) == (0, 4) and lines(out) == []
    ended_by(signal.SIGUSR1, [False, False, True, True, True, True], run, monkeypatch)
    assert position(out) == (1, 4) and len(lines(out)) == 1  # in the last step of all
    train.main(run)
    assert "resumed in epoch 2 after step 4" in capsys.readouterr().out
    assert_same_run(whole, out)
    options = [f"{out}/last.pt", "--workers", "0", "--batch", "3", "--device", "cpu"]
    ended_by(signal.SIGTERM, [False, False], options, monkeypatch, evaluate.main)


# ---------------------------------------------------------------- the folder of a run
def test_a_run_is_not_overwritten_by_accident(micro_run, tmp_path, capsys):
    out = str(tmp_path / "run")
    last, best, result = f"{out}/last.pt", f"{out}/best.pt", f"{out}/best.folder-1x1.json"
    run = micro_run + ["--out", out, "--epochs", "1"]
    train.main(run + ["--resume"])
    line = r"epoch   1   loss 2\.\d{3}   top-1 \d+\.\d\d%   top-5 .*clips/s .* 0 \+ 0\nbest "
    assert re.search(line, capsys.readouterr().out)
    ends(run, "run holds a run already: --resume continues from a last.pt, --overwrite deletes al")
    mine = [f"{out}/{name}" for name in ("mine.txt", "log.txt", "best.mp4", "last.png")]
    for name in mine:
        open(name, "w").close()
    evaluate.main([best, "--workers", "0"])
    ends(run + ["--overwrite", "--root", "/no/where"], "/no/where")  # which deletes nothing
    assert os.path.exists(last) and os.path.exists(result)
    train.main(run + ["--overwrite", "--seed", "1"])
    assert all(map(os.path.exists, mine)) and not os.path.exists(result)
    assert len(lines(out)) == 1 and read_checkpoint(last)["run"]["seed"] == 1
    for name in ("last.pt", "best.pt"):
        os.remove(f"{out}/{name}")
        ends(run + ["--resume"], "holds a run already")  # there is a log, too
    assert len(lines(out)) == 1


def test_what_differs_from_the_run_is_named(micro_run, micro, tmp_path):
    out = str(tmp_path / "run")
    run = micro_run + ["--out", out, "--epochs", "1", "--resume"]
    train.main(run)
    longer = r"--epochs was 1 \(to start a new run .* --init .*run/last.pt and another --out\)"
    ends(run + ["--epochs", "9"], longer)
    ends(run + ["--method", "aim"], "holds another run: --method was dualpath; --serial-skip")
    options = ["--lr", "1", "--bottleneck", "4"]
    ends(run + options, r"--bottleneck was None; --lr was 0.001 \(")
    ends(run + ["--limit", "8"], f"--limit was None; {micro} has other classes or training videos")
    other = shutil.copytree(micro, tmp_path / "other")
    for split in SPLITS:
        os.rename(other / split / "up_vertical", other / split / "a_class")
    ends(run + ["--root", str(other)], f"{other} has other classes")
    content = read_checkpoint(f"{out}/last.pt")
    for name in ("before", "rows"):  # as if these options were younger
        del content["run"][name], content["model"][name]
    write_checkpoint(f"{out}/last.pt", content)
    ends(run + ["--rows", "2"], r"--rows was 4 \(")
    train.main(run + ["--workers", "1", "--micro-batch", "3"])


# ---------------------------------------------------------------- what goes wrong
def failed(out):
    with open(f"{out}/failed.txt", errors="surrogateescape") as file:
        return file.read().splitlines()


def test_broken_videos_are_listed_and_too_many_end_the_run(micro_run, tmp_path, capsys):
    root = micro_set(tmp_path / "data", train=40)
    run = micro_run + ["--root", root]
    paths = [path for path, _ in find_videos("folder", root).train]
    odd = os.path.join(os.path.dirname(paths[3]), os.fsdecode(b"caf\xe9.mp4"))
    os.rename(paths[3], odd)
    bad = [odd, paths[20], find_videos("folder", root).val[2][0]]
    for path in bad:
        open(path, "w").close()
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    train.main(run + ["--out", one])
    # 2 of 40 are 5 %, and they may be. Each is listed once.
    assert [(line["failed"], line["val_failed"]) for line in lines(one)] == 2 * [(2, 1)]
    assert len(failed(one)) == 3
    assert all(sum(path in line for line in failed(one)) == 1 for path in bad)
    evaluate.main([f"{one}/last.pt", "--workers", "0"])
    printed = capsys.readouterr().out
    assert "unreadable 2 + 1" in printed and "unreadable, and so wrong: 1" in printed
    with open(f"{one}/last.folder-1x1.json") as file:
        assert json.load(file)["unreadable"] == bad[2:]
    open(paths[30], "w").close()
    words = "3 training videos could not be read in epoch 1, .* above 5%.*two/failed.txt lists them"
    ends(run + ["--out", two], words)
    assert len(failed(two)) == 3


def test_data_that_is_all_unreadable_ends_the_run(micro, micro_run, tmp_path):
    root = str(tmp_path / "data")
    shutil.copytree(micro, root)
    for path, _ in find_videos("folder", root).train:
        open(path, "w").close()
    options = ["--root", root, "--out", str(tmp_path / "run"), "--workers", "1"]
    words = r"^train.py: ten videos, one after the other, are unreadable: cannot read .*\.mp4"
    ends(micro_run + options, words)


def test_a_loss_that_is_not_finite_ends_the_run(micro_run, tmp_path):
    out = str(tmp_path / "run")
    options = ["--out", out, "--lr", "1e30", "--warmup", "0"]
    words = "a weight is not finite any more in epoch 1, .*try a lower --lr, or --clip-grad 1$"
    ends(micro_run + options, words)
    assert position(out) == (0, 0)  # as it was before
    # With one step, the loss is finite: the weights it makes are not.
    ends(micro_run + options + ["--overwrite", "--limit", "4", "--lr", "1e39"], words)
    assert position(out) == (0, 0)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(micro_run, tmp_path):
    out = str(tmp_path / "run")
    smaller = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What last.pt holds at the start fits; the optimiser's state comes with the first step.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, smaller[1]))
    try:
        words = "cannot write .*last.pt, which stays as it was: .*File too large"
        ends(micro_run + ["--out", out], words)
        assert position(out) == (0, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, smaller)


# ---------------------------------------------------------------- training and evaluation
def test_the_options_reach_clips_and_views(micro_run, tmp_path, monkeypatch):
    made = []

    def recorded(original):
        def make(*args):
            made.append((original(*args), args))
            return made[-1][0]

        return make

    for name in ("training_transform", "TrainingClips", "VideoViews"):
        monkeypatch.setattr(train, name, recorded(getattr(data, name)))
    monkeypatch.setattr(evaluate, "VideoViews", recorded(data.VideoViews))
    options = (
        "--stride 1 2 --no-flip --erasing 0.5 --crop-area 0.25 --test-stride 3 --views 3x2"
        " --augment crop --seed 5 --epochs 1 --limit 8"
    ).split()
    train.main(micro_run + ["--out", str(tmp_path), *options])
    evaluate.main([f"{tmp_path}/best.pt", "--workers", "0", "--limit", "4"])
    (_, transform), (clips, _), (validation, _), (evaluation, _) = made
    assert (clips.num_frames, clips.sampling, clips.strides, clips.seed) == (16, "dense", (1, 2), 5)
    assert transform == ("crop", 32, False, 0.5, 0.25)
    assert (len(clips), len(validation), len(evaluation)) == (8, 8, 4)
    for views, num_clips, num_crops in ((validation, 1, 1), (evaluation, 3, 2)):
        clip = views.clips[-1].keywords
        assert (clip["num_frames"], clip["sampling"], clip["stride"]) == (16, "dense", 3)
        assert (len(views.clips), views.crops) == (num_clips, num_crops)


def test_every_step_drops_others(micro_run, tmp_path, monkeypatch):
    seeds, dropout = [], F.dropout

    def recorded(*args, **options):
        seeds.append(torch.initial_seed())
        return dropout(*args, **options)

    monkeypatch.setattr(F, "dropout", recorded)
    train.main(micro_run + ["--out", str(tmp_path / "run")])
    assert len(set(seeds)) == 8


def test_options_for_speed_change_no_result(micro_run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    frames, logs = torch._dynamo.utils.counters["frames"], []
    for option in ("--seed 0", "--checkpoint-activations", "--compile"):
        torch.compiler.reset()
        frames.clear()
        out = str(tmp_path / option)
        train.main(micro_run + ["--out", out, "--epochs", "1", "--limit", "8", *option.split()])
        assert (frames["ok"] > 1) == (option == "--compile")
        logs += untimed(out)
    torch.compiler.reset()
    plain, checkpointed, compiled = logs
    assert plain == checkpointed
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


def test_init_starts_from_other_weights_with_a_new_head(micro, tmp_path):
    first = save(randomise(tiny(num_classes=3, bottleneck=None)), tmp_path / "a.pt")
    weights = read_checkpoint(first)["weights"]
    init = [*SMALL, "--root", micro, "--init", first, "--limit", "8", "--epochs", "1"]
    ends(init + ["--pre-attention-adapter"], "does not fit this dualpath.*missing")
    run = init + ["--out", str(tmp_path / "run"), "--lr", "0"]
    train.main(run)
    for name, weight in read_checkpoint(tmp_path / "run/last.pt")["weights"].items():
        assert name.startswith("head.") or torch.equal(weight, weights[name])
    assert read_checkpoint(tmp_path / "run/last.pt")["weights"]["head.2.bias"].shape == (8,)
    os.remove(first)  # it is not needed to resume
    train.main(run + ["--resume"])
