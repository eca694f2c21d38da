"""Files that cutters, cameras and recorders leave: begun midway, joined, in fields, with gaps."""

import re
from fractions import Fraction

import av
import numpy as np
import pytest

from conftest import decode_whole, write_anything, x264
from support.video import read_frames

OPEN_GOP = x264(g="20", sc_threshold="0", **{"x264-params": "open-gop=1"})
MPEG2 = {"codec": "mpeg2video", "codec_options": {"bf": "2", "g": "12"}}
H265 = {
    "codec": "libx265",
    "codec_options": {"x265-params": "keyint=20:bframes=4:open-gop=1:scenecut=0:log-level=none"},
}


def assert_read_as_decoding_gives(path, number):
    """The same count and the same pixels, however many frames are asked for."""
    want = decode_whole(path)
    assert len(want) == number
    for numbers in (range(number), [0], [number - 1], [number // 2, 3, 3]):
        video = read_frames(path, numbers)
        assert video.count == number
        for image, i in zip(video.pixels, numbers, strict=True):
            assert np.array_equal(image, want[i]), i


def packets_of(path):
    with av.open(path) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def mux(path, like, packets):
    """Write packets of the video `like` into a file of its own."""
    with av.open(like) as source, av.open(path, "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
@pytest.mark.parametrize("coding, number", [(OPEN_GOP, 40), (MPEG2, 52), (H265, 40)])
def test_a_video_that_begins_before_its_first_key_frame(coding, number, suffix, tmp_path):
    whole = write_anything(str(tmp_path / "whole.ts"), **coding)
    cut = mux(str(tmp_path / f"cut.{suffix}"), whole, packets_of(whole)[7:])
    assert_read_as_decoding_gives(cut, len(decode_whole(cut)))
    assert len(decode_whole(cut)) < 60 - 7


@pytest.mark.parametrize("coding", [OPEN_GOP, MPEG2], ids=["h264", "mpeg2"])
def test_a_cut_at_a_key_frame_whose_neighbours_show_before_it(coding, tmp_path):
    whole = write_anything(str(tmp_path / "whole.ts"), **coding)
    packets = packets_of(whole)
    second = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
    assert packets[second + 1].pts < packets[second].pts
    cut = mux(str(tmp_path / "cut.ts"), whole, packets[second:])
    assert_read_as_decoding_gives(cut, len(decode_whole(cut)))
    assert len(decode_whole(cut)) < 60 - second


def test_joined_videos_whose_times_overlap(tmp_path):
    whole = write_anything(str(tmp_path / "whole.ts"), **x264())
    other = write_anything(str(tmp_path / "other.ts"), **x264(bf="0"))
    first, second = packets_of(whole), packets_of(other)
    shift = first[-1].dts + 1500 - second[0].dts
    for packet in second:  # begins when the first one has ended by decoding times alone
        packet.pts = packet.dts = packet.dts + shift
    joined = mux(str(tmp_path / "joined.ts"), whole, first + second)
    times = [packet.pts for packet in packets_of(joined)]
    assert None not in times and len(set(times)) == 120 and max(times[:60]) > times[60]
    assert_read_as_decoding_gives(joined, 120)


def test_an_avi_that_leaves_frames_out_is_whole(tmp_path):
    coding = {"codec": "mpeg4", "codec_options": {"g": "12"}}
    path = write_anything(str(tmp_path / "gaps.avi"), pts=list(range(0, 120, 2)), **coding)
    with av.open(path) as container:
        assert container.streams.video[0].frames > 110
    assert_read_as_decoding_gives(path, 60)


def test_mpeg2_with_pulldown_flags(tmp_path):
    """Film in television: of every four frames two are flagged to show a field for longer."""
    plain = write_anything(str(tmp_path / "plain.ts"), rate=24, **MPEG2)
    flagged = packets_of(plain)
    for i, packet in enumerate(flagged):
        data = bytearray(bytes(packet))
        extension = re.search(rb"\x00\x00\x01\xb5[\x80-\x8f]", data).start()  # of the picture
        data[extension + 7] = data[extension + 7] & 0x7D | (0x80, 0x02, 0x00, 0x82)[i % 4]
        new = av.Packet(bytes(data))
        new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
        new.is_keyframe = packet.is_keyframe
        flagged[i] = new
    assert_read_as_decoding_gives(mux(str(tmp_path / "flagged.ts"), plain, flagged), 60)


# ---------------------------------------------------------------- H.264 in fields
class Bits:
    """The syntax elements of H.264, one after the other."""

    def __init__(self):
        self.bits = ""

    def u(self, width, value):
        self.bits += format(value, f"0{width}b")
        return self

    def ue(self, *values):
        for value in values:
            code = format(value + 1, "b")
            self.bits += "0" * (len(code) - 1) + code
        return self

    def pcm(self, luma):
        """A macroblock of raw samples, all of one brightness and no colour."""
        self.ue(25)
        self.bits += "0" * (-len(self.bits) % 8)
        self.bits += 256 * format(luma, "08b") + 128 * format(128, "08b")
        return self

    def unit(self, reference, kind):
        bits = self.bits + "1"
        bits += "0" * (-len(bits) % 8)
        unit, zeros = bytearray([reference << 5 | kind]), 0
        for byte in int(bits, 2).to_bytes(len(bits) // 8, "big"):
            if zeros >= 2 and byte <= 3:
                unit.append(3)
                zeros = 0
            unit.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes(unit)


def field_pictures(number, gop=10):
    """(top, bottom) fields of frames of 64×64, each a picture of its own (PAFF), by hand."""
    # Main profile, pictures in decoding order, 4×2 pairs of macroblocks, frame_mbs_only_flag 0.
    sps = Bits().u(8, 77).u(8, 0).u(8, 30).ue(0, 0, 2, 1).u(1, 0).ue(3, 1).u(6, 0b001000)
    pps = Bits().ue(0, 0).u(2, 0).ue(0, 0, 0).u(3, 0).ue(0, 0, 0).u(3, 0b100)
    frames = []
    for i in range(number):
        fields = []
        for bottom in (0, 1):
            idr = i % gop == 0 and not bottom
            field = Bits().ue(0, 7, 0).u(4, i % gop).u(1, 1).u(1, bottom)
            if idr:
                field.ue(i // gop % 2).u(2, 0)
            else:
                field.u(1, 0)
            field.ue(0, 1)  # no change of the quantiser; no deblocking
            for block in range(8):
                field.pcm(16 + (5 * i + 25 * block + bottom) % 220)
            fields.append(field.unit(3, 5 if idr else 1))
        if i % gop == 0:
            fields[0] = sps.unit(3, 7) + pps.unit(3, 8) + fields[0]
        frames.append(fields)
    return frames


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_field_pictures_in_packets_of_their_own_are_halves_of_frames(suffix, tmp_path):
    stream = tmp_path / "fields.h264"
    frames = field_pictures(40)
    stream.write_bytes(b"".join(top + bottom for top, bottom in frames))
    packets = []
    for i, field in enumerate(sum(frames, [])):
        packet = av.Packet(field)
        packet.pts, packet.dts, packet.time_base = i, i, Fraction(1, 50)
        packet.is_keyframe = i % 20 == 0
        packets.append(packet)
    path = mux(str(tmp_path / f"fields.{suffix}"), str(stream), packets)
    assert len(packets_of(path)) >= 79 and None not in [p.pts for p in packets_of(path)]
    assert_read_as_decoding_gives(path, 40)
    assert len(np.unique(read_frames(path, range(40)).pixels, axis=0)) == 40
