"""MPEG-4 part 2 in AVI, as classic benchmarks ship it: packets that are no frames, or two."""

import glob
from fractions import Fraction

import av
import numpy as np
import pytest

from conftest import SHARED, THOROUGH, decode_whole, needs_shared, pixels
from support.video import VideoError, read_frames

PLACEHOLDER = bytes.fromhex("000001b65000")  # a VOP that is not coded
DIVX = bytes.fromhex("000001b2") + b"DivX503b1393p"  # B-frames are packed, says the encoder
VOP = bytes.fromhex("000001b6")


def encoded_packets(number):
    """I, P, B, P, B, … of moving noise, in decoding order, as (bytes, is it a key frame?)."""
    codec = av.CodecContext.create("mpeg4", "w")
    codec.width, codec.height, codec.pix_fmt = 64, 48, "yuv420p"
    codec.time_base, codec.options = Fraction(1, 25), {"bf": "1", "g": "300"}
    picture = np.random.default_rng(0).integers(0, 256, (48, 64 + number, 3)).astype(np.uint8)
    packets = []
    for i in range(number):
        image = np.ascontiguousarray(picture[:, i : i + 64])
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts = i
        packets += codec.encode(frame)
    packets += codec.encode(None)
    return [(bytes(packet), packet.is_keyframe) for packet in packets], codec.extradata


def packed(number):
    """The bytes of an AVI's packets: each P packet joined with its B packet, a placeholder behind.

    Before the first VOP the DivX user data; the second packet is a single byte.
    """
    packets, header = encoded_packets(number)
    first = (header or b"") + packets[0][0]
    at = first.index(VOP)
    joined = [first[:at] + DIVX + first[at:], b"\x7f"]
    others = [content for content, _ in packets[1:]]
    for i in range(0, len(others), 2):
        joined += [b"".join(others[i : i + 2]), PLACEHOLDER]
    return joined


def write_avi(path, contents):
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i, content in enumerate(contents):
            packet = av.Packet(content)
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = i
            packet.is_keyframe = i == 0
            container.mux(packet)
    return path


def test_packed_b_frames_and_placeholders_are_read_as_decoding_the_whole_file_gives_them(tmp_path):
    path = write_avi(str(tmp_path / "packed.avi"), packed(41))
    want = decode_whole(path)
    with av.open(path) as container:
        sizes = [packet.size for packet in container.demux(video=0) if packet.size]
    assert len(want) in (40, 41) and sizes.count(1) == 1 and sizes.count(6) == 20
    for numbers in (range(len(want)), [len(want) - 1, 0, 7, 7]):
        video = read_frames(path, numbers)
        assert video.count == len(want)
        for image, number in zip(video.pixels, numbers, strict=True):
            assert np.array_equal(image, want[number])


def test_a_file_whose_header_promises_many_more_frames_breaks_off(tmp_path):
    whole = packed(81)
    path = write_avi(str(tmp_path / "whole.avi"), whole + 8 * [b"\x7f"])
    with av.open(path) as container:
        promised = container.streams.video[0].frames
    assert promised > len(decode_whole(path)) + 3
    with pytest.raises(VideoError, match=f"breaks off: of the {promised} frames that it promises"):
        pixels(path, [0])


@needs_shared
def test_the_avis_of_a_classic_benchmark_are_read_exactly():
    paths = sorted(glob.glob(f"{SHARED}/ut_interaction/videos/*.avi"))
    if not paths:
        pytest.skip("the AVIs are not in ../shared")
    for path in paths if THOROUGH else paths[::12]:
        want = decode_whole(path)
        video = read_frames(path, range)
        assert video.count == len(want) and len(video.pixels) == len(want)
        for image, frame in zip(video.pixels, want, strict=True):
            assert np.array_equal(image, frame)
