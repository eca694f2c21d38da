"""One process, or as many as torchrun starts: their device, signals, and what they agree on.

A user error ends a script with one clear sentence and no traceback.
"""

import concurrent.futures
import contextlib
import datetime
import os
import signal
import sys
import traceback

import torch
import torch.distributed as dist


class UserError(Exception):
    """What is wrong, where, and what to do about it."""


# A full disk, a missing folder or a worker that was killed is the user's to mend, too.
USER_ERRORS = (UserError, OSError, concurrent.futures.BrokenExecutor)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, a scheduler's, Slurm's warning


def choose_device(name):
    """auto: a GPU, of several processes each its own; without any, the CPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
    if name != "cuda":
        return torch.device(name)
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        raise UserError(f"process {local} finds no CUDA GPU: this machine has {gpus} of them")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def autocast_type(name, device):
    """The compute type of --amp: auto is bfloat16 on GPUs that have it, float16 on older ones.

    A CPU has bfloat16 if it is asked for: only some CPUs are faster in it.
    """
    if device.type == "cuda" and name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name in ("auto", "off"):
        return None
    if device.type != "cuda" and (device.type, name) != ("cpu", "bf16"):
        raise UserError(f"--amp {name} needs a CUDA GPU, and the device is {device.type}")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[name]


# ---------------------------------------------------------------- a script's life
@contextlib.contextmanager
def one_sentence(script):
    """End the program with `script: what is wrong` after a user error inside."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
    try:
        with on_signals(sys.exit):
            yield
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise SystemExit(f"{script}: {stop.code}") from None
        if stop.code in (128 + number for number in SIGNALS) and os.environ.get("RANK", "0") == "0":
            print(f"{script}: stopped by a signal")
        raise
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        raise SystemExit(f"{script}: {sentence}") from error


def explain(error):
    """One sentence for a user error, or None."""
    lines = str(error).strip().split("\n")
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in lines[0]:
        return f"{lines[0]} (a smaller --batch takes less memory; in training, --micro-batch)"
    if isinstance(error, USER_ERRORS):
        if lines[0].startswith("Caught "):  # raised in a process that reads videos: its traceback
            return lines[-1].partition(": ")[2]
        return lines[0]
    if isinstance(error, ModuleNotFoundError):
        return f"{lines[0]}: pip install -r tools/requirements.txt"
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in lines[0]:
        return f"{lines[0]} (if memory, or a container's shared memory, ran out: fewer --workers)"
    return None


@contextlib.contextmanager
def processes(script, device_name="auto"):
    """The device of this process, in a process group exactly if torchrun started us."""
    with one_sentence(script):
        device = choose_device(device_name)
        if "WORLD_SIZE" in os.environ:
            # Gradients go by NCCL where there are GPUs, what processes tell each other by gloo.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            hour = datetime.timedelta(hours=1)  # one process may download for long
            dist.init_process_group(backend, timeout=hour)
        leave_group = dist.is_initialized()
        try:
            yield device
        except BaseException as error:
            # After an error NCCL would wait for processes that wait for this one.
            leave_group &= isinstance(error, SystemExit)
            # A DDP wrapper that outlives the group can wait forever for a thread of gloo that
            # itself waits for Python's lock: forget the frames that hold it.
            traceback.clear_frames(error.__traceback__)
            # Data workers would first finish the videos that they have in hand.
            for worker in torch.multiprocessing.active_children():
                worker.kill()
            raise
        finally:
            if leave_group:
                dist.destroy_process_group()


# ---------------------------------------------------------------- signals
@contextlib.contextmanager
def on_signals(act):
    """Inside, a signal calls act(status), the status with which a shell expects us to end."""

    def handle(number, frame):
        act(128 + number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_worker(worker=None):
    """One thread; a signal is the parent's to answer, which then ends its workers."""
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------- what processes tell each other
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words):
    """Print, in the first process only."""
    if rank() == 0:
        print(*words)


def end_all(why):
    """Called in all processes alike: they end, and the first one says why."""
    raise SystemExit(why if rank() == 0 else 1)


def gather(rows):
    """The lists of all processes, joined, in every process; by their CPUs, no GPU is waited for."""
    shards = [rows] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(shards, rows)
    return [row for shard in shards for row in shard]


def rank_zero_first(work):
    """work() in the first process, then in the others: they find what it drew or downloaded.

    A user error in one of them ends them all: nobody waits for a process that is gone.
    """
    result, error = None, None
    for my_turn in (rank() == 0, rank() > 0):
        try:
            if my_turn:
                result = work()
        except USER_ERRORS as refusal:
            error = refusal
        if any(gather([error is not None])):
            raise error or SystemExit(1)
    return result


# ---------------------------------------------------------------- progress, and many cores
def progress_bar(items, title, total=None, **options):
    """tqdm, in the first process only; in the log of a job, a line a minute."""
    from tqdm import tqdm  # here, so that `import model` needs it no more than it needs a terminal

    if not sys.stderr.isatty():
        options |= {"delay": 60, "mininterval": 60, "maxinterval": 60}  # seconds
        options["bar_format"] = "{desc}: {n_fmt} of {total_fmt}, {remaining} to go{postfix}\n"
    return tqdm(items, title, total, leave=False, disable=rank() > 0, **options)


def in_parallel(work, jobs, title, workers=None):
    """Yield work(job) for each job, in order; processes do it, eight at most unless `workers`."""
    workers = workers or min(8, os.cpu_count())
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        # After a failure, here or in the caller, map calls off what has not been begun, and pool
        # waits for what has.
        yield from progress_bar(pool.map(work, jobs), title, len(jobs), unit="video")
