"""Train a video model. With no arguments: the demo, on drawn videos, on any machine.

    python train.py                                              # the demo
    python train.py --data folder --root DIR                     # your videos, one GPU
    torchrun --nproc_per_node=8 train.py --data k400             # eight GPUs, videos in data/k400
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29500 train.py --data k400          # two nodes, the same line on both

A data set's recipe, below, sets its options' defaults. --resume continues a run that was cut off.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import time
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads leave cores to those that decode
import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from adapters import METHODS
from data import TrainingClips, VideoViews, collate, training_transform
from evaluate import DATA_OPTIONS, MACHINE_OPTIONS, predict, summarise
from model import Config, build_model, check_options, options_of, prepare
from support import options
from support.datasets import digest, find_videos
from support.processes import (
    UserError,
    autocast_type,
    on_signals,
    processes,
    progress_bar,
    rank,
    rank_zero_first,
    say,
    start_worker,
    world_size,
)
from support.runs import (
    COUNTERS,
    Run,
    check_continues,
    count_parameters,
    find_run,
    load_weights,
    read_checkpoint,
    saved_weights,
)

# Every option but the model's, which are in model.Config: default, type or choices, help.
# fmt: off
OPTIONS = DATA_OPTIONS | {
    "out": (None, str, "folder of the run (runs/NAME[-SPLIT]-METHOD[-PATHS]-sSEED)"),
    "resume": (False, bool, "continue the run in --out"),
    "overwrite": (False, bool, "delete the run in --out first"),
    "init": (None, str, "start from this checkpoint's weights, with a new head"),
    "limit": (None, options.positive_int, "the first N videos of each list (all)"),
    "seed": (0, options.natural, "of order, augmentation, dropout and new weights"),
    # clips
    "sampling": ("uniform", ("dense", "uniform"), "frames at a stride, or one per segment"),
    "stride": ((4,), [options.positive_int], "of dense clips; of several, one is drawn"),
    "test_stride": (4, options.positive_int, "the same in testing"),
    "augment": ("rand", ("rand", "crop", "translate"),
                "crops and RandAugment, crops, or shifts only"),
    "crop_area": (0.08, options.fraction, "least share of a frame that a crop keeps"),
    "flip": (True, bool, "mirror half of the clips"),
    "erasing": (0.0, options.fraction, "probability of random erasing"),
    "views": ("3x1", options.views, "test views of evaluate.py, CLIPSxCROPS"),
    # optimisation
    "epochs": (30, options.positive_int, "passes over all training clips"),
    "warmup": (3.0, options.non_negative, "epochs of rising learning rate"),
    "batch": (64, options.positive_int, "clips per step, over all processes"),
    "micro_batch": (None, options.positive_int, "clips per forward; their gradients add up"),
    "lr": (1e-3, options.non_negative, "base learning rate, per 256 clips"),
    "weight_decay": (0.05, options.non_negative, "of matrices only"),
    "clip_grad": (None, options.non_negative, "largest norm of the gradient (no limit)"),
    "checkpoint_activations": (False, bool, "recompute them in backward: less memory, more time"),
    "save_every": (10.0, options.non_negative, "minutes between checkpoints within an epoch"),
} | MACHINE_OPTIONS
# fmt: on
MODEL_OPTIONS = {
    f.name: (f.default, *f.metadata.values()) for f in dataclasses.fields(Config) if f.metadata
}

# Where a data set departs from the options' defaults, each value with its source: "command" is a
# line in the authors' release, "code" a default in it, "inferred" the value that gives the
# paper's parameters and GMACs. lr is for 256 clips a step. Batches are rounded to divide by 8
# processes.
# fmt: off
RECIPES = {
    "k400": dict(
        frames=32,            # inferred
        sampling="dense",     # code
        stride=(4,),          # AIM's and ST-Adapter's: 16 at 8 frames, so 4 at 32
        test_stride=4,        # likewise
        batch=64,             # AIM's: no command for Kinetics is published
        lr=1.2e-3,            # AIM's: 3e-4 at 64 clips
        epochs=30,            # AIM's
        erasing=0,            # code
        views="3x1",         # code
    ),
    "ssv2": dict(
        frames=48,            # inferred
        pre_attention_adapter=True,  # inferred
        sampling="uniform",   # AIM's, ST-Adapter's; code: dense, stride 1 2 4 8
        batch=88,             # command: 2 x 43
        lr=5e-4,              # command; 3.5e-4 in another
        epochs=60,            # command
        erasing=0.1,          # code
        flip=False,           # code: labels name left and right
        aim_scale=1,          # AIM's
        aim_temporal_adapters=2,  # AIM's for ViT-B/16; 1 for ViT-L/14
        views="1x3",         # code
    ),
    "hmdb51": dict(
        split=1,              # the first of three
        frames=16,            # code
        sampling="dense",     # code
        stride=(1, 2, 4, 8),  # code: drawn from these
        test_stride=4,        # code
        batch=96,             # command: 3 x 32
        lr=3e-2,              # command
        epochs=50,            # command
        erasing=0.5,          # code
        views="3x1",         # code
    ),
    "diving48": dict(
        frames=16,            # code
        sampling="uniform",   # AIM's; code: dense, stride 1 2 4 8
        batch=128,            # command: 3 x 43
        lr=7e-4,              # command
        epochs=50,            # command
        erasing=0.1,          # code
        views="3x1",         # code
    ),
    # Own videos: the options' own defaults. Base lr and epochs are within what AIM and ST-Adapter
    # used on Kinetics; one frame from each segment (uniform) suits videos of any length. The skip
    # is ours: without it the temporal path hardly learns from hundreds of videos
    # (docs/results/README.md); --no-serial-skip is the paper's form.
    "folder": dict(serial_skip=True),
    "list": dict(serial_skip=True),
    # Drawn videos, which need no network and no GPU.
    "demo": dict(
        backbone="tiny",
        frames=16,
        spatial_frames=4,
        bottleneck=32,
        # In a trial the temporal path alone recognised the motion in 60 % of the videos at 0.15,
        # in 99 % at 0.5, in 98 % at 1.
        position_scale=0.5,
        sampling="dense",
        stride=(1,),
        test_stride=1,
        augment="translate",
        batch=32,
        lr=0.04,
        epochs=7,
        warmup=1,
        views="1x1",
    ),
}
# fmt: on


def parse(argv=None):
    """The command line → all options: what is given, else the data set's recipe, else a default."""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--data", choices=RECIPES, default="demo")
    chooser.add_argument("--method", choices=METHODS, default=Config.method)
    chosen = chooser.parse_known_args(argv)[0]
    others = MODEL_OPTIONS.keys() - options_of(chosen.method)  # a recipe may have values for them
    recipe = {k: v for k, v in RECIPES[chosen.data].items() if k not in others}
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="python train.py [--data NAME] [options]    (defaults in brackets; with --data NAME"
        " --help, that recipe's)",
    )
    options.add_options(parser, MODEL_OPTIONS | OPTIONS)
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    try:
        check_options(args)
    except UserError as error:
        parser.error(error)
    given = [n for n in ("stride", "test_stride") if getattr(args, n) != parser.get_default(n)]
    if args.sampling == "uniform" and given:
        parser.error("strides are for --sampling dense; uniform takes one frame from each segment")
    if args.resume and args.overwrite:
        parser.error("--resume continues the run that --overwrite deletes: give one of them")
    if args.warmup > args.epochs:
        parser.error(f"--epochs {args.epochs} end before the learning rate is up: lower --warmup")
    if args.pretrained == "none":
        args.pretrained = None
    args.stride = tuple(args.stride)
    args.root = args.root or f"data/{args.data}"
    split = f"split{args.split}" if args.split else None
    paths = args.paths if args.paths != "both" else None
    name = "-".join(filter(None, (args.data, split, args.method, paths, f"s{args.seed}")))
    args.out = args.out or f"runs/{name}"
    return args


