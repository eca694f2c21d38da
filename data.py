"""Video files to labelled clips of frames, uint8 from the decoder to the device: a quarter of the bytes of floats.

    python data.py --data k400 --frames 32 --sampling dense      # makes a sample of every video: what is wrong, how fast
"""
import argparse
import bisect
import concurrent.futures
import csv
import json
import os
import re
import shutil
import sys
import time
from collections import Counter, namedtuple
from functools import partial

import av
import numpy as np
import torch
from torchvision.transforms import v2
from tqdm import tqdm

BAR = dict(leave=False) if sys.stderr.isatty() else dict(leave=False, delay=60, mininterval=60, maxinterval=60, bar_format=(
    "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} to go, {rate_fmt}{postfix}\n"))  # in a job's log: a line a minute
VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ts")

class DataError(ValueError):
    """A data set is not as it should be; the message is one sentence for the user."""

class VideoError(Exception):
    """One video cannot be read; the message names it."""

# ---------------------------------------------------------------- reading frames
MAX_PACKETS, MAX_BYTES, MAX_PIXELS, MAX_SECONDS = 200_000, 1 << 30, 1 << 25, 120  # a clip is far below all of them
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,mpegvideo,h264,hevc,gif,ivf,nut,dv,mxf,rm"
COLOUR_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)  # AVColorSpace: RGB, BT.709, not said, FCC, BT.601 (5, 6), SMPTE 240M, BT.2020

def read_frames(path, indices):
    """Frames of a video file, by number in presentation order → (len(indices), H, W, 3) uint8 RGB, upright; or VideoError.
    indices: numbers in any order, repeats allowed; or a function of the number of frames that returns them. The same pixels as
    decoding the whole file and picking, but only what they need is decoded."""
    if not os.path.isfile(path):
        raise VideoError(f"cannot read {path}: there is no such file")
    try:
        with av.open(f"file:{path}", metadata_errors="replace", timeout=MAX_SECONDS,  # file: makes a file of a name like http:…
                     options=dict(format_whitelist=FORMATS, protocol_whitelist="file")) as container:
            stream, packets = video_packets(container, path)
            times = presentation_times(stream, packets)
            count = len(times) if times else sum(1 for _ in decode_all(stream, packets))
            numbers = [int(i) for i in (indices(count) if callable(indices) else indices)]
            for i in numbers or [-1]:  # none wanted, or none there: refused
                if not 0 <= i < count:
                    raise VideoError(f"{path} has {count} frames, so no frame {i}")
            targets = [times[i] for i in numbers] if times else []
            frames = convert(((f.pts, f) for f in decode_some(stream, packets, set(targets))), targets) if times else None
            if frames is None:  # timestamps are missing, or a frame did not come out as they promised
                frames = convert(enumerate(decode_all(stream, packets)), numbers)
            if frames is None:
                raise VideoError(f"{path} breaks off: of its {count} frames not all that are wanted can be decoded")
            return frames
    except (av.FFmpegError, OSError, ValueError, LookupError, MemoryError) as error:
        raise VideoError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")

def video_packets(container, path):
    """The best video stream, not blindly the first, and its compressed packets in decoding order."""
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise VideoError(f"{path} has no video stream that can be decoded")
    codec = stream.codec_context
    codec.thread_type, codec.thread_count = "SLICE", 1  # workers are the parallelism
    codec.options = {"max_pixels": str(MAX_PIXELS)}
    if codec.width * codec.height > MAX_PIXELS:
        raise VideoError(f"{path} has frames of {codec.width}x{codec.height}, which is more than {MAX_PIXELS:,} pixels")
    packets, size = [], 0
    for packet in container.demux(stream):
        packets += [packet] * (packet.size > 0)
        size += packet.size
        if len(packets) > MAX_PACKETS or size > MAX_BYTES:
            raise VideoError(f"{path} has more than {MAX_PACKETS:,} packets or {MAX_BYTES >> 20} MiB: cut it into clips first")
    return stream, packets

