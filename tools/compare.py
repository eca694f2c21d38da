"""Train and test methods x folds x seeds, and write the table of their accuracies.

    python -m tools.compare --data list --root ut/fold* --method dualpath aim linear --seed 0 1 \\
        --set linear lr=0.1 --jobs 2 -- --epochs 20 --views 1x1

What follows -- is passed to train.py, in all runs. Several roots are folds of one data set, whose
validation videos are pooled. A row can be a variant of a method:

    --method dualpath spatial=dualpath --set spatial 'paths=spatial lr=0.01'

A run is a folder RUNS/ROW-FOLD-sSEED, made by train.py and, after the last epoch, evaluate.py. One
that has its predictions.csv is done: the same command, started again, goes on where it was.
RUNS/table.md holds the table.
"""

import argparse
import csv
import itertools
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch

import evaluate
import train
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
    tests: list  # names of its CSV files

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
        words += [f"--{word}" for name, text in args.set if name == row for word in text.split()]
        train.parse(words)  # exits if there is no such option: better now than in a run
        folder = f"{args.runs}/{row}-{os.path.basename(os.path.normpath(root))}-s{seed}"
        if folder in runs:
            raise UserError(f"two runs would share {folder}: seeds, rows or roots are alike")
        runs[folder] = Run(row, seed, root, words, folder, args.tests)
        written = Path(folder, "options.txt")
        if written.exists() and written.read_text().strip() != shlex.join(words):
            raise UserError(f"{written} has other options: delete this run, or take other --runs")
    return list(runs.values())


# ---------------------------------------------------------------- making them
def commands(run):
    """What a user would type: train.py, then evaluate.py, once more for shuffled frames."""
    yield [train.__file__, *run.words, "--root", run.root, "--out", run.folder, "--resume"]
    options = vars(train.parse(run.words))
    same = [name for name in ("amp", "device", "limit", "workers") if options[name] is not None]
    words = [f"--{name}={options[name]}" for name in same]
    for test in run.tests:
        own = ["--shuffled"] if test == "shuffled" else []
        own += ["--predictions", f"{run.folder}/{test}.part"]
        yield [evaluate.__file__, f"{run.folder}/last.pt", *own, *words]


def make(run, environment, children):
    """One run, in processes that are added to children; what they print goes to output.txt."""
    os.makedirs(run.folder, exist_ok=True)
    Path(run.folder, "options.txt").write_text(f"{shlex.join(run.words)}\n")
    with open(f"{run.folder}/output.txt", "a") as output:
        to_output = {"stdout": output, "stderr": subprocess.STDOUT}
        for command in commands(run):
            child = subprocess.Popen([sys.executable, *command], env=environment, **to_output)
            children.append(child)
            if child.wait():
                print(f"{run.folder} is not done, see {output.name}", flush=True)
                return
    for test in run.tests:
        os.replace(f"{run.folder}/{test}.part", f"{run.folder}/{test}.csv")
    print(f"{run.folder} is done", flush=True)


