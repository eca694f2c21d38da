"""Train a video model. With no arguments: the demo, on drawn videos, on any machine.

    python train.py                                                        # the demo
    python train.py --data folder --root DIR                               # your videos, one GPU
    torchrun --nproc_per_node=8 train.py --data k400                       # eight GPUs; data/k400 holds the videos
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
             train.py --data k400                                          # two nodes, the same line on both

Every option has its default from the recipe of the data set, below. Writes log.jsonl, last.pt, best.pt
and, if videos could not be read, failed.txt to --out.
"""
import argparse
import contextlib
import json
import math
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else idle compute threads keep cores from those that decode
import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import adapters
import data
import model as models
from evaluate import (Views, at_least, autocast_type, fingerprint, gather, in_turn, number, parse_views, predict,
                      start_processes, summarise)

# What a data set needs beyond the defaults of the options. Names are those of the options. "Command" is a line in the authors'
# release, "code" its defaults; batches are rounded to divide by 8 processes. Where the sampling is uniform it is the peers': the
# authors' reader is dense everywhere (--sampling dense --stride 1 2 4 8).
RECIPES = {
    # Frames: T for which the paper's costs come out. Erasing, views: code. No command for Kinetics is published: lr (3e-4 at 64
    # clips), epochs and batch are AIM's; the stride is AIM's and ST-Adapter's, 16 at 8 frames, so 4 at 32.
    "k400": dict(frames=32, sampling="dense", stride=(4,), test_stride=4, batch=64, lr=1.2e-3, epochs=30, erasing=0.0,
                 views=(3, 1)),
    # lr, epochs, batch (2 x 43): command; lr 3.5e-4 in another. Frames and A_t0: the paper's costs and 13 M weights come out with
    # them. Erasing, views, no flip (labels name left and right): code. Uniform: AIM, ST-Adapter.
    "ssv2": dict(frames=48, sampling="uniform", batch=88, lr=5e-4, epochs=60, erasing=0.1, flip=False, views=(1, 3),
                 pre_attention_adapter=True),
    # lr, epochs, batch (3 x 32): command. Frames, erasing, views, strides drawn from four, test stride: code.
    "hmdb51": dict(frames=16, sampling="dense", stride=(1, 2, 4, 8), test_stride=4, batch=96, lr=3e-2, epochs=50, erasing=0.5,
                   views=(3, 1), split=1),
    # lr, epochs, batch (3 x 43): command. Frames, erasing, views: code. Uniform: AIM.
    "diving48": dict(frames=16, sampling="uniform", batch=128, lr=7e-4, epochs=50, erasing=0.1, views=(3, 1)),
    # Own videos: the options' own defaults. Base lr and epochs are within what AIM and ST-Adapter used on Kinetics (1e-3 per
    # 256 clips, or 3e-4 at 64; 12 to 30 epochs); one frame from each segment (uniform) suits videos of any length.
    "folder": dict(),
    "list": dict(),
    # Eight drawn classes, 4 motions x 2 textures; needs no network and no GPU. position_scale: in a trial of 6
    # epochs the temporal path alone told the motion in 60 % of the videos at 0.15, in 99 % at 0.5, in 98 % at 1.
    "demo": dict(backbone="tiny", frames=16, spatial_frames=4, bottleneck=32, position_scale=0.5, batch=32, lr=0.04,
                 epochs=7, warmup=1, sampling="dense", stride=(1,), test_stride=1, augment="translate", views=(1, 1)),
    # Drawn stills, on which the tiny backbone of the demo was trained: --method full --pretrained none.
    "stills": dict(backbone="tiny", method="full", frames=1, spatial_frames=1, batch=64, lr=4e-3, epochs=5, warmup=1,
                   sampling="dense", stride=(1,), test_stride=1, augment="translate", views=(1, 1)),
}

