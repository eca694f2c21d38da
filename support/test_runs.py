"""A run that goes wrong: it stops in time, says why, and leaves what can be continued."""

import math
import os
import re
import resource
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch

import data
import evaluate
import model
import train
from conftest import (
    SMALL,
    THOROUGH,
    assert_same_run,
    children,
    group_is_gone,
    lines,
    micro_set,
    script,
    start,
    wait_for,
)
from support import runs
from support.datasets import find_videos
from support.runs import read_checkpoint


def position(out):
    """Where last.pt stands: whole epochs, steps of the next one."""
    training = read_checkpoint(f"{out}/last.pt")["training"]
    return training["epoch"], training["step"]


# ---------------------------------------------------------------- videos that cannot be read
def test_broken_training_videos_are_logged_once_and_too_many_stop_the_run(tmp_path):
    root = micro_set(tmp_path / "data", train=40)
    paths = [path for path, _ in find_videos("folder", root).train]
    odd = os.path.join(os.path.dirname(paths[3]), os.fsdecode(b"caf\xe9.mp4"))
    os.rename(paths[3], odd)
    for bad in (odd, paths[20]):
        open(bad, "w").close()

    # 2 of 40 are 5 %, and they may be.
    train.main(SMALL + ["--root", root, "--out", str(tmp_path / "run")])
    assert [line["failed"] for line in lines(tmp_path / "run")] == [2, 2]
    with open(tmp_path / "run/failed.txt", errors="surrogateescape") as file:
        logged = file.read().splitlines()
    assert len(logged) == 2
    assert all(any(bad in line for line in logged) for bad in (odd, paths[20]))

    open(paths[30], "w").close()
    words = "3 training videos could not be read in epoch 1, .* above 5%.*two/failed.txt lists them"
    with pytest.raises(SystemExit, match=words):
        train.main(SMALL + ["--root", root, "--out", str(tmp_path / "two"), "--epochs", "1"])
    with open(tmp_path / "two/failed.txt", errors="surrogateescape") as file:
        assert len(file.readlines()) == 3


def test_data_that_is_all_unreadable_stops_the_run(micro, tmp_path):
    root, out = str(tmp_path / "data"), str(tmp_path / "run")
    shutil.copytree(micro, root)
    videos = find_videos("folder", root).train
    for path, _ in videos:
        open(path, "w").close()
    with pytest.raises(SystemExit, match="could not be read"):
        train.main(SMALL + ["--root", root, "--out", out])
    with open(f"{out}/failed.txt") as file:
        assert len(file.readlines()) == len(videos)


# ---------------------------------------------------------------- numbers that are none
def test_a_loss_that_is_not_finite_stops_the_run(micro, tmp_path):
    out = str(tmp_path / "run")
    with pytest.raises(SystemExit, match="the loss of step 2 of epoch 1 is not finite") as error:
        train.main(SMALL + ["--root", micro, "--out", out, "--lr", "1e30", "--warmup", "0"])
    videos = find_videos("folder", micro).train  # the second step's clips, by their paths
    named = error.value.code.split("the step's clips: ")[1].split(", ")
    assert named == [videos[i][0] for _, i in train.batches(16, 0, 8)[1]]
    assert position(out) == (0, 0)  # as it was before


def test_weights_that_are_not_finite_are_not_saved(micro, tmp_path, monkeypatch):
    out, step = str(tmp_path / "run"), torch.optim.AdamW.step

    def spoils(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoils)
    with pytest.raises(SystemExit, match="weights are not finite any more"):
        # Its one step has a finite loss.
        train.main(SMALL + ["--root", micro, "--out", out, "--limit", "8"])
    assert position(out) == (0, 0)


def test_steps_that_fp16_skips_are_counted_and_shown(micro, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "autocast_type", lambda *_: torch.float16)
    scaler = torch.amp.GradScaler

    def overflowing_once(*args, **kwargs):
        return scaler(*args, init_scale=2.0**127, backoff_factor=2.0**-126, **kwargs)

    monkeypatch.setattr(torch.amp, "GradScaler", overflowing_once)
    options = ["--root", micro, "--out", str(tmp_path / "run"), "--method", "linear"]
    train.main(SMALL + options + ["--limit", "8"])
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [1, 1]
    assert "1 steps skipped" in capsys.readouterr().out


