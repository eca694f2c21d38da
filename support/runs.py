"""A training run's folder: when to save, who was signalled, what went wrong, the log.

last.pt is all that resuming needs, best.pt the best weights, log.jsonl a line an epoch, failed.txt
the videos that could not be read. A run that is cut off, anywhere, and resumed ends as one that
was not: what is drawn depends on (seed, epoch, index) or (seed, step), all else is in last.pt.
"""

import hashlib
import io
import json
import math
import os
import re
import time
import zipfile

import open_clip
import torch

from support.processes import UserError, all_sum, gather, in_turn, on_signals, rank, say, world_size

MARK = b"\nsha256 "  # followed by the SHA-256 of all before it, in hexadecimal
MAX_VALUES = 10**6


def saved_weights(model):
    """What a checkpoint holds: the trained weights; where the frozen ones are random, those too."""
    everything = model.config["pretrained"] is None
    state = model.state_dict(keep_vars=True)
    return {k: v.detach() for k, v in state.items() if v.requires_grad or everything}


def normalisation(model):
    """Of the image model's pixels; weights alone do not show them."""
    return [list(model.visual.image_mean), list(model.visual.image_std)]


def save_checkpoint(path, model, settings, training=None):
    """Write what was trained, atomically; raises UserError, upon which the old file stays.

    settings: plain values that describe data and recipe, class names among them. training: what
    resuming needs, or None.
    """
    content = {
        "format": 1,
        "model": model.config,
        "weights": saved_weights(model),
        "fingerprint": model.fingerprint,
        "normalisation": normalisation(model),
        "run": settings,
        "training": training,
        "versions": {"torch": str(torch.__version__), "open_clip": open_clip.__version__},
    }
    body = io.BytesIO()
    torch.save(content, body)
    seal = MARK + hashlib.sha256(body.getbuffer()).hexdigest().encode()
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.writelines([body.getbuffer(), seal])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = error.strerror or error
        raise UserError(f"cannot write {path}, which stays as it was: {reason}") from error


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
    try:
        content = unpack(body)
    except Exception as error:  # pickle, zip and C++ readers each raise their own kinds
        reason = "it holds other things than this project's plain values and tensors"
        if type(error) is ValueError:  # our own
            reason = error
        raise UserError(f"{path} is refused: {reason}") from error
    return content


def unpack(body):
    """The content of an archive, whoever made it; raises where it is not what we write."""
    entries = zipfile.ZipFile(io.BytesIO(body)).infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it unpacks to more than it holds")
    if sum(entry.file_size for entry in entries) > len(body):
        raise ValueError("its entries share their bytes")
    content = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    check_plain(content)
    if content["format"] != 1:
        raise ValueError(f"its format is {content['format']}, and this version reads 1")
    if len(content["run"]["classes"]) != content["model"]["num_classes"]:
        raise ValueError("its names are those of other classes")
    return content


def check_plain(content):
    """Raise unless all parts are of kinds that checkpoints hold, no tensor larger than its bytes.

    Parts are counted: a list may hold itself many times over.
    """
    parts, count = [content], 0
    while parts:
        part, count = parts.pop(), count + 1
        if count > MAX_VALUES:
            raise ValueError("it holds too many values")
        if type(part) is dict:
            parts += [*part, *part.values()]
        elif type(part) in (list, tuple):
            parts += part
        elif isinstance(part, torch.Tensor):
            if not (part.is_cpu and part.is_contiguous()):
                raise ValueError("it holds a tensor that is larger than its bytes")
        elif type(part) not in (str, int, float, bool, type(None)):
            raise ValueError(f"it holds a {type(part).__name__}")


def load_weights(model, content, path, head=True):
    """Copy a checkpoint's weights, or all but its head's, into a model that was built alike."""
    own, weights = saved_weights(model), content["weights"]
    if not head:
        own = {k: v for k, v in own.items() if not k.startswith("head.")}
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
    configs = content["model"], model.config
    theirs, ours = (f"{config['method']} around {config['backbone']!r}" for config in configs)
    check_fit(own, weights, f"{path}, of {theirs}, does not fit this {ours}")
    pixels = content.get("normalisation")  # older checkpoints do not have it
    if pixels not in (None, normalisation(model)):
        raise UserError(
            f"{path} was trained on pixels of mean and deviation {pixels}, and this {ours} has"
            f" {normalisation(model)}"
        )
    tag = content["model"]["pretrained"]
    if tag is not None and model.fingerprint != content["fingerprint"]:
        raise UserError(
            f"{path}, of {theirs} with weights {tag!r}, needs other frozen weights, or another"
            f" image size, than this {ours} has"
        )
    model.load_state_dict(weights, strict=False)


