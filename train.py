"""Train a video model. With no arguments: the demo, on drawn videos, on any machine.

    python train.py                                              # the demo
    python train.py --data folder --root DIR                     # your videos, one GPU
    torchrun --nproc_per_node=8 train.py --data k400             # eight GPUs, videos in data/k400
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29500 train.py --data k400          # two nodes, the same line on both

A data set's recipe, below, sets its options' defaults. --resume continues a run that was cut off.
"""

import contextlib
import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads leave cores to those that decode
import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from adapters import METHODS
from data import TrainingClips, VideoViews, collate
from evaluate import predict, summarise
from model import build_model, count_parameters
from support.datasets import digest, find_videos
from support.options import training_options
from support.prepare import prepare
from support.processes import (
    BAR,
    UserError,
    autocast_type,
    in_turn,
    leave_signals_to_the_parent,
    processes,
    say,
)
from support.runs import Run, find_checkpoint, load_weights, read_checkpoint

# Where a data set departs from the options' defaults, each value with its source: "command" is a
# line in the authors' release, "code" a default in it, "costs" the value that gives the paper's
# parameters and GMACs. lr is for 256 clips a step. Batches are rounded to divide by 8 processes.
# fmt: off
RECIPES = {
    "k400": dict(
        frames=32,            # costs
        sampling="dense",     # code
        stride=(4,),          # AIM's and ST-Adapter's: 16 at 8 frames, so 4 at 32
        test_stride=4,        # likewise
        batch=64,             # AIM's: no command for Kinetics is published
        lr=1.2e-3,            # AIM's: 3e-4 at 64 clips
        epochs=30,            # AIM's
        erasing=0,            # code
        views=(3, 1),         # code
    ),
    "ssv2": dict(
        frames=48,            # costs
        pre_attention_adapter=True,  # costs
        sampling="uniform",   # AIM's, ST-Adapter's; code: dense, stride 1 2 4 8
        batch=88,             # command: 2 x 43
        lr=5e-4,              # command; 3.5e-4 in another
        epochs=60,            # command
        erasing=0.1,          # code
        flip=False,           # code: labels name left and right
        aim_scale=1,          # AIM's
        aim_temporal_adapters=2,  # AIM's for ViT-B/16; 1 for ViT-L/14
        views=(1, 3),         # code
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
        views=(3, 1),         # code
    ),
    "diving48": dict(
        frames=16,            # code
        sampling="uniform",   # AIM's; code: dense, stride 1 2 4 8
        batch=128,            # command: 3 x 43
        lr=7e-4,              # command
        epochs=50,            # command
        erasing=0.1,          # code
        views=(3, 1),         # code
    ),
    # Own videos: the options' own defaults. Base lr and epochs are within what AIM and ST-Adapter
    # used on Kinetics; one frame from each segment (uniform) suits videos of any length.
    "folder": {},
    "list": {},
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
        views=(1, 1),
    ),
}
# fmt: on


def parse(argv):
    return training_options(argv, METHODS, RECIPES)


def main(argv=None):
    args = parse(argv)
    with processes("train.py", args.device) as (rank, world_size, device):
        train(args, rank, world_size, device)


