"""Frames to grid-like framesets, and the 3-D position code of their patches.

    python grid.py clip.mp4 grid.png        # writes what the two paths see, as a picture

The temporal path (section 3 of the paper) never attends across images. It sees time because 16
consecutive frames, each shrunk by 4 x 4, are tiled into one image of the original size: attention
between two patches of that image is attention between two moments. This file knows only tensors,
and at its end how to draw them for people.
"""
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

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
WIDTH, GAP = 1000, 8  # pixels

def panel(title, height):
    """A white stripe of a picture with its title → (image, its pen)."""
    image = Image.new("RGB", (WIDTH, height + 36), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(15)
    pen.text((GAP, GAP), title, "black")
    return image, pen

def row(title, pictures, captions):
    """(n, H, W, 3) uint8 side by side. captions: n lists of texts, each written over its picture as on a square board."""
    n, H, W, _ = pictures.shape
    w = (WIDTH - GAP) // max(n, 2) - GAP
    h = H * w // W
    image, pen = panel(title, h)
    for i, (picture, texts) in enumerate(zip(pictures, captions)):
        left, side = GAP + i * (w + GAP), math.isqrt(len(texts))
        image.paste(Image.fromarray(np.ascontiguousarray(picture)).resize((w, h)), (left, 32))
        for j, text in enumerate(texts):
            at = (left + j % side * w // side + 4, 32 + j // side * h // side + 2)
            pen.text(at, text, "white", stroke_width=2, stroke_fill="black")
    return image

def stack(panels):
    """Panels under each other, as one picture."""
    whole = Image.new("RGB", (WIDTH, sum(p.height for p in panels) + GAP), "white")
    for i, p in enumerate(panels):
        whole.paste(p, (0, sum(above.height for above in panels[:i])))
    return whole

def main(argv=None):
    import av
    from torchvision.transforms import v2

    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 2:
        raise SystemExit("usage: python grid.py VIDEO PICTURE.png    (frames of the video, as the two paths see them)")
    try:
        with av.open("file:" + argv[0]) as container:
            frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise SystemExit(f"grid.py: cannot read {argv[0]} as a video: {error}")
    if not frames:
        raise SystemExit(f"grid.py: {argv[0]} has no frames")
    T = 32 if len(frames) >= 32 else 16
    numbers = [i * len(frames) // T for i in range(T)]
    video = torch.stack([frames[i] for i in numbers]).permute(0, 3, 1, 2)  # (T, 3, H, W)
    video = v2.functional.center_crop(video, 2 * [min(video.shape[-2:]) // 4 * 4])
    show, texts = lambda images: images.permute(0, 2, 3, 1).numpy(), [str(i) for i in numbers]
    picture = stack([
        row(f"spatial path: 8 of the {T} frames, each an image", show(video[::T // 8]), [[text] for text in texts[::T // 8]]),
        row(f"temporal path: all {T} frames, shrunk by 4, 16 of them an image", show(frameset(video[None])[0]),
            [texts[i:i + 16] for i in range(0, T, 16)])])
    try:
        picture.save(argv[1])
    except (OSError, ValueError) as error:  # no such folder; no such kind of picture
        raise SystemExit(f"grid.py: cannot write {argv[1]}: {error}")
    print(f"{argv[1]}: {T} of {len(frames)} frames, with their numbers, as the two paths see them")

if __name__ == "__main__":
    main()