# ---------------------------------------------------------------- signals
@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_run_after_a_step_with_a_checkpoint_and_no_orphans(
    number, status, micro, tmp_path
):
    out = str(tmp_path / "run")
    options = ["--root", micro, "--out", out, "--workers", "2", "--epochs", "1000"]
    process = start(script("train.py"), *SMALL, *options)
    wait_for(process, "epoch   2")
    started = time.monotonic()
    os.killpg(process.pid, number)  # to the workers, too, as a terminal and Slurm do
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == status and time.monotonic() - started < 30
    assert "train.py: stopped by a signal; --resume continues the run" in printed
    assert "Traceback" not in printed and "Error" not in printed
    assert position(out)[0] >= 2
    assert group_is_gone(process)


class Signals:
    """Sends SIGTERM to this process in a chosen forward pass of the model."""

    def __init__(self, monkeypatch):
        self.seen = []  # for each forward pass whether it is one of training
        self.after = None  # the passes after which to send it
        images = model.DualPath.patches

        def signalled(net, *args):
            self.seen.append(net.training)
            if self.seen == self.after:
                os.kill(os.getpid(), signal.SIGTERM)
            return images(net, *args)

        monkeypatch.setattr(model.DualPath, "patches", signalled)

    def end(self, main, argv, after):
        """main(argv) is ended by a signal after these passes of this and earlier calls."""
        self.after = after
        with pytest.raises(SystemExit) as error:
            main(argv)
        assert error.value.code == 143
        self.after = None


def test_signals_in_a_step_in_validation_and_in_evaluation(micro, tmp_path, monkeypatch, capsys):
    out, whole = str(tmp_path / "run"), str(tmp_path / "whole")
    run = SMALL + ["--root", micro, "--out", out, "--batch", "4"]
    train.main(run + ["--out", whole])
    signals = Signals(monkeypatch)
    before = signal.getsignal(signal.SIGTERM)

    signals.end(train.main, run, after=[True, True])  # in the second step
    assert signal.getsignal(signal.SIGTERM) is before
    assert position(out) == (0, 2) and lines(out) == []

    # In the second batch of the validation.
    signals.end(train.main, run + ["--resume"], after=[True, True, True, True, False, False])
    printed = capsys.readouterr().out
    assert "resumed after epoch 0 and 2 steps" in printed
    assert "validating: 4 of 8 videos were done" in printed
    assert position(out) == (0, 4) and lines(out) == []

    train.main(run + ["--resume"])
    assert "resumed after epoch 0 and 4 steps" in capsys.readouterr().out
    assert_same_run(whole, out)

    signals.seen.clear()
    options = [f"{out}/last.pt", "--workers", "0", "--batch", "3"]
    signals.end(evaluate.main, options, after=[False, False])
    assert "evaluating: 3 of 8 videos were done" in capsys.readouterr().out


def test_a_second_ctrl_c_does_not_wait_for_the_step(micro, tmp_path, monkeypatch):
    out, images, calls = str(tmp_path / "run"), model.DualPath.patches, []

    def impatient(*args):
        calls.append("begins")
        os.kill(os.getpid(), signal.SIGINT)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append("goes on")
        return images(*args)

    monkeypatch.setattr(model.DualPath, "patches", impatient)
    with pytest.raises(SystemExit) as error:
        train.main(SMALL + ["--root", micro, "--out", out])
    assert error.value.code == 130 and calls == ["begins"]
    assert position(out) == (0, 0)


def test_a_signal_while_the_epochs_checkpoint_is_written_is_not_lost(micro, tmp_path, monkeypatch):
    saves, original = [], runs.save_checkpoint

    def signalled(path, *args):
        original(path, *args)
        saves.append(path)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs, "save_checkpoint", signalled)
    with pytest.raises(SystemExit) as error:
        train.main(SMALL + ["--root", micro, "--out", str(tmp_path / "run")])
    assert error.value.code == 143 and len(saves) == 2


