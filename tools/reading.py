"""How fast clips are read: ours next to decord, torchcodec and decoding the whole file with PyAV.

    python -m tools.reading clip.mp4 [more.mp4 ...] --frames 32 --stride 4 --rounds 21

The same frames, from the middle of each video, on one core. All readers take turns in random order,
so that noise falls on all alike; the first round warms up. Printed are medians, and the medians of
the rounds' ratios.
"""

import argparse
import contextlib
import json
import os
from functools import partial
from statistics import median

import av
import numpy as np
import torch

from data import clip_frames
from support import options
from support.processes import one_sentence
from support.tables import table
from support.video import VideoError, one_error, read_frames
from tools.timing import ratio, take_turns


def ours(path, numbers):
    return read_frames(path, numbers).pixels


def whole_file(path, numbers):
    """The reference: every frame is decoded, and the wanted ones are converted."""
    wanted, images = set(numbers), {}
    with one_error(path), av.open(f"file:{path}") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                images[i] = frame.to_ndarray(format="rgb24")
        return np.stack([images[i] for i in numbers])


def with_decord(path, numbers):
    import decord

    return decord.VideoReader(path, num_threads=1).get_batch(numbers).asnumpy()


def with_torchcodec(path, numbers):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    return decoder.get_frames_at(numbers).data.numpy()


READERS = {
    "ours": ours,
    "decord": with_decord,
    "torchcodec": with_torchcodec,
    "whole file": whole_file,
}


def available_readers(path, numbers):
    """Those that work here; a line says why another does not."""
    readers = {}
    for name, read in READERS.items():
        try:
            read(path, numbers)
        except ImportError:
            print(f"{name} is not installed: pip install -r tools/requirements.txt")
        except Exception as error:  # each raises its own kinds; torchcodec may lack FFmpeg's files
            print(f"{name} cannot read {path}: {str(error).strip().splitlines()[0]}")
        else:
            readers[name] = read
    return readers


def wanted_frames(count, frames, stride):
    """The middle of a video at the stride; every frame of one that is shorter."""
    if count < (frames - 1) * stride + 1:
        return list(range(count))
    return [int(i) for i in clip_frames(count, frames, "dense", stride, 0.5)]


@contextlib.contextmanager
def on_one_core():
    """Inside, PyTorch has one thread, and all threads one core, where the system can say so."""
    threads, can_say_so = torch.get_num_threads(), hasattr(os, "sched_setaffinity")
    torch.set_num_threads(1)  # more would wait for each other, at torchcodec's expense
    if can_say_so:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if can_say_so:
            os.sched_setaffinity(0, cores)


def compare(path, args):
    """A row for each reader of one video."""
    count = read_frames(path, [0]).count
    numbers = wanted_frames(count, args.frames, args.stride)
    readers = available_readers(path, numbers)
    if "ours" not in readers:
        raise VideoError(f"{path} is not compared, for the reason above")
    reference = whole_file(path, numbers).astype(int)
    steps = {name: partial(read, path, numbers) for name, read in readers.items()}
    seconds = take_turns(steps, args.rounds)
    rows = []
    for name, read in readers.items():
        images = read(path, numbers)
        difference = "size"
        if images.shape == reference.shape:
            difference = int(abs(images - reference).max())
        rows.append(
            {
                "reader": name,
                "frames": f"{len(numbers)} of {count}",
                "ms": 1000 * median(seconds[name]),
                "ours ÷ it": ratio(seconds["ours"], seconds[name]),
                "largest difference": difference,
                "identical": "yes" if difference == 0 else "no",
            }
        )
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.reading",
        formatter_class=options.HelpLines,
        description="Milliseconds to read a clip on one core, of several readers.",
    )
    add, whole = parser.add_argument, options.at_least(1)
    add("video", nargs="+", help="files to be read")
    add("--frames", type=whole, default=32, metavar="N", help="frames of a clip")
    add("--stride", type=whole, default=4, metavar="N", help="between two of them")
    add("--rounds", type=whole, default=21, metavar="N", help="in which all take turns")
    add("--json", metavar="FILE", help="write the figures to a file, too")
    args = parser.parse_args(argv)
    with one_sentence("reading.py"), on_one_core():
        result = []
        for path in args.video:
            rows = compare(path, args)
            print(path, *table(rows), "", sep="\n")
            result += [{"video": path} | row for row in rows]
        if args.json:
            with open(args.json, "w") as file:
                json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
