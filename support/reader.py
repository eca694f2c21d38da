"""Exact frames out of video files: the same pixels as decoding the whole file, for less work.

Only the packets that the wanted frames depend on are decoded. Files come from anywhere, so sizes
and times are limited, and whatever is wrong with one is a VideoError that names it.
"""

import bisect
import os
import time
from typing import NamedTuple

import av
import numpy as np

from support.errors import UserError

# A clip for training is far below all of these.
MAX_PACKETS, MAX_BYTES, MAX_PIXELS, MAX_SECONDS = 200_000, 1 << 30, 1 << 25, 120
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,mpegvideo,h264,"
    "hevc,gif,ivf,nut,dv,mxf,rm"
)
# AVColorSpace: RGB, BT.709, not said, FCC, BT.601 (5 and 6), SMPTE 240M, BT.2020
COLOUR_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
BT2020, BT2020_CONSTANT_LUMINANCE, NOT_SAID = 9, 10, 2
# Packets of VP8 may show nothing. Those of MPEG-4 part 2 in AVI (Xvid, DivX) may hold two frames,
# with a placeholder behind them, and timestamps out of order: the decoder's order is the right one.
NOT_A_FRAME_EACH = ("vp8", "libvpx", "mpeg4")


class VideoError(UserError):
    """One video cannot be read; the message names it."""


class Frames(NamedTuple):
    """What was read from a video."""

    pixels: np.ndarray  # (n, H, W, 3) uint8 RGB, upright
    numbers: list  # which frames they are, from 0, in presentation order
    count: int  # how many frames the video has


def read_frames(path, choose):
    """Frames of a video file, by number in presentation order → Frames.

    choose: the numbers, in any order, repeats allowed; or a function of the video's number of
    frames that returns them. Raises VideoError.
    """
    if not os.path.isfile(path):
        raise VideoError(f"cannot read {path}: there is no such file")
    try:
        with open_video(path) as container:
            stream, packets = video_packets(container, path)
            return decode(stream, packets, path, choose)
    except (av.FFmpegError, OSError, ValueError, LookupError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"cannot read {path}: {reason}") from error


def open_video(path):
    """The container, with nothing but local files of known formats allowed."""
    return av.open(
        f"file:{path}",  # so that a name like http:… is a file, too
        metadata_errors="replace",
        timeout=MAX_SECONDS,
        options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
    )


def video_packets(container, path):
    """The best video stream, not blindly the first, and its packets in decoding order."""
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise VideoError(f"{path} has no video stream that can be decoded")
    codec = stream.codec_context
    codec.thread_type, codec.thread_count = "SLICE", 1  # worker processes are the parallelism
    codec.options = {"max_pixels": str(MAX_PIXELS)}
    if codec.width * codec.height > MAX_PIXELS:
        raise VideoError(
            f"{path} has frames of {codec.width}x{codec.height}, which is more than"
            f" {MAX_PIXELS:,} pixels"
        )
    packets, size = [], 0
    for packet in container.demux(stream):
        if packet.size > 0:
            packets.append(packet)
        size += packet.size
        if len(packets) > MAX_PACKETS or size > MAX_BYTES:
            raise VideoError(
                f"{path} has more than {MAX_PACKETS:,} packets or {MAX_BYTES >> 20} MiB: cut it"
                " into clips first"
            )
    return stream, packets


def decode(stream, packets, path, choose):
    """Choose the frames and decode them: the short way if timestamps allow, else the long way."""
    times = presentation_times(stream, packets)
    count = len(times) if times else count_decoded(stream, packets, path)
    numbers = [int(i) for i in (choose(count) if callable(choose) else choose)]
    for i in numbers or [-1]:  # none wanted, or none there: refused
        if not 0 <= i < count:
            raise VideoError(f"{path} has {count} frames, so no frame {i}")
    pixels = None
    if times:
        targets = [times[i] for i in numbers]
        frames = decode_some(stream, packets, set(targets))
        pixels = convert(((frame.pts, frame) for frame in frames), targets)
    if pixels is None:  # timestamps are missing, or a frame did not come out as they promised
        pixels = convert(enumerate(decode_all(stream, packets)), numbers)
    if pixels is None:
        raise VideoError(
            f"{path} breaks off: of its {count} frames not all that are wanted can be decoded"
        )
    return Frames(pixels, numbers, count)


