"""Clips, augmentation and test views: data.py."""

import numpy as np
import pytest
import torch

import data
from conftest import random_video
from support.datasets import find_videos
from support.processes import UserError
from support.video import Frames


def dense(available, position, num_frames=4, stride=2):
    return data.clip_frames(available, num_frames, "dense", stride, position).tolist()


def test_dense_clips_cover_the_video_and_repeat_the_last_frame():
    assert dense(10, 0) == [0, 2, 4, 6] and dense(10, 1) == [3, 5, 7, 9]
    assert dense(7, 0.9) == [0, 2, 4, 6]
    assert dense(3, 0.5) == [0, 2, 2, 2] and dense(1, 0.5) == [0, 0, 0, 0]
    starts = [dense(100, clip / 2)[0] for clip in range(3)]
    assert starts == [0, 46, 93]


def uniform(available, position, num_frames=4):
    return data.clip_frames(available, num_frames, "uniform", 1, position).tolist()


def test_uniform_clips_take_one_frame_of_each_segment():
    assert uniform(40, 0.5) == [5, 15, 25, 35]
    starts = [uniform(120, (clip + 0.5) / 3)[:2] for clip in range(3)]
    assert starts == [[5, 35], [15, 45], [25, 55]]
    assert uniform(40, np.array([0, 0.99, 0, 1.0])) == [0, 19, 20, 39]
    assert uniform(4, 0.999) == [0, 1, 2, 3]


def test_uniform_clips_spread_short_videos_with_repeats():
    assert uniform(2, 0.5) == [0, 0, 1, 1] and uniform(1, 0.5) == [0, 0, 0, 0]
    assert uniform(3, 0.5, 6) == [0, 0, 1, 1, 2, 2]
    drawn = {tuple(uniform(3, np.random.default_rng(i).random(4))) for i in range(20)}
    assert len(drawn) > 3  # the random position matters


