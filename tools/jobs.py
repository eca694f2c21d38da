"""Runs of train.py, several at once, each tested after its last epoch: what tools.compare does."""

import concurrent.futures
import json
import os
import queue
import subprocess
import sys
from statistics import median
from typing import NamedTuple

import torch

import train
from model import build_model, count
from support.checkpoints import read_checkpoint
from support.errors import UserError
from support.resume import FREE
from tools.results import Result, read_predictions, read_result, write_result

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Job(NamedTuple):
    """One run, and where everything of it goes."""

    row: str  # of the table
    seed: int
    root: str  # of the data
    words: list  # train.py's, without --out and --resume
    train_digest: str  # of the training videos
    folder: str  # the run's
    result: str  # the file of its predictions
    shuffled: str | None  # likewise, with shuffled frames; None if that is not asked for

    @property
    def name(self):
        return os.path.basename(self.folder)


def cores_each(jobs_at_once):
    return max(1, os.cpu_count() // jobs_at_once)


def learned_from(words):
    """The options that decide what train.py learns, in the types of JSON."""
    options = vars(train.parse(words))
    kept = {name: options[name] for name in options if name not in FREE or name == "init"}
    return json.loads(json.dumps(kept))


def is_done(job):
    """Are all results of a job there? UserError if they are another run's."""
    settings = learned_from(job.words)
    for path in filter(None, (job.result, job.shuffled)):
        if not os.path.exists(path):
            return False
        about = read_result(path).about
        was = learned_from(["--data", settings["data"]]) | about["settings"]  # options may be young
        differ = [f"{name} {was[name]}" for name, value in settings.items() if was[name] != value]
        if about["train_digest"] != job.train_digest:
            differ.append("other training videos")
        if differ:
            raise UserError(
                f"{path} is of a run with {', '.join(differ)}: delete it, or take other --results"
            )
    return True


def about_run(job):
    """What a result tells of its run: what a table says beside the accuracy."""
    content = read_checkpoint(os.path.join(job.folder, "last.pt"))
    with torch.device("meta"):
        counts = count(build_model(**content["model"] | {"pretrained": None}))
    with open(os.path.join(job.folder, "log.jsonl")) as file:
        seconds = [json.loads(line)["seconds"] for line in file]
    return {
        "settings": learned_from(job.words),
        "train_digest": job.train_digest,
        "tuned": round(1e6 * counts["tuned M"]),
        "gmacs": round(counts["GMACs/view"], 4),
        "seconds_per_epoch": median(seconds),
    }


# ---------------------------------------------------------------- doing them
class Stopped(Exception):
    """All jobs are to end."""


class Runner:
    """Does jobs by the commands that a user would type, several at once, on shares of the cores.

    with Runner(2) as runner: … ends those that are running where the block is left.
    """

    def __init__(self, jobs_at_once):
        self.places = queue.SimpleQueue()  # of those at once; each has a GPU, if there are several
        for place in range(jobs_at_once):
            self.places.put(place)
        self.env = os.environ | {"PYTHONPATH": CHECKOUT}
        self.env["OMP_NUM_THREADS"] = str(cores_each(jobs_at_once))
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs_at_once)
        self.running, self.stopped = set(), False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stopped = True
        for process in list(self.running):
            process.terminate()  # train.py saves first
        self.pool.shutdown(cancel_futures=True)

    def do_all(self, jobs):
        """Yield (job, its Result or None, what went wrong or None), as each ends."""
        futures = {self.pool.submit(self.do, job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            try:
                yield futures[future], future.result(), None
            except (UserError, OSError) as error:
                yield futures[future], None, error

    def do(self, job):
        """Train, test, and write the results."""
        place = self.places.get()
        try:
            os.makedirs(os.path.dirname(job.folder), exist_ok=True)
            self.call(job, place, "train.py", *job.words, "--out", job.folder, "--resume")
            if job.shuffled:
                self.test(job, place, "shuffled", job.shuffled)
            return self.test(job, place, "evaluate.py", job.result)
        finally:
            self.places.put(place)

    def test(self, job, place, script, path):
        """Write a result of a finished run, and give it back."""
        options, predictions = train.parse(job.words), os.path.join(job.folder, "predictions.csv")
        command = [script, os.path.join(job.folder, "last.pt"), "--predictions", predictions]
        command += ["--workers", str(options.workers), "--device", options.device]
        self.call(job, place, *command, "--amp", options.amp)
        result = Result(about_run(job), read_predictions(predictions, job.root))
        write_result(path, result)
        return result

    def call(self, job, place, script, *words):
        """Run one of our scripts; UserError with its last line if it fails."""
        if script.endswith(".py"):
            command = [os.path.join(CHECKOUT, script), *words]
        else:
            command = ["-m", f"tools.{script}", *words]
        env = dict(self.env)
        if torch.cuda.device_count() > 1:
            env["CUDA_VISIBLE_DEVICES"] = str(place % torch.cuda.device_count())
        path = f"{job.folder}.txt"
        with open(path, "a") as log:
            process = subprocess.Popen([sys.executable, *command], env=env, stdout=log, stderr=log)
        self.running.add(process)
        if self.stopped:
            process.terminate()
        status = process.wait()
        self.running.discard(process)
        if self.stopped:
            raise Stopped
        if status:
            with open(path, errors="replace") as log:
                lines = [line.strip() for line in log if line.strip()]
            raise UserError(f"{lines[-1] if lines else f'status {status}'} (more in {path})")
