"""Exact frames out of video files: the same pixels as decoding the whole file, for less work.

One rule: the frames of a video are those that decoding the whole file gives; a video in which that
meets an error is refused. Either way it is the same whichever frames are asked for. The short way,
which decodes only what the wanted frames need, is taken where the packets prove that it gives the
same. Whatever is wrong with a file is a VideoError that names it.
"""

import contextlib
import os
from itertools import cycle, islice
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from support.processes import UserError

# AVColorSpace: RGB, BT.709, not said, FCC, BT.601 (5 and 6), SMPTE 240M, BT.2020
COLOUR_MATRICES, NOT_SAID = (0, 1, 2, 4, 5, 6, 7, 9), 2

MAX_BYTES = 1 << 30  # of packets, which are all in memory; a clip for training is far below
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
        except (Doubt, av.FFmpegError):
            return read_whole(path, choose)


def every_frame(path):
    """Yield all frames of a video, (H, W, 3) uint8, one at a time."""
    reformatter = av.video.reformatter.VideoReformatter()
    with one_error(path), open_video(path) as (stream, packets):
        for frame in decode_all(path, stream, packets):
            yield upright_rgb(frame, reformatter)


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


@contextlib.contextmanager
def open_video(path, **options):
    """The best video stream, not blindly the first, and its packets in decoding order."""
    with av.open(
        f"file:{path}",  # so that a name like http:… is a file, too
        metadata_errors="replace",
        options={"format_whitelist": FORMATS},  # none that opens other files
    ) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise VideoError(f"{path} has no video stream that can be decoded")
        codec = stream.codec_context
        codec.thread_type, codec.thread_count = "SLICE", 1  # worker processes are the parallelism
        codec.options = options
        packets, size = [], 0
        for packet in container.demux(stream):
            if packet.has_sidedata("encryption_info"):
                raise VideoError(f"{path} is encrypted: without its key it gives nothing but noise")
            if packet.size > 0:
                packets.append(packet)
            size += packet.size
            if size > MAX_BYTES:
                raise VideoError(
                    f"{path} has more than {MAX_BYTES >> 20} MiB: cut it into clips first"
                )
        yield stream, packets


class Clip:
    """Converts the wanted ones of the frames that pass by."""

    def __init__(self, choose, count):
        """choose: as in read_frames; count: how many frames there are."""
        self.numbers = [int(i) for i in (choose(count) if callable(choose) else choose)]
        if not self.numbers:
            raise ValueError(f"of its {count} frames none is wanted")
        self.rows, self.pixels = {}, None  # rows: which of `pixels` a frame belongs into
        for row, number in enumerate(self.numbers):
            self.rows.setdefault(number, []).append(row)
        self.reformatter = av.video.reformatter.VideoReformatter()

    def add(self, number, frame):
        if number not in self.rows:
            return
        image = upright_rgb(frame, self.reformatter)
        if self.pixels is None:
            self.pixels = np.empty((len(self.numbers), *image.shape), np.uint8)
        self.pixels[self.rows.pop(number)] = image


# ---------------------------------------------------------------- the long way
def read_whole(path, choose, guess=None):
    """Decode everything, and once more if there are not as many frames as was guessed."""
    with open_video(path) as (stream, packets):
        guess = guess or len(packets)
        clip, count = Clip(choose, guess), 0
        for frame in decode_all(path, stream, packets):
            clip.add(count, frame)
            count += 1
    if callable(choose) and count != guess:
        return read_whole(path, choose, count)
    if clip.rows:
        raise VideoError(f"{path} has {count} frames, so no frame {min(clip.rows)}")
    return Frames(clip.pixels, clip.numbers, count)


def decode_all(path, stream, packets):
    """Yield all frames, in order; an error if decoding reports one or the video breaks off."""
    places_in_order(path, stream, packets)
    count, size = 0, None
    for packet in [*packets, None]:
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


def refuse_broken_off(path, stream, packets, count):
    """A VideoError if `count`, the frames that come, are far fewer than the header promises."""
    # MP4's header also counts frames that its edit list leaves out; the index does not.
    promised = min(stream.frames, len(stream.index_entries) or stream.frames)
    first_key = next((i for i, packet in enumerate(packets) if packet.is_keyframe), 0)
    promised -= first_key + sum(packet.is_discard for packet in packets[first_key:])
    if promised > count + 3 and promised > 1.02 * count:
        raise VideoError(
            f"{path} breaks off: of the {promised} frames that it promises {count} can be decoded"
        )


# ---------------------------------------------------------------- the short way
def read_some(path, choose):
    """Decode what the wanted frames need; Doubt if that may differ from decoding everything."""
    with open_video(path, err_detect="explode") as (stream, packets):
        codec = stream.codec_context
        slices = [first_slice(packet, codec) for packet in packets]
        prove(packets, places_in_order(path, stream, packets), slices)
        times = sorted(packet.pts for packet in packets if not packet.is_discard)
        refuse_broken_off(path, stream, packets, len(times))
        number_at = {time: number for number, time in enumerate(times)}
        clip = Clip(choose, len(times))
        targets = {time for time in times if number_at[time] in clip.rows}
        for packet in needed_packets(packets, slices, targets):
            for frame in codec.decode(packet):
                if frame.is_corrupt:
                    raise Doubt("a damaged frame")
                clip.add(number_at.get(frame.pts), frame)
            if packet is None:
                codec.flush_buffers()
        if clip.rows:
            raise Doubt("a frame does not come")
        return Frames(clip.pixels, clip.numbers, len(times))


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


def prove(packets, places, slices):
    """Doubt unless packets tell what is shown when, and no reference picture is missing.

    That is: each packet is a frame, they are shown in the order of their times, and frame_num goes
    up by one behind each reference. Only then (7.4.3) does a decoder not notice if pictures that no
    other refers to are left out.
    """
    place_at = {packet.pts: place for packet, place in zip(packets, places, strict=False)}
    places = [place_at[time] for time in sorted(place_at)]
    if len(places) < len(packets) or None in places or (np.diff(places) != 1).any():
        raise Doubt("not one frame a packet, or not in the order of times")
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
def unnamed_side_data(cls, value):
    """A name for a type that PyAV 18.1 has none for; without it, it raises at such a frame."""
    side = object.__new__(cls)
    side._name_, side._value_ = f"TYPE_{value}", value
    return side


SideDataType._missing_ = classmethod(unnamed_side_data)


def upright_rgb(frame, reformatter):
    """A decoded frame → (H, W, 3) uint8, a view of the converted frame's own memory.

    The display matrix is a transposition and flips (`frame.rotation` drops the flips).
    """
    if frame.colorspace not in COLOUR_MATRICES:  # the scaler refuses rare and reserved tags
        frame.colorspace = NOT_SAID
    converted = reformatter.reformat(frame, format="rgb24", threads=1)
    plane = converted.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
    image = rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)
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
