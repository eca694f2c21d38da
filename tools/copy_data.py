"""Copy a data set into small videos that read fast, in the same layout: --root B then just works.

    python -m tools.copy_data --data k400 --root A --out B
    python -m tools.copy_data --data k400 --root A --out B --part 1/8    # the first of 8 machines

A copy has its source's frames, one for one and upright; no sound; the short side is at most 256.
Stopped and started again, it goes on where it was. Nothing is written outside of B.
"""

import argparse
import csv
import glob
import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np

from support import options
from support.datasets import SPLITS, find_videos, read_list
from support.processes import UserError, in_parallel, one_sentence
from tools.copies import SHORT_SIDE, copy_video, write_whole

SETTINGS = "copies.json"  # in B: what the copies there are


# ---------------------------------------------------------------- where everything goes
def inside(path, folder):
    """Does the path lie in the folder, or is it the folder, whatever links there are?"""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def copy_of(path, root):
    """Where the copy of a video goes, relative to B: what lies outside of A goes to videos/."""
    place = os.path.relpath(os.path.abspath(path), os.path.abspath(root))
    if place.split(os.sep)[0] == os.pardir:
        place = os.path.join("videos", os.path.basename(path))
    return os.path.splitext(place)[0] + ".mp4"


def find_sources(name, root, split):
    """All listed videos that are there, and how many are not."""
    splits = (1, 2, 3) if name == "hmdb51" and not split else (split,)
    sources, missing = set(), set()
    for split in splits:
        videos = find_videos(name, root, split, whole=())
        sources |= {path for path, _ in videos.train + videos.val}
        missing |= {path for _, path in videos.missing}
    return sorted(sources), len(missing)


def plan(sources, root, out):
    """(source, target) pairs; UserError if two would have one target, or one lies outside of B."""
    targets = {}
    for source in sources:
        target = os.path.join(out, copy_of(source, root))
        if target in targets:
            raise UserError(f"{targets[target]} and {source} would both be copied to {target}")
        targets[target] = source
    for folder in {os.path.dirname(source) for source in sources}:
        if inside(folder, out):
            raise UserError(f"--out {out} holds originals ({folder}): take a folder of its own")
    for folder in {os.path.dirname(target) for target in targets}:
        if not inside(folder, out):
            raise UserError(f"{folder} is a link that leads out of {out}: remove it")
    return [(source, target) for target, source in sorted(targets.items())]


def claim(out, settings):
    """Make B a folder of such copies; UserError if it is one of others, or of something else."""
    path = os.path.join(out, SETTINGS)
    if os.path.exists(path):
        with open(path) as file:
            found = json.load(file)
        if found != settings:
            raise UserError(f"{out} holds copies made with {found}, not {settings}: take another")
    elif os.path.isdir(out) and any(not name.startswith(".") for name in os.listdir(out)):
        raise UserError(f"{out} is not empty, and holds no copies to go on with: take a new folder")
    write_whole(path, json.dumps(settings).encode())


# ---------------------------------------------------------------- the lists that come with them
def copy_annotations(name, root, out, lost):
    """Copy the lists of A, which lie in it or in its folders, less the videos that are lost."""
    folders = [entry.path for entry in os.scandir(root) if entry.is_dir()]
    for folder in [root, *sorted(folders)]:
        for entry in os.scandir(folder):
            place = os.path.relpath(entry.path, root)
            if not entry.is_file() or not entry.name.endswith((".csv", ".json", ".txt")):
                continue
            if place == SETTINGS or place.startswith("unreadable"):  # A holds copies, too
                continue
            if name == "list" and place in [f"{split}.txt" for split in SPLITS]:
                content = rewritten_list(root, place, lost)
            else:
                with open(entry.path, "rb") as file:
                    content = file.read()
                if lost and name in ("ssv2", "hmdb51", "diving48"):  # which must be complete
                    content = without(entry.name, content, lost)
            write_whole(os.path.join(out, place), content)


def rewritten_list(root, name, lost):
    gone = {os.path.realpath(path) for path in lost}  # another part may spell --root otherwise
    rows = [row for row in read_list(root, name) if os.path.realpath(row.path) not in gone]
    lines = [f'"{copy_of(row.path, root)}" {row.label}\n' for row in rows]
    return os.fsencode("".join(lines))