def check_fit(own, theirs, what):
    """UserError where a tensor of two state dicts is missing, surplus or misshapen."""
    want, have = tensor_shapes(own), tensor_shapes(theirs)
    wrong = [f"{name} is missing" for name in want if name not in have]
    wrong += [f"{name} is not expected" for name in have if name not in want]
    for name in want:
        if name in have and have[name] != want[name]:
            wrong.append(f"{name} has shape {have[name]}, not {want[name]}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{what}: {'; '.join(wrong[:3])}{more}")


def tensor_shapes(state):
    return {k: tuple(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor)}


OURS = r"(last|best)\.(pt|pt\.tmp|.+\.json)|log\.jsonl(\.tmp)?|failed\.txt"  # files of a run
# Options that may differ between a run and its continuation.
FREE = (
    "out root init resume overwrite workers micro_batch compile checkpoint_activations save_every"
    " device"
).split()


def find_checkpoint(args, defaults):
    """The content of the checkpoint to continue from, or None for a new run; raises UserError.

    A run that is in the way is refused: two in one folder would spoil each other. defaults: of
    options, for those that are younger than the run.
    """
    last = os.path.join(args.out, "last.pt")
    names = os.listdir(args.out) if os.path.isdir(args.out) else []
    occupied = any(re.fullmatch(OURS, n) and not n.endswith(".tmp") for n in names)
    path = last if args.resume is True else args.resume
    if path is not None and (args.resume is not True or os.path.exists(last)):
        content = read_checkpoint(path)
        check_continues(content, path, args, defaults)
        if os.path.abspath(path) == os.path.abspath(last) or not occupied:
            return content
    if occupied and not args.overwrite:
        resume = "--resume continues it" if os.path.exists(last) else "no last.pt to resume from"
        raise UserError(
            f"{args.out} holds a run already: {resume}, --overwrite deletes it, --out DIR goes"
            " elsewhere"
        )
    if args.resume:
        say(f"note: there is no {last} to resume from, so the run starts afresh")
    return None


def check_continues(content, path, args, defaults):
    """Refuse a checkpoint that cannot be resumed, or not with these options."""
    if "step" not in (content["training"] or {}):
        raise UserError(
            f"{path} holds weights only, like best.pt (or comes from an older version), and cannot"
            " be resumed: --init starts from them"
        )
    was = defaults | content["run"]
    differ = []
    for name, value in vars(args).items():
        if name not in FREE and was.get(name) != value:
            differ.append(f"--{name.replace('_', '-')} {value} (was {was.get(name)})")
    if differ:
        raise UserError(f"{path} is of a run with other options: {', '.join(differ)}")


COUNTERS = ("epoch", "step", "loss_sum", "failed", "best", "log")
MAX_FAILED = 0.05  # the share of training videos that may be unreadable
STEPS_PER_CHECK = 20  # reading a loss waits for the device


