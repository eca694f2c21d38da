"""The accuracy of a trained model over all views of every video, or what is in a video.

    python evaluate.py runs/demo-dualpath-s0/best.pt             # data and views of the run
    python evaluate.py CKPT --data folder --root DIR --views 3x1 # other ones
    python evaluate.py CKPT clip.mp4                             # the five likeliest classes
    torchrun --nproc_per_node=8 evaluate.py CKPT                 # eight processes, same figures

Every video counts exactly once, and one that cannot be read counts as wrong.
"""

import argparse
import json
import os
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import VideoViews
from model import load_checkpoint
from support import options
from support.datasets import digest, find_videos
from support.prepare import prepare
from support.processes import (
    BAR,
    UserError,
    autocast_type,
    gather,
    in_turn,
    leave_signals_to_the_parent,
    processes,
    rank,
    say,
    world_size,
)
from support.tables import write_predictions


class Prediction(NamedTuple):
    """What the model predicts for one video: its likeliest classes, at most five, with scores."""

    index: int
    label: int
    classes: list
    scores: list
    error: str | None  # why it cannot be read; then there are no classes


@torch.no_grad()
def predict(model, test_views, device, dtype=None, batch=16, workers=0, title="evaluating"):
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
        worker_init_fn=leave_signals_to_the_parent,
    )
    predictions, on_device, done = [], [], 0
    try:
        for videos in tqdm(loader, title, unit="batch", disable=rank() > 0, **BAR):
            readable = [video for video in videos if video.error is None]
            for video in videos:
                if video.error is not None:
                    predictions.append(Prediction(video.index, video.label, [], [], video.error))
            if readable:
                ids = [(video.index, video.label) for video in readable]  # not their pixels
                on_device.append((ids, *top_five(model, readable, device, dtype)))
            done += len(videos)
    except SystemExit:  # a signal
        tqdm.write(f"{title}: {done} of {len(shard)} videos were done")
        raise
    for ids, scores, classes in on_device:  # copied only now: each copy waits for the device
        for (index, label), s, c in zip(ids, scores.tolist(), classes.tolist()):
            predictions.append(Prediction(index, label, c, s, None))
    return sorted(gather(predictions))


def top_five(model, videos, device, dtype):
    """Scores and classes (B, ≤ 5) of videos, on the device; the mean over their views."""
    pixels = torch.stack([video.pixels.to(device, non_blocking=True) for video in videos])
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = model(pixels.flatten(0, 1))  # (B · views, classes)
    scores = logits.float().softmax(-1).unflatten(0, pixels.shape[:2]).mean(1)  # (B, classes)
    return scores.topk(min(5, scores.shape[1]))


def summarise(predictions):
    """Accuracies as fractions: of all videos, unreadable ones being wrong, and of the readable."""
    top1 = sum(p.label in p.classes[:1] for p in predictions)
    top5 = sum(p.label in p.classes for p in predictions)
    failed = sum(p.error is not None for p in predictions)
    readable = max(1, len(predictions) - failed)
    return {
        "videos": len(predictions),
        "failed": failed,
        "top1": top1 / len(predictions),
        "top5": top5 / len(predictions),
        "top1_readable": top1 / readable,
        "top5_readable": top5 / readable,
    }


# ---------------------------------------------------------------- as a script
def parse(argv):
    parser = argparse.ArgumentParser(
        usage="python evaluate.py CHECKPOINT [VIDEO ...] [options]",
        formatter_class=options.HelpLines,
    )
    add, whole = parser.add_argument, options.at_least(1)
    add("checkpoint", help="best.pt or last.pt of a run")
    files = "files to be classified; without any, a data set is evaluated"
    add("video", nargs="*", default=None, help=files)
    views = "views per video, whose scores are averaged (those that the run was given)"
    add("--views", type=options.views, metavar="CLIPSxCROPS", help=views)
    add = parser.add_argument_group("data set").add_argument
    options.add_data_options(add, note=" (that of the training)")
    add("--limit", type=whole, metavar="N", help="only the first N videos (all)")
    add("--predictions", metavar="FILE.csv", help="write each video's classes and scores")
    add = parser.add_argument_group("image model and machine").add_argument
    add("--backbone", metavar="NAME", help="where the image model is, if not where it was")
    add("--pretrained", metavar="TAG", help="likewise, the file or tag of its weights")
    add("--batch", type=whole, metavar="N", default=8, help="videos per process and step")
    options.add_machine_options(add)
    args = parser.parse_intermixed_args(argv)
    if args.video and args.predictions:
        parser.error("--predictions is for a data set, not for single videos")
    return args


