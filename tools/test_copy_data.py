"""Copies show the source's frames in its colours, under its names, and the source is only read."""

import os
import shutil
import signal
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import resize

from conftest import HERE, SHARED, needs_shared, pixels, start, video_of, write_anything, x264
from support.datasets import digest, find_videos
from support.test_datasets import benchmark
from support.video import read_frames
from tools import copy_data


def copy_one(source, folder, short_side=256):
    copy = os.path.join(folder, "copy.mp4")
    assert copy_data.copy_file(short_side, (str(source), copy)) is None
    return copy


def everything(folder):
    """{path: content} of all files."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---------------------------------------------------------------- one video
UNEVEN = np.cumsum(np.random.default_rng(1).integers(1, 9, 60)).tolist()
KINDS = {
    "variable.mkv": {"codec": "libx264", "pts": UNEVEN, "rate": Fraction(30000, 1001)},
    "vp9.webm": {"codec": "libvpx-vp9", "rate": 240},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_copy_has_the_sources_frames_in_their_order(name, tmp_path):
    source = write_anything(str(tmp_path / name), **KINDS[name])
    copy = copy_one(source, tmp_path)
    assert read_frames(copy, [0]).count == 60
    a, b = pixels(source, range(60)).astype(int), pixels(copy, range(60)).astype(int)
    nearest = [abs(a - frame).mean((1, 2, 3)).argmin() for frame in b]
    assert nearest == list(range(60))
    with av.open(copy) as container:
        keys = [p.is_keyframe for p in container.demux(video=0) if p.size]
    assert all(any(keys[i : i + 12]) for i in range(60 - 12))


def test_sides_are_even_and_nothing_is_enlarged():
    for size, short_side, want in (
        ((47, 63), 256, [46, 62]),
        ((360, 202), 100, [178, 100]),
        ((270, 480), 256, [256, 454]),
        ((3, 400), 256, [2, 400]),
    ):
        assert copy_data.small_size(*size, short_side) == want


def test_colours_of_another_matrix_and_range_stay(tmp_path):
    """Smooth ramps of all colours, so that the halved chroma of 4:2:0 does not blur them."""
    across, down = np.meshgrid(np.linspace(0, 255, 480), np.linspace(0, 255, 320))
    image = np.stack([across, down, 255 - (across + down) / 2], -1)
    source = str(tmp_path / "source.mp4")
    with av.open(source, "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 480, 320, "yuv420p"
        BT709, FULL = 1, 2
        stream.codec_context.colorspace, stream.codec_context.color_range = BT709, FULL
        frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), "rgb24")
        colours = {"dst_colorspace": BT709, "dst_color_range": FULL}
        container.mux(stream.encode(frame.reformat(format="yuv420p", **colours)))
        container.mux(stream.encode())
    assert abs(pixels(source, [0])[0].astype(float) - image).mean() < 3
    assert_same_pictures(source, copy_one(source, tmp_path), [0], (256, 384))


def assert_same_pictures(source, copy, numbers, size):
    a, b = (torch.from_numpy(pixels(path, numbers)).permute(0, 3, 1, 2) for path in (source, copy))
    assert b.shape[-2:] == size
    small = resize(a, size, antialias=True)
    assert (b.float() - small.float()).abs().mean() <= 3


@needs_shared
def test_real_videos_stay_upright_and_lose_their_sound(tmp_path):
    source = f"{SHARED}/videos/rot90.mov"
    copy = copy_one(source, tmp_path)
    count, (height, width) = read_frames(source, [0]).count, pixels(source, [0]).shape[1:3]
    assert read_frames(copy, [0]).count == count
    size = tuple(copy_data.small_size(height, width, 256))
    assert_same_pictures(source, copy, range(0, count, max(1, count // 7)), size)
    with av.open(copy) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        frame = next(container.decode(video=0))
        assert not frame.rotation and not frame.side_data.get("DISPLAYMATRIX")


# ---------------------------------------------------------------- a folder
def test_a_copied_benchmark_is_the_same_benchmark(tmp_path):
    root, out = tmp_path / "my data", tmp_path / "copies"
    benchmark("hmdb51", root)
    before = everything(root)
    copy_data.main([str(root), str(out)])
    after = everything(out)
    assert everything(root) == before and after.keys() == before.keys()
    want, got = (find_videos("hmdb51", str(place)) for place in (root, out))
    assert [digest(part) for part in (want.train, want.val)] == [
        digest(part) for part in (got.train, got.val)
    ]
    for path, _ in got.train + got.val:
        place = os.path.relpath(path, out)
        assert after[place] != before[place]
        assert read_frames(path, [0]).count == read_frames(str(root / place), [0]).count


def test_what_is_no_readable_video_is_copied_as_it_is(tmp_path, capsys):
    source, out = tmp_path / "[a] b", tmp_path / "out"
    os.makedirs(source / "deep" / ".hidden")
    (source / "deep" / "broken.MP4").write_bytes(b"nonsense")
    (source / "deep" / ".hidden" / "list.csv").write_text("deep/broken.MP4,0\n")
    os.symlink(video_of(tmp_path / "elsewhere.mp4", 20), source / "link.mp4")
    os.symlink("/no/where.mp4", source / "dead.mp4")
    copy_data.main([str(source), str(out), "--short-side", "32"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[0].startswith(f"cannot read {source}/deep/broken.MP4: ")
    assert printed[1] == f"{out} has all 3 files; 1 are unreadable videos"
    after = everything(out)
    assert sorted(after) == ["deep/.hidden/list.csv", "deep/broken.MP4", "link.mp4"]
    assert after["deep/broken.MP4"] == b"nonsense"
    assert not os.path.islink(out / "link.mp4")
    assert pixels(out / "link.mp4", [19]).shape == (1, 32, 42, 3)


def test_stopped_it_says_so_and_a_second_run_does_the_rest(tmp_path):
    source, out = tmp_path / "set", tmp_path / "out"
    os.makedirs(source)
    how = x264(preset="ultrafast") | {"number": 90, "size": (240, 320)}
    write_anything(str(source / "0.mp4"), **how)
    for i in range(1, 16):
        shutil.copy(source / "0.mp4", source / f"{i}.mp4")
    process = start("-m", "tools.copy_data", str(source), str(out), "--workers", "2", cwd=HERE)
    while not any(out.glob("*.mp4")):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    said = process.stdout.read().strip()
    assert process.wait() == 130 and said.endswith("copy_data.py: stopped by a signal"), said
    done = sorted(everything(out))
    assert 0 < len(done) < 16 and all(path.endswith(".mp4") for path in done)
    for path in done:
        assert read_frames(str(out / path), [89]).count == 90
    (out / done[0]).write_bytes(b"is there")
    copy_data.main([str(source), str(out), "--workers", "2"])
    assert everything(out).keys() == everything(source).keys()
    assert (out / done[0]).read_bytes() == b"is there"


def test_user_errors_get_a_sentence_and_write_nothing(tmp_path):
    source = tmp_path / "set"
    os.makedirs(source)
    os.symlink(source, tmp_path / "link")
    inside = "lies in .*set: take a folder elsewhere"
    for target in (source, source / "copies", tmp_path / "link" / "copies"):
        with pytest.raises(SystemExit, match=f"copy_data.py: .*{inside}"):
            copy_data.main([str(source), str(target)])
    with pytest.raises(SystemExit, match="copy_data.py: there is no folder .*absent"):
        copy_data.main([str(tmp_path / "absent"), str(tmp_path / "out")])
    assert sorted(os.listdir(tmp_path)) == ["link", "set"] and os.listdir(source) == []
