"""Predictions of finished runs as small files, and what several of them come to.

A file is a CSV, a line a video, behind a first line `# {...}` in JSON with what the run was: its
settings, digest of its training videos, tuned weights, multiply-accumulates and seconds.
"""

import csv
import json
import os
import re
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

from support.errors import UserError

RESAMPLES = 10_000  # of a bootstrap


class Result(NamedTuple):
    """A finished run: `about` is its first line's, answers is {video: (label, {class: score})}.

    The scores are of the likeliest classes, at most five, the likeliest first.
    """

    about: dict
    answers: dict


def read_predictions(path, folder=None):
    """The answers in a CSV of evaluate.py's --predictions; folder: the paths become relative to it.

    A first line that begins with # is passed over.
    """
    answers = {}
    with open(path, newline="", errors="surrogateescape") as file:
        lines = csv.reader(line for line in file if not line.startswith("#"))
        next(lines)
        for video, label, *cells in lines:
            if folder is not None:
                video = os.path.relpath(video, folder)
            scores = {c: float(score) for c, score in zip(cells[::2], cells[1::2])}
            answers[video] = (label, scores)
    return answers


def read_result(path):
    try:
        with open(path, errors="surrogateescape") as file:
            about = json.loads(file.readline().removeprefix("#"))
        return Result(about, read_predictions(path))
    except (ValueError, StopIteration) as error:
        raise UserError(f"{path} is no result of a run ({error}): delete it") from error


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
        own_scores = {name: scores[name] for name in own if name in scores}
        return top1(label, own_scores)

    return is_right


def pool(results):
    """The answers of the folds of one data set, each video counted once."""
    answers = {}
    for result in results:
        twice = answers.keys() & result.answers.keys()
        if twice:
            raise UserError(f"{min(twice)} is validated in two folds, and may count once")
        answers |= result.answers
    return answers


def without(answers, pattern):
    """The answers of the videos in whose paths a regular expression finds nothing."""
    kept = {video: answer for video, answer in answers.items() if not re.search(pattern, video)}
    if not kept:
        raise UserError(f"--leave-out {pattern} leaves no video")
    return kept


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
    """The part of a video's path that a regular expression finds: its last group, else the whole.

    Without one each video is a group.
    """
    if pattern is None:
        return video
    found = re.search(pattern, video)
    if found is None:
        raise UserError(f"--group {pattern} finds nothing in {video}")
    return found[found.lastindex or 0]


def paired_difference(seeds, other_seeds, pattern=None):
    """(difference, its 95 % interval) of two methods' accuracies over the same videos, in points.

    seeds: pooled answers, one for each seed; correctness is averaged over them. The interval is a
    bootstrap's over groups, since videos of one group are right and wrong together.
    """
    differences = {}
    for video in seeds[0]:
        own = mean(top1(*answers[video]) for answers in seeds)
        other = mean(top1(*answers[video]) for answers in other_seeds)
        differences.setdefault(group_of(video, pattern), []).append(own - other)
    sums = np.array([sum(group) for group in differences.values()])
    sizes = np.array([len(group) for group in differences.values()])
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    resampled = 100 * sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return 100 * sums.sum() / sizes.sum(), (low, high)
