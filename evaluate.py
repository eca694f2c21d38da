"""The accuracy of a trained model over all views of every video, or what is in a video.

    python evaluate.py runs/demo-dualpath-s0/best.pt             # data and views of the run
    python evaluate.py CKPT --data folder --root DIR --views 3x1 # other ones
    python evaluate.py CKPT clip.mp4                             # the five likeliest classes
    torchrun --nproc_per_node=8 evaluate.py CKPT                 # eight processes, same figures

Every video counts exactly once, and one that cannot be read counts as wrong.
"""

import argparse
import csv
import json
import os
from collections import Counter
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Subset

from data import VideoViews
from model import load_checkpoint, prepare
from support.datasets import SOURCES, digest, find_videos
from support.options import add_options, natural, positive_int, views
from support.processes import (
    UserError,
    autocast_type,
    gather,
    processes,
    progress_bar,
    rank,
    rank_zero_first,
    say,
    start_worker,
    world_size,
)


class Prediction(NamedTuple):
    """What the model predicts for one video: its likeliest classes, at most five, with scores."""

    index: int
    label: int
    classes: list
    scores: list
    error: str | None  # why it cannot be read; then there are no classes


@torch.no_grad()
def predict(model, test_views, device, dtype=None, batch=16, workers=0):
    """Softmax averaged over all views of each video → Predictions, in order, in every process.

    test_views: data.VideoViews. Every video counts exactly once, whatever the number of processes.
    """
    model.eval()
    # Uneven shards are no problem for the bare model; a DDP wrapper would wait for missing batches.
    shard = Subset(test_views, range(rank(), len(test_views), world_size()))
    loader = DataLoader(
        shard,
        batch,
        collate_fn=list,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )
    predictions, on_device = [], []
    for videos in progress_bar(loader, "evaluating", unit="batch"):
        readable = [v for v in videos if not v.error]
        predictions += [Prediction(v.index, v.label, [], [], v.error) for v in videos if v.error]
        if not readable:
            continue
        pixels = torch.stack([video.pixels.to(device, non_blocking=True) for video in readable])
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(pixels.flatten(0, 1))  # (B · views, classes)
        scores = logits.float().softmax(-1).unflatten(0, pixels.shape[:2]).mean(1)  # (B, classes)
        ids = [(video.index, video.label) for video in readable]  # not their pixels
        top, classes = scores.topk(min(5, scores.shape[1]))
        on_device.append((ids, top, classes))
    for ids, top, classes in on_device:  # copied only now: each copy waits for the device
        for (index, label), s, c in zip(ids, top.tolist(), classes.tolist()):
            predictions.append(Prediction(index, label, c, s, None))
    return sorted(gather(predictions))


def summarise(predictions):
    """Accuracies as fractions of all videos, unreadable ones being wrong.

    mean_class: top-1 of each class that has videos, averaged over these classes.
    """
    top1 = sum(p.label in p.classes[:1] for p in predictions)
    top5 = sum(p.label in p.classes for p in predictions)
    failed = sum(p.error is not None for p in predictions)
    videos_of = Counter(p.label for p in predictions)
    hits_of = Counter(p.label for p in predictions if p.label in p.classes[:1])
    return {
        "videos": len(predictions),
        "failed": failed,
        "top1": top1 / len(predictions),
        "top5": top5 / len(predictions),
        "mean_class": sum(hits_of[c] / n for c, n in videos_of.items()) / len(videos_of),
    }


# ---------------------------------------------------------------- as a script
# name: (default, type or choices, help)
# fmt: off
DATA_OPTIONS = {
    "data": ("demo", tuple(SOURCES), "the data set, or the layout of your videos"),
    "root": (None, str, "its folder (data/NAME)"),
    "split": (None, (1, 2, 3), "of HMDB51 (1)"),
}
MACHINE_OPTIONS = {
    "workers": (min(8, os.cpu_count()), natural, "processes that read videos"),
    "compile": (False, bool, "torch.compile the blocks"),
    "amp": ("auto", ("auto", "bf16", "fp16", "off"), "mixed precision; auto: on CUDA GPUs"),
    "device": ("auto", ("auto", "cuda", "mps", "cpu"),
               "where to run; auto: a GPU if there is one"),
}
OPTIONS = DATA_OPTIONS | {
    "data": (None, tuple(SOURCES), "the data set (the run's)"),
    "views": (None, views, "views per video, whose scores are averaged (the run's)"),
    "limit": (None, positive_int, "only the first N videos (all)"),
    "shuffled": (False, bool, "frames in random order: is time used?"),
    "predictions": (None, str, "CSV file for each video's classes and scores"),
    "backbone": (None, str, "where the image model is, if not where it was in training"),
    "pretrained": (None, str, "likewise, the file or tag of its weights"),
    "batch": (8, positive_int, "videos per process and step"),
} | MACHINE_OPTIONS
# fmt: on


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="evaluate.py", usage="python evaluate.py CHECKPOINT [VIDEO ...] [options]"
    )
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run")
    files = "files to be classified; without any, a data set is evaluated"
    parser.add_argument("video", nargs="*", help=files)
    add_options(parser, OPTIONS)
    return parser.parse_intermixed_args(argv)


