"""The accuracy of a trained model over all views of every video, or what is in a video.

    python evaluate.py runs/demo-dualpath-s0/best.pt                      # data and views as in training
    python evaluate.py CKPT --data folder --root DIR --views 3x1          # other ones
    python evaluate.py CKPT clip.mp4 another.mp4                          # the five likeliest classes of each
    torchrun --nproc_per_node=8 evaluate.py CKPT                          # eight processes, the same figures
"""
import argparse
import contextlib
import csv
import datetime
import hashlib
import json
import os
import re
import signal
import sys
import traceback
from concurrent.futures import BrokenExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

import data
import model as models

# ---------------------------------------------------------------- processes: one, or as many as torchrun starts
REFUSALS = (models.ModelError, data.DataError, OSError, BrokenExecutor)  # what users can mend: a sentence, no traceback
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

@contextlib.contextmanager
def processes(script):
    """(rank, world, device), in a process group exactly if torchrun started us, until the work inside ends, however it ends."""
    cuda, grouped, rank, world = torch.cuda.is_available(), "RANK" in os.environ, 0, 1
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    cuda and torch.cuda.set_device(device)
    if grouped:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # processes that torchrun restarts find the addresses of the dead, else
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world,
                                timeout=datetime.timedelta(hours=1))  # one may draw or download for long while the others wait
    try:
        with on_signals(sys.exit):
            yield rank, world, device
    except BaseException as error:
        # A DDP wrapper that outlives the group can wait forever for a thread of gloo that waits for Python's lock.
        traceback.clear_frames(error.__traceback__)
        for worker in torch.multiprocessing.active_children():  # else their videos in hand would be waited for
            worker.kill()
        what = str(error).strip().split("\n")
        if isinstance(error, REFUSALS):
            raise SystemExit(f"{script}: {what[-1]}")
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" in what[0]:
            raise SystemExit(f"{script}: a process that reads videos has died; if for want of memory, fewer --workers ({what[0]})")
        if isinstance(error, RuntimeError) and grouped and re.search("by peer|Broken pipe|imed out|remote process", str(error)):
            raise SystemExit(f"{script}: process {rank} has lost another, which may have said why ({what[0]})")
        if not isinstance(error, SystemExit):
            raise  # the group is not left in order: NCCL would wait for processes that wait for this one
        if error.code in (130, 143) and rank == 0:
            print(f"{script}: stopped by a signal" + "; --resume continues the run" * (script == "train.py"))
        grouped and dist.destroy_process_group()
        raise
    grouped and dist.destroy_process_group()

@contextlib.contextmanager
def on_signals(act):
    """What Ctrl-C, SIGTERM and Slurm's SIGUSR1 do inside: act(the status with which a shell expects us to end)."""
    before = {n: signal.signal(n, lambda n, _: act(130 if n == signal.SIGINT else 143)) for n in SIGNALS}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)

def leave_signals_to_the_parent(worker):
    """For data workers: a signal to all processes of a job is the training process's to answer, and then it ends them."""
    for n in SIGNALS:
        signal.signal(n, signal.SIG_IGN)

def gather(rows):
    """The lists of all processes, joined, in every process."""
    shards = [rows] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(shards, rows)
    return [row for shard in shards for row in shard]

