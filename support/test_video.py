"""Frames are exact, whatever the file; what is wrong with a file is one kind of error."""

import collections
import contextlib
import glob
import io
import os
import pathlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import (
    SHARED,
    THOROUGH,
    decode_whole,
    needs_shared,
    numbered_frames,
    pixels,
    read_numbers,
    write_anything,
    x264,
)
from support import video
from support.demo import write_video
from support.video import VideoError, read_frames


def test_frames_are_the_ones_asked_for(tmp_path):
    path = str(tmp_path / "a #1: [x].mp4")
    write_video(path, numbered_frames(100))
    assert read_frames(path, [0]).count == 100
    wanted = [99, 0, 7, 7, 50, 3]
    frames, numbers, count = read_frames(path, wanted)
    assert frames.shape == (6, 48, 64, 3) and frames.dtype == np.uint8
    assert read_numbers(frames) == wanted == numbers and count == 100
    chosen = read_frames(path, lambda n: [n - 1, n // 2])
    assert read_numbers(chosen.pixels) == chosen.numbers == [99, 50] and chosen.count == 100
    for bad in (-1, 100):
        with pytest.raises(VideoError, match=f"100 frames, so no frame {bad}"):
            read_frames(path, [0, bad])


def write_sound(path):
    with av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))


def test_what_is_no_video_is_one_kind_of_error(tmp_path):
    whole = tmp_path / "a.mp4"
    write_video(str(whole), numbered_frames(30))
    write_sound(str(tmp_path / "sound.wav"))
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"hello")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:200])
    for name in ("empty.mp4", "text.mp4", "cut.mp4", "sound.wav", "absent.mp4", "."):
        with pytest.raises(VideoError, match=name):
            read_frames(str(tmp_path / name), [0])
        with pytest.raises(VideoError):
            read_frames(str(tmp_path / name), lambda count: [0])


# ---------------------------------------------------------------- the same pixels
UNEVEN = np.cumsum(np.random.default_rng(1).integers(1, 9, 60)).tolist()
LATE = [i + 40 for i in range(60)]
EARLY = [i - 20 for i in range(60)]


def coded(codec, **options):
    return {"codec": codec, "codec_options": options}


def x265(parameters, **how):
    return coded("libx265", **{"x265-params": f"{parameters}:log-level=none"}) | how


