"""Frames to grid-like framesets, and the 3-D position code of their patches.

    python grid.py clip.mp4 grid.png        # writes what the temporal path sees, as a picture

The temporal path (section 3 of the paper) never attends across images. It sees time because 16
consecutive frames, each shrunk by 4 x 4, are tiled into one image of the original size: attention
between two patches of that image is attention between two moments. This file knows only tensors.
"""
import sys

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

def main(argv=None):
    import av
    from PIL import Image
    from torchvision.transforms import v2

    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 2:
        raise SystemExit("usage: python grid.py VIDEO PICTURE.png    (16 frames of the video as one frameset)")
    try:
        with av.open("file:" + argv[0]) as container:
            frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise SystemExit(f"cannot read {argv[0]} as a video: {error}")
    if not frames:
        raise SystemExit(f"{argv[0]} has no frames")
    picked = [frames[i * len(frames) // 16] for i in range(16)]
    video = torch.stack(picked).permute(0, 3, 1, 2)  # (16, 3, H, W)
    side = min(video.shape[-2:]) // 4 * 4
    video = v2.functional.center_crop(video, [side, side])
    picture = frameset(video[None].float())[0, 0].round().byte()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(argv[1])
    print(f"{argv[1]}: 16 of {len(frames)} frames as one {side}x{side} frameset, in time order")

if __name__ == "__main__":
    main()
