"""Steps that take turns in random order, so that noise falls on all alike."""

import random
import time
from statistics import median

from tqdm import tqdm


def take_turns(steps, rounds, wait=None):
    """Seconds of each step in each round but the first, which warms up.

    steps: {name: function}. wait: what ends the work of a device, if there is one.
    """
    seconds = {name: [] for name in steps}
    for _ in tqdm(range(rounds + 1), "measuring", unit="round", leave=False):
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
