"""Frames → grid-like framesets, and the 3-D position code of their patches.

    python grid.py clip.mp4 grid.png        # draws what the two paths see

The temporal path (section 3 of the paper) never attends across images. It sees time because 16
consecutive frames, each shrunk by 4 x 4, are tiled into one image of the original size: attention
between patches of different small frames is attention across time.
"""

import sys

import torch
import torch.nn.functional as F

from support.pictures import numbered, square, write_picture
from support.processes import one_sentence
from support.video import read_frames


def frameset(video, rows=4, cols=4):
    """Tile each run of rows·cols consecutive frames into one image of the frames' own size.

    video: (B, T, C, H, W), float32, float64 or uint8 → (B, T // (rows·cols), C, H, W), same dtype.
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
        raise ValueError(
            f"{what} is {number}, which is not a multiple of {divisor}; the nearest that works is"
            f" {nearest}"
        )


def position_code(num_framesets, height, width, patch, dim, rows=4, cols=4):
    """p^TP, the fixed code of every patch of every frameset → (num_framesets, P, dim), float32.

    A pixel's code joins those of its row y and column x within its own little frame, in units of
    patches, and of that frame's index t in the clip. Frames and patches need not line up (a 14 x 14
    patch grid does not divide by 4), so a patch's code is the mean over its pixels' codes. That
    mean is cheap, because y depends on the pixel's row alone, x on its column alone, and t on
    both only through the little frame that the pixel is in.
    """
    d_yx = dim // 6 * 2
    d_t = dim - 2 * d_yx
    y, row_share = codes_along(height, rows, patch, d_yx)  # (patches down, d_yx), (…, rows)
    x, col_share = codes_along(width, cols, patch, d_yx)  # (patches across, d_yx), (…, cols)
    t = sincos(torch.arange(num_framesets * rows * cols), d_t).view(num_framesets, rows, cols, d_t)
    t = torch.einsum("ir,jc,nrcd->nijd", row_share, col_share, t)  # (framesets, down, across, d_t)
    y = y[None, :, None].expand(*t.shape[:3], d_yx)
    x = x[None, None, :].expand(*t.shape[:3], d_yx)
    return torch.cat([y, x, t], dim=-1).flatten(1, 2).float()  # (framesets, P, dim)


def codes_along(size, n, patch, dim):
    """Along one side of the image, `size` pixels split into n little frames: each patch's code of
    its place in a frame (patches, dim), and the share of it in each frame (patches, n)."""
    pixel = torch.arange(size)
    frame, offset = pixel // (size // n), pixel % (size // n)
    place = (offset + 0.5) / patch - 0.5  # 0 in the middle of the frame's first patch
    whole = size // patch * patch  # pixels beyond the last whole patch belong to none
    code = sincos(place, dim)[:whole].unflatten(0, (-1, patch)).mean(1)
    share = F.one_hot(frame, n).double()[:whole].unflatten(0, (-1, patch)).mean(1)
    return code, share


def sincos(position, dim):
    """The usual sine-cosine code of real positions: (...,) → (..., dim), dim even, base 10000."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = position[..., None].double() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def spread(count):
    """T frame numbers, spread over the whole video: T is 32, or 16 where there are fewer frames."""
    T = 32 if count >= 32 else 16
    return [i * count // T for i in range(T)]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 2:
        raise SystemExit("usage: python grid.py VIDEO PICTURE.png    (what the two paths see)")
    path, picture = argv
    with one_sentence("grid.py"):
        video = read_frames(path, spread)
        frames, T = square(video.pixels), len(video.numbers)  # (T, 3, S, S)
        above = numbered(frames[:: T // 8], video.numbers[:: T // 8])
        below = numbered(frameset(frames[None])[0], video.numbers, rows=4, cols=4)
        write_picture(picture, above, below)
    print(f"wrote {picture}, {T} moments of {path} with their numbers: above, 8 of them for the")
    print("spatial path; below, all of them for the temporal path, shrunk by 4, 16 an image")


if __name__ == "__main__":
    main()
