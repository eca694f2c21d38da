"""Labelled videos → augmented training clips and test views, uint8 up to the device.

A training clip (T, 3, S, S) is drawn anew in every epoch; a test view is one of a few fixed clips
and crops of a video. Pixels stay bytes until they are on the device: a quarter of the traffic.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from support.video import VideoError, read_frames

# ---------------------------------------------------------------- which frames make a clip


def clip_frames(available, num_frames, sampling, stride, position):
    """The frame numbers of one clip out of `available` frames → (num_frames,) int64.

    dense: num_frames at a stride; position in [0, 1] moves the clip from the video's start to its
    end. uniform: one frame from each of num_frames equal segments; position is the place in it, a
    number or one per segment. A video that is too short repeats its last frame.
    """
    t = np.arange(num_frames)
    if sampling == "dense":
        room = max(0, available - ((num_frames - 1) * stride + 1))
        frames = round(position * room) + t * stride
    else:
        segment = max(available, num_frames) / num_frames
        frames = np.floor((t + np.clip(position, 0, 1 - 1e-9)) * segment)
    return np.minimum(frames.astype(np.int64), available - 1)


# ---------------------------------------------------------------- augmentation
# All of it takes and gives (T, 3, H, W) uint8, and draws once for all frames of a clip.
GREY = 128


def warp(clip, angle=0.0, shear=(0.0, 0.0)):
    """Rotate by degrees, or shear by slopes about the top left corner."""
    return transforms.affine(
        clip,
        angle,
        translate=[0, 0],
        scale=1.0,
        shear=np.degrees(np.arctan(shear)).tolist(),
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=GREY,
        center=[0, 0] if any(shear) else None,
    )


def shift(clip, across=0.0, down=0.0):
    """Move by parts of the width, in whole pixels: nothing is resampled."""
    x, y = (round(part * clip.shape[-1]) for part in (across, down))
    return torch.nn.functional.pad(clip, (x, -x, y, -y), value=GREY)


def factor(s, d):
    """How much to enhance: further from 1 with strength s, above it or below with direction d."""
    return max(0.1, 1 + 0.9 * s * d)


def sharpen(clip, s, d):
    fast = clip.contiguous(memory_format=torch.channels_last)  # ten times faster so
    return transforms.adjust_sharpness(fast, factor(s, d)).contiguous()


# RandAugment's operations on a clip x, of strength s in [0, 1] and direction d = ±1. The set and
# its ranges are those of timm's "increasing" RandAugment, on which v2's own differ.
# fmt: off
OPERATIONS = [
    lambda x, s, d: transforms.autocontrast(x),
    lambda x, s, d: transforms.equalize(x),
    lambda x, s, d: transforms.invert(x),
    lambda x, s, d: transforms.posterize(x, 4 - int(4 * s)),  # bits that stay
    lambda x, s, d: x ^ (255 * (x >= 255 * (1 - s)).byte()),  # solarize, but 7 times faster
    lambda x, s, d: x + (int(110 * s) * (x < 128).byte()),  # lightens what is dark
    lambda x, s, d: transforms.adjust_brightness(x, factor(s, d)),
    lambda x, s, d: transforms.adjust_contrast(x, factor(s, d)),
    lambda x, s, d: transforms.adjust_saturation(x, factor(s, d)),
    sharpen,
    lambda x, s, d: warp(x, angle=30 * s * d),
    lambda x, s, d: warp(x, shear=(0.3 * s * d, 0)),
    lambda x, s, d: warp(x, shear=(0, 0.3 * s * d)),
    lambda x, s, d: shift(x, across=0.45 * s * d),
    lambda x, s, d: shift(x, down=0.45 * s * d),
]
# fmt: on


def rand_augment(clip):
    """timm's rand-m7-n4-mstd0.5-inc1: four operations of strength 7 ± 0.5 in 10.

    Each happens with probability 1/2. Neither that nor the noise is in v2.RandAugment.
    """
    clip = clip.contiguous()
    numbers = torch.randint(len(OPERATIONS), (4,))
    happens, directions = torch.randint(2, (4,)), torch.randint(2, (4,))
    for i in range(4):
        strength = (7 + 0.5 * torch.randn(())).clamp(0, 10).item() / 10
        if happens[i]:
            operation, direction = OPERATIONS[numbers[i]], 2 * directions[i].item() - 1
            # Four frames at a time stay in the processor's cache.
            clip = torch.cat([operation(part, strength, direction) for part in clip.split(4)])
    return clip


def training_transform(augment, size, flip=True, erasing=0.0, crop_area=0.08):
    """(T, 3, H, W) → (T, 3, size, size); each call draws once for all frames.

    The crop comes before RandAugment, whose cost is then the same for any video.
    """
    if augment == "translate":  # by whole pixels: nothing is resampled, mirrored or recoloured
        pad = v2.RandomCrop(size, padding=size // 16, padding_mode="edge")
        return v2.Compose([v2.Resize(size, antialias=True), pad])
    steps = [v2.RandomResizedCrop(size, scale=(crop_area, 1), ratio=(3 / 4, 4 / 3), antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment == "rand":
        steps.append(rand_augment)
    if erasing > 0:
        steps.append(v2.RandomErasing(erasing, value=GREY))
    return v2.Compose(steps)


# ---------------------------------------------------------------- training
class TrainingClips(torch.utils.data.Dataset):
    """Item (epoch, i) → (clip (T, 3, S, S) uint8, label, messages) of the i-th video.

    samples: (path, label) pairs. Another video takes the place of one that cannot be read, and
    the message travels with it; after ten of them the clip is None. options: of the transform.
    """

    def __init__(
        self,
        samples,
        num_frames,
        size,
        sampling="dense",
        strides=(1,),
        augment="rand",
        seed=0,
        **options,
    ):
        self.samples, self.num_frames, self.sampling = samples, num_frames, sampling
        self.strides, self.seed = strides, seed
        self.transform = training_transform(augment, size, **options)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        # What is drawn depends on (seed, epoch, index) alone: not on the worker that draws it, nor
        # on what was drawn before.
        epoch, index = item
        rng = np.random.default_rng([self.seed, epoch, index])
        position = rng.random() if self.sampling == "dense" else rng.random(self.num_frames)
        stride = self.strides[rng.integers(len(self.strides))]
        choose = partial(
            clip_frames,
            num_frames=self.num_frames,
            sampling=self.sampling,
            stride=stride,
            position=position,
        )
        messages = []
        while True:
            path, label = self.samples[index]
            try:
                video = read_frames(path, choose)
                break
            except VideoError as error:
                messages.append(str(error))
            if len(messages) == 10:
                return None, label, messages
            index = int(rng.integers(len(self)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            clip = self.transform(torch.from_numpy(video.pixels).permute(0, 3, 1, 2))
        return clip.contiguous(), label, messages


def collate(items):
    """Items of TrainingClips → clips (B, T, 3, S, S) uint8, labels (B,), messages.

    The clips are None where one of them is: ten videos in a row could not be read.
    """
    clips, labels, messages = zip(*items)
    if any(clip is None for clip in clips):
        batch = None
    else:
        batch = torch.stack(clips)
    return batch, torch.tensor(labels), sum(messages, [])


# ---------------------------------------------------------------- testing
class Views(NamedTuple):
    """All test views of one video."""

    index: int
    label: int
    pixels: torch.Tensor | None  # (clips · crops, T, 3, S, S) uint8; None if it cannot be read
    numbers: list  # the frames of the clips, one clip after the other
    error: str | None


class VideoViews(torch.utils.data.Dataset):
    """Item i → Views of the i-th video, which is read once.

    views: (clips, crops). Clips are spread evenly over the video (dense) or over each segment
    (uniform), crops along the longer side.
    """

    def __init__(self, samples, num_frames, size, sampling="dense", stride=1, views=(1, 1)):
        self.samples, self.size, self.crops = samples, size, views[1]
        self.clip = partial(clip_frames, num_frames=num_frames, sampling=sampling, stride=stride)
        self.positions = evenly(views[0])
        if sampling == "uniform":
            self.positions = [(c + 0.5) / views[0] for c in range(views[0])]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        try:
            video = read_frames(path, self.choose)
        except VideoError as error:
            return Views(index, label, None, [], str(error))
        frames = torch.from_numpy(video.pixels).permute(0, 3, 1, 2)
        frames = transforms.resize(frames, [self.size], antialias=True)  # the shorter side
        down, across = frames.shape[-2] - self.size, frames.shape[-1] - self.size
        crops = [
            transforms.crop(frames, round(down * p), round(across * p), self.size, self.size)
            for p in evenly(self.crops)
        ]
        pixels = torch.stack(crops).unflatten(1, (len(self.positions), -1))  # (crops, clips, T, …)
        pixels = pixels.transpose(0, 1).flatten(0, 1)  # (clips · crops, T, 3, S, S)
        return Views(index, label, pixels, video.numbers, None)

    def choose(self, count):
        return [i for position in self.positions for i in self.clip(count, position=position)]


def evenly(n):
    """n places from 0 to 1; of one, the middle."""
    return [i / (n - 1) for i in range(n)] if n > 1 else [0.5]
