"""Predictions of finished runs as small files, and what several of them come to.

A file is a CSV, a line a video, behind a first line `# {...}` in JSON with what the run was: its
settings, digests of its videos, tuned weights, multiply-accumulates and seconds.
"""

import csv
import json
import os
import re
from statistics import mean, median, stdev
from typing import NamedTuple

import numpy as np

from support.processes import UserError

ABOUT = ("settings", "digests", "tuned", "gmacs", "seconds_per_epoch")  # of the first line
RESAMPLES = 10_000  # of a bootstrap


class Result(NamedTuple):
    """A finished run. about: what the first line says. answers: {video: (label, {class: score})}.

    The scores are of the likeliest classes, at most five, the likeliest first.
    """

    about: dict
    answers: dict


def read_predictions(path, root=None):
    """The answers in a CSV of evaluate.py's --predictions; root: paths become relative to it."""
    answers = {}
    with open(path, newline="", errors="surrogateescape") as file:
        if not file.readline().startswith("# "):
            file.seek(0)
        lines = csv.reader(file)
        next(lines)
        for video, label, *cells in lines:
            if root is not None:
                video = os.path.relpath(video, root)
            scores = {c: float(score) for c, score in zip(cells[::2], cells[1::2])}
            answers[video] = (label, scores)
    return answers


def read_result(path):
    try:
        with open(path, errors="surrogateescape") as file:
            about = json.loads(file.readline().removeprefix("# "))
        return Result({name: about[name] for name in ABOUT}, read_predictions(path))
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        raise UserError(f"{path} is no result of a run ({error!r}): delete it") from error


def write_result(path, result):
    """The file appears only whole."""
    with open(f"{path}.part", "w", newline="", errors="surrogateescape") as file:
        file.write(f"# {json.dumps(result.about)}\n")
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("video", "label", "class and score, the likeliest first"))
        for video, (label, scores) in sorted(result.answers.items()):
            cells = [cell for c, score in scores.items() for cell in (c, f"{score:.6f}")]
            table.writerow((video, label, *cells))
    os.replace(f"{path}.part", path)


# ---------------------------------------------------------------- accuracy
def top1(label, scores):
    """An unreadable video has no scores, and is wrong."""
    return bool(scores) and max(scores, key=scores.get) == label


def among(classes):
    """Like top1, but the answer is the likeliest of those `classes` that the label is one of."""

    def is_right(label, scores):
        [own] = [names for names in classes if label in names]
        own_scores = {name: score for name, score in scores.items() if name in own}
        return top1(label, own_scores)

    return is_right


def pool(results):
    """The answers of the folds of one data set: {folder of a fold: its Result} → {video: answer}.

    Folders are relative to the one that holds all folds; so are the paths of videos in the end.
    """
    answers = {}
    for fold, result in results.items():
        for video, answer in result.answers.items():
            answers[os.path.normpath(os.path.join(fold, video))] = answer
    return answers


def without(answers, pattern):
    """The answers of the videos in whose paths a regular expression finds nothing."""
    return {video: answer for video, answer in answers.items() if not re.search(pattern, video)}


def accuracy(answers, is_right=top1):
    return mean(is_right(*answer) for answer in answers.values())


def with_deviation(percentages):
    """`mean ± standard deviation`, of one number just itself."""
    if not percentages:
        return "–"
    spread = f" ± {stdev(percentages):.1f}" if len(percentages) > 1 else ""
    return f"{mean(percentages):.1f}{spread}"


# ---------------------------------------------------------------- differences
def group_of(video, pattern):
    """What a regular expression finds in a video's path: its groups, if it has any, else all.

    Without an expression each video is a group of its own.
    """
    if pattern is None:
        return video
    found = re.search(pattern, video)
    return found and (found.groups() or found[0])