def presentation_times(stream, packets):
    """The timestamp of frame 0, 1, 2, …, or None if the packets do not tell. A rate times a number would be wrong for
    29.97 frames a second in Matroska's milliseconds, and for variable rates."""
    times = sorted(p.pts for p in packets if p.pts is not None and not p.is_discard)
    one_each = stream.codec_context.name not in ("vp8", "libvpx")  # VP8 has packets that show nothing
    return times if one_each and all(p.pts is not None for p in packets) and len(set(times)) == len(times) else None

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

def in_time(steps):
    end = time.monotonic() + MAX_SECONDS
    for step in steps:
        if time.monotonic() > end:
            raise ValueError(f"decoding it takes more than {MAX_SECONDS} seconds: cut it into clips first")
        yield step

def decode_some(stream, packets, targets):
    """Decoded frames, the ones at `targets` among them, with as little decoding as they take. Ends early where a
    packet that is marked as a key frame turns out to be none, as in files that have lost their index."""
    codec, running, entries = stream.codec_context, False, set()
    steps = [*zip(packets, needed_packets(packets, targets)), (None, False)]
    for place, (packet, needed) in enumerate(in_time(steps)):
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
    for packet in in_time([*packets, None]):
        yield from stream.codec_context.decode(packet)

def convert(keyed_frames, wanted):
    """(key, frame) pairs → (len(wanted), H, W, 3) RGB, in the order of the keys in `wanted`; None if one is missing."""
    rows, reformatter, images = {}, av.video.reformatter.VideoReformatter(), None
    for row, key in enumerate(wanted):
        rows.setdefault(key, []).append(row)
    for key, frame in keyed_frames:
        if key not in rows:
            continue
        if frame.colorspace not in COLOUR_MATRICES:  # the scaler refuses constant luminance, reserved and other rare tags
            frame.colorspace = 9 if frame.colorspace == 10 else 2
        rgb = reformatter.reformat(frame, format="rgb24", threads=1)
        plane = rgb.planes[0]
        image = np.frombuffer(plane, np.uint8).reshape(rgb.height, plane.line_size)[:, :3 * rgb.width]
        image = upright(image.reshape(rgb.height, rgb.width, 3), frame)
        if images is None and len(wanted) * image.nbytes <= 4 * MAX_BYTES:
            images = np.empty((len(wanted), *image.shape), np.uint8)
        if images is None or image.shape != images.shape[1:]:
            raise ValueError("its frames are too large" if images is None else "the size of its frames changes midway")
        images[rows.pop(key)] = image
        if not rows:
            return images
    return None

def upright(image, frame):
    """Apply the display matrix: a transposition and flips (`frame.rotation` would drop the flips)."""
    for side in [side for side in frame.side_data if side.type.name == "DISPLAYMATRIX"]:
        a, b, _, c, d = np.frombuffer(side, np.int32)[:5]  # column x, row y go to (a·x + c·y, b·x + d·y)
        if abs(int(b)) > abs(int(a)):
            image, a, d = image.transpose(1, 0, 2), c, b
        image = image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
    return image

# ---------------------------------------------------------------- which frames make a clip
def clip_frames(available, num_frames, sampling, stride, position):
    """The frame numbers of one clip out of `available` frames → (num_frames,) int64.
    dense: num_frames at a stride; position in [0, 1] moves the clip from the video's start to its end. uniform: one frame from
    each of num_frames equal segments; position is the place in it, a number or one per segment. The last frame may repeat.
    """
    t = np.arange(num_frames)
    if sampling == "dense":
        room = max(0, available - ((num_frames - 1) * stride + 1))
        frames = round(position * room) + t * stride
    else:
        frames = np.floor((t + np.clip(position, 0, 1 - 1e-9)) * max(available, num_frames) / num_frames)
    return np.minimum(frames.astype(np.int64), available - 1)

# ---------------------------------------------------------------- transforms: (T, 3, H, W) uint8 → (T, 3, size, size) uint8
F, GREY = v2.functional, 128

