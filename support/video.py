"""Exact frames out of video files: the same pixels as decoding the whole file, for less work.

One rule: the frames of a video are those that decoding the whole file gives; a video in which that
meets an error is refused. Either way it is the same whichever frames are asked for. The short way,
which decodes only what the wanted frames need, is taken where the packets prove that it gives the
same. Files come from anywhere, so sizes and times are limited, and whatever is wrong with one is a
VideoError that names it.
"""

import contextlib
import os
import time
from itertools import cycle, islice
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from support.processes import UserError

# AVColorSpace: RGB, BT.709, not said, FCC, BT.601 (5 and 6), SMPTE 240M, BT.2020
COLOUR_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
BT2020, BT2020_CONSTANT_LUMINANCE, NOT_SAID = 9, 10, 2

# A clip for training is far below all of these.
MAX_PACKETS, MAX_BYTES, MAX_PIXELS, MAX_SECONDS = 200_000, 1 << 30, 1 << 25, 120
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,mpegvideo,h264,"
    "hevc,gif,ivf,nut,dv,mxf,rm"
)

# H.264: types of NAL units (Table 7-1), and how many bytes of a slice reach behind frame_num
SLICES, IDR_SLICE, PARAMETER_SETS, SLICE_START = (1, 5), 5, (7, 8), 10


class VideoError(UserError):
    """One video cannot be read; the message names it."""


class Doubt(Exception):
    """The packets do not prove that the short way gives what the long one does."""


class Frames(NamedTuple):
    """What was read from a video."""

    pixels: np.ndarray  # (n, H, W, 3) uint8 RGB, upright
    numbers: list  # which frames they are, from 0, in presentation order
    count: int  # how many frames the video has


def read_frames(path, choose):
    """Frames of a video file, by number in presentation order → Frames.

    choose: the numbers, in any order, repeats allowed; or a function of the video's number of
    frames that returns them, and may be called twice. Raises VideoError.
    """
    with one_error(path):
        try:
            return read_some(path, choose)
        except Doubt:
            return read_whole(path, choose)


def every_frame(path):
    """Yield all frames of a video, (H, W, 3) uint8, one at a time, however long it takes."""
    reformatter = av.video.reformatter.VideoReformatter()
    with one_error(path):
        for frame in decode_all(path, seconds=float("inf")):
            yield upright(rgb(frame, reformatter), frame)


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


def video_packets(container, path, **options):
    """The best video stream, not blindly the first, and its packets in decoding order."""
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise VideoError(f"{path} has no video stream that can be decoded")
    codec = stream.codec_context
    codec.thread_type, codec.thread_count = "SLICE", 1  # worker processes are the parallelism
    codec.options = {"max_pixels": str(MAX_PIXELS), **options}
    if codec.width * codec.height > MAX_PIXELS:
        raise VideoError(
            f"{path} has frames of {codec.width}x{codec.height}, which is more than"
            f" {MAX_PIXELS:,} pixels"
        )
    packets, size = [], 0
    for packet in container.demux(stream):
        if packet.has_sidedata("encryption_info"):
            raise VideoError(f"{path} is encrypted: without its key it gives nothing but noise")
        if packet.size > 0:
            packets.append(packet)
        size += packet.size
        if len(packets) > MAX_PACKETS or size > MAX_BYTES:
            raise VideoError(
                f"{path} has more than {MAX_PACKETS:,} packets or {MAX_BYTES >> 20} MiB: cut it"
                " into clips first"
            )
    return stream, packets


def chosen(choose, count, path):
    """The numbers of the wanted frames, each of which is there."""
    numbers = [int(i) for i in (choose(count) if callable(choose) else choose)]
    if not numbers:
        raise VideoError(f"{path} has {count} frames, and none is wanted")
    for i in numbers:
        if not 0 <= i < count:
            raise VideoError(f"{path} has {count} frames, so no frame {i}")
    return numbers


class Clip:
    """Converts the wanted ones of the frames that pass by."""

    def __init__(self, wanted):
        """wanted: their keys, in the order of the rows of `pixels`."""
        self.rows, self.shape, self.pixels = {}, (len(wanted),), None
        for row, key in enumerate(wanted):
            self.rows.setdefault(key, []).append(row)
        self.reformatter = av.video.reformatter.VideoReformatter()

    def add(self, key, frame):
        if key not in self.rows:
            return
        image = upright(rgb(frame, self.reformatter), frame)
        if self.pixels is None:
            if self.shape[0] * image.nbytes > 4 * MAX_BYTES:
                raise ValueError("its frames are too large")
            self.pixels = np.empty((*self.shape, *image.shape), np.uint8)
        self.pixels[self.rows.pop(key)] = image


