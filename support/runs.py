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

import torch

from support.backbones import check_fit
from support.processes import UserError, all_sum, gather, rank, say, world_size

RUN_FILES = ("last.pt", "best.pt", "last.*.json", "best.*.json", "log.jsonl", "failed.txt")
# Options that may differ between a run and its continuation.
MAY_CHANGE = set(
    "out root init resume overwrite workers micro_batch compile checkpoint_activations save_every"
    " device".split()
)
COUNTERS = ("epoch", "step", "loss_sum", "failed", "best", "log")
MAX_FAILED = 0.05  # the share of training videos that may be unreadable
STEPS_PER_CHECK = 20  # reading a loss waits for the device


# ---------------------------------------------------------------- files
RENAMED = {"num_frames": "frames", "image_size": "size"}  # options of older checkpoints
MARK = b"\nsha256 "  # ends torch.save's output; the SHA-256 of that follows, in hexadecimal


def write_file(path, content):
    """Write bytes atomically: whoever is cut off, or finds the disk full, keeps the old file."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = error.strerror or error
        raise UserError(f"cannot write {path}, which stays as it was: {reason}") from error


def write_checkpoint(path, content):
    """Plain values and tensors → a file, sealed: torch.load takes flipped bits without a word."""
    body = io.BytesIO()
    torch.save(content, body)
    body = body.getvalue()
    write_file(path, body + MARK + hashlib.sha256(body).hexdigest().encode())


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
    if content["format"] != 1:
        raise UserError(f"{path} is of format {content['format']}, and this version reads 1")
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
    last = os.path.join(folder, "last.pt")
    if resume and os.path.exists(last):
        content = read_checkpoint(last)
        if content["training"] is None:
            raise UserError(f"{last} holds weights only, like best.pt: --init starts from them")
        return content
    if run_files(folder) and not overwrite:
        hint = "--resume continues it" if os.path.exists(last) else "no last.pt to resume from"
        raise UserError(
            f"{folder} holds a run already: {hint}, --overwrite deletes it, --out DIR goes"
            " elsewhere"
        )
    if resume:
        say(f"note: there is no {last} to resume from, so the run starts afresh")
    return None


def run_files(folder):
    """The paths of what a run has left in a folder."""
    return [path for name in RUN_FILES for path in glob.glob(f"{glob.escape(folder)}/{name}")]


def check_continues(was, settings, defaults):
    """UserError where a run had other settings; defaults: of all options, some added since."""
    was = defaults | was
    names = sorted(defaults.keys() - MAY_CHANGE)
    differ = [name for name in names if was[name] != settings[name]]
    sentences = [f"--{name.replace('_', '-')} was {was[name]}" for name in differ]
    for name, what in (("classes", "classes"), ("train_digest", "training videos")):
        if was[name] != settings[name]:
            sentences.append(f"{settings['root']} has other {what}")
    if "epochs" in differ:
        sentences.append(
            "the learning rate falls over all epochs, so that more of them are another run: to"
            f" train on from its weights, take --init {settings['out']}/last.pt and a new --out"
        )
    if sentences:
        raise UserError(f"{settings['out']} holds another run: {'; '.join(sentences)}")


# ---------------------------------------------------------------- what surrounds the loop
class Run:
    """The folder and the counters of a training; it trains nothing itself.

    epoch: how many are complete. Of the next one: step, its steps so far; loss_sum, the sum of
    their losses; failed, the messages of unreadable videos. best: the best accuracy. log: the
    lines of log.jsonl. mean_loss: of the epoch's steps, as far as they have been added up.
    signals: the exit statuses that signals asked for, before the next step.
    """

    def __init__(self, folder, save_every, num_videos, checkpoint):
        """save_every: minutes. num_videos: for training. checkpoint(): all that last.pt holds."""
        self.folder, self.save_every = folder, 60 * save_every
        self.num_videos, self.checkpoint = num_videos, checkpoint
        self.epoch, self.step, self.loss_sum = 0, 0, 0.0
        self.failed, self.best, self.log = [], -1.0, []
        self.losses, self.messages = [], []  # of this process, since they were last added up
        self.signals, self.saved = [], time.monotonic()
        self.mean_loss, self.resumed = math.nan, False

    def restore(self, training):
        """Take the counters of the checkpoint that is resumed."""
        for name in COUNTERS:
            setattr(self, name, training[name])
        self.resumed = True

    def start(self, train_digest):
        """From here on the folder is this run's. train_digest: of the training videos."""
        if len(set(gather([(self.epoch, self.step, train_digest)]))) > 1:
            self.end(
                "not all machines find the same training videos, and the same last.pt in"
                f" {self.folder}, whose disk they must share"
            )
        done = f", resumed in epoch {self.epoch + 1} after step {self.step}" if self.resumed else ""
        say(f"writes    {self.folder}{done}")
        if rank() == 0:
            os.makedirs(self.folder, exist_ok=True)
            for path in [] if self.resumed else run_files(self.folder):
                os.remove(path)
        self.save()  # if this cannot be written, better to know it now

    def before_step(self, unreadable):
        """Save when it is time; after a signal, in whatever process, save and end in all of them.

        unreadable: messages of the step's videos.
        """
        due = rank() == 0 and time.monotonic() > self.saved + self.save_every
        signalled, due = all_sum(len(self.signals), due)
        if signalled or due:
            self.save()
        if signalled:
            raise SystemExit(max(self.signals, default=143))
        self.messages += unreadable

    def after_step(self, loss):
        """loss: this process's part of it, on the device."""
        self.losses.append(loss.detach())
        self.step += 1
        if len(self.losses) == STEPS_PER_CHECK:
            self.add_up()

    def add_up(self):
        """Add what has gathered to the counters; end the run if losses or videos are too bad."""
        values = torch.stack(self.losses).tolist() if self.losses else []
        for loss in all_sum(*values):
            self.loss_sum += loss / world_size()
        if not math.isfinite(self.loss_sum):
            self.end(
                f"a loss in steps {self.step - len(values) + 1} to {self.step} of epoch"
                f" {self.epoch + 1} is not finite, so nothing is saved any more; try a lower --lr,"
                " or --clip-grad 1"
            )
        self.mean_loss = self.loss_sum / self.step if self.step else math.nan
        messages = gather(self.messages)
        self.log_failures(messages)
        self.failed = sorted({*self.failed, *messages})
        self.losses, self.messages = [], []
        if len(self.failed) > MAX_FAILED * self.num_videos:
            self.end(
                f"{len(self.failed)} training videos could not be read in epoch {self.epoch + 1},"
                f" and a run stops above {MAX_FAILED:.0%}; {self.folder}/failed.txt lists them"
            )

    def save(self):
        """Write last.pt and log.jsonl, unless a loss or a weight is not finite any more."""
        self.add_up()
        content = self.checkpoint()
        weights = [w for w in content["weights"].values() if w.is_floating_point()]
        if not torch.nn.utils.get_total_norm(weights).isfinite():
            self.end(
                "weights are not finite any more, so they are not saved; try a lower --lr, or"
                " --clip-grad 1"
            )
        if rank() == 0:
            write_checkpoint(f"{self.folder}/last.pt", content)
            lines = "".join(json.dumps(line) + "\n" for line in self.log)
            write_file(f"{self.folder}/log.jsonl", lines.encode())
        self.saved = time.monotonic()

    def end_epoch(self, line, errors):
        """line: the epoch's of the log, val_top1 in it; errors: of its validation videos."""
        self.log_failures(errors)
        if rank() == 0 and line["val_top1"] > self.best:
            write_checkpoint(f"{self.folder}/best.pt", self.checkpoint() | {"training": None})
        self.best = max(self.best, line["val_top1"])
        self.epoch, self.step, self.loss_sum, self.failed = self.epoch + 1, 0, 0.0, []
        self.log.append(line)
        self.save()

    def log_failures(self, messages):
        """Add to failed.txt what is new in this epoch."""
        new = {" ".join(message.splitlines()) for message in messages}.difference(self.failed)
        if rank() == 0 and new:
            # A path may be any bytes.
            with open(f"{self.folder}/failed.txt", "a", errors="surrogateescape") as file:
                file.writelines(f"{message}\n" for message in sorted(new))

    def end(self, why):
        """Called in all processes alike: the first one says why."""
        raise SystemExit(why if rank() == 0 else 1)