def warp(clip, angle=0.0, shear=(0.0, 0.0), shift=(0.0, 0.0)):
    """Rotate by degrees, or shear by slopes about the top left corner, or shift by parts of the size."""
    channels = clip.flatten(0, 1)[None]  # (1, 3T, H, W): as channels of one image, the frames share one map of samples
    pixels, degrees = [round(part * clip.shape[-1]) for part in shift], np.degrees(np.arctan(shear)).tolist()
    return F.affine(channels, angle, pixels, 1.0, degrees, v2.InterpolationMode.BILINEAR, GREY,
                    center=[0, 0] if any(shear) else None).view_as(clip)

# RandAugment's operations on the clip x with strength s in [0, 1] and direction d = ±1. The set and its ranges are those of
# timm's "increasing" RandAugment; away(s, d) is a factor above or below 1.
away = lambda s, d: max(0.1, 1 + 0.9 * s * d)
OPERATIONS = [
    lambda x, s, d: F.autocontrast(x),
    lambda x, s, d: F.equalize(x),
    lambda x, s, d: F.invert(x),
    lambda x, s, d: F.posterize(x, 4 - int(4 * s)),  # bits that stay
    lambda x, s, d: F.solarize(x, 255 * (1 - s)),  # inverts what is brighter
    lambda x, s, d: torch.where(x < 128, x + int(110 * s), x),  # lightens what is dark
    lambda x, s, d: F.adjust_brightness(x, away(s, d)),
    lambda x, s, d: F.adjust_contrast(x, away(s, d)),
    lambda x, s, d: F.adjust_saturation(x, away(s, d)),
    lambda x, s, d: F.adjust_sharpness(x.contiguous(memory_format=torch.channels_last), away(s, d)).contiguous(),  # 10 x faster so
    lambda x, s, d: warp(x, angle=30 * s * d),
    lambda x, s, d: warp(x, shear=(0.3 * s * d, 0)),
    lambda x, s, d: warp(x, shear=(0, 0.3 * s * d)),
    lambda x, s, d: warp(x, shift=(0.45 * s * d, 0)),
    lambda x, s, d: warp(x, shift=(0, 0.45 * s * d)),
]

def rand_augment(clip):
    """timm's rand-m7-n4-mstd0.5-inc1: 4 operations, each with probability 1/2, of strength 7 ± 0.5 in 10; neither is in v2's."""
    clip = clip.contiguous()
    for number, happens, direction in zip(torch.randint(len(OPERATIONS), (4,)), torch.randint(2, (4,)), torch.randint(2, (4,))):
        strength = (7 + 0.5 * torch.randn(())).clamp(0, 10).item() / 10
        clip = OPERATIONS[number](clip, strength, 2 * direction.item() - 1) if happens else clip
    return clip