def test_a_training_clip_depends_on_seed_epoch_and_index_alone(micro):
    videos = find_videos("folder", micro).train

    def make(seed=0):
        transform = data.training_transform("rand", 48)
        return data.TrainingClips(videos, 8, transform, "uniform", seed=seed)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = make()[3, 5][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    clips = make()
    assert not torch.equal(clips[0, 1][0], one)  # what is drawn before does not matter
    assert torch.equal(clips[3, 5][0], one)
    assert one.shape == (8, 3, 48, 48) and one.dtype == torch.uint8
    assert not torch.equal(clips[4, 5][0], one)
    assert not torch.equal(make(seed=1)[3, 5][0], one)
    loader = torch.utils.data.DataLoader(
        clips, batch_sampler=[[(3, 4), (3, 5)]], num_workers=1, collate_fn=data.collate
    )
    batch, labels, messages = next(iter(loader))
    assert torch.equal(batch[1], one)
    assert labels.tolist() == [videos[4][1], videos[5][1]] and messages == []


def blank(numbers):
    """Frames without a picture, in place of a video's."""
    return Frames(np.zeros((len(numbers), 64, 64, 3), np.uint8), numbers, len(numbers))


def test_of_several_strides_one_is_drawn(monkeypatch):
    steps = []

    def read(path, choose):
        numbers = choose(500)
        steps.append(np.diff(numbers).tolist())
        return blank(numbers)

    monkeypatch.setattr(data, "read_frames", read)
    crop = data.training_transform("crop", 64)
    clips = data.TrainingClips([("a", 0)] * 200, 8, crop, "dense", (1, 2, 4, 8))
    for i in range(200):
        assert clips[0, i][0].shape == (8, 3, 64, 64)
    assert all(taken == [taken[0]] * 7 for taken in steps) and len(steps) == 200
    strides = [taken[0] for taken in steps]
    assert set(strides) == {1, 2, 4, 8} and min(np.bincount(strides)[[1, 2, 4, 8]]) > 25


def test_translation_moves_whole_pixels_and_all_frames_alike():
    transform = data.training_transform("translate", 64, flip=True)
    clip = torch.arange(64 * 64).view(1, 1, 64, 64).expand(2, 3, -1, -1).contiguous()
    shifts = set()
    for _ in range(50):
        out = transform(clip)
        dy, dx = divmod(int(out[0, 0, 32, 32]), 64)
        shifts.add((dy - 32, dx - 32))
        assert torch.equal(out[0], out[1])
        inner = clip[0, 0, dy - 24 : dy + 24, dx - 24 : dx + 24]
        assert torch.equal(out[0, 0, 8:56, 8:56], inner)
    assert len(shifts) > 20
    assert max(abs(s) for shift in shifts for s in shift) == 4


# ---------------------------------------------------------------- data.py: augmentation
def test_randaugment_changes_most_clips_and_draws_once_for_all_frames():
    clip, unchanged, kinds = random_video(1, 1, 40)[0].expand(3, -1, -1, -1), 0, set()
    for i in range(200):
        torch.manual_seed(i)
        out = data.rand_augment(clip)
        assert out.shape == clip.shape and out.dtype == torch.uint8
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
        unchanged += torch.equal(out, clip)
        kinds.add(out.sum().item())
        torch.manual_seed(i)
        assert torch.equal(data.rand_augment(clip), out)
    assert 3 <= unchanged <= 25 and len(kinds) > 150  # each of four with probability 1/2: 1/16


def test_crop_has_no_randaugment_and_erasing_comes_after_it(monkeypatch):
    monkeypatch.setattr(data, "RAND_AUGMENT", lambda image: image.point(lambda value: 0))
    bright = torch.full((2, 3, 40, 40), 200, dtype=torch.uint8)
    assert (data.training_transform("crop", 32)(bright) == 200).all()
    assert not data.training_transform("rand", 32)(bright).any()
    out = data.training_transform("rand", 32, erasing=1.0)(bright)
    assert set(out.flatten().tolist()) == {0, 128}


def test_erasing_greys_one_box_of_some_clips():
    bright, erased = torch.full((3, 3, 64, 64), 255, dtype=torch.uint8), 0
    transform = data.training_transform("crop", 64, flip=False, erasing=0.5)
    for _ in range(100):
        grey = transform(bright) == 128
        assert torch.equal(grey[0], grey[2])
        if grey.any():
            erased += 1
            area = grey[0, 0].any(1).sum() * grey[0, 0].any(0).sum()
            assert grey[0, 0].sum() == area and 0.01 * 64**2 < area < 0.36 * 64**2
    assert 30 <= erased <= 70
    transform = data.training_transform("crop", 64, flip=False)
    assert not any((transform(bright) == 128).any() for _ in range(20))


def rising(levels, size=64, frames=3):
    """A clip that is brighter to the right."""
    row = torch.as_tensor(levels).expand(size, size).to(torch.uint8)
    return row.expand(frames, 3, -1, -1).contiguous()


def test_crops_are_alike_in_all_frames_and_flip_can_be_switched_off():
    for flip in (True, False):
        transform = data.training_transform("crop", 32, flip)
        outs = [transform(rising(torch.arange(64.0))).float() for _ in range(30)]
        for out in outs:
            assert torch.equal(out[0], out[2]) and out.shape == (3, 3, 32, 32)
        assert len({out[0, 0, 16, 0].item() for out in outs}) > 5
        upright = sum(bool(out[0, 0, 16, -1] > out[0, 0, 16, 0]) for out in outs)
        assert (5 <= upright <= 25) if flip else upright == 30


def test_a_crop_keeps_at_least_its_share_of_the_frame():
    picture = rising(torch.arange(64.0) * 4, frames=1)
    for least in (0.08, 0.9):
        transform, widths = data.training_transform("crop", 64, flip=False, crop_area=least), set()
        for _ in range(40):
            row = transform(picture)[0, 0, 32]
            widths.add((row[-1].item() - row[0].item()) / 252)
        # 0.9 of the area is 0.9 wide.
        assert min(widths) < 0.5 if least == 0.08 else min(widths) > 0.85
        assert len(widths) > 5


# ---------------------------------------------------------------- data.py: test views
def test_views_are_start_centre_and_end(micro, monkeypatch):
    samples = find_videos("folder", micro).val
    views = data.VideoViews(samples, 4, 32, stride=2, views=(2, 3))[1]
    assert views.pixels.shape == (6, 4, 3, 32, 32)
    assert (views.label, views.index, views.error) == (1, 1, None)
    assert views.numbers == [0, 2, 4, 6, 9, 11, 13, 15]

    def wide(path, choose):
        numbers = choose(10)
        frames = np.empty((len(numbers), 64, 128, 3), np.uint8)
        frames[..., :2] = np.arange(128)[:, None]  # red and green are the column
        frames[..., 2] = np.reshape(numbers, (-1, 1, 1))  # blue is the frame's number
        return Frames(frames, list(numbers), 10)

    def tall(path, choose):
        video = wide(path, choose)
        return video._replace(pixels=video.pixels.transpose(0, 2, 1, 3))

    monkeypatch.setattr(data, "read_frames", wide)
    views = data.VideoViews(samples, 2, 64, stride=1, views=(2, 3))[0]
    assert views.numbers == [0, 1, 8, 9]  # clip by clip
    assert views.pixels[:, :, 2, 0, 0].tolist() == [[0, 1]] * 3 + [[8, 9]] * 3
    ends = views.pixels[:, 0, 0, 0, [0, -1]].tolist()
    assert ends == [[0, 63], [32, 95], [64, 127]] * 2
    monkeypatch.setattr(data, "read_frames", tall)
    views = data.VideoViews(samples, 4, 64)[0]
    assert views.pixels[0, 0, 0, [0, -1], 0].tolist() == [32, 95]


def test_views_and_clips_ask_for_their_frames(monkeypatch):
    asked = []

    def read(path, choose):
        asked.append(choose(120))
        return blank(asked[-1])

    def ask(sampling, views):
        found = data.VideoViews([("a", 0)], 4, 32, sampling, 2, views)[0]
        assert found.pixels.shape == (views[0] * views[1], 4, 3, 32, 32)
        return np.reshape(asked.pop(), (views[0], 4)).tolist()

    monkeypatch.setattr(data, "read_frames", read)
    assert [clip[0] for clip in ask("dense", (3, 1))] == [0, 56, 113]
    clips = ask("uniform", (3, 2))
    assert clips == [[5, 35, 65, 95], [15, 45, 75, 105], [25, 55, 85, 115]]
    assert ask("dense", (1, 3)) == [[56, 58, 60, 62]]
    for sampling in ("dense", "uniform"):
        crop = data.training_transform("crop", 32)
        clips = data.TrainingClips([("a", 0)], 4, crop, sampling, (2,))
        starts, gaps = [], set()
        for epoch in range(50):
            assert clips[epoch, 0][0].shape == (4, 3, 32, 32)
            numbers = asked.pop()
            starts.append(numbers[0])
            gaps.add(int(numbers[1] - numbers[0]))
        assert len(set(starts)) > 15 and min(starts) < 10
        assert (len(gaps) > 10) == (sampling == "uniform")  # a place of its own in each segment
        assert max(starts) > (100 if sampling == "dense" else 20)


def test_an_unreadable_video_is_replaced_in_training_and_reported_in_testing(micro, tmp_path):
    bad = str(tmp_path / "bad.mp4")
    open(bad, "w").close()
    samples = [(bad, 0)] + find_videos("folder", micro).train
    transform = data.training_transform("rand", 32)
    clip, label, messages = data.TrainingClips(samples, 4, transform)[0, 0]
    assert clip.shape == (4, 3, 32, 32) and len(messages) == 1 and bad in messages[0]
    views = data.VideoViews(samples, 4, 32)[0]
    assert views.pixels is None and bad in views.error and views.numbers == []
    assert (views.index, views.label) == (0, 0)
    with pytest.raises(UserError, match=f"ten videos.*unreadable: cannot read {bad}"):
        data.TrainingClips([(bad, 0)], 4, transform)[0, 0]


def test_shuffled_views_keep_the_full_size_frames_at_their_places(micro):
    samples = find_videos("folder", micro).val
    plain = data.VideoViews(samples, 8, 32, views=(2, 1))[1].pixels
    mixed = data.VideoViews(samples, 8, 32, views=(2, 1), shuffled=4)[1].pixels
    again = data.VideoViews(samples, 8, 32, views=(2, 1), shuffled=4)[1].pixels
    assert torch.equal(mixed, again) and not torch.equal(mixed, plain)
    for part in (slice(0, None, 2), slice(1, None, 2)):  # seen at full size; the others
        for before, after in zip(plain[:, part], mixed[:, part], strict=True):
            same = [[torch.equal(a, b) for b in before] for a in after]
            assert all(any(row) for row in same)
