"""Progress bars that also suit a job's log, and work spread over the cores of a machine."""

import concurrent.futures
import os
import signal
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


def in_parallel(work, jobs, title, workers=None):
    """Yield work(job) for each job, in order; processes of one thread each do it.

    workers: their number, eight at most if it is not given.
    """
    workers = workers or min(8, os.cpu_count())
    chunk = max(1, min(4, len(jobs) // (4 * workers)))  # of jobs, handed over at once
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        results = pool.map(work, jobs, chunksize=chunk)
        try:
            yield from tqdm(results, title, len(jobs), unit="video", **BAR)
        finally:
            # After a failure, here or in the caller, what has not been begun is called off. What
            # has is waited for, as it may be writing where the caller is about to clear up.
            pool.shutdown(wait=True, cancel_futures=True)


def start_worker():
    """One thread; Ctrl-C is for the parent to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
