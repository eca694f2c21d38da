"""The accuracy of a trained model over all views of every video, or what is in a video.

    python evaluate.py runs/demo-dualpath-s0/best.pt                      # data and views as in training
    python evaluate.py CKPT --data folder --root DIR --views 3x1          # other ones
    python evaluate.py CKPT clip.mp4 --picture look.png                   # the five likeliest classes, and where it looks
    torchrun --nproc_per_node=8 evaluate.py CKPT                          # eight processes, the same figures
"""
import argparse
import contextlib
import csv
import datetime
import hashlib
import json
import math
import os
import re
import signal
import sys
import traceback
from concurrent.futures import BrokenExecutor

import torch
import torch.distributed as dist
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import adapters
import data
import grid
import model as models

# ---------------------------------------------------------------- processes: one, or as many as torchrun starts
REFUSALS = (models.ModelError, data.DataError, OSError, BrokenExecutor)  # what users can mend: a sentence, no traceback
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

@contextlib.contextmanager
def processes(script, name="auto"):
    """(rank, world, device), in a process group exactly if torchrun started us, until the work inside ends, however it ends."""
    grouped, rank, world = "RANK" in os.environ, 0, 1
    try:
        device = adapters.choose_device(name)
        if grouped:
            store, rank, world = next(dist.rendezvous("env://"))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":  # else a restarted group would find the addresses of the dead
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            backend, hour = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", datetime.timedelta(hours=1)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=hour)  # one may download for long
        with on_signals(sys.exit):
            yield rank, world, device
    except BaseException as error:
        # A DDP wrapper that outlives the group can wait forever for a thread of gloo that waits for Python's lock.
        traceback.clear_frames(error.__traceback__)
        for worker in torch.multiprocessing.active_children():  # else their videos in hand would be waited for
            worker.kill()
        what = str(error).strip().split("\n")
        if isinstance(error, REFUSALS):
            raise SystemExit(f"{script}: {what[-1]}")
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" in what[0]:
            raise SystemExit(f"{script}: a process that reads videos has died; if for want of memory, fewer --workers ({what[0]})")
        if isinstance(error, RuntimeError) and grouped and re.search("peer|roken pipe|imed out|remote process|in use", str(error)):
            raise SystemExit(f"{script}: process {rank} lost another, which may say why (port in use: --standalone): {what[0]}")
        if not isinstance(error, SystemExit):
            raise  # the group is not left in order: NCCL would wait for processes that wait for this one
        if error.code in (130, 143) and rank == 0:
            print(f"{script}: stopped by a signal" + "; --resume continues the run" * (script == "train.py"))
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()

@contextlib.contextmanager
def on_signals(act):
    """What Ctrl-C, SIGTERM and Slurm's SIGUSR1 do inside: act(the status with which a shell expects us to end)."""
    before = {n: signal.signal(n, lambda number, _: act(130 if number == signal.SIGINT else 143)) for n in SIGNALS}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)

def leave_signals_to_the_parent(worker):
    """For data workers: a signal to all processes of a job is the training process's to answer, and then it ends them."""
    for n in SIGNALS:
        signal.signal(n, signal.SIG_IGN)

def gather(rows):
    """The lists of all processes, joined, in every process."""
    shards = [rows] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(shards, rows)
    return [row for shard in shards for row in shard]

