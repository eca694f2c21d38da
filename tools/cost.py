"""What the methods cost in seconds and memory, next to the plain frozen image model.

    python -m tools.cost --batch 32 --backbone ViT-B-16-quickgelu --method dualpath --json cost.json

The plain model (the library's own, never compiled) sees as many images as the method. Its training
step is a forward and a backward to the pixels: the least that any method costs that trains inside
it. All steps take turns in random order, so that noise falls on all alike; the first round warms
up, and a ratio is the median of the rounds' ratios. MFU (model FLOPs utilisation) is the share of
the device's own rate in a large product that training comes to.
"""

import argparse
import json
from functools import partial
from statistics import median

import torch

from model import add_report_options, build_model, count, variants
from support import options
from support.backbones import load_plain_model
from support.prepare import prepare
from support.processes import UserError, one_sentence
from support.tables import table
from tools.timing import ratio, take_turns

# What a training step computes, in forward passes. The way back through frozen weights takes one,
# the gradients of the image model's own weights another; a linear probe needs neither.
FORWARDS = {"linear": 1, "full": 3}


def step(net, x, dtype=None, train=False, optimizer=None):
    """A forward of net(x), or a training step.

    Where x asks for gradients and nothing is trained, that is a way back to x.
    """
    mixed = dtype not in (None, torch.float32)
    with torch.set_grad_enabled(train), torch.autocast(x.device.type, dtype, enabled=mixed):
        y = net.train(train)(x)
    if train:
        y.float().logsumexp(-1).sum().backward()  # costs what cross-entropy costs
        x.grad = None
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()


def steps_of(model, plain, batch, device, dtype):
    """What is measured for one variant: {kind: function without arguments}."""
    size = model.visual.image_size
    video = torch.randint(
        256, (batch, model.num_frames, 3, *size), dtype=torch.uint8, device=device
    )
    images = batch * model.images_per_clip
    pixels = torch.randn(images, 3, *size, device=device, dtype=dtype, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    return {
        "forward": partial(step, model, video, dtype),
        "train": partial(step, model, video, dtype, train=True, optimizer=optimizer),
        "plain forward": partial(step, plain, pixels),
        "plain train": partial(step, plain, pixels, train=True),
    }


def large_product(device, dtype):
    """A product that shows the device's own rate, and its multiply-accumulates."""
    n = 2048 if device.type == "cpu" else 8192
    square = torch.randn(n, n, device=device, dtype=dtype)
    return lambda: square @ square, n**3


def peak_gigabytes(net, run):
    """The most that run() needs at once on a CUDA GPU: net's weights and optimiser, not its inputs.

    Other models are on the GPU, too, so what was there before does not count.
    """
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    taken = torch.cuda.max_memory_allocated() - before
    weights = sum(p.nbytes for p in net.parameters())
    averages = sum(2 * p.nbytes for p in net.parameters() if p.requires_grad)  # AdamW's
    return (weights + averages + taken) / 1e9


def memory_columns(model, plain, steps, batch, device):
    """Of one row; only CUDA's allocator tells them."""
    if device.type != "cuda":
        return {}
    return {
        "GB/clip": peak_gigabytes(model, steps["train"]) / batch,
        "plain GB/clip": peak_gigabytes(plain, steps["plain train"]) / batch,
    }


def cost_row(name, counts, seconds, first_forward, batch, rate):
    """One row of the table.

    counts: model.count's. seconds: {kind: those of its rounds}. first_forward: those of the first
    row's. rate: multiply-accumulates a second of the device's own large product.
    """
    macs = FORWARDS.get(name, 2) * counts["GMACs/view"] * 1e9 * batch
    return {
        "method": name,
        **counts,
        "forward/s": batch / median(seconds["forward"]),
        "forward ÷ plain": ratio(seconds["forward"], seconds["plain forward"]),
        "train/s": batch / median(seconds["train"]),
        "train ÷ plain": ratio(seconds["train"], seconds["plain train"]),
        "growth": ratio(seconds["forward"], first_forward),
        "MFU": macs / median(seconds["train"]) / rate,
    }


def measure(backbone, args, device, dtype):
    """(rows, rate of a large product) of one backbone."""
    plain = load_plain_model(backbone, None).to(device, dtype).requires_grad_(False)
    product, macs = large_product(device, dtype)
    names, counts, models, steps, everything = [], [], [], [], {"product": product}
    for i, (name, config) in enumerate(variants(backbone, args.method, args.frames)):
        config = dict(config, backbone=backbone, pretrained=None)
        with torch.device("meta"):
            counts.append(count(build_model(**config)))
        model = build_model(**config).to(device)
        prepare(model, dtype, args.compile, args.checkpoint_activations)
        names.append(name)
        models.append(model)
        steps.append(steps_of(model, plain, args.batch, device, dtype))
        everything |= {(i, kind): function for kind, function in steps[i].items()}
    wait = torch.accelerator.synchronize if device.type != "cpu" else None
    seconds = take_turns(everything, args.rounds, wait)
    rate = macs / median(seconds["product"])
    rows = []
    for i, name in enumerate(names):
        own = {kind: seconds[i, kind] for kind in steps[i]}
        row = cost_row(name, counts[i], own, seconds[0, "forward"], args.batch, rate)
        rows.append(row | memory_columns(models[i], plain, steps[i], args.batch, device))
    return rows, rate


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.cost", description="Speed and memory next to the plain image model."
    )
    add, whole = parser.add_argument, options.at_least(1)
    add_report_options(add)
    batch = "clips per step; give fewer if memory runs out (%(default)s)"
    add("--batch", type=whole, default=1, metavar="N", help=batch)
    add("--rounds", type=whole, default=5, metavar="N", help="all take turns in (%(default)s)")
    for option in ("--compile", "--checkpoint-activations"):
        add(option, action="store_true", help="as in train.py")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    with one_sentence("cost.py"):
        result = vars(args) | {"torch": str(torch.__version__), "device": machine}
        result |= {"type": str(dtype), "rows": []}
        if args.json:
            open(args.json, "a").close()  # if this fails, then before the measurement
        for backbone in args.backbone:
            try:
                rows, rate = measure(backbone, args, device, dtype)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
                raise UserError(f"{reason} (a smaller --batch takes less memory)") from error
            tera = 2e-12 * rate
            print(f"{backbone}: {args.batch} clips, {machine}, {dtype}")
            print(f"a large product has {tera:.3g} TFLOP/s", *table(rows), "", sep="\n")
            result["rows"] += [{"backbone": backbone} | row for row in rows]
        if args.json:
            with open(args.json, "w") as file:
                json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
