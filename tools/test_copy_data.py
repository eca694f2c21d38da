"""Copies show the source's frames in its colours, in its layout, and nothing else is touched."""

import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import resize

import evaluate
import train
from conftest import (
    HERE,
    SHARED,
    lines,
    needs_shared,
    numbered_frames,
    pixels,
    read_numbers,
    start,
    write_anything,
    x264,
)
from support.datasets import SPLITS, digest, find_videos
from support.demo import write_video
from support.test_datasets import BENCHMARKS, benchmark
from support.video import every_frame, open_video, read_frames
from tools import copies, copy_data


def copy_file(source, target, short_side=copies.SHORT_SIDE):
    done = copies.copy_video(short_side, (str(source), str(target)))
    assert done.error is None, done.error
    return str(target)


def copy_set(name, root, out, *more):
    copy_data.main(["--data", name, "--root", str(root), "--out", str(out), *more])


def everything(folder):
    """{path: content} of all files."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found


# ---------------------------------------------------------------- one video
UNEVEN = np.cumsum(np.random.default_rng(1).integers(1, 9, 100)).tolist()
KINDS = {
    "b-frames.mp4": x264(),
    "variable.mkv": x264() | {"pts": UNEVEN},
    "late.mp4": x264() | {"pts": [i + 40 for i in range(100)]},
    "ntsc.mkv": x264() | {"rate": Fraction(30000, 1001)},
    "fast.mp4": x264() | {"rate": 240},
    "xvid.avi": {"codec": "mpeg4", "codec_options": {"bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9"},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_copy_has_the_sources_frames_in_their_order(name, tmp_path):
    source = numbered(str(tmp_path / name), **KINDS[name])
    copy = copy_file(source, tmp_path / "copy.mp4", 32)
    frames = pixels(copy, range(100))
    assert frames.shape == (100, 32, 42, 3)
    assert read_numbers(np.repeat(frames, 8, axis=2)) == list(range(100))
    assert read_frames(copy, [0]).count == 100
    with open_video(copy) as container:
        keys = [p.is_keyframe for p in container.demux(video=0) if p.size]
    assert all(any(keys[i : i + 12]) for i in range(0, 100 - 12))


def numbered(path, codec, rate=30, pts=None, codec_options=None):
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i, image in enumerate(numbered_frames(100)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = pts[i] if pts else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    "size, short_side, want",
    [
        ((48, 64), 256, (48, 64)),
        ((47, 63), 256, (46, 62)),
        ((360, 202), 100, (178, 100)),
        ((270, 480), 256, (256, 454)),
        ((3, 400), 256, (2, 400)),
    ],
)
def test_sides_are_even_and_nothing_is_enlarged(size, short_side, want):
    assert tuple(copies.small_size(*size, short_side)) == want


@pytest.mark.parametrize("turn", [(90, False), (180, True), (270, False)])
def test_a_copy_is_upright_by_itself(turn, tmp_path):
    how = x264() | {"number": 2, "size": (48, 80), "set_display_rotation": turn}
    source = write_anything(str(tmp_path / "turned.mp4"), **how)
    copy = copy_file(source, tmp_path / "copy.mp4")
    assert abs(pixels(copy, [1])[0].astype(int) - pixels(source, [1])[0]).mean() < 6
    with av.open(copy) as container:
        frame = next(container.decode(video=0))
        assert not frame.rotation and not frame.side_data.get("DISPLAYMATRIX")


def coloured(path, space, full):
    """Smooth ramps of all colours, so that the halved chroma of 4:2:0 does not blur them."""
    across, down = np.meshgrid(np.linspace(0, 255, 480), np.linspace(0, 255, 320))
    images = [np.stack([across, down, 255 - (across + down) / 2], -1)]
    images += [images[0][:, ::-1], images[0][::-1]]
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 480, 320, "yuv420p"
        stream.codec_context.colorspace = space
        stream.codec_context.color_range = 2 if full else 1
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image, np.uint8), "rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=space, dst_color_range=2 if full else 1
            )
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return np.stack(images)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", [1, 6])
def test_colours_stay(space, full, tmp_path):
    source = str(tmp_path / "source.mp4")
    drawn = coloured(source, space, full)
    read = torch_frames(source)
    assert abs(read.permute(0, 2, 3, 1).numpy().astype(float) - drawn).mean() < 3
    copy = torch_frames(copy_file(source, tmp_path / "copy.mp4"))
    assert copy.shape == (3, 3, 256, 384)
    small = resize(read, [256, 384], antialias=True)
    assert (copy.float() - small.float()).abs().mean() <= 3


def torch_frames(path):
    return torch.from_numpy(read_frames(path, range).pixels).permute(0, 3, 1, 2)


@needs_shared
@pytest.mark.parametrize("name", ["k400_demo.mp4", "rot90.mov", "two_video_streams.mp4"])
def test_real_videos(name, tmp_path):
    source = f"{SHARED}/videos/{name}"
    copy = copy_file(source, tmp_path / "copy.mp4")
    count = read_frames(source, [0]).count
    assert read_frames(copy, [0]).count == count
    numbers = range(0, count, max(1, count // 7))
    a, b = (torch.from_numpy(pixels(path, numbers)).permute(0, 3, 1, 2) for path in (source, copy))
    small = resize(a, b.shape[-2:], antialias=True)
    assert (b.float() - small.float()).abs().mean() <= 3
    assert min(b.shape[-2:]) == min(256, min(a.shape[-2:]) // 2 * 2)
    with av.open(copy) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_every_frame_gives_what_reading_all_gives(tmp_path):
    for name in ("b-frames.mp4", "xvid.avi"):
        path = numbered(str(tmp_path / name), **KINDS[name])
        assert np.array_equal(np.stack(list(every_frame(path))), pixels(path, range(100)))


# ---------------------------------------------------------------- whole data sets
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmarks_copy_is_the_same_benchmark(name, tmp_path):
    root, out, source = tmp_path / "my data", tmp_path / "copies", name.split()[0]
    benchmark(name, root)
    before = everything(root)
    copy_set(source, root, out)
    assert everything(root) == before
    for split in (1, 2, 3) if source == "hmdb51" else (None,):
        want, got = (find_videos(source, str(place), split) for place in (root, out))
        assert got.classes == want.classes and got.missing == []
        for part in SPLITS:
            a, b = getattr(want, part), getattr(got, part)
            assert digest(a) == digest(b) and len(a) == len(b) > 0
            for (path, label), (copy, same) in zip(a, b, strict=True):
                assert label == same and os.path.splitext(copy)[1] == ".mp4"
                assert os.path.relpath(path, root)[:-4] in os.path.relpath(copy, out)
                assert read_frames(path, [0]).count == read_frames(copy, [0]).count


def two_lists(folder, names, labels=(0, 1)):
    """Lists in folder/lists of videos that lie in folder/videos."""
    for name in names:
        os.makedirs(os.path.dirname(folder / "videos" / name), exist_ok=True)
        write_video(str(folder / "videos" / name), numbered_frames(16))
    os.makedirs(folder / "lists")
    content = "".join(f"../videos/{name} {labels[i % 2]}\n" for i, name in enumerate(names))
    for split in SPLITS:
        (folder / "lists" / f"{split}.txt").write_text(content)
    return folder / "lists"


def test_videos_outside_of_the_folder_come_into_the_copy(tmp_path):
    root = two_lists(tmp_path, ["a b.mp4", "c.mp4", "deep/d.mp4"])
    (root / "classes.txt").write_text("left\nright\n")
    before = everything(tmp_path)
    copy_set("list", root, tmp_path / "copies")
    after = everything(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path for path in after if path not in before} == {
        f"copies/{name}"
        for name in "train.txt val.txt classes.txt copies.json".split()
        + [f"videos/{name}.mp4" for name in ("a b", "c", "d")]
    }
    shutil.rmtree(tmp_path / "videos")
    videos = find_videos("list", str(tmp_path / "copies"))
    assert videos.classes == ["left", "right"]
    assert [label for _, label in videos.train] == [0, 1, 0]


def test_a_copy_trains_and_is_evaluated(micro, tmp_path):
    out, run = str(tmp_path / "copies"), str(tmp_path / "run")
    copy_set("folder", micro, out)
    command = "--data folder --backbone tiny --frames 16 --spatial-frames 4 --bottleneck 8"
    train.main(
        [*command.split(), *"--batch 8 --workers 0 --epochs 1 --out".split(), run] + ["--root", out]
    )
    assert lines(run)[0]["failed"] == 0
    results = [
        evaluate.main([f"{run}/last.pt", "--root", root, "--workers", "0"]) for root in (micro, out)
    ]
    assert results[0] is results[1]


def write_sound(path):
    """A file without pictures."""
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=8000)
        samples = np.zeros((1, 1024), np.float32)
        silence = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        silence.rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))


def test_what_cannot_be_read_is_listed_and_left_out(tmp_path, capsys):
    lost = {
        "folder": "val/left/1.mp4",
        "list": "1.mp4",
        "k400": "val/zumba/f_000007_000017.mp4",
        "ssv2": "20bn-something-something-v2/70.webm",
        "hmdb51": "sword/a#1_(x);y!_@z.avi",
        "diving48": "rgb/q_00001.mp4",
    }
    for name, broken in lost.items():
        root, out = tmp_path / name, tmp_path / f"{name} copies"
        if name == "folder":
            for i, split in enumerate(("train", "train", "val", "val")):
                folder = root / split / ("left", "right")[i % 2]
                os.makedirs(folder)
                for k in range(2):
                    write_video(str(folder / f"{k}.mp4"), numbered_frames(4))
        elif name == "list":
            os.makedirs(root)
            for i in range(4):
                write_video(str(root / f"{i}.mp4"), numbered_frames(4))
            for split in SPLITS:
                (root / f"{split}.txt").write_text("0.mp4 0\n1.mp4 1\n2.mp4 0\n3.mp4,1\n")
        else:
            benchmark(name, root)
        (root / broken).write_bytes(b"nonsense")
        if name == "folder":
            write_sound(str(root / broken))
        copy_set(name, root, out)
        assert "1 unreadable and left out" in capsys.readouterr().out
        with open(out / "unreadable.csv", newline="") as file:
            [(path, reason)] = csv.reader(file)
        assert path == str(root / broken) and "nonsense" not in reason and broken in reason
        whole = () if name == "k400" else SPLITS  # which may lack a fifth, less than 1 of 2
        want, got = find_videos(name, str(root)), find_videos(name, str(out), whole=whole)
        assert (len(got.missing) == 1) == (name == "k400")
        for split in SPLITS:
            a = [sample for sample in getattr(want, split) if sample[0] != str(root / broken)]
            assert digest(a) == digest(getattr(got, split))


def test_a_video_that_could_be_copied_later_is_lost_no_more(tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "copies"
    benchmark("ssv2", root)
    broken = root / "20bn-something-something-v2/70.webm"
    content = broken.read_bytes()
    broken.write_bytes(b"nonsense")
    os.makedirs(out)
    (out / ".copies.json.another-machine.7").touch()  # which that machine is about to rename
    for part in ("1/2", "2/2"):
        copy_set("ssv2", root, out, "--part", part)
    assert "1 unreadable and left out" in capsys.readouterr().out
    want = digest(find_videos("ssv2", str(root)).train)
    assert digest(find_videos("ssv2", str(out)).train) != want
    broken.write_bytes(content)
    copy_set("ssv2", root, out)
    assert digest(find_videos("ssv2", str(out)).train) == want


# ---------------------------------------------------------------- stopped, shared out, refused
def test_it_goes_on_where_it_was_and_parts_make_a_whole(micro, tmp_path, capsys):
    out, whole = tmp_path / "parts", tmp_path / "whole"
    for i in (2, 1, 3):
        copy_set("folder", micro, out, "--part", f"{i}/3")
        assert "8 copied, 0 were there" in capsys.readouterr().out
    copy_set("folder", micro, whole, "--workers", "1")
    assert everything(out) == everything(whole)
    some = sorted(path for path in everything(out) if path.endswith(".mp4"))[:5]
    for path in some:
        os.remove(out / path)
    copy_set("folder", micro, out)
    assert "5 copied, 19 were there" in capsys.readouterr().out
    assert everything(out) == everything(whole)
    with pytest.raises(SystemExit, match="holds copies made with .*256.*, not .*64"):
        copy_set("folder", micro, out, "--short-side", "64")
    for number in ("24 copied", "0 copied"):  # copies of copies go on, too
        copy_set("folder", out, tmp_path / "smaller", "--short-side", "32")
        assert number in capsys.readouterr().out


def test_what_one_part_cannot_read_another_leaves_out_however_it_spells_the_root(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    root = two_lists(tmp_path, ["a.mp4", "b.mp4", "c.mp4"])
    before = find_videos("list", str(root)).train
    with open(before[0][0], "wb") as file:
        file.write(b"nonsense")
    for part, spelled in (("1/2", os.path.relpath(root)), ("2/2", root)):
        copy_set("list", spelled, tmp_path / "out", "--part", part)
    assert len(find_videos("list", str(tmp_path / "out")).train) == len(before) - 1


def test_stopped_it_says_so_and_leaves_only_whole_copies(tmp_path):
    root = tmp_path / "set"
    for split in SPLITS:
        for label in ("a", "b"):
            os.makedirs(root / split / label)
            how = x264(preset="ultrafast") | {"number": 150, "size": (240, 320)}
            write_anything(str(root / split / label / "0.mp4"), **how)
            for i in range(1, 6):
                shutil.copy(root / split / label / "0.mp4", root / split / label / f"{i}.mp4")
    command = "-m tools.copy_data --data folder --workers 2 --root".split()
    out = tmp_path / "out"
    process = start(*command, str(root), "--out", str(out), cwd=HERE)
    while not any(out.rglob("*.mp4")):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    said = process.stdout.read()
    assert process.wait() == 1 and said.strip().endswith("copy_data.py: stopped"), said
    done = list(out.rglob("*.mp4"))
    assert 0 < len(done) < 24
    for path in done:
        assert read_frames(str(path), [149]).count == 150


def test_a_full_disk_ends_it_with_a_sentence(micro, tmp_path):
    limit = 1500  # bytes, of any file
    code = (
        "import resource, sys; from tools import copy_data;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "copy_data.main(sys.argv[1:])"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit
    command = [sys.executable, "-c", code, "--data", "folder", "--root", micro, "--out", "full"]
    environment = dict(os.environ, PYTHONPATH=HERE)
    ended = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert ended.returncode == 1
    said = ended.stderr.strip().splitlines()[-1]
    assert said.startswith("copy_data.py: cannot write full/") and "Traceback" not in ended.stderr
    assert not [
        path for path in everything(tmp_path / "full") if os.path.basename(path).startswith(".")
    ]


def test_originals_are_never_written_over(tmp_path):
    root = two_lists(tmp_path, ["a.mp4", "b.mp4"])
    before = everything(tmp_path)
    os.symlink(tmp_path / "lists", tmp_path / "link")
    os.makedirs(tmp_path / "led astray")
    os.symlink(tmp_path / "videos", tmp_path / "led astray" / "videos")
    (tmp_path / "led astray" / "copies.json").write_text('{"data": "list", "short_side": 256}')
    for out, words in (
        (root, "lie in one another"),
        (tmp_path / "link", "lie in one another"),
        (root / "copies", "lie in one another"),
        (tmp_path, "lie in one another"),
        (tmp_path / "videos", "holds originals"),
        (tmp_path / "led astray", "a link that leads out"),
    ):
        with pytest.raises(SystemExit, match=words):
            copy_set("list", root, out)
    after = everything(tmp_path)
    assert {path: after[path] for path in before} == before


def test_mistakes_get_a_sentence(tmp_path, capsys):
    root = two_lists(tmp_path, ["a.mp4", "deep/a.mp4"])
    with pytest.raises(SystemExit, match="a.mp4 and .*a.mp4 would both be copied to .*videos/a"):
        copy_set("list", root, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty, and holds no copies"):
        copy_set("folder", write_folder(tmp_path / "set"), tmp_path / "other")
    for options, words in (
        (["--data", "demo"], "--data says which layout"),
        (["--data", "list", "--part", "3/2"], "'3/2' is not I/N"),
        (["--data", "list", "--short-side", "8"], "'8' is not a whole number from 16"),
    ):
        with pytest.raises(SystemExit):
            copy_data.main([*options, "--out", "x"])
        assert words in capsys.readouterr().err


def write_folder(root):
    for split in SPLITS:
        for label in "ab":
            os.makedirs(root / split / label)
            write_video(str(root / split / label / "0.mp4"), numbered_frames(2))
    return root
