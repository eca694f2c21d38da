"""Data sets in the layouts in which people have them (the table LAYOUTS), as lists of videos."""

import csv
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

from support.demo import draw_data
from support.processes import UserError

SPLITS = ("train", "val")
PARTS = (*SPLITS, "classes")
VIDEO_SUFFIXES = ".mp4 .avi .webm .mkv .mov .m4v .mpg .mpeg .flv .wmv .3gp .ts".split()
LIST_FOLDERS = ("", "annotations", "labels", "testTrainMulti_7030_splits")
PATH_AND_LABEL = re.compile(r'("?)(.+?)\1(?:\s*,\s*|\s+)(\d{1,9})')
HMDB51_LISTS = "*_test_split{number}.txt"  # a list a class


class Videos(NamedTuple):
    """What every data set comes down to."""

    train: list  # (path, label) pairs
    val: list
    classes: list  # the labels' names
    missing: list  # (split, path) of listed files that are not there
    empty: list  # (split, name) of the classes without a video
    found: str  # the lists and folders that these come from, for the first line of a run


# ---------------------------------------------------------------- a folder a class
def folder_data(root):
    """ROOT/train/CLASS/*.mp4 and ROOT/val/CLASS/*.mp4; the classes are train's folders, sorted."""
    names, rows = {}, {}
    for split in SPLITS:
        place = f"{root}/{split}"
        if not os.path.isdir(place):
            raise UserError(f"{place} is not there (if you have lists, take --data list)")
        names[split] = sorted(f.name for f in os.scandir(place) if f.is_dir() and f.name[0] != ".")
        rows[split] = []
        for name in names[split]:
            rows[split] += [(name, path, True) for path in video_files(f"{place}/{name}")]
    return assemble(names["train"], rows, "train/CLASS, val/CLASS")


def video_files(folder):
    """The sorted paths of the videos in a folder and the folders in it.

    Dead links, and names that begin with a dot, are left out: other programs leave them behind.
    """
    files = []
    for entry in os.scandir(folder):
        if entry.name[0] == ".":
            continue
        if entry.is_dir():
            files += video_files(entry.path)
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES:
            files.append(entry.path)
    return sorted(files)


# ---------------------------------------------------------------- what is in a list
# A reader yields (label, names of which the file has one, its folder within that of the videos).
def read_path_list(file, path, split):
    """Lines of `path label` or `path,label`, the path in double quotes or not."""
    for number, line in enumerate(map(str.strip, file), 1):
        match = PATH_AND_LABEL.fullmatch(line)
        if match:
            folder, name = os.path.split(match[2])
            yield int(match[3]), (name,), folder
        elif line:
            raise ValueError(f"line {number}: {line!r} is not `path label` or `path,label`")


def read_kinetics(file, path, split):
    """A CSV; the videos are called ID_000001_000011.mp4, or by the id alone."""
    for row in csv.DictReader(file):
        start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        video = row["youtube_id"]
        yield row["label"], (f"{video}_{start:06d}_{end:06d}", video), ""


def read_something(file, path, split):
    for clip in json.load(file):
        # A template reads "Putting [something] on [something]"; its label has no brackets.
        label = clip["template"].replace("[", "").replace("]", "")
        yield label, (str(clip["id"]),), ""


def read_hmdb51(file, path, split):
    """Lines of `video.avi use`; use 1 is train, 2 test, 0 neither."""
    label = os.path.basename(path).rpartition("_test_split")[0]
    for line in filter(str.strip, file):
        video, use = line.split()
        if int(use) == (1 if split == "train" else 2):
            yield label, (os.path.splitext(video)[0],), label


def read_diving48(file, path, split):
    for clip in json.load(file):
        yield int(clip["label"]), (str(clip["vid_name"]),), ""


