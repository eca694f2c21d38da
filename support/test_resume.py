"""A run that was cut off, anywhere, ends as one that was not; a run in the way is not spoiled."""

import itertools
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import evaluate
import train
from conftest import (
    SMALL,
    THOROUGH,
    TINY,
    assert_same_run,
    lines,
    micro_set,
    packed,
    save,
    script,
    seal,
    start,
    untimed,
    wait_for,
)
from model import build_model
from support.datasets import SPLITS, find_videos
from support.runs import FREE, load_weights, read_checkpoint, save_checkpoint

# A run that saves before every step, and draws as much by chance as one can.
ENDLESS = "--save-every 0 --dropout 0.5 --augment rand --epochs 2 --batch 4".split()


# ---------------------------------------------------------------- to the bit
class Killed(BaseException):
    """What SIGKILL does, from inside: nothing catches it."""


def dies_at_write(number, patch):
    """From here on the process dies at this call of those that change a file."""
    calls = itertools.count(1)

    def dying(original):
        def call(*args, **kwargs):
            if next(calls) == number:
                if original is os.replace:
                    with open(args[0], "r+b") as file:
                        file.truncate(100)  # as if it had not been written to its end
                raise Killed
            return original(*args, **kwargs)

        return call

    for module, name in ((os, "fsync"), (os, "replace"), (json, "dumps")):
        patch.setattr(module, name, dying(getattr(module, name)))


def survives(run, number, monkeypatch):
    """Whether the run ends before the call that it would die at."""
    with monkeypatch.context() as patch:
        dies_at_write(number, patch)
        try:
            train.main(run)
        except Killed:
            return False
    return True


def test_a_run_that_is_cut_off_at_any_write_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch, capsys
):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    root = micro_set(tmp_path / "data", train=24)
    open(find_videos("folder", root).train[8][0], "w").close()
    run = SMALL + ENDLESS + ["--root", root]
    train.main(run + ["--out", whole])
    assert [line["failed"] for line in lines(whole)] == [1, 1]
    midway = 0
    for number in itertools.count(1, 1 if THOROUGH else 9):
        shutil.rmtree(parts, ignore_errors=True)
        if survives(run + ["--out", parts], number, monkeypatch):
            break
        capsys.readouterr()
        train.main(run + ["--out", parts, "--resume"])
        printed = capsys.readouterr().out
        if number <= 2:
            assert "the run starts afresh" in printed
        else:
            assert "resumed after epoch" in printed
        if re.search("resumed after epoch . and [1-5] steps", printed):
            midway += 1
        assert_same_run(whole, parts)
    assert number > 30 and midway >= (12 if THOROUGH else 2)


