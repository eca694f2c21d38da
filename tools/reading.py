"""How fast clips are read: ours next to decord and to decoding the whole file with PyAV.

    python -m tools.reading clip.mp4 [more.mp4 ...]

32 frames, every fourth, from the middle of each video, on one core. All readers take turns in
random order, so that noise falls on all alike. Printed are medians, and the medians of the rounds'
ratios.
"""

import argparse
from functools import partial
from statistics import median

import av
import numpy as np
import torch

from data import clip_frames
from support.processes import one_sentence
from support.video import read_frames
from tools.report import ratio, table, take_turns


def ours(path, numbers):
    return read_frames(path, numbers).pixels


def whole_file(path, numbers):
    """The reference: every frame is decoded, and the wanted ones are converted."""
    with av.open(f"file:{path}") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        frames = enumerate(container.decode(stream))
        wanted = {i: frame.to_ndarray(format="rgb24") for i, frame in frames if i in set(numbers)}
    return np.stack([wanted[i] for i in numbers])


def with_decord(path, numbers):
    import decord  # in tools/requirements.txt

    return decord.VideoReader(path, num_threads=1).get_batch(numbers).asnumpy()


READERS = [ours, whole_file, with_decord]


def compare(path, rounds):
    """A row for each reader."""
    numbers = clip_frames(read_frames(path, [0]).count, 32, "dense", 4, 0.5).tolist()
    reference, rows, steps = whole_file(path, numbers), [], {}
    for read in READERS:
        same = np.array_equal(read(path, numbers), reference)
        rows.append({"reader": read.__name__, "identical": same})
        steps[read.__name__] = partial(read, path, numbers)
    seconds = take_turns(steps, rounds)
    for row in rows:
        row["ms"] = 1000 * median(seconds[row["reader"]])
        row["ours ÷ it"] = ratio(seconds["ours"], seconds[row["reader"]])
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.reading")
    parser.add_argument("video", nargs="+", help="files to be read")
    parser.add_argument("--rounds", type=int, default=21, help="in which all take turns")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with one_sentence("reading.py"):
        for path in args.video:
            print(path, *table(compare(path, args.rounds)), "", sep="\n")


if __name__ == "__main__":
    main()
