"""Data sets as they are downloaded: where their videos and annotations lie, as lists of videos.

A layout is a function of the root folder that returns Videos; `find_videos` checks what it found.
"""

import csv
import hashlib
import json
import os
import re
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

from support.demo import draw_data
from support.processes import UserError

SPLITS = ("train", "val")
VIDEO_SUFFIXES = ".mp4 .avi .webm .mkv .mov .m4v .mpg .mpeg .flv .wmv .3gp .ts".split()


class Videos(NamedTuple):
    """What every data set comes down to."""

    train: list  # (path, label) pairs
    val: list
    classes: list  # the labels' names
    missing: list  # (split, path) of listed files that are not there


class Row(NamedTuple):
    """A listed video."""

    path: str
    label: object  # the class's name or number
    there: bool


# ---------------------------------------------------------------- your own videos


def folder_data(root):
    """ROOT/train/CLASS/*.mp4 and ROOT/val/CLASS/*.mp4; the classes are train's folders, sorted."""
    rows, names = {}, {}
    for split in SPLITS:
        folders = os.scandir(existing(root, split))
        names[split] = sorted(f.name for f in folders if f.is_dir() and f.name[0] != ".")
        rows[split] = [
            Row(path, name, True)
            for name in names[split]
            for path in video_files(f"{root}/{split}/{name}")
        ]
    return assemble(root, names["train"], rows)


def list_data(root):
    """ROOT/train.txt and ROOT/val.txt, a line a video: `path label` or `path,label`.

    Paths are relative to ROOT, in double quotes or not; labels count from 0 without gaps.
    ROOT/classes.txt, if it is there, names the classes, a line each.
    """
    rows = {split: read_list(root, f"{split}.txt") for split in SPLITS}
    classes = [str(i) for i in range(len({row.label for row in rows["train"]}))]
    if os.path.exists(f"{root}/classes.txt"):
        with annotations(root, "classes.txt") as file:
            classes = [name.strip() for name in file.read().rstrip().split("\n")]
    return assemble(root, classes, rows)


def read_list(root, name):
    rows, path = [], existing(root, name)
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # names may be bytes
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line:
                continue
            match = re.fullmatch(r'("?)(.+?)\1(?:\s*,\s*|\s+)(\d{1,9})', line)
            if not match:
                raise UserError(
                    f"{path}, line {number}: {line!r} is not `path label` or `path,label`, label a"
                    " number"
                )
            video = os.path.join(root, match[2])
            rows.append(Row(video, int(match[3]), os.path.isfile(video)))
    return rows


# ---------------------------------------------------------------- the benchmarks


def kinetics_data(root):
    """train.csv, val.csv: label,youtube_id,time_start,time_end,split.

    train/, val/: CLASS/ID_000001_000011.mp4, or flat.
    """
    rows = {}
    for split in SPLITS:
        listed = []
        with annotations(root, f"{split}.csv", f"annotations/{split}.csv") as file:
            for row in csv.DictReader(file):
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
                name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
                listed.append((split, name, row["label"]))
        rows[split] = locate(root, listed)
    return assemble(root, sorted({row.label for row in rows["train"]}), rows)


def something_data(root):
    """something-something-v2-{train,validation,labels}.json, or labels/{…}.json.

    20bn-something-something-v2/ID.webm.
    """

    def path(name):
        return f"something-something-v2-{name}.json", f"labels/{name}.json"

    rows = {}
    with annotations(root, *path("labels")) as file:
        numbers = {label: int(number) for label, number in json.load(file).items()}
    for split, name in zip(SPLITS, ("train", "validation")):
        listed = []
        with annotations(root, *path(name)) as file:
            for clip in json.load(file):
                # A template reads "Putting [something] on [something]"; its label has no brackets.
                label = clip["template"].replace("[", "").replace("]", "")
                listed.append(("20bn-something-something-v2", str(clip["id"]), label))
        rows[split] = locate(root, listed)
    return assemble(root, sorted(numbers, key=numbers.get), rows)


def hmdb51_data(root, split=1):
    """CLASS_test_split{1,2,3}.txt: lines of `video.avi use`; use 1 is train, 2 test, 0 neither.

    They lie in ROOT or its folder testTrainMulti_7030_splits; CLASS/*.avi lie in ROOT,
    hmdb51_org or videos.
    """
    ending, folder = f"_test_split{split}.txt", f"{root}/testTrainMulti_7030_splits"
    if not os.path.isdir(folder):
        folder = root
    names = [name for name in os.listdir(folder) if name.endswith(ending) and name[0] != "."]
    classes = sorted(name.removesuffix(ending) for name in names)
    if not classes:
        raise UserError(f"{folder} has no file CLASS{ending}; --data hmdb51 needs one a class")
    place = ""
    for candidate in ("videos/", "hmdb51_org/"):  # the latter, if both are there
        if any(os.path.isdir(f"{root}/{candidate}{name}") for name in classes):
            place = candidate
    listed = {1: [], 2: [], 0: []}
    for name in classes:
        with annotations(folder, name + ending) as file:
            for line in filter(str.strip, file):
                video, use = line.split()
                listed[int(use)].append((place + name, os.path.splitext(video)[0], name))
    rows = {"train": locate(root, listed[1]), "val": locate(root, listed[2])}
    return assemble(root, classes, rows)


