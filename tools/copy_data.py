"""Copy a folder of videos, with all else that is in it, into one whose videos read fast.

    python -m tools.copy_data SRC DST
    torchrun --nproc_per_node=8 train.py --data k400 --root DST

Each video becomes a small mp4 with the same frames, one for one: upright, without sound, with a key
frame every twelfth frame, at 30 frames a second. It keeps its name, so that lists stay true, and
with it a suffix that may be another's: readers go by content. All other files are copied as they
are, and so are videos that cannot be read, which are listed in the end. A file appears only when it
is complete, and what is there is not made again: a second run, or machine, does what is left.
"""

import argparse
import os
import random
import shutil
import tempfile
from functools import partial
from pathlib import Path

import av
import numpy as np

from support.datasets import VIDEO_SUFFIXES
from support.options import positive_int
from support.processes import UserError, in_parallel, one_sentence
from support.video import VideoError, every_frame, one_error

# A clip is 32 frames out of hundreds: the reader begins at a key frame near each of them and passes
# over three frames of four, which no other refers to. Without deblocking and arithmetic coding
# frames decode faster. With mbtree x264 would write other bytes every time.
ENCODER = {
    "preset": "veryfast",
    "tune": "fastdecode",
    "g": "12",
    "crf": "19",
    "threads": "1",
    "x264-params": "b-adapt=0:b-pyramid=none:mbtree=0",
}
# AVColorSpace and AVColorRange. BT.601 is what readers that ignore the tags assume.
BT601, LIMITED = 6, 1


def small_size(height, width, short_side):
    """Even sides, the shorter one at most short_side; nothing is enlarged."""
    shorter = min(height, width)
    short_side = min(short_side, shorter)
    return [max(2, side * short_side // shorter // 2 * 2) for side in (height, width)]


def write_fast(source, target, short_side):
    """Write an mp4 with a frame for each of a video's; raises VideoError.

    Frames have even times: a clip is chosen by frame numbers, and times of a variable rate would
    let encoders repeat and drop frames.
    """
    with one_error(source), av.open(f"file:{target}", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options=ENCODER, pix_fmt="yuv420p")
        stream.codec_context.colorspace, stream.codec_context.color_range = BT601, LIMITED
        for number, image in enumerate(every_frame(source)):
            if number == 0:
                stream.height, stream.width = small_size(*image.shape[:2], short_side)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            colours = {"dst_colorspace": BT601, "dst_color_range": LIMITED}
            shape = (stream.width, stream.height, "yuv420p")
            frame = frame.reformat(*shape, interpolation="BICUBIC", **colours)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def copy_file(short_side, job):
    """job: (source, target) → why the source is a video that cannot be read, or None."""
    source, target = job
    if os.path.exists(target):
        return None
    folder, error = os.path.dirname(target), None
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as hidden:
        copy = os.path.join(hidden, "copy")
        try:
            if os.path.splitext(source)[1].lower() in VIDEO_SUFFIXES:
                write_fast(source, copy, short_side)
            else:
                shutil.copyfile(source, copy)
        except VideoError as unreadable:
            shutil.copyfile(source, copy)
            error = str(unreadable)
        os.replace(copy, target)
    return error


def main(argv=None):
    parser = argparse.ArgumentParser("python -m tools.copy_data")
    add = parser.add_argument
    add("source", metavar="SRC", help="folder of videos, in any layout; it is only read")
    add("target", metavar="DST", help="folder of the copies, small and fast to read")
    add("--short-side", type=positive_int, default=256, metavar="PX", help="at most (%(default)s)")
    add("--workers", type=positive_int, default=os.cpu_count(), metavar="N", help="processes")
    args = parser.parse_args(argv)
    with one_sentence("copy_data.py"):
        if not os.path.isdir(args.source):
            raise UserError(f"there is no folder {args.source}")
        if Path(args.target).resolve().is_relative_to(Path(args.source).resolve()):
            raise UserError(f"{args.target} lies in {args.source}: take a folder elsewhere")
        jobs = []
        for folder, _, names in os.walk(args.source, followlinks=True):
            copy = os.path.join(args.target, os.path.relpath(folder, args.source))
            jobs += [(os.path.join(folder, name), os.path.join(copy, name)) for name in names]
        jobs = [job for job in jobs if os.path.isfile(job[0])]
        random.shuffle(jobs)  # two machines in one order would do the same work at the same time
        results = in_parallel(partial(copy_file, args.short_side), jobs, "copying", args.workers)
        errors = [error for error in results if error]
        unreadable = f"; {len(errors)} are unreadable videos" if errors else ""
        print(*errors, f"{args.target} has all {len(jobs)} files{unreadable}", sep="\n")


if __name__ == "__main__":
    main()