def main(argv=None):
    args = parse(argv)
    with processes("evaluate.py", args.device) as (_, _, device):
        dtype, model, settings, samples, missing = in_turn(lambda: set_up(args, device))
        test_views = VideoViews(
            samples,
            model.num_frames,
            model.visual.image_size[0],
            settings["sampling"],
            settings["test_stride"],
            args.views,
        )
        batch, workers = (1, 0) if args.video else (args.batch, args.workers)
        predictions = predict(model, test_views, device, dtype, batch, workers)
        if rank() > 0:
            return 0
        if args.video:
            return print_classes(predictions, samples, settings["classes"])
        return report(args, predictions, samples, missing, settings["classes"])


def set_up(args, device):
    """→ compute type, model on the device, the training's settings, videos, how many are missing.

    Where args.views, data and split are not given, they become the training's.
    """
    dtype = autocast_type(args.amp, device)
    model, content = load_checkpoint(args.checkpoint, args.backbone, args.pretrained)
    settings = content["run"]
    args.views = args.views or tuple(settings["views"])
    if args.video:
        samples, missing = [(path, -1) for path in args.video], 0
    else:
        videos = find_test_set(args, settings)
        samples = videos.val[: args.limit]
        missing = sum(split == "val" for split, _ in videos.missing)
    if args.predictions:
        open(args.predictions, "a").close()  # better refused now than after the evaluation
    return dtype, prepare(model.to(device), dtype, args.compile), settings, samples, missing


def find_test_set(args, settings):
    """The data set asked for, else that of the training; its classes must be the model's."""
    same = args.data in (None, settings["data"])
    args.data = args.data or settings["data"]
    root = args.root
    if same:
        args.split = args.split or settings.get("split")
        # Only if it is there: the demo would be drawn anew wherever a checkpoint says.
        if root is None and os.path.isdir(settings["root"]):
            root = settings["root"]
    videos = find_videos(args.data, root, args.split, whole=("val",))
    if videos.classes != settings["classes"]:
        raise UserError(
            f"the classes of {args.data} ({len(videos.classes)}) are not the"
            f" {len(settings['classes'])} that the checkpoint knows"
        )
    trained_with = settings.get("val_digest", settings.get("val_fingerprint"))  # its older name
    if same and trained_with not in (None, digest(videos.val)):
        say(
            f"note: these {len(videos.val)} validation videos are not the"
            f" {settings['val_videos']} of the training, which may have seen some of them"
        )
    return videos


def print_classes(predictions, samples, classes):
    """What is in single videos; 1 if one of them cannot be read."""
    for p in predictions:
        print(p.error or samples[p.index][0])
        for c, score in zip(p.classes, p.scores):
            print(f"  {100 * score:5.1f} %  {classes[c]}")
    return int(any(p.error for p in predictions))


def report(args, predictions, samples, missing, classes):
    """Print the accuracy of a data set, and write it beside the checkpoint."""
    num_clips, num_crops = args.views
    result = summarise(predictions) | {
        "checkpoint": args.checkpoint,
        "data": args.data,
        "views": f"{num_clips}x{num_crops}",
        "split": args.split,
        "limit": args.limit,
        "missing": missing,
        "digest": digest(samples),
        "unreadable": [samples[p.index][0] for p in predictions if p.error],
    }
    absent = f"; {missing} listed videos are missing" if missing else ""
    print(
        f"top-1 {100 * result['top1']:.2f} %   top-5 {100 * result['top5']:.2f} %"
        f"   ({len(predictions)} videos, {num_clips} clips x {num_crops} crops){absent}"
    )
    if result["failed"]:
        print(
            f"{result['failed']} videos could not be read and count as wrong; over the readable"
            f" ones top-1 {100 * result['top1_readable']:.2f} %,"
            f" top-5 {100 * result['top5_readable']:.2f} %"
        )
        errors = [p.error for p in predictions if p.error]
        print(*[f"  {error}" for error in errors[:10]], sep="\n")
    if args.predictions:
        write_predictions(args.predictions, predictions, samples, classes)
    part = f"-split{args.split}" if args.split else ""
    part += f"-first{args.limit}" if args.limit else ""
    file = f"{os.path.splitext(args.checkpoint)[0]}.{args.data}{part}.json"
    try:
        with open(file, "w") as out:
            json.dump(result, out, indent=1)
        print(f"wrote {file}")
    except OSError as error:  # a checkpoint that others own
        print(f"note: the result is not written: {error}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
