"""What the tests share: small models, small videos, small data sets, and processes of their own."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py
import av
import numpy as np
import pytest
import torch

import train
from model import Config, build_model, options_of
from support.backbones import NO_TEXT
from support.demo import draw_data, write_video
from support.runs import read_checkpoint, saved_weights, write_checkpoint
from support.video import read_frames

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.path.join(HERE, "..", "shared")
needs_shared = pytest.mark.skipif(
    not os.path.isdir(SHARED), reason="the folder ../shared with real videos and weights is absent"
)
# A background job of a shell ignores Ctrl-C, and so would the scripts that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

THOROUGH = os.environ.get("THOROUGH") == "1"  # tests of what is rare, with all their repetitions


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def script(name):
    return os.path.join(HERE, name)


# ---------------------------------------------------------------- models
TINY = {
    "backbone": "tiny",
    "pretrained": "here",
    "num_classes": 8,
    "frames": 16,
    "spatial_frames": 4,
    "bottleneck": 16,
}


def tiny(**options):
    """A model of the demo's size, with a method's own options only."""
    wanted = TINY | options
    own = options_of(wanted.get("method", "dualpath")) | options.keys()
    return build_model(Config(**{name: wanted[name] for name in wanted if name in own}))


def random_video(batch=2, frames=16, size=64):
    return torch.randint(0, 256, (batch, frames, 3, size, size), dtype=torch.uint8)


def randomise(module):
    """At the start W_up and the biases are zero, which would hide most mistakes."""
    for p in module.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return module


def vit_folder(folder, quick_gelu=False, **vision):
    """An open_clip folder without weights: the backbone local-dir:FOLDER for --pretrained none."""
    small = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
    config = {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": small | vision,
        "text_cfg": NO_TEXT,
    }
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "open_clip_config.json"), "w") as file:
        json.dump({"model_cfg": config, "preprocess_cfg": preprocess}, file)
    return f"local-dir:{folder}"


def save(model, path, **run):
    """A checkpoint of a model, as train.py writes it, with names for its classes."""
    content = {
        "model": dataclasses.asdict(model.config),
        "weights": saved_weights(model),
        "fingerprint": model.fingerprint,
        "normalisation": model.visual.normalisation,
        "run": {"classes": [f"class {i}" for i in range(model.config.num_classes)]} | run,
        "training": None,
    }
    write_checkpoint(str(path), content)
    return str(path)


# ---------------------------------------------------------------- videos
def pixels(path, numbers):
    return read_frames(str(path), numbers).pixels


def numbered_frames(number, height=48, width=64):
    """Frames whose number can be read back from their brightness, in 8 blocks for 8 bits."""
    bits = (np.arange(number)[:, None] >> np.arange(8)) & 1
    blocks = np.repeat(bits * 200 + 20, width // 8, axis=1)
    shape = (number, height, width, 3)
    return np.broadcast_to(blocks[:, None, :, None], shape).astype(np.uint8)


def read_numbers(frames):
    middle = frames.mean(axis=(1, 3)).reshape(len(frames), 8, -1).mean(-1)
    return ((middle > 120) << np.arange(8)).sum(1).tolist()


def video_of(path, number):
    write_video(str(path), numbered_frames(number))
    return str(path)


def write_anything(
    path,
    codec,
    number=60,
    size=(48, 64),
    pix_fmt="yuv420p",
    pts=None,
    rate=30,
    options=None,
    codec_options=None,
    **stream_options,
):
    """A video of noise that moves, so that a wrong frame or reference would show."""
    rng = np.random.default_rng(0)
    height, width = size
    picture = rng.integers(0, 256, (height + 2 * number, width + number, 3)).astype(np.uint8)
    ramp = np.arange(picture.shape[1])[None, :, None] * 2 % 192
    picture = (picture // 4 + ramp).astype(np.uint8)
    with av.open(path, "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.options = codec_options or {}
        for name, value in stream_options.items():
            if callable(getattr(stream, name)):
                getattr(stream, name)(*value)
            else:
                setattr(stream.codec_context, name, value)
        for i in range(number):
            image = np.ascontiguousarray(picture[2 * i : 2 * i + height, i : i + width])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i if pts is None else pts[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def x264(**options):
    always = {"preset": "medium", "threads": "1", "bf": "3", "g": "300"}
    return {"codec": "libx264", "codec_options": always | options}


def decode_whole(path):
    """The reference: every frame, in order, each by a fresh converter."""
    frames = []
    with av.open(f"file:{path}") as container:
        for frame in container.decode(container.streams.best("video")):
            converter = av.video.reformatter.VideoReformatter()
            frames.append(converter.reformat(frame, format="rgb24").to_ndarray())
    return frames


def micro_set(root, train=16, val=8):
    """A demo of a few videos, by the demo's own code."""
    draw_data(str(root), (train, val))
    return str(root)


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    return micro_set(tmp_path_factory.mktemp("micro") / "data")