# ---------------------------------------------------------------- the long way
def read_whole(path, choose, guess=None):
    """Decode everything, and once more if there are not as many frames as was guessed."""
    if guess is None:
        with open_video(path) as container:
            guess = len(video_packets(container, path)[1])
    numbers = [int(i) for i in (choose(guess) if callable(choose) else choose)]
    clip, count = Clip(numbers), 0
    for frame in decode_all(path):
        clip.add(count, frame)
        count += 1
    if callable(choose) and count != guess:
        return read_whole(path, choose, count)
    return Frames(clip.pixels, chosen(numbers, count, path), count)


def decode_all(path, seconds=MAX_SECONDS):
    """Yield all frames, in order; an error if decoding reports one or the video breaks off."""
    count, size = 0, None
    with open_video(path) as container:
        stream, packets = video_packets(container, path)
        places_in_order(path, stream, packets)
        for packet in within_time(path, [*packets, None], seconds):
            for frame in stream.codec_context.decode(packet):
                if size not in (None, (frame.width, frame.height)):
                    raise ValueError("the size of its frames changes midway")
                size = frame.width, frame.height
                yield frame
                count += 1
        refuse_broken_off(path, stream, packets, count)
    if count == 0:
        raise ValueError("none of its frames can be decoded")


def places_in_order(path, stream, packets):
    """The packets' places in the order of pictures, as far as H.264 tells; VideoError if damaged.

    FFmpeg's filter dts2pts parses all headers, at a fiftieth of what decoding costs, where a
    decoder passes over errors in them and shows what is left in its memory. It looks 64 packets
    ahead and numbers the last ones differently, so the first ones follow them once more.
    """
    if stream.codec_context.name != "h264":
        return []
    parser, parsed = av.bitstream.BitStreamFilterContext("dts2pts", stream), []
    for number, packet in enumerate(islice(cycle(packets), len(packets) + 64)):
        copy = av.Packet(bytes(packet))
        copy.dts = number
        try:
            parsed += parser.filter(copy)
        except av.FFmpegError as error:
            if number == 0:  # parameters that it does not know
                return []
            raise VideoError(f"{path} is damaged: its packet {number} makes no sense") from error
    if not parsed and all(packet.is_keyframe for packet in packets):  # the filter numbers none
        return list(range(len(packets)))
    return [packet.pts for packet in parsed]


def within_time(path, steps, seconds=MAX_SECONDS):
    """The same steps; a VideoError once they have taken too long."""
    end = time.monotonic() + seconds
    for step in steps:
        if time.monotonic() > end:
            raise VideoError(
                f"decoding {path} takes more than {seconds} seconds: cut it into clips first"
            )
        yield step


def refuse_broken_off(path, stream, packets, count):
    """A VideoError if `count`, the frames that come, are far fewer than the header promises."""
    # MP4's header also counts frames that its edit list leaves out; the index does not.
    promised = min(stream.frames, len(stream.index_entries) or stream.frames)
    first_key = next((i for i, packet in enumerate(packets) if packet.is_keyframe), 0)
    promised -= first_key + sum(packet.is_discard for packet in packets[first_key:])
    # An AVI may promise a frame and leave its packet out, to show the one before for longer.
    if stream.duration and len(packets) > 1:
        last = max(packet.dts or 0 for packet in packets)
        end = last + last / (len(packets) - 1)
        promised -= max(0, round(stream.frames * end / stream.duration) - len(packets))
    if promised > count + 3 and promised > 1.02 * count:
        raise VideoError(
            f"{path} breaks off: of the {promised} frames that it promises {count} can be decoded"
        )