def without(name, content, lost):
    """A benchmark's list less its lines (or JSON's clips) of lost videos."""
    if name.endswith(".json"):
        names = {stem(path) for path in lost}
        clips = json.loads(content)
        if isinstance(clips, list) and isinstance(clips[0], dict):
            clips = [c for c in clips if str(c.get("id", c.get("vid_name"))) not in names]
        return json.dumps(clips).encode()
    # HMDB51 has a list a class, and videos of the same name in several classes.
    label = name.rpartition("_test_split")[0]
    names = {stem(path) for path in lost if os.path.basename(os.path.dirname(path)) == label}
    lines = os.fsdecode(content).splitlines(keepends=True)
    return os.fsencode("".join(line for line in lines if stem(line) not in names))


def stem(path):
    return os.path.splitext(os.path.basename(path))[0]


def lost_videos(root, out):
    """The videos that no part of the work could read."""
    lost = set()
    for path in glob.glob(os.path.join(glob.escape(out), "unreadable*.csv")):
        with open(path, newline="", errors="surrogateescape") as file:
            lost |= {row[0] for row in csv.reader(file)}
    return {path for path in lost if not os.path.exists(os.path.join(out, copy_of(path, root)))}


# ---------------------------------------------------------------- the command
def part(text):
    """'2/8' → (1, 8): every eighth video from the second on."""
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 1/8, I from 1 to N")
    return int(match[1]) - 1, int(match[2])


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.copy_data",
        formatter_class=options.HelpLines,
        description="Copy a data set into small videos that read fast, in the same layout.",
    )
    add = parser.add_argument
    options.add_data_options(add, split=" (all three)")
    add("--out", required=True, metavar="B", help="folder of the copies")
    side = options.number(16, 4096, int)
    add("--short-side", type=side, default=SHORT_SIDE, metavar="PX", help="nothing is enlarged")
    cores = os.cpu_count()
    add("--workers", type=options.at_least(1), default=cores, metavar="N", help="processes")
    add("--part", type=part, default=(0, 1), metavar="I/N", help="of the videos, for N machines")
    args = parser.parse_args(argv)
    if args.data in (None, "demo"):
        parser.error("--data says which layout to copy; the demo's videos are small")
    args.root = args.root or os.path.join("data", args.data)
    return args


def copy_videos(jobs, args):
    """Copy what is not there yet; a line of a table for each video that cannot be read."""
    which, parts = args.part
    name = "unreadable.csv" if parts == 1 else f"unreadable-{which + 1}of{parts}.csv"
    work, done = partial(copy_video, args.short_side), []
    path = os.path.join(args.out, name)
    with open(path, "w", newline="", errors="surrogateescape") as file:  # names may be bytes
        table = csv.writer(file, lineterminator="\n")
        for copied in in_parallel(work, jobs, "copying", args.workers):
            done.append(copied)
            if copied.error:
                table.writerow((copied.source, copied.error))
                file.flush()
    if os.path.getsize(path) == 0:
        os.remove(path)
    return done


def summary(done, there, missing, out):
    copied = [video for video in done if video.error is None]
    lost = len(done) - len(copied)
    print(f"{len(copied)} copied, {there} were there, {lost} unreadable and left out", end="")
    print(f" ({out}/unreadable*.csv)" if lost else "", end="")
    print(f", {missing} listed but not there" if missing else "")
    if copied:
        seconds = np.mean([video.seconds for video in copied])
        before = sum(video.bytes_before for video in copied)
        after = sum(video.bytes_after for video in copied)
        print(
            f"{seconds:.2f} core-seconds a video; {before / 1e6:.1f} MB became {after / 1e6:.1f} MB"
        )


def main(argv=None):
    args = parse(argv)
    with one_sentence("copy_data.py"):
        sources, missing = find_sources(args.data, args.root, args.split)
        if inside(args.out, args.root) or inside(args.root, args.out):
            raise UserError(f"--out {args.out} and --root {args.root} lie in one another")
        jobs = plan(sources, args.root, args.out)
        claim(args.out, {"data": args.data, "short_side": args.short_side})
        which, parts = args.part
        jobs = jobs[which::parts]
        todo = [job for job in jobs if not os.path.exists(job[1])]
        done = copy_videos(todo, args)
        lost = None
        while lost != lost_videos(args.root, args.out):  # another machine may end just now, too
            lost = lost_videos(args.root, args.out)
            copy_annotations(args.data, args.root, args.out, lost)
        summary(done, len(jobs) - len(todo), missing, args.out)


if __name__ == "__main__":
    main()
