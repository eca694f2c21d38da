"""The options of train.py, and what its sister scripts share of them."""

import argparse
import contextlib
import math
import os
import re
import sys

from support.datasets import SOURCES


class HelpLines(argparse.ArgumentDefaultsHelpFormatter):
    """A line an option, with its default where that says something."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=131)

    def _get_help_string(self, action):
        switch = isinstance(action, argparse.BooleanOptionalAction)
        if action.default is None or (action.default is False and not switch):  # "not given"
            return action.help
        if isinstance(action.default, tuple):
            separator = " " if action.nargs else "x"
            return f"{action.help} (default: {separator.join(map(str, action.default))})"
        return super()._get_help_string(action)


# ---------------------------------------------------------------- types of values
def number(least, most=math.inf, kind=float):
    """A type for argparse: finite numbers from `least` to `most`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most and math.isfinite(value):
                return value
        whole = "whole " if kind is int else ""
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number {limits}")

    return parse


def at_least(least):
    return number(least, kind=int)


def views(text):
    """'3x1' → (3 clips, 1 crop)."""
    if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not CLIPSxCROPS, such as 3x1")
    clips, crops = text.split("x")
    return int(clips), int(crops)


# ---------------------------------------------------------------- shared options
def add_data_options(add, default=None, note="", split=" (1)"):
    names = ", ".join(SOURCES)
    add("--data", choices=SOURCES, default=default, metavar="NAME", help=f"{names}{note}")
    add("--root", help=f"folder of the data{note or ' (data/NAME)'}")
    add("--split", type=int, choices=(1, 2, 3), help=f"HMDB51's{note or split}")


def add_machine_options(add):
    workers = min(8, os.cpu_count())
    add("--workers", type=at_least(0), default=workers, metavar="N", help="that read videos")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="mixed precision; auto: on CUDA GPUs",
    )
    add(
        "--device",
        choices=("auto", "cuda", "mps", "cpu"),
        default="auto",
        help="cuda is unmeasured, mps untested",
    )


# ---------------------------------------------------------------- train.py
def training_options(argv, methods, recipes):
    """argv (None: the command line's) → the options, defaults from the data set's recipe.

    methods: names; recipes: {data set: {option: value}}.
    """
    parser = argparse.ArgumentParser(
        formatter_class=HelpLines,
        usage="python train.py [--data NAME] [options]    (defaults in brackets; with --data NAME"
        " --help, that recipe's)",
    )
    add_run_options(parser)
    add_model_options(parser.add_argument_group("model").add_argument, methods)
    add_clip_options(parser.add_argument_group("clips").add_argument)
    add_optimisation_options(parser.add_argument_group("optimisation").add_argument)
    add_machine_options(parser.add_argument_group("machine").add_argument)

    words = sys.argv[1:] if argv is None else argv
    words_without_help = [word for word in words if word not in ("-h", "--help")]
    name = parser.parse_known_args(words_without_help)[0].data
    parser.set_defaults(**recipes[name])
    args = parser.parse_args(argv)
    if args.pretrained == "none":
        args.pretrained = None
    args.stride = tuple(args.stride)
    args.root = args.root or os.path.join("data", args.data)
    args.out = args.out or os.path.join("runs", run_name(args))
    return args


def run_name(args):
    split = f"split{args.split}" if args.split else None
    paths = args.paths if args.paths != "both" else None
    parts = [args.data, split, args.method, paths, f"s{args.seed}"]
    return "-".join(filter(None, parts))


def add_run_options(parser):
    add = parser.add_argument
    add_data_options(add, default="demo")
    add("--out", help="folder of the run (runs/NAME[-SPLIT]-METHOD[-PATHS]-sSEED)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CKPT",
        help="continue the run in --out, or that of CKPT",
    )
    either.add_argument("--overwrite", action="store_true", help="delete the run in --out first")
    add("--init", metavar="CKPT", help="start from this run's weights, with a new head")
    add("--limit", type=at_least(1), metavar="N", help="the first N videos of each list (all)")
    add(
        "--seed",
        type=number(0, 2**63 - 1, int),
        default=0,
        metavar="N",
        help="of order, augmentation, dropout and new weights",
    )