class Run:
    """The folder, the counters, and the state dicts of what is trained; it trains nothing itself.

    epoch: whole epochs done. Of the next one: step, its steps so far; loss_sum, the sum of their
    losses; failed, the messages of unreadable videos. best: the best accuracy. log: the lines of
    log.jsonl. states: what has a state_dict: optimizer, scheduler and scaler, by these names.
    """

    def __init__(self, folder, save_every, settings, samples, model, states, resumed=None):
        """save_every: minutes. settings: what a checkpoint tells of the run. samples: (path, label)
        pairs, to name what is bad. resumed: the content of the checkpoint to continue from.
        """
        self.folder, self.save_every = folder, 60 * save_every
        self.settings, self.samples, self.model, self.states = settings, samples, model, states
        self.epoch, self.step, self.loss_sum = 0, 0, 0.0
        self.failed, self.best, self.log = [], -1.0, []
        self.losses, self.messages = [], []  # of this process, since they were last added up
        self.signals, self.order, self.no_clips = [], [], False
        if resumed:
            self.restore(resumed["training"])
        if len(set(gather([(self.epoch, self.step, settings["train_digest"])]))) > 1:
            raise UserError(
                "not all machines find the same training videos, and the same last.pt in"
                f" {self.folder}: its disk must be one they share"
            )
        self.resumed = resumed is not None

    def restore(self, training):
        for name in COUNTERS:
            setattr(self, name, training[name])
        for name, part in self.states.items():
            part.load_state_dict(training[name] or part.state_dict())  # {}: a scaler that is off
        for p, kept in self.states["optimizer"].state.items():
            if any(value.shape not in ((), p.shape) for value in kept.values()):
                raise UserError("the optimiser's state in the checkpoint does not fit the model")

    def start(self):
        """From here on the folder is this run's."""
        if self.resumed:
            say(f"writes    {self.folder}, resumed after epoch {self.epoch} and {self.step} steps")
        else:
            say(f"writes    {self.folder}")
        in_turn(self.clear_folder)
        if not os.path.exists(self.path("best.pt")):
            self.best = -1.0  # the checkpoint came from elsewhere, alone
        self.save()  # if this cannot be written, better to know it now

    def clear_folder(self):
        """Make the folder, and delete what an earlier run has left there, and nothing else."""
        if rank() > 0:
            return
        os.makedirs(self.folder, exist_ok=True)
        for name in os.listdir(self.folder):
            if not self.resumed and re.fullmatch(OURS, name):
                os.remove(self.path(name))

    def path(self, name):
        return os.path.join(self.folder, name)

    # ------------------------------------------------------------ within an epoch

    def begin_epoch(self, order):
        """order: this process's clips of each step, (epoch, index) pairs, to name a bad one's."""
        self.order, self.signals, self.no_clips = order, [], False
        self.first_step, self.started, self.saved = self.step, time.perf_counter(), time.monotonic()

    def signals_deferred(self):
        """Inside, a signal waits for the end of a step, and for what is saved then."""
        return on_signals(self.note_signal)

    def exit_if_stopped(self):
        """After the steps of an epoch: end here, in all processes, if they were cut short."""
        if self.no_clips:
            self.end(
                "ten training videos, one after the other, could not be read;"
                f" {self.path('failed.txt')} lists them"
            )
        if any(all_sum(len(self.signals))):
            raise SystemExit(max(self.signals, default=143))
        self.seconds = time.perf_counter() - self.started

    def note_signal(self, status):
        if world_size() == 1 and status == 130 and 130 in self.signals:
            raise SystemExit(status)  # a second Ctrl-C does not wait
        self.signals.append(status)

    def must_stop(self, unreadable, no_clips=False):
        """Before each step: whether to leave the epoch, as all processes agree; saves when due.

        unreadable: messages of the step's videos. no_clips: they were too many to go on.
        """
        due = rank() == 0 and time.monotonic() > self.saved + self.save_every
        signalled, due, no_clips = all_sum(len(self.signals), due, no_clips)
        if signalled:
            return True
        if due:
            self.save()
            self.saved = time.monotonic()
        self.messages += unreadable
        self.no_clips = no_clips > 0
        return self.no_clips

    def count_step(self, loss):
        """After each step; loss: this process's part of it, on the device."""
        self.losses.append(loss.detach())
        self.step += 1
        if len(self.losses) == STEPS_PER_CHECK:
            self.add_up()

    def add_up(self):
        """Add what has gathered to the counters; end the run if losses or videos are too bad."""
        values = torch.stack(self.losses).tolist() if self.losses else []
        first = self.step - len(values)
        for i, loss in enumerate(all_sum(*values)):
            if not math.isfinite(loss):
                self.end_with_bad_loss(first + i, values[i])
            self.loss_sum += loss / world_size()
        messages = gather(self.messages)
        self.failed = sorted({*self.failed, *messages})
        self.log_failures(messages)
        self.losses, self.messages = [], []
        if len(self.failed) > MAX_FAILED * len(self.samples):
            self.end(
                f"{len(self.failed)} training videos could not be read in epoch {self.epoch + 1},"
                f" and a run stops above {MAX_FAILED:.0%}; {self.path('failed.txt')} lists them"
            )

    def progress(self):
        """For the progress bar: the mean loss so far, and the learning rate."""
        counted = self.step - len(self.losses)
        if counted == 0:
            return ""
        lr = self.states["scheduler"].get_last_lr()[0]
        return f"loss {self.loss_sum / counted:.3f}, lr {lr:.2e}"

    # ------------------------------------------------------------ between epochs

    def end_epoch(self, scores, batch):
        """Log the epoch, whose validation gave `scores` (evaluate.summarise's), and save.

        batch: clips a step.
        """
        schedule, optimizer = self.states["scheduler"], self.states["optimizer"]
        taken = max((int(kept["step"]) for kept in optimizer.state.values()), default=0)
        line = {
            "epoch": self.epoch + 1,
            "lr": schedule.base_lrs[0]
            * schedule.lr_lambdas[0](schedule.last_epoch - 1),  # last step's
            "train_loss": self.loss_sum / self.step,
            "val_top1": scores["top1"],
            "val_top5": scores["top5"],
            "clips_per_second": round((self.step - self.first_step) * batch / self.seconds, 2),
            "seconds": round(time.perf_counter() - self.started, 2),
            "failed": len(self.failed),
            "val_failed": scores["failed"],
            "skipped": schedule.last_epoch - taken,  # with fp16 not every step is taken
        }
        if rank() == 0 and scores["top1"] > self.best:
            save_checkpoint(self.path("best.pt"), self.model, self.settings)
        self.best = max(self.best, scores["top1"])
        self.epoch, self.step, self.loss_sum, self.failed = self.epoch + 1, 0, 0.0, []
        self.log.append(line)
        self.save()
        say(
            f"epoch {line['epoch']:3d}   loss {line['train_loss']:.3f}"
            f"   top-1 {100 * line['val_top1']:.2f} %   top-5 {100 * line['val_top5']:.2f} %"
            f"   {line['clips_per_second']:.1f} clips/s   {line['seconds']:.0f} s" + problems(line)
        )

    def finish(self):
        if self.best >= 0:  # else best.pt has stayed where the checkpoint came from
            path = self.path("best.pt")
            say(f"best top-1 {100 * self.best:.2f} %; evaluate it with: python evaluate.py {path}")

    # ------------------------------------------------------------ files

    def save(self):
        """Write last.pt and log.jsonl, unless a loss or a weight is not finite any more."""
        self.add_up()
        trained = [p.detach() for p in self.model.parameters() if p.requires_grad]
        if not torch.nn.utils.get_total_norm(trained).isfinite():
            self.end(
                "weights are not finite any more, so they are not saved; try a lower --lr, or"
                " --clip-grad 1"
            )
        if rank() > 0:
            return
        training = {name: getattr(self, name) for name in COUNTERS}
        training |= {name: part.state_dict() for name, part in self.states.items()}
        save_checkpoint(self.path("last.pt"), self.model, self.settings, training)
        log = self.path("log.jsonl")  # no line twice, and none that last.pt does not know
        with open(f"{log}.tmp", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.log)
        os.replace(f"{log}.tmp", log)

    def log_failures(self, messages):
        """Add to failed.txt the messages that it does not have yet."""
        if rank() > 0 or not messages:
            return
        with open(self.path("failed.txt"), "a+", errors="surrogateescape") as file:  # any bytes
            file.seek(0)
            known = file.read().split("\n")
            new = {" ".join(message.splitlines()) for message in messages}.difference(known)
            file.writelines(f"{line}\n" for line in sorted(new))

    def end_with_bad_loss(self, step, own_loss):
        paths = []
        if not math.isfinite(own_loss):
            paths = [self.samples[i][0] for _, i in self.order[step]]
        self.end(
            f"the loss of step {step + 1} of epoch {self.epoch + 1} is not finite, so nothing is"
            " saved any more; try a lower --lr, or --clip-grad 1; the step's clips: "
            + ", ".join(gather(paths))
        )

    def end(self, why):
        """Called in all processes alike."""
        raise SystemExit(why if rank() == 0 else 1)


def problems(line):
    """The end of an epoch's line on the terminal."""
    words = ""
    if line["failed"] or line["val_failed"]:
        words += f"   {line['failed']} + {line['val_failed']} unreadable, see failed.txt"
    if line["skipped"]:
        words += f"   {line['skipped']} steps skipped so far"
    return words
