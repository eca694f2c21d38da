"""A training run's folder: checkpoint files, resuming, the log, and what ends a run.

last.pt is all that resuming needs, best.pt the best weights, log.jsonl a line an epoch, failed.txt
the videos that could not be read. A run that is cut off, anywhere, and resumed ends as one that
was not: what is drawn depends on (seed, epoch, index) or (seed, step), all else is in last.pt.
"""

import glob
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from support.backbones import check_fit
from support.processes import UserError, end_all, gather, rank, say, world_size

RUN_FILES = ("last.pt", "best.pt", "last.*.json", "best.*.json", "log.jsonl", "failed.txt")
# Settings that may differ between a run and its continuation.
MAY_CHANGE = set(
    "out root init resume overwrite workers micro_batch compile checkpoint_activations save_every"
    " device train_videos val_videos val_digest".split()
)
COUNTERS = ("epoch", "step", "loss_sum", "failed", "best", "log")
MAX_FAILED = 0.05  # the share of training videos that may be unreadable


# ---------------------------------------------------------------- files
RENAMED = {"num_frames": "frames", "image_size": "size"}  # options of older checkpoints
MARK = b"\nsha256 "  # ends torch.save's output; the SHA-256 of that follows, in hexadecimal


def write_checkpoint(path, content):
    """Plain values and tensors → a file, sealed: torch.load takes flipped bits without a word.

    Whoever is cut off, or finds the disk full, keeps the old file.
    """
    body = io.BytesIO()
    torch.save(content, body)
    body = body.getvalue()
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(body + MARK + hashlib.sha256(body).hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise UserError(f"cannot write {path}, which stays as it was: {error}") from error


def read_checkpoint(path):
    """The content of a checkpoint, once its SHA-256 has been checked; raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}")
    with open(path, "rb") as file:
        body, mark, digest = file.read().rpartition(MARK)
    if not mark or digest != hashlib.sha256(body).hexdigest().encode():
        raise UserError(
            f"{path} is not a checkpoint of this project, or is damaged: its SHA-256 does not fit"
            " its content"
        )
    content = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    content["model"] = {RENAMED.get(name, name): v for name, v in content["model"].items()}
    return content


# ---------------------------------------------------------------- the weights in them
def count_parameters(model):
    """(trained, all) parameters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters())


def saved_weights(model):
    """What a checkpoint holds: the trained weights; where the frozen ones are random, those too."""
    everything = model.config.pretrained is None
    state = model.state_dict(keep_vars=True)
    return {k: v.detach() for k, v in state.items() if v.requires_grad or everything}


