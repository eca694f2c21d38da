"""Train and test methods x folds x seeds, and write the table of their accuracies.

    python -m tools.compare --data list --root ut/fold* --method dualpath aim linear --seed 0 1 \\
        --set linear lr=0.1 --jobs 2 -- --epochs 20 --views 1x1

What follows -- is passed to train.py, in all runs. Several roots are folds of one data set, whose
validation videos are pooled. A row can be a variant of a method:

    --method dualpath spatial=dualpath --set spatial 'paths=spatial lr=0.01'

A run is a folder RUNS/ROW-FOLD-sSEED, made by train.py and, after the last epoch, evaluate.py. One
that has its predictions.csv is done: the same command, started again, goes on where it was.
RUNS/table.md and table.csv hold the table.
"""

import argparse
import csv
import itertools
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch

import evaluate
import train
from support.datasets import find_videos
from support.options import natural, positive_int
from support.processes import UserError, on_signals, one_sentence
from tools.report import table

RESAMPLES = 10_000  # of a bootstrap


# ---------------------------------------------------------------- which runs there are
class Run(NamedTuple):
    row: str  # of the table
    seed: int
    root: str
    words: list  # the other options of train.py
    folder: str
    tests: dict  # {name of a CSV file: column of the table}

    @property
    def is_done(self):
        return all(os.path.exists(f"{self.folder}/{test}.csv") for test in self.tests)


def plan(args):
    """All runs, one seed after the other, so that whole rows come early.

    UserError if a folder holds, or would hold, another run as well.
    """
    runs = {}
    for seed, root, (row, method) in itertools.product(args.seed, args.root, args.method):
        words = ["--data", args.data, "--method", method, "--seed", str(seed), *args.options]
        for word in " ".join(text for name, text in args.set if name == row).split():
            words.append(word if word[0].isdigit() else f"--{word}")
        train.parse(words)  # exits if there is no such option: better now than in a run
        folder = f"{args.runs}/{row}-{os.path.basename(os.path.normpath(root))}-s{seed}"
        if folder in runs:
            raise UserError(f"two runs would share {folder}: seeds, rows or roots are alike")
        runs[folder] = Run(row, seed, root, words, folder, args.tests)
        file = f"{folder}/options.txt"
        if os.path.exists(file):
            with open(file) as written:
                was = written.read().strip()
            if was != shlex.join(words):
                raise UserError(
                    f"{folder} is a run with the options {was}, not {shlex.join(words)}: delete it,"
                    " or choose other --runs"
                )
    return list(runs.values())


# ---------------------------------------------------------------- making them
def commands(run):
    """What a user would type: train.py, then evaluate.py, once more for shuffled frames."""
    yield [train.__file__, *run.words, "--root", run.root, "--out", run.folder, "--resume"]
    options = vars(train.parse(run.words))
    same = [name for name in ("amp", "device", "limit", "workers") if options[name] is not None]
    for test in run.tests:
        words = [f"--{name}={options[name]}" for name in same]
        if test == "shuffled":
            words.append("--shuffled")
        file = f"{run.folder}/{test}.part"
        yield [evaluate.__file__, f"{run.folder}/last.pt", "--predictions", file, *words]


def make(run, environment, signals):
    """One run, in processes that end after a signal; what they print goes to output.txt."""
    if signals:
        return
    os.makedirs(run.folder, exist_ok=True)
    with open(f"{run.folder}/options.txt", "w") as file:
        file.write(f"{shlex.join(run.words)}\n")
    with open(f"{run.folder}/output.txt", "a") as output:
        to_output = {"stdout": output, "stderr": subprocess.STDOUT}
        for command in commands(run):
            process = subprocess.Popen([sys.executable, *command], env=environment, **to_output)
            while process.poll() is None:
                time.sleep(0.1)
                if signals:
                    process.terminate()  # train.py saves first
                    process.wait()
            if process.returncode:
                outcome = "is stopped" if signals else "has failed"
                print(f"{run.folder} {outcome}, see {output.name}", flush=True)
                return
    for test in run.tests:
        os.replace(f"{run.folder}/{test}.part", f"{run.folder}/{test}.csv")
    print(f"{run.folder} is done", flush=True)