def main(argv=None):
    args = parse(argv)
    with processes("train.py", args.device) as device:
        train(args, device)


def train(args, device):
    # ---- data, model, optimiser
    dtype = autocast_type(args.amp, device)
    # Rank zero first: it may have to download or draw what the others then find.
    resumed = rank_zero_first(lambda: find_run(args.out, args.resume, args.overwrite))
    videos = rank_zero_first(lambda: find_videos(args.data, args.root, args.split))
    train_samples, val_samples = videos.train[: args.limit], videos.val[: args.limit]
    settings = vars(args) | {
        "classes": videos.classes,
        "train_videos": len(train_samples),
        "train_digest": digest(train_samples),
        "val_videos": len(videos.val),
        "val_digest": digest(videos.val),
    }
    model = rank_zero_first(lambda: new_model(args, settings, resumed))
    prepare(model.to(device), dtype, args.compile, args.checkpoint_activations)
    size = model.visual.image_size[0]
    transform = training_transform(args.augment, size, args.flip, args.erasing, args.crop_area)
    sampling = (args.sampling, args.stride, args.seed)
    clips = TrainingClips(train_samples, args.frames, transform, *sampling)
    # One central view of each video; evaluate.py takes all of args.views.
    test_views = VideoViews(val_samples, args.frames, size, args.sampling, args.test_stride)
    steps_per_epoch = len(clips) // args.batch
    micro_batch = min(args.micro_batch or args.batch, args.batch // world_size())
    lr = args.lr * args.batch / 256
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=lr, fused=True)
    warmup, total = args.warmup * steps_per_epoch, args.epochs * steps_per_epoch
    factor = partial(warmup_then_cosine, warmup=warmup, total=total)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    net = model  # or DDP around it
    if world_size() > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        net.broadcast_buffers = False  # they are constants (its argument's name depends on torch)
    states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if resumed:
        for name, part in states.items():
            part.load_state_dict(resumed["training"][name])

    def checkpoint():  # for run, below
        """What last.pt holds; best.pt has all but the training."""
        return {
            "model": dataclasses.asdict(model.config),
            "weights": saved_weights(model),
            "fingerprint": model.fingerprint,
            "normalisation": model.visual.normalisation,
            "run": settings,
            "training": {name: getattr(run, name) for name in COUNTERS}
            | {name: part.state_dict() for name, part in states.items()},
        }

    describe(args, videos, model, clips, test_views, device, dtype)
    run = Run(args.out, args.save_every, len(clips), checkpoint)
    run.start(resumed, settings["train_digest"])

    # ---- the loop
    for epoch in range(run.epoch, args.epochs):
        first_step, start = run.step, time.perf_counter()
        indices = batches(len(clips), epoch, args.batch, args.seed, rank(), world_size())
        loader = DataLoader(
            clips,
            batch_sampler=indices[run.step :],
            num_workers=args.workers,
            pin_memory=device.type == "cuda",
            collate_fn=collate,
            worker_init_fn=start_worker,
        )
        title, unit = f"epoch {epoch + 1}/{args.epochs}", {"unit": "clip", "unit_scale": args.batch}
        bar = progress_bar(loader, title, steps_per_epoch, initial=run.step, **unit)
        net.train()
        with on_signals(run.signals.append):  # before_step answers them
            for video, label, unreadable in bar:
                run.before_step(unreadable)  # may write last.pt, as of the steps before this one
                seed = hash((args.seed, epoch * steps_per_epoch + run.step, rank()))
                torch.manual_seed(seed)  # for dropout; Python salts the hashes of strings only
                step_loss = torch.zeros((), device=device)
                parts = list(zip(video.split(micro_batch), label.split(micro_batch)))
                for i, (video_part, label_part) in enumerate(parts):
                    video_part = video_part.to(device, non_blocking=True)  # (b, T, 3, S, S) uint8
                    label_part = label_part.to(device, non_blocking=True)
                    # Processes exchange gradients once a step, in its last part; which backward
                    # does so, DDP decides in the forward before it.
                    more_to_come = world_size() > 1 and i < len(parts) - 1
                    sync = net.no_sync() if more_to_come else contextlib.nullcontext()
                    with sync, torch.autocast(device.type, dtype, enabled=dtype is not None):
                        logits = net(video_part).float()  # (b, classes)
                        # The mean over this process's clips; DDP's is over processes.
                        loss = F.cross_entropy(logits, label_part, reduction="sum") / len(video)
                    scaler.scale(loss).backward()
                    step_loss += loss.detach()
                if args.clip_grad:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()
                run.after_step(step_loss)
                if run.step % 20 == 0:  # reading a loss waits for the device
                    bar.set_postfix_str(f"loss {step_loss:.3f}", refresh=False)
            run.save()  # the run may be cut off in the validation
            run.before_step([])  # answers a signal that came in the last step
        trained = time.perf_counter()
        predictions = predict(model, test_views, device, dtype, micro_batch, args.workers)
        scores = summarise(predictions)
        line = {
            "epoch": epoch + 1,
            "lr": lr * factor(scheduler.last_epoch - 1),  # the last step's
            "train_loss": run.loss_sum / run.step,
            "val_top1": scores["top1"],
            "val_top5": scores["top5"],
            "clips_per_second": round((run.step - first_step) * args.batch / (trained - start), 2),
            "seconds": round(time.perf_counter() - start, 2),
            "failed": len(run.failed),
            "val_failed": scores["failed"],
        }
        run.end_epoch(line, [p.error for p in predictions if p.error])
        say(EPOCH_LINE.format(**line))
    say(f"best top-1 {run.best:.2%}: python evaluate.py {args.out}/best.pt")