def agree(*numbers):
    """The sums of these numbers over all processes, by way of their CPUs, so that nobody waits for a GPU."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()

def in_turn(work):
    """work() in the first process, then in the others, so that what it draws or downloads is there for them. Where it
    refuses in one process all of them end, and the first prints the one sentence."""
    rank, result, refusal = dist.get_rank() if dist.is_initialized() else 0, None, None
    for mine in (rank == 0, rank > 0):
        try:
            result = work() if mine else result
        except REFUSALS as error:
            refusal = str(error)
        if any(refusals := gather([refusal])):
            raise SystemExit(f"{os.path.basename(sys.argv[0])}: {next(filter(None, refusals))}" if rank == 0 else 1)
    return result

# ---------------------------------------------------------------- accuracy
def autocast_type(name, device):
    """The compute type of --amp: auto is bfloat16 on GPUs that have it, float16 on others, none elsewhere."""
    if device.type != "cuda" and name in ("bf16", "fp16"):
        raise models.ModelError(f"--amp {name} needs a CUDA GPU, and the device is {device.type}: leave it out")
    auto = "off" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return dict(off=None, bf16=torch.bfloat16, fp16=torch.float16)[auto if name == "auto" else name]

@torch.no_grad()
def predict(model, clips, device, dtype=None, batch=16, workers=0, title="evaluating"):
    """Softmax averaged over all views of each video; every video exactly once, whatever the number of processes. clips: the Views.
    Returns a row per video, in order, the same in every process: (index, label, likeliest classes (≤ 5), their scores, None), or
    (index, label, [], [], error)."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.eval()
    # Uneven shards are no problem for the bare module; a DDP wrapper would wait for the missing batches.
    shard = Subset(clips, range(rank, len(clips), world))
    loader = DataLoader(shard, batch, collate_fn=list, num_workers=workers, pin_memory=device.type == "cuda",
                        worker_init_fn=leave_signals_to_the_parent)
    rows, batches = [], []
    try:
        for videos in tqdm(loader, title, unit="batch", disable=rank > 0, **data.BAR):
            rows += [(index, label, [], [], error) for views, label, index, error in videos if views is None]
            videos = [video for video in videos if video[0] is not None]
            if not videos:
                continue
            views = torch.stack([video[0].to(device, non_blocking=True) for video in videos])  # (B, views, T, 3, H, W)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(views.flatten(0, 1))
            scores = logits.float().softmax(-1).unflatten(0, views.shape[:2]).mean(1)  # (B, classes)
            scores, classes = scores.topk(min(5, scores.shape[1]))
            batches.append(([video[1:3] for video in videos], classes, scores))
    except SystemExit:  # a signal
        tqdm.write(f"{title}: {len(rows) + sum(len(batch[0]) for batch in batches)} of {len(shard)} videos were done")
        raise
    for videos, classes, scores in batches:  # read from the device only now, since every read waits for it
        rows += [(index, label, c, s, None) for (label, index), c, s in zip(videos, classes.tolist(), scores.tolist())]
    return sorted(gather(rows))

def summarise(rows):
    """Accuracies as fractions: over all videos, where one that cannot be read counts as wrong, and over the readable."""
    top1, top5 = (sum(label in classes[:k] for _, label, classes, _, _ in rows) for k in (1, 5))
    n, failed = len(rows), sum(error is not None for *_, error in rows)
    return dict(videos=n, failed=failed, top1=top1 / n, top5=top5 / n, top1_readable=top1 / max(1, n - failed),
                top5_readable=top5 / max(1, n - failed))