def make_all(runs, at_once):
    """Share cores and GPUs among the runs. A signal stops all of them, and the program."""
    gpus = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", gpus).split(",")
    threads, signals = str(max(1, os.cpu_count() // at_once)), []
    environments = [
        os.environ | {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus
    ]
    with on_signals(signals.append), ThreadPoolExecutor(at_once) as pool:
        list(pool.map(make, runs, itertools.cycle(environments), itertools.repeat(signals)))
    if signals:
        print("the same command goes on where it was", flush=True)
        sys.exit(signals[0])


# ---------------------------------------------------------------- accuracies and differences
def read_predictions(path):
    """evaluate.py's file → {video: (label, classes, the likeliest first)}."""
    with open(path, newline="", errors="surrogateescape") as file:
        return {
            line["video"]: (line["label"], [line.get(f"class{i}") for i in range(1, 6)])
            for line in csv.DictReader(file)
        }


def is_right(label, classes, sets=None):
    """Is the likeliest class the label's? Of sets of classes, only the label's own set counts."""
    if sets:
        own = [names for names in sets if label in names]
        if len(own) != 1:
            raise UserError(f"--among has {label!r} {len(own)} times, and must have it once")
        classes = [name for name in classes if name in own[0]]
    return classes[:1] == [label]  # an unreadable video has none


def judge(runs, args):
    """Of the runs of one row → {column of the table: {seed: {video: is it right?}}}."""
    columns = {}
    for run, (test, name) in itertools.product(runs, args.tests.items()):
        answers = read_predictions(f"{run.folder}/{test}.csv")
        right = {video: is_right(*answer) for video, answer in answers.items()}
        found = {name: right}
        if args.among:
            within = {video: is_right(*answer, args.among) for video, answer in answers.items()}
            found[f"{name}, within its set"] = within
        if args.leave_out:
            kept = {video: right[video] for video in right if not args.leave_out.search(video)}
            found[f"{name}, without some"] = kept
        for column, videos in found.items():
            columns.setdefault(column, {}).setdefault(run.seed, {}).update(videos)
    return columns


def difference(first, other, group):
    """Of two rows' top-1 over the same videos and seeds, in points, with a 95 % interval, as text.

    first, other: {seed: {video: is it right?}}. The interval is a bootstrap's over groups, since
    videos of one group are right and wrong together. group: what this expression finds in a path
    names the group (its own groups, if it has any).
    """
    groups = {}
    for seed, videos in first.items():
        if videos.keys() != other[seed].keys():
            raise UserError("rows were tested on different videos: delete the runs on the old list")
        for video, right in videos.items():
            found = group.search(video)
            if not found:
                raise UserError(f"--group finds nothing in {video}")
            points = 100 * (right - other[seed][video])
            groups.setdefault(found.groups() or found[0], []).append(points)
    sums = np.array([sum(points) for points in groups.values()])
    sizes = np.array([len(points) for points in groups.values()])
    rng, resampled = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(sums), size=len(sums))
        resampled.append(sums[drawn].sum() / sizes[drawn].sum())
    low, high = np.quantile(resampled, (0.025, 0.975))
    return f"{sums.sum() / sizes.sum():+.1f} ({low:+.1f} to {high:+.1f})"


def rows_of(runs, args):
    """The table, as dicts of text: mean ± standard deviation over seeds, and each seed's.

    A method has its row once all of its runs are done.
    """
    rows, first = [], None
    for name, _ in args.method:
        own = [run for run in runs if run.row == name]
        if not all(run.is_done for run in own):
            continue
        columns, row = judge(own, args), {"method": name}
        for column, seeds in columns.items():
            each = [100 * mean(videos.values()) for videos in seeds.values()]
            row[column] = f"{mean(each):.1f}"
            if len(each) > 1:
                row[column] += f" ± {stdev(each):.1f} ({', '.join(f'{p:.1f}' for p in each)})"
        right = columns["top-1, %"]
        first = first or (name, right)
        compared = "–" if right is first[1] else difference(first[1], right, args.group)
        rows.append(row | {f"{first[0]} − this (95 %)": compared})
    return rows


def write_table(rows, folder):
    """Print the rows, and write them to table.md and table.csv."""
    text = "\n".join(table(rows))
    print(text)
    with open(f"{folder}/table.md", "w") as file:
        file.write(f"{text}\n")
    with open(f"{folder}/table.csv", "w", newline="") as file:
        lines = csv.DictWriter(file, rows[0], lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)


# ---------------------------------------------------------------- as a script
def method_row(text):
    """METHOD, or ROW=METHOD for a variant → (row, method)."""
    row, _, method = text.rpartition("=")
    return row or method, method


def expression(text):
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def parse(argv):
    parser = argparse.ArgumentParser("python -m tools.compare")
    add = parser.add_argument
    rows, sets = "[ROW=]METHOD", "also top-1 where the answer is of the label's own set: a,b c,d"
    own = "options of train.py for this row only"
    add("--data", default="demo", metavar="NAME", help="as train.py's")
    add("--root", nargs="+", metavar="DIR", help="where it is; several are folds of one data set")
    add("--method", nargs="+", type=method_row, required=True, metavar=rows, help="of the table")
    add("--set", nargs=2, action="append", default=[], metavar=("ROW", "'lr=X …'"), help=own)
    add("--seed", nargs="+", type=natural, default=[0], metavar="N", help="seeds of each row")
    add("--jobs", type=positive_int, default=1, metavar="N", help="runs at once, on shared cores")
    add("--runs", default="runs/compare", metavar="DIR", help="folder of the runs and the table")
    add("--group", type=expression, default=".*", help="finds in a path what is resampled")
    add("--leave-out", type=expression, help="also top-1 without videos whose paths it finds")
    add("--shuffled", action="store_true", help="also top-1 on clips with shuffled frames")
    add("--among", nargs="+", type=lambda names: names.split(","), metavar="A,B", help=sets)
    add("options", nargs="*", metavar="-- OPTIONS", help="of train.py, for all runs")
    args = parser.parse_args(argv)
    for word in args.options:
        if word.startswith(("--data", "--root", "--method", "--seed", "--out")):
            parser.error(f"{word} cannot be given after the --")
    unknown = {name for name, _ in args.set} - {name for name, _ in args.method}
    if unknown:
        parser.error(f"--set {min(unknown)}: there is no such row in --method")
    if sum(map(len, args.among or [])) > 5:
        parser.error("--among is for five classes at most: predictions hold no more")
    args.root = args.root or [os.path.join("data", args.data)]
    args.tests = {"predictions": "top-1, %"} | ({"shuffled": "shuffled"} if args.shuffled else {})
    return args


def main(argv=None):
    """Returns 1 if a run has failed."""
    args = parse(argv)
    with one_sentence("compare.py"):
        runs = plan(args)
        todo = [run for run in runs if not run.is_done]
        print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done", flush=True)
        for run in todo:  # a missing root is refused now, and the demo drawn once
            find_videos(args.data, run.root, train.parse(run.words).split)
        make_all(todo, args.jobs)
        rows = rows_of(runs, args)
        if rows:
            write_table(rows, args.runs)
        return int(not all(run.is_done for run in runs))


if __name__ == "__main__":
    raise SystemExit(main())
