"""Train and test methods x folds x seeds, and write the table of their accuracies.

    python -m tools.compare --data list --root 'ut/fold*' --method dualpath aim linear --seed 0 1 \\
        --set linear lr=0.1 --jobs 2 --results results -- --epochs 20 --views 1x1

What stands behind -- are options of train.py for all runs. Several roots are folds of one set,
whose validation videos are pooled. A row can be a variant of a method:

    --method dualpath spatial=dualpath --set spatial 'paths=spatial lr=0.01'

Runs are ordinary ones of train.py, tested after their last epoch. Started again, the same command
resumes those that were cut off. What a finished run predicts is a small file in --results, which is
read first: with that folder a comparison goes on in another checkout.
"""

import argparse
import csv
import glob
import os
import shlex
import sys
import time
from statistics import mean

import train
from adapters import METHODS
from support import options
from support.errors import UserError, one_sentence
from support.layouts import digest, find_videos
from support.processes import on_signals
from tools.jobs import Job, Runner, cores_each, is_done
from tools.results import (
    accuracy,
    among,
    paired_difference,
    pool,
    read_result,
    top1,
    with_deviation,
    without,
)


# ---------------------------------------------------------------- which runs there are
def own_options(text):
    """'lr=0.05 paths=spatial serial-skip' → ['--lr', '0.05', '--paths', 'spatial', …]"""
    words = []
    for part in shlex.split(text):
        name, equals, value = part.partition("=")
        words.append(f"--{name.replace('_', '-')}")
        if equals:
            words.append(value)
    return words


def plan(args, folds):
    """All jobs, one seed after the other, so that whole rows come early. folds: {root: Videos}."""
    jobs = []
    workers = cores_each(args.jobs) - 1  # besides the process that trains
    for seed in args.seed:
        for root, videos in folds.items():
            for row, method in args.method:
                name = f"{row}-{os.path.basename(os.path.normpath(root))}-s{seed}"
                words = ["--data", args.data, "--root", root, "--method", method]
                words += ["--seed", str(seed), "--workers", str(workers)]
                words += args.options + args.own.get(row, [])
                limit = train.parse(words).limit
                result = os.path.join(args.results, name)
                job = Job(
                    row,
                    seed,
                    root,
                    words,
                    digest(videos.train[:limit]),
                    os.path.join(args.runs, name),
                    f"{result}.csv",
                    f"{result}.shuffled.csv" if args.shuffled else None,
                )
                jobs.append(job)
    names = [job.name for job in jobs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"two runs would be called {min(twice)}: give rows and roots own names")
    return jobs


def run_all(jobs, jobs_at_once):
    """A line for each run that ends. Returns what went wrong, in sentences."""
    failures, start = [], time.perf_counter()
    with Runner(jobs_at_once) as runner:
        for i, (job, result, error) in enumerate(runner.do_all(jobs), 1):
            outcome = f"failed: {error}"
            if error is None:
                outcome = f"top-1 {100 * accuracy(result.answers):.1f} %"
            else:
                failures.append(f"{job.name}: {error}")
            minutes = (time.perf_counter() - start) / 60 / i * (len(jobs) - i)
            to_go = f"{i} of {len(jobs)}, about {minutes:.0f} minutes to go"
            print(f"{job.name:32s} {outcome}   {to_go}", flush=True)
    return failures


# ---------------------------------------------------------------- the table
def pooled_seeds(jobs, path_of):
    """[answers of one seed over all folds], of the seeds whose folds are all there."""
    seeds = {}
    for job in jobs:
        seeds.setdefault(job.seed, []).append(path_of(job))
    whole = [paths for paths in seeds.values() if all(map(os.path.exists, paths))]
    return [pool(map(read_result, paths)) for paths in whole]


def percentages(seeds, is_right=top1):
    return [100 * accuracy(answers, is_right) for answers in seeds]


def table_of(jobs, args):
    """A row for each method, as dicts; a method whose runs are not there yet has none."""
    rows, first = [], None
    for name, _ in args.method:
        own = [job for job in jobs if job.row == name]
        seeds = pooled_seeds(own, lambda job: job.result)
        if not seeds:
            continue
        abouts = [read_result(job.result).about for job in own if os.path.exists(job.result)]
        row = {
            "method": name,
            "top-1, %": with_deviation(percentages(seeds)),
            "each seed": ", ".join(f"{p:.1f}" for p in percentages(seeds)),
        }
        if args.leave_out:
            fewer = [without(answers, args.leave_out) for answers in seeds]
            row["without the left-out"] = with_deviation(percentages(fewer))
        if args.among:
            row["within its classes"] = with_deviation(percentages(seeds, among(args.among)))
        if args.shuffled:
            shuffled = pooled_seeds(own, lambda job: job.shuffled)
            row["shuffled"] = with_deviation(percentages(shuffled))
            if args.among:
                within = percentages(shuffled, among(args.among))
                row["shuffled, within its classes"] = with_deviation(within)
        if first is None:
            first, minuend, difference = seeds, f"{name} minus it", "–"
        else:
            points, (low, high) = paired_difference(first, seeds, args.group)
            difference = f"{points:+.1f} ({low:+.1f} to {high:+.1f})"
        row |= {
            minuend: difference,
            "tuned weights": f"{abouts[0]['tuned']:,}",
            "GMACs": f"{abouts[0]['gmacs']:.4g}",
            "s/epoch": f"{mean(about['seconds_per_epoch'] for about in abouts):.3g}",
        }
        rows.append(row)
    return rows