# ---------------------------------------------------------------- pictures
def draw_clip(file, model, clips, row, names):
    """Where the class tokens look in the middle one of a video's views, and what is made of all of them. row: predict's."""
    (index, _, classes, scores, _), T, rows, cols = row, model.num_frames, model.config["rows"], model.config["cols"]
    views, _, _, numbers = clips[index]
    view, numbers = views[len(views) // 2], numbers[len(numbers) // T // 2 * T:][:T]
    frames, sets = models.attention(model.cpu().float(), view[None])
    stripes, step = [], T // model.spatial_frames
    if len(frames):
        stripes.append((f"spatial path: {len(frames)} frames, each an image", view[::step], numbers[::step], 1, 1, frames))
    if len(sets):  # the share of each little frame: patches are cut into pieces first, since some lie in two of them
        pieces = sets.repeat_interleave(rows, 1).repeat_interleave(cols, 2)
        shares = avg_pool2d(pieces, sets.shape[1:], divisor_override=rows * cols).flatten()
        texts = [f"{i}: {100 * share:.0f} %" for i, share in zip(numbers, shares)]
        stripes.append((f"temporal path: {rows * cols} shrunken frames an image, and what each gets of its attention",
                        grid.frameset(view[None], rows, cols)[0], texts, rows, cols, sets))
    bars = (f"the likeliest classes; views: {len(views)}", [(names[c], score) for c, score in zip(classes, scores)])
    grid.draw(file, f"where the class tokens look (bright), with the frames' numbers: {os.path.basename(clips.samples[index][0])}",
              *[(min(4, 9.8 / len(stripe[1])) + 0.3, grid.show, *stripe) for stripe in stripes],
              (0.25 * len(classes) + 0.3, grid.bars, *bars))

def fingerprint(samples):
    """SHA-256 over the names and labels of videos, whatever their folders and containers: two downloads of Kinetics differ
    by hundreds of videos, and their accuracies by as much as papers argue about."""
    lines = sorted(f"{os.path.splitext(os.path.basename(path))[0]}\t{label}\n" for path, label in samples)
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()

def number(least, most=math.inf, kind=float):
    """The type, for argparse, of numbers from `least` to `most`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number from {least} to {most}")
    return parse
at_least = lambda least: number(least, kind=int)
help_lines = lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=131)

def parse_views(text):
    """'3x1' → (3 clips, 1 crop)."""
    if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not CLIPSxCROPS, such as 3x1")
    return tuple(map(int, text.split("x")))

def main(argv=None):
    parser = argparse.ArgumentParser(usage="python evaluate.py CHECKPOINT [VIDEO ...] [options]", formatter_class=help_lines)
    add = parser.add_argument
    add("checkpoint", help="best.pt or last.pt of a run")
    add("video", nargs="*", default=[], help="files to be classified; without any, a data set is evaluated")
    add("--views", type=parse_views, metavar="CLIPSxCROPS", help="views per video, whose scores are averaged (the recipe's)")
    add("--picture", metavar="FILE.png", help="draw where the model looks in a video, or what it takes for what in a data set")
    add = parser.add_argument_group("data set").add_argument
    add("--data", choices=data.SOURCES, metavar="NAME", help=f"{', '.join(data.SOURCES)} (that of the training)")
    add("--root", help="its folder (that of the training)")
    add("--split", type=int, choices=(1, 2, 3), help="HMDB51's (that of the training)")
    add("--limit", type=at_least(1), metavar="N", help="only the first N videos (all)")
    add("--predictions", metavar="FILE.csv", help="write each video's classes and scores")
    add = parser.add_argument_group("image model and machine").add_argument
    add("--backbone", metavar="NAME", help="where the image model is here, if not where it was in training")
    add("--pretrained", metavar="TAG", help="likewise, the file or tag of its weights")
    add("--batch", type=at_least(1), metavar="N", default=8, help="videos per process and step (%(default)s)")
    add("--workers", type=at_least(0), metavar="N", default=min(8, os.cpu_count()), help="that read videos (%(default)s)")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision (%(default)s)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="mps is untested (%(default)s)")
    args = parser.parse_intermixed_args(argv)
    if args.video and (args.predictions or args.picture and len(args.video) > 1):
        parser.error(f"--predictions is for a data set, --picture for one or one video, and there are {len(args.video)} videos")
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # a path may hold any bytes; notebooks cannot tell
    with processes("evaluate.py", args.device) as (rank, world, device):
        return evaluate(args, rank, device)

def evaluate(args, rank, device):
    def set_up():
        dtype = autocast_type(args.amp, device)
        model, content = models.load_checkpoint(args.checkpoint, args.backbone, args.pretrained)
        run = content["run"]
        if args.video:
            samples, missing = [(path, -1) for path in args.video], 0
        else:
            source, same = args.data or run["data"], args.data in (None, run["data"])
            args.split = args.split or (run.get("split") if same else None)
            root = args.root or same and os.path.isdir(run["root"]) and run["root"]  # nothing is drawn where a checkpoint says
            videos = data.find_videos(source, root, args.split, whole=("val",))
            if videos.classes != run["classes"]:
                raise data.DataError(f"the classes of {source} ({len(videos.classes)}) are not the {len(run['classes'])} that"
                                     " the checkpoint knows")
            if rank == 0 and same and run.get("val_fingerprint") not in (None, fingerprint(videos.val)):
                print(f"note: these {len(videos.val)} validation videos are not the {run['val_videos']} of the training, which may"
                      " have seen some of them")
            samples, missing = videos.val[:args.limit], sum(split == "val" for split, _ in videos.missing)
        if args.predictions:
            open(args.predictions, "a").close()  # better now than after the evaluation
        if args.picture and rank == 0:
            grid.draw(args.picture, "no picture: the video cannot be read, or the work was cut off", (1, lambda stripe: None))
        return dtype, adapters.prepare(model.to(device), dtype, args.compile), run, samples, missing

    dtype, model, run, samples, missing = in_turn(set_up)
    views, names = args.views or tuple(run["views"]), run["classes"]
    clips = data.Views(samples, model.num_frames, model.visual.image_size[0], run["sampling"], run["test_stride"], views)
    rows = predict(model, clips, device, dtype, 1 if args.video else args.batch, 0 if args.video else args.workers)
    if rank > 0:
        return 0
    if args.video:
        for index, _, classes, scores, error in rows:
            print(clips.samples[index][0] if error is None else error)
            for c, score in zip(classes, scores):
                print(f"  {100 * score:5.1f} %  {names[c]}")
        if args.picture and rows[0][-1] is None:
            draw_clip(args.picture, model, clips, rows[0], names)
        return int(any(error for *_, error in rows))
    result = dict(summarise(rows), checkpoint=args.checkpoint, data=args.data or run["data"], views="%dx%d" % views,
                  split=args.split, limit=args.limit, missing=missing, fingerprint=fingerprint(samples),
                  unreadable=[clips.samples[row[0]][0] for row in rows if row[-1]])
    print(f"top-1 {100 * result['top1']:.2f} %   top-5 {100 * result['top5']:.2f} %   ({result['videos']} videos,"
          f" {views[0]} clips x {views[1]} crops)" + (f"; {missing} listed videos are not there" if missing else ""))
    if result["failed"]:
        print(f"{result['failed']} videos could not be read and count as wrong; over the readable ones top-1"
              f" {100 * result['top1_readable']:.2f} %, top-5 {100 * result['top5_readable']:.2f} %")
        print(*[f"  {error}" for *_, error in rows if error][:10], sep="\n")
    if args.predictions:
        with open(args.predictions, "w", newline="", errors="surrogateescape") as out:
            header = ["video", "label"] + [f"{k}{i + 1}" for i in range(min(5, len(names))) for k in ("class", "score")]
            csv.writer(out).writerows([header] + [
                [clips.samples[i][0], names[label]] + [cell for c, s in zip(classes, scores) for cell in (names[c], f"{s:.6f}")]
                for i, label, classes, scores, _ in rows])
    file = os.path.splitext(args.checkpoint)[0] + f".{result['data']}" + f"-split{args.split}" * bool(args.split) + ".json"
    try:
        with open(file, "w") as out:
            json.dump(result, out, indent=1)
        print(f"wrote {file}")
    except OSError as error:  # a checkpoint that others own
        print(f"note: the result is not written: {error}")
    if args.picture:
        title = f"top-1 {100 * result['top1']:.2f} % on {result['data']}: {args.checkpoint}"
        grid.draw_classes(args.picture, title, [row[1] for row in rows], [(row[2] or [None])[0] for row in rows], names)
    return 0

if __name__ == "__main__":
    raise SystemExit(main())