def agree(*numbers):
    """The sums of these numbers over all processes, by way of their CPUs, so that nobody waits for a GPU."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()

def in_turn(work):
    """work() in the first process, then in the others, so that what it draws or downloads is there for them. Where it
    refuses in one process all of them end, and the first prints the one sentence."""
    rank, result, refusal = dist.get_rank() if dist.is_initialized() else 0, None, None
    for mine in (rank == 0, rank > 0):
        try:
            result = work() if mine else result
        except REFUSALS as error:
            refusal = str(error)
        if any(refusals := gather([refusal])):
            raise SystemExit(f"{os.path.basename(sys.argv[0])}: {next(filter(None, refusals))}" if rank == 0 else 1)
    return result

# ---------------------------------------------------------------- accuracy
def autocast_type(name, device):
    """The compute type of --amp: auto is bfloat16 on GPUs that have it, float16 on others, none on CPUs."""
    if name == "off" or (name == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise models.ModelError(f"--amp {name} needs a CUDA GPU, and there is none: leave it out")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if name == "auto" else name == "bf16"
    return torch.bfloat16 if bf16 else torch.float16

class Views(Dataset):
    """All test views of labelled videos: item i → ((clips × crops, T, 3, S, S) uint8, label, i, None), from one decode of the
    video; or (None, label, i, message) of one that cannot be read, for which nothing is ever substituted."""

    def __init__(self, samples, num_frames, size, sampling="dense", stride=1, views=(1, 1)):
        self.samples, self.num_frames, self.size, self.sampling, self.stride = samples, num_frames, size, sampling, stride
        self.views = views

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        (path, label), (clips, crops) = self.samples[index], self.views
        # dense: starts evenly spread over the video; uniform: points evenly spread over each segment
        places = [0.5 if clips == 1 else c / (clips - 1) if self.sampling == "dense" else (c + 0.5) / clips for c in range(clips)]
        plan = lambda n: np.concatenate([data.clip_frames(n, self.num_frames, self.sampling, self.stride, p) for p in places])
        try:
            frames = torch.from_numpy(data.read_frames(path, plan)).permute(0, 3, 1, 2)
        except data.VideoError as error:
            return None, label, index, str(error)
        views = [crop for clip in frames.split(self.num_frames) for crop in test_crops(clip, self.size, crops)]
        return torch.stack(views), label, index, None

def test_crops(clip, size, crops):
    """(T, 3, H, W) with the shorter side resized to `size` → 1 (centre) or 3 (start, centre, end of the longer side) squares."""
    clip = F.resize(clip, [size], antialias=True)
    room = [clip.shape[-2] - size, clip.shape[-1] - size]
    places = [0.5] if crops == 1 else [c / (crops - 1) for c in range(crops)]
    return [F.crop(clip, round(room[0] * p), round(room[1] * p), size, size) for p in places]

@torch.no_grad()
def predict(model, clips, device, dtype=None, batch=16, workers=0, title="evaluating"):
    """Softmax averaged over all views of each video; every video exactly once, whatever the number of processes. clips: the Views.
    Returns a row per video, in order, the same in every process: (index, label, likeliest classes (≤ 5), their scores, None), or
    (index, label, [], [], error)."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    was_training = model.training
    model.eval()
    # Uneven shards are no problem for the bare module; a DDP wrapper would wait for the missing batches.
    shard = Subset(clips, range(rank, len(clips), world))
    loader = DataLoader(shard, batch, collate_fn=list, num_workers=workers, pin_memory=device.type == "cuda",
                        worker_init_fn=leave_signals_to_the_parent)
    rows, batches = [], []
    try:
        for videos in tqdm(loader, title, unit="batch", leave=False, disable=rank > 0):
            rows += [(index, label, [], [], error) for views, label, index, error in videos if views is None]
            videos = [video for video in videos if video[0] is not None]
            if not videos:
                continue
            views = torch.stack([video[0].to(device, non_blocking=True) for video in videos])  # (B, views, T, 3, H, W)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(views.flatten(0, 1))
            scores = logits.float().softmax(-1).unflatten(0, views.shape[:2]).mean(1)  # (B, classes)
            scores, classes = scores.topk(min(5, scores.shape[1]))
            batches.append(([video[1:3] for video in videos], classes, scores))
    except SystemExit:  # a signal
        tqdm.write(f"{title}: {len(rows) + sum(len(batch[0]) for batch in batches)} of {len(shard)} videos were done")
        raise
    for videos, classes, scores in batches:  # read from the device only now, since every read waits for it
        rows += [(index, label, c, s, None) for (label, index), c, s in zip(videos, classes.tolist(), scores.tolist())]
    model.train(was_training)
    return sorted(gather(rows))

def summarise(rows):
    """Accuracies as fractions: over all videos, where one that cannot be read counts as wrong, and over the readable."""
    top1 = sum(classes[:1] == [label] for _, label, classes, _, _ in rows)
    top5 = sum(label in classes for _, label, classes, _, _ in rows)
    failed = sum(error is not None for *_, error in rows)
    readable = max(1, len(rows) - failed)
    return dict(videos=len(rows), failed=failed, top1=top1 / len(rows), top5=top5 / len(rows),
                top1_readable=top1 / readable, top5_readable=top5 / readable)

def fingerprint(samples):
    """SHA-256 over the names and labels of videos, whatever their folders and containers: two downloads of Kinetics differ
    by hundreds of videos, and their accuracies by as much as papers argue about."""
    lines = sorted(f"{os.path.splitext(os.path.basename(path))[0]}\t{label}\n" for path, label in samples)
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()