def test_a_run_in_bfloat16_ends_near_one_in_float32_and_resumes_to_the_bit(
    micro, tmp_path, monkeypatch, capsys
):
    exact, whole, parts = (str(tmp_path / name) for name in ("exact", "whole", "parts"))
    run = SMALL + ENDLESS + ["--root", micro, "--device", "cpu"]
    train.main(run + ["--out", exact])
    assert "1 x cpu, float32" in capsys.readouterr().out
    train.main(run + ["--out", whole, "--amp", "bf16"])
    assert "1 x cpu, bfloat16" in capsys.readouterr().out
    losses = [[line["train_loss"] for line in lines(out)] for out in (exact, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]
    assert not survives(run + ["--out", parts, "--amp", "bf16"], 19, monkeypatch)
    train.main(run + ["--out", parts, "--amp", "bf16", "--resume"])
    assert "resumed after epoch" in capsys.readouterr().out
    assert_same_run(whole, parts)


def test_a_killed_process_resumes_to_the_bit(tmp_path):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    root = micro_set(tmp_path / "data", train=64)
    epochs, kills = ("30", 20) if THOROUGH else ("4", 2)
    options = [*SMALL, *ENDLESS, "--root", root, "--workers", "1", "--epochs", epochs]
    run = [script("train.py"), *options]
    process = start(*run, "--out", whole)
    process.communicate(timeout=300)
    assert process.returncode == 0
    rng, positions = np.random.default_rng(0), set()
    for _ in range(kills):
        process = start(*run, "--out", parts, "--resume")
        wait_for(process, "writes")
        time.sleep(rng.uniform(0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == -signal.SIGKILL, printed
        if os.path.exists(f"{parts}/last.pt"):
            training = read_checkpoint(f"{parts}/last.pt")["training"]
            positions.add((training["epoch"], training["step"]))
    process = start(*run, "--out", parts, "--resume")
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert_same_run(whole, parts)
    assert len(positions) >= (8 if THOROUGH else 1)


# ---------------------------------------------------------------- what may be resumed
def test_resume_takes_a_file_and_refuses_what_is_none(micro, tmp_path, capsys):
    one, other, run = str(tmp_path / "one"), str(tmp_path / "other"), SMALL + ["--root", micro]
    train.main(run + ["--out", one])
    with pytest.raises(SystemExit, match="there is no checkpoint absent.pt"):
        train.main(run + ["--out", other, "--resume", "absent.pt"])
    with pytest.raises(SystemExit, match="weights only"):
        train.main(run + ["--out", other, "--resume", f"{one}/best.pt"])
    train.main(run + ["--out", other, "--resume", f"{one}/last.pt"])
    assert untimed(one) == untimed(other)
    assert "resumed after epoch 2 and 0 steps" in capsys.readouterr().out

    third, new = str(tmp_path / "third"), str(tmp_path / "new")
    train.main(run + ["--out", third, "--seed", "1"])
    with pytest.raises(SystemExit, match="third holds a run already"):
        train.main(run + ["--out", third, "--resume", f"{one}/last.pt"])
    for absent in (f"{new}/last.pt", ""):
        with pytest.raises(SystemExit, match="there is no checkpoint"):
            train.main(run + ["--out", new, "--resume", absent])

    # Going on from it would overwrite what is further.
    shutil.copy(f"{one}/last.pt", f"{one}/kept.pt")
    with pytest.raises(SystemExit, match="one holds a run already"):
        train.main(run + ["--out", one, "--resume", f"{one}/kept.pt"])


def test_a_checkpoint_from_elsewhere_brings_no_best_accuracy(micro, tmp_path, capsys):
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    run = SMALL + ["--root", micro, "--limit", "8"]
    train.main(run + ["--out", one])
    assert read_checkpoint(f"{one}/last.pt")["training"]["best"] >= 0
    capsys.readouterr()
    train.main(run + ["--out", other, "--resume", f"{one}/last.pt"])
    assert read_checkpoint(f"{other}/last.pt")["training"]["best"] == -1
    assert "best top-1" not in capsys.readouterr().out and not os.path.exists(f"{other}/best.pt")


def test_a_run_is_not_resumed_with_other_classes(micro, tmp_path):
    out = str(tmp_path / "run")
    train.main(SMALL + ["--root", micro, "--out", out])
    other = shutil.copytree(micro, tmp_path / "other")
    for split in SPLITS:
        os.rename(other / split / "up_vertical", other / split / "a_class")
    with pytest.raises(SystemExit, match="other has other classes than the run"):
        train.main(SMALL + ["--root", str(other), "--out", out, "--resume"])


def test_a_run_of_before_an_option_was_there_goes_on(micro, tmp_path):
    out = str(tmp_path / "run")
    run = SMALL + ["--root", micro, "--out", out, "--limit", "8", "--epochs", "1"]
    train.main(run)
    content = read_checkpoint(f"{out}/last.pt")
    del content["run"]["before"], content["run"]["crop_area"], content["model"]["before"]
    model = build_model(**content["model"])
    load_weights(model, content, out)
    save_checkpoint(f"{out}/last.pt", model, content["run"], content["training"])
    with pytest.raises(SystemExit, match=r"--crop-area 0.5 \(was 0.08\)"):
        train.main(run + ["--resume", "--crop-area", "0.5"])
    train.main(run + ["--resume"])
    assert len(lines(out)) == 1


def test_the_options_that_may_change_are_options():
    assert set(FREE) <= set(vars(train.parse([])))


def too_small(state):
    state["exp_avg"] = torch.zeros(3)


def larger_than_its_bytes(state):
    state["exp_avg"] = torch.zeros(1).expand(state["exp_avg"].shape)


@pytest.mark.parametrize("spoil", [too_small, larger_than_its_bytes])
def test_an_optimiser_state_that_does_not_fit_is_refused(spoil, micro, tmp_path):
    last = tmp_path / "run" / "last.pt"
    run = SMALL + ["--root", micro, "--out", str(tmp_path / "run"), "--epochs", "1"]
    train.main(run)
    content = read_checkpoint(str(last))
    spoil(content["training"]["optimizer"]["state"][0])
    seal(last, packed(content))
    with pytest.raises(SystemExit, match="is refused|does not fit the model"):
        train.main(run + ["--resume"])


def test_the_initial_weights_are_not_needed_to_resume(micro, tmp_path):
    out, first = str(tmp_path / "run"), str(tmp_path / "first.pt")
    save(build_model(**(TINY | {"bottleneck": 8})), first)
    run = SMALL + ["--root", micro, "--out", out, "--init", first]
    train.main(run)
    os.remove(first)
    train.main(run + ["--resume"])


# ---------------------------------------------------------------- a run's folder
def test_a_run_is_not_overwritten_by_accident(micro, tmp_path, capsys):
    out = str(tmp_path / "run")
    last, best, result = f"{out}/last.pt", f"{out}/best.pt", f"{out}/best.folder.json"
    run = SMALL + ["--root", micro, "--out", out, "--epochs", "1"]
    train.main(run + ["--resume"])
    assert "the run starts afresh" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--resume continues it.*--overwrite deletes it"):
        train.main(run)
    with pytest.raises(SystemExit, match=r"--bottleneck 4 \(was 8\)"):
        train.main(run + ["--resume", "--bottleneck", "4"])
    assert len(lines(out)) == 1 and os.path.exists(best)

    names = ("mine.txt", "log.txt", "best.mp4", "curves.csv", "last.png")
    mine = [f"{out}/{name}" for name in names]
    for name in mine:
        open(name, "w").close()
    evaluate.main([best, "--workers", "0"])
    with pytest.raises(SystemExit, match="/no/where"):  # what is not sure to start deletes nothing
        train.main(run + ["--overwrite", "--root", "/no/where"])
    assert os.path.exists(last) and os.path.exists(result)
    train.main(run + ["--overwrite", "--seed", "1"])
    assert len(lines(out)) == 1
    assert all(map(os.path.exists, mine)) and not os.path.exists(result)

    shutil.copy(best, last)
    with pytest.raises(SystemExit, match="weights only"):
        train.main(run + ["--resume", "--seed", "1"])
    os.remove(last)
    with pytest.raises(SystemExit, match="holds a run already: no last.pt to resume from, --over"):
        train.main(run + ["--resume"])
    assert os.path.exists(best)
    os.rename(best, f"{out}/best.k400.json")  # a result alone is kept, too
    os.remove(f"{out}/log.jsonl")
    with pytest.raises(SystemExit, match="holds a run already"):
        train.main(run)


def test_a_folder_whose_start_failed_can_be_used_again(micro, tmp_path, monkeypatch):
    run = SMALL + ["--root", micro, "--out", str(tmp_path / "run")]
    train.main(run)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit, match="cannot write .*No space left"):
            train.main(run + ["--overwrite"])
    train.main(run + ["--resume"])
    assert len(lines(tmp_path / "run")) == 2
