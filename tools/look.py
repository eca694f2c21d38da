"""Pictures: where a model looks in a clip, what it confuses, how a run went.

python -m tools.look attention CKPT clip.mp4 look.png
python -m tools.look classes CKPT classes.png [options of evaluate.py]
python -m tools.look curves runs/demo-dualpath-s0 curves.png
"""

import argparse
import csv
import json
import math
import os
import tempfile
from collections import Counter

import torch
from torch import nn
from torch.nn.functional import avg_pool2d

import evaluate
from data import VideoViews
from grid import frameset
from model import load_checkpoint
from support import options
from support.processes import UserError, one_sentence
from tools.figures import check_writable, draw, short, show_bars, show_curves, show_images

MOST = 20  # bars


# ---------------------------------------------------------------- attention over a clip
def attention(model, video):
    """Where the class tokens look in the last block, as shares of what goes to patches.

    video: (1, T, 3, H, W) uint8 → (T_s, rows, cols) of frames and (T_G, rows, cols) of framesets,
    in patches, the mean over heads; a path that is not there has no rows. For a model on the CPU,
    in float32, where nn.MultiheadAttention itself is run: it can return its weights.
    """
    attn = model.visual.blocks[-1].attn
    size = [side // model.visual.patch_size[0] for side in model.visual.image_size]
    if not isinstance(attn, nn.MultiheadAttention) or video.device.type != "cpu":
        raise UserError(
            f"the attention of {model.config['backbone']!r} on {video.device} cannot return its"
            " weights: no picture"
        )
    seen = []

    def request_weights(module, inputs, kwargs):
        return inputs, dict(kwargs, need_weights=True)

    def keep_weights(module, inputs, outputs):
        seen.append(outputs[1])  # (images, tokens, tokens)

    requesting = attn.register_forward_pre_hook(request_weights, with_kwargs=True)
    keeping = attn.register_forward_hook(keep_weights)
    with requesting, keeping, torch.no_grad():
        model.eval()(video)
    if not seen:
        raise UserError(f"{model.config['method']} computes attention without weights: no picture")
    # AIM's last call is over space; VPT's prompts come last.
    patches = seen[-1][:, 0, 1 : 1 + math.prod(size)].unflatten(1, size)
    shares = patches / patches.sum((1, 2), keepdim=True)
    frames = model.spatial_frames if model.spatial else 0
    return shares.tensor_split([frames])


def shares_of_moments(framesets, rows, cols):
    """(T_G, patch rows, patch cols) → the share of each little frame (T_G · rows · cols,).

    Patches are cut into pieces first, since some lie in two frames.
    """
    pieces = framesets.repeat_interleave(rows, 1).repeat_interleave(cols, 2)
    return avg_pool2d(pieces, framesets.shape[1:], divisor_override=rows * cols).flatten()


def attention_stripes(model, view, numbers):
    """The stripes of both paths. view: (T, 3, H, W) uint8; numbers: its frames'."""
    rows, cols = model.config["rows"], model.config["cols"]
    frames, framesets = attention(model, view[None])
    step, stripes = model.num_frames // model.spatial_frames, []
    if len(frames):
        title = f"spatial path: {len(frames)} frames, each an image"
        stripes.append((title, view[::step], numbers[::step], 1, 1, frames))
    if len(framesets):
        title = (
            f"temporal path: {rows * cols} shrunken frames an image, and each one's share of the"
            " attention"
        )
        shares = shares_of_moments(framesets, rows, cols) / len(framesets)
        texts = [f"{i}: {100 * share:.0f} %" for i, share in zip(numbers, shares)]
        images = frameset(view[None], rows, cols)[0]
        stripes.append((title, images, texts, rows, cols, framesets))
    return [(min(4, 9.8 / len(stripe[1])) + 0.3, show_images, *stripe) for stripe in stripes]


def draw_attention(args):
    """The middle one of a video's views, and what is made of all of them."""
    model, content = load_checkpoint(args.checkpoint, args.backbone, args.pretrained)
    settings, T = content["run"], model.num_frames
    test_views = VideoViews(
        [(args.video, -1)],
        T,
        model.visual.image_size[0],
        settings["sampling"],
        settings["test_stride"],
        args.views or tuple(settings["views"]),
    )
    views = test_views[0]
    if views.error:
        raise UserError(views.error)
    check_writable(args.picture)
    row = evaluate.predict(model, test_views, torch.device("cpu"))[0]
    middle = len(views.pixels) // 2
    clip = len(views.numbers) // T // 2  # of which the middle view is a crop
    numbers = views.numbers[clip * T : (clip + 1) * T]
    names = [(settings["classes"][c], score) for c, score in zip(row.classes, row.scores)]
    title = f"the likeliest classes; views: {len(views.pixels)}"
    draw(
        args.picture,
        "where the class tokens look (bright), with the frames' numbers:"
        f" {os.path.basename(args.video)}",
        *attention_stripes(model, views.pixels[middle], numbers),
        (0.25 * len(names) + 0.3, show_bars, title, names),
    )


# ---------------------------------------------------------------- classes of a data set
def draw_classes(args):
    """Evaluate, and draw the table that evaluate.py writes."""
    if draws():
        check_writable(args.picture)
    with tempfile.TemporaryDirectory() as folder:
        table = args.predictions or os.path.join(folder, "predictions.csv")
        evaluate.main([args.checkpoint, "--predictions", table, *args.rest])
        if not draws():
            return
        with open(table, newline="", errors="surrogateescape") as file:
            rows = [(row["label"], row["class1"]) for row in csv.DictReader(file)]
    right = sum(label == guess for label, guess in rows)
    title = f"top-1 {100 * right / len(rows):.2f} %: {args.checkpoint}"
    draw(args.picture, title, *class_stripes(rows))


def draws():
    """Of several processes, the first draws."""
    return os.environ.get("RANK", "0") == "0"


def class_stripes(rows):
    """Accuracies of classes, the lowest first, and the most frequent confusions.

    rows: (label, likeliest class or None or "" if the video is unreadable) of each video.
    """
    videos, pairs = Counter(label for label, _ in rows), Counter(rows)
    accuracies = [(f"{short(name, 45)} ({n})", pairs[name, name] / n) for name, n in videos.items()]
    accuracies = sorted(accuracies, key=lambda bar: bar[1])[:MOST]
    confusions = []
    for (label, guess), n in pairs.most_common():
        if guess and guess != label:
            text = f"{short(label, 45)} → {short(guess, 45)} ({n} of {videos[label]})"
            confusions.append((text, n / videos[label]))
    above = f"top-1 of each class (videos), the lowest {len(accuracies)} of {len(videos)}"
    below = "most frequent confusions"
    return [
        (0.25 * len(bars) + 0.6, show_bars, title, bars)
        for title, bars in ((above, accuracies), (below, confusions[:MOST]))
    ]


# ---------------------------------------------------------------- curves of a run
def draw_curves(args):
    path = os.path.join(args.run, "log.jsonl")
    if not os.path.isfile(path):
        raise UserError(f"there is no log {path}: the folder of a run has one")
    with open(path) as file:
        log = [json.loads(line) for line in file]
    if not log:
        raise UserError(f"{path} has no epoch yet")
    draw(args.picture, args.run, (3, show_curves, log))


def picture(path):
    """matplotlib would add a missing suffix, and write to another file than it was told."""
    if not os.path.splitext(path)[1]:
        raise argparse.ArgumentTypeError(f"{path!r} is no name of a picture, such as a.png")
    return path


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.look", description="Pictures of models and runs."
    )
    kinds = parser.add_subparsers(required=True)
    kind = kinds.add_parser("attention", help="where a model looks in a clip")
    kind.set_defaults(act=draw_attention)
    add = kind.add_argument
    add("checkpoint", help="best.pt or last.pt of a run")
    add("video")
    add("picture", type=picture, metavar="FILE.png")
    add("--views", type=options.views, metavar="CLIPSxCROPS", help="of which the middle is drawn")
    add("--backbone", metavar="NAME", help="where the image model is, if not where it was")
    add("--pretrained", metavar="TAG", help="likewise, the file or tag of its weights")
    kind = kinds.add_parser("classes", help="accuracy of each class, confusions")
    kind.set_defaults(act=draw_classes)
    add = kind.add_argument
    add("checkpoint", help="best.pt or last.pt of a run")
    add("picture", type=picture, metavar="FILE.png")
    add("--predictions", metavar="FILE.csv", help="keep the table; other options: evaluate.py's")
    kind = kinds.add_parser("curves", help="loss, learning rate and accuracy of a run")
    kind.set_defaults(act=draw_curves)
    add = kind.add_argument
    add("run", help="its folder")
    add("picture", type=picture, metavar="FILE.png")
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.act is not draw_classes:
        parser.error(f"unknown: {' '.join(args.rest)}")
    return args


def main(argv=None):
    args = parse(argv)
    with one_sentence("look.py"):
        if draws() or args.act is draw_classes:  # an evaluation needs all processes
            args.act(args)
        if draws():
            print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
