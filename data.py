"""Video files to labelled clips of uint8 frames.

    python data.py --data demo                   # checks a data set, then prints clips/s per worker
    python data.py --data folder --root DIR

Pixels stay uint8 from the decoder to the device: a quarter of the bytes of floats on the way.
"""
import argparse
import bisect
import csv
import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2
from tqdm import tqdm

from grid import frameset

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ts")

class DataError(ValueError):
    """A data set is not as it should be; the message is one sentence for the user."""

class VideoError(Exception):
    """One video cannot be read; the message names it."""

# ---------------------------------------------------------------- reading frames
MAX_PACKETS, MAX_BYTES, MAX_PIXELS, MAX_SECONDS = 500_000, 1 << 30, 1 << 26, 60  # a clip is far below all of them
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,mpegvideo,h264,hevc,gif,ivf,nut,dv,mxf,rm"
COLOUR_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)  # AVColorSpace: RGB, BT.709, not said, FCC, BT.601 (5, 6), SMPTE 240M, BT.2020

def read_frames(path, indices):
    """Frames of a video file, by number in presentation order → (len(indices), H, W, 3) uint8 RGB, upright.

    indices: numbers in any order, repeats allowed; or a function of the number of frames that returns them.
    The same pixels as decoding the whole file in order and picking, but only what the wanted frames need is
    decoded. Raises VideoError, and nothing else, whatever the file holds.
    """
    if not os.path.isfile(path):
        raise VideoError(f"cannot read {path}: there is no such file")
    try:
        # `file:` makes a file of names that look like a protocol, such as http:… and concat:….
        with av.open(f"file:{path}", metadata_errors="replace", timeout=MAX_SECONDS,
                     options=dict(format_whitelist=FORMATS, protocol_whitelist="file")) as container:
            stream, packets = video_packets(container, path)
            times = presentation_times(stream, packets)
            count = len(times) if times else sum(1 for _ in decode_all(stream, packets))
            numbers = [int(i) for i in (indices(count) if callable(indices) else indices)]
            if not numbers:
                raise ValueError("no frame was asked for")
            for i in numbers:
                if not 0 <= i < count:
                    raise VideoError(f"{path} has {count} frames, so no frame {i}")
            frames = None
            if times:
                targets = [times[i] for i in numbers]
                frames = convert(((f.pts, f) for f in decode_some(stream, packets, set(targets))), targets)
            if frames is None:  # timestamps are missing, or a frame did not come out as they promised
                frames = convert(enumerate(decode_all(stream, packets)), numbers)
            if frames is None:
                raise VideoError(f"{path} breaks off before the last of the {count} frames that it announces")
            return frames
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise VideoError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")

def count_frames(path):
    """The number of frames that read_frames can give; raises VideoError."""
    counts = []
    read_frames(path, lambda count: counts.append(count) or [0])
    return counts[0]

def video_packets(container, path):
    """The best video stream, not blindly the first, and its compressed packets in decoding order."""
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise VideoError(f"{path} has no video stream that can be decoded")
    codec = stream.codec_context
    codec.thread_type, codec.thread_count = "SLICE", 1  # workers are the parallelism
    codec.options = {"max_pixels": str(MAX_PIXELS)}
    packets, size = [], 0
    for packet in container.demux(stream):
        if packet.size:
            packets.append(packet)
            size += packet.size
        if len(packets) > MAX_PACKETS or size > MAX_BYTES:
            raise VideoError(f"{path} has more than {MAX_PACKETS:,} packets or {MAX_BYTES >> 20} MiB: cut it into clips first")
    if not packets:
        raise VideoError(f"{path} has no video frames")
    return stream, packets

def presentation_times(stream, packets):
    """The timestamp of frame 0, 1, 2, …, or None if the packets do not tell. A rate times a number would be wrong for
    29.97 frames a second in Matroska's milliseconds, and for variable rates."""
    times = sorted(p.pts for p in packets if p.pts is not None and not p.is_discard)
    complete = all(p.pts is not None for p in packets) and len(set(times)) == len(times)
    one_each = stream.codec_context.name not in ("vp8", "libvpx")  # VP8 has packets that show nothing
    return times if complete and one_each else None