# H.264 in MP4 or Matroska, whose packets prove what they are
FAST = {
    "one-key.mp4": x264(),
    "two-keys.mp4": x264(g="30", sc_threshold="0"),
    "many-keys.mp4": x264(g="6", sc_threshold="0"),
    "open-gop.mp4": x264(g="12", sc_threshold="0", **{"x264-params": "open-gop=1"}),
    "intra.mp4": x264(g="1"),
    "refresh.mp4": x264(g="20", **{"x264-params": "intra-refresh=1"}),
    "pyramid.mkv": x264(g="25", **{"b-pyramid": "normal"}),
    "odd.mp4": x264() | {"size": (47, 63), "pix_fmt": "yuv444p"},
    "ten-bits.mp4": x264() | {"pix_fmt": "yuv420p10le"},
    "uneven.mp4": x264(g="20") | {"pts": UNEVEN},
    "uneven.mkv": x264(g="20") | {"pts": UNEVEN},
    "late.mp4": x264(g="20") | {"pts": LATE},
    "late.mkv": x264(g="20") | {"pts": LATE},
    "edit-list.mp4": x264(g="20") | {"pts": EARLY},
    "fragments.mp4": x264(g="20") | {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "baseline.mov": x264(g="20", bf="0", profile="baseline"),
    "slices.mp4": x264(g="20", **{"x264-params": "slices=3"}),
    "ntsc.mkv": x264(g="20") | {"rate": Fraction(30000, 1001)},
    "interlaced.mp4": x264(g="20", flags="+ildct+ilme"),
}
FILES = FAST | {
    "one-frame.mp4": x264() | {"number": 1},
    "stream.ts": x264(g="20"),
    "h264.avi": x264(g="20"),
    "h265.mp4": x265("keyint=20:bframes=3"),
    "h265-ten-bits.mkv": x265("keyint=20:b-pyramid=1", pix_fmt="yuv422p10le"),
    "h265-open.ts": x265("keyint=12:open-gop=1"),
    "mpeg1.mpg": coded("mpeg1video", bf="2"),
    "mpeg2.mpg": coded("mpeg2video", bf="2"),
    "interlaced.mpg": coded("mpeg2video", bf="2", flags="+ildct+ilme"),
    "mpeg4.avi": coded("mpeg4", g="15"),
    "mpeg4-b.avi": coded("mpeg4", g="15", bf="2"),
    "left-out.avi": coded("mpeg4", g="15") | {"pts": list(range(0, 120, 2))},  # of 119 frames
    "mpeg4-b.mp4": coded("mpeg4", g="15", bf="2"),
    "h263.3gp": coded("h263", g="15") | {"size": (144, 176)},
    "sorenson.flv": coded("flv", g="15"),
    "vp8.webm": coded("libvpx", **{"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9.webm": coded("libvpx-vp9", **{"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9-odd.webm": coded("libvpx-vp9", g="20") | {"size": (47, 63)},
    "av1-ten-bits.mkv": coded("libsvtav1", preset="10", g="20") | {"pix_fmt": "yuv420p10le"},
    "av1.mp4": coded("libsvtav1", preset="10", g="20"),
    "av1-one-key.webm": coded("libsvtav1", preset="10", g="60"),
    "mjpeg.avi": coded("mjpeg") | {"pix_fmt": "yuvj420p"},
    "ffv1.mkv": coded("ffv1") | {"pix_fmt": "yuv444p"},
    "wmv.wmv": coded("wmv2", g="12"),
    "animation.gif": coded("gif") | {"pix_fmt": "rgb8", "pts": UNEVEN},
}


def assert_read_as_decoding_gives(path):
    """The same count and the same pixels, whichever frames are asked for."""
    want = decode_whole(path)
    rng = np.random.default_rng(0)
    some = [rng.integers(0, len(want), n).tolist() for n in (1, 3, 16)]
    for numbers in (range(len(want)), *some, [len(want) - 1], [0]):
        got = read_frames(path, numbers)
        assert got.count == len(want)
        assert same(got.pixels, [want[i] for i in numbers])
    assert read_frames(path, lambda count: [count - 1]).numbers == [len(want) - 1]
    assert same(list(video.every_frame(path)), want)
    return len(want)


def forbid_whole_decoding(monkeypatch):
    monkeypatch.setattr(video, "read_whole", None)


@pytest.mark.parametrize("name", FILES)
def test_frames_are_bit_identical_to_decoding_the_whole_file(name, tmp_path, monkeypatch):
    path = write_anything(str(tmp_path / name), **FILES[name])
    if name in FAST:
        forbid_whole_decoding(monkeypatch)
    number = assert_read_as_decoding_gives(path)
    assert number == FILES[name].get("number", 60) or name == "edit-list.mp4"


@needs_shared
@pytest.mark.parametrize(
    "name, number",
    [
        ("k400_demo.mp4", 280),
        ("pancake.mkv", 310),
        ("two_video_streams.mp4", 390),
    ],
)
def test_real_files_are_read_exactly(name, number, monkeypatch):
    forbid_whole_decoding(monkeypatch)
    assert assert_read_as_decoding_gives(f"{SHARED}/videos/{name}") == number


@needs_shared
def test_the_best_stream_is_read_upright():
    assert pixels(f"{SHARED}/videos/two_video_streams.mp4", [0]).shape == (1, 270, 480, 3)
    path = f"{SHARED}/videos/rot90.mov"
    assert np.array_equal(pixels(path, [1])[0], np.rot90(decode_whole(path)[1], -1))


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_all_eight_orientations_are_turned_upright(degrees, hflip, tmp_path):
    how = x264() | {"number": 2}
    plain = write_anything(str(tmp_path / "plain.mp4"), **how)
    how["set_display_rotation"] = (degrees, hflip)
    turned = write_anything(str(tmp_path / "turned.mp4"), **how)
    want = np.rot90(pixels(plain, [1])[0], degrees // 90)  # counter-clockwise …
    if hflip:
        want = want[:, ::-1]  # … and mirrored after that
    assert np.array_equal(pixels(turned, [1])[0], want)


@pytest.mark.parametrize(
    "space, full, red, blue",
    [
        (1, False, 0.2126, 0.0722),
        (5, False, 0.299, 0.114),
        (6, True, 0.299, 0.114),
        (9, False, 0.2627, 0.0593),
        (1, True, 0.2126, 0.0722),
        (14, False, 0.299, 0.114),
        (2, False, 0.299, 0.114),
    ],
)
def test_colour_matrix_and_range_are_honoured(space, full, red, blue, tmp_path):
    tags = {"colorspace": space, "color_range": 2 if full else 1}
    path = write_anything(str(tmp_path / "a.mkv"), "ffv1", number=2, pix_fmt="yuv444p", **tags)
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (space, 2 if full else 1)
        y, u, v = (plane.astype(float) for plane in frame.to_ndarray())
    if full:
        luma, chroma = y / 255, 255
    else:
        luma, chroma = (y - 16) / 219, 224
    u, v = (u - 128) / chroma, (v - 128) / chroma
    r, b = luma + 2 * (1 - red) * v, luma + 2 * (1 - blue) * u
    g = (luma - red * r - blue * b) / (1 - red - blue)
    want = np.stack([r, g, b], -1).clip(0, 1) * 255
    assert abs(pixels(path, [0])[0] - want).max() <= 3


@needs_shared
def test_side_data_that_pyav_has_no_name_for_is_passed_over():
    path = f"{SHARED}/videos/spatial_mvhevc.mov"
    frames, _, count = read_frames(path, lambda count: range(count))
    assert count == 5
    with av.open(path) as container:
        for image, frame in zip(frames, container.decode(video=0), strict=True):
            assert np.array_equal(image, frame.to_ndarray(format="rgb24"))


@pytest.mark.parametrize("orientation", [2, 6])
def test_frames_with_exif_are_turned_upright(orientation, tmp_path):
    """Each then has a display matrix, and side data of a type that PyAV has no name for."""
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).repeat(8, 0).repeat(8, 1)
    jpeg, exif, path = io.BytesIO(), Image.Exif(), str(tmp_path / "a.avi")
    exif[274] = orientation
    Image.fromarray(picture.astype(np.uint8)).save(jpeg, "JPEG", exif=exif, subsampling=0)
    with av.open(path, "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj444p"
        packet = av.Packet(jpeg.getvalue())
        packet.stream, packet.pts, packet.dts = stream, 0, 0
        container.mux(packet)
    want = np.asarray(ImageOps.exif_transpose(Image.open(jpeg))).astype(int)
    image = pixels(path, [0])[0]
    assert image.shape == want.shape and abs(image - want).mean() < 2


# ---------------------------------------------------------------- little work
def test_little_is_decoded_for_a_few_frames_near_the_end(tmp_path, monkeypatch):
    how = x264(g="30", sc_threshold="0") | {"number": 300}
    path, given, original = write_anything(str(tmp_path / "a.mp4"), **how), [], video.needed_packets

    def noted(*arguments):
        given.append([packet for packet in original(*arguments) if packet is not None])
        return given[-1] + [None]

    monkeypatch.setattr(video, "needed_packets", noted)
    read_frames(path, range(272, 296, 3))
    read_frames(path, [0])
    assert 8 <= len(given[0]) <= 40 and len(given[1]) == 1


def test_a_whole_file_is_decoded_once_if_packets_are_frames(tmp_path, monkeypatch):
    path = write_anything(str(tmp_path / "a.webm"), **FILES["vp9.webm"])
    passes, original = [], video.decode_all
    monkeypatch.setattr(video, "decode_all", lambda *args: passes.append(args) or original(*args))
    assert read_frames(path, lambda count: [count - 1]).numbers == [59]
    assert len(passes) == 1


# ---------------------------------------------------------------- damage
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


def flip_a_bit(path, damaged, rng):
    content = bytearray(pathlib.Path(path).read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    pathlib.Path(damaged).write_bytes(content)


def cut_the_file(path, damaged, rng):
    content = pathlib.Path(path).read_bytes()
    pathlib.Path(damaged).write_bytes(content[: rng.integers(len(content))])


def lose_a_packet(path, damaged, rng):
    packets = packets_of(path)
    del packets[rng.integers(len(packets))]
    mux(damaged, path, packets)


def cut_a_packet(path, damaged, rng):
    packets = packets_of(path)
    at = rng.integers(len(packets))
    whole = packets[at]
    packets[at] = short = av.Packet(bytes(whole)[: 1 + rng.integers(whole.size)])
    short.pts, short.dts, short.time_base = whole.pts, whole.dts, whole.time_base
    short.is_keyframe = whole.is_keyframe
    mux(damaged, path, packets)


def plain_decoding(path):
    """All frames that FFmpeg gives: what it cannot decode is passed over."""
    frames, reformatter = [], av.video.reformatter.VideoReformatter()
    try:
        with av.open(path, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            stream.codec_context.thread_count = 1
            packets = [packet for packet in container.demux(stream) if packet.size]
            for packet in [*packets, None]:
                try:
                    for frame in stream.codec_context.decode(packet):
                        frames.append(reformatter.reformat(frame, format="rgb24").to_ndarray())
                except av.FFmpegError:
                    pass
    except (av.FFmpegError, AttributeError):
        pass  # AttributeError: there is no stream
    return frames


def same(images, others):
    return len(images) == len(others) and all(map(np.array_equal, images, others))


def outcome(path, rng):
    """Of reading all and six random subsets of a file: "exact", "refused", or else "wrong"."""
    want, outcomes = plain_decoding(path), set()
    subsets = [lambda count, n=n: rng.integers(0, count, n) for n in (1, 3, 8, 8, 16, 30)]
    for choose in (range, *subsets, None):
        try:
            if choose is None:
                exact = same(list(video.every_frame(path)), want)
            else:
                got = read_frames(path, choose)
                exact = got.count == len(want) and same(got.pixels, [want[i] for i in got.numbers])
            outcomes.add("exact" if exact else "wrong")
        except VideoError:
            outcomes.add("refused")
    return outcomes.pop() if len(outcomes) == 1 else "wrong"


DAMAGED = ("damage.mp4", "h265.mp4", "vp9.webm", "mpeg4-b.mp4")
DAMAGES = {flip_a_bit: 200, cut_a_packet: 60, lose_a_packet: 60, cut_the_file: 20}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_gives_the_frames_of_whole_decoding_or_an_error(name, damage, tmp_path):
    how = FILES.get(name) or x264(g="20", sc_threshold="0", **{"b-pyramid": "normal"})
    path = write_anything(str(tmp_path / name), **how)
    rng, damaged = np.random.default_rng(0), str(tmp_path / f"x{name}")
    tally = collections.Counter()
    for _ in range(DAMAGES[damage] if THOROUGH else 4):
        damage(path, damaged, rng)
        tally[outcome(damaged, rng)] += 1
    print(damage.__name__, name, dict(tally))
    assert tally["wrong"] == 0


@needs_shared
@pytest.mark.parametrize("name", ["bad_packet.mp4", "corrupted.mp4", "encrypted.mp4"])
def test_a_damaged_or_encrypted_video_is_refused(name):
    path = f"{SHARED}/videos/{name}"
    for choose in ([0], [20], range, lambda count: [count - 1]):
        with pytest.raises(VideoError, match=name):
            read_frames(path, choose)
    with pytest.raises(VideoError, match=name):
        list(video.every_frame(path))


# ---------------------------------------------------------------- hostile names and files
def test_names_that_look_like_protocols_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("http:x.mp4", numbered_frames(5))
    assert read_numbers(pixels("http:x.mp4", [3])) == [3]
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile 'http:x.mp4'\n")
    playlist = "#EXTM3U\n#EXTINF:1\nhttp:x.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    addresses = ("concat:http:x.mp4", "http://127.0.0.1/x.mp4")
    for name in (*addresses, "list.txt", "list.m3u8", "/dev/zero"):
        with pytest.raises(VideoError):
            read_frames(name, [0])


def test_a_video_that_is_too_long_is_to_be_cut(tmp_path, monkeypatch):
    path = write_anything(str(tmp_path / "a.mp4"), **x264())
    monkeypatch.setattr(video, "MAX_BYTES", 40)
    with pytest.raises(VideoError, match="cut it into clips first"):
        read_frames(path, [0])


def resident():
    """The memory of this process, in MiB."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_reading_does_not_leak(tmp_path):
    path = write_anything(str(tmp_path / "a.mp4"), **x264())
    for i in range(200):
        read_frames(path, [i % 60])
        if i == 66:
            before = resident()
    assert resident() - before < 8
    assert len(os.listdir("/proc/self/fd")) < 200


# ---------------------------------------------------------------- cutters and recorders
@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
@pytest.mark.parametrize("name", ["open-gop.mp4", "mpeg2.mpg", "h265-open.ts"])
def test_a_video_that_begins_before_its_first_key_frame(name, suffix, tmp_path):
    whole = write_anything(str(tmp_path / "whole.ts"), **FILES[name])
    cut = mux(str(tmp_path / f"cut.{suffix}"), whole, packets_of(whole)[7:])
    assert assert_read_as_decoding_gives(cut) < 60 - 5


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_file_with_far_fewer_frames_than_its_header_promises_breaks_off(codec, tmp_path):
    how = {"codec_options": {"bf": "0", "g": "12"}, "options": {"movflags": "faststart"}}
    path = write_anything(str(tmp_path / "a.mp4"), codec, **how)
    with av.open(path) as container:
        end = container.streams.video[0].index_entries[40].pos
    os.truncate(path, end)
    for choose in ([0], lambda count: [count - 1]):
        with pytest.raises(VideoError, match="breaks off: of the 60 frames that it promises 40"):
            read_frames(path, choose)


@needs_shared
def test_the_avis_of_a_classic_benchmark_are_read_exactly():
    paths = sorted(glob.glob(f"{SHARED}/ut_interaction/videos/*.avi"))
    if not paths:
        pytest.skip("the AVIs are not in ../shared")
    for path in paths if THOROUGH else paths[::60]:
        assert_read_as_decoding_gives(path)


@pytest.mark.parametrize("places", [(0, 2, 1), (0, 1, 1), (0, 2, 3), (0, None, 1), (0, 1)])
def test_order_is_proven_by_one_place_for_each_packet(places):
    packets = [av.Packet(1) for _ in range(3)]
    for packet, time in zip(packets, (0, 20, 10)):  # shown last, coded second
        packet.pts = time
    with contextlib.nullcontext() if places == (0, 2, 1) else pytest.raises(video.Doubt):
        video.prove(packets, places, [])