def main(argv=None):
    """Returns 1 if a video that the command line names cannot be read."""
    args = parse(argv)
    with processes("evaluate.py", args.device) as device:
        dtype = autocast_type(args.amp, device)
        where = (args.checkpoint, args.backbone, args.pretrained)
        model, content = rank_zero_first(lambda: load_checkpoint(*where))
        settings = content["run"]  # train.py's options, class names and digests of lists
        prepare(model.to(device), dtype, args.compile)
        args.views = args.views or tuple(settings["views"])
        if args.video:
            samples, missing = [(path, -1) for path in args.video], 0
        else:
            videos = rank_zero_first(lambda: find_test_set(args, settings))
            samples = videos.val[: args.limit]
            missing = sum(split == "val" for split, _ in videos.missing)
        if args.predictions:
            open(args.predictions, "a").close()  # better refused now than after the evaluation
        shape = (model.config.frames, model.visual.image_size[0])
        sampling = (settings["sampling"], settings["test_stride"])
        shuffled = model.config.spatial_frames if args.shuffled else None
        test_views = VideoViews(samples, *shape, *sampling, args.views, shuffled)
        batch, workers = (1, 0) if args.video else (args.batch, args.workers)
        predictions = predict(model, test_views, device, dtype, batch, workers)
        if rank() > 0:
            return 0
        if args.predictions:
            write_predictions(args.predictions, predictions, samples, settings["classes"])
        if args.video:
            return print_classes(predictions, samples, settings["classes"])
        return report(args, predictions, samples, missing)


def find_test_set(args, settings):
    """The data set asked for, else that of the training; its classes must be the model's."""
    same = args.data in (None, settings["data"])
    args.data = args.data or settings["data"]
    if same:
        args.split = args.split or settings.get("split")
    # Only if it is there: the demo would be drawn anew wherever a checkpoint says.
    if same and args.root is None and os.path.isdir(settings["root"]):
        args.root = settings["root"]
    videos = find_videos(args.data, args.root, args.split, whole=("val",))
    if videos.classes != settings["classes"]:
        raise UserError(f"the classes of {args.data} are not those that the checkpoint knows")
    if same and settings.get("val_digest") not in (None, digest(videos.val)):
        say("note: the training had other validation videos; it may have seen some of these")
    return videos


def print_classes(predictions, samples, classes):
    """What is in single videos; 1 if one of them cannot be read."""
    for p in predictions:
        print(p.error or samples[p.index][0])
        for c, score in zip(p.classes, p.scores):
            print(f"  {100 * score:5.1f} %  {classes[c]}")
    return int(any(p.error for p in predictions))


def write_predictions(path, predictions, samples, classes):
    """A line a video: its path, its label if it has one, then pairs of a class and its score."""
    header = ["video", "label"]
    for i in range(1, 1 + min(5, len(classes))):
        header += [f"class{i}", f"score{i}"]
    with open(path, "w", newline="", errors="surrogateescape") as out:
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow(header)
        for p in predictions:
            cells = [samples[p.index][0], classes[p.label] if p.label >= 0 else ""]
            for c, score in zip(p.classes, p.scores):
                cells += [classes[c], f"{score:.6f}"]
            lines.writerow(cells)


def report(args, predictions, samples, missing):
    """Print the accuracy of a data set, and write it beside the checkpoint."""
    clips, crops = args.views
    result = summarise(predictions)
    asked = ("checkpoint", "data", "views", "split", "limit", "shuffled")
    result |= {name: getattr(args, name) for name in asked}
    unreadable = [samples[p.index][0] for p in predictions if p.error]
    result |= {"missing": missing, "digest": digest(samples), "unreadable": unreadable}
    print(
        f"top-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   mean class accuracy"
        f" {result['mean_class']:.2%}   ({len(predictions)} videos, {clips} clips x {crops} crops;"
        f" unreadable, and so wrong: {len(unreadable)}; missing: {missing})"
    )
    part = f"-split{args.split}" if args.split else ""
    part += f"-first{args.limit}" if args.limit else ""
    part += "-shuffled" if args.shuffled else ""
    checkpoint = os.path.splitext(args.checkpoint)[0]
    file = f"{checkpoint}.{args.data}{part}-{clips}x{crops}.json"
    with open(file, "w") as out:
        json.dump(result, out, indent=1)
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