def parse(argv):
    parser = argparse.ArgumentParser(description="Train a video model; defaults come from the data set's recipe.")
    add = parser.add_argument
    add("--data", choices=data.SOURCES, default="demo", help="data set")
    add("--root", help="folder of the data (default data/NAME)")
    add("--split", type=int, choices=(1, 2, 3), help="HMDB51's (default 1)")
    add("--out", help="folder of the run (default runs/DATA[-SPLIT]-METHOD[-PATHS]-sSEED)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the run in --out")
    either.add_argument("--overwrite", action="store_true", help="delete the run in --out first")
    add("--init", metavar="CKPT", help="start from this run's weights, with a new head")
    add("--limit", type=at_least(1), metavar="N", help="only the first N videos of each list, for a smoke run")
    add("--seed", type=at_least(0), default=0)
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--method", choices=models.METHODS, default="dualpath")
    add("--paths", choices=("both", "spatial", "temporal"), default="both", help="DualPath's paths, for the ablation")
    add("--backbone", default="ViT-B-16-quickgelu", help="open_clip model, local-dir:DIR, or tiny")
    add("--pretrained", default="openai", help="open_clip tag, a file, or none for random weights")
    add("--frames", type=at_least(1), default=32, help="frames per clip, T")
    add("--spatial-frames", type=at_least(1), default=8, help="of these, for the spatial path and other methods, T_s")
    add("--size", type=at_least(1), help="pixels per side (default the image model's own)")
    add("--bottleneck", type=at_least(1), help="width of the adapters; of vpt, number of prompts (default the method's own)")
    add("--before", choices=("mha", "mlp", "both"), default="mha", help="where st_adapter has its adapters")
    add("--dropout", type=number(0, 1), default=0.1, help="in the adapters")
    add("--position-scale", type=float, default=1.0, help="amplitude of DualPath's temporal position code")
    add("--pre-attention-adapter", action=argparse.BooleanOptionalAction, default=False, help="DualPath's A_t0")
    add("--serial-skip", action=argparse.BooleanOptionalAction, default=False, help="DualPath with z + h + A(h), not z + A(h)")
    group = parser.add_argument_group("clips")
    add = group.add_argument
    add("--sampling", choices=("dense", "uniform"), default="uniform", help="frames at a stride, or one per segment")
    add("--stride", type=at_least(1), nargs="+", metavar="N", default=(4,),
        help="between frames, if dense; of several, one by chance")
    add("--test-stride", type=at_least(1), default=4, help="the same in testing")
    add("--augment", choices=("rand", "crop", "translate"), default="rand",
        help="random resized crop with RandAugment or without, or whole-pixel shifts alone")
    add("--crop-area", type=number(0, 1), default=0.08, help="least share of a frame that a random crop keeps (not with translate)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the clips (not with translate)")
    add("--erasing", type=number(0, 1), default=0.0, help="probability of random erasing (not with translate)")
    add("--views", type=parse_views, metavar="CLIPSxCROPS", default=(3, 1), help="test views that evaluate.py averages")
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--epochs", type=at_least(1), default=30)
    add("--warmup", type=number(0), default=3, help="epochs of rising learning rate")
    add("--batch", type=at_least(1), default=64, help="clips per step, over all processes")
    add("--micro-batch", type=at_least(1), help="clips per forward and process; the gradients add up (default all)")
    add("--lr", type=number(0), default=1e-3, help="base learning rate, per 256 clips")
    add("--weight-decay", type=number(0), default=0.05)
    add("--clip-grad", type=number(0), help="largest norm of the gradient (default no limit)")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--checkpoint-activations", action="store_true", help="less memory, more time: each block runs forward twice")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    add("--workers", type=at_least(0), default=min(8, os.cpu_count()), help="decoding processes, per training process")
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**RECIPES[known.data])
    args = parser.parse_args(argv)
    args.pretrained = None if args.pretrained == "none" else args.pretrained
    args.root = args.root or os.path.join("data", args.data)
    args.stride = tuple(args.stride)
    paths, split = "" if args.paths == "both" else f"-{args.paths}", f"-split{args.split}" if args.split else ""
    args.out = args.out or os.path.join("runs", f"{args.data}{split}-{args.method}{paths}-s{args.seed}")
    return args

