"""Exact frames out of video files: the same pixels as decoding the whole file, for less work.

Only the packets that the wanted frames depend on are decoded, if packets tell which frames there
are; else the whole file is. Files come from anywhere, so sizes and times are limited, and whatever
is wrong with one is a VideoError that names it.
"""

import bisect
import contextlib
import itertools
import os
import time
from typing import NamedTuple

import av
import numpy as np

from support.processes import UserError

# AVColorSpace: RGB, BT.709, not said, FCC, BT.601 (5 and 6), SMPTE 240M, BT.2020
COLOUR_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
BT2020, BT2020_CONSTANT_LUMINANCE, NOT_SAID = 9, 10, 2


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


# A clip for training is far below all of these.
MAX_PACKETS, MAX_BYTES, MAX_PIXELS, MAX_SECONDS = 200_000, 1 << 30, 1 << 25, 120
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,mpegvideo,h264,"
    "hevc,gif,ivf,nut,dv,mxf,rm"
)
# Packets of VP8 may show nothing. Those of MPEG-4 part 2 in AVI (Xvid, DivX) may hold two frames,
# with a placeholder behind them.
NOT_A_FRAME_EACH = ("vp8", "libvpx", "mpeg4")
CHANGES_SIZE = "the size of its frames changes midway"


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
    with one_error(path):
        return read_by_times(path, choose) or read_whole(path, choose)


def every_frame(path):
    """Yield all frames of a video, (H, W, 3) uint8, one at a time, however long it takes."""
    remaining = read_frames(path, [0]).count
    reformatter, shape = av.video.reformatter.VideoReformatter(), None
    with one_error(path):
        for frame in itertools.islice(decode_all(path, seconds=float("inf")), remaining):
            image = upright(rgb(frame, reformatter), frame)
            shape = shape or image.shape
            if image.shape != shape:
                raise ValueError(CHANGES_SIZE)
            yield image
            remaining -= 1
        if remaining:
            raise ValueError(f"{remaining} of its frames cannot be decoded")


@contextlib.contextmanager
def one_error(path):
    """Whatever goes wrong with the video inside becomes a VideoError that names it."""
    if not os.path.isfile(path):
        raise VideoError(f"cannot read {path}: there is no such file")
    try:
        yield
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


def read_by_times(path, choose):
    """The short way: decode what the wanted frames need, and know them by their timestamps.

    None if the packets do not tell the frames' times, or a frame does not come as they promise.
    """
    with open_video(path) as container:
        stream, packets = video_packets(container, path)
        times = presentation_times(container, stream, packets)
        if times is None:
            return None
        numbers = chosen(choose, len(times), path)
        targets = [times[i] for i in numbers]
        frames = decode_some(stream, packets, set(targets))
        pixels = convert(((frame.pts, frame) for frame in frames), targets)
    return None if pixels is None else Frames(pixels, numbers, len(times))


def read_whole(path, choose):
    """The long way: decode everything, once to count the frames and once to take the wanted."""
    count = sum(1 for _ in decode_all(path))
    numbers = chosen(choose, count, path)
    pixels = convert(enumerate(decode_all(path)), numbers)
    return Frames(pixels, numbers, count)


def chosen(choose, count, path):
    """The numbers of the wanted frames, each of which is there."""
    numbers = [int(i) for i in (choose(count) if callable(choose) else choose)]
    if not numbers or count == 0:
        raise VideoError(f"{path} has {count} frames, and {len(numbers)} are wanted")
    for i in numbers:
        if not 0 <= i < count:
            raise VideoError(f"{path} has {count} frames, so no frame {i}")
    return numbers


def presentation_times(container, stream, packets):
    """The timestamp of frame 0, 1, 2, …, or None if the packets do not tell.

    A frame rate times a number would be wrong for variable rates, and for 29.97 frames a second
    in Matroska's milliseconds.
    """
    codec = stream.codec_context
    if codec.name in NOT_A_FRAME_EACH:
        return None
    if container.format.name == "avi" and codec.codec.reorder:  # AVI has decoding times alone
        return None
    if any(packet.pts is None for packet in packets):
        return None
    if not packets or not packets[0].is_keyframe:  # it was cut out of a longer video
        return None
    times = np.array([packet.pts for packet in packets])
    keys = np.array([packet.is_keyframe for packet in packets])
    # Frames that are shown before the first key frame have lost what they refer to, and decoders
    # drop some. Where two videos have been joined, the times of the second may begin too early.
    latest, earliest = np.maximum.accumulate(times), np.minimum.accumulate(times[::-1])[::-1]
    if earliest[0] < times[0] or (latest[:-1] >= earliest[1:])[keys[1:]].any():
        return None
    shown = sorted(packet.pts for packet in packets if not packet.is_discard)
    return shown if len(set(shown)) == len(shown) else None


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


def within_time(steps, seconds=None):
    """The same steps; a ValueError once they have taken too long."""
    end = time.monotonic() + (seconds or MAX_SECONDS)
    for step in steps:
        if time.monotonic() > end:
            raise ValueError(
                f"decoding it takes more than {MAX_SECONDS} seconds: cut it into clips first"
            )
        yield step


def decode_some(stream, packets, targets):
    """Yield decoded frames, those at `targets` among them, with as little decoding as they take.

    Ends early where a packet that is marked as a key frame turns out to be none, as in files that
    have lost their index; and where a packet may be half a frame.
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
            skips = packet.pts not in targets and codec.name != "libdav1d"  # would skip for good
            codec.skip_frame = "NONREF" if skips else "DEFAULT"
            frames = codec.decode(packet)
        elif running:
            frames = codec.decode(None)  # the frames held back for reordering
            codec.flush_buffers()
        running = wanted
        for frame in frames:
            if frame.pts in entries and not frame.key_frame:
                return
            if halves(stream, frame):
                return
        yield from frames


def decode_all(path, seconds=None):
    """Yield all frames, in order; VideoError at the end if far fewer come than the file promises.

    The decoder is a new one, since one that has been used may begin a cut video differently.
    """
    count, fields = 0, False
    with open_video(path) as container:
        stream, packets = video_packets(container, path)
        for packet in within_time([*packets, None], seconds):
            for frame in stream.codec_context.decode(packet):
                yield frame
                count += 1
                fields = fields or halves(stream, frame)
        promised = promised_frames(stream, packets) // (2 if fields else 1)
        if promised > count + 3 and promised > 1.02 * count:
            raise VideoError(
                f"{path} breaks off: of the {promised} frames that it promises {count} can be"
                " decoded"
            )


def halves(stream, frame):
    """May a packet hold half of this frame, as in interlaced H.264?"""
    return frame.interlaced_frame and stream.codec_context.name == "h264"


def promised_frames(stream, packets):
    """How many frames decoding should give, by the header; 0 or less if it says nothing."""
    first_key = next((i for i, packet in enumerate(packets) if packet.is_keyframe), 0)
    shown = sum(not packet.is_discard for packet in packets[first_key:])
    promised = stream.frames - (len(packets) - shown)
    # An AVI may promise a frame and leave its packet out, to show the one before for longer.
    if stream.duration and len(packets) > 1:
        last = max(packet.dts or 0 for packet in packets)
        end = last + last / (len(packets) - 1)
        promised -= max(0, round(stream.frames * end / stream.duration) - len(packets))
    return promised


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
            raise ValueError(CHANGES_SIZE)
        images[rows.pop(key)] = image
        if not rows:
            return images
    return None