# ---------------------------------------------------------------- the short way
def read_some(path, choose):
    """Decode what the wanted frames need; Doubt if that may differ from decoding everything."""
    with open_video(path) as container:
        stream, packets = video_packets(container, path, err_detect="explode")
        codec = stream.codec_context
        slices = [first_slice(packet, codec) for packet in packets]
        prove_order(packets, places_in_order(path, stream, packets))
        prove_references(slices)
        times = sorted(packet.pts for packet in packets if not packet.is_discard)
        refuse_broken_off(path, stream, packets, len(times))
        numbers = chosen(choose, len(times), path)
        clip = Clip([times[i] for i in numbers])
        for packet in within_time(path, needed_packets(packets, slices, set(clip.rows))):
            try:
                frames = codec.decode(packet)
            except av.FFmpegError as error:
                raise Doubt("an error") from error
            for frame in frames:
                if frame.is_corrupt:
                    raise Doubt("a damaged frame")
                clip.add(frame.pts, frame)
            if packet is None:
                codec.flush_buffers()
        if clip.rows:
            raise Doubt("a frame does not come")
        return Frames(clip.pixels, numbers, len(times))


def first_slice(packet, codec):
    """The start of the first slice in a packet of H.264.

    Doubt if the packet is not as MP4 and Matroska have it, or brings other parameters.
    """
    if codec.name != "h264" or packet.pts is None or any(packet.iter_sidedata()):
        raise Doubt("another codec, no time, or side data, which may be other parameters")
    content, at, first = bytes(packet), 0, None
    while at < len(content):
        start = at + 4
        at = start + int.from_bytes(content[start - 4 : start], "big")
        kind = content[start] & 31 if start < len(content) else None
        if kind in SLICES and first is None:
            first = content[start : start + SLICE_START]
        if kind in PARAMETER_SETS and content[start:at] not in codec.extradata:
            raise Doubt("other parameters")
    if at != len(content) or first is None:
        raise Doubt("start codes, broken off or no slice")
    return first


def prove_order(packets, places):
    """Doubt unless each packet is a frame, and they are shown in the order of their times."""
    place_at = {packet.pts: place for packet, place in zip(packets, places, strict=False)}
    places = [place_at[time] for time in sorted(place_at)]
    if len(places) < len(packets) or None in places or (np.diff(places) != 1).any():
        raise Doubt("not one frame a packet, or not in the order of times")


def prove_references(slices):
    """Doubt unless frame_num goes up by one behind each reference, so that none is missing.

    Only then (7.4.3) does a decoder not notice if pictures that no other refers to are left out.
    """
    starts, expected = [], None
    for unit in slices:
        content = unit[1:].replace(b"\0\0\3", b"\0\0")
        bits = f"{int.from_bytes(content, 'big'):0{8 * len(content)}b}"
        for _ in ("first_mb_in_slice", "slice_type", "pic_parameter_set_id"):  # Exp-Golomb
            bits = bits[2 * bits.find("1") + 1 :]
        if unit[0] & 31 == IDR_SLICE:
            expected = 0
        if expected is None:
            raise Doubt("begins midway")
        starts.append((bits, expected))
        if unit[0] >> 5:  # nal_ref_idc
            expected += 1
    for width in range(4, 17):  # of frame_num; it is in the SPS, behind much else
        if all(bits.startswith(f"{n % (1 << width):0{width}b}") for bits, n in starts):
            return
    raise Doubt("a reference picture is missing")


def needed_packets(packets, slices, targets):
    """The packets that the frames at `targets` need: the references from an IDR picture to each.

    None where the decoder is to be drained.
    """
    needed, wanted = [], False
    for packet, unit in zip(reversed(packets), reversed(slices), strict=True):
        is_target = packet.pts in targets
        if is_target and not wanted:
            needed.append(None)
            wanted = True
        if is_target or (wanted and unit[0] >> 5):  # nal_ref_idc
            needed.append(packet)
        if unit[0] & 31 == IDR_SLICE:
            wanted = False
    return needed[::-1]


# ---------------------------------------------------------------- pictures
def rgb(frame, reformatter):
    """A decoded frame → (H, W, 3) uint8, a view of the converted frame's own memory."""
    if frame.colorspace not in COLOUR_MATRICES:  # the scaler refuses rare and reserved tags
        constant_luminance = frame.colorspace == BT2020_CONSTANT_LUMINANCE
        frame.colorspace = BT2020 if constant_luminance else NOT_SAID
    frame = reformatter.reformat(frame, format="rgb24", threads=1)
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def unnamed_side_data(cls, value):
    """A name for a type that PyAV 18.1 has none for; without it, it raises at such a frame."""
    side = object.__new__(cls)
    side._name_, side._value_ = f"TYPE_{value}", value
    return side


SideDataType._missing_ = classmethod(unnamed_side_data)


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