def main(argv=None):
    args = parse(argv)
    rank, world, device = start_processes()
    say = print if rank == 0 else lambda *_: None  # rank 0 alone prints and writes

    # ---- data, model, optimiser
    def set_up():
        dtype = autocast_type(args.amp, device)
        resumed = find_run(args)
        videos = data.find_videos(args.data, args.root, args.split)  # draws the demo at first use
        if args.batch % world:
            raise data.DataError(f"--batch {args.batch} does not divide by {world} processes")
        if args.batch > len(videos.train[:args.limit]):
            raise data.DataError(f"--batch {args.batch} is larger than the data set:"
                                 f" {len(videos.train[:args.limit])} training videos")
        torch.manual_seed(args.seed)
        model = models.build_model(  # downloads the weights at first use
            args.method, len(videos.classes), args.backbone, args.pretrained, args.frames, args.spatial_frames, args.size,
            bottleneck=args.bottleneck, dropout=args.dropout, pre_attention_adapter=args.pre_attention_adapter,
            serial_skip=args.serial_skip, paths=args.paths, position_scale=args.position_scale, before=args.before)
        if args.init:
            models.load_weights(model, models.read_checkpoint(args.init), args.init, head=False)
        if resumed:
            if resumed["run"]["classes"] != videos.classes:
                raise data.DataError(f"{args.root} has other classes than the run in {args.out} that it should continue")
            models.load_weights(model, resumed, args.out)
        return dtype, videos, model.to(device).prepare(dtype, args.compile, args.checkpoint_activations), resumed

    dtype, videos, model, resumed = in_turn(set_up)
    training, validation = videos.train[:args.limit], videos.val[:args.limit]
    run = dict(vars(args), classes=videos.classes, val_videos=len(videos.val), val_fingerprint=fingerprint(videos.val))
    first_epoch = resumed["training"]["epoch"] if resumed else 0
    if world > 1 and len(set(gather([first_epoch]))) > 1:
        raise SystemExit(f"train.py: not all machines find the same last.pt in {args.out}: its disk must be one they share")

    size = model.visual.image_size[0]
    clips = data.Clips(training, args.frames, size, args.sampling, args.stride, args.augment, args.seed, flip=args.flip,
                       erasing=args.erasing, crop_area=args.crop_area)
    order = BatchOrder(len(clips), args.batch, args.seed, rank, world)
    loader = DataLoader(clips, batch_sampler=order, num_workers=args.workers, persistent_workers=args.workers > 0,
                        pin_memory=device.type == "cuda", collate_fn=collate)
    test_clips = Views(validation, args.frames, size, args.sampling, args.test_stride)

    micro = min(args.micro_batch or args.batch, args.batch // world)
    lr = args.lr * args.batch / 256
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=lr, fused=True)
    warmup, total = args.warmup * len(order), args.epochs * len(order)
    rise_and_fall = lambda step: (min(1, (step + 1) / warmup) if step < warmup else
                                  0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rise_and_fall)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    step, best = first_epoch * len(order), -1.0
    if resumed:
        optimizer.load_state_dict(resumed["training"]["optimizer"])
        scheduler.load_state_dict(resumed["training"]["scheduler"])
        scaler.load_state_dict(resumed["training"]["scaler"])
        best = resumed["training"]["best"]
    trained = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    if world > 1:
        trained.broadcast_buffers = False  # DDP would send these constants at every step (its argument's name depends on torch)

    tuned, everything = adapters.count_parameters(model)
    say(f"data      {args.data}: {len(training)} training and {len(validation)} validation videos,"
        f" {len(videos.classes)} classes" + (f"; {len(videos.missing)} listed ones are not there" if videos.missing else ""))
    say(f"model     {args.method} around {args.backbone}: {tuned / 1e6:.2f} M of {everything / 1e6:.2f} M weights are trained"
        + f"; a step exchanges {4e-6 * tuned:.1f} MB of gradients" * (world > 1))
    say(f"clips     {args.frames} frames of {size} px, {args.sampling}; the cost of {model.images} images")
    say(f"training  {args.epochs} epochs of {len(order)} steps of {args.batch} clips, on {world} x {device.type},"
        f" {str(dtype or torch.float32).removeprefix('torch.')}; learning rate {args.lr:g} x {args.batch}/256 = {lr:g}")
    say(f"writes    {args.out}" + (f", resumed after epoch {first_epoch}" if resumed else ""))

    in_turn(lambda: start_log(args, resumed) if rank == 0 else None)  # from here on the folder is this run's

    # ---- the loop
    most = 0.05 * len(clips)  # so many unreadable videos an epoch may have
    for epoch in range(first_epoch, args.epochs):
        start = time.perf_counter()
        order.epoch = epoch
        trained.train()
        loss_sum = torch.zeros((), device=device)  # stays on the device: reading it at every step would wait for the GPU
        bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", unit_scale=args.batch, unit="clip", leave=False,
                   disable=rank > 0)
        failures = set()
        for batch, labels, failed in bar:
            failures.update(failed)
            if batch is None or len(failures) > min(most, 1.2 * most / world + 20):  # a process's share, with room for chance
                raise log_failures(args, failures)
            torch.manual_seed(hash((args.seed, step, rank)))  # dropout depends on the step, not on what came before
            parts = list(zip(batch.split(micro), labels.split(micro)))
            for i, (video, label) in enumerate(parts):
                video, label = video.to(device, non_blocking=True), label.to(device, non_blocking=True)
                last = world == 1 or i == len(parts) - 1
                with contextlib.nullcontext() if last else trained.no_sync():  # processes exchange gradients once per step
                    with torch.autocast(device.type, dtype, enabled=dtype is not None):
                        loss = F.cross_entropy(trained(video).float(), label, reduction="sum") / len(batch)
                    scaler.scale(loss).backward()
                loss_sum += loss.detach()
            if args.clip_grad:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss_sum.item() / (step - epoch * len(order)):.3f}", lr=f"{lr:.2e}")
        seconds = time.perf_counter() - start
        if world > 1:
            dist.all_reduce(loss_sum)
            failures = set(gather(list(failures)))
        if len(failures) > most or not math.isfinite(loss_sum.item()):  # in all processes alike
            del trained  # for the reason given at the end
            if world > 1:
                dist.destroy_process_group()
            if rank == 0 and len(failures) > most:
                raise log_failures(args, failures)
            raise SystemExit(f"train.py: the loss of epoch {epoch + 1} is not finite, so it is not saved; try a lower --lr, or"
                             " --clip-grad 1" if rank == 0 else 1)
        rows = predict(model, test_clips, device, dtype, micro, args.workers, "validating")
        result = summarise(rows)

        if rank == 0:
            line = dict(epoch=epoch + 1, lr=lr, train_loss=loss_sum.item() / len(order) / world,
                        val_top1=result["top1"], val_top5=result["top5"],
                        clips_per_second=round(len(order) * args.batch / seconds, 2),
                        seconds=round(time.perf_counter() - start, 2), failed=len(failures), val_failed=result["failed"])
            log_failures(args, failures | {error for *_, error in rows if error})
            with open(os.path.join(args.out, "log.jsonl"), "a") as log:
                log.write(json.dumps(line) + "\n")
            say(f"epoch {epoch + 1:3d}   loss {line['train_loss']:.3f}   top-1 {100 * result['top1']:.2f} %"
                f"   top-5 {100 * result['top5']:.2f} %   {line['clips_per_second']:.1f} clips/s   {line['seconds']:.0f} s"
                + f"   {len(failures)} + {result['failed']} unreadable, see failed.txt" * bool(failures or result["failed"]))
            if result["top1"] > best:
                best = result["top1"]
                models.save_checkpoint(os.path.join(args.out, "best.pt"), model, run)
            models.save_checkpoint(os.path.join(args.out, "last.pt"), model, run, dict(
                optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), scaler=scaler.state_dict(),
                epoch=epoch + 1, best=best))
    say(f"best top-1 {100 * best:.2f} %; evaluate it with: python evaluate.py {os.path.join(args.out, 'best.pt')}")
    del trained  # outliving the group, the wrapper can wait forever for a thread of gloo that waits for Python's lock
    if world > 1:
        dist.destroy_process_group()