def make_all(runs, at_once):
    """Share cores and GPUs among the runs. A signal stops all of them, and the program."""
    gpus = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", gpus).split(",")
    threads, children = str(max(1, os.cpu_count() // at_once)), []
    environments = [
        os.environ | {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus
    ]

    def stop(status):
        for child in children:
            child.terminate()  # train.py saves first
        sys.exit(status)  # which also calls off what has not begun

    with on_signals(stop), ThreadPoolExecutor(at_once) as pool:
        list(pool.map(make, runs, itertools.cycle(environments), itertools.repeat(children)))


# ---------------------------------------------------------------- accuracies and differences
def read_answers(runs, test):
    """Of the runs of one row → {seed: {video: is its likeliest class the right one?}}."""
    seeds = {}
    for run in runs:
        path = f"{run.folder}/{test}.csv"
        with open(path, newline="", errors="surrogateescape") as file:
            for line in csv.DictReader(file):  # an unreadable video has no class
                seeds.setdefault(run.seed, {})[line["video"]] = line["class1"] == line["label"]
    return seeds


def accuracy(seeds):
    """Top-1 as text: mean ± standard deviation over seeds, and each seed's."""
    each = [100 * mean(videos.values()) for videos in seeds.values()]
    if len(each) == 1:
        return f"{each[0]:.1f}"
    return f"{mean(each):.1f} ± {stdev(each):.1f} ({', '.join(f'{top1:.1f}' for top1 in each)})"


def difference(first, other, group):
    """Of two rows' top-1 over the same videos and seeds, in points, with a 95 % interval, as text.

    first, other: as read_answers returns them. The interval is a bootstrap's over groups, since
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
    """The table, as dicts of text. A method has its row once all of its runs are done."""
    rows, answers = [], {}
    for name, _ in args.method:
        own = [run for run in runs if run.row == name]
        if not all(run.is_done for run in own):
            continue
        answers[name] = read_answers(own, "predictions")
        row = {"method": name, "top-1, %": accuracy(answers[name])}
        if args.shuffled:
            row["shuffled"] = accuracy(read_answers(own, "shuffled"))
        first, compared = next(iter(answers)), "–"
        if name != first:
            compared = difference(answers[first], answers[name], args.group)
        rows.append(row | {f"{first} − this (95 %)": compared})
    return rows


# ---------------------------------------------------------------- as a script
def method_row(text):
    """METHOD, or ROW=METHOD for a variant → (row, method)."""
    row, _, method = text.rpartition("=")
    return row or method, method


def parse(argv):
    parser = argparse.ArgumentParser("python -m tools.compare")
    add = parser.add_argument
    rows, own = "[ROW=]METHOD", "options of train.py for this row only"
    add("--data", default="demo", metavar="NAME", help="as train.py's")
    add("--root", nargs="+", metavar="DIR", help="where it is; several are folds of one data set")
    add("--method", nargs="+", type=method_row, required=True, metavar=rows, help="of the table")
    add("--set", nargs=2, action="append", default=[], metavar=("ROW", "'lr=X …'"), help=own)
    add("--seed", nargs="+", type=natural, default=[0], metavar="N", help="seeds of each row")
    add("--jobs", type=positive_int, default=1, metavar="N", help="runs at once, on shared cores")
    add("--runs", default="runs/compare", metavar="DIR", help="folder of the runs and the table")
    add("--group", default=".*", help="finds in a path what is resampled")
    add("--shuffled", action="store_true", help="also top-1 on clips with shuffled frames")
    add("options", nargs="*", metavar="-- OPTIONS", help="of train.py, for all runs")
    args = parser.parse_args(argv)
    for word in args.options:
        if word.startswith(("--data", "--root", "--method", "--seed", "--out")):
            parser.error(f"{word} cannot be given after the --")
    unknown = {name for name, _ in args.set} - {name for name, _ in args.method}
    if unknown:
        parser.error(f"--set {min(unknown)}: there is no such row in --method")
    try:
        args.group = re.compile(args.group)
    except re.error as error:
        parser.error(f"--group {args.group!r} is no regular expression: {error}")
    args.root = args.root or [os.path.join("data", args.data)]
    args.tests = ["predictions", "shuffled"] if args.shuffled else ["predictions"]
    return args


def main(argv=None):
    """Returns 1 if a run has failed."""
    args = parse(argv)
    with one_sentence("compare.py"):
        runs = plan(args)
        todo = [run for run in runs if not run.is_done]
        print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done", flush=True)
        make_all(todo, args.jobs)
        rows = rows_of(runs, args)
        if rows:
            text = "\n".join(table(rows))
            print(text)
            Path(args.runs, "table.md").write_text(f"{text}\n")
        return int(not all(run.is_done for run in runs))


if __name__ == "__main__":
    raise SystemExit(main())
