"""Runs of train.py, several at once, each tested after its last epoch: what tools.compare does."""

import concurrent.futures
import fcntl
import functools
import hashlib
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
from support.processes import MENDABLE, UserError
from support.runs import FREE, read_checkpoint
from tools.results import Result, read_predictions, read_result, write_result

STARTS = ("backbone", "pretrained", "init")  # options that name what a run starts from
CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Job(NamedTuple):
    """One run, and where everything of it goes."""

    row: str  # of the table
    seed: int
    words: list  # train.py's, without --out and --resume
    root: str  # of its data set: in a result, paths of videos are relative to it
    fold: str  # the root, relative to the folder that holds all roots
    classes: dict  # {path of a video that it validates: name of its class}
    digests: dict  # SHA-256 of what it is trained on and starts from, by what that is
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
    for name in STARTS:  # in another checkout they may lie elsewhere
        if kept[name] and not kept[name].startswith("hf-hub:"):
            path = os.path.normpath(kept[name].removeprefix("local-dir:"))
            kept[name] = os.path.basename(path)
    return json.loads(json.dumps(kept))


def digests_of_files(options):
    """SHA-256 of the local files that a run starts from: {what it is: hexadecimal}."""
    digests = {}
    for name in STARTS:
        value = getattr(options, name) or ""
        folder = value.removeprefix("local-dir:")
        if os.path.isfile(value) or (folder != value and os.path.isdir(folder)):
            digests[f"files of --{name}"] = digest_of_files(folder)
    return digests


@functools.cache
def digest_of_files(path):
    """Of a file, or of all files in a folder."""
    files = sorted(entry.path for entry in os.scandir(path)) if os.path.isdir(path) else [path]
    digest = hashlib.sha256()
    for name in filter(os.path.isfile, files):
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def is_done(job):
    """Are all results of a job there? UserError if one of them is another run's."""
    paths = [path for path in (job.result, job.shuffled) if path]
    for path in filter(os.path.exists, paths):
        differ = what_differs(job, read_result(path))
        if differ:
            raise UserError(
                f"{path} is of a run with {', '.join(differ)}: delete"
                f" {', '.join(paths)} and {job.folder}, or choose other --results and --runs"
            )
    return all(map(os.path.exists, paths))


def what_differs(job, result):
    """How a result differs from the job, as phrases; none if it is the job's."""
    settings, digests = learned_from(job.words), result.about["digests"]
    defaults = learned_from(["--data", settings["data"]])  # for options added since
    was = defaults | result.about["settings"]
    differ = [f"{name} {was[name]}" for name, value in settings.items() if was[name] != value]
    for name in sorted(job.digests.keys() | digests.keys()):
        if job.digests.get(name) != digests.get(name):
            differ.append(f"other {name}")
    if {video: label for video, (label, _) in result.answers.items()} != job.classes:
        differ.append("other validation videos or classes")
    return differ


def about_run(job):
    """What a result tells of its run: what a table says beside the accuracy."""
    content = read_checkpoint(os.path.join(job.folder, "last.pt"))
    with torch.device("meta"):
        counts = count(build_model(**content["model"] | {"pretrained": None}))
    with open(os.path.join(job.folder, "log.jsonl")) as file:
        seconds = [json.loads(line)["seconds"] for line in file]
    return {
        "settings": learned_from(job.words),
        "digests": job.digests,
        "tuned": round(1e6 * counts["tuned M"]),
        "gmacs": round(counts["GMACs/view"], 4),
        "seconds_per_epoch": median(seconds),
    }


def write_results(job, tested):
    """Write what a job's tests gave → the Result of ordinary clips."""
    about = about_run(job)
    results = {path: Result(about, answers) for path, answers in tested.items()}
    for path, result in results.items():
        write_result(path, result)
    return results[job.result]


# ---------------------------------------------------------------- doing them
class Stopped(Exception):
    """All jobs are to end."""


class Runner:
    """Does jobs by the commands that a user would type, several at once, on shares of the cores.

    with Runner(2) as runner: … ends those that are running where the block is left.
    """

    def __init__(self, jobs_at_once):
        self.slots = queue.SimpleQueue()  # the free ones; each has a GPU, if there are several
        for slot in range(jobs_at_once):
            self.slots.put(slot)
        self.threads = cores_each(jobs_at_once)
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
            job = futures[future]
            result, failure = None, None
            try:
                result = write_results(job, future.result())
            except Exception as error:  # whatever it is, the other jobs go on
                failure = str(error) if isinstance(error, MENDABLE) else repr(error)
            yield job, result, failure

    def do(self, job):
        """Train and test → {file of a result: its answers}."""
        slot, tested = self.slots.get(), {}
        try:
            os.makedirs(os.path.dirname(job.folder), exist_ok=True)
            self.call(job, slot, "train.py", *job.words, "--out", job.folder, "--resume")
            if job.shuffled:
                tested[job.shuffled] = self.test(job, slot, "tools/shuffled.py", job.shuffled)
            tested[job.result] = self.test(job, slot, "evaluate.py", job.result)
            return tested
        finally:
            self.slots.put(slot)

    def test(self, job, slot, script, result):
        """The answers of a trained model."""
        options, last = train.parse(job.words), os.path.join(job.folder, "last.pt")
        predictions = os.path.join(job.folder, os.path.basename(result))
        words = [last, "--predictions", predictions, "--amp", options.amp]
        words += ["--workers", str(options.workers), "--device", options.device]
        if options.limit:
            words += ["--limit", str(options.limit)]
        self.call(job, slot, script, *words)
        return read_predictions(predictions, job.root)

    def call(self, job, slot, script, *words):
        """Run one of our scripts; UserError with its last line if it fails."""
        command = [sys.executable, os.path.join(CHECKOUT, script), *words]
        path = f"{job.folder}.txt"
        with open(path, "a") as log:
            try:  # the process inherits the lock, and keeps it if this one is killed
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is at work on {job.folder}: wait for it"
                ) from error
            start = log.tell()
            env = self.environment(slot)
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        self.running.add(process)
        if self.stopped:
            process.terminate()
        status = process.wait()
        self.running.discard(process)
        if self.stopped:
            raise Stopped
        if status:
            raise UserError(f"{last_words(path, start, status)} (more in {path})")

    def environment(self, slot):
        """A process's share of the machine; several GPUs are given out in turn."""
        mine = os.environ.get("PYTHONPATH")
        env = os.environ | {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{mine}" if mine else CHECKOUT}
        env["OMP_NUM_THREADS"] = str(self.threads)
        gpus = torch.cuda.device_count()
        if gpus > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
        return env


def last_words(path, start, status):
    """Why a process has failed; it wrote to the file from byte `start` on."""
    if status < 0:
        return f"ended by signal {-status}"
    with open(path, errors="replace") as log:
        log.seek(start)
        lines = [line.strip() for line in log if line.strip()]
    return lines[-1] if lines else f"ended with status {status}"
