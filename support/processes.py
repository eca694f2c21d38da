"""One process, or as many as torchrun starts: their device, signals, and what they agree on."""

import concurrent.futures
import contextlib
import datetime
import os
import re
import signal
import sys
import traceback
from concurrent.futures import BrokenExecutor

import torch
import torch.distributed as dist
from tqdm import tqdm


class UserError(Exception):
    """What is wrong, where, and what to do about it. Of a longer message the first line is kept."""

    def __init__(self, message):
        super().__init__(str(message).partition("\n")[0])


# A full disk, a missing folder or a worker that was killed is the user's to mend, too.
MENDABLE = (UserError, OSError, BrokenExecutor)


def print_any_path():
    """A path may hold bytes that are no text: they are printed escaped."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def one_sentence(script):
    """End the program with `script: what is wrong` if the user can mend what is raised inside."""
    print_any_path()
    try:
        yield
    except MENDABLE as error:
        first_line = str(error).split("\n")[0]
        raise SystemExit(f"{script}: {first_line}") from error
    except KeyboardInterrupt:
        raise SystemExit(f"{script}: stopped") from None


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


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, a scheduler's, Slurm's warning
STOPPED = (130, 143)  # the exit statuses that a shell expects after SIGINT and SIGTERM
# gloo raises a bare RuntimeError when another process is gone: only its words tell.
LOST = "by peer|broken pipe|timed out|remote process|address already in use|, port: "


def choose_device(name):
    """auto: an accelerator, of several processes each its own; without any, the CPU."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator and accelerator.type not in ("cuda", "mps"):
        accelerator = None  # others are untried, and --device cannot name them
    if name == "cpu" or (name == "auto" and accelerator is None):
        return torch.device("cpu")
    kind = accelerator.type if accelerator else "no"
    count = torch.accelerator.device_count()
    if name not in ("auto", kind) or local >= count:
        raise UserError(
            f"--device {name} finds no device for process {local} of this machine, which has"
            f" {count} ({kind} accelerator): start fewer processes, or take --device cpu"
        )
    torch.accelerator.set_device_index(local)
    return torch.device(kind, local)


def autocast_type(name, device):
    """The compute type of --amp: auto is bfloat16 on GPUs that have it, float16 on older ones.

    A CPU has bfloat16 if it is asked for: only some CPUs are faster in it.
    """
    if device.type == "cuda" and name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name in ("auto", "off"):
        return None
    if device.type != "cuda" and (device.type, name) != ("cpu", "bf16"):
        raise UserError(
            f"--amp {name} needs a CUDA GPU, and the device is {device.type}: leave it out"
        )
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[name]


# ---------------------------------------------------------------- the life of a group


@contextlib.contextmanager
def processes(script, device_name="auto"):
    """(rank, world_size, device), in a process group exactly if torchrun started us."""
    print_any_path()
    try:
        device = choose_device(device_name)
        if "WORLD_SIZE" in os.environ:
            join_group(device)
        with on_signals(sys.exit):
            yield rank(), world_size(), device
    except SystemExit as stop:  # a signal, or a sentence that was said already
        release(stop)
        if stop.code in STOPPED and rank() == 0:
            hint = "; --resume continues the run" if script == "train.py" else ""
            print(f"{script}: stopped by a signal{hint}")
        leave_group()
        if isinstance(stop.code, str):
            raise SystemExit(f"{script}: {stop.code}") from None
        raise
    except Exception as error:
        release(error)
        # The group is not left: NCCL would wait for processes that wait for this one.
        sentence = explain(error)
        if sentence:
            raise SystemExit(f"{script}: {sentence}") from error
        raise
    leave_group()


def release(error):
    """Let go of what could keep this process from ending."""
    # A DDP wrapper that outlives the group can wait forever for a thread of gloo that itself waits
    # for Python's lock: forget the frames that hold it.
    traceback.clear_frames(error.__traceback__)
    # Data workers would first finish the videos that they have in hand.
    for worker in torch.multiprocessing.active_children():
        worker.kill()


def join_group(device):
    store, this_rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # A group that was restarted would find the addresses of the dead.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=this_rank,
        world_size=size,
        timeout=datetime.timedelta(hours=1),  # one process may download for long
    )


def leave_group():
    if dist.is_initialized():
        dist.destroy_process_group()


def explain(error):
    """One sentence for what the user can mend, or None."""
    lines = str(error).strip().split("\n")
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in lines[0]:
        return f"{lines[0]} (a smaller --micro-batch or --batch takes less memory)"
    if isinstance(error, MENDABLE):
        return lines[-1]  # behind where it was raised, if that was in a process that reads videos
    if not isinstance(error, RuntimeError):
        return None
    if "DataLoader worker (pid" in lines[0]:
        return (
            "a process that reads videos has died; if memory ran out, use fewer --workers"
            f" ({lines[0]})"
        )
    if "WORLD_SIZE" in os.environ and re.search(LOST, str(error), re.IGNORECASE):
        return (
            f"process {os.environ['RANK']} lost another, which may say why (port in use:"
            f" --standalone): {lines[0]}"
        )
    return None


# ---------------------------------------------------------------- signals


@contextlib.contextmanager
def on_signals(act):
    """Inside, a signal calls act(status), the status with which a shell expects us to end."""

    def handle(number, frame):
        act(130 if number == signal.SIGINT else 143)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_parent(worker):
    """For data workers: the training process answers a job's signal, and then ends them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------- what processes tell each other


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words):
    """Print, in the first process alone."""
    if rank() == 0:
        print(*words)


def gather(rows):
    """The lists of all processes, joined, in every process."""
    shards = [rows] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(shards, rows)
    return [row for shard in shards for row in shard]


def all_sum(*numbers):
    """The sums of these numbers over all processes; by their CPUs, so nobody waits for a GPU."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def in_turn(work):
    """work() in the first process, then in the others: they find what it drew or downloaded.

    Where it refuses in one process all of them end, and the first prints the one sentence.
    """
    result, refusal = None, None
    for mine in (rank() == 0, rank() > 0):
        try:
            if mine:
                result = work()
        except MENDABLE as error:
            refusal = str(error)
        refusals = [sentence for sentence in gather([refusal]) if sentence is not None]
        if refusals:
            raise SystemExit(refusals[0] if rank() == 0 else 1)
    return result
