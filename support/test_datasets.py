"""Data sets are read in the layouts people have; what is wrong with one is said in a sentence."""

import csv
import functools
import json
import os
import shutil

import pytest

from conftest import SHARED, THOROUGH, needs_shared, write_anything, x264
from support.datasets import SPLITS, digest, find_videos
from support.processes import UserError


def put(root, *paths):
    """Make empty files; a folder, where a path ends in a slash."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (root / path).mkdir(exist_ok=True)
        else:
            (root / path).touch()


def refused(name, root, words):
    with pytest.raises(UserError, match=words) as error:
        find_videos(name, str(root))
    assert str(root) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- your own videos


def test_folders_and_their_mistakes(micro, tmp_path):
    videos = find_videos("folder", micro)
    assert (len(videos.train), len(videos.val), len(videos.classes)) == (16, 8, 8)
    for path, label in videos.train:
        assert videos.classes[label] == os.path.basename(os.path.dirname(path))
    root = tmp_path / "x"
    for paths, words in (
        ([], "x is not there"),
        (["./"], "train is not there .*--data list"),
        (["train/a/"], "val is not there"),
        (["val/a/"], "has 0 train videos and 1 classes"),
        (["train/a/1.mp4", "val/a/2.MKV"], "has 1 train videos and 1 classes"),
        (["train/b/"], "no training video of the class 'b'"),
        (["val/c/note.txt", "train/b/deep/3.webm", "val/c/4.mp4"], "4.mp4 is of the class 'c'"),
    ):
        put(root, *paths)
        refused("folder", root, words)
    (root / "val/c/4.mp4").unlink()
    # Left behind by other programs:
    put(root, "train/a/._1.mp4", "train/.ipynb_checkpoints/x.mp4")
    (root / "train/b/gone.mp4").symlink_to(root / "moved.mp4")
    videos = find_videos("folder", str(root))
    found = [os.path.relpath(path, root) for path, _ in videos.train + videos.val]
    assert found == ["train/a/1.mp4", "train/b/deep/3.webm", "val/a/2.MKV"]


def test_lists_and_what_is_missing_in_them(tmp_path):
    root, listed = str(tmp_path), tmp_path / "train.txt"
    put(tmp_path, "a.mp4", "b c.mp4", "d,é.mp4")
    (tmp_path / "val.txt").write_text("a.mp4,1\n")
    listed.write_bytes('a.mp4 0\r\n"b c.mp4" 1\n\nb c.mp4, 0\n"d,é.mp4",1'.encode())
    videos = find_videos("list", root)
    want = [("a.mp4", 0), ("b c.mp4", 1), ("b c.mp4", 0), ("d,é.mp4", 1)]
    assert videos.train == [(f"{root}/{name}", label) for name, label in want]
    assert videos.classes == ["0", "1"] and videos.val == [(f"{root}/a.mp4", 1)]
    listed.write_text("a.mp4 0\nnone.mp4 0\nb c.mp4 1\n")
    (tmp_path / "classes.txt").write_bytes("\ufeffwalk\nrun\n\n".encode())
    videos = find_videos("list", root, whole=())
    assert videos.train == [(f"{root}/a.mp4", 0), (f"{root}/b c.mp4", 1)]
    assert videos.missing == [("train", f"{root}/none.mp4")] and videos.classes == ["walk", "run"]


FROM_0 = "train.txt: labels must count from 0;"


@pytest.mark.parametrize(
    "text, words",
    [
        ("a.mp4 1\nb.mp4 2\n", f"{FROM_0} 0 is missing"),
        ("a.mp4 0\nb.mp4 4000\n", f"{FROM_0} 1 is missing"),
        ("a.mp4 0\na.mp4 x\n", "train.txt is .*line 2: 'a.mp4 x' is not `path label`"),
        ("", "the class 1, none of the 0"),
        ("a.mp4 0\nz.mp4 1\nz.mp4 1\n", "2 of 3 train .*/z.mp4; python -m tools.check_data"),
        ("a.mp4 0\n", "b.mp4 is of the class 1, none of the 1"),
        ("a.mp4 0\n".encode("utf-16"), "train.txt is not as .*'utf-8' codec can't decode"),
    ],
)
def test_mistakes_in_lists(text, words, tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path, "train.txt", text)
    write(tmp_path, "val.txt", "b.mp4 1\n")
    refused("list", tmp_path, words)


# ---------------------------------------------------------------- the layouts people have
CLIMB, PUT = "Moving something up", "Putting something, into something"
PETS, DIVES = "petting animal (not cat)", ["Back 15som FREE", "Reverse PIKE", "Back TUCK"]
HEAD = "label,youtube_id,time_start,time_end,split\n"
SSV2, DIVING = "something-something-v2", "Diving48"
VIDEOS = {  # of the benchmarks as they are downloaded: {split: {file: class}}
    "k400": {
        "train": {
            "train/zumba/--a_00_000001_000011.mp4": "zumba",
            f"train/{PETS}/b-#_c_000015_000025.mp4": PETS,
        },
        "val": {"val/zumba/f_000007_000017.mp4": "zumba"},
    },
    "ssv2": {
        "train": {f"20bn-{SSV2}/7.webm": CLIMB, f"20bn-{SSV2}/70.webm": PUT},
        "val": {f"20bn-{SSV2}/9.webm": CLIMB, f"20bn-{SSV2}/100.webm": PUT},
    },
    "hmdb51": {
        "train": {"hmdb51_org/draw_sword/a;!.avi": "draw_sword", "hmdb51_org/sword/%.AVI": "sword"},
        "val": {"hmdb51_org/sword/a;!.avi": "sword", "hmdb51_org/draw_sword/[0].avi": "draw_sword"},
    },
    "diving48": {
        "train": {"rgb/-mm_00155.mp4": DIVES[2], "rgb/_8V_00000.mp4": DIVES[0]},
        "val": {"rgb/z_00003.mp4": DIVES[0]},
    },
}
UP, INTO = "Moving [something] up", "Putting [something], into [something]"
LISTS = {
    "k400": {
        "train.csv": f'{HEAD}zumba,--a_00,1,11,train\n"{PETS}",b-#_c,15,25,train\n',
        "val.csv": f"{HEAD}zumba,f,7.0,17.0,val\n",
    },
    "ssv2": {
        f"{SSV2}-labels.json": {CLIMB: "1", PUT: "0"},
        f"{SSV2}-train.json": [{"id": "7", "template": UP}, {"id": "70", "template": INTO}],
        f"{SSV2}-validation.json": [{"id": "9", "template": UP}, {"id": "100", "template": INTO}],
    },
    "hmdb51": {
        "testTrainMulti_7030_splits/draw_sword_test_split1.txt": "a;!.avi 1 \n[0].avi 2\nc.avi 0\n",
        "testTrainMulti_7030_splits/sword_test_split1.txt": "%.AVI 1 \n\na;!.avi 2",
    },
    "diving48": {
        f"{DIVING}_vocab.json": [dive.split() for dive in DIVES],
        f"{DIVING}_V2_train.json": [
            {"vid_name": "-mm_00155", "label": 2},
            {"vid_name": "_8V_00000", "label": 0},
        ],
        f"{DIVING}_V2_test.json": [{"vid_name": "z_00003", "label": 0}],
    },
}
CLASSES = {"k400": [PETS, "zumba"], "ssv2": [PUT, CLIMB], "diving48": DIVES}
CLASSES["hmdb51"] = ["draw_sword", "sword"]


@functools.cache
def small_video():
    path = write_anything(f"/tmp/{os.getpid()}.mp4", number=20, **x264())
    with open(path, "rb") as file:
        content = file.read()
    os.remove(path)
    return content


def write(root, path, content):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def benchmark(name, root):
    """A miniature in the layout of the download."""
    for path, content in LISTS[name].items():
        write(root, path, content)
    for path in [*VIDEOS[name]["train"], *VIDEOS[name]["val"]]:
        write(root, path, small_video())


def into(folder, *names):
    return {name: f"{folder}/{name}" for name in names}


MOVES = [
    ("k400", {}),
    ("k400", into("annotations", "train.csv", "val.csv")),
    ("k400", {"val.csv": "validate.csv", "train": "train_256", "val": "val_256"}),
    ("k400", {f"{split}.csv": f"annotations/kinetics_{split}.csv" for split in SPLITS}),
    ("k400", {split: f"videos_{split}" for split in SPLITS}),
    ("k400", {f"{split}.csv": f"kinetics-400_{split}.csv" for split in SPLITS}),
    ("k400", into("videos", "train", "val")),
    ("k400", {path: f"train/{path.split('/')[2]}" for path in VIDEOS["k400"]["train"]}),
    ("ssv2", {}),
    ("ssv2", {name: name.replace(f"{SSV2}-", "labels/") for name in LISTS["ssv2"]}),
    ("ssv2", into("annotations", *LISTS["ssv2"]) | {f"20bn-{SSV2}": "videos"}),
    ("hmdb51", {}),
    ("hmdb51", {"testTrainMulti_7030_splits": "annotations", "hmdb51_org": "videos"}),
    ("hmdb51", {"hmdb51_org/sword": "sword", "hmdb51_org/draw_sword": "draw_sword"}),
    ("diving48", {}),
    ("diving48", into("annotations", *LISTS["diving48"]) | {"rgb": "videos"}),
]


def move(root, moves):
    for old, new in moves.items():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / old, root / new)


@pytest.mark.parametrize("name, moves", MOVES)
def test_a_benchmark_is_found_in_each_layout(name, moves, tmp_path):
    root = tmp_path / "my [data] {x}"
    benchmark(name, root)
    before = find_videos(name, str(root))
    move(root, moves)
    videos = find_videos(name, str(root))
    assert videos.classes == CLASSES[name] and videos.missing == []
    for split in SPLITS:
        got = {os.path.relpath(p, root): videos.classes[c] for p, c in getattr(before, split)}
        assert got == VIDEOS[name][split]
        assert digest(getattr(videos, split)) == digest(getattr(before, split))
        assert all(os.path.isfile(path) for path, _ in getattr(videos, split))
    for new in moves.values():
        assert os.path.dirname(new) in videos.found


def test_kinetics_videos_may_be_named_by_the_id_alone(tmp_path):
    benchmark("k400", tmp_path)
    for path in [*VIDEOS["k400"]["train"], *VIDEOS["k400"]["val"]]:
        move(tmp_path, {path: f"{path[: -len('_000001_000011.mp4')]}.mkv"})
    videos = find_videos("k400", str(tmp_path))
    assert (len(videos.train), len(videos.val), videos.missing) == (2, 1, [])


@pytest.mark.parametrize("name", [*CLASSES, "list"])
@pytest.mark.parametrize(
    "lists, line",
    [
        ("{}.csv", "{root}/videos/{path} {label}"),
        ("{}.csv", "videos/{path},{label}"),
        ("x400_{}_list_videos.txt", "{path} {label}"),
        ("hmdb51_{}_split_1_videos.txt", '"{path}"\t{label}'),
    ],
)
def test_lists_of_paths_serve_any_data_set(name, lists, line, tmp_path):
    for split, paths in (("train", ("a/1.mp4", "b/2.mp4")), ("val", ("b/3.mp4",))):
        put(tmp_path / "videos", *paths)
        rows = [line.format(root=tmp_path, path=path, label="ab".index(path[0])) for path in paths]
        write(tmp_path, lists.format(split), "\n".join(rows))
    videos = find_videos(name, str(tmp_path))
    got = [(os.path.relpath(path, tmp_path), label) for path, label in videos.train + videos.val]
    assert got == [("videos/a/1.mp4", 0), ("videos/b/2.mp4", 1), ("videos/b/3.mp4", 1)]
    assert lists.format("val") in videos.found
    with pytest.raises(UserError, match="--split 2 is not that of|no train list|HMDB51's three"):
        find_videos(name, str(tmp_path), 2)


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("k400", "train.csv", "annotations/kinetics_train.csv"),
        ("k400", "train", "train_256"),
        ("ssv2", f"{SSV2}-validation.json", "labels/validation.json"),
        ("hmdb51", "testTrainMulti_7030_splits", "annotations"),
        ("hmdb51", "hmdb51_org", "videos"),
    ],
)
def test_two_candidates_are_refused_by_name(name, old, new, tmp_path):
    benchmark(name, tmp_path)
    copy = shutil.copytree if (tmp_path / old).is_dir() else shutil.copy
    (tmp_path / new).parent.mkdir(exist_ok=True)
    copy(tmp_path / old, tmp_path / new)
    refused(name, tmp_path, f"has both .*({old}.*{new}|{new}.*{old})")


@needs_shared
def test_the_real_lists_of_hmdb51(tmp_path):
    shutil.copytree(f"{SHARED}/annotations/hmdb51", tmp_path / "annotations")
    want = {1: set(), 2: set(), 3: set()}
    for name in os.listdir(tmp_path / "annotations"):
        label, split = name.removesuffix(".txt").split("_test_split")
        folder = f"{tmp_path}/videos/{label}"
        os.makedirs(folder, exist_ok=True)
        for line in (tmp_path / "annotations" / name).read_text().splitlines():
            video, use = line.split()
            if split == "1":  # the three name the same videos
                open(f"{folder}/{video}", "w").close()
            if use == "1":
                want[int(split)].add((f"{folder}/{video}", label))
    for split in want:
        videos = find_videos("hmdb51", str(tmp_path), split)
        assert {(path, videos.classes[label]) for path, label in videos.train} == want[split]
        assert (len(videos.train), len(videos.val), len(videos.classes)) == (3570, 1530, 51)


@needs_shared
def test_the_real_list_of_kinetics(tmp_path):
    with open(f"{SHARED}/annotations/k400/val.csv") as file:
        lines = file.readlines()
    lines[1:] = lines[1 :: 1 if THOROUGH else 20]
    for split in SPLITS:
        write(tmp_path, f"{split}.csv", "".join(lines))
        for row in csv.DictReader(lines):
            folder = tmp_path / split / row["label"]
            folder.mkdir(parents=True, exist_ok=True)
            end = int(row["time_end"])
            (folder / f"{row['youtube_id']}_{end - 10:06d}_{end:06d}.mp4").touch()
    videos = find_videos("k400", str(tmp_path))
    assert (len(videos.val), len(videos.classes), videos.missing) == (len(lines) - 1, 400, [])
    for path, label in videos.train:
        assert os.path.basename(os.path.dirname(path)) == videos.classes[label]


def test_a_fifth_of_kinetics_may_be_missing(tmp_path):
    benchmark("k400", tmp_path)
    rows = "".join(f"zumba,more{i},0,10,train\n" for i in range(8))
    write(tmp_path, "train.csv", LISTS["k400"]["train.csv"] + rows)
    put(tmp_path / "train", *[f"more{i}_000000_000010.mp4" for i in range(6)])
    videos = find_videos("k400", str(tmp_path))
    absent = [f"{tmp_path}/train/more{i}_000000_000010" for i in (6, 7)]
    assert videos.missing == [("train", path) for path in absent] and len(videos.train) == 8
    os.remove(tmp_path / "train/more5_000000_000010.mp4")
    refused("k400", tmp_path, "3 of 10 train videos are not there, such as .*more5")
    shutil.rmtree(tmp_path / "train")  # evaluation needs no training video
    assert len(find_videos("k400", str(tmp_path), whole=("val",)).val) == 1


HMDB51_LIST = "testTrainMulti_7030_splits/sword_test_split1.txt"
MISTAKES = [  # benchmark, file, its new content (None: it is deleted), what is said
    ("k400", "train.csv", None, "no train list: looked for train.csv, kinetics-400_train.csv"),
    ("k400", "val.csv", "a.mp4,0\nb.mp4,1\n", "val.csv is not as docs/data.md has it .*KeyError"),
    ("k400", "val.csv", f"{HEAD}zumba,e,zero,10,val\n", "val.csv is not as .*zero"),
    ("k400", "val.csv", f"{HEAD}run,e,0,10,val\n", "e_000000_.* is of the class 'run'"),
    ("k400", "val.csv", HEAD, "has 0 val videos"),
    ("ssv2", f"{SSV2}-labels.json", None, "no classes list: looked for .*labels.json, labels.json"),
    ("ssv2", f"{SSV2}-train.json", "[{]", "train.json.*JSONDecodeError"),
    ("ssv2", f"{SSV2}-train.json", [{"id": "1"}], "train.json.*'template'"),
    ("ssv2", f"20bn-{SSV2}/9.webm", None, "1 of 2 val videos .*such as .*v2/9"),
    ("hmdb51", "hmdb51_org/sword/%.AVI", None, "1 of 2 train videos .*such as .*sword/%"),
    ("hmdb51", HMDB51_LIST, "a one", "split1.txt.*one"),
    ("hmdb51", "testTrainMulti_7030_splits", None, r"looked for \*_test_split1.txt"),
    ("diving48", f"{DIVING}_vocab.json", [["Back"]], "the class 2, none of the 1"),
]


@pytest.mark.parametrize("name, file, content, words", MISTAKES)
def test_annotations_and_their_mistakes(name, file, content, words, tmp_path):
    benchmark(name, tmp_path)
    if content is None:
        move(tmp_path, {file: "elsewhere/x"})
    else:
        write(tmp_path, file, content)
    refused(name, tmp_path, words)
