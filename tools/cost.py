"""What the methods cost: counted, and measured next to the plain frozen image model.

    python -m tools.cost --count                                        # needs no weights, no GPU
    python -m tools.cost --batch 32 --backbone ViT-B-16-quickgelu --method dualpath

--count gives images, parameters and multiply-accumulates of a clip, for 400 classes. Else seconds
and memory on the device at hand are measured. The plain model (the library's own, never compiled)
sees as many images as the method. Its training step is a forward and a backward to the pixels: the
least that any method costs that trains inside it. All steps take turns in random order, so that
noise falls on all alike; the first round warms up, and a ratio is the median of the rounds' ratios.
MFU (model FLOPs utilisation) is the share of the device's own rate in a large product that training
comes to.
"""

import argparse
from functools import partial
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from adapters import METHODS
from model import Config, build_model, prepare
from support.backbones import load_plain_model
from support.options import positive_int
from support.processes import choose_device, one_sentence
from support.runs import count_parameters
from tools.report import ratio, table, take_turns

# Options of the rows of a method that has not just one, of 8 frames; T as in the methods' papers.
ROWS = {
    "dualpath": [{"frames": T} for T in (16, 32, 48)]
    + [{"frames": 48, "pre_attention_adapter": True}],
    "aim": [{"frames": T, "spatial_frames": T} for T in (8, 16, 32)],
    "st_adapter": [{}, {"before": "both"}],
}
# What a training step computes, in forward passes. The way back through frozen weights takes one,
# the gradients of the image model's own weights another; a linear probe needs neither.
FORWARDS = {"linear": 1, "full": 3}


# ---------------------------------------------------------------- counted
def count(model):
    """Images, parameters and multiply-accumulates of a clip, for a model on the meta device.

    One forward pass, with gradients on: the counter cannot see into a CPU's kernels for inference.
    """
    T, (H, W) = model.config.frames, model.visual.image_size
    video = torch.zeros(1, T, 3, H, W, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(video)
    tuned, everything = count_parameters(model)
    return {
        "T": T,
        "images": model.images_per_clip,
        "all M": everything / 1e6,
        "tuned M": tuned / 1e6,
        "GMACs/view": counter.get_total_flops() / 2e9,  # a multiply-accumulate is two FLOPs
    }


def counted_rows(backbone, methods):
    """(Config, row of the table) of each method and its options."""
    rows = []
    for method in methods:
        for options in ROWS.get(method, [{}]):
            options = {"frames": 8} | options
            config = Config(method=method, backbone=backbone, pretrained=None, **options)
            with torch.device("meta"):  # shapes without memory
                model = build_model(config)
            others = [f"{name}={options[name]}" for name in options if "frames" not in name]
            rows.append((config, {"method": " ".join([method, *others])} | count(model)))
    return rows


# ---------------------------------------------------------------- measured
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
    """What is measured for one row: {kind: function without arguments}."""
    shape = (batch, model.config.frames, 3, *model.visual.image_size)
    video = torch.randint(256, shape, dtype=torch.uint8, device=device)
    shape = (batch * model.images_per_clip, 3, *model.visual.image_size)
    images = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    return {
        "forward": partial(step, model, video, dtype),
        "train": partial(step, model, video, dtype, train=True, optimizer=optimizer),
        "plain forward": partial(step, plain, images),
        "plain train": partial(step, plain, images, train=True),
    }


def peak_gib(run):
    """The most that run() takes at once on a CUDA GPU, beside the weights and AdamW's averages."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(counted, plain, args, device, dtype):
    """Add what is measured to the rows of (Config, row); returns a large product's TFLOP/s."""
    n = 2048 if device.type == "cpu" else 8192
    square = torch.randn(n, n, device=device, dtype=dtype)
    steps = {"product": lambda: square @ square}
    for i, (config, _) in enumerate(counted):
        model = build_model(config).to(device)
        model.config.pretrained = "random"  # prepared as weights that checkpoints do not hold
        model = prepare(model, dtype, args.compile, args.checkpoint_activations)
        own = steps_of(model, plain, args.batch, device, dtype)
        steps |= {(i, kind): function for kind, function in own.items()}
    wait = torch.accelerator.synchronize if device.type != "cpu" else None
    seconds = take_turns(steps, args.rounds, wait)
    rate = n**3 / median(seconds["product"])  # multiply-accumulates a second
    for i, (config, row) in enumerate(counted):
        forward, train = seconds[i, "forward"], seconds[i, "train"]
        macs = FORWARDS.get(config.method, 2) * row["GMACs/view"] * 1e9 * args.batch
        row |= {
            "forward/s": args.batch / median(forward),
            "forward ÷ plain": ratio(forward, seconds[i, "plain forward"]),
            "train/s": args.batch / median(train),
            "train ÷ plain": ratio(train, seconds[i, "plain train"]),
            "MFU": macs / median(train) / rate,
        }
        if device.type == "cuda":
            row["GiB/clip"] = peak_gib(steps[i, "train"]) / args.batch
            row["plain GiB/clip"] = peak_gib(steps[i, "plain train"]) / args.batch
    return 2e-12 * rate


# ---------------------------------------------------------------- as a script
def parse(argv):
    parser = argparse.ArgumentParser("python -m tools.cost")
    add = parser.add_argument
    backbones = ["ViT-B-16-quickgelu", "ViT-L-14-quickgelu"]
    add("--count", action="store_true", help="count only, measure nothing")
    add("--backbone", nargs="+", default=backbones, metavar="NAME", help="(%(default)s)")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="(all)")
    add("--batch", type=positive_int, default=1, metavar="N", help="clips per step (%(default)s)")
    add("--rounds", type=positive_int, default=5, metavar="N", help="of turns (%(default)s)")
    add("--compile", action="store_true", help="as in train.py")
    add("--checkpoint-activations", action="store_true", help="as in train.py")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    with one_sentence("cost.py"):
        device = choose_device("auto")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        machine = f"{torch.get_num_threads()} CPU threads"
        if device.type == "cuda":
            machine = torch.cuda.get_device_name()
        for backbone in args.backbone:
            counted = counted_rows(backbone, args.method)
            print(f"{backbone}:")
            if not args.count:
                plain = load_plain_model(backbone, None).to(device, dtype).requires_grad_(False)
                tflops = measure(counted, plain, args, device, dtype)
                print(f"{args.batch} clips, {dtype}, {machine}; a product has {tflops:.3g} TFLOP/s")
            print(*table([row for _, row in counted]), "", sep="\n")


if __name__ == "__main__":
    main()
