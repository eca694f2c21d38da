"""Train a video model. With no arguments: the demo, on drawn videos, on any machine.

    python train.py                                                        # the demo
    python train.py --data folder --root DIR                               # your videos, one GPU
    torchrun --nproc_per_node=8 train.py --data k400                       # eight GPUs; data/k400 holds the videos
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
             train.py --data k400                                          # two nodes, the same line on both

Every option has its default from the recipe of the data set, below. A run that was cut off, anywhere, goes on with --resume.
"""
import argparse
import contextlib
import inspect
import json
import math
import os
import re
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else idle compute threads keep cores from those that decode
import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import adapters
import data
import grid
import model as models
from evaluate import (agree, at_least, autocast_type, fingerprint, gather, help_lines, in_turn, leave_signals_to_the_parent,
                      number, on_signals, parse_views, predict, processes, summarise)

# What a data set needs beyond the defaults of the options. Names are those of the options. "Command" is a line in the authors'
# release, "code" its defaults; batches are rounded to divide by 8 processes. Where the sampling is uniform it is the peers': the
# authors' reader is dense everywhere (--sampling dense --stride 1 2 4 8).
RECIPES = {
    # Frames: T for which the paper's costs come out. Erasing, views: code. No command for Kinetics is published: lr (3e-4 at 64
    # clips), epochs and batch are AIM's; the stride is AIM's and ST-Adapter's, 16 at 8 frames, so 4 at 32.
    "k400": dict(frames=32, sampling="dense", stride=(4,), test_stride=4, batch=64, lr=1.2e-3, epochs=30, erasing=0, views=(3, 1)),
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
    **dict.fromkeys(("folder", "list"), {}),
    # Eight drawn classes, 4 motions x 2 textures; needs no network and no GPU. position_scale: in a trial of 6
    # epochs the temporal path alone told the motion in 60 % of the videos at 0.15, in 99 % at 0.5, in 98 % at 1.
    "demo": dict(backbone="tiny", frames=16, spatial_frames=4, bottleneck=32, position_scale=0.5, batch=32, lr=0.04,
                 epochs=7, warmup=1, sampling="dense", stride=(1,), test_stride=1, augment="translate", views=(1, 1)),
}

