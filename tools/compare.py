"""Train and test methods x folds x seeds, and write the table of their accuracies.

    python -m tools.compare --data list --root 'ut/fold*' --method dualpath aim linear --seed 0 1 \\
        --set linear lr=0.1 --jobs 2 --results results -- --epochs 20 --views 1x1

What follows -- is passed to train.py, in all runs. Several roots are folds of one data set, whose
validation videos are pooled. A row can be a variant of a method:

    --method dualpath spatial=dualpath --set spatial 'paths=spatial lr=0.01'

Runs are ordinary ones of train.py, tested after their last epoch. Started again, the same command
resumes those that were cut off. What a finished run predicts is a small file in --results, which is
read first: with that folder a comparison goes on in another checkout.
"""

import argparse
import glob
import os
import re
import shlex
import sys
import time

import train
from adapters import METHODS
from support import options
from support.datasets import digest, find_videos
from support.processes import UserError, on_signals, one_sentence
from tools.jobs import Job, Runner, cores_each, digests_of_files, is_done
from tools.results import accuracy, group_of, table_of, write_table


# ---------------------------------------------------------------- which runs there are
def find_folds(args):
    """({root: its Videos}, the folder that holds all roots)."""
    roots = []
    for pattern in args.root or [os.path.join("data", args.data)]:
        roots += sorted(glob.glob(pattern)) or [pattern]
    for_all = train.parse(["--data", args.data, *args.options])
    folds = {}
    for root in roots:
        videos = find_videos(args.data, root, for_all.split)
        folds[root] = videos._replace(val=videos.val[: for_all.limit])
    return folds, os.path.commonpath([os.path.abspath(root) for root in roots])


def check_questions(args, folds, base):
    """UserError if the table could not be made: better now than after the training."""
    classes = next(iter(folds.values())).classes
    seen = set()
    for root, videos in folds.items():
        if videos.classes != classes:
            raise UserError(f"{root} has other classes than the first root: they are no folds")
        paths = {os.path.relpath(path, base) for path, _ in videos.val}
        twice = seen & paths
        if twice:
            raise UserError(f"{min(twice)} is validated in two folds, and may count once")
        seen |= paths
    for path in sorted(seen) if args.group else []:
        if group_of(path, args.group) is None:
            raise UserError(f"--group {args.group.pattern} finds nothing in {path}")
    if args.leave_out and all(map(args.leave_out.search, seen)):
        raise UserError(f"--leave-out {args.leave_out.pattern} leaves no video")
    listed = sorted(name for names in args.among or [] for name in names)
    if listed and (listed != sorted(classes) or len(listed) > 5):  # of which the scores are kept
        raise UserError(
            f"--among names {', '.join(listed)}; it must name each class once, of five at most:"
            f" {', '.join(classes)}"
        )


