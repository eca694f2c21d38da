"""Make one training sample of every video of a data set: what is wrong with it, and how fast it is.

    python -m tools.check_data --data k400 --frames 32 --sampling dense | tee problems.txt

Prints a line for each problem, as it is found, and a summary.
"""

import argparse
import time
from collections import Counter
from functools import partial

import numpy as np
import torch

from data import clip_frames, training_transform
from evaluate import DATA_OPTIONS
from support.datasets import find_videos
from support.options import add_options, positive_int
from support.processes import in_parallel, one_sentence
from support.video import VideoError, read_frames

STRIDE = 4  # of dense clips
OPTIONS = DATA_OPTIONS | {  # name: (default, kind, help)
    "frames": (16, positive_int, "frames per clip, of 224 px"),
    "sampling": ("uniform", ("dense", "uniform"), "as train.py's"),
    "limit": (None, positive_int, "only N videos, drawn at random"),
}


def try_video(choose, path):
    """→ (frames of the video, what is wrong or None, seconds that a sample of it takes)."""
    start, count, wrong = time.perf_counter(), 0, None
    try:
        pixels, _, count = read_frames(path, choose)
        training_transform("rand", 224)(torch.from_numpy(pixels).permute(0, 3, 1, 2)).contiguous()
    except VideoError as error:
        wrong = str(error)
    return count, wrong, time.perf_counter() - start


def problems(args, videos, paths):
    """Yield (problem, video or class) of each problem; in the end, print the speed."""
    for split, path in videos.missing:
        yield f"missing {split} video", path
    for split, name in videos.empty:
        yield f"no {split} video", name
    clip = {"num_frames": args.frames, "sampling": args.sampling, "stride": STRIDE}
    enough = args.frames if args.sampling == "uniform" else (args.frames - 1) * STRIDE + 1
    job = partial(try_video, partial(clip_frames, position=0.5, **clip))
    seconds = []
    for path, (count, error, taken) in zip(paths, in_parallel(job, paths, "reading")):
        if error:
            yield "unreadable", error
            continue
        seconds.append(taken)
        if count < enough:
            yield "short", f"{path}: {count} frames"
    if seconds:
        print(f"{len(seconds) / sum(seconds):.1f} samples/s per worker")


def main(argv=None):
    """Returns 0 if all is well, but for videos that are short."""
    parser = argparse.ArgumentParser("python -m tools.check_data")
    add_options(parser, OPTIONS)
    args = parser.parse_args(argv)
    kinds = Counter()
    with one_sentence("check_data.py"):
        videos = find_videos(args.data, args.root, args.split, whole=())
        counts = f"{len(videos.train)} training and {len(videos.val)} validation videos"
        print(f"{args.data}: {videos.found}\n{counts}, {len(videos.classes)} classes")
        paths = sorted({path for path, _ in videos.train + videos.val})
        paths = np.random.default_rng(0).permutation(paths)[: args.limit].tolist()
        for kind, what in problems(args, videos, paths):
            print(f"{kind}: {what}", flush=True)
            kinds[kind] += 1
        summary = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
        print(f"{len(paths)} videos read; problems: {summary or 'none'}")
        return int(bool(kinds.keys() - {"short"}))


if __name__ == "__main__":
    raise SystemExit(main())