def parse(argv):
    parser = argparse.ArgumentParser(formatter_class=help_lines, usage="python train.py [--data NAME] [options]    "
                                     "(in brackets are the defaults; with --data NAME --help, that recipe's)")
    add = parser.add_argument
    add("--data", choices=data.SOURCES, default="demo", metavar="NAME", help=f"{', '.join(data.SOURCES)} (%(default)s)")
    add("--root", help="folder of the data (data/NAME)")
    add("--split", type=int, choices=(1, 2, 3), help="HMDB51's (1)")
    add("--out", help="folder of the run (runs/NAME[-SPLIT]-METHOD[-PATHS]-sSEED)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", nargs="?", const=True, metavar="CKPT", help="continue the run in --out, or that of CKPT")
    either.add_argument("--overwrite", action="store_true", help="delete the run in --out first")
    add("--init", metavar="CKPT", help="start from this run's weights, with a new head")
    add("--limit", type=at_least(1), metavar="N", help="only the first N videos of each list, for a smoke run (all)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of order, augmentation, dropout and new weights (%(default)s)")
    add = parser.add_argument_group("model").add_argument
    add("--method", choices=models.METHODS, default="dualpath", metavar="NAME", help=f"{', '.join(models.METHODS)} (%(default)s)")
    add("--paths", choices=("both", "spatial", "temporal"), default="both", help="DualPath's, for the ablation (%(default)s)")
    add("--backbone", default="ViT-B-16-quickgelu", metavar="NAME", help="open_clip model, local-dir:DIR, or tiny (%(default)s)")
    add("--pretrained", default="openai", metavar="TAG", help="open_clip tag, a file, or none for random weights (%(default)s)")
    add("--frames", type=at_least(1), default=32, metavar="N", help="frames per clip, T (%(default)s)")
    add("--spatial-frames", type=at_least(1), default=8, metavar="N", help="of these, those seen at full size, T_s (%(default)s)")
    add("--size", type=at_least(1), metavar="PIXELS", help="of a side of a frame (the image model's own)")
    add("--bottleneck", type=at_least(1), metavar="N", help="width of the adapters; of vpt, number of prompts (the method's own)")
    add("--before", choices=("mha", "mlp", "both"), default="mha", help="where st_adapter has its adapters (%(default)s)")
    add("--dropout", type=number(0, 1), default=0.1, metavar="P", help="in the adapters (%(default)s)")
    add("--position-scale", type=float, default=1.0, metavar="X", help="of DualPath's temporal position code (%(default)s)")
    add("--pre-attention-adapter", action=argparse.BooleanOptionalAction, default=False, help="DualPath's A_t0 (%(default)s)")
    add("--serial-skip", action=argparse.BooleanOptionalAction, default=False, help="DualPath: z + h + A(h) (%(default)s)")
    add = parser.add_argument_group("clips").add_argument
    add("--sampling", choices=("dense", "uniform"), default="uniform", help="frames at a stride, or one per segment (%(default)s)")
    add("--stride", type=at_least(1), nargs="+", metavar="N", default=(4,), help="if dense; of more, one by chance (%(default)s)")
    add("--test-stride", type=at_least(1), default=4, metavar="N", help="the same in testing (%(default)s)")
    add("--augment", choices=("rand", "crop", "translate"), default="rand", help="rand: crop, too; or shifts alone (%(default)s)")
    add("--crop-area", type=number(0, 1), default=0.08, metavar="X", help="least share of a frame that a crop keeps (%(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the clips (%(default)s)")
    add("--erasing", type=number(0, 1), default=0.0, metavar="P", help="probability of random erasing (%(default)s)")
    add("--views", type=parse_views, metavar="CLIPSxCROPS", default=(3, 1), help="test views of evaluate.py (%(default)s)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=at_least(1), default=30, metavar="N", help="(%(default)s)")
    add("--warmup", type=number(0), default=3, metavar="X", help="epochs of rising learning rate (%(default)s)")
    add("--batch", type=at_least(1), default=64, metavar="N", help="clips per step, over all processes (%(default)s)")
    add("--micro-batch", type=at_least(1), metavar="N", help="clips per forward and process; the gradients add up (all)")
    add("--lr", type=number(0), default=1e-3, metavar="X", help="base learning rate, per 256 clips (%(default)s)")
    add("--weight-decay", type=number(0), default=0.05, metavar="X", help="of matrices alone (%(default)s)")
    add("--clip-grad", type=number(0), metavar="X", help="largest norm of the gradient (no limit)")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--checkpoint-activations", action="store_true", help="less memory, more time: each block runs forward twice")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision (%(default)s)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="mps is untested (%(default)s)")
    add("--save-every", type=number(0), default=10, metavar="MINUTES", help="between checkpoints within an epoch (%(default)s)")
    add("--workers", type=at_least(0), default=min(8, os.cpu_count()), metavar="N", help="that read videos (%(default)s)")
    asked = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    parser.set_defaults(**RECIPES[parser.parse_known_args(asked)[0].data])
    args = parser.parse_args(argv)
    args.pretrained = None if args.pretrained == "none" else args.pretrained
    args.root, args.stride = args.root or os.path.join("data", args.data), tuple(args.stride)
    paths, split = "" if args.paths == "both" else f"-{args.paths}", f"-split{args.split}" if args.split else ""
    args.out = args.out or os.path.join("runs", f"{args.data}{split}-{args.method}{paths}-s{args.seed}")
    return args

def main(argv=None):
    args = parse(argv)
    with processes("train.py", args.device) as (rank, world, device):
        train(args, rank, world, device)

def train(args, rank, world, device):
    say = print if rank == 0 else lambda *_: None  # rank 0 alone prints and writes

    # ---- data, model, optimiser
    def set_up():
        dtype = autocast_type(args.amp, device)
        resumed = find_run(args)
        videos = data.find_videos(args.data, args.root, args.split)  # draws the demo at first use
        if args.batch > (most := len(videos.train[:args.limit])) or args.batch % world:
            raise data.DataError(f"--batch {args.batch} must divide by {world} processes, and there are {most} training clips")
        torch.manual_seed(args.seed)
        same = {k: v for k, v in vars(args).items() if k in inspect.signature(models.build_model).parameters}
        model = models.build_model(num_classes=len(videos.classes), num_frames=args.frames, image_size=args.size, **same)
        if args.init and not resumed:
            models.load_weights(model, models.read_checkpoint(args.init), args.init, head=False)
        if resumed:
            if resumed["run"]["classes"] != videos.classes:
                raise data.DataError(f"{args.root} has other classes than the run in {args.out} that it should continue")
            models.load_weights(model, resumed, args.out)
        return dtype, videos, adapters.prepare(model.to(device), dtype, args.compile, args.checkpoint_activations), resumed

    dtype, videos, model, resumed = in_turn(set_up)
    training, validation = videos.train[:args.limit], videos.val[:args.limit]
    run = dict(vars(args), classes=videos.classes, val_videos=len(videos.val), val_fingerprint=fingerprint(videos.val))
    # Where the run is: whole epochs; of the next one the steps, the sum of their losses, what was unreadable; the log's lines.
    state = dict(epoch=0, batch=0, loss=0.0, failed=[], best=-1.0, log=[])
    state.update({name: resumed["training"][name] for name in state} if resumed else {})
    if len(set(gather([(state["epoch"], state["batch"])]))) > 1:
        raise SystemExit(f"train.py: not all machines find the same last.pt in {args.out}: its disk must be one they share")

    size = model.visual.image_size[0]
    clips = data.Clips(training, args.frames, size, args.sampling, args.stride, args.augment, args.seed, flip=args.flip,
                       erasing=args.erasing, crop_area=args.crop_area)
    steps = len(clips) // args.batch  # of an epoch
    micro, lr = min(args.micro_batch or args.batch, args.batch // world), args.lr * args.batch / 256
    optimizer = torch.optim.AdamW(adapters.parameter_groups(model, args.weight_decay), lr=lr, fused=True)
    warmup, total = args.warmup * steps, args.epochs * steps
    rise_and_fall = lambda step: (min(1, (step + 1) / warmup) if step < warmup else
                                  0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rise_and_fall)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    if resumed:
        for name, part in [("optimizer", optimizer), ("scheduler", scheduler)] + [("scaler", scaler)] * (dtype is torch.float16):
            part.load_state_dict(resumed["training"][name] or part.state_dict())
        if any(v.shape not in ((), p.shape) for p, kept in optimizer.state.items() for v in kept.values()):
            raise SystemExit("train.py: the optimiser's state in the checkpoint does not fit the model")
    trained = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    if world > 1:
        trained.broadcast_buffers = False  # DDP would send these constants at every step (its argument's name depends on torch)

    tuned, everything = adapters.count_parameters(model)
    say(f"data      {args.data}: {len(training)} training and {len(validation)} validation videos,"
        f" {len(videos.classes)} classes" + (f"; {len(videos.missing)} listed ones are not there" if videos.missing else ""))
    say(f"model     {args.method} around {args.backbone}: {tuned / 1e6:.2f} M of {everything / 1e6:.2f} M weights are trained"
        + f"; a step exchanges {4e-6 * tuned:.1f} MB of gradients" * (world > 1))
    say(f"clips     {args.frames} frames of {size} px, {args.sampling}; the cost of {model.images} images")
    say(f"training  {args.epochs} epochs of {steps} steps of {args.batch} clips, on {world} x {device.type},"
        f" {str(dtype or torch.float32).removeprefix('torch.')}; learning rate {args.lr:g} x {args.batch}/256 = {lr:g}")
    say(f"writes    {args.out}" + (f", resumed after epoch {state['epoch']} and {state['batch']} steps" if resumed else ""))

    in_turn(lambda: start_folder(args, resumed, state) if rank == 0 else None)  # from here on the folder is this run's

    # ---- the loop. All that is drawn depends on (seed, epoch, index) or on (seed, step), never on what came before; all else that
    # a run needs is saved. So a run that is cut off, anywhere, and resumed, ends as one that was not.
    losses, failures, saved = [], [], time.monotonic()  # losses and messages of this process since they were last added up

    def add_up():
        """Add what has gathered to `state` (which waits for the device), and end the run if losses or videos are too bad."""
        values, new = torch.stack(losses).tolist() if losses else [], gather(failures)
        for i, loss in enumerate(agree(*values)):
            if not math.isfinite(loss):
                at = state["batch"] - len(values) + i
                mine = [] if math.isfinite(values[i]) else [training[j][0] for _, j in order[at]]
                end(f"the loss of step {at + 1} of epoch {state['epoch'] + 1} is not finite, so nothing is saved any more; try a"
                    " lower --lr, or --clip-grad 1; the step's clips: " + ", ".join(gather(mine)))
            state["loss"] += loss / world
        state["failed"] = sorted({*state["failed"], *new})
        log_failures(args, new if rank == 0 else [])
        losses.clear(), failures.clear()
        if len(state["failed"]) > 0.05 * len(clips):
            end(f"{len(state['failed'])} training videos could not be read in epoch {state['epoch'] + 1}, and 5 % of all are the"
                f" most that a run bears; {args.out}/failed.txt lists them")

    def save():
        add_up()
        if not torch.nn.utils.get_total_norm([p.detach() for p in model.parameters() if p.requires_grad]).isfinite():
            end("weights are not finite any more, so they are not saved; try a lower --lr, or --clip-grad 1")
        if rank == 0:
            models.save_checkpoint(os.path.join(args.out, "last.pt"), model, run, dict(
                state, optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), scaler=scaler.state_dict()))
            with open(os.path.join(args.out, "log.jsonl.tmp"), "w") as log:  # no line twice, and none that last.pt does not know
                log.writelines(json.dumps(line) + "\n" for line in state["log"])
            os.replace(log.name, os.path.join(args.out, "log.jsonl"))

    def end(why):  # called in all processes alike
        raise SystemExit(f"train.py: {why}" if rank == 0 else 1)

    save()  # if this cannot be written, better to know it now
    for epoch in range(state["epoch"], args.epochs):
        start, first, signals, unusable = time.perf_counter(), state["batch"], [], 0
        order = batches(len(clips), epoch, args.batch, args.seed, rank, world)
        loader = DataLoader(clips, batch_sampler=order[first:], num_workers=args.workers, pin_memory=device.type == "cuda",
                            collate_fn=data.collate, worker_init_fn=leave_signals_to_the_parent)
        trained.train()
        bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", steps, disable=rank > 0, initial=first, unit="clip",
                   unit_scale=args.batch, **data.BAR)
        # A signal waits for the end of a step, upon which all processes agree; of Ctrl-C a second one does not.
        with on_signals(lambda status: sys.exit(status) if world == 1 and 130 in signals else signals.append(status)):
            for batch, labels, failed in bar:
                due = rank == 0 and time.monotonic() > saved + 60 * args.save_every
                signalled, due, unusable = agree(len(signals), due, batch is None)
                if signalled:
                    break
                if due:
                    save()
                    saved = time.monotonic()
                failures += failed
                if unusable:
                    break
                torch.manual_seed(hash((args.seed, epoch * steps + state["batch"], rank)))  # for dropout
                parts = list(zip(batch.split(micro), labels.split(micro)))
                losses.append(torch.zeros((), device=device))
                for i, (video, label) in enumerate(parts):
                    video, label = video.to(device, non_blocking=True), label.to(device, non_blocking=True)
                    last = world == 1 or i == len(parts) - 1
                    with contextlib.nullcontext() if last else trained.no_sync():  # processes exchange gradients once per step
                        with torch.autocast(device.type, dtype, enabled=dtype is not None):
                            loss = F.cross_entropy(trained(video).float(), label, reduction="sum") / len(batch)
                        scaler.scale(loss).backward()
                    losses[-1] += loss.detach()
                if args.clip_grad:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()
                state["batch"] += 1
                if len(losses) == 20:
                    add_up()
                    bar.set_postfix_str(f"loss {state['loss'] / state['batch']:.3f}, lr {scheduler.get_last_lr()[0]:.2e}", False)
            save()  # also of a whole epoch, which may be cut off while it is validated
        if unusable:
            end(f"ten training videos, one after the other, could not be read; {args.out}/failed.txt lists them")
        if any(agree(len(signals))):
            raise SystemExit(max(signals, default=143))
        seconds = time.perf_counter() - start
        views = data.Views(validation, args.frames, size, args.sampling, args.test_stride)
        rows = predict(model, views, device, dtype, micro, args.workers, "validating")
        result, step = summarise(rows), (epoch + 1) * steps
        line = dict(epoch=epoch + 1, lr=lr * rise_and_fall(step - 1), train_loss=state["loss"] / steps, val_top1=result["top1"],
                    val_top5=result["top5"], clips_per_second=round((steps - first) * args.batch / seconds, 2),
                    seconds=round(time.perf_counter() - start, 2), failed=len(state["failed"]), val_failed=result["failed"],
                    skipped=step - int(next(iter(optimizer.state.values()))["step"]))  # with fp16 not every step is taken
        if rank == 0:
            log_failures(args, [error for *_, error in rows if error])
            if result["top1"] > state["best"]:
                models.save_checkpoint(os.path.join(args.out, "best.pt"), model, run)
        state.update(epoch=epoch + 1, batch=0, loss=0.0, failed=[], best=max(state["best"], result["top1"]))
        state["log"].append(line)
        save()
        if rank == 0:
            grid.draw(os.path.join(args.out, "curves.png"), args.out, (3, curves, state["log"]))
        say(f"epoch {epoch + 1:3d}   loss {line['train_loss']:.3f}   top-1 {100 * result['top1']:.2f} %"
            f"   top-5 {100 * result['top5']:.2f} %   {line['clips_per_second']:.1f} clips/s   {line['seconds']:.0f} s"
            + f"   {line['failed']} + {result['failed']} unreadable, see failed.txt" * bool(line["failed"] or result["failed"])
            + f"   {line['skipped']} steps skipped" * (line["skipped"] > 0))
    if state["best"] >= 0:  # else best.pt has stayed where the checkpoint came from
        say(f"best top-1 {100 * state['best']:.2f} %; evaluate it with: python evaluate.py {os.path.join(args.out, 'best.pt')}")

