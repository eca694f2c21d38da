"""A decoded frame → upright RGB, by the colour matrix, range and orientation that the file says."""

import numpy as np

# AVColorSpace: RGB, BT.709, not said, FCC, BT.601 (5 and 6), SMPTE 240M, BT.2020
COLOUR_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
BT2020, BT2020_CONSTANT_LUMINANCE, NOT_SAID = 9, 10, 2


def rgb(frame, reformatter):
    """A decoded frame → (H, W, 3) uint8, a view of the converted frame's own memory."""
    if frame.colorspace not in COLOUR_MATRICES:  # the scaler refuses rare and reserved tags
        constant_luminance = frame.colorspace == BT2020_CONSTANT_LUMINANCE
        frame.colorspace = BT2020 if constant_luminance else NOT_SAID
    frame = reformatter.reformat(frame, format="rgb24", threads=1)
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def upright(image, frame):
    """Apply the display matrix: a transposition and flips (`frame.rotation` drops the flips)."""
    for side in frame.side_data:
        if side.type.name != "DISPLAYMATRIX":
            continue
        a, b, _, c, d = np.frombuffer(side, np.int32)[:5]  # (x, y) goes to (a·x + c·y, b·x + d·y)
        if abs(int(b)) > abs(int(a)):
            image, a, d = image.transpose(1, 0, 2), c, b
        if d < 0:
            image = image[::-1]
        if a < 0:
            image = image[:, ::-1]
    return image