def diving48_data(root):
    """Diving48_V2_{train,test}.json, Diving48_vocab.json; rgb/ID.mp4."""

    def path(name):
        return f"Diving48_{name}.json", f"annotations/Diving48_{name}.json"

    with annotations(root, *path("vocab")) as file:
        classes = [" ".join(words) for words in json.load(file)]
    rows = {}
    for split, name in zip(SPLITS, ("V2_train", "V2_test")):
        with annotations(root, *path(name)) as file:
            clips = json.load(file)
            listed = [("rgb", str(clip["vid_name"]), int(clip["label"])) for clip in clips]
        rows[split] = locate(root, listed)
    return assemble(root, classes, rows)


def demo_data(root):
    """Drawn at the first use; then a folder a class."""
    draw_data(root, (1536, 256))
    return folder_data(root)


SOURCES = {
    "k400": kinetics_data,
    "ssv2": something_data,
    "hmdb51": hmdb51_data,
    "diving48": diving48_data,
    "folder": folder_data,
    "list": list_data,
    "demo": demo_data,
}

# ---------------------------------------------------------------- what the layouts share


@contextmanager
def annotations(root, *names):
    """The first of these files that is there, open; what is wrong inside becomes a UserError."""
    path = existing(root, *names)
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            yield file
    except Exception as error:  # text, numbers, CSV and JSON each fail in their own ways
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not as docs/data.md has it ({reason})") from error


def existing(root, *names):
    """The path of the first of these that is in ROOT."""
    paths = [f"{root}/{name}" for name in names]
    for path in paths:
        if os.path.exists(path):
            return path
    raise UserError(", nor is ".join([f"{paths[0]} is not there", *paths[1:]]))


def video_files(folder):
    """The sorted paths of the videos in a folder and the folders in it.

    Dead links, and names that begin with a dot, are left out: other programs leave them behind.
    """
    if not os.path.isdir(folder):
        return []
    files = []
    for entry in os.scandir(folder):
        if entry.name[0] == ".":
            continue
        if entry.is_dir():
            files += video_files(entry.path)
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES:
            files.append(entry.path)
    return sorted(files)


def locate(root, listed):
    """(folder, video without suffix, class) → rows, with the suffixes that the disk has.

    Each folder is listed once: to ask a network disk for 240,000 names would take minutes.
    """
    paths = {}
    for folder in {folder for folder, *_ in listed}:
        found = video_files(f"{root}/{folder}")
        paths[folder] = {os.path.splitext(os.path.basename(path))[0]: path for path in found}
    rows = []
    for folder, video, label in listed:
        path = paths[folder].get(video)
        rows.append(Row(path or f"{root}/{folder}/{video}.*", label, path is not None))
    return rows


def assemble(root, classes, rows):
    """Each split's rows → Videos: the first video of each class, then the second of each, …

    In this order --limit sees all classes.
    """
    if not classes:
        raise UserError(f"{root} has no training videos, so no classes")
    numbers = {name: i for i, name in enumerate(classes)}
    found, missing = {}, []
    for split in SPLITS:
        found[split], seen = [], Counter()
        for row in rows[split]:
            label = numbers.get(row.label, row.label)
            if label not in range(len(classes)):
                raise UserError(
                    f"{root} gives the {split} video {row.path} the class {label!r}, which is none"
                    f" of its {len(classes)}"
                )
            if row.there:
                found[split].append((seen[label], label, row.path))
            else:
                missing.append((split, row.path))
            seen[label] += 1
        found[split] = [(path, label) for _, label, path in sorted(found[split])]
    return Videos(found["train"], found["val"], classes, missing)


def find_videos(name, root=None, split=None, whole=SPLITS):
    """The videos of a data set; UserError unless those of each split in `whole` are complete."""
    root = root or os.path.join("data", name)
    if split and name != "hmdb51":
        raise UserError(f"--split chooses one of HMDB51's three; {name} has one")
    if name != "demo" and not os.path.isdir(root):
        raise UserError(f"the data folder {root} is not there; say with --root where it is")
    videos = SOURCES[name](root, split) if split else SOURCES[name](root)
    for part in whole:
        check_complete(name, root, videos, part)
    return videos


def check_complete(name, root, videos, split):
    there = getattr(videos, split)
    absent = sorted({path for part, path in videos.missing if part == split})
    listed = len({path for path, _ in there}) + len(absent)
    # Every download of Kinetics lacks some videos; the other data sets come whole.
    tolerated = listed // 5 if name == "k400" else 0
    if len(absent) > tolerated:
        raise UserError(
            f"{len(absent)} of {listed} {split} videos are not there (python -m tools.check_data"
            f" lists them), such as {absent[0]}"
        )
    classes = videos.classes
    if not there or len(classes) < 2:
        have = f"{len(there)} {split} videos and {len(classes)} classes"
        raise UserError(f"{root} has {have}; it needs at least 1 video and 2 classes")
    empty = sorted(set(range(len(classes))) - {label for _, label in there})
    # Diving48's corrected labels (V2) do not use all of its 48 names.
    if empty and split == "train" and name != "diving48":
        raise UserError(f"{root} has no training video of the class {classes[empty[0]]!r}")


def digest(samples):
    """SHA-256 over the names and labels of videos, whatever their folders and containers.

    Two downloads of Kinetics differ by hundreds of videos, and their accuracies by as much as
    papers argue about.
    """
    lines = []
    for path, label in samples:
        name = os.path.splitext(os.path.basename(path))[0]
        lines.append(f"{name}\t{label}\n")
    return hashlib.sha256(os.fsencode("".join(sorted(lines)))).hexdigest()
