"""One process or several: device and compute type, what ends them, and work that is spread."""

import itertools
import os
import re
import shutil
import signal
import time
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import train
from conftest import (
    as_one_of_two,
    group_is_gone,
    lines,
    script,
    start,
    two_at_once,
    untimed,
    wait_for,
)
from support import processes
from support.datasets import find_videos
from support.processes import UserError, in_parallel


# ---------------------------------------------------------------- device and compute type
@pytest.mark.parametrize(
    "gpus, mps, local, asked, device",
    [
        (0, False, 3, "auto", "cpu"),
        (0, True, 0, "auto", "mps"),
        (2, False, 1, "auto", "cuda:1"),
        (2, False, 1, "cpu", "cpu"),
        (1, False, 0, "cuda", "cuda:0"),
        (0, False, 0, "cuda", None),
        (2, False, 2, "auto", None),
    ],
)
def test_the_device_is_the_best_or_the_one_asked_for(gpus, mps, local, asked, device, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    there = [torch.device(name) for name in ("mps", "cuda") if (gpus if name == "cuda" else mps)]
    found = there[-1] if there else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    if device is None:
        with pytest.raises(UserError, match=f"process {local} .* no CUDA GPU.* has {gpus} of them"):
            processes.choose_device(asked)
    else:
        assert processes.choose_device(asked) == torch.device(device)
        assert chosen == ([local] if device.startswith("cuda") else [])


@pytest.mark.parametrize(
    "name, kind, bf16, dtype",
    [
        ("auto", "cpu", False, None),
        ("bf16", "cpu", False, torch.bfloat16),
        ("auto", "mps", False, None),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("fp16", "cuda", True, torch.float16),
        ("off", "cuda", True, None),
        ("fp16", "cpu", False, UserError),
        ("bf16", "mps", False, UserError),
    ],
)
def test_the_compute_type_is_the_devices_or_refused(name, kind, bf16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    if dtype is UserError:
        words = f"--amp {name} needs a CUDA GPU, and the device is {kind}"
        with pytest.raises(UserError, match=words):
            processes.autocast_type(name, torch.device(kind))
    else:
        assert processes.autocast_type(name, torch.device(kind)) == dtype


# ---------------------------------------------------------------- what ends a script
@pytest.mark.parametrize(
    "error, words",
    [
        (UserError("frames is 15\nand more"), "^frames is 15$"),
        (OSError(28, "No space left on device"), "No space left on device$"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTry"), "^CUDA out of mem.*--micro-batch"),
        (RuntimeError("CPU: can't allocate memory: 9"), "memory: 9 .a smaller --batch"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed\nby"),
            "pid 7.*killed .*fewer --workers",
        ),
        (RuntimeError("Connection closed by peer"), None),
        (ValueError("a mistake of ours"), None),
    ],
)
def test_what_users_can_mend_is_one_sentence(error, words):
    said = processes.explain(error)
    if words is None:
        assert said is None  # then a traceback tells more
    else:
        assert re.search(words, said) and "\n" not in said


def test_an_end_lets_go_of_models_and_workers():
    """A DDP wrapper that outlives its group can wait for ever; workers would finish their work."""
    worker = torch.multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    worker.start()
    wrappers = weakref.WeakSet()

    def ends():
        wrapper = torch.nn.Linear(1, 1)
        wrappers.add(wrapper)
        raise SystemExit(3)

    with pytest.raises(SystemExit), processes.processes("train.py", "cpu"):
        ends()
    assert not wrappers
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


# ---------------------------------------------------------------- two processes
def two_processes(rank, ports, run, roots):
    """What torchrun starts: one refuses, or the other; disks differ; one gets a signal."""
    for who in (0, 1):
        as_one_of_two(rank, ports[who])
        worked = []

        def work(who=who, worked=worked):
            worked.append(rank)
            if rank == who:
                raise UserError(f"process {who} refuses")

        words = f"^train.py: process {who} refuses$" if rank == who else "^1$"
        with pytest.raises(SystemExit, match=words):
            with processes.processes("train.py", "cpu"):
                processes.rank_zero_first(work)
        assert worked == ([rank] if rank <= who else [])  # nobody works after a refusal
        if dist.is_initialized():
            dist.destroy_process_group()
    as_one_of_two(rank, ports[2])
    words = "not all machines find the same training videos" if rank == 0 else "^1$"
    with pytest.raises(SystemExit, match=words):
        train.main(run + ["--root", roots[rank]])
    assert not os.path.exists(run[-1])
    as_one_of_two(rank, ports[3])
    cross_entropy, calls = F.cross_entropy, itertools.count(1)

    def signalled(*args, **options):
        if rank == 1 and next(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return cross_entropy(*args, **options)

    F.cross_entropy = signalled
    with pytest.raises(SystemExit, match="^138$"):
        train.main(run)


def test_what_ends_one_of_two_processes_ends_both(micro, micro_run, tmp_path, capfd):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    other = shutil.copytree(micro, tmp_path / "data")
    path = find_videos("folder", str(other)).train[3][0]
    os.rename(path, path.replace(".mp4", "-other.mp4"))
    run = micro_run + "--dropout 0 --lr 0.1 --out".split()
    two_at_once(two_processes, run + [parts], (micro, str(other)), ports=4)
    assert capfd.readouterr().out.count("train.py: stopped by a signal") == 1
    train.main(run + [whole])
    train.main(run + [parts, "--resume"])  # by another number of processes
    assert "resumed in epoch 1 after step 3" in capfd.readouterr().out
    for a, b in zip(untimed(whole), untimed(parts), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["lr"] == b["lr"]


def test_torchrun_passes_a_signal_on_and_nothing_is_left(micro_run, tmp_path):
    run = micro_run + ["--epochs", "1000", "--workers", "1", "--out", str(tmp_path)]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    process = start(*torchrun, script("train.py"), *run)
    printed = wait_for(process, "epoch   1")
    os.kill(process.pid, signal.SIGTERM)
    printed += process.communicate(timeout=60)[0]
    assert process.returncode != 0 and group_is_gone(process)
    assert printed.count("on 2 x cpu") == 1 and len(lines(tmp_path)) > 0


# ---------------------------------------------------------------- many cores
def double(folder, number):
    if number < 0:
        raise OSError("the disk is full")
    time.sleep(0.05)
    (folder / str(number)).touch()
    return 2 * number


def test_work_in_parallel_is_in_order_and_is_called_off(tmp_path):
    work = partial(double, tmp_path)
    assert list(in_parallel(work, range(10), "doubling", workers=2)) == list(range(0, 20, 2))
    for numbers in ([-1, *range(100, 110)], range(200, 400)):  # it fails, or its caller does
        with pytest.raises(OSError, match="full"):
            for _ in in_parallel(work, numbers, "doubling", workers=2):
                raise OSError("the caller's disk is full")
        there = len(os.listdir(tmp_path))
        assert there < 70
        time.sleep(0.5)
        assert len(os.listdir(tmp_path)) == there  # nothing is still being written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_any_script_with_a_sentence(number, capsys):
    with pytest.raises(SystemExit) as stop, processes.one_sentence("check_data.py"):
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert stop.value.code == 128 + number
    assert capsys.readouterr().out == "check_data.py: stopped by a signal\n"