def needed_packets(packets, targets):
    """Flags of the packets that decoding the frames at `targets` takes: from the key frame before each to itself."""
    need = np.zeros(len(packets), bool)
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    for place, packet in enumerate(packets):
        if packet.pts in targets:
            k = bisect.bisect_right(keys, place) - 1
            while k > 0 and packets[keys[k]].pts > packet.pts:  # shown before the key frame it follows: open GOP
                k -= 1
            need[keys[k] if k >= 0 else 0:place + 1] = True
    return need

def decode_some(stream, packets, targets):
    """Decoded frames, the ones at `targets` among them, with as little decoding as they take. Ends early where a
    packet that is marked as a key frame turns out to be none, as in files that have lost their index."""
    codec, running, entries = stream.codec_context, False, set()
    steps = [*zip(packets, needed_packets(packets, targets)), (None, False)]
    for place, (packet, needed) in enumerate(steps):
        frames = []
        if needed:
            if not running and place:
                entries.add(packet.pts)
            # What nothing refers to and nobody wants is not decoded.
            codec.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
            frames = codec.decode(packet)
        elif running:
            frames = codec.decode(None)  # the frames held back for reordering
            codec.flush_buffers()
        running = needed
        if any(frame.pts in entries and not frame.key_frame for frame in frames):
            return
        yield from frames

def decode_all(stream, packets):
    """All frames, in order."""
    stream.codec_context.flush_buffers()
    stream.codec_context.skip_frame = "DEFAULT"
    for packet in packets:
        yield from stream.codec_context.decode(packet)
    yield from stream.codec_context.decode(None)