def new_model(args, settings, resumed):
    """The model to train, with the weights of --resume or --init, if any; UserError."""
    if args.batch > settings["train_videos"] or args.batch % world_size():
        raise UserError(
            f"--batch {args.batch} must be at most the number of training clips,"
            f" {settings['train_videos']}, and a multiple of that of processes, {world_size()}"
        )
    if resumed:
        # Options that are younger than the checkpoint had their defaults.
        check_continues(vars(Config()) | resumed["run"], settings)
    torch.manual_seed(args.seed)
    chosen = {name: getattr(args, name) for name in MODEL_OPTIONS}
    model = build_model(Config(len(settings["classes"]), **chosen))
    if resumed:
        load_weights(model, resumed, args.out)
    elif args.init:
        load_weights(model, read_checkpoint(args.init), args.init, head=False)
    return model


def parameter_groups(model, weight_decay):
    """Weight decay for matrices; none for biases, norms, tokens and position embeddings."""
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        # The last two are Swin's and SigLIP's.
        is_token = name.endswith(("embedding", "bias_table", "latent"))
        if p.requires_grad and p.ndim > 1 and not is_token:
            decay.append(p)
        elif p.requires_grad:
            no_decay.append(p)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def warmup_then_cosine(step, warmup, total):
    """The learning rate's factor at a step: a linear rise, then half a cosine down to zero."""
    if step < warmup:
        return min(1, (step + 1) / warmup)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, total - warmup))