def presentation_times(stream, packets):
    """The timestamp of frame 0, 1, 2, …, or None if the packets do not tell.

    A frame rate times a number would be wrong for variable rates, and for 29.97 frames a second
    in Matroska's milliseconds.
    """
    if stream.codec_context.name in NOT_A_FRAME_EACH:
        return None
    if any(packet.pts is None for packet in packets):
        return None
    times = sorted(packet.pts for packet in packets if not packet.is_discard)
    return times if len(set(times)) == len(times) else None


def count_decoded(stream, packets, path):
    """The number of frames that decoding gives; VideoError if that is far from the promised one."""
    count = sum(1 for _ in decode_all(stream, packets))
    if stream.frames > count + 3 and stream.frames > 1.02 * count:
        raise VideoError(
            f"{path} breaks off: of the {stream.frames} frames that it promises {count} can be"
            " decoded"
        )
    return count


def needed_packets(packets, targets):
    """Flags of the packets that the frames at `targets` need: from a key frame to each frame."""
    needed = np.zeros(len(packets), bool)
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    for place, packet in enumerate(packets):
        if packet.pts in targets:
            k = bisect.bisect_right(keys, place) - 1
            # Open GOP: a frame that is shown before the key frame that it follows in the file
            # also refers to frames before that key frame.
            while k > 0 and packets[keys[k]].pts > packet.pts:
                k -= 1
            first = keys[k] if k >= 0 else 0
            needed[first : place + 1] = True
    return needed


def within_time(steps):
    """The same steps; a ValueError once they have taken too long."""
    end = time.monotonic() + MAX_SECONDS
    for step in steps:
        if time.monotonic() > end:
            raise ValueError(
                f"decoding it takes more than {MAX_SECONDS} seconds: cut it into clips first"
            )
        yield step


def decode_some(stream, packets, targets):
    """Yield decoded frames, those at `targets` among them, with as little decoding as they take.

    Ends early where a packet that is marked as a key frame turns out to be none, as in files that
    have lost their index.
    """
    codec, running, entries = stream.codec_context, False, set()
    needed = needed_packets(packets, targets)
    for place, packet in enumerate(within_time([*packets, None])):
        wanted = packet is not None and needed[place]
        frames = []
        if wanted:
            if not running and place > 0:
                entries.add(packet.pts)
            # Skip what nobody wants and no other frame refers to.
            codec.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
            frames = codec.decode(packet)
        elif running:
            frames = codec.decode(None)  # the frames held back for reordering
            codec.flush_buffers()
        running = wanted
        if any(frame.pts in entries and not frame.key_frame for frame in frames):
            return
        yield from frames


def decode_all(stream, packets):
    """Yield all frames, in order."""
    stream.codec_context.flush_buffers()
    stream.codec_context.skip_frame = "DEFAULT"
    for packet in within_time([*packets, None]):
        yield from stream.codec_context.decode(packet)


def convert(keyed_frames, wanted):
    """(key, frame) pairs → (len(wanted), H, W, 3) RGB in the order of `wanted`, a list of keys.

    None if a wanted key does not come.
    """
    rows, reformatter, images = {}, av.video.reformatter.VideoReformatter(), None
    for row, key in enumerate(wanted):
        rows.setdefault(key, []).append(row)
    for key, frame in keyed_frames:
        if key not in rows:
            continue
        image = upright(rgb(frame, reformatter), frame)
        if images is None:
            if len(wanted) * image.nbytes > 4 * MAX_BYTES:
                raise ValueError("its frames are too large")
            images = np.empty((len(wanted), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise ValueError("the size of its frames changes midway")
        images[rows.pop(key)] = image
        if not rows:
            return images
    return None


def rgb(frame, reformatter):
    """A decoded frame → (H, W, 3) uint8, a view of the converted frame's own memory."""
    if frame.colorspace not in COLOUR_MATRICES:  # the scaler refuses rare and reserved tags
        constant_luminance = frame.colorspace == BT2020_CONSTANT_LUMINANCE
        frame.colorspace = BT2020 if constant_luminance else NOT_SAID
    frame = reformatter.reformat(frame, format="rgb24", threads=1)
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def upright(image, frame):
    """Apply the display matrix: a transposition and flips (`frame.rotation` drops the flips)."""
    for side in frame.side_data:
        if side.type.name != "DISPLAYMATRIX":
            continue
        a, b, _, c, d = np.frombuffer(side, np.int32)[:5]  # (x, y) goes to (a·x + c·y, b·x + d·y)
        if abs(int(b)) > abs(int(a)):
            image, a, d = image.transpose(1, 0, 2), c, b
        if d < 0:
            image = image[::-1]
        if a < 0:
            image = image[:, ::-1]
    return image