# ---------------------------------------------------------------- the machine
def test_a_dead_data_worker_ends_the_run_with_a_sentence(micro, tmp_path, monkeypatch, capsys):
    original = data.TrainingClips.__getitem__

    def dies(self, item):
        if item[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, item)

    run = SMALL + ["--root", micro, "--out", str(tmp_path / "run"), "--workers", "2"]
    words = "a process that reads videos has died.*--workers.*DataLoader worker"
    with monkeypatch.context() as patch:
        patch.setattr(data.TrainingClips, "__getitem__", dies)
        with pytest.raises(SystemExit, match=words):
            train.main(run)
    train.main(run + ["--resume"])
    assert "resumed after epoch 1 and 0 steps" in capsys.readouterr().out
    assert len(lines(tmp_path / "run")) == 2


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(micro, tmp_path):
    out, other = str(tmp_path / "run"), str(tmp_path / "other")
    run = SMALL + ["--root", micro, "--out", out]
    train.main(run + ["--limit", "8", "--epochs", "1", "--out", other])
    assert os.path.getsize(f"{other}/best.pt") < 400_000
    assert 900_000 < os.path.getsize(f"{other}/last.pt")
    smaller = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, smaller[1]))
        words = "train.py: cannot write .*last.pt, which stays as it was: File too large"
        with pytest.raises(SystemExit, match=words):
            train.main(run)
        assert os.listdir(out) == []
        # The optimiser's state comes with the first step.
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, smaller[1]))
        with pytest.raises(SystemExit, match="train.py: cannot write .*last.pt"):
            train.main(run)
        assert position(out) == (0, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, smaller)
    train.main(run + ["--resume"])
    assert len(lines(out)) == 2


def open_files_and_memory():
    """[open files], [kB of memory] of this process and of its children."""
    files, memory = [], []
    for number in [os.getpid(), *children(os.getpid())]:
        files.append(sum(1 for _ in os.scandir(f"/proc/{number}/fd")))
        with open(f"/proc/{number}/status") as status:
            memory.append(int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]))
    return files, memory


@pytest.mark.skipif(sys.platform != "linux", reason="looks into Linux's /proc")
def test_memory_and_files_stay_as_they_are(micro, tmp_path, monkeypatch):
    number = 2000 if THOROUGH else 60  # steps
    videos = [path for path, _ in find_videos("folder", micro).train]
    listed = [f'"{videos[i % 16]}" {i % 2}\n' for i in range(8 * number)]
    (tmp_path / "train.txt").write_text("".join(listed))
    listed = [f'"{path}" {i % 2}\n' for i, path in enumerate(videos)]
    (tmp_path / "val.txt").write_text("".join(listed))

    samples, must_stop = [], runs.Run.must_stop

    def sampled(self, *args, **kwargs):
        if (self.step + 1) % (number // 20) == 0:
            samples.append(open_files_and_memory())
        return must_stop(self, *args, **kwargs)

    monkeypatch.setattr(runs.Run, "must_stop", sampled)
    options = (
        "--data list --backbone tiny --frames 16 --spatial-frames 1 --batch 8 --epochs 1"
        " --workers 2 --sampling dense --stride 1 --save-every 0.1"
    ).split()
    train.main([*options, "--root", str(tmp_path), "--out", str(tmp_path / "run")])
    assert len(samples) == 20
    assert len({len(files) for files, _ in samples}) == 1  # the same processes to the end
    files, memory = np.array(samples).transpose(1, 0, 2)  # (20, processes) each
    assert files.shape[0] == 20 and files.shape[1] >= 3  # this process, two workers, torch's own
    # Clips on their way from the workers are files, too: a few more or fewer at any moment.
    assert (files[-5:].min(axis=0) <= files[2:5].max(axis=0)).all()
    growth = memory[-5:].mean(axis=0) / memory[5:10].mean(axis=0)
    megabytes = memory[-1] // 1024
    print(f"after {number} steps: {files[-1]} files, {megabytes} MB, {growth} times a third's")
    assert (growth < (1.05 if THOROUGH else 1.3)).all()