def batches(num_clips, epoch, global_batch, seed=0, rank=0, world_size=1):
    """This process's part of each batch of an epoch: lists of (epoch, index).

    Their order depends only on (seed, epoch) and is cut into global batches first, so that any
    number of processes trains on the same ones.
    """
    permutation = np.random.default_rng([seed, epoch]).permutation(num_clips)
    complete = num_clips // global_batch * global_batch
    steps = permutation[:complete].reshape(-1, global_batch)
    shares = [np.array_split(batch, world_size)[rank] for batch in steps]
    return [[(epoch, int(i)) for i in share] for share in shares]


# ---------------------------------------------------------------- on the terminal
EPOCH_LINE = (
    "epoch {epoch:3d}   loss {train_loss:.3f}   top-1 {val_top1:.2%}   top-5 {val_top5:.2%}"
    "   {clips_per_second:.1f} clips/s   {seconds:.0f} s   unreadable {failed} + {val_failed}"
)


def describe(args, videos, model, clips, test_views, device, dtype):
    """What is about to be trained."""
    tuned, everything = count_parameters(model)
    missing = f"; {len(videos.missing)} listed videos are missing" if videos.missing else ""
    precision = str(dtype or torch.float32).removeprefix("torch.")
    say(
        f"data      {args.data}, {videos.found}: {len(clips)} training and {len(test_views)}"
        f" validation videos, {len(videos.classes)} classes{missing}"
    )
    say(
        f"model     {args.method} around {args.backbone}: {tuned / 1e6:.2f} M of"
        f" {everything / 1e6:.2f} M weights are trained"
    )
    say(
        f"clips     {args.frames} frames of {model.visual.image_size[0]} px, {args.sampling};"
        f" the cost of {model.images_per_clip} images"
    )
    say(
        f"training  {args.epochs} x {len(clips) // args.batch} steps of {args.batch} clips, on"
        f" {world_size()} x {device.type}, {precision}; learning rate"
        f" {args.lr:g} x {args.batch}/256 = {args.lr * args.batch / 256:g}"
    )


if __name__ == "__main__":
    main()