def paired_difference(own, other, pattern=None):
    """(difference, its 95 % interval) of two methods' accuracies over the same videos, in points.

    own, other: lists of pooled answers, one for each seed; correctness is averaged over seeds. The
    interval is a bootstrap's over groups, since videos of one group are right and wrong together.
    """
    differences = {}
    for video in own[0]:
        own_mean = mean(top1(*answers[video]) for answers in own)
        other_mean = mean(top1(*answers[video]) for answers in other)
        differences.setdefault(group_of(video, pattern), []).append(own_mean - other_mean)
    sums = np.array([sum(group) for group in differences.values()])
    sizes = np.array([len(group) for group in differences.values()])
    rng, resampled = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(sums), size=len(sums))
        resampled.append(100 * sums[drawn].sum() / sizes[drawn].sum())
    low, high = np.quantile(resampled, (0.025, 0.975))
    return 100 * sums.sum() / sizes.sum(), (low, high)


# ---------------------------------------------------------------- the table
def pooled_seeds(jobs, path_of):
    """{seed: answers over all folds}, of the seeds whose folds are all there."""
    seeds = {}
    for job in jobs:
        seeds.setdefault(job.seed, {})[job.fold] = path_of(job)
    return {
        seed: pool({fold: read_result(path) for fold, path in paths.items()})
        for seed, paths in seeds.items()
        if all(map(os.path.exists, paths.values()))
    }


def percentages(seeds, is_right=top1):
    return [100 * accuracy(answers, is_right) for answers in seeds.values()]


def accuracies(jobs, seeds, args):
    """The columns that say how often a row's answers are right."""
    columns = {
        "top-1, %": with_deviation(percentages(seeds)),
        "each seed": ", ".join(f"{p:.1f}" for p in percentages(seeds)),
    }
    if args.leave_out:
        fewer = {seed: without(answers, args.leave_out) for seed, answers in seeds.items()}
        columns[f"without {args.leave_out.pattern}"] = with_deviation(percentages(fewer))
    if args.among:
        columns["within its set"] = with_deviation(percentages(seeds, among(args.among)))
    if args.shuffled:
        asked = [job for job in jobs if job.seed in seeds]
        shuffled = pooled_seeds(asked, lambda job: job.shuffled)
        columns["shuffled"] = with_deviation(percentages(shuffled))
        if args.among:
            own = percentages(shuffled, among(args.among))
            columns["shuffled, within its set"] = with_deviation(own)
    return columns


def difference(first_seeds, seeds, pattern):
    """Of the first row from another one, over the seeds that both have."""
    both = first_seeds.keys() & seeds.keys()
    if first_seeds is seeds or not both:
        return "–"
    own, other = ([row[seed] for seed in both] for row in (first_seeds, seeds))
    points, (low, high) = paired_difference(own, other, pattern)
    return f"{points:+.1f} ({low:+.1f} to {high:+.1f})"


def table_of(jobs, args):
    """A row for each method, as dicts; a method that has no whole seed yet has none.

    args: tools.compare's.
    """
    rows, first_seeds = [], None
    for name, _ in args.method:
        own = [job for job in jobs if job.row == name]
        seeds = pooled_seeds(own, lambda job: job.result)
        if not seeds:
            continue
        first_seeds = first_seeds or seeds
        abouts = [read_result(job.result).about for job in own if os.path.exists(job.result)]
        row = {"method": name} | accuracies(own, seeds, args)
        first = rows[0]["method"] if rows else name
        row[f"{first} − this (95 %)"] = difference(first_seeds, seeds, args.group)
        row["tuned weights"] = f"{abouts[0]['tuned']:,}"
        row["GMACs"] = f"{abouts[0]['gmacs']:.4g}"
        row["s/epoch"] = f"{median(about['seconds_per_epoch'] for about in abouts):.1f}"
        rows.append(row)
    return rows


def write_table(rows, path):
    """Dicts with the same keys, of text → path.md, whose text is returned, and path.csv."""
    lines = [list(rows[0]), ["---"] * len(rows[0])] + [list(row.values()) for row in rows]
    text = ""
    for line in lines:
        cells = [cell.replace("|", "\\|") for cell in line]
        text += f"| {' | '.join(cells)} |\n"
    with open(f"{path}.md", "w") as file:
        file.write(text)
    with open(f"{path}.csv", "w", newline="") as file:
        cells = csv.DictWriter(file, rows[0], lineterminator="\n")
        cells.writeheader()
        cells.writerows(rows)
    return text
