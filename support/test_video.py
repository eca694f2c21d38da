"""Frames are exact, whatever the file; what is wrong with a file is one kind of error."""

import itertools
import json
import os
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest

import data
from conftest import (
    HERE,
    SHARED,
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


def count_frames(path):
    return read_frames(path, [0]).count


def test_frames_are_the_ones_asked_for(tmp_path):
    path = str(tmp_path / "a #1: [x].mp4")
    write_video(path, numbered_frames(100))
    assert count_frames(path) == 100
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


def coded(codec, **options):
    return {"codec": codec, "codec_options": options}


FILES = {
    "one-key.mp4": x264(),
    "two-keys.mp4": x264(g="30", sc_threshold="0"),
    "many-keys.mp4": x264(g="6", sc_threshold="0"),
    "open-gop.mp4": x264(g="12", sc_threshold="0", **{"x264-params": "open-gop=1"}),
    "intra.mp4": x264(g="1"),
    "refresh.mp4": x264(g="20", **{"x264-params": "intra-refresh=1"}),
    "pyramid.mkv": x264(g="25", **{"b-pyramid": "normal"}),
    "odd.mp4": x264() | {"size": (47, 63), "pix_fmt": "yuv444p"},
    "one-frame.mp4": x264() | {"number": 1},
    "uneven.mp4": x264(g="20") | {"pts": UNEVEN},
    "uneven.mkv": x264(g="20") | {"pts": UNEVEN},
    "late.mp4": x264(g="20") | {"pts": LATE},
    "late.mkv": x264(g="20") | {"pts": LATE},
    "ntsc.mkv": x264(g="20") | {"rate": Fraction(30000, 1001)},
    "stream.ts": x264(g="20"),
    "h265.mp4": coded("libx265", **{"x265-params": "keyint=20:bframes=3:log-level=none"}),
    "mpeg4.avi": coded("mpeg4", g="15"),
    "mpeg4-b.avi": coded("mpeg4", g="15", bf="2"),
    "mpeg4-b.mp4": coded("mpeg4", g="15", bf="2"),
    "mpeg2.mpg": coded("mpeg2video", bf="2"),
    "vp9.webm": coded("libvpx-vp9", **{"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9-odd.webm": coded("libvpx-vp9", g="20") | {"size": (47, 63)},
    "vp8.webm": coded("libvpx", **{"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "mjpeg.avi": coded("mjpeg") | {"pix_fmt": "yuvj420p"},
    "wmv.wmv": coded("wmv2", g="12"),
    "h264.avi": x264(g="20"),
    "h265-open.ts": coded("libx265", **{"x265-params": "keyint=12:open-gop=1:log-level=none"}),
    "av1.mp4": coded("libsvtav1", preset="10", g="20"),
    "av1-one-key.webm": coded("libsvtav1", preset="10", g="60"),
    "interlaced.mp4": x264(g="20", flags="+ildct+ilme"),
    "interlaced.mpg": coded("mpeg2video", bf="2", flags="+ildct+ilme"),
    "animation.gif": coded("gif") | {"pix_fmt": "rgb8", "pts": UNEVEN},
}
# Packets that show nothing, half a frame or two frames; key frames that are not; no timestamps.
IN_ORDER = (
    "mpeg4.avi",
    "mpeg4-b.avi",
    "mpeg4-b.mp4",
    "vp8.webm",
    "refresh.mp4",
    "h264.avi",
    "interlaced.mp4",
)


@pytest.mark.parametrize("name", FILES)
def test_frames_are_bit_identical_to_decoding_the_whole_file(name, tmp_path, monkeypatch):
    path = write_anything(str(tmp_path / name), **FILES[name])
    want = decode_whole(path)
    if name not in IN_ORDER:
        monkeypatch.setattr(video, "decode_all", None)  # the fast way must do
    assert count_frames(path) == len(want) == FILES[name].get("number", 60)
    rng = np.random.default_rng(0)
    some = [rng.integers(0, len(want), n) for n in (1, 3, 8)]
    for numbers in (range(len(want)), *some, [len(want) - 1], [0]):
        for image, number in zip(pixels(path, numbers), numbers, strict=True):
            assert np.array_equal(image, want[number])


@needs_shared
@pytest.mark.parametrize(
    "name, number",
    [
        ("k400_demo.mp4", 280),
        ("k400_clip2.mp4", 300),
        ("pancake.mkv", 310),
        ("two_video_streams.mp4", 390),
    ],
)
def test_real_files_are_read_exactly(name, number, monkeypatch):
    path = f"{SHARED}/videos/{name}"
    want = decode_whole(path)
    monkeypatch.setattr(video, "decode_all", None)
    assert count_frames(path) == len(want) == number
    some = np.random.default_rng(0).integers(0, number, 16)
    for numbers in (range(60, 60 + 32 * 4, 4), range(number), some):
        for image, i in zip(pixels(path, numbers), numbers, strict=True):
            assert np.array_equal(image, want[i])


@needs_shared
def test_the_best_stream_is_read_upright_and_damage_is_an_error():
    assert pixels(f"{SHARED}/videos/two_video_streams.mp4", [0]).shape == (1, 270, 480, 3)
    path = f"{SHARED}/videos/rot90.mov"
    assert np.array_equal(pixels(path, [1])[0], np.rot90(decode_whole(path)[1], -1))
    with pytest.raises(VideoError, match="corrupted.mp4"):
        read_frames(f"{SHARED}/videos/corrupted.mp4", lambda n: range(n))


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
        (10, False, 0.2627, 0.0593),
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


# ---------------------------------------------------------------- little work
def test_little_is_decoded_for_a_few_frames_near_the_end(tmp_path):
    how = x264(g="30", sc_threshold="0") | {"number": 300}
    path = write_anything(str(tmp_path / "a.mp4"), **how)
    with av.open(path) as container:
        _, packets = video.video_packets(container, path)
    assert sum(packet.is_keyframe for packet in packets) == 10
    times = sorted(packet.pts for packet in packets)
    near_the_end = {times[i] for i in range(272, 296, 3)}
    assert 8 <= video.needed_packets(packets, near_the_end).sum() <= 40
    assert video.needed_packets(packets, {times[0], times[299]}).sum() <= 1 + 31


def test_a_lost_index_does_not_give_wrong_frames(tmp_path, monkeypatch):
    path = write_anything(str(tmp_path / "a.wmv"), **coded("wmv2", g="60"))
    want, original = decode_whole(path), video.video_packets

    def every_packet_marked(container, path):
        stream, packets = original(container, path)
        for packet in packets:
            packet.is_keyframe = True
        return stream, packets

    monkeypatch.setattr(video, "video_packets", every_packet_marked)
    for image, number in zip(pixels(path, [40, 50]), (40, 50), strict=True):
        assert np.array_equal(image, want[number])


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


def test_hostile_files_meet_limits(tmp_path, monkeypatch):
    path = write_anything(str(tmp_path / "a.mp4"), **x264())
    for limit, value, words in (
        ("MAX_PACKETS", 40, "cut it into clips"),
        ("MAX_BYTES", 40, "cut it into clips"),
        ("MAX_PIXELS", 40, "frames of 64x48, which is more than 40 pixels"),
        ("MAX_BYTES", os.path.getsize(path), "frames are too large"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(video, limit, value)
            with pytest.raises(VideoError, match=words):
                read_frames(path, [0] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(video.time, "monotonic", itertools.count(0, 30).__next__)
        with pytest.raises(VideoError, match="more than 120 seconds"):
            read_frames(path, [59])


def test_what_the_caller_does_between_frames_may_take_long(tmp_path, monkeypatch):
    path, seconds = write_anything(str(tmp_path / "a.mp4"), **x264()), [0]
    monkeypatch.setattr(video.time, "monotonic", lambda: seconds[0])
    for _ in video.every_frame(path):
        seconds[0] += 30
    assert seconds[0] == 60 * 30


def test_no_frame_is_no_clip(tmp_path):
    path = write_anything(str(tmp_path / "a.mp4"), **x264())
    with pytest.raises(VideoError, match="has 60 frames, and 0 are wanted"):
        read_frames(path, [])


EXTREMES = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"]


def draw_place(rng, size, front):
    """Headers and indices, at the ends of a file, are worth more damage than pictures."""
    if front:
        return int(rng.integers(min(size, 2000)))
    if rng.random() < 0.5:
        return size - 1 - int(rng.integers(min(size, 4000)))
    return int(rng.integers(size))


def mutate(rng, content, other):
    """A damaged copy of a file.

    Bytes are flipped, set, cut out or doubled, its end is cut off, or another file's header is
    put in front.
    """
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        kind, size = rng.integers(8), len(content)
        front = rng.random() < 0.5
        at = draw_place(rng, size, front)
        length = int(rng.integers(1, 200))
        if kind <= 2:
            end = min(size, 4000) if front else size
            for place in rng.integers(0, end, rng.integers(1, 50)):
                content[place] ^= 1 << rng.integers(8)
        elif kind == 3:
            content[at : at + 4] = EXTREMES[rng.integers(len(EXTREMES))]
        elif kind == 4:
            del content[at : at + length]
        elif kind == 5:
            content[at:at] = content[at : at + length]
        elif kind == 6:
            del content[max(1, at) :]
        else:
            content[:length] = other[:length]
        if not content:
            content = bytearray(b"x")
    return bytes(content)


def resident():
    """The memory of this process, in MiB."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def gives_frames(path):
    """Whether a file gives frames or a VideoError; anything else is raised."""
    try:
        frames = pixels(path, lambda count: data.clip_frames(count, 8, "uniform", 1, 0.5))
    except VideoError as error:
        assert path in str(error) and "\n" not in str(error)
        return False
    assert frames.dtype == np.uint8 and frames.shape[0] == 8 and frames.shape[3] == 3
    return True


def fuzz(sources, folder, number, seed=0):
    """Read `number` mutations of the source files.

    → how many gave frames and how many errors, the slowest in seconds, and the growth of the
    memory over the second half in MiB. By hand: python -c "import glob; from support.test_video
    import fuzz; print(fuzz(glob.glob('DIR/*'), '/tmp', 5000))"
    """
    rng, files = np.random.default_rng(seed), [read_bytes(path) for path in sources]
    suffixes = [os.path.splitext(path)[1] for path in sources]
    readable, slowest, memory = 0, 0, []
    for _ in range(number):
        k, other = rng.integers(len(files), size=2)
        path = os.path.join(folder, f"mutated{suffixes[k]}")
        with open(path, "wb") as file:
            file.write(mutate(rng, files[k], files[other]))
        start = time.perf_counter()
        if gives_frames(path):
            readable += 1
        slowest = max(slowest, time.perf_counter() - start)
        memory.append(resident())
    return {
        "frames": readable,
        "errors": number - readable,
        "slowest": round(slowest, 2),
        "growth": round(max(memory) - max(memory[: number // 2 + 1]), 1),
    }


def test_damaged_files_give_frames_or_the_one_error(tmp_path):
    containers = ("two-keys.mp4", "pyramid.mkv", "mpeg4-b.avi", "vp9.webm", "stream.ts")
    for name in (*containers, "mpeg2.mpg", "wmv.wmv"):
        write_anything(str(tmp_path / name), **FILES[name])
    (tmp_path / "out").mkdir()
    code = (
        "import glob, json\n"
        "from support.test_video import fuzz\n"
        f"files = sorted(glob.glob({str(tmp_path)!r} + '/*.*'))\n"
        f"print(json.dumps(fuzz(files, {str(tmp_path / 'out')!r}, 250)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=HERE
    )
    assert done.returncode == 0, done.stderr[-2000:]  # a crash of the decoder would be a signal
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["frames"] + result["errors"] == 250
    assert min(result["frames"], result["errors"]) > 20
    assert result["slowest"] < 20 and result["growth"] < 100


def test_reading_does_not_leak(tmp_path):
    path = write_anything(str(tmp_path / "a.mp4"), **x264())
    for i in range(300):
        read_frames(path, [i % 60])
        if i == 99:
            before = resident()
    assert resident() - before < 8
    assert len(os.listdir("/proc/self/fd")) < 200