class BatchOrder(Sampler):
    """The training batches of this process: lists of (epoch, index). The order depends on (seed, epoch)
    alone and is cut into global batches first, so any number of processes trains on the same ones."""

    def __init__(self, size, global_batch, seed=0, rank=0, world=1):
        self.size, self.global_batch, self.seed, self.rank, self.world = size, global_batch, seed, rank, world
        self.epoch = 0

    def __len__(self):
        return self.size // self.global_batch

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for step in range(len(self)):
            batch = order[step * self.global_batch:(step + 1) * self.global_batch]
            yield [(self.epoch, int(i)) for i in np.array_split(batch, self.world)[self.rank]]

def collate(items):
    """Training items → clips (B, T, 3, S, S) uint8 (None after ten unreadable videos in a row), labels (B,), messages."""
    clips, labels, failures = zip(*items)
    clips = None if any(clip is None for clip in clips) else torch.stack(clips)
    return clips, torch.tensor(labels), sum(failures, [])

def find_run(args):
    """The checkpoint of --out to continue from, or None. Raises DataError where a run is in the way: two in one folder
    would spoil each other, so that the user says what is to become of the first."""
    last, best, log = (os.path.join(args.out, name) for name in ("last.pt", "best.pt", "log.jsonl"))
    if args.resume and os.path.exists(last):
        content = models.read_checkpoint(last)
        free = ("out", "root", "init", "resume", "overwrite", "workers", "micro_batch", "compile", "checkpoint_activations")
        was = vars(parse(["--data", args.data])) | content["run"]  # an option that is younger than the run had its default
        differ = [f"--{k.replace('_', '-')} {v} (was {was.get(k)})" for k, v in vars(args).items()
                  if k not in free and was.get(k) != v]
        if differ:
            raise data.DataError(f"{last} is of a run with other options: {', '.join(differ)}")
        if content["training"] is None:
            raise data.DataError(f"{last} holds weights only, like best.pt, and cannot be resumed: --init starts from them")
        return content
    if any(os.path.exists(path) for path in (last, best)) or (os.path.exists(log) and os.path.getsize(log)):
        if not args.overwrite:
            raise data.DataError(f"{args.out} holds a run already: --resume continues it from its last.pt, --overwrite deletes"
                                 " it, --out DIR goes elsewhere")
    elif args.resume and os.environ.get("RANK", "0") == "0":
        print(f"note: there is no {last} to resume from, so the run starts afresh")
    return None

