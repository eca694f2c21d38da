"""The demo's videos, drawn and encoded here: a striped thing moves over a smooth background.

Eight classes: four motions x two textures. The stripes vanish when a frame is shrunk by 4, so that
only full-size frames tell the texture; the order of frames alone tells the motion.
"""

import os
import shutil
from functools import partial

import av
import numpy as np

from support.processes import in_parallel

MOTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
TEXTURES = ("horizontal", "vertical")
MOVING_CLASSES = [(motion, texture) for motion in MOTIONS for texture in TEXTURES]
SIZE = 64  # pixels of a side
FRAMES, RATE = 16, 8  # of a clip, a second
SAMPLED = (0, 4, 8, 12)  # those that the demo's spatial path sees


class Scene:
    """A striped thing on a smooth background; the seed decides all but stripes and place.

    Stripes are 2 px dark and 2 px light. There is no noise in the background: it would let the
    codec leave a trace that betrays the direction.
    """

    def __init__(self, rng):
        luma, contrast = rng.uniform(90, 165), rng.uniform(55, 80)
        self.colour = luma + rng.uniform(-25, 25, 3)
        y, x = np.mgrid[:SIZE, :SIZE][..., None] / SIZE - 0.5
        background = luma + (contrast if luma < 127 else -contrast) + rng.uniform(-25, 25, 3)
        background = background + y * rng.uniform(-30, 30, 3)
        self.background = background + x * rng.uniform(-30, 30, 3)
        self.radius = int(rng.choice((8, 10)))  # whole periods of the stripes across
        self.round = bool(rng.integers(2))

    def draw(self, texture, cy, cx):
        """The thing centred on the corner (cy, cx) between pixels → (SIZE, SIZE, 3) uint8."""
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5 - np.reshape((cy, cx), (2, 1, 1))
        distance = np.hypot(y, x) if self.round else np.maximum(abs(y), abs(x))
        depth = self.radius - distance  # px to the rim, negative outside
        across = y if texture == "horizontal" else x
        stripes = np.where((across // 2) % 2 == 0, 45, -45)
        stripes = stripes * (depth / 2).clip(0, 1)  # fading towards the rim
        thing = self.colour + stripes[..., None]
        image = np.where((depth > 0)[..., None], thing, self.background)
        return image.round().clip(0, 255).astype(np.uint8)


def draw_moving(seed, motion, texture):
    """One clip of the demo → (16, 64, 64, 3) uint8.

    With the same seed, left and right (up and down) show the same sampled frames in opposite
    order: the path is centred on the middle of those.
    """
    rng = np.random.default_rng(seed)
    scene, speed = Scene(rng), rng.uniform(2.2, 3.0)  # px a frame: 33 to 45 px in all
    middle = np.mean(SAMPLED)
    margin = scene.radius + round(speed * middle)
    along = rng.integers(margin, SIZE - margin + 1)
    across = rng.integers(scene.radius, SIZE - scene.radius + 1)
    dy, dx = MOTIONS[motion]
    cy, cx = (along, across) if dy else (across, along)
    steps = np.rint(speed * (np.arange(FRAMES) - middle))
    return np.stack([scene.draw(texture, cy + dy * s, cx + dx * s) for s in steps])


def write_video(path, frames):
    """frames (T, H, W, 3) uint8 → an H.264 mp4 at `path`, the same bytes every time."""
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # With mbtree x264 is not deterministic; with more threads its bytes can depend on the
        # number of cores.
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": "23", "x264-params": "mbtree=0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def draw_data(root, numbers, draw=draw_moving, classes=MOVING_CLASSES):
    """Draw and encode ROOT/train and ROOT/val, unless they are there; a folder appears only whole.

    numbers: of training and validation videos. draw(seed, *class) → frames.
    """
    for split, number in zip(("train", "val"), numbers):
        folder, temporary = f"{root}/{split}", f"{root}/{split}.{os.getpid()}.tmp"
        if not os.path.isdir(folder):
            job = partial(draw_file, temporary, split == "val", draw, classes)
            for _ in in_parallel(job, range(number), f"drawing {folder}"):
                pass
            if os.path.isdir(folder):  # another run was faster
                shutil.rmtree(temporary)
            else:
                os.rename(temporary, folder)


def draw_file(folder, is_val, draw, classes, i):
    kind = classes[i % len(classes)]
    folder = f"{folder}/{'_'.join(map(str, kind))}"
    os.makedirs(folder, exist_ok=True)
    write_video(f"{folder}/{i:05d}.mp4", draw([is_val, i], *kind))
