"""Pictures: what the two paths see, where a model looks, what it confuses, how a run went.

python -m tools.look framesets clip.mp4 framesets.png
python -m tools.look attention CKPT clip.mp4 look.png
python -m tools.look classes predictions.csv classes.png  # of evaluate.py --predictions
python -m tools.look curves runs/demo-dualpath-s0 curves.png
"""

import argparse
import csv
import json
import math
import os
from collections import Counter

import torch
from torch import nn

from data import VideoViews
from grid import frameset
from model import Config, load_checkpoint
from support.processes import UserError, one_sentence

MOST = 20  # bars
ACROSS = 4  # images in a row


# ---------------------------------------------------------------- matplotlib
def draw(path, title, *stripes):
    """Write stripes, one below the other: (its height in inches, what fills it) each."""
    try:
        from matplotlib.figure import Figure  # only to draw: it takes half a second
    except ImportError as error:
        raise UserError(
            "python -m tools.look needs matplotlib: pip install -r tools/requirements.txt"
        ) from error
    heights = [height for height, _ in stripes]
    figure = Figure((10, sum(heights) + 0.4), 100, layout="constrained")
    figure.suptitle(title, fontsize=11)
    parts = figure.subfigures(len(stripes), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (_, fill), part in zip(stripes, parts):
        fill(part)
    try:
        figure.savefig(path)
    except ValueError as error:  # no such kind of picture
        raise UserError(f"cannot write {path}: {error}") from error
    print(f"wrote {path}")


def images_stripe(title, images, captions, heat=None, rows=1, cols=1):
    """Images (n, 3, H, W) uint8, all in one size, in rows of four; captions stand above them.

    heat: (n, any, any), laid on top. rows, cols: cells of each image, with a border around each.
    """
    down = math.ceil(len(images) / ACROSS)
    H, W = images.shape[-2:]

    def fill(part):
        part.suptitle(title, fontsize=10)
        every = part.subplots(down, ACROSS, squeeze=False).flatten()
        for i, axes in enumerate(every[: len(images)]):
            axes.imshow(images[i].permute(1, 2, 0).numpy())
            if heat is not None:
                glow = (heat[i] / heat.max()).numpy()
                extent = (-0.5, W - 0.5, H - 0.5, -0.5)
                axes.imshow(glow, "inferno", alpha=0.8 * glow**0.5, extent=extent)
            for row in range(1, rows):
                axes.axhline(row * H / rows - 0.5, color="white", lw=0.7)
            for col in range(1, cols):
                axes.axvline(col * W / cols - 0.5, color="white", lw=0.7)
            axes.set_title(captions[i], fontsize=7, family="monospace", pad=3)
        for axes in every:
            axes.axis("off")

    lines = captions[0].count("\n") + 1
    return down * (2.5 + 0.12 * lines) + 0.3, fill


def bars_stripe(*charts):
    """Horizontal bars with percentages, the first on top; all charts have one zero line.

    charts: (title, [(name, number in [0, 1])]) each.
    """
    heights = [0.25 * len(bars) + 0.5 for _, bars in charts]

    def fill(part):
        every = part.subplots(len(charts), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, bars) in zip(every, charts):
            drawn = axes.barh(range(len(bars)), [share for _, share in bars], color="tab:orange")
            axes.bar_label(drawn, [f"{100 * s:.1f} %" for _, s in bars], padding=3, fontsize=8)
            axes.set_title(title, fontsize=10)
            axes.set(xlim=(0, 1.1), xticks=[], ylim=(max(1, len(bars)) - 0.5, -0.5))
            axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
            axes.spines[:].set_visible(False)

    return sum(heights), fill


# ---------------------------------------------------------------- what the two paths see
def path_stripes(view, numbers, config, heat=(None, None)):
    """The images that a model samples, a full frame as large as a frameset.

    view: (T, 3, S, S) uint8; numbers: its frames'. heat: of frames and of framesets.
    """
    T, T_s, rows, cols = len(view), config.spatial_frames, config.rows, config.cols
    stripes = []
    if config.method != "dualpath" or config.paths != "temporal":
        title = f"spatial path: {T_s} of {T} frames, each an image"
        captions = [f"frame {number}" for number in numbers[:: T // T_s]]
        stripes.append(images_stripe(title, view[:: T // T_s], captions, heat[0]))
    if config.method == "dualpath" and config.paths != "spatial":
        title = f"temporal path: {T} frames, {rows * cols} in an image of the same size"
        lines = [" ".join(f"{n:5d}" for n in numbers[i : i + cols]) for i in range(0, T, cols)]
        captions = ["\n".join(lines[i : i + rows]) for i in range(0, len(lines), rows)]
        images = frameset(view[None], rows, cols)[0]
        stripes.append(images_stripe(title, images, captions, heat[1], rows, cols))
    return stripes


def read_view(video, num_frames, size, sampling, stride):
    """The central view of a video, (1, T, 3, S, S) uint8; its frames' numbers."""
    view = VideoViews([(video, -1)], num_frames, size, sampling, stride)[0]
    if view.error:
        raise UserError(view.error)
    return view.pixels, view.numbers


def draw_framesets(args):
    """By the paper's numbers: 32 frames of 224 px, one from each segment of the video."""
    config = Config()
    view, numbers = read_view(args.video, config.frames, 224, "uniform", 1)
    title = f"what DualPath samples of {os.path.basename(args.video)}"
    draw(args.picture, title, *path_stripes(view[0], numbers, config))


# ---------------------------------------------------------------- attention over a clip
def attention(model, video):
    """Where the class tokens look in the last block, as shares of what goes to patches.

    video: (1, T, 3, H, W) uint8 → (T_s, rows, cols) of frames and (T_G, rows, cols) of framesets,
    in patches, the mean over heads; a path that is not there has no rows. For a model on the CPU,
    in float32, where nn.MultiheadAttention itself is run: it can return its weights.
    """
    attn, seen = model.visual.blocks[-1].attn, []
    if not isinstance(attn, nn.MultiheadAttention):
        raise UserError(
            f"the attention of {model.config.backbone!r} cannot return its weights: no picture"
        )

    def request_weights(module, inputs, kwargs):
        return inputs, dict(kwargs, need_weights=True)

    def keep_weights(module, inputs, outputs):
        seen.append(outputs[1])  # (images, tokens, tokens)

    requesting = attn.register_forward_pre_hook(request_weights, with_kwargs=True)
    with requesting, attn.register_forward_hook(keep_weights), torch.no_grad():
        model.eval()(video)
    # AIM's last call is over space; VPT's prompts come last.
    size = [side // model.visual.patch_size[0] for side in model.visual.image_size]
    patches = seen[-1][:, 0, 1 : 1 + math.prod(size)].unflatten(1, size)
    shares = patches / patches.sum((1, 2), keepdim=True)
    return shares.tensor_split([model.config.spatial_frames if model.spatial else 0])


def draw_attention(args):
    """The central view of a video, and what is made of it."""
    model, content = load_checkpoint(args.checkpoint, args.backbone, args.pretrained)
    config, run = model.config, content["run"]
    size = model.visual.image_size[0]
    sampling = run["sampling"], run["test_stride"]
    view, numbers = read_view(args.video, config.frames, size, *sampling)
    with torch.no_grad():
        scores, order = model(view)[0].softmax(-1).sort(descending=True)
    bars = [(run["classes"][c], score) for c, score in zip(order[:5].tolist(), scores.tolist())]
    draw(
        args.picture,
        f"where the class tokens look (bright): {os.path.basename(args.video)}",
        *path_stripes(view[0], numbers, config, attention(model, view)),
        bars_stripe((f"the likeliest classes; true: {args.label or 'not given'}", bars)),
    )


# ---------------------------------------------------------------- classes of a data set
def draw_classes(args):
    """Accuracies of classes, the lowest first, and the most frequent confusions."""
    with open(args.predictions, newline="", errors="replace") as file:
        rows = [(row["label"], row["class1"]) for row in csv.DictReader(file)]
    videos, pairs = Counter(label for label, _ in rows), Counter(rows)
    accuracies = [(f"{name:.60} ({n})", pairs[name, name] / n) for name, n in videos.items()]
    accuracies = sorted(accuracies, key=lambda bar: bar[1])[:MOST]
    confusions = []
    for (label, guess), n in pairs.most_common():
        if guess and guess != label:  # there is none of an unreadable video
            text = f"{label:.40} → {guess:.40} ({n} of {videos[label]})"
            confusions.append((text, n / videos[label]))
    lowest = f"top-1 of each class (videos), the lowest {len(accuracies)} of {len(videos)}"
    charts = (lowest, accuracies), ("most frequent confusions", confusions[:MOST])
    top1 = sum(label == guess for label, guess in rows) / len(rows)
    draw(args.picture, f"top-1 {100 * top1:.2f} %: {args.predictions}", bars_stripe(*charts))


# ---------------------------------------------------------------- curves of a run
def draw_curves(args):
    with open(os.path.join(args.run, "log.jsonl")) as file:
        log = [json.loads(line) for line in file]

    def fill(part):
        for axes, key in zip(part.subplots(1, 3), ("train_loss", "lr", "val_top1")):
            axes.plot([line["epoch"] for line in log], [line[key] for line in log], ".-", label=key)
            axes.legend()
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)

    draw(args.picture, args.run, (3, fill))


# ---------------------------------------------------------------- as a script
def parse(argv):
    parser = argparse.ArgumentParser("python -m tools.look")
    kinds = parser.add_subparsers(required=True)
    for name, act, inputs, help in (
        ("framesets", draw_framesets, ["video"], "what the two paths see of a video"),
        ("attention", draw_attention, ["checkpoint", "video"], "where a model looks in a clip"),
        ("classes", draw_classes, ["predictions"], "accuracy of each class, confusions"),
        ("curves", draw_curves, ["run"], "loss, learning rate and accuracy of a run"),
    ):
        kind = kinds.add_parser(name, help=help)
        kind.set_defaults(act=act)
        for argument in inputs:
            kind.add_argument(argument)
        kind.add_argument("picture", metavar="FILE.png")
        if name == "attention":
            kind.add_argument("--label", help="the true class, to be written beside the likeliest")
            kind.add_argument("--backbone", help="where the image model is, if not where it was")
            kind.add_argument("--pretrained", help="likewise, the file or tag of its weights")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    with one_sentence("look.py"):
        args.act(args)


if __name__ == "__main__":
    main()
