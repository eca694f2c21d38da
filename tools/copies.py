"""Small copies of videos that read fast: the same frames, one for one."""

import io
import os
import socket
import time
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from support.processes import UserError
from support.video import VideoError, every_frame, one_error, open_video, read_frames

SHORT_SIDE = 256  # training crops of 224 px come out of it
# A clip is 32 frames out of hundreds. A key frame every 12 frames lets the reader begin near each
# of them; of four frames, three are never referred to and may be passed over; and frames without
# deblocking and arithmetic coding take less to decode. With mbtree x264 would write other bytes
# every time.
ENCODER = {
    "preset": "veryfast",
    "tune": "fastdecode",
    "g": "12",
    "crf": "19",
    "threads": "1",
    "x264-params": "b-adapt=0:b-pyramid=none:mbtree=0",
}
RATE = Fraction(30)  # frames a second, where the source does not say
# AVColorSpace and AVColorRange. BT.601 is what readers that ignore the tags assume.
BT601, LIMITED = 6, 1


class Copied(NamedTuple):
    """What came of one video."""

    source: str
    error: str | None
    seconds: float  # of one core
    bytes_before: int
    bytes_after: int


def small_size(height, width, short_side):
    """Even sides, the shorter one at most short_side; nothing is enlarged."""
    shorter = min(height, width)
    short_side = min(short_side, shorter)
    return [max(2, side * short_side // shorter // 2 * 2) for side in (height, width)]


def encode(frames, rate, short_side):
    """RGB images (H, W, 3) of one size → the bytes of an mp4 with a frame for each, their number.

    The frames are numbered 0, 1, 2, …: a clip is chosen by numbers, and times of a variable rate
    would let encoders repeat and drop.
    """
    file, number, stream = io.BytesIO(), 0, None
    with av.open(file, "w", format="mp4") as container:
        for image in frames:
            if stream is None:
                height, width = small_size(*image.shape[:2], short_side)
                stream = container.add_stream("libx264", rate, options=ENCODER)
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                stream.codec_context.colorspace = BT601
                stream.codec_context.color_range = LIMITED
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(
                width,
                height,
                "yuv420p",
                dst_colorspace=BT601,
                dst_color_range=LIMITED,
                interpolation="BICUBIC",
            )
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
            number += 1
        container.mux(stream.encode())
    return file.getvalue(), number


def frame_rate(path):
    with one_error(path), open_video(path) as container:
        stream = container.streams.best("video")  # None: every_frame says so
        rate = RATE if stream is None else stream.average_rate or RATE
    return Fraction(rate).limit_denominator(1001) or RATE


def copy_video(short_side, job):
    """job: (source, target) → Copied. The target appears only whole."""
    source, target = job
    start = time.process_time()
    try:
        content, number = encode(every_frame(source), frame_rate(source), short_side)
    except VideoError as error:
        return Copied(source, str(error), time.process_time() - start, 0, 0)
    write_whole(target, content)
    if read_frames(target, [0]).count != number:
        os.remove(target)
        raise UserError(f"the copy {target} of {source} does not have all of its {number} frames")
    seconds = time.process_time() - start
    return Copied(source, None, seconds, os.path.getsize(source), len(content))


def write_whole(path, content):
    """Write bytes to a file that appears only whole.

    Until then its name begins with a dot, which layouts do not see, and is no other machine's.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f"cannot write {path}: {error.strerror}") from error
