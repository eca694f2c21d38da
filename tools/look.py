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


def new_figure(title, height):
    from matplotlib.figure import Figure  # here, for it takes half a second

    figure = Figure((10, height + 0.4), 100, layout="constrained")  # inches
    figure.suptitle(title, fontsize=11)
    return figure


# ---------------------------------------------------------------- what the two paths see
def draw_paths(title, view, config, heats=(None, None)):
    """The images that a model samples, a full frame as large as a frameset.

    view: data.Views of one view. heats: of frames and of framesets, (n, any, any), laid on top.
    """
    T, T_s, rows, cols = config.frames, config.spatial_frames, config.rows, config.cols
    grids, numbers = [], view.numbers  # (images, captions, heat) of each path
    if config.method != "dualpath" or config.paths != "temporal":
        captions = [f"spatial path: frame {number}" for number in numbers[:: T // T_s]]
        grids.append((view.pixels[0, :: T // T_s], captions, heats[0]))
    if config.method == "dualpath" and config.paths != "spatial":
        lines = [" ".join(f"{n:5d}" for n in numbers[i : i + cols]) for i in range(0, T, cols)]
        captions = ["\n".join(lines[i : i + rows]) for i in range(0, len(lines), rows)]
        captions = [f"temporal path: frames\n{numbers}" for numbers in captions]
        grids.append((frameset(view.pixels, rows, cols)[0], captions, heats[1]))
    heights = [math.ceil(len(images) / ACROSS) for images, _, _ in grids]
    figure = new_figure(title, 3 * sum(heights))
    parts = figure.subfigures(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, height, (images, captions, heat) in zip(parts, heights, grids):
        every = part.subplots(height, ACROSS, squeeze=False).flatten()
        for axes in every:
            axes.axis("off")
        for i, axes in enumerate(every[: len(images)]):
            axes.imshow(images[i].permute(1, 2, 0).numpy(), extent=(0, 1, 0, 1))
            axes.set_title(captions[i], fontsize=7, family="monospace", pad=3)
            if heat is not None:
                glow = (heat[i] / heat.max()).numpy()
                axes.imshow(glow, "inferno", alpha=0.8 * glow**0.5, extent=(0, 1, 0, 1))
    return figure


def central_view(video, num_frames, size, sampling="uniform", stride=1):
    """data.Views of a video, with pixels (1, T, 3, S, S) uint8 and the frames' numbers."""
    view = VideoViews([(video, -1)], num_frames, size, sampling, stride)[0]
    if view.error:
        raise UserError(view.error)
    return view


def draw_framesets(args):
    """By the paper's numbers: 32 frames of 224 px, one from each segment of the video."""
    config = Config()
    view = central_view(args.video, config.frames, 224)
    title = f"what DualPath samples of {os.path.basename(args.video)}"
    return draw_paths(title, view, config)


# ---------------------------------------------------------------- attention over a clip
def attention(model, video):
    """Where the class tokens look in the last block, as shares of what goes to patches.

    video: (1, T, 3, H, W) uint8 → (T_s, rows, cols) of frames and (T_G, rows, cols) of framesets,
    in patches, the mean over heads; a path that is not there has no rows. For a model on the CPU,
    in float32, where nn.MultiheadAttention itself is run: it can return its weights.
    """
    attn, seen = model.visual.blocks[-1].attn, []
    if not isinstance(attn, nn.MultiheadAttention):
        raise UserError(f"attention of {model.config.backbone!r} cannot return its weights")

    def forward(*inputs, **options):
        output, weights = type(attn).forward(attn, *inputs, **options | {"need_weights": True})
        seen.append(weights)  # (images, tokens, tokens)
        return output, None

    attn.forward = forward
    with torch.no_grad():
        model.eval()(video)
    del attn.forward
    # AIM's last call is over space; VPT's prompts come last.
    size = [side // model.visual.patch_size[0] for side in model.visual.image_size]
    patches = seen[-1][:, 0, 1 : 1 + math.prod(size)].unflatten(1, size)
    shares = patches / patches.sum((1, 2), keepdim=True)
    return shares.tensor_split([model.config.spatial_frames if model.spatial else 0])


def draw_attention(args):
    """The central view of a video, and the likeliest classes."""
    model, content = load_checkpoint(args.checkpoint)
    config, run, size = model.config, content["run"], model.visual.image_size[0]
    view = central_view(args.video, config.frames, size, run["sampling"], run["test_stride"])
    heats = attention(model, view.pixels)
    with torch.no_grad():
        scores, order = model(view.pixels)[0].softmax(-1).sort(descending=True)
    likeliest = [f"{run['classes'][c]} {100 * p:.1f} %" for p, c in zip(scores[:5], order)]
    title = f"where the class tokens look (bright): {os.path.basename(args.video)}"
    title = f"{title}\n{', '.join(likeliest)}"
    return draw_paths(title, view, config, heats)


# ---------------------------------------------------------------- classes of a data set
def draw_classes(args):
    """Accuracies of classes, the lowest first, and the most frequent confusions."""
    with open(args.predictions, newline="", errors="replace") as file:
        rows = [(row["label"], row["class1"]) for row in csv.DictReader(file)]
    videos, pairs = Counter(label for label, _ in rows), Counter(rows)
    accuracies = [(pairs[name, name] / n, f"{name:.60} ({n})") for name, n in videos.items()]
    accuracies = sorted(accuracies, key=lambda bar: bar[0])[:MOST]
    confusions = [
        (n / videos[label], f"{label:.40} → {guess:.40} ({n} of {videos[label]})")
        for (label, guess), n in pairs.most_common()
        if guess and guess != label  # there is none of an unreadable video
    ]
    lowest = f"top-1 of each class (videos), the lowest {len(accuracies)} of {len(videos)}"
    charts = {lowest: accuracies, "most frequent confusions": confusions[:MOST]}
    heights = [0.25 * len(bars) + 0.5 for bars in charts.values()]

    top1 = sum(label == guess for label, guess in rows) / len(rows)
    figure = new_figure(f"top-1 {100 * top1:.2f} %: {args.predictions}", sum(heights))
    every = figure.subplots(2, 1, height_ratios=heights)  # with one zero line
    for axes, (title, bars) in zip(every, charts.items()):
        drawn = axes.barh(range(len(bars)), [share for share, _ in bars], color="tab:orange")
        axes.bar_label(drawn, [f"{100 * share:.1f} %" for share, _ in bars], padding=3)
        axes.set_title(title, fontsize=10)
        axes.set(xlim=(0, 1.1), xticks=[], ylim=(max(1, len(bars)) - 0.5, -0.5))
        axes.set_yticks(range(len(bars)), [name for _, name in bars])
        axes.spines[:].set_visible(False)
    return figure


# ---------------------------------------------------------------- curves of a run
def draw_curves(args):
    with open(os.path.join(args.run, "log.jsonl")) as file:
        log = [json.loads(line) for line in file]
    figure = new_figure(args.run, 3)
    for axes, key in zip(figure.subplots(1, 3), ("train_loss", "lr", "val_top1")):
        axes.plot([line["epoch"] for line in log], [line[key] for line in log], ".-", label=key)
        axes.legend()
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


# ---------------------------------------------------------------- as a script
def parse(argv):
    parser = argparse.ArgumentParser("python -m tools.look")
    kinds = parser.add_subparsers(required=True)
    for name, draw, inputs, help in (
        ("framesets", draw_framesets, ["video"], "what the two paths see of a video"),
        ("attention", draw_attention, ["checkpoint", "video"], "where a model looks in a clip"),
        ("classes", draw_classes, ["predictions"], "accuracy of each class, confusions"),
        ("curves", draw_curves, ["run"], "loss, learning rate and accuracy of a run"),
    ):
        kind = kinds.add_parser(name, help=help)
        kind.set_defaults(draw=draw)
        for argument in inputs:
            kind.add_argument(argument)
        kind.add_argument("picture", metavar="FILE.png")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    with one_sentence("look.py"):
        args.draw(args).savefig(args.picture)
        print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
