"""Data sets are read as they are downloaded; what is wrong with one is said in a sentence."""

import json
import math
import os
import shutil

import pytest
import torch

import evaluate
import train
from conftest import lines, write_anything, x264
from support.datasets import SPLITS, digest, find_videos
from support.processes import UserError

# ---------------------------------------------------------------- your own videos


def put(root, *paths):
    """Make empty files; a folder, where a path ends in a slash."""
    for path in paths:
        if path.endswith("/"):
            (root / path).mkdir(parents=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()


def test_folders_and_their_mistakes(micro, tmp_path):
    videos = find_videos("folder", micro)
    assert (len(videos.train), len(videos.val), len(videos.classes)) == (16, 8, 8)
    for path, label in videos.train:
        assert videos.classes[label] == os.path.basename(os.path.dirname(path))
    root = tmp_path / "x"
    for paths, words in (
        ([], "x is not there"),
        (["./"], "train is not there"),
        (["train/a/"], "val is not there"),
        (["val/a/"], "has 0 train videos and 1 classes"),
        (["train/a/1.mp4"], "has 1 train videos and 1 classes"),
        (["val/a/2.MKV"], "has 1 train videos and 1 classes"),
        (["train/b/"], "no training video of the class 'b'"),
        (["val/c/note.txt", "train/b/deep/3.webm", "val/c/4.mp4"], "4.mp4 the class 'c'"),
    ):
        put(root, *paths)
        with pytest.raises(UserError, match=words):
            find_videos("folder", str(root))
    (root / "val/c/4.mp4").unlink()
    # Left behind by other programs:
    put(root, "train/a/._1.mp4", "train/.ipynb_checkpoints/x.mp4")
    (root / "train/b/gone.mp4").symlink_to(root / "moved.mp4")
    videos = find_videos("folder", str(root))
    found = [os.path.relpath(path, root) for path, _ in videos.train + videos.val]
    assert found == ["train/a/1.mp4", "train/b/deep/3.webm", "val/a/2.MKV"]


def test_lists_and_their_mistakes(tmp_path):
    root, listed = str(tmp_path), tmp_path / "train.txt"
    put(tmp_path, "a.mp4", "b c.mp4", "d,e.mp4")
    (tmp_path / "val.txt").write_text("a.mp4,1\n")
    listed.write_text('a.mp4 0\n"b c.mp4" 1\n\nb c.mp4, 0\n"d,e.mp4",1\n')
    videos = find_videos("list", root)
    want = [("a.mp4", 0), ("b c.mp4", 1), ("b c.mp4", 0), ("d,e.mp4", 1)]
    assert [(os.path.basename(path), label) for path, label in videos.train] == want
    assert videos.classes == ["0", "1"] and videos.val == [(str(tmp_path / "a.mp4"), 1)]
    (tmp_path / "classes.txt").write_bytes("\ufeffwalk\nrun\n\n".encode())
    assert find_videos("list", root).classes == ["walk", "run"]
    lacks = r"1 of 2 train videos are not there \(python -m tools.check_data lists them\), such as"
    for text, words in (
        ("a.mp4\n", "line 1"),
        ("a.mp4 0\na.mp4 x\n", "line 2"),
        ("a.mp4 0\na.mp4 7\n", "a.mp4 the class 7.* none of its 2"),
        ("a.mp4 0\na.mp4 4000000000\n", "line 2: .*4000000000"),
        ("", "has 0 train videos and 2 classes; it needs at least 1 video and 2 classes"),
        ("a.mp4 0\n7\n", "line 2"),
        ("a.mp4 0\nz.mp4 1\n", f"{lacks} .*z.mp4"),
        ("a.mp4 0\nz.mp4 1\nz.mp4 1\n", f"{lacks} .*z.mp4"),
        ("a.mp4 1\n", "no training video of the class 'walk'"),
    ):
        listed.write_text(text)
        with pytest.raises(UserError, match=words):
            find_videos("list", root)


def test_a_lists_missing_videos_are_told_from_those_that_are_there(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text("a.mp4 0\nnone.mp4 0\nb.mp4 1\n")
    videos = find_videos("list", str(tmp_path), whole=())
    there = [(str(tmp_path / "a.mp4"), 0), (str(tmp_path / "b.mp4"), 1)]
    assert videos.train == videos.val == there
    assert videos.missing == [(split, str(tmp_path / "none.mp4")) for split in SPLITS]


# ---------------------------------------------------------------- miniatures of the benchmarks
MPEG4 = {"codec": "mpeg4", "codec_options": {"g": "12", "bf": "2"}}
VP9 = {"codec": "libvpx-vp9", "codec_options": {"g": "20"}}
CLIMB, PUT = "Moving something up", "Putting something, into something"
BENCHMARKS = [
    "k400",
    "k400 flat",
    "ssv2",
    "ssv2 newer",
    "hmdb51",
    "hmdb51 as unpacked",
    "diving48",
]


def benchmark(name, root):
    """A miniature in the layout of a download → {split: [(file, class)]}, files within the root."""
    if name.startswith("k400"):
        return kinetics(root, flat=name == "k400 flat")
    if name.startswith("ssv2"):
        return something(root, newer=name == "ssv2 newer")
    if name.startswith("hmdb51"):
        return hmdb51(root, unpacked=name == "hmdb51 as unpacked")
    return diving48(root)


def video(root, path, **how):
    os.makedirs(os.path.dirname(root / path), exist_ok=True)
    write_anything(str(root / path), **(x264() | {"number": 20} | how))
    return path


def text(root, path, content):
    os.makedirs(os.path.dirname(root / path), exist_ok=True)
    if not isinstance(content, str):
        content = json.dumps(content)
    (root / path).write_text(content)


def kinetics(root, flat):
    """Nested folders, or flat as the archives have it, with the lists in their own folder."""
    pets, lists = "petting animal (not cat)", "annotations/" if flat else ""
    listed = {
        "train": [("zumba", "--a_000001", 1), (pets, "b-#_c", 15), ("zumba", "d", 123)],
        "val": [(pets, "e", 0), ("zumba", "f", 7)],
    }
    found = {}
    for split, rows in listed.items():
        content, found[split] = "label,youtube_id,time_start,time_end,split\n", []
        for label, video_id, start in rows:
            quoted = f'"{label}"' if " " in label else label
            content += f"{quoted},{video_id},{start},{start + 10},{split}\n"
            file = f"{video_id}_{start:06d}_{start + 10:06d}.mp4"
            path = f"{split}/{file}" if flat else f"{split}/{label}/{file}"
            found[split].append((video(root, path), label))
        text(root, f"{lists}{split}.csv", content)
    text(root, f"{lists}test.csv", "youtube_id,time_start,time_end,split\nx,1,11,test\n")
    return found


def something(root, newer):
    """The first release's names of the lists, or those of the newer one."""

    def listed(video_id, template):
        clip = {"id": str(video_id), "label": "moving a pen up", "template": template}
        return clip | {"placeholders": ["a pen"]}

    def clip(video_id, label, **how):
        path = f"20bn-something-something-v2/{video_id}.webm"
        return video(root, path, **(VP9 | how)), label

    climb, into = "Moving [something] up", "Putting [something], into [something]"
    files = {
        "labels": {CLIMB: "1", PUT: "0"},
        "train": [listed(7, climb), listed(8, into), listed(70, climb)],
        "validation": [listed(100, into), listed(9, climb)],
        "test": [{"id": "11"}],
    }
    for name, content in files.items():
        path = f"labels/{name}.json" if newer else f"something-something-v2-{name}.json"
        text(root, path, content)
    return {
        "train": [clip(7, CLIMB, number=9), clip(8, PUT), clip(70, CLIMB)],
        "val": [clip(100, PUT), clip(9, CLIMB, number=1)],
    }


def hmdb51(root, unpacked):
    """The archives' own folders, or everything in the root."""
    splits, place = "", ""
    if unpacked:
        splits, place = "testTrainMulti_7030_splits/", "hmdb51_org/"
    uses = {  # of each video in each of the three splits
        "draw_sword": {
            "a#1_(x);y!_@z.avi": (1, 2, 0),
            "b[0]&.avi": (2, 1, 1),
            "c.avi": (0, 1, 2),
        },
        "sword": {"a#1_(x);y!_@z.avi": (2, 1, 2), "%d.AVI": (1, 2, 1)},
    }
    of_use = {0: [], 1: [], 2: []}
    for label, videos in uses.items():
        for file, use in videos.items():
            path = video(root, f"{place}{label}/{file}", **MPEG4)
            of_use[use[0]].append((path, label))
        for i in range(3):
            content = "".join(f"{file} {use[i]} \n" for file, use in videos.items())
            text(root, f"{splits}{label}_test_split{i + 1}.txt", content + "\n")
    return {"train": of_use[1], "val": of_use[2]}


def diving48(root):
    free, pike = ["Back", "15som", "05Twis", "FREE"], ["Reverse", "Dive", "NoTwis", "PIKE"]
    tuck = ["Back", "Dive", "NoTwis", "TUCK"]
    vocabulary = [free, pike, tuck]
    text(root, "Diving48_vocab.json", vocabulary)
    listed = {
        "train": [("-mmq0PT-u8k_00155", 2), ("_8Vy3_00000", 0), ("q_00001", 2)],
        "val": [("z_00003", 0)],
    }
    found = {}
    for split, name in (("train", "train"), ("val", "test")):
        content, found[split] = [], []
        for file, label in listed[split]:
            clip = {"vid_name": file, "label": label, "start_frame": 0, "end_frame": 19}
            content.append(clip)
            path = video(root, f"rgb/{file}.mp4")
            found[split].append((path, " ".join(vocabulary[label])))
        text(root, f"Diving48_V2_{name}.json", content)
    return found


# ---------------------------------------------------------------- the benchmarks
TRAIN = (
    "--backbone tiny --spatial-frames 4 --bottleneck 8 --batch 2 --workers 0 --epochs 1"
).split()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_read_trained_and_evaluated_as_it_is_downloaded(name, tmp_path, capsys):
    root, out, source = tmp_path / "my data", str(tmp_path / "out"), name.split()[0]
    want = benchmark(name, root)
    videos = find_videos(source, str(root))
    for split in SPLITS:
        got = []
        for path, label in getattr(videos, split):
            assert os.path.isfile(path)
            got.append((os.path.relpath(path, root), videos.classes[label]))
        assert sorted(got) == sorted(want[split])
    assert videos.missing == [] and len(videos.classes) == (3 if source == "diving48" else 2)
    # The recipe's own sampling, augmentation and views, on the tiny backbone.
    train.main(["--data", source, "--root", str(root), "--out", out, *TRAIN])
    assert lines(out)[0]["failed"] == 0 and math.isfinite(lines(out)[0]["train_loss"])
    path = os.path.join(out, "last.pt")
    run = torch.load(path, weights_only=True)["run"]
    assert run["val_videos"] == len(want["val"])
    assert run["val_digest"] == digest(videos.val) and len(run["val_digest"]) == 64
    capsys.readouterr()
    evaluate.main([path, "--workers", "0"])
    printed, (clips, crops) = capsys.readouterr().out, train.RECIPES[source]["views"]
    assert f"({len(want['val'])} videos, {clips} clips x {crops} crops)" in printed
    assert "note:" not in printed
    ending = "-split1" if source == "hmdb51" else ""
    with open(os.path.join(out, f"last.{source}{ending}.json")) as file:
        result = json.load(file)
    assert result["failed"] == 0 and result["missing"] == 0
    assert result["digest"] == run["val_digest"]


def test_classes_are_in_the_benchmarks_own_order(tmp_path):
    classes = {}
    for name in ("ssv2", "hmdb51", "diving48", "k400"):
        benchmark(name, tmp_path / name)
        classes[name] = find_videos(name, str(tmp_path / name)).classes
    assert classes["ssv2"] == [PUT, CLIMB] and classes["hmdb51"] == ["draw_sword", "sword"]
    assert classes["diving48"][1] == "Reverse Dive NoTwis PIKE"
    assert classes["k400"] == ["petting animal (not cat)", "zumba"]


def test_hmdb51_has_three_splits(tmp_path, capsys):
    benchmark("hmdb51", tmp_path)

    def read(split):
        videos = find_videos("hmdb51", str(tmp_path), split)
        both = (videos.train, videos.val)
        return [[os.path.basename(path) for path, _ in samples] for samples in both]

    a, b, c, d = "a#1_(x);y!_@z.avi", "b[0]&.avi", "c.avi", "%d.AVI"
    assert read(1) == read(None) == [[a, d], [b, a]]
    assert read(2) == [[b, a, c], [a, d]]
    with pytest.raises(UserError, match="HMDB51's three; k400 has one"):
        find_videos("k400", str(tmp_path), 2)
    default = train.parse(["--data", "hmdb51"]).out
    assert default == os.path.join("runs", "hmdb51-split1-dualpath-s0")
    out = str(tmp_path / "out")
    data = ["--data", "hmdb51", "--split", "3", "--root", str(tmp_path)]
    train.main([*data, "--out", out, *TRAIN])
    # A split's training videos are another's validation videos.
    note = "note: these 2 validation videos are not the 2 of the training"
    for options, is_noted in (([], False), (["--split", "1"], True)):
        capsys.readouterr()
        evaluate.main([os.path.join(out, "last.pt"), "--workers", "0", *options])
        assert (note in capsys.readouterr().out) == is_noted


def test_kinetics_may_lack_videos_and_says_how_many(tmp_path, capsys):
    root, out = str(tmp_path), str(tmp_path / "out")
    benchmark("k400", tmp_path)
    for split, number in (("train", 9), ("val", 4)):
        with open(tmp_path / f"{split}.csv", "a") as file:
            for i in range(number):
                file.write(f"zumba,more{i},0,10,{split}\n")
                one = tmp_path / "val/zumba/f_000007_000017.mp4"
                shutil.copy(one, tmp_path / f"{split}/more{i}_000000_000010.mp4")
    before = find_videos("k400", root)
    os.remove(tmp_path / "train/more8_000000_000010.mp4")
    os.remove(tmp_path / "val/more3_000000_000010.mp4")
    videos = find_videos("k400", root)
    assert videos.missing == [
        ("train", f"{tmp_path}/train/more8_000000_000010.*"),
        ("val", f"{tmp_path}/val/more3_000000_000010.*"),
    ]
    assert len(videos.train) == 11 and len(videos.val) == 5
    assert digest(videos.val) != digest(before.val)
    train.main(
        ["--data", "k400", "--root", root, "--out", out, *TRAIN, "--frames", "16", "--batch", "8"]
    )
    said = "11 training and 5 validation videos, 2 classes; 2 listed videos are missing"
    assert said in capsys.readouterr().out
    evaluate.main([os.path.join(out, "last.pt"), "--workers", "0"])
    said = "(5 videos, 3 clips x 1 crops); 1 listed videos are missing"
    assert said in capsys.readouterr().out
    os.remove(tmp_path / "train/more7_000000_000010.mp4")
    assert len(find_videos("k400", root).train) == 10
    os.remove(tmp_path / "train/more6_000000_000010.mp4")  # more than a fifth
    with pytest.raises(UserError, match="3 of 12 train videos are not there .*such as .*more6"):
        find_videos("k400", root)
    shutil.rmtree(tmp_path / "train")  # evaluation needs no training video
    capsys.readouterr()
    evaluate.main([os.path.join(out, "last.pt"), "--workers", "0"])
    assert "(5 videos, 3 clips x 1 crops)" in capsys.readouterr().out


# ---------------------------------------------------------------- annotations
HEAD = "label,youtube_id,time_start,time_end,split\n"
LABELS, FIRST, OTHER = (
    f"something-something-v2-{name}.json" for name in ("labels", "train", "validation")
)
VOCABULARY, DIVES, TEST_DIVES = (
    f"Diving48_{name}.json" for name in ("vocab", "V2_train", "V2_test")
)
MISTAKES = [  # benchmark, file, its new content (None: it is deleted), what is said
    ("k400", "train.csv", None, "train.csv is not there, nor is .*annotations/train.csv"),
    ("k400", "val.csv", "a.mp4,0\nb.mp4,1\n", r"val.csv.* docs/data.md has it \(KeyError: "),
    ("k400", "val.csv", HEAD + "zumba,e,zero,10,val\n", "val.csv.*zero"),
    (
        "k400",
        "val.csv",
        HEAD + "juggling,e,0,10,val\n",
        r"val video .*/val/.*/e_000000_000010\.mp4 the class 'juggling'",
    ),
    ("k400", "train.csv", HEAD, "no training video"),
    ("k400", "val.csv", HEAD, "has 0 val videos"),
    ("ssv2", LABELS, None, "labels.json is not there, nor is .*labels/labels.json"),
    ("ssv2", FIRST, "[{]", "train.json.*JSONDecodeError"),
    ("ssv2", OTHER, '[{"id": "11"}]', r"validation.json.*\(KeyError: 'template'\)"),
    (
        "ssv2",
        OTHER,
        '[{"id": 9, "template": "Eating [something]"}]',
        r"val video .*-v2/9\.webm the class 'Eating something'",
    ),
    (
        "ssv2",
        FIRST,
        '[{"id": "7", "template": "Moving [something] up"}]',
        "no training video of the class 'Putting",
    ),
    (
        "ssv2",
        "20bn-something-something-v2/9.webm",
        None,
        "1 of 2 val videos are not there .*such as .*20bn-something-something-v2/9",
    ),
    ("hmdb51", "sword_test_split1.txt", "a.avi one", "sword_test_split1.txt.*one"),
    ("hmdb51", "draw_sword_test_split1.txt", "", "class 'draw_sword'"),
    (
        "hmdb51",
        "sword/%d.AVI",
        None,
        "1 of 2 train videos are not there .*such as .*sword/%d",
    ),
    ("diving48", VOCABULARY, None, "Diving48_vocab.json is not there"),
    ("diving48", VOCABULARY, "5", "vocab.json.*TypeError"),
    ("diving48", VOCABULARY, "[" * 100000, "vocab.json.*RecursionError"),
    (
        "diving48",
        TEST_DIVES,
        '[{"vid_name": "z_00003", "label": 3}]',
        r"val video .*rgb/z_00003\.mp4 the class 3, which is none of its 3",
    ),
    ("diving48", TEST_DIVES, '[{"vid_name": "z_00003", "label": -1}]', "class -1"),
    ("diving48", DIVES, '{"vid_name": "z_00003"}', "V2_train.json.*TypeError"),
]


@pytest.mark.parametrize(
    "name, file, content, words", MISTAKES, ids=[f"{row[0]} {row[1]}" for row in MISTAKES]
)
def test_annotations_and_their_mistakes(name, file, content, words, tmp_path):
    benchmark(name, tmp_path)
    if content is None:
        os.remove(tmp_path / file)
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        find_videos(name, str(tmp_path))
    assert str(tmp_path) in str(error.value)
    for path in tmp_path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    with pytest.raises(UserError, match="is not there|has no file CLASS_test_split1.txt"):
        find_videos(name, str(tmp_path))