# ---------------------------------------------------------------- runs
SMALL = (
    "--data folder --backbone tiny --frames 16 --spatial-frames 4 --batch 8"
    " --workers 0 --epochs 2 --sampling dense --test-stride 1 --stride 1 --views 1x1 --warmup 1"
).split()


MICRO_VIT = {"quick_gelu": True, "width": 8, "head_width": 4, "image_size": 32}


@pytest.fixture(scope="session")
def micro_run(micro, tmp_path_factory):
    """Options of a run of a second: 16 videos, around a random image model of width 8."""
    vit = vit_folder(tmp_path_factory.mktemp("vit"), **MICRO_VIT)
    small = ["--backbone", vit, "--pretrained", "none", "--batch", "4"]
    return [*SMALL, *small, "--device", "cpu", "--root", micro]


def ends(argv, words, main=train.main):
    """The script ends with this sentence, and says its name first; returns the sentence."""
    with pytest.raises(SystemExit, match=words) as error:
        main(argv)
    assert re.match(r"\w+\.py: ", error.value.code) and "\n" not in error.value.code
    return error.value.code


def lines(out):
    """The log of a run."""
    with open(os.path.join(out, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def untimed(out):
    timed = ("seconds", "clips_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines(out)]


def assert_same_run(one, other):
    """The same to the last bit: log, weights, optimiser and everything else that is saved."""
    assert untimed(one) == untimed(other) and len(lines(one)) > 0
    for name in ("last.pt", "best.pt"):
        a, b = (read_checkpoint(f"{out}/{name}") for out in (one, other))
        assert a["weights"].keys() == b["weights"].keys()
        assert all(torch.equal(v, b["weights"][k]) for k, v in a["weights"].items())
        if name == "last.pt":
            assert_same_training(a["training"], b["training"])


def assert_same_training(a, b):
    for name in ("epoch", "step", "loss_sum", "failed", "best", "scheduler", "scaler"):
        assert a[name] == b[name], name
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert a["optimizer"]["state"]
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][i][k]) for k, v in state.items())


# ---------------------------------------------------------------- processes
def start(*command, **options):
    """A script of ours in a session of its own; one thread, so that its sums have one order."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", PYTHONPATH=HERE)
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )

    def end():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    watchdog = threading.Timer(300, end)  # nothing hangs
    watchdog.daemon = True
    watchdog.start()
    return process


def wait_for(process, word):
    """The lines that the process prints, up to the one with the word."""
    seen = []
    while not seen or word not in seen[-1]:
        line = process.stdout.readline()
        assert line, f"it ended: {''.join(seen)}"
        seen.append(line)
    return "".join(seen)


def group_is_gone(process, seconds=20):
    """No process that it started is left."""
    for _ in range(10 * seconds):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# A forked process need not import anything; where there is a GPU, autograd cannot be forked.
FORK = "spawn" if torch.accelerator.is_available() else "fork"


def two_at_once(function, *arguments, ports):
    """function(rank, ports, *arguments) in two processes; ports: how many free ones they need."""
    ports = [free_port() for _ in range(ports)]
    torch.multiprocessing.start_processes(function, (ports, *arguments), 2, start_method=FORK)


def as_one_of_two(rank, port):
    """The environment that torchrun gives to one of two processes, of one thread."""
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method("fork", force=True)  # of data workers, as torchrun's
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