def curves(stripe, log):
    """Loss, learning rate and accuracy over the epochs."""
    for axes, key in zip(stripe.subplots(1, 3), ("train_loss", "lr", "val_top1")):
        axes.plot([line["epoch"] for line in log], [line[key] for line in log], ".-")
        axes.set(title=key, xlabel="epoch")

def batches(size, epoch, global_batch, seed=0, rank=0, world=1):
    """This process's part of each batch of an epoch, lists of (epoch, index). Their order depends on (seed, epoch) alone and is
    cut into global batches first, so any number of processes trains on the same ones."""
    order = np.random.default_rng([seed, epoch]).permutation(size)[:size // global_batch * global_batch]
    return [[(epoch, int(i)) for i in np.array_split(batch, world)[rank]] for batch in order.reshape(-1, global_batch)]

def find_run(args):
    """The checkpoint to continue from, or None. DataError where a run is in the way: two in one folder would spoil each other."""
    last, best, log = (os.path.join(args.out, name) for name in ("last.pt", "best.pt", "log.jsonl"))
    path, occupied = last if args.resume is True else args.resume, any(map(os.path.exists, (last, best, log)))
    if path is not None and (args.resume is not True or os.path.exists(last)):
        content = models.read_checkpoint(path)
        if "log" not in (content["training"] or {}):
            raise data.DataError(f"{path} holds weights only, like best.pt, and cannot be resumed: --init starts from them")
        free = "out root init resume overwrite workers micro_batch compile checkpoint_activations save_every device".split()
        was = vars(parse(["--data", args.data])) | content["run"]  # an option that is younger than the run had its default
        differ = [f"--{k.replace('_', '-')} {v} (was {was.get(k)})" for k, v in vars(args).items()
                  if k not in free and was.get(k) != v]
        if differ:
            raise data.DataError(f"{path} is of a run with other options: {', '.join(differ)}")
        if os.path.abspath(path) == os.path.abspath(last) or not occupied:
            return content
    if occupied and not args.overwrite:
        raise data.DataError(f"{args.out} holds a run already: --resume continues it, --overwrite deletes it, --out DIR goes"
                             " elsewhere")
    if args.resume and os.environ.get("RANK", "0") == "0":
        print(f"note: there is no {last} to resume from, so the run starts afresh")
    return None

def start_folder(args, resumed, state):
    """Make the folder of the run, and delete what an earlier run has left there, and nothing else."""
    os.makedirs(args.out, exist_ok=True)
    for name in os.listdir(args.out) if not resumed else ():
        if re.fullmatch(r"(last|best)\.(pt|pt\.tmp|.+\.json)|log\.jsonl(\.tmp)?|curves\.png|failed\.txt", name):
            os.remove(os.path.join(args.out, name))
    if not os.path.exists(os.path.join(args.out, "best.pt")):
        state["best"] = -1.0  # the checkpoint came from elsewhere, alone

def log_failures(args, failures):
    """Add the messages that failed.txt does not have yet."""
    if failures:
        with open(os.path.join(args.out, "failed.txt"), "a+", errors="surrogateescape") as file:  # a path may hold any bytes
            file.seek(0)
            new = {" ".join(failure.splitlines()) for failure in failures}.difference(file.read().split("\n"))
            file.writelines(f"{line}\n" for line in sorted(new))

if __name__ == "__main__":
    main()
