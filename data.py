"""Labelled videos → augmented training clips and test views, uint8 up to the device.

A training clip (T, 3, S, S) is drawn anew in every epoch; a test view is one of a few fixed clips
and crops of a video. Pixels stay bytes until they are on the device: a quarter of the traffic.
"""

import random
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from support.processes import UserError
from support.video import VideoError, read_frames

# ---------------------------------------------------------------- which frames make a clip


def clip_frames(available, num_frames, sampling, stride, position):
    """The frame numbers of one clip out of `available` frames → (num_frames,) int64.

    dense: num_frames at a stride; position in [0, 1] moves the clip from the video's start to its
    end; a video that is too short repeats its last frame. uniform: one frame from each of
    num_frames equal segments; position is the place in it, a number or one per segment; a video
    of fewer frames is spread over the clip, with repeats.
    """
    t = np.arange(num_frames)
    if sampling == "dense":
        room = max(0, available - ((num_frames - 1) * stride + 1))
        frames = round(position * room) + t * stride
    else:
        segment = available / num_frames
        frames = np.floor((t + np.clip(position, 0, 1 - 1e-9)) * segment)
    return np.minimum(frames.astype(np.int64), available - 1)


# ---------------------------------------------------------------- augmentation
RAND_AUGMENT = rand_augment_transform("rand-m7-n4-mstd0.5-inc1", {})  # as ST-Adapter's


def rand_augment(clip):
    """(T, 3, H, W) uint8 → the same shape: timm's RandAugment of images, one draw for all frames.

    Four of its operations, each with probability 1/2, of strength 7 ± 0.5 in 10.
    """
    seed, frames = int(torch.randint(2**31, ())), []
    for frame in clip:
        random.seed(seed)  # timm draws from both
        np.random.seed(seed)
        image = RAND_AUGMENT(transforms.to_pil_image(frame))
        frames.append(transforms.pil_to_tensor(image))
    return torch.stack(frames)


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
        steps.append(v2.RandomErasing(erasing, value=128))
    return v2.Compose(steps)


# ---------------------------------------------------------------- training
class TrainingClips(torch.utils.data.Dataset):
    """Item (epoch, i) → (clip (T, 3, S, S) uint8, label, messages) of the i-th video.

    samples: (path, label) pairs; transform: as of training_transform. Another video takes the place
    of one that cannot be read, and the message travels with it; after ten of them a UserError is
    raised.
    """

    def __init__(self, samples, num_frames, transform, sampling="dense", strides=(1,), seed=0):
        self.samples, self.num_frames, self.transform = samples, num_frames, transform
        self.sampling, self.strides, self.seed = sampling, strides, seed

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        # What is drawn depends on (seed, epoch, index) alone: not on the worker that draws it, nor
        # on what was drawn before.
        epoch, index = item
        rng = np.random.default_rng([self.seed, epoch, index])
        position = rng.random() if self.sampling == "dense" else rng.random(self.num_frames)
        stride = self.strides[rng.integers(len(self.strides))]
        drawn = {"sampling": self.sampling, "stride": stride, "position": position}
        choose = partial(clip_frames, num_frames=self.num_frames, **drawn)
        messages = []
        while len(messages) < 10:
            path, label = self.samples[index]
            try:
                video = read_frames(path, choose)
                break
            except VideoError as error:
                messages.append(str(error))
            index = int(rng.integers(len(self)))
        else:
            raise UserError(f"ten videos, one after the other, are unreadable: {messages[-1]}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            clip = self.transform(torch.from_numpy(video.pixels).permute(0, 3, 1, 2))
        return clip.contiguous(), label, messages


def collate(items):
    """Items of TrainingClips → clips (B, T, 3, S, S) uint8, labels (B,), messages."""
    clips, labels, messages = zip(*items)
    return torch.stack(clips), torch.tensor(labels), sum(messages, [])


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
    (uniform), crops along the longer side. shuffled: None, or T_s of the model; then each video's
    frames are in an order of its own. Those T_s that are seen at full size change places among
    themselves, and so do the others: what is blind to order sees the same images.
    """

    def __init__(
        self, samples, num_frames, size, sampling="dense", stride=1, views=(1, 1), shuffled=None
    ):
        self.samples, self.size, self.crops = samples, size, views[1]
        self.shuffled = shuffled
        positions = evenly(views[0])
        if sampling == "uniform":
            positions = [(c + 0.5) / views[0] for c in range(views[0])]
        clip = partial(clip_frames, num_frames=num_frames, sampling=sampling, stride=stride)
        self.clips = [partial(clip, position=position) for position in positions]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        try:
            video = read_frames(path, lambda count: np.ravel([clip(count) for clip in self.clips]))
        except VideoError as error:
            return Views(index, label, None, [], str(error))
        frames = torch.from_numpy(video.pixels).permute(0, 3, 1, 2)
        frames = transforms.resize(frames, [self.size], antialias=True)  # the shorter side
        down, across = frames.shape[-2] - self.size, frames.shape[-1] - self.size
        crops = [
            transforms.crop(frames, round(down * p), round(across * p), self.size, self.size)
            for p in evenly(self.crops)
        ]
        pixels = torch.stack(crops).unflatten(1, (len(self.clips), -1))  # (crops, clips, T, …)
        pixels = pixels.transpose(0, 1).flatten(0, 1)  # (clips · crops, T, 3, S, S)
        if self.shuffled:
            pixels = pixels[:, shuffled_order(index, pixels.shape[1], self.shuffled)]
        return Views(index, label, pixels, video.numbers, None)


def evenly(n):
    """n places from 0 to 1; of one, the middle."""
    return [i / (n - 1) for i in range(n)] if n > 1 else [0.5]


def shuffled_order(seed, num_frames, spatial_frames):
    """An order of the frames in which those seen at full size stay at those places."""
    rng, order = np.random.default_rng(seed), np.arange(num_frames)
    at_full_size = order % (num_frames // spatial_frames) == 0
    for part in (at_full_size, ~at_full_size):
        order[part] = rng.permutation(order[part])
    return order
