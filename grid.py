"""Frames to grid-like framesets, and the 3-D position code of their patches.

    python grid.py clip.mp4 grid.png        # writes what the two paths see, as a picture

The temporal path (section 3 of the paper) never attends across images. It sees time because 16 consecutive frames,
each shrunk by 4 x 4, are tiled into one image of the original size: attention between two patches of that image is
attention between two moments. This file knows only tensors, and at its end how to draw them for people.
"""
import sys
from collections import Counter

import torch
import torch.nn.functional as F

def frameset(video, rows=4, cols=4):
    """Tile each run of rows·cols consecutive frames into one image of the frames' own size.

    video: (B, T, C, H, W), floating point or uint8 → (B, T // (rows·cols), C, H, W), same dtype.
    Frames are shrunk with antialiasing and laid left to right, top to bottom, in time order.
    Raises ValueError where T, H or W does not divide.
    """
    B, T, C, H, W = video.shape
    check_divides("the number of frames", T, rows * cols)
    check_divides("the frame height", H, rows)
    check_divides("the frame width", W, cols)
    h, w, n = H // rows, W // cols, T // (rows * cols)
    small = F.interpolate(video.flatten(0, 1), size=(h, w), mode="bilinear", antialias=True)
    small = small.view(B, n, rows, cols, C, h, w)
    return small.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, n, C, H, W)  # C, (rows h), (cols w)

def check_divides(what, number, divisor):
    """Raise a ValueError that names the nearest numbers that would have worked."""
    below = number // divisor * divisor
    if number == 0 or number != below:
        nearest = f"{below} or {below + divisor}" if below else f"{divisor}"
        raise ValueError(f"{what} is {number}, which does not divide by {divisor}; the nearest that works is {nearest}")

