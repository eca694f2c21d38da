"""Make one training sample of every video of a data set: what is wrong with it, and how fast it is.

    python -m tools.check_data --data k400 --frames 32 --sampling dense

Writes problems-NAME.csv, a line as each is found, and prints a summary.
"""

import argparse
import csv
import time
from collections import Counter
from functools import partial

import numpy as np
import torch

from data import clip_frames, training_transform
from support import options
from support.datasets import SPLITS, find_videos
from support.processes import in_parallel, one_sentence
from support.video import VideoError, read_frames

STRIDE = 4  # of dense clips


class Problems:
    """A table of what is wrong, which keeps its lines if the work is cut off."""

    def __init__(self, file):
        self.file, self.kinds = file, Counter()
        self.table = csv.writer(file, lineterminator="\n")
        self.table.writerow(("problem", "video or class", "details"))

    def add(self, kind, what, details=""):
        self.table.writerow((kind, what, details))
        self.file.flush()
        self.kinds[kind] += 1


def try_video(num_frames, sampling, path):
    """(frames of the video, what is wrong or None, seconds of reading, of augmenting)."""
    choose = partial(
        clip_frames, num_frames=num_frames, sampling=sampling, stride=STRIDE, position=0.5
    )
    start = time.perf_counter()
    try:
        video = read_frames(path, choose)
    except VideoError as error:
        return 0, str(error), 0, 0
    read = time.perf_counter()
    frames = torch.from_numpy(video.pixels).permute(0, 3, 1, 2)
    training_transform("rand", 224)(frames).contiguous()
    return video.count, None, read - start, time.perf_counter() - read


def check_lists(videos, problems):
    """What the lists themselves tell."""
    for split, path in videos.missing:
        problems.add("missing", path, split)
    for split in SPLITS:
        labels = {label for _, label in getattr(videos, split)}
        for label, name in enumerate(videos.classes):
            if label not in labels:
                problems.add(f"no {split} video", name)


def check_videos(paths, args, problems):
    """Try each video; prints how fast samples are made."""
    enough = args.frames if args.sampling == "uniform" else (args.frames - 1) * STRIDE + 1
    seconds, job = [], partial(try_video, args.frames, args.sampling)
    for path, result in zip(paths, in_parallel(job, paths, "reading")):
        count, error, read, augmented = result
        if error:
            problems.add("unreadable", path, error)
            continue
        if count < enough:
            problems.add("short", path, f"{count} frames")
        seconds.append((read, augmented))
    kinds = ", ".join(f"{number} x {kind}" for kind, number in problems.kinds.items())
    print(f"{len(paths)} read; problems-{args.data}.csv: {kinds or 'none'}")
    if seconds:
        read, augmented = 1000 * np.mean(seconds, axis=0)
        total = read + augmented
        print(
            f"a sample of {args.frames} frames: {read:.1f} ms reading + {augmented:.1f} ms"
            f" augmenting; {1000 / total:.1f} samples/s per worker, {total:.0f} workers for 1,000"
            " clips/s"
        )


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_data",
        formatter_class=options.HelpLines,
        description="Make one training sample of every video; report problems and speed.",
    )
    add = parser.add_argument
    options.add_data_options(add, default="demo")
    whole = options.at_least(1)
    add("--frames", type=whole, default=16, metavar="N", help="frames per clip, of 224 px")
    add(
        "--sampling",
        choices=("dense", "uniform"),
        default="uniform",
        help="every fourth frame, or the whole length",
    )
    add("--limit", type=whole, metavar="N", help="a random sample of N videos (all)")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns 0 if all is well, but for videos that are short."""
    args = parse(argv)
    with one_sentence("check_data.py"):
        videos = find_videos(args.data, args.root, args.split, whole=())
        print(
            f"{len(videos.train)} training and {len(videos.val)} validation videos,"
            f" {len(videos.classes)} classes"
        )
        paths = sorted({path for path, _ in videos.train + videos.val})
        chosen = sorted(np.random.default_rng(0).permutation(len(paths))[: args.limit])
        path = f"problems-{args.data}.csv"
        with open(path, "w", newline="", errors="surrogateescape") as file:  # names may be bytes
            problems = Problems(file)
            check_lists(videos, problems)
            check_videos([paths[i] for i in chosen], args, problems)
        harmless = {"short"}
        if args.data == "diving48":  # its corrected labels (V2) do not use all of its names
            harmless |= {"no train video", "no val video"}
        return int(bool(problems.kinds.keys() - harmless))


if __name__ == "__main__":
    raise SystemExit(main())