at_least = lambda least: number(least, kind=int, what="whole number")
def number(least, most=float("inf"), kind=float, what="number"):
    """The type, for argparse, of numbers from `least` to `most`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {least}" + f" to {most}" * (most < float("inf")))
    return parse

def parse_views(text):
    """'3x1' → (3 clips, 1 crop)."""
    match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not CLIPSxCROPS, such as 3x1")
    return int(match[1]), int(match[2])

def main(argv=None):
    parser = argparse.ArgumentParser(description="Accuracy of a checkpoint over all views, or what is in a video.")
    parser.add_argument("checkpoint")
    parser.add_argument("video", nargs="*", default=[], help="classify these files instead of evaluating a data set")
    parser.add_argument("--data", choices=data.SOURCES, help="data set (default: the one it was trained on)")
    parser.add_argument("--root", help="folder of the data (default: the one it was trained on)")
    parser.add_argument("--split", type=int, choices=(1, 2, 3), help="HMDB51's (default: the one it was trained on)")
    parser.add_argument("--views", type=parse_views, metavar="CLIPSxCROPS", help="views per video (default: the recipe's)")
    parser.add_argument("--backbone", help="where the image model is here, if not where it was in training")
    parser.add_argument("--pretrained", help="likewise, the file or tag of its weights")
    parser.add_argument("--batch", type=at_least(1), default=8, help="videos per process and step")
    parser.add_argument("--workers", type=at_least(0), default=min(8, os.cpu_count()), help="decoding processes")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    parser.add_argument("--limit", type=at_least(1), help="only the first N videos")
    parser.add_argument("--predictions", metavar="FILE.csv", help="write each video's classes and scores")
    args = parser.parse_intermixed_args(argv)
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # a path may hold any bytes; notebooks cannot tell
    with processes("evaluate.py") as (rank, world, device):
        return evaluate(args, rank, device)

def evaluate(args, rank, device):
    def set_up():
        dtype = autocast_type(args.amp, device)
        model, content = models.load_checkpoint(args.checkpoint, args.backbone, args.pretrained)
        run = content["run"]
        if args.video:
            samples, missing = [(path, -1) for path in args.video], 0
        else:
            source = args.data or run["data"]
            same = source == run["data"]
            args.split = args.split or (run.get("split") if same else None)
            root = args.root or same and os.path.isdir(run["root"]) and run["root"]  # nothing is drawn where a checkpoint says
            videos = data.find_videos(source, root, args.split, whole=("val",))
            if videos.classes != run["classes"]:
                raise data.DataError(f"the classes of {source} ({len(videos.classes)}) are not the {len(run['classes'])} that"
                                     " the checkpoint knows")
            if rank == 0 and same and run.get("val_fingerprint") not in (None, fingerprint(videos.val)):
                print(f"note: these {len(videos.val)} validation videos are not the {run['val_videos']} of the training, which may"
                      " have seen some of them")
            samples, missing = videos.val[:args.limit], sum(split == "val" for split, _ in videos.missing)
        if args.predictions:
            open(args.predictions, "a").close()  # better now than after the evaluation
        return dtype, models.prepare(model.to(device), dtype, args.compile), run, samples, missing

    dtype, model, run, samples, missing = in_turn(set_up)
    views, names = args.views or tuple(run["views"]), run["classes"]
    clips = Views(samples, model.num_frames, model.visual.image_size[0], run["sampling"], run["test_stride"], views)
    rows = predict(model, clips, device, dtype, 1 if args.video else args.batch, 0 if args.video else args.workers)
    if rank > 0:
        return 0
    if args.video:
        for index, _, classes, scores, error in rows:
            print(clips.samples[index][0] if error is None else error)
            for c, score in zip(classes, scores):
                print(f"  {100 * score:5.1f} %  {names[c]}")
        return int(any(error for *_, error in rows))
    result = dict(summarise(rows), checkpoint=args.checkpoint, data=args.data or run["data"], views="%dx%d" % views,
                  split=args.split, limit=args.limit, missing=missing, fingerprint=fingerprint(samples),
                  unreadable=[clips.samples[row[0]][0] for row in rows if row[-1]])
    print(f"top-1 {100 * result['top1']:.2f} %   top-5 {100 * result['top5']:.2f} %   ({result['videos']} videos,"
          f" {views[0]} clips x {views[1]} crops)" + (f"; {missing} listed videos are not there" if missing else ""))
    if result["failed"]:
        print(f"{result['failed']} videos could not be read and count as wrong; over the readable ones top-1"
              f" {100 * result['top1_readable']:.2f} %, top-5 {100 * result['top5_readable']:.2f} %")
        print(*[f"  {error}" for *_, error in rows if error][:10], sep="\n")
    if args.predictions:
        with open(args.predictions, "w", newline="", errors="surrogateescape") as out:
            table = csv.writer(out)
            table.writerow(["video", "label"] + [f"{k}{i + 1}" for i in range(min(5, len(names))) for k in ("class", "score")])
            for index, label, classes, scores, _ in rows:
                table.writerow([clips.samples[index][0], names[label]]
                               + [cell for c, s in zip(classes, scores) for cell in (names[c], f"{s:.6f}")])
    file = os.path.splitext(args.checkpoint)[0] + f".{result['data']}" + f"-split{args.split}" * bool(args.split) + ".json"
    try:
        with open(file, "w") as out:
            json.dump(result, out, indent=1)
        print(f"wrote {file}")
    except OSError as error:  # a checkpoint that others own
        print(f"note: the result is not written: {error}")
    return 0

if __name__ == "__main__":
    raise SystemExit(main())