def add_model_options(add, methods):
    add("--method", choices=methods, default="dualpath", metavar="NAME", help=", ".join(methods))
    add(
        "--paths",
        choices=("both", "spatial", "temporal"),
        default="both",
        help="DualPath's, for the ablation",
    )
    add(
        "--backbone",
        default="ViT-B-16-quickgelu",
        metavar="NAME",
        help="open_clip model, swin_t, swin_s, swin_b, local-dir:DIR, or tiny",
    )
    add(
        "--pretrained",
        default="openai",
        metavar="TAG",
        help="open_clip tag (swins: imagenet1k), a file, or none for random weights",
    )
    add("--frames", type=at_least(1), default=32, metavar="N", help="frames per clip, T")
    add(
        "--spatial-frames",
        type=at_least(1),
        default=8,
        metavar="N",
        help="of these, those seen at full size, T_s",
    )
    add(
        "--size",
        type=at_least(1),
        metavar="PIXELS",
        help="of a side of a frame (the image model's own)",
    )
    add(
        "--bottleneck",
        type=at_least(1),
        metavar="N",
        help="width of the adapters; of vpt, number of prompts (the method's own)",
    )
    add("--dropout", type=number(0, 1), default=0.1, metavar="P", help="in the adapters")
    add_method_options(add)


def add_method_options(add):
    """What one method alone has."""
    add(
        "--before",
        choices=("mha", "mlp", "both"),
        default="mha",
        help="where st_adapter has its adapters",
    )
    add(
        "--aim-scale",
        type=float,
        default=0.5,
        metavar="X",
        help="weight of AIM's adapter parallel to the MLP",
    )
    add(
        "--aim-temporal-adapters",
        type=int,
        choices=(1, 2),
        default=1,
        help="AIM: 2 adds one before the attention over frames",
    )
    add(
        "--position-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="of DualPath's temporal position code",
    )
    switch = argparse.BooleanOptionalAction
    add("--pre-attention-adapter", action=switch, default=False, help="DualPath's A_t0")
    add("--serial-skip", action=switch, default=False, help="DualPath: z + h + A(h)")


def add_clip_options(add):
    add(
        "--sampling",
        choices=("dense", "uniform"),
        default="uniform",
        help="frames at a stride, or one per segment",
    )
    add(
        "--stride",
        type=at_least(1),
        nargs="+",
        metavar="N",
        default=(4,),
        help="for dense sampling; of several, one is drawn per clip",
    )
    add("--test-stride", type=at_least(1), default=4, metavar="N", help="the same in testing")
    add(
        "--augment",
        choices=("rand", "crop", "translate"),
        default="rand",
        help="rand: crops and RandAugment; crop: crops alone; translate: shifts alone",
    )
    add(
        "--crop-area",
        type=number(0, 1),
        default=0.08,
        metavar="X",
        help="least share of a frame that a crop keeps",
    )
    flip = argparse.BooleanOptionalAction
    add("--flip", action=flip, default=True, help="mirror half of the clips")
    add(
        "--erasing",
        type=number(0, 1),
        default=0.0,
        metavar="P",
        help="probability of random erasing",
    )
    add(
        "--views",
        type=views,
        metavar="CLIPSxCROPS",
        default=(3, 1),
        help="test views of evaluate.py",
    )


def add_optimisation_options(add):
    add("--epochs", type=at_least(1), default=30, metavar="N", help="of all training clips")
    add("--warmup", type=number(0), default=3, metavar="X", help="epochs of rising learning rate")
    add(
        "--batch",
        type=at_least(1),
        default=64,
        metavar="N",
        help="clips per step, over all processes",
    )
    add(
        "--micro-batch",
        type=at_least(1),
        metavar="N",
        help="clips per forward and process; the gradients add up (all)",
    )
    add("--lr", type=number(0), default=1e-3, metavar="X", help="base learning rate, per 256 clips")
    add("--weight-decay", type=number(0), default=0.05, metavar="X", help="of matrices alone")
    add("--clip-grad", type=number(0), metavar="X", help="largest norm of the gradient (no limit)")
    add(
        "--checkpoint-activations",
        action="store_true",
        help="less memory, more time: each block runs forward twice",
    )
    add(
        "--save-every",
        type=number(0),
        default=10,
        metavar="MINUTES",
        help="between checkpoints within an epoch",
    )