def sincos(position, dim):
    """The usual sine-cosine code of real positions: (...,) → (..., dim), dim even, base 10000."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = position[..., None].double() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)

def position_code(num_framesets, height, width, patch, dim, rows=4, cols=4):
    """p^TP, the fixed code of every patch of every frameset → (num_framesets, patches, dim), float32.

    A pixel's code joins three: its row y and column x within its own little frame, in units of
    patches, and that frame's index t in the clip. Frames and patches need not line up (a 14 x 14
    patch grid does not divide by 4), so a patch's code is the mean over its pixels' codes. That mean
    is cheap because y depends on the pixel's row alone, x on its column alone, and t on both only
    through the little frame that the pixel is in.
    """
    d_yx = dim // 6 * 2
    d_t = dim - 2 * d_yx

    def along(size, n):
        """One axis of the image, split into n frames: each patch's code (patches, d_yx), and the
        share of each patch that lies in each frame (patches, n)."""
        frame, offset = torch.arange(size) // (size // n), torch.arange(size) % (size // n)
        place = (offset + 0.5) / patch - 0.5  # 0 in the middle of the frame's first patch
        per_patch = lambda code: code[:size // patch * patch].unflatten(0, (-1, patch)).mean(1)
        return per_patch(sincos(place, d_yx)), per_patch(F.one_hot(frame, n).double())

    y, row_share = along(height, rows)
    x, col_share = along(width, cols)
    t = sincos(torch.arange(num_framesets * rows * cols), d_t).view(num_framesets, rows, cols, d_t)
    t = torch.einsum("ir,jc,nrcd->nijd", row_share, col_share, t)
    y = y[None, :, None].expand(*t.shape[:3], d_yx)
    x = x[None, None, :].expand(*t.shape[:3], d_yx)
    return torch.cat([y, x, t], dim=-1).flatten(1, 2).float()  # (framesets, patches, dim)

# ---------------------------------------------------------------- pictures for people
# Names and paths may be long, and hold bytes that are no text, which no font can draw.
short = lambda name, most: (text := name.encode(errors="replace").decode())[:most] + "…" * (len(text) > most)

def draw(path, title, *stripes):
    """Writes stripes, one under the other; each: its height in inches, a function that fills it, its further arguments."""
    import matplotlib.figure  # only here: it takes half a second, and the processes that read videos draw nothing

    matplotlib.rcParams["text.parse_math"] = False  # dollars in the names of classes and files
    heights = [height for height, *_ in stripes]
    figure = matplotlib.figure.Figure((10, sum(heights) + 0.4), 100, layout="constrained")
    figure.suptitle(short(title, 100), fontsize=11)
    for (_, fill, *what), stripe in zip(stripes, figure.subfigures(len(stripes), 1, squeeze=False, height_ratios=heights)[:, 0]):
        fill(stripe, *what)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # no such folder; no such kind of picture
        raise OSError(f"cannot write {path}: {error}")

def show(stripe, title, images, captions, rows=1, cols=1, heat=None):
    """Images (n, 3, H, W) uint8 side by side; captions: one for each of their rows x cols cells; heat: (n, any, any), on top."""
    stripe.suptitle(title, fontsize=10)
    for i, axes in enumerate(stripe.subplots(1, len(images), squeeze=False)[0]):
        axes.imshow(images[i].permute(1, 2, 0).numpy())
        if heat is not None:
            glow = (heat[i] / heat.max()).numpy()
            axes.imshow(glow, "inferno", interpolation="bilinear", alpha=0.8 * glow**0.5, extent=axes.images[0].get_extent())
        for j, text in enumerate(captions[i * rows * cols:(i + 1) * rows * cols]):
            axes.text((j % cols + 0.04) / cols, 1 - (j // cols + 0.04) / rows, text, color="white", fontsize=8, va="top",
                      transform=axes.transAxes, bbox=dict(color="black", alpha=0.4, lw=0, pad=1))
        axes.axis("off")

def bars(stripe, title, shares):
    """Horizontal bars with their percentages, the first on top. shares: (name, number in [0, 1]) pairs."""
    stripe.suptitle(title, fontsize=10)
    axes = stripe.subplots()
    drawn = axes.barh(range(len(shares)), [share for _, share in shares], color="tab:orange")
    axes.bar_label(drawn, [f"{100 * share:.1f} %" for _, share in shares], padding=3, fontsize=8)
    axes.set(xlim=(0, 1.1), xticks=[], ylim=(max(1, len(shares)) - 0.5, -0.5))
    axes.set_yticks(range(len(shares)), [short(name, 110) for name, _ in shares], fontsize=8)
    axes.spines[:].set_visible(False)

def draw_classes(path, title, labels, guesses, names):
    """Writes a picture of the accuracies of classes, the lowest first, and of what is taken for what, the most frequent first."""
    videos, pairs = Counter(labels), Counter(zip(labels, guesses))
    names, top = [short(name, 45) for name in names], pairs.most_common()
    right = sorted([(f"{names[c]} ({n})", pairs[c, c] / n) for c, n in videos.items()], key=lambda bar: bar[1])[:20]
    wrong = [(f"{names[c]} → {names[g]} ({n} of {videos[c]})", n / videos[c]) for (c, g), n in top if g not in (c, None)]
    above, below = f"top-1 of each class (videos), the lowest {len(right)} of {len(videos)}", "what is taken for what"
    draw(path, title, *[(0.25 * len(part) + 0.6, bars, what, part) for what, part in ((above, right), (below, wrong[:20]))])

def main(argv=None):
    import data  # only here, to read a video as the models do: all else in this file knows only tensors
    from torchvision.transforms import v2

    argv, numbers = sys.argv[1:] if argv is None else argv, []
    if len(argv) != 2:
        raise SystemExit("usage: python grid.py VIDEO PICTURE.png    (frames of the video, as the two paths see them)")

    def moments(count):
        T = 32 if count >= 32 else 16
        numbers.extend(i * count // T for i in range(T))
        return numbers

    try:
        video = torch.from_numpy(data.read_frames(argv[0], moments)).permute(0, 3, 1, 2)  # (T, 3, H, W)
    except data.VideoError as error:
        raise SystemExit(f"grid.py: {error}")
    T, video = len(numbers), v2.functional.center_crop(video, 2 * [min(video.shape[-2:]) // 4 * 4])
    above = (f"spatial path: 8 of the {T} frames, each an image", video[::T // 8], numbers[::T // 8])
    below = (f"temporal path: all {T} frames, shrunk by 4, 16 of them an image", frameset(video[None])[0], numbers, 4, 4)
    try:
        draw(argv[1], argv[0], (1.5, show, *above), (5, show, *below))
    except OSError as error:
        raise SystemExit(f"grid.py: {error}")
    print(f"{argv[1]}: {T} moments of {argv[0]}, with the frames' numbers, as the two paths see them")

if __name__ == "__main__":
    main()
