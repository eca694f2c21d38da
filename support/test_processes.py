"""One process or several: their device and compute type, torchrun's restarts, what goes wrong."""

import itertools
import os
import re
import shutil
import signal
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import train
from conftest import (
    SMALL,
    as_one_of_two,
    children,
    free_port,
    group_is_gone,
    lines,
    script,
    start,
    untimed,
    wait_for,
)
from support import processes
from support.datasets import find_videos
from support.processes import UserError
from support.runs import read_checkpoint


# ---------------------------------------------------------------- device and compute type
def pretend(kind, count, monkeypatch):
    """A machine with so many accelerators of a kind; returns the list of those that are chosen."""
    chosen = []
    accelerator = torch.device(kind) if kind else None

    def current(check_available=False):
        assert check_available
        return accelerator

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    return chosen


@pytest.mark.parametrize(
    "kind, count, local, asked, device",
    [
        (None, 0, 0, "auto", "cpu"),
        ("mps", 1, 0, "auto", "mps:0"),
        ("cuda", 2, 1, "auto", "cuda:1"),
        ("cuda", 2, 1, "cpu", "cpu"),
        ("mps", 1, 1, "cpu", "cpu"),
        ("mps", 1, 0, "mps", "mps:0"),
        ("cuda", 1, 0, "cuda", "cuda:0"),
        ("xpu", 1, 0, "auto", "cpu"),  # untried
        (None, 0, 3, "auto", "cpu"),
        (None, 0, 0, "cuda", None),
        ("cuda", 2, 2, "auto", None),
        ("mps", 1, 1, "auto", None),
        ("cuda", 1, 0, "mps", None),
    ],
)
def test_the_device_is_the_best_there_is_or_the_one_asked_for(
    kind, count, local, asked, device, monkeypatch
):
    chosen = pretend(kind, count, monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    if device is None:
        words = f"--device {asked} finds no device for process {local}.*{count} .{kind or 'no'} acc"
        with pytest.raises(UserError, match=words):
            processes.choose_device(asked)
        assert chosen == []
    else:
        assert processes.choose_device(asked) == torch.device(device)
        assert chosen == ([] if device == "cpu" else [local])


@pytest.mark.parametrize(
    "name, kind, bf16, dtype",
    [
        ("auto", "cpu", False, None),
        ("off", "cpu", False, None),
        ("bf16", "cpu", False, torch.bfloat16),
        ("auto", "mps", False, None),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("fp16", "cuda", True, torch.float16),
        ("bf16", "cuda", False, torch.bfloat16),
        ("off", "cuda", True, None),
    ],
)
def test_the_compute_type_is_the_devices_best_or_the_one_asked_for(
    name, kind, bf16, dtype, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert processes.autocast_type(name, torch.device(kind)) == dtype


@pytest.mark.parametrize("name, kind", [("fp16", "cpu"), ("fp16", "mps"), ("bf16", "mps")])
def test_mixed_precision_without_cuda_is_refused(name, kind):
    with pytest.raises(UserError, match=f"--amp {name} needs a CUDA GPU, and the device is {kind}"):
        processes.autocast_type(name, torch.device(kind))


# ---------------------------------------------------------------- meeting
def test_a_port_in_use_is_a_sentence(micro, tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        for name, value in zip(names, (0, 2, 0, "127.0.0.1", port)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit, match=f"port in use: --standalone.*port: {port}"):
            train.main(SMALL + ["--root", micro, "--out", str(tmp_path / "run")])
    assert not dist.is_initialized()


def refusing(rank, ports, run, roots, outs):
    """What torchrun starts, four times: one refuses, or the other, or their disks differ."""
    torch.set_num_threads(1)
    for refuses in (0, 1):
        as_one_of_two(rank, ports[refuses])
        done = []

        def refuse(who=refuses, done=done):
            if rank == who:
                raise UserError(f"process {rank} refuses")
            done.append(rank)

        # The sentence is the first process's to print; the other ends with a status alone.
        with pytest.raises(SystemExit, match=": process . refuses$" if rank == 0 else "^1$"):
            with processes.processes("train.py", "cpu"):
                processes.in_turn(refuse)
        assert done == ([0] if rank < refuses else [])  # nobody works after a refusal
        assert not dist.is_initialized()
    same_root, same_out = roots[0], outs[1]
    for port, root, out in ((ports[2], same_root, outs[rank]), (ports[3], roots[rank], same_out)):
        as_one_of_two(rank, port)
        words = f"not all machines find the same training videos, and the same last.pt in {out}"
        with pytest.raises(SystemExit, match=words):
            train.main(run + ["--root", root, "--out", out, "--resume"])
        dist.destroy_process_group()


def test_what_one_process_refuses_ends_all_of_them(micro, tmp_path):
    """Two machines with disks of their own: one has a run to continue, and another video."""
    run = SMALL + ["--epochs", "1"]
    roots, outs = (micro, str(tmp_path / "data")), (str(tmp_path / "0"), str(tmp_path / "1"))
    shutil.copytree(micro, roots[1])
    path = find_videos("folder", roots[1]).train[3][0]
    os.rename(path, path.replace(".mp4", "-other.mp4"))
    train.main(run + ["--root", micro, "--out", outs[0]])
    arguments = ([free_port() for _ in range(4)], run, roots, outs)
    torch.multiprocessing.spawn(refusing, arguments, nprocs=2)
    assert not os.path.exists(outs[1])


@pytest.mark.parametrize(
    "error, words",
    [
        (UserError("frames is 15\nand its traceback"), "^frames is 15$"),
        (OSError(28, "No space left on device"), "No space left on device$"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTry"),
            "^CUDA out of memory. .*--micro-batch",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
            "memory: 9 .a smaller --mi",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed\nby"), "--workers .*pid 7.*killed.$"),
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


@pytest.mark.parametrize("words", ["Connection closed by peer", "Broken pipe", "wait timed out"])
def test_a_process_that_loses_another_says_so(words, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    said = processes.explain(RuntimeError(f"[gloo] {words}\nat a line of C++"))
    assert said == (
        f"process 3 lost another, which may say why (port in use: --standalone): [gloo] {words}"
    )
    for other in ("shapes do not fit", "CUDA error: peer mapping resources exhausted"):
        assert processes.explain(RuntimeError(other)) is None


# ---------------------------------------------------------------- torchrun
def torchrun(*arguments):
    passed_on = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    options = ["--standalone", "--nproc_per_node=2", "--signals-to-handle", passed_on]
    return start("-m", "torch.distributed.run", *options, *arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in Linux's /proc")
def test_torchrun_passes_signals_on_restarts_the_dead_and_continues(micro, tmp_path):
    out = str(tmp_path / "run")
    options = ["--root", micro, "--out", out, "--workers", "1", "--save-every", "0", "--resume"]
    run = [script("train.py"), *SMALL, *options]
    process = torchrun("--max-restarts=3", *run, "--epochs", "1000")
    wait_for(process, "epoch   2")
    os.kill(children(process.pid)[1], signal.SIGKILL)  # one of the two
    printed = wait_for(process, "resumed after epoch")
    wait_for(process, "epoch   4")
    os.kill(process.pid, signal.SIGUSR1)
    started = time.monotonic()
    printed += process.communicate(timeout=60)[0]
    assert process.returncode == 1 and time.monotonic() - started < 30
    assert group_is_gone(process)
    assert "the run starts afresh" not in printed
    assert printed.count("train.py: stopped by a signal; --resume continues") == 1
    training = read_checkpoint(f"{out}/last.pt")["training"]
    assert training["epoch"] >= 4
    assert [line["epoch"] for line in lines(out)] == list(range(1, training["epoch"] + 1))


# ---------------------------------------------------------------- more or fewer of them
def stopped_midway(rank, port, run):
    """What torchrun starts; one of the two processes gets a signal in its third step."""
    torch.set_num_threads(1)
    as_one_of_two(rank, port)
    cross_entropy, calls = F.cross_entropy, itertools.count(1)

    def signalled(*args, **kwargs):
        if rank == 1 and next(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return cross_entropy(*args, **kwargs)

    F.cross_entropy = signalled
    with pytest.raises(SystemExit) as error:
        train.main(run)
    assert error.value.code == 143


def test_a_run_continues_with_another_number_of_processes(micro, tmp_path, capsys):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run = SMALL + ["--root", micro, "--dropout", "0", "--batch", "4", "--lr", "0.1"]
    train.main(run + ["--out", whole])
    arguments = (free_port(), run + ["--out", parts])
    torch.multiprocessing.spawn(stopped_midway, arguments, nprocs=2)
    training = read_checkpoint(f"{parts}/last.pt")["training"]
    assert (training["epoch"], training["step"], lines(parts)) == (0, 3, [])
    train.main(run + ["--out", parts, "--resume"])
    assert "resumed after epoch 0 and 3 steps" in capsys.readouterr().out
    for a, b in zip(untimed(whole), untimed(parts), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["lr"] == b["lr"]