def plan(args, folds, base):
    """All jobs, one seed after the other, so that whole rows come early."""
    jobs = []
    for seed in args.seed:
        for root, videos in folds.items():
            for row, method in args.method:
                jobs.append(new_job(args, row, method, seed, root, videos, base))
    names = [job.name for job in jobs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(
            f"two runs would be called {min(twice)}: seeds, rows and the last folders of roots must"
            " differ"
        )
    return jobs


def new_job(args, row, method, seed, root, videos, base):
    words = ["--workers", str(cores_each(args.jobs) - 1)]  # besides the process that trains
    words += ["--data", args.data, "--root", root, "--method", method, "--seed", str(seed)]
    for_all = train.parse(words + args.options)
    words += args.options + args.row_options.get(row, [])
    parsed = train.parse(words)
    planned = {"data": args.data, "root": root, "method": method, "seed": seed}
    planned |= {"split": for_all.split, "limit": for_all.limit}
    for name, value in planned.items():
        if getattr(parsed, name) != value:
            raise UserError(f"--{name} of {row} must be {value}, not {getattr(parsed, name)}")
    name = f"{row}-{os.path.basename(os.path.normpath(root))}-s{seed}"
    result = os.path.join(args.results, name)
    shuffled = f"{result}.shuffled.csv" if args.shuffled else None
    return Job(
        row=row,
        seed=seed,
        words=words,
        root=root,
        fold=os.path.relpath(root, base),
        classes={os.path.relpath(path, root): videos.classes[c] for path, c in videos.val},
        digests={"training videos": digest(videos.train[: parsed.limit])}
        | digests_of_files(parsed),
        folder=os.path.join(args.runs, name),
        result=f"{result}.csv",
        shuffled=shuffled,
    )


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


# ---------------------------------------------------------------- as a script
def method_row(text):
    """METHOD, or NAME=METHOD for a variant → (name, method)."""
    name, _, method = text.rpartition("=")
    if method not in METHODS:
        methods = ", ".join(METHODS)
        raise argparse.ArgumentTypeError(f"{method!r} is no method; the methods are {methods}")
    if "/" in name:
        raise argparse.ArgumentTypeError(f"{name!r} names files, so it may have no slash")
    return name or method, method


def expression(text):
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def class_names(text):
    return [name.strip() for name in text.split(",")]


def words_of(text):
    """'lr=0.05 stride=1 2 serial-skip' → ['--lr', '0.05', '--stride', '1', '2', …]"""
    words = []
    for part in shlex.split(text):
        if part[:1].isdigit():  # one more value of the option before it
            words.append(part)
            continue
        name, equals, value = part.partition("=")
        words.append(f"--{name.replace('_', '-')}")
        if equals:
            words.append(value)
    return words


def parse(argv):
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare",
        formatter_class=options.HelpLines,
        usage="python -m tools.compare [options] -- [options of train.py for all runs]",
    )
    add, whole = parser.add_argument, options.at_least(1)
    add("--data", default="demo", metavar="NAME", help="as train.py's")
    add("--root", nargs="+", metavar="DIR", help="where it is; several, or a pattern, are folds")
    add("--method", nargs="+", type=method_row, required=True, metavar="[ROW=]METHOD", help="rows")
    own = "options of train.py for this row alone"
    add("--set", nargs=2, action="append", default=[], metavar=("ROW", "'lr=X …'"), help=own)
    add("--seed", nargs="+", type=int, default=[0], metavar="N", help="seeds of each row")
    add("--jobs", type=whole, default=1, metavar="N", help="runs at once; they share the cores")
    add("--runs", default="runs/compare", metavar="DIR", help="folder of the runs' folders")
    add("--results", default="results", metavar="DIR", help="folder of predictions and table")
    add("--group", type=expression, metavar="REGEX", help="in a path: names what is resampled")
    left = "also top-1 without the videos in whose paths it finds something"
    add("--leave-out", type=expression, metavar="REGEX", help=left)
    add("--shuffled", action="store_true", help="also top-1 on clips with shuffled frames")
    sets = "also top-1 where the answer must be in the label's own set of classes: a,b c,d"
    add("--among", nargs="+", type=class_names, metavar="CLASS,CLASS", help=sets)
    args = parser.parse_args(argv[:end])
    args.options, args.row_options = argv[end + 1 :], {}
    for name, text in args.set:
        try:
            args.row_options.setdefault(name, []).extend(words_of(text))
        except ValueError as error:
            parser.error(f"--set {name} {text!r}: {error}")
    unknown = args.row_options.keys() - {name for name, _ in args.method}
    if unknown:
        parser.error(f"--set {min(unknown)}: there is no such row in --method")
    return args


def main(argv=None):
    """Returns 1 if a run failed."""
    args = parse(argv)
    with one_sentence("compare.py"), on_signals(sys.exit):
        folds, base = find_folds(args)
        check_questions(args, folds, base)
        jobs = plan(args, folds, base)
        todo = [job for job in jobs if not is_done(job)]
        print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them done", flush=True)
        os.makedirs(args.results, exist_ok=True)
        try:
            failures = run_all(todo, args.jobs)
        except SystemExit:
            print("compare.py: stopped by a signal; the same command goes on where it was")
            raise
        finally:
            rows = table_of(jobs, args)
            if rows:
                print(write_table(rows, os.path.join(args.results, "table")), end="")
        for sentence in failures:
            print(f"failed: {sentence}", file=sys.stderr)
        return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