def write_table(rows, folder):
    """table.md and table.csv; the former is printed, too."""
    if not rows:
        return
    lines = [list(rows[0]), ["---"] * len(rows[0])] + [list(row.values()) for row in rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    with open(os.path.join(folder, "table.md"), "w") as file:
        file.write(text)
    with open(os.path.join(folder, "table.csv"), "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(text, end="")


# ---------------------------------------------------------------- as a script
def row(text):
    """METHOD, or NAME=METHOD for a variant → (name, method)."""
    name, _, method = text.rpartition("=")
    if method not in METHODS:
        methods = ", ".join(METHODS)
        raise argparse.ArgumentTypeError(f"{method!r} is no method; the methods are {methods}")
    return name or method, method


def names(text):
    return [name.strip() for name in text.split(",")]


def parse(argv):
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare",
        formatter_class=options.HelpLines,
        usage="python -m tools.compare [options] -- [options of train.py for all runs]",
    )
    add, whole = parser.add_argument, options.at_least(1)
    add("--data", default="demo", metavar="NAME", help="as train.py's")
    add("--root", nargs="+", metavar="DIR", help="where it is; several, or a pattern: folds")
    add("--method", nargs="+", type=row, required=True, metavar="[ROW=]METHOD", help="the rows")
    add("--set", nargs=2, action="append", default=[], metavar=("ROW", "'lr=X …'"), help="its own")
    add("--seed", nargs="+", type=int, default=[0], metavar="N", help="seeds of each")
    add("--jobs", type=whole, default=1, metavar="N", help="runs at once; they share the cores")
    add("--runs", default="runs/compare", metavar="DIR", help="folder of the runs' folders")
    add("--results", default="results", metavar="DIR", help="folder of what they predict")
    add("--group", metavar="REGEX", help="what in a path is of the videos to be resampled as one")
    add("--leave-out", metavar="REGEX", help="also top-1 without the videos of such paths")
    add("--shuffled", action="store_true", help="also top-1 on clips with shuffled frames")
    among = "also top-1 where only the classes of the label's own set can be the answer"
    add("--among", nargs="+", type=names, metavar="CLASS,CLASS", help=among)
    args = parser.parse_args(argv[:split])
    args.options = argv[split + 1 :]
    args.own = {}
    for name, text in args.set:
        args.own.setdefault(name, []).extend(own_options(text))
    unknown = args.own.keys() - {name for name, _ in args.method}
    if unknown:
        parser.error(f"--set {min(unknown)}: there is no such row in --method")
    return args


def find_folds(args):
    """{root: its Videos}; UserError if the options ask for what their classes do not allow."""
    roots = []
    for pattern in args.root or [os.path.join("data", args.data)]:
        roots += sorted(glob.glob(pattern)) or [pattern]
    split = train.parse(["--data", args.data, *args.options]).split
    folds = {root: find_videos(args.data, root, split) for root in roots}
    for root, videos in folds.items():
        if videos.classes != folds[roots[0]].classes:
            raise UserError(f"{root} has other classes than {roots[0]}: they are no folds")
    listed = sorted(name for part in args.among or [] for name in part)
    if listed and (listed != sorted(videos.classes) or len(listed) > 5):
        raise UserError(
            f"--among names {', '.join(listed)}; it must name each class once, of five at most:"
            f" {', '.join(videos.classes)}"
        )
    return folds


def main(argv=None):
    """Returns 1 if a run failed."""
    args = parse(argv)
    with one_sentence("compare.py"), on_signals(sys.exit):
        jobs = plan(args, find_folds(args))
        todo = [job for job in jobs if not is_done(job)]
        print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them done", flush=True)
        os.makedirs(args.results, exist_ok=True)
        try:
            failures = run_all(todo, args.jobs)
        finally:
            write_table(table_of(jobs, args), args.results)
    for sentence in failures:
        print(f"failed: {sentence}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