def fingerprint(model):
    """SHA-256 of the frozen weights.

    A position embedding that was interpolated is left out: its last bits vary by processor.
    """
    digest = hashlib.sha256()
    for name, p in model.visual.named_parameters():
        interpolated = model.config.size is not None and name == "positional_embedding"
        if not (p.requires_grad or p.is_meta or interpolated):
            digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
            digest.update(p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_weights(model, content, path, head=True):
    """Copy a checkpoint's weights, or all but its head's, into a model that was built alike."""
    own, weights = saved_weights(model), content["weights"]
    if not head:
        own = {k: v for k, v in own.items() if not k.startswith("head.")}
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
    theirs = f"{content['model']['method']} around {content['model']['backbone']!r}"
    ours = f"{model.config.method} around {model.config.backbone!r}"
    check_fit(own, weights, f"{path}, of {theirs}, does not fit this {ours}")
    tag = content["model"]["pretrained"]
    if tag is not None and model.fingerprint != content["fingerprint"]:
        raise UserError(
            f"{path}, of {theirs} with weights {tag!r}, needs other frozen weights, or another"
            f" image size, than this {ours} has"
        )
    model.load_state_dict(weights, strict=False)
    if "normalisation" in content:  # older checkpoints do not have it
        model.visual.set_normalisation(content["normalisation"])


# ---------------------------------------------------------------- which run, and may it go on
def find_run(folder, resume, overwrite):
    """The content of the folder's last.pt to continue from, or None for a new run.

    A run that is in the way is refused: two in one folder would spoil each other.
    """
    last = f"{folder}/last.pt"
    if resume and os.path.exists(last):
        return read_checkpoint(last)
    if run_files(folder) and not overwrite:
        raise UserError(
            f"{folder} holds a run already: --resume continues from a last.pt, --overwrite deletes"
            " all of it, --out DIR goes elsewhere"
        )
    return None


def run_files(folder):
    paths = [glob.glob(f"{glob.escape(folder)}/{name}") for name in RUN_FILES]
    return [path for found in paths for path in found]


def check_continues(was, settings):
    """UserError where the run that is resumed had other settings."""
    common = (settings.keys() & was.keys()) - MAY_CHANGE
    differ = [name for name in sorted(common) if was[name] != settings[name]]
    options = [name for name in differ if name not in ("classes", "train_digest")]
    sentences = [f"--{name.replace('_', '-')} was {was[name]}" for name in options]
    if differ != options:
        sentences.append(f"{settings['root']} has other classes or training videos")
    if sentences:
        raise UserError(
            f"{settings['out']} holds another run: {'; '.join(sentences)} (to start a new run from"
            f" its weights, take --init {settings['out']}/last.pt and another --out)"
        )


# ---------------------------------------------------------------- what surrounds the loop
@dataclass
class Run:
    """The folder and the counters of a training; it trains nothing itself."""

    folder: str
    save_every: float  # minutes
    num_videos: int  # for training
    checkpoint: Callable  # () → all that last.pt holds
    epoch: int = 0  # how many are complete
    step: int = 0  # of the next one
    loss_sum: float = 0.0  # over its steps, as of the last save
    failed: list = field(default_factory=list)  # messages of unreadable videos, likewise
    best: float = -1.0  # accuracy of all epochs
    log: list = field(default_factory=list)  # the lines of log.jsonl
    signals: list = field(default_factory=list)  # exit statuses that they ask for
    losses: list = field(default_factory=list)  # of this process, since the last save
    messages: list = field(default_factory=list)  # likewise
    saved: float = 0.0  # when

    def start(self, resumed, train_digest):
        """Begin, or go on from a last.pt's content; from here on the folder is this run's.

        train_digest: of the training videos.
        """
        done = ""
        if resumed:
            for name in COUNTERS:
                setattr(self, name, resumed["training"][name])
            done = f", resumed in epoch {self.epoch + 1} after step {self.step}"
        if len(set(gather([(self.epoch, self.step, train_digest)]))) > 1:
            end_all(
                "not all machines find the same training videos, and the same last.pt in"
                f" {self.folder}, whose disk they must share"
            )
        say(f"writes    {self.folder}{done}")
        if rank() == 0:
            os.makedirs(self.folder, exist_ok=True)
            for path in [] if resumed else run_files(self.folder):
                os.remove(path)
        self.save()  # if this cannot be written, better to know it now

    def before_step(self, unreadable):
        """Save when it is time; after a signal, in whatever process, save and end in all of them.

        unreadable: messages of the step's videos.
        """
        due = time.monotonic() > self.saved + 60 * self.save_every
        states = gather([(due, self.signals)])
        signals = sum((signals for _, signals in states), [])
        if signals or states[0][0]:  # by the first process's clock
            self.save()
        if signals:
            raise SystemExit(signals[0])
        self.messages += unreadable

    def after_step(self, loss):
        """loss: the mean over this process's clips, on the device, which is not waited for."""
        self.losses.append(loss)
        self.step += 1

    def save(self):
        """Write last.pt and log.jsonl, unless losses, weights or videos are too bad."""
        values = torch.stack(self.losses).tolist() if self.losses else []
        for losses in zip(*gather([values])):  # of one step, in all processes
            self.loss_sum += sum(losses) / world_size()
        messages = gather(self.messages)
        if messages:
            self.list_failures(messages)
        self.failed = sorted({*self.failed, *messages})
        self.losses, self.messages = [], []
        if len(self.failed) > MAX_FAILED * self.num_videos:
            end_all(
                f"{len(self.failed)} training videos could not be read in epoch {self.epoch + 1},"
                f" and a run stops above {MAX_FAILED:.0%}; {self.folder}/failed.txt lists them"
            )
        content = self.checkpoint()
        weights = [w for w in content["weights"].values() if w.is_floating_point()]
        norm = torch.nn.utils.get_total_norm(weights)
        if not (math.isfinite(self.loss_sum) and norm.isfinite()):
            end_all(
                f"a loss or a weight is not finite any more in epoch {self.epoch + 1}, by step"
                f" {self.step}, so nothing is saved; try a lower --lr, or --clip-grad 1"
            )
        if rank() == 0:
            write_checkpoint(f"{self.folder}/last.pt", content)
            with open(f"{self.folder}/log.jsonl", "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.log)
        self.saved = time.monotonic()

    def end_epoch(self, line, errors):
        """line: the epoch's of the log, val_top1 in it; errors: of its validation videos."""
        if errors:
            self.list_failures(errors)
        if rank() == 0 and line["val_top1"] > self.best:
            write_checkpoint(f"{self.folder}/best.pt", self.checkpoint() | {"training": None})
        self.best = max(self.best, line["val_top1"])
        self.epoch, self.step, self.loss_sum, self.failed = self.epoch + 1, 0, 0.0, []
        self.log.append(line)
        self.save()

    def list_failures(self, messages):
        """Add to failed.txt what is not in it yet."""
        if rank() == 0:
            # A path may be any bytes.
            with open(f"{self.folder}/failed.txt", "a+", errors="surrogateescape") as file:
                file.seek(0)
                new = set(messages).difference(file.read().splitlines())
                file.writelines(f"{message}\n" for message in sorted(new))