@contextmanager
def opened(path):
    """The text of a list; what is wrong inside becomes a UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except Exception as error:  # text, numbers, CSV and JSON each fail in their own ways
        kind = type(error).__name__
        raise UserError(f"{path} is not as docs/data.md has it ({kind}: {error})") from error


def name_classes(files, rows):
    """From the file that names them, or else from the training list."""
    for path in files["classes"]:
        with opened(path) as file:
            if path.endswith(".txt"):
                return [name.strip() for name in file.read().rstrip().split("\n")]
            content = json.load(file)
            if isinstance(content, dict):  # Something-Something's {name: number}
                return sorted(content, key=lambda name: int(content[name]))
            return [" ".join(words) for words in content]  # Diving-48's [[word, …], …]
    labels = sorted({label for label, _, _ in rows["train"]})
    if labels and isinstance(labels[0], str):
        return labels
    for number, label in enumerate(labels):
        if label != number:
            raise UserError(f"{files['train'][0]}: labels must count from 0; {number} is missing")
    return [str(label) for label in labels]


class Layout(NamedTuple):
    """How to read a list, and the names under which people have the files of a data set.

    * is any text, {split} train or val, {number} that of HMDB51's split.
    """

    read_list: Callable
    train: tuple  # names of the list, in any of LIST_FOLDERS
    val: tuple
    folders: tuple  # of the videos
    classes: tuple = ()


OPENMMLAB = ("*_{split}_list_videos.txt", "*_{split}_split_{number}_videos.txt")
LAYOUTS = {
    "k400": Layout(
        read_kinetics,
        train=("train.csv", "kinetics-400_train.csv", "kinetics_train.csv"),
        val=("val.csv", "validate.csv", "kinetics-400_val.csv", "kinetics_val.csv"),
        folders=("{split}", "{split}_256", "videos_{split}", "videos"),
    ),
    "ssv2": Layout(
        read_something,
        train=("something-something-v2-train.json", "train.json"),
        val=("something-something-v2-validation.json", "validation.json"),
        classes=("something-something-v2-labels.json", "labels.json"),
        folders=("20bn-something-something-v2", "videos"),
    ),
    "hmdb51": Layout(
        read_hmdb51, (HMDB51_LISTS,), (HMDB51_LISTS,), folders=("hmdb51_org", "videos", "")
    ),
    "diving48": Layout(
        read_diving48,
        train=("Diving48_V2_train.json",),
        val=("Diving48_V2_test.json",),
        classes=("Diving48_vocab.json",),
        folders=("rgb", "videos"),
    ),
    "list": Layout(  # also what all the others fall back on
        read_path_list,
        train=("train.txt", "train.csv", *OPENMMLAB),
        val=("val.txt", "val.csv", "validate.csv", *OPENMMLAB),
        classes=("classes.txt", "*labels.json", "Diving48_vocab.json"),
        folders=("", "videos", "videos_{split}", "videos/{split}", "{split}", "{split}_256"),
    ),
}
SOURCES = (*LAYOUTS, "folder", "demo")


# ---------------------------------------------------------------- finding lists and videos
def listed_data(name, root, number):
    """The videos in the data set's own lists, or else in lists of paths and labels."""
    layout = LAYOUTS[name]
    files = {part: find_list(root, layout, part, number) for part in PARTS}
    of_paths = name == "list" or not (files["train"] or files["val"])
    if files["train"] and files["train"][0].endswith(".csv"):  # Kinetics' own have this name, too
        with opened(files["train"][0]) as file:
            of_paths = of_paths or bool(PATH_AND_LABEL.fullmatch(file.readline().strip()))
    if of_paths:
        layout = LAYOUTS["list"]
        files = {part: find_list(root, layout, part, number) for part in PARTS}
    for part in SPLITS if of_paths or not layout.classes else PARTS:
        if not files[part]:
            names = ", ".join(getattr(LAYOUTS[name], part)).format(split=part, number=number)
            raise UserError(f"there is no {part} list: looked for {names} in {root}")
    if number > 1 and of_paths and f"split_{number}" not in files["train"][0]:
        raise UserError(f"--split {number} is not that of the list {files['train'][0]}")
    rows, found = {}, []
    for split in SPLITS:
        listed = []
        for path in files[split]:
            with opened(path) as file:
                listed += layout.read_list(file, path, split)
        folders = [folder.format(split=split) for folder in layout.folders]
        rows[split], folder = locate(root, folders, listed, exact=of_paths)
        found.append(f"{os.path.relpath(files[split][0], root)}, videos in {folder}")
    return assemble(name_classes(files, rows), rows, "; ".join(found))


def find_list(root, layout, part, number):
    """The one list of a part, of HMDB51 one a class; [] if there is none."""
    candidates = []
    for folder in LIST_FOLDERS:
        for name in getattr(layout, part):
            pattern = os.path.join(folder, name.format(split=part, number=number))
            paths = sorted(glob.glob(pattern, root_dir=root))
            is_group = paths and name == HMDB51_LISTS
            candidates += [paths] if is_group else [[path] for path in paths]
    refuse_two(root, [paths[0] for paths in candidates])
    return [os.path.join(root, path) for paths in candidates for path in paths]


