"""Stripes of a picture: images with heat and captions, bars, curves. By matplotlib."""

import os

from support.processes import UserError


def matplotlib_figure():
    """matplotlib's figures; imported only to draw, since it takes half a second."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError(
            "python -m tools.look needs matplotlib: pip install -r tools/requirements.txt"
        ) from error
    matplotlib.rcParams["text.parse_math"] = False  # dollars in the names of classes and files
    return matplotlib.figure


def short(name, most):
    """A name that fits: it may be long, and hold bytes that are no text, which no font has."""
    text = name.encode(errors="replace").decode()
    return text if len(text) <= most else text[:most] + "…"


def draw(path, title, *stripes):
    """Write stripes, one below the other.

    Each is its height in inches, a function that fills it, and that function's arguments.
    """
    heights = [height for height, *_ in stripes]
    figure = matplotlib_figure().Figure((10, sum(heights) + 0.4), 100, layout="constrained")
    figure.suptitle(short(title, 100), fontsize=11)
    parts = figure.subfigures(len(stripes), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (_, fill, *arguments), part in zip(stripes, parts):
        fill(part, *arguments)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # no such folder; no such kind of picture
        raise UserError(f"cannot write {path}: {error}") from error


def check_writable(path):
    """Better refused now than after the work; a picture that is there stays until then."""
    if os.path.isfile(path):
        open(path, "ab").close()
    else:
        draw(path, "no picture: the work was cut off", (1, lambda part: None))


def show_images(part, title, images, captions, rows=1, cols=1, heat=None):
    """Images (n, 3, H, W) uint8 side by side.

    captions: one for each of their rows x cols cells. heat: (n, any, any), laid on top.
    """
    part.suptitle(title, fontsize=10)
    cells = rows * cols
    for i, axes in enumerate(part.subplots(1, len(images), squeeze=False)[0]):
        axes.imshow(images[i].permute(1, 2, 0).numpy())
        if heat is not None:
            glow = (heat[i] / heat.max()).numpy()
            extent = axes.images[0].get_extent()
            alpha = 0.8 * glow**0.5
            axes.imshow(glow, "inferno", interpolation="bilinear", alpha=alpha, extent=extent)
        for cell, text in enumerate(captions[i * cells : (i + 1) * cells]):
            write_in_cell(axes, text, cell, rows, cols)
        axes.axis("off")


def write_in_cell(axes, text, cell, rows, cols):
    """A caption in the upper left corner of a cell, counted in rows."""
    row, col = divmod(cell, cols)
    axes.text(
        (col + 0.04) / cols,
        1 - (row + 0.04) / rows,
        text,
        color="white",
        fontsize=8,
        va="top",
        transform=axes.transAxes,
        bbox={"color": "black", "alpha": 0.4, "lw": 0, "pad": 1},
    )


def show_bars(part, title, shares):
    """Horizontal bars with percentages, the first on top. shares: (name, number in [0, 1])."""
    part.suptitle(title, fontsize=10)
    axes, places = part.subplots(), range(len(shares))
    bars = axes.barh(places, [share for _, share in shares], color="tab:orange")
    percentages = [f"{100 * share:.1f} %" for _, share in shares]
    axes.bar_label(bars, percentages, padding=3, fontsize=8)
    axes.set(xlim=(0, 1.1), xticks=[], ylim=(max(1, len(shares)) - 0.5, -0.5))
    axes.set_yticks(places, [short(name, 110) for name, _ in shares], fontsize=8)
    axes.spines[:].set_visible(False)


def show_curves(part, log):
    """Loss, learning rate and accuracy over the epochs of a run's log."""
    epochs = [line["epoch"] for line in log]
    for axes, key in zip(part.subplots(1, 3), ("train_loss", "lr", "val_top1")):
        axes.plot(epochs, [line[key] for line in log], ".-")
        axes.set(title=key, xlabel="epoch")