def start_log(args, resumed):
    """Make the folder of the run; keep the log lines of the epochs that `resumed` has seen, and delete other leftovers."""
    os.makedirs(args.out, exist_ok=True)
    log = os.path.join(args.out, "log.jsonl")
    lines = open(log).readlines() if resumed and os.path.exists(log) else []
    with open(log, "w") as file:  # a run that died between its log line and its checkpoint is a line ahead
        file.writelines(lines[:resumed["training"]["epoch"]] if resumed else [])
    if not resumed:
        for name in os.listdir(args.out):
            if name in ("last.pt", "best.pt", "failed.txt") or name.startswith(("last.", "best.")) and name.endswith(".json"):
                os.remove(os.path.join(args.out, name))

def log_failures(args, failures):
    """Add the messages that failed.txt does not have yet; returns what to raise if they are too many."""
    path = os.path.join(args.out, "failed.txt")
    known = open(path, errors="surrogateescape").read().split("\n") if os.path.exists(path) else []
    lines = {" ".join(failure.splitlines()) for failure in failures}
    if lines.difference(known):
        with open(path, "a", errors="surrogateescape") as file:  # a path may hold any bytes
            file.writelines(f"{line}\n" for line in sorted(lines.difference(known)))
    return SystemExit(f"train.py: {len(lines)} training videos could not be read, and 5 % of all are the most that a run bears;"
                      f" {path} lists them: {min(lines, default='')}")

def parameter_groups(model, weight_decay):
    """Weight decay for matrices; none for biases, norms, tokens and position embeddings."""
    tuned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrix = lambda name, p: p.ndim > 1 and not name.endswith("embedding")
    return [dict(params=[p for n, p in tuned if matrix(n, p)], weight_decay=weight_decay),
            dict(params=[p for n, p in tuned if not matrix(n, p)], weight_decay=0.0)]

if __name__ == "__main__":
    main()