def train(args, rank, world_size, device):
    # ---- data, model, optimiser
    # In turn: the first process may have to download or draw what the others then find.
    dtype, videos, model, resumed = in_turn(lambda: set_up(args, world_size, device))
    train_samples, val_samples = videos.train[: args.limit], videos.val[: args.limit]
    size = model.visual.image_size[0]
    clips = TrainingClips(
        train_samples,
        args.frames,
        size,
        args.sampling,
        args.stride,
        args.augment,
        args.seed,
        flip=args.flip,
        erasing=args.erasing,
        crop_area=args.crop_area,
    )
    # One central view of each video; evaluate.py takes all of args.views.
    test_views = VideoViews(val_samples, args.frames, size, args.sampling, args.test_stride)
    steps_per_epoch = len(clips) // args.batch
    micro_batch = min(args.micro_batch or args.batch, args.batch // world_size)
    lr = args.lr * args.batch / 256
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=lr, fused=True)
    factor = warmup_then_cosine(args.warmup * steps_per_epoch, args.epochs * steps_per_epoch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    net = model  # or DDP around it
    if world_size > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        net.broadcast_buffers = False  # they are constants (its argument's name depends on torch)

    settings = vars(args) | {
        "classes": videos.classes,
        "train_digest": digest(train_samples),
        "val_videos": len(videos.val),
        "val_digest": digest(videos.val),
    }
    states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    run = Run(args.out, args.save_every, settings, train_samples, model, states, resumed)
    describe(args, videos, model, clips, test_views, lr, world_size, device, dtype)
    run.start()

    # ---- the loop
    for epoch in range(run.epoch, args.epochs):
        order = batches(len(clips), epoch, args.batch, args.seed, rank, world_size)
        loader = DataLoader(
            clips,
            batch_sampler=order[run.step :],
            num_workers=args.workers,
            pin_memory=device.type == "cuda",
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_parent,
        )
        bar = tqdm(
            loader,
            f"epoch {epoch + 1}/{args.epochs}",
            steps_per_epoch,
            initial=run.step,
            disable=rank > 0,
            unit="clip",
            unit_scale=args.batch,
            **BAR,
        )
        net.train()
        run.begin_epoch(order)
        with run.signals_deferred():
            for video, label, unreadable in bar:
                if run.must_stop(unreadable, no_clips=video is None):  # all processes agree
                    break
                seed = hash((args.seed, epoch * steps_per_epoch + run.step, rank))
                torch.manual_seed(seed)  # for dropout; Python salts the hashes of strings alone
                step_loss = torch.zeros((), device=device)
                parts = list(zip(video.split(micro_batch), label.split(micro_batch)))
                for i, (video_part, label_part) in enumerate(parts):
                    video_part = video_part.to(device, non_blocking=True)  # (b, T, 3, S, S) uint8
                    label_part = label_part.to(device, non_blocking=True)
                    # Processes exchange gradients once a step, in its last part.
                    more_to_come = world_size > 1 and i < len(parts) - 1
                    sync = net.no_sync() if more_to_come else contextlib.nullcontext()
                    with sync, torch.autocast(device.type, dtype, enabled=dtype is not None):
                        logits = net(video_part).float()  # (b, classes)
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
                run.count_step(step_loss)
                bar.set_postfix_str(run.progress(), refresh=False)
            run.save()  # before the validation, in which the run may be cut off
        run.exit_if_stopped()
        predictions = predict(
            model, test_views, device, dtype, micro_batch, args.workers, "validating"
        )
        run.log_failures([p.error for p in predictions if p.error])
        run.end_epoch(summarise(predictions), args.batch)
    run.finish()


def set_up(args, world_size, device):
    """→ compute type, videos, model on the device, the checkpoint to continue from or None."""
    dtype = autocast_type(args.amp, device)
    resumed = find_checkpoint(args, defaults=vars(parse(["--data", args.data])))
    videos = find_videos(args.data, args.root, args.split)  # draws the demo at the first use
    available = len(videos.train[: args.limit])
    if args.batch > available or args.batch % world_size:
        raise UserError(
            f"--batch {args.batch} must be a multiple of the number of processes, {world_size},"
            f" and at most that of the training clips, {available}"
        )
    torch.manual_seed(args.seed)
    model = build_model(
        args.method,
        len(videos.classes),
        args.backbone,
        args.pretrained,
        num_frames=args.frames,
        spatial_frames=args.spatial_frames,
        image_size=args.size,
        bottleneck=args.bottleneck,
        dropout=args.dropout,
        pre_attention_adapter=args.pre_attention_adapter,
        serial_skip=args.serial_skip,
        paths=args.paths,
        position_scale=args.position_scale,
        before=args.before,
        aim_scale=args.aim_scale,
        aim_temporal_adapters=args.aim_temporal_adapters,
    )
    if resumed:
        if resumed["run"]["classes"] != videos.classes:
            raise UserError(
                f"{args.root} has other classes than the run in {args.out} that it should continue"
            )
        if resumed["run"]["train_digest"] != digest(videos.train[: args.limit]):
            raise UserError(
                f"{args.root} has other training videos than the run in {args.out} that it should"
                " continue"
            )
        load_weights(model, resumed, args.out)
    elif args.init:
        load_weights(model, read_checkpoint(args.init), args.init, head=False)
    prepare(model.to(device), dtype, args.compile, args.checkpoint_activations)
    return dtype, videos, model, resumed


def parameter_groups(model, weight_decay):
    """Weight decay for matrices; none for biases, norms, tokens and position embeddings."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        spared = name.endswith(("embedding", "bias_table", "latent"))  # the last two: Swin, SigLIP
        if p.requires_grad and p.ndim > 1 and not spared:
            matrices.append(p)
        elif p.requires_grad:
            others.append(p)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def warmup_then_cosine(warmup, total):
    """The learning rate's factor at a step: a linear rise, then half a cosine down to zero."""

    def factor(step):
        if step < warmup:
            return min(1, (step + 1) / warmup)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, total - warmup))

    return factor


def batches(num_clips, epoch, global_batch, seed=0, rank=0, world_size=1):
    """This process's part of each batch of an epoch: lists of (epoch, index).

    Their order depends on (seed, epoch) alone and is cut into global batches first, so that any
    number of processes trains on the same ones.
    """
    permutation = np.random.default_rng([seed, epoch]).permutation(num_clips)
    whole = permutation[: num_clips // global_batch * global_batch].reshape(-1, global_batch)
    shares = [np.array_split(batch, world_size)[rank] for batch in whole]
    return [[(epoch, int(i)) for i in share] for share in shares]


def describe(args, videos, model, clips, test_views, lr, world_size, device, dtype):
    """What is about to be trained, on the terminal."""
    tuned, everything = count_parameters(model)
    missing = f"; {len(videos.missing)} listed videos are missing" if videos.missing else ""
    traffic = f"; a step exchanges {4e-6 * tuned:.1f} MB of gradients" if world_size > 1 else ""
    precision = str(dtype or torch.float32).removeprefix("torch.")
    say(
        f"data      {args.data}: {len(clips)} training and {len(test_views)} validation videos,"
        f" {len(videos.classes)} classes{missing}"
    )
    say(
        f"model     {args.method} around {args.backbone}: {tuned / 1e6:.2f} M of"
        f" {everything / 1e6:.2f} M weights are trained{traffic}"
    )
    say(
        f"clips     {args.frames} frames of {model.visual.image_size[0]} px, {args.sampling};"
        f" the cost of {model.images_per_clip} images"
    )
    say(
        f"training  {args.epochs} epochs of {len(clips) // args.batch} steps of {args.batch} clips,"
        f" on {world_size} x {device.type}, {precision}; learning rate"
        f" {args.lr:g} x {args.batch}/256 = {lr:g}"
    )


if __name__ == "__main__":
    main()