def locate(root, folders, rows, exact):
    """Rows → (label, path, is it there) triples, and the folder that the videos are in.

    exact: names are those of files; else they lack the suffix, and the videos may lie deeper.
    Each folder is listed once: to ask a network disk for 240,000 names would take minutes.
    """
    places, fits = {place for _, _, place in rows}, {}
    if any(map(os.path.isabs, places)):
        folders = folders[:1]  # which makes no difference to absolute paths
    for folder in folders:
        files = {place: list_folder(os.path.join(root, folder, place), exact) for place in places}
        if any(name in files[place] for _, names, place in rows for name in names):
            fits[folder] = files
    refuse_two(root, [f"listed videos in {folder or '.'}" for folder in fits])
    folder, files = next(iter(fits.items()), (folders[0], dict.fromkeys(places, {})))
    triples = []
    for label, names, place in rows:
        path = next((files[place][name] for name in names if name in files[place]), None)
        wanted = os.path.join(root, folder, place, names[0])
        triples.append((label, path or wanted, path is not None))
    return triples, folder or "."


def list_folder(folder, exact):
    """{name: path} of its files; if not exact, {name without suffix: path} of all its videos."""
    if not os.path.isdir(folder):
        return {}
    if exact:
        return {entry.name: entry.path for entry in os.scandir(folder) if entry.is_file()}
    return {os.path.splitext(os.path.basename(path))[0]: path for path in video_files(folder)}


def refuse_two(root, found):
    if len(found) > 1:
        raise UserError(f"{root} has both {found[0]} and {found[1]}: move away the one not meant")


def assemble(classes, rows, found):
    """Each split's (label, path, is it there) → Videos: the first of each class, the second, …

    In this order --limit sees all classes.
    """
    numbers = {name: i for i, name in enumerate(classes)}
    videos, missing, empty = {}, [], []
    for split in SPLITS:
        ordered, seen = [], Counter()
        for name, path, is_there in rows[split]:
            label = numbers.get(name, name)
            if label not in range(len(classes)):
                raise UserError(f"{path} is of the class {label!r}, none of the {len(classes)}")
            if is_there:
                ordered.append((seen[label], label, path))
            else:
                missing.append((split, path))
            seen[label] += 1
        videos[split] = [(path, label) for _, label, path in sorted(ordered)]
        have = {label for _, label in videos[split]}
        empty += [(split, name) for i, name in enumerate(classes) if i not in have]
    return Videos(videos["train"], videos["val"], classes, missing, empty, found)


def find_videos(name, root=None, split=None, whole=SPLITS):
    """The videos of a data set; UserError unless those of each split in `whole` are complete."""
    root = root or os.path.join("data", name)
    if split and name != "hmdb51":
        raise UserError(f"--split chooses one of HMDB51's three; {name} has one")
    if name == "demo":
        draw_data(root, (1536, 256))  # at the first use
    if not os.path.isdir(root):
        raise UserError(f"the data folder {root} is not there; say with --root where it is")
    videos = listed_data(name, root, split or 1) if name in LAYOUTS else folder_data(root)
    if name == "diving48":  # its corrected labels (V2) do not use all 48 names
        videos = videos._replace(empty=[])
    for part in whole:
        there = getattr(videos, part)
        absent = [path for split, path in videos.missing if split == part]
        listed = len(there) + len(absent)
        # Every download of Kinetics lacks some videos; the other data sets come whole.
        if len(absent) > (listed // 5 if name == "k400" else 0):
            problem = f"{len(absent)} of {listed} {part} videos are not there, such as {absent[0]}"
            raise UserError(f"{problem}; python -m tools.check_data lists them")
        if not there or len(videos.classes) < 2:
            have = f"{len(there)} {part} videos and {len(videos.classes)} classes"
            raise UserError(f"{root} has {have}; it needs at least 1 video and 2 classes")
    empty = [name for split, name in videos.empty if split == "train"]
    if empty and "train" in whole:
        raise UserError(f"{root} has no training video of the class {empty[0]!r}")
    return videos


def digest(samples):
    """SHA-256 over the names and labels of videos, whatever their folders and containers.

    Two downloads of Kinetics differ by hundreds of videos, and their accuracies by as much as
    papers argue about.
    """
    lines = []
    for path, label in samples:
        lines.append(f"{os.path.splitext(os.path.basename(path))[0]}\t{label}\n")
    return hashlib.sha256(os.fsencode("".join(sorted(lines)))).hexdigest()
