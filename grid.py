"""Frames → grid-like framesets, and the 3-D position code of their patches.

The temporal path (section 3 of the paper) never attends across images. It sees time because w·h =
16 consecutive frames, each shrunk by w and by h (4 and 4), are tiled into one image of the original
size: attention between patches of different small frames is attention across time.

Frames were first tiled into such an image by SIFAR (Fan, Chen, Panda, ICLR 2022, arXiv 2106.14104),
at their full size and for an image model that is trained as a whole; here they are shrunk, the
image model is frozen, and a second path sees some of them at full size.

The paper's w and h are `cols` and `rows` here, for w and h also stand for pixels elsewhere.
"""

import torch
import torch.nn.functional as F


def frameset(video, rows=4, cols=4):
    """Tile each run of rows·cols consecutive frames into one image of the frames' own size.

    video: (B, T, C, H, W), float32, float64 or uint8 → (B, T_G, C, H, W), same dtype, with
    T_G = T / (rows·cols). Frames are shrunk with antialiasing and laid left to right, top to
    bottom, in time order. Raises ValueError where T, H or W does not divide.
    """
    B, T, C, H, W = video.shape
    check_divides("the number of frames", T, rows * cols)
    check_divides("the frame height", H, rows)
    check_divides("the frame width", W, cols)
    small_h, small_w, T_G = H // rows, W // cols, T // (rows * cols)
    small = F.interpolate(
        video.flatten(0, 1), size=(small_h, small_w), mode="bilinear", antialias=True
    )
    small = small.view(B, T_G, rows, cols, C, small_h, small_w)
    return small.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, T_G, C, H, W)  # C, rows·small_h, …


def check_divides(what, number, divisor):
    """Raise a ValueError that names the nearest numbers that would have worked."""
    below = number // divisor * divisor
    if number == 0 or number != below:
        nearest = f"{below} or {below + divisor}" if below else f"{divisor}"
        raise ValueError(
            f"{what} is {number}, which is not a multiple of {divisor}; the nearest that works is"
            f" {nearest}"
        )


def position_code(T_G, height, width, patch, d, rows=4, cols=4):
    """p^TP, the fixed code of every patch of every frameset → (T_G, P, d), float32.

    height, width, patch: of an image and of a square patch of it, in pixels.

    A pixel's code joins those of its row y and column x within its own little frame, in units of
    patches, and of that frame's index t in the clip. Frames and patches need not line up (a 14 x 14
    patch grid does not divide by 4), so a patch's code is the mean over its pixels' codes. That
    mean is cheap, because y depends on the pixel's row alone, x on its column alone, and t on
    both only through the little frame that the pixel is in.
    """
    d_yx = d // 6 * 2
    d_t = d - 2 * d_yx
    y, row_share = codes_along(height, rows, patch, d_yx)  # (patches down, d_yx), (…, rows)
    x, col_share = codes_along(width, cols, patch, d_yx)  # (patches across, d_yx), (…, cols)
    t = sincos(torch.arange(T_G * rows * cols), d_t).view(T_G, rows, cols, d_t)
    t = torch.einsum("ir,jc,nrcd->nijd", row_share, col_share, t)  # (T_G, down, across, d_t)
    y = y[None, :, None].expand(*t.shape[:3], d_yx)
    x = x[None, None, :].expand(*t.shape[:3], d_yx)
    return torch.cat([y, x, t], dim=-1).flatten(1, 2).float()  # (T_G, P, d)


def codes_along(size, n, patch, dim):
    """Along one side of the image, `size` pixels split into n little frames: each patch's code of
    its place in a frame (patches, dim), and the share of it in each frame (patches, n)."""
    pixel = torch.arange(size)
    frame, offset = pixel // (size // n), pixel % (size // n)
    place = (offset + 0.5) / patch - 0.5  # 0 in the middle of the frame's first patch
    complete = size // patch * patch  # pixels beyond the last complete patch belong to none
    code = sincos(place, dim)[:complete].unflatten(0, (-1, patch)).mean(1)
    share = F.one_hot(frame, n).double()[:complete].unflatten(0, (-1, patch)).mean(1)
    return code, share


def sincos(position, dim):
    """The usual sine-cosine code of real positions: (...,) → (..., dim), dim even, base 10000."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = position[..., None].double() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
