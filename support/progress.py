"""Progress bars that also suit a job's log, and work spread over the cores of a machine."""

import concurrent.futures
import os
import sys

import torch
from tqdm import tqdm

BAR = {"leave": False}
if not sys.stderr.isatty():  # in the log of a job: a line a minute
    BAR |= {"delay": 60, "mininterval": 60, "maxinterval": 60}
    BAR["miniters"] = 1  # else tqdm repeats an old count whenever the work becomes slower
    BAR["bar_format"] = (
        "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} to go, {rate_fmt}{postfix}\n"
    )


def in_parallel(work, jobs, title):
    """Yield work(job) for each job, in order; up to eight processes of one thread each do it."""
    with concurrent.futures.ProcessPoolExecutor(
        min(8, os.cpu_count()), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        results = pool.map(work, jobs, chunksize=16)
        yield from tqdm(results, title, len(jobs), unit="video", **BAR)