def convert(keyed_frames, wanted):
    """(key, frame) pairs → (len(wanted), H, W, 3) RGB, in the order of the keys in `wanted`; None if one is missing."""
    rows = {}
    for row, key in enumerate(wanted):
        rows.setdefault(key, []).append(row)
    reformatter, images = VideoReformatter(), None
    for key, frame in keyed_frames:
        if key not in rows:
            continue
        if frame.colorspace not in COLOUR_MATRICES:  # the scaler refuses constant luminance, reserved and other rare tags
            frame.colorspace = 9 if frame.colorspace == 10 else 2
        rgb = reformatter.reformat(frame, format="rgb24", threads=1)
        plane = rgb.planes[0]
        image = np.frombuffer(plane, np.uint8).reshape(rgb.height, plane.line_size)[:, :3 * rgb.width]
        image = upright(image.reshape(rgb.height, rgb.width, 3), frame)
        if images is None:
            images = np.empty((len(wanted), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise ValueError("the size of its frames changes midway")
        images[rows.pop(key)] = image
        if not rows:
            return images
    return None

def upright(image, frame):
    """Apply the display matrix: a transposition and flips (`frame.rotation` would drop the flips)."""
    for side in frame.side_data:
        if side.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(side, np.int32)[:5]  # column x, row y go to (a·x + c·y, b·x + d·y)
            if abs(int(b)) > abs(int(a)):
                image, a, d = image.transpose(1, 0, 2), c, b
            image = image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
    return image

# ---------------------------------------------------------------- which frames make a clip
def clip_frames(available, num_frames, sampling, stride, position):
    """The frame numbers of one clip out of `available` frames → (num_frames,) int64.

    dense: num_frames at a stride; position in [0, 1] moves the clip from the video's start to its end.
    uniform: one frame from each of num_frames equal segments; position, a number or one per segment, is
    the place within the segment. A video that is too short repeats its last frame.
    """
    t = np.arange(num_frames)
    if sampling == "dense":
        room = max(0, available - ((num_frames - 1) * stride + 1))
        frames = round(position * room) + t * stride
    else:
        frames = np.floor((t + np.clip(position, 0, 1 - 1e-9)) * max(available, num_frames) / num_frames)
    return np.minimum(frames.astype(np.int64), available - 1)

# ---------------------------------------------------------------- transforms: (T, 3, H, W) uint8 → (T, 3, size, size) uint8
def training_transform(augment, size, flip):
    """v2 transforms draw once per call, so that all frames of a clip are treated alike."""
    if augment == "translate":  # whole pixels: nothing is resampled, mirrored or recoloured
        return v2.Compose([v2.RandomCrop(size, padding=size // 16, padding_mode="edge")])
    crop = [v2.RandomResizedCrop(size, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), antialias=True)]
    return v2.Compose(crop + [v2.RandomHorizontalFlip()] * flip)

def test_crops(clip, size, crops):
    """Shorter side to `size`, then 1 (centre) or 3 (start, centre, end of the longer side) squares."""
    clip = v2.functional.resize(clip, [size], antialias=True)
    room = [clip.shape[-2] - size, clip.shape[-1] - size]
    places = [0.5] if crops == 1 else [c / (crops - 1) for c in range(crops)]
    return [v2.functional.crop(clip, round(room[0] * p), round(room[1] * p), size, size) for p in places]

# ---------------------------------------------------------------- data sets on disk
@dataclass
class Videos:
    """The lists that every data set comes down to: (path, label) pairs and the names of the labels."""
    train: list
    val: list
    classes: list

def folder_data(root):
    """ROOT/train/CLASS/*.mp4 and ROOT/val/CLASS/*.mp4; the classes are train's folders, sorted."""
    classes = sorted(entry.name for entry in os.scandir(existing(root, "train")) if entry.is_dir())
    if len(classes) < 2:
        raise DataError(f"{root}/train has {len(classes)} folders; it needs one per class, two at least")
    unknown = sorted(entry.name for entry in os.scandir(existing(root, "val")) if entry.is_dir() and entry.name not in classes)
    if unknown:
        raise DataError(f"{root}/val has a class {unknown[0]!r} that {root}/train does not have")
    found = {}
    for split in ("train", "val"):
        found[split] = []
        for label, name in enumerate(classes):
            folder = os.path.join(root, split, name)
            names = os.listdir(folder) if os.path.isdir(folder) else []
            videos = sorted(f for f in names if f.lower().endswith(VIDEO_SUFFIXES))
            if not videos and split == "train":
                raise DataError(f"{folder} has no video file ({', '.join(VIDEO_SUFFIXES)})")
            found[split] += [(i, label, os.path.join(folder, f)) for i, f in enumerate(videos)]
        # The first video of each class, then the second of each, …: then --limit sees all classes.
        found[split] = [(path, label) for _, label, path in sorted(found[split])]
    return Videos(found["train"], found["val"], classes)

def list_data(root):
    """ROOT/train.txt and ROOT/val.txt, a line a video: `path label` or `path,label`; a path with spaces is
    quoted, relative paths start at ROOT. ROOT/classes.txt, if there, names the classes, a line each."""
    found = {split: read_list(existing(root, f"{split}.txt"), root) for split in ("train", "val")}
    number = min(1 + max(label for _, label in found["train"]), len(found["train"]) + 1)  # each class has a video
    names = os.path.join(root, "classes.txt")
    classes = open(names).read().splitlines() if os.path.isfile(names) else [str(i) for i in range(number)]
    for split, samples in found.items():
        for path, label in samples:
            if not 0 <= label < len(classes):
                raise DataError(f"{root}/{split}.txt gives {path} the label {label}; labels run from 0 to {len(classes) - 1}")
    missing = sorted(set(range(len(classes))) - {label for _, label in found["train"]})
    if missing or len(classes) < 2:
        raise DataError(f"{root}/train.txt needs two classes at least and a video of each; class {(missing + [1])[0]} has none")
    return Videos(found["train"], found["val"], classes)

def read_list(file, root):
    samples = []
    with open(file, newline="", errors="surrogateescape") as lines:  # a path may hold any bytes
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            for delimiter in (",", " "):
                fields = [f for f in next(csv.reader([line.strip()], delimiter=delimiter, skipinitialspace=True)) if f]
                if len(fields) == 2 and fields[1].strip().isdigit():
                    samples.append((os.path.join(root, fields[0].strip()), int(fields[1])))
                    break
            else:
                raise DataError(f"{file}, line {number}: {line.strip()!r} is not `path label` or `path,label`"
                                " (label a whole number, a path with spaces in double quotes)")
    if not samples:
        raise DataError(f"{file} lists no video")
    return samples

def existing(root, name):
    path = os.path.join(root, name)
    if not os.path.exists(path):
        raise DataError(f"{path} is not there; --root {root} should hold it")
    return path

def demo_data(root):
    draw_once(root, "train", 1536, draw_moving, MOVING_CLASSES)
    draw_once(root, "val", 256, draw_moving, MOVING_CLASSES)
    return folder_data(root)

def stills_data(root):
    draw_once(root, "train", 24600, draw_still, STILL_CLASSES)
    draw_once(root, "val", 410, draw_still, STILL_CLASSES)
    return folder_data(root)

SOURCES = dict(demo=demo_data, stills=stills_data, folder=folder_data, list=list_data)

def find_videos(data, root=None):
    """The lists of a data set, every file of which exists; raises DataError."""
    if data not in SOURCES:
        raise DataError(f"there is no data set {data!r}; --data is one of {', '.join(SOURCES)}")
    root = root or os.path.join("data", data)
    if data not in ("demo", "stills") and not os.path.isdir(root):
        raise DataError(f"the data folder {root} is not there; say with --root where the {data!r} data are")
    videos = SOURCES[data](root)
    if not videos.val:
        raise DataError(f"{root} has no validation videos")
    missing = [path for path, _ in videos.train + videos.val if not os.path.isfile(path)]
    if missing:
        raise DataError(f"{len(missing)} of {len(videos.train + videos.val)} videos are not there; the first: {missing[0]}")
    return videos

# ---------------------------------------------------------------- samples and batches
class Clips(Dataset):
    """Clips of labelled videos. Training: item (epoch, i) → one augmented clip (T, 3, S, S). Testing: item
    i → all views of video i, (views, T, 3, S, S), from one decode. A video that cannot be read is None in
    testing; in training another takes its place, and its message travels with the clip.
    """

    def __init__(self, samples, num_frames, size, sampling="dense", stride=1, augment="crop", flip=True, seed=0,
                 train=False, views=(1, 1)):
        self.samples, self.num_frames, self.size, self.sampling, self.stride = samples, num_frames, size, sampling, stride
        self.seed, self.train, self.views, self.augment = seed, train, views, augment
        self.transform = training_transform(augment, size, flip)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        return self.training_item(*item) if self.train else self.test_item(item)

    def training_item(self, epoch, index):
        # What is drawn depends on (seed, epoch, index) alone: not on the worker, nor on what came before.
        rng = np.random.default_rng([self.seed, epoch, index])
        position = rng.random() if self.sampling == "dense" else rng.random(self.num_frames)
        plan = lambda n: clip_frames(n, self.num_frames, self.sampling, self.stride, position)
        failures, frames = [], None
        while frames is None:
            path, label = self.samples[index]
            try:
                frames = read_frames(path, plan)
                if self.augment == "translate" and frames.shape[1:3] != (self.size, self.size):
                    raise VideoError(f"{path} is {frames.shape[2]}x{frames.shape[1]}, and translation, which resamples nothing,"
                                     f" takes {self.size}x{self.size}")
            except VideoError as error:
                frames = None
                failures.append(str(error))
                if len(failures) == 10:
                    return None, label, failures
                index = int(rng.integers(len(self)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            clip = self.transform(torch.from_numpy(frames).permute(0, 3, 1, 2))
        return clip.contiguous(), label, failures

    def test_item(self, index):
        path, label = self.samples[index]
        clips, crops = self.views
        # dense: starts evenly spread over the video; uniform: points evenly spread over each segment
        places = [0.5 if clips == 1 else c / (clips - 1) if self.sampling == "dense" else (c + 0.5) / clips
                  for c in range(clips)]
        plan = lambda n: np.concatenate([clip_frames(n, self.num_frames, self.sampling, self.stride, p) for p in places])
        try:
            frames = read_frames(path, plan)
        except VideoError as error:
            return None, label, index, str(error)
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        views = [crop for clip in frames.split(self.num_frames) for crop in test_crops(clip, self.size, crops)]
        return torch.stack(views), label, index, None

def collate(items):
    """Training items → clips (B, T, 3, S, S) uint8 (None after ten unreadable videos in a row), labels (B,), messages."""
    clips, labels, failures = zip(*items)
    clips = None if any(clip is None for clip in clips) else torch.stack(clips)
    return clips, torch.tensor(labels), sum(failures, [])

class BatchOrder(Sampler):
    """The training batches of this process: lists of (epoch, index). The order depends on (seed, epoch)
    alone and is cut into global batches first, so any number of processes trains on the same ones."""

    def __init__(self, size, global_batch, seed=0, rank=0, world=1):
        self.size, self.global_batch, self.seed, self.rank, self.world = size, global_batch, seed, rank, world
        self.epoch = 0

    def __len__(self):
        return self.size // self.global_batch

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for step in range(len(self)):
            batch = order[step * self.global_batch:(step + 1) * self.global_batch]
            yield [(self.epoch, int(i)) for i in np.array_split(batch, self.world)[self.rank]]

# ---------------------------------------------------------------- drawn data: the demo and its stills
MOTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
TEXTURES = ("horizontal", "vertical")
MOVING_CLASSES = [(motion, texture) for motion in MOTIONS for texture in TEXTURES]
STILL_CLASSES = [(texture, cell) for texture in TEXTURES for cell in range(16)] + [("sheet", cell) for cell in range(9)]
SIZE, FRAMES = 64, 16  # what the `tiny` backbone and the demo's recipe take
SAMPLED = (0, 4, 8, 12)  # the frames that the demo's spatial path sees

class Scene:
    """A striped thing on a smooth background; the seed decides everything but its stripes and place.
    The stripes, 2 px dark and 2 px light, vanish when a frame is shrunk by 4. The background has no
    noise: behind a moving thing the codec would leave a trace of it that betrays the direction.
    """

    def __init__(self, rng):
        y, x = np.mgrid[:SIZE, :SIZE][..., None] / SIZE - 0.5
        tint = lambda: rng.uniform(-25, 25, 3)
        luma, contrast = rng.uniform(90, 165), rng.uniform(55, 80)
        self.colour = luma + tint()
        self.background = luma + (contrast if luma < 127 else -contrast) + tint()
        self.background = self.background + y * rng.uniform(-30, 30, 3) + x * rng.uniform(-30, 30, 3)
        self.radius = int(rng.choice((8, 10)))  # whole periods of the stripes across
        self.round = bool(rng.integers(2))

    def draw(self, texture, cy, cx):
        """The thing centred on the corner (cy, cx) between pixels → (SIZE, SIZE, 3) uint8."""
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        y, x, r = y - cy, x - cx, self.radius
        depth = r - (np.hypot(y, x) if self.round else np.maximum(abs(y), abs(x)))  # px to the rim, < 0 outside
        along = y if texture == "horizontal" else x
        stripes = np.where((along // 2) % 2 == 0, 45, -45) * (depth / 2).clip(0, 1)  # fade towards the rim
        image = np.where((depth > 0)[..., None], self.colour + stripes[..., None], self.background)
        return image.round().clip(0, 255).astype(np.uint8)

def draw_moving(seed, motion, texture):
    """One clip of the demo → (16, 64, 64, 3) uint8. With the same seed, left and right (up and down) show
    the same sampled frames in opposite order: the path is centred on the middle of those."""
    rng = np.random.default_rng(seed)
    scene = Scene(rng)
    speed = rng.uniform(2.2, 3.0)  # px a frame: 33 to 45 px in all
    steps = np.rint(speed * (np.arange(FRAMES) - np.mean(SAMPLED)))
    margin = scene.radius + round(speed * np.mean(SAMPLED))
    along, across = rng.integers(margin, SIZE - margin + 1), rng.integers(scene.radius, SIZE - scene.radius + 1)
    (dy, dx) = MOTIONS[motion]
    cy, cx = (along, across) if dy else (across, along)
    return np.stack([scene.draw(texture, cy + dy * s, cx + dx * s) for s in steps])

def draw_still(seed, kind, cell):
    """One still, a clip of one frame → (1, 64, 64, 3) uint8. Either one thing, whose texture and cell (4 x 4)
    are the class; or a sheet of 16 small ones, all in the same ninth of their little frames, which is the
    class. Nothing moves: a sheet's places within the ninth are independent draws."""
    rng = np.random.default_rng(seed)
    scene = Scene(rng)
    if kind != "sheet":
        cy, cx = np.divmod(cell, 4)
        place = lambda c: int(np.clip(rng.integers(c * 16, c * 16 + 16), scene.radius // 2, SIZE - scene.radius // 2))
        return scene.draw(kind, place(cy), place(cx))[None]
    cy, cx = np.divmod(cell, 3)
    place = lambda c: int(rng.integers(8 + c * 16, 8 + c * 16 + 16))
    texture = TEXTURES[rng.integers(2)]
    frames = torch.from_numpy(np.stack([scene.draw(texture, place(cy), place(cx)) for _ in range(16)]))
    return frameset(frames.permute(0, 3, 1, 2)[None])[0].permute(0, 2, 3, 1).numpy()

def write_video(path, frames, rate=8, **options):
    """frames (T, H, W, 3) uint8 → an H.264 mp4 at `path`, the same bytes every time."""
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        # With mbtree x264 is not deterministic; with more threads its bytes can depend on the number of cores.
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": "23", "x264-params": "mbtree=0", **options}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

def draw_once(root, split, number, draw, classes):
    """Draw and encode a drawn data set into ROOT/SPLIT, unless it is there. A folder appears only whole."""
    final = os.path.join(root, split)
    if os.path.isdir(final):
        return
    temporary = f"{final}.{os.getpid()}.tmp"
    for kind in classes:
        os.makedirs(os.path.join(temporary, "_".join(map(str, kind))))
    jobs = [(temporary, i, [split == "val", i], draw, classes[i % len(classes)]) for i in range(number)]
    try:
        with multiprocessing.Pool(min(8, os.cpu_count()), torch.set_num_threads, (1,)) as pool:
            for _ in tqdm(pool.imap_unordered(draw_file, jobs, chunksize=16), f"drawing {final}", number, unit="video"):
                pass
        if not os.path.isdir(final):  # another run may have finished first
            os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

def draw_file(job):
    folder, i, seed, draw, kind = job
    write_video(os.path.join(folder, "_".join(map(str, kind)), f"{i:05d}.mp4"), draw(seed, *kind))

# ---------------------------------------------------------------- check a data set
def main(argv=None):
    parser = argparse.ArgumentParser(description="Check a data set, then time its reading.")
    parser.add_argument("--data", default="demo", choices=SOURCES)
    parser.add_argument("--root", help="folder of the data (default data/NAME)")
    parser.add_argument("--frames", type=int, default=16, help="frames per clip")
    parser.add_argument("--size", type=int, default=224, help="pixels per side")
    parser.add_argument("--limit", type=int, default=500, help="videos to time")
    args = parser.parse_args(argv)
    try:
        videos = find_videos(args.data, args.root)
    except DataError as error:
        raise SystemExit(f"data.py: {error}")
    print(f"{len(videos.train)} training and {len(videos.val)} validation videos, {len(videos.classes)} classes")
    clips = Clips(videos.train + videos.val, args.frames, args.size, train=True)
    torch.set_num_threads(1)  # as in a loader's worker
    failures, start = [], time.perf_counter()
    order = np.random.default_rng(0).permutation(len(clips))[:args.limit]
    for i in tqdm(order, "reading", unit="clip"):
        failures += clips[0, int(i)][2]
    rate = len(order) / (time.perf_counter() - start)
    print("".join(f"{line}\n" for line in failures[:20]), end="")
    print(f"{rate:.1f} clips/s per worker ({args.frames} frames of {args.size} px), so {1000 / rate:.0f} workers for 1,000;"
          f" {len(failures)} reads failed over {len(order)} videos")

if __name__ == "__main__":
    main()