def training_transform(augment, size, flip=True, erasing=0.0, crop_area=0.08):
    """Draws once per call: all frames are treated alike. Cropping comes first: then RandAugment costs the same on any video."""
    if augment == "translate":  # whole pixels: of the demo nothing is resampled, mirrored or recoloured
        return v2.Compose([v2.Resize(size, antialias=True), v2.RandomCrop(size, padding=size // 16, padding_mode="edge")])
    crop = [v2.RandomResizedCrop(size, scale=(crop_area, 1), ratio=(3 / 4, 4 / 3), antialias=True)]
    return v2.Compose(crop + [v2.RandomHorizontalFlip()] * flip + [rand_augment] * (augment == "rand")
                      + [v2.RandomErasing(erasing, value=GREY)] * (erasing > 0))

# ---------------------------------------------------------------- data sets on disk
SPLITS = ("train", "val")
# What every data set comes down to: (path, label) pairs; the labels' names; (split, path) of listed files that are not there.
Videos = namedtuple("Videos", "train val classes missing")

def folder_data(root):
    """ROOT/train/CLASS/*.mp4 and ROOT/val/CLASS/*.mp4; the classes are train's folders, sorted."""
    inside = {split: sorted(entry.name for entry in os.scandir(existing(root, split)) if entry.is_dir() and entry.name[0] != ".")
              for split in SPLITS}
    return assemble(root, inside["train"], {split: [(path, name) for name in inside[split]
                                                    for path in video_files(f"{root}/{split}/{name}")] for split in SPLITS})

def list_data(root):
    """ROOT/train.txt and ROOT/val.txt, a line a video: `path label` or `path,label`, the path in double quotes or not, relative
    to ROOT; labels from 0 without gaps. ROOT/classes.txt, if there, names the classes, a line each."""
    rows = {split: [] for split in SPLITS}
    for split in SPLITS:
        file = existing(root, f"{split}.txt")
        for number, line in enumerate(open(file, encoding="utf-8-sig", errors="surrogateescape"), 1):  # a path may be any bytes
            match = re.fullmatch(r'("?)(.+?)\1(?:\s*,\s*|\s+)(\d{1,9})', line.strip())
            if line.strip() and not match:
                raise DataError(f"{file}, line {number}: {line.strip()!r} is not `path label` or `path,label`, label a number")
            rows[split] += [(os.path.join(root, match[2]), int(match[3]))] if match else []
    classes = [str(i) for i in range(len({label for _, label in rows["train"]}))]
    if os.path.exists(f"{root}/classes.txt"):
        classes = annotations(root, lambda file: [name.strip() for name in file.read().rstrip().split("\n")], "classes.txt")
    videos = assemble(root, classes, rows)
    videos.missing.extend((split, path) for split in SPLITS for path, _ in getattr(videos, split) if not os.path.isfile(path))
    return videos

def kinetics_data(root):
    """train.csv, val.csv: label,youtube_id,time_start,time_end,split. train/, val/: CLASS/ID_000001_000011.mp4, or flat."""
    name = lambda row: f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
    rows = {split: annotations(root, lambda file: [(split, name(row), row["label"]) for row in csv.DictReader(file)],
                               f"{split}.csv", f"annotations/{split}.csv") for split in SPLITS}
    return assemble(root, sorted({label for *_, label in rows["train"]}), rows)

def something_data(root):
    """something-something-v2-{train,validation,labels}.json, or labels/{…}.json; 20bn-something-something-v2/ID.webm."""
    read = lambda name, parse: annotations(root, parse, f"something-something-v2-{name}.json", f"labels/{name}.json")
    # A template reads "Putting [something] on [something]", its label has no brackets.
    parse = lambda file: [("20bn-something-something-v2", str(clip["id"]), clip["template"].replace("[", "").replace("]", ""))
                          for clip in json.load(file)]
    numbers = read("labels", lambda file: {label: int(number) for label, number in json.load(file).items()})
    return assemble(root, sorted(numbers, key=numbers.get), dict(train=read("train", parse), val=read("validation", parse)))

def hmdb51_data(root, split=1):
    """CLASS_test_split{1,2,3}.txt, lines of `video.avi use`, use 1 train, 2 test, 0 neither, in ROOT or its folder
    testTrainMulti_7030_splits; CLASS/*.avi in ROOT, hmdb51_org or videos."""
    ending, folder = f"_test_split{split}.txt", f"{root}/testTrainMulti_7030_splits"
    folder = folder if os.path.isdir(folder) else root
    classes = sorted(name.removesuffix(ending) for name in os.listdir(folder) if name.endswith(ending) and name[0] != ".")
    if not classes:
        raise DataError(f"{folder} has no file CLASS{ending}; --data hmdb51 needs one for each class")
    place = next((p for p in ("hmdb51_org/", "videos/") if any(os.path.isdir(f"{root}/{p}{name}") for name in classes)), "")
    parse = lambda file: [(os.path.splitext(video)[0], int(use)) for video, use in map(str.split, filter(str.strip, file))]
    uses = {name: annotations(folder, parse, name + ending) for name in classes}
    return assemble(root, classes, {split: [(place + name, video, name) for name in classes for video, use in uses[name]
                                            if use == wanted] for split, wanted in zip(SPLITS, (1, 2))})

def diving48_data(root):
    """Diving48_V2_{train,test}.json, Diving48_vocab.json; rgb/ID.mp4."""
    read = lambda name, parse: annotations(root, parse, f"Diving48_{name}.json", f"annotations/Diving48_{name}.json")
    parse = lambda file: [("rgb", str(clip["vid_name"]), int(clip["label"])) for clip in json.load(file)]
    classes = read("vocab", lambda file: [" ".join(words) for words in json.load(file)])
    return assemble(root, classes, dict(train=read("V2_train", parse), val=read("V2_test", parse)))

def annotations(root, parse, *names):
    """parse(the first of these files that is there)."""
    path = existing(root, *names)
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            return parse(file)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} is not as README.md's table of the benchmarks has it ({type(error).__name__}: {error})")

def existing(root, *names):
    """The path of the first of these that is in ROOT."""
    paths = [f"{root}/{name}" for name in names]
    if not any(map(os.path.exists, paths)):
        raise DataError(" is not there, nor is ".join(paths) + " is not there" * (len(paths) == 1))
    return next(filter(os.path.exists, paths))

def video_files(folder):
    """The sorted paths of the video files in a folder and its folders, without dead links and names that begin with a dot."""
    entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."] if os.path.isdir(folder) else []
    files = [entry.path for entry in entries if entry.name.lower().endswith(VIDEO_SUFFIXES) and entry.is_file()]
    return sorted(files + [path for entry in entries if entry.is_dir() for path in video_files(entry.path)])

def assemble(root, classes, rows):
    """Rows of each split, (path, class) or (folder, video without suffix, class), a class its name or number → Videos."""
    if not classes:
        raise DataError(f"{root} has no training videos, so no classes")
    numbers, listed, found, missing = {name: i for i, name in enumerate(classes)}, {}, {}, []
    for split in SPLITS:
        found[split], seen = [], Counter()
        for *folder, video, label in rows[split]:
            if (label := numbers.get(label, label)) not in range(len(classes)):
                raise DataError(f"{root} gives the {split} video {video} the class {label!r}, which is none of its {len(classes)}")
            for f in set(folder) - set(listed):  # to ask a network disk for each of 240,000 names would take minutes
                listed[f] = {os.path.splitext(os.path.basename(path))[0]: path for path in video_files(f"{root}/{f}")}
            path = listed[folder[0]].get(video) if folder else video
            found[split] += [(seen[label], label, path)] if path else []
            missing += [] if path else [(split, f"{root}/{folder[0]}/{video}.*")]
            seen[label] += 1
        # The first video of each class, then the second of each, …: then --limit sees all classes.
        found[split] = [(path, label) for _, label, path in sorted(found[split])]
    return Videos(found["train"], found["val"], classes, missing)

SOURCES = dict(
    k400=kinetics_data, ssv2=something_data, hmdb51=hmdb51_data, diving48=diving48_data, folder=folder_data, list=list_data,
    demo=lambda root: drawn_data(root, (1536, 256), draw_moving, MOVING_CLASSES))

def find_videos(data, root=None, split=None, whole=SPLITS):
    """The lists of a data set; DataError unless each in `whole` has videos, and (k400: four fifths of) them are on the disk."""
    root = root or os.path.join("data", data)
    if split and data != "hmdb51":
        raise DataError(f"--split chooses one of HMDB51's three; {data} has one")
    if data != "demo" and not os.path.isdir(root):
        raise DataError(f"the data folder {root} is not there; say with --root where the {data!r} data are")
    videos = SOURCES[data](root, split) if split else SOURCES[data](root)
    for part in whole:
        there, absent = getattr(videos, part), [path for s, path in videos.missing if s == part]
        listed = len({path for path, _ in there} | set(absent))
        if len(absent) > (listed // 5 if data == "k400" else 0):  # every download of Kinetics lacks some; the others come whole
            raise DataError(f"{len(absent)} of {listed} {part} videos are not there (data.py lists them), such as {absent[0]}")
        if not there or len(videos.classes) < 2:
            raise DataError(f"{root} has {len(there)} {part} videos and {len(videos.classes)} classes; it needs 1 and 2 at least")
        empty = sorted(set(range(len(videos.classes))) - {label for _, label in there})
        if empty and part == "train" and data != "diving48":  # of its 48 names the corrected labels (V2) need not use all
            raise DataError(f"{root} has no training video of the class {videos.classes[empty[0]]!r}")
    return videos

# ---------------------------------------------------------------- samples of labelled videos
class Clips(torch.utils.data.Dataset):
    """Training clips of labelled videos: item (epoch, i) → (augmented clip (T, 3, S, S) uint8, label, messages). Another
    video takes the place of one that cannot be read, and the message travels with it; after ten, the clip is None."""
    def __init__(self, samples, num_frames, size, sampling="dense", strides=(1,), augment="rand", seed=0, **options):
        self.samples, self.num_frames, self.sampling, self.strides, self.seed = samples, num_frames, sampling, strides, seed
        self.transform = training_transform(augment, size, **options)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        # What is drawn depends on (seed, epoch, index) alone: not on the worker, nor on what came before.
        (epoch, index), failures, frames = item, [], None
        rng = np.random.default_rng([self.seed, epoch, index])
        position = rng.random() if self.sampling == "dense" else rng.random(self.num_frames)
        stride = self.strides[rng.integers(len(self.strides))]
        while frames is None:
            path, label = self.samples[index]
            try:
                frames = read_frames(path, lambda n: clip_frames(n, self.num_frames, self.sampling, stride, position))
            except VideoError as error:
                failures.append(str(error))
                if len(failures) == 10:
                    return None, label, failures
                index, frames = int(rng.integers(len(self))), None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            clip = self.transform(torch.from_numpy(frames).permute(0, 3, 1, 2))
        return clip.contiguous(), label, failures

def collate(items):
    """Items of Clips → clips (B, T, 3, S, S) uint8 (None after ten unreadable videos in a row), labels (B,), messages."""
    clips, labels, failures = zip(*items)
    return None if any(clip is None for clip in clips) else torch.stack(clips), torch.tensor(labels), sum(failures, [])

class Views(torch.utils.data.Dataset):
    """All test views of labelled videos, from one decode each: item i → ((clips × crops, T, 3, S, S) uint8, label, i, the clips'
    frames' numbers), crops evenly along the longer side; or (None, label, i, message) of one that cannot be read."""
    def __init__(self, samples, num_frames, size, sampling="dense", stride=1, views=(1, 1)):
        self.samples, self.size, self.sampling, self.views = samples, size, sampling, views
        self.clip = partial(clip_frames, num_frames=num_frames, sampling=sampling, stride=stride)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        (path, label), (clips, crops), size, numbers = self.samples[index], self.views, self.size, []
        evenly = lambda n: [0.5] if n == 1 else [i / (n - 1) for i in range(n)]
        # dense: starts evenly spread over the video; uniform: points evenly spread over each segment
        places = evenly(clips) if self.sampling == "dense" else [(c + 0.5) / clips for c in range(clips)]
        try:
            frames = read_frames(path, lambda n: numbers.extend(i for p in places for i in self.clip(n, position=p)) or numbers)
        except VideoError as error:
            return None, label, index, str(error)
        frames = F.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), [size], antialias=True)  # the shorter side
        room = [frames.shape[-2] - size, frames.shape[-1] - size]
        views = [F.crop(frames, round(room[0] * p), round(room[1] * p), size, size) for p in evenly(crops)]
        return torch.stack(views).unflatten(1, (clips, -1)).transpose(0, 1).flatten(0, 1), label, index, numbers

# ---------------------------------------------------------------- drawn data: the demo
MOTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
TEXTURES = ("horizontal", "vertical")
MOVING_CLASSES = [(motion, texture) for motion in MOTIONS for texture in TEXTURES]
SIZE, SAMPLED = 64, (0, 4, 8, 12)  # pixels per side; which of the 16 frames the demo's spatial path sees

class Scene:
    """A striped thing on a smooth background; the seed decides all but stripes and place. The stripes, 2 px dark and 2 px light,
    vanish when a frame is shrunk by 4. Noise in the background would let the codec leave a trace that betrays the direction."""
    def __init__(self, rng):
        tint = lambda: rng.uniform(-25, 25, 3)
        luma, contrast = rng.uniform(90, 165), rng.uniform(55, 80)
        self.colour = luma + tint()
        y, x = np.mgrid[:SIZE, :SIZE][..., None] / SIZE - 0.5
        self.background = luma + (contrast if luma < 127 else -contrast) + tint()
        self.background = self.background + y * rng.uniform(-30, 30, 3) + x * rng.uniform(-30, 30, 3)
        self.radius, self.round = int(rng.choice((8, 10))), bool(rng.integers(2))  # whole periods of the stripes across

    def draw(self, texture, cy, cx):
        """The thing centred on the corner (cy, cx) between pixels → (SIZE, SIZE, 3) uint8."""
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5 - np.reshape((cy, cx), (2, 1, 1))
        depth = self.radius - (np.hypot(y, x) if self.round else np.maximum(abs(y), abs(x)))  # px to the rim, < 0 outside
        stripes = np.where(((y if texture == "horizontal" else x) // 2) % 2 == 0, 45, -45) * (depth / 2).clip(0, 1)  # fading
        image = np.where((depth > 0)[..., None], self.colour + stripes[..., None], self.background)
        return image.round().clip(0, 255).astype(np.uint8)

def draw_moving(seed, motion, texture):
    """One clip of the demo → (16, 64, 64, 3) uint8. With the same seed, left and right (up and down) show
    the same sampled frames in opposite order: the path is centred on the middle of those."""
    rng = np.random.default_rng(seed)
    scene, speed = Scene(rng), rng.uniform(2.2, 3.0)  # px a frame: 33 to 45 px in all
    margin = scene.radius + round(speed * np.mean(SAMPLED))
    along, across = rng.integers(margin, SIZE - margin + 1), rng.integers(scene.radius, SIZE - scene.radius + 1)
    dy, dx = MOTIONS[motion]
    cy, cx = (along, across) if dy else (across, along)
    return np.stack([scene.draw(texture, cy + dy * s, cx + dx * s) for s in np.rint(speed * (np.arange(16) - np.mean(SAMPLED)))])

def write_video(path, frames, rate=8):
    """frames (T, H, W, 3) uint8 → an H.264 mp4 at `path`, the same bytes every time."""
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        # With mbtree x264 is not deterministic; with more threads its bytes can depend on the number of cores.
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": "23", "x264-params": "mbtree=0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

def drawn_data(root, numbers, draw, classes):
    """Draws and encodes ROOT/train and ROOT/val, unless they are there; a folder appears only whole."""
    for split, number in zip(SPLITS, numbers):
        final, temporary = f"{root}/{split}", f"{root}/{split}.{os.getpid()}.tmp"
        try:
            job = partial(draw_file, temporary, split == "val", draw, classes)
            list(() if os.path.isdir(final) else in_parallel(job, range(number), f"drawing {final}"))
            if not os.path.isdir(final):  # another run may have finished first
                os.rename(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder_data(root)

def draw_file(folder, is_val, draw, classes, i):
    kind = classes[i % len(classes)]
    path = os.path.join(folder, "_".join(map(str, kind)), f"{i:05d}.mp4")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_video(path, draw([is_val, i], *kind))

def in_parallel(work, jobs, title):
    """Yields work(job) of each job, in order; several processes of one thread each do it."""
    with concurrent.futures.ProcessPoolExecutor(min(8, os.cpu_count()), None, torch.set_num_threads, (1,)) as pool:
        yield from tqdm(pool.map(work, jobs, chunksize=16), title, len(jobs), unit="video", **BAR)

# ---------------------------------------------------------------- check a data set
def try_video(num_frames, sampling, path):
    """(number of frames, what is wrong or None, seconds for reading, seconds for augmenting) of one training sample."""
    start, counts = time.perf_counter(), []
    try:
        frames = read_frames(path, lambda n: counts.append(n) or clip_frames(n, num_frames, sampling, 4, 0.5))
    except VideoError as error:
        return 0, str(error), 0, 0
    read = time.perf_counter()
    training_transform("rand", 224)(torch.from_numpy(frames).permute(0, 3, 1, 2)).contiguous()
    return counts[0], None, read - start, time.perf_counter() - read

def check(videos, args, table):
    """Writes what is wrong with a data set to the table, as it is found, and prints a summary; 0 if all is well but short."""
    kinds, seconds = Counter(), []
    report = lambda kind, what, details="": (table.writerow((kind, what, details)), kinds.update([kind]))
    for split, path in videos.missing:
        report("missing", path, split)
    for split in SPLITS:
        for label in sorted(set(range(len(videos.classes))) - {label for _, label in getattr(videos, split)}):
            report(f"no {split} video", videos.classes[label])
    paths = sorted({path for path, _ in videos.train + videos.val} - {path for _, path in videos.missing})
    paths = [paths[i] for i in sorted(np.random.default_rng(0).permutation(len(paths))[:max(0, args.limit)])]
    for (count, error, *times), path in zip(in_parallel(partial(try_video, args.frames, args.sampling), paths, "reading"), paths):
        if error or count < (args.frames if args.sampling == "uniform" else 4 * args.frames - 3):
            report("unreadable" if error else "short", path, error or f"{count} frames")
        seconds += [] if error else [times]
    print(f"{len(paths)} read; problems-{args.data}.csv: {', '.join(f'{n} x {kind}' for kind, n in kinds.items()) or 'none'}")
    if seconds:
        read, made = 1000 * np.mean(seconds, axis=0)
        print(f"a sample of {args.frames} frames: {read:.1f} ms reading + {made:.1f} ms augmenting;"
              f" {1000 / (read + made):.1f} samples/s per worker, {read + made:.0f} workers for 1,000 clips/s")
    return int(bool(set(kinds) - {"short"}))

def main(argv=None):
    parser = argparse.ArgumentParser(description="Make one training sample of every video; report problems and speed.")
    add = parser.add_argument
    add("--data", default="demo", choices=SOURCES, metavar="NAME", help=f"{', '.join(SOURCES)} (%(default)s)")
    add("--root", help="folder of the data (data/NAME)")
    add("--split", type=int, choices=(1, 2, 3), help="HMDB51's (1)")
    add("--frames", type=int, default=16, choices=(1, 8, 16, 32, 48), help="frames per clip, of 224 px (%(default)s)")
    add("--sampling", choices=("dense", "uniform"), default="uniform", help="every fourth, or the whole length (%(default)s)")
    add("--limit", type=int, default=10**9, metavar="N", help="only so many videos, drawn by chance (all)")
    args = parser.parse_args(argv)
    try:
        videos = find_videos(args.data, args.root, args.split, whole=())
        print(f"{len(videos.train)} training and {len(videos.val)} validation videos, {len(videos.classes)} classes")
        with open(f"problems-{args.data}.csv", "w", newline="", errors="surrogateescape") as file:
            file.write("problem,video or class,details\n")
            return check(videos, args, csv.writer(file, lineterminator="\n"))
    except (DataError, OSError, KeyboardInterrupt, concurrent.futures.BrokenExecutor) as error:
        raise SystemExit(f"data.py: {str(error) or 'stopped'}")

if __name__ == "__main__":
    raise SystemExit(main())
