"""What tools that measure share: steps that take turns, ratios of their times, a table of rows."""

import random
import time
from statistics import median

from support.processes import progress_bar


def take_turns(steps, rounds, wait=None):
    """Seconds of each step in each round but the first, which warms up.

    The order within a round is random, so that a machine's noise falls on all steps alike.
    steps: {name: function}. wait: what ends the work of a device, if there is one.
    """
    seconds = {name: [] for name in steps}
    for _ in progress_bar(range(rounds + 1), "measuring", unit="round"):
        for name in random.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            if wait is not None:
                wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


def ratio(seconds, others):
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(seconds, others, strict=True))


def table(rows):
    """Dicts with the same keys → the lines of a Markdown table, its columns aligned."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([f"{c:.5g}" if isinstance(c, float) else str(c) for c in row.values()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [[c.rjust(w) for c, w in zip(line, widths, strict=True)] for line in cells]
    return [f"| {' | '.join(line)} |" for line in lines]
