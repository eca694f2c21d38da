"""Pictures of frames with their numbers, by torchvision alone."""

import torch
from torch.nn import functional as F
from torchvision.transforms.v2.functional import center_crop
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

from support.processes import UserError

WIDTH = 1040  # pixels of a picture
MARGIN = 2  # around each image


def square(pixels):
    """Frames (T, H, W, 3) uint8 → their middle squares (T, 3, S, S), S a multiple of 4."""
    side = min(pixels.shape[1:3]) // 4 * 4
    return center_crop(torch.from_numpy(pixels).permute(0, 3, 1, 2), [side, side])


def numbered(images, numbers, rows=1, cols=1):
    """Images (n, 3, S, S) uint8 in a row, numbers on their rows x cols cells → (3, H, W)."""
    across = max(2, len(images))  # a single image is no wider than half of the picture
    side = WIDTH // across - MARGIN
    images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    cells = [(x, y) for y in range(rows) for x in range(cols)]
    corners = torch.tensor([(x, y, x + 1, y + 1) for x, y in cells]) * (side - 1)
    boxes = corners // torch.tensor([cols, rows, cols, rows])
    labelled = []
    for i, image in enumerate(images):
        labels = [str(number) for number in numbers[i * len(cells) : (i + 1) * len(cells)]]
        labelled.append(
            draw_bounding_boxes(
                image, boxes, labels, "white", fill_labels=True, label_colors="black"
            )
        )
    return make_grid(labelled, nrow=len(labelled), padding=MARGIN, pad_value=255)


def write_picture(path, *stripes):
    """Write stripes (3, H, W) uint8 to an image file, one below the other."""
    width = max(stripe.shape[-1] for stripe in stripes)
    padded = [F.pad(stripe, (0, width - stripe.shape[-1]), value=255) for stripe in stripes]
    try:
        save_image(torch.cat(padded, dim=1) / 255, path)
    except (OSError, ValueError) as error:  # no such folder; no such kind of picture
        raise UserError(f"cannot write {path}: {error}") from error
