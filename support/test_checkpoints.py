"""Checkpoints: what is written is read back the same, old ones too; all else is refused unread."""

import copy
import csv
import io
import json
import os
import pickle
import resource
import shutil
import time
import zipfile
from collections import Counter

import numpy as np
import pytest
import safetensors.torch
import torch

import evaluate
import model as video_models
from adapters import METHODS
from conftest import HERE, THOROUGH, TINY, packed, random_video, randomise, save, seal, vit_folder
from model import build_model, load_checkpoint
from support.backbones import BACKBONES
from support.demo import draw_moving
from support.processes import UserError
from support.runs import MARK, load_weights, read_checkpoint

BEFORE = os.path.join(HERE, "support", "fixtures", "before_the_rebuild")


def contents(path):
    with open(path, "rb") as file:
        return file.read()


# ---------------------------------------------------------------- what is written is read back
@pytest.mark.parametrize(
    "options",
    [
        *[{"method": method} for method in METHODS],
        {"paths": "temporal"},
        {"pretrained": None},
        {"method": "st_adapter", "before": "both"},
    ],
    ids=str,
)
def test_checkpoint_round_trip_gives_identical_logits(options, tmp_path):
    model = randomise(build_model(**TINY | options)).eval()
    path = save(model, tmp_path / "a.pt", views=(3, 1))
    again, content = load_checkpoint(path)
    video = random_video()
    assert torch.equal(model(video), again(video)) and not again.training
    assert content["run"] == {"classes": [f"class {i}" for i in range(8)], "views": (3, 1)}
    assert again.config == content["model"]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    saves_all = "pretrained" in options or not frozen  # random weights are nowhere else
    assert (frozen <= content["weights"].keys()) == saves_all
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_kinetics_checkpoint_is_small(tmp_path):
    model = build_model(pretrained=None)
    model.config["pretrained"] = "openai"  # as it would be, with weights that need not be saved
    assert os.path.getsize(save(model, tmp_path / "a.pt")) <= 45e6


def test_other_frozen_weights_are_refused(tmp_path):
    path = save(build_model(**TINY), tmp_path / "a.pt")
    other = tmp_path / "other"
    shutil.copytree(BACKBONES["tiny"].removeprefix("local-dir:"), other)
    assert load_checkpoint(path, backbone=f"local-dir:{other}")
    state = safetensors.torch.load_file(other / "open_clip_model.safetensors")
    state["visual.proj"][3, 5] += 1e-3
    safetensors.torch.save_file(state, other / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="other frozen weights"):
        load_checkpoint(path, backbone=f"local-dir:{other}")
    with open(other / "open_clip_config.json") as file:
        config = json.load(file)
    config["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    shutil.copytree(BACKBONES["tiny"].removeprefix("local-dir:"), other, dirs_exist_ok=True)
    (other / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"pixels of mean .* and this dualpath .* has \[\[0.1, 0.2"):
        load_checkpoint(path, backbone=f"local-dir:{other}")
    one_path = build_model(**TINY | {"paths": "temporal"})  # around the same frozen weights
    with pytest.raises(UserError, match="A_s1.down.weight is not expected"):
        load_weights(one_path, read_checkpoint(path), path, head=False)


# ---------------------------------------------------------------- and what was written long ago
# support/fixtures/before_the_rebuild.pt is a small DualPath around a small random image model. It
# was trained and evaluated by the code as it was before it was divided into support/ and tools/:
# below are that code's logits, and before_the_rebuild.csv are its predictions for `micro`.
LOGITS_BEFORE = [
    [0.4833, 1.4599, 1.1100, 1.9062, -0.7237, 1.2623, 2.1669, -1.9558],
    [1.9101, 1.8780, -1.8098, -1.0749, 2.3691, -0.9768, 1.2829, -4.8495],
    [1.3880, 2.1536, -1.5957, -0.1791, 2.3707, -0.5392, 1.9976, -5.0353],
]


def image_model_before(folder):
    return vit_folder(folder, quick_gelu=True, width=20, head_width=5)


def test_a_checkpoint_of_before_the_rebuild_gives_its_logits(tmp_path):
    model, content = load_checkpoint(f"{BEFORE}.pt", backbone=image_model_before(tmp_path))
    kinds = [("left", "horizontal"), ("up", "vertical"), ("right", "vertical")]
    clips = np.stack([draw_moving([True, i], *kind) for i, kind in enumerate(kinds)])
    video = torch.from_numpy(clips[:, :, ::2, ::2]).permute(0, 1, 4, 2, 3)  # (3, 16, 3, 32, 32)
    assert model.config["pre_attention_adapter"] and len(content["run"]["classes"]) == 8
    torch.testing.assert_close(model(video), torch.tensor(LOGITS_BEFORE), rtol=0, atol=1e-4)


def predictions(path):
    """{video: {class: score}} of a file that --predictions wrote; a video is its last two names."""
    found = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            video = "/".join(row["video"].split("/")[-2:])
            assert row["label"] == video.split("/")[0]
            found[video] = {row[f"class{i}"]: float(row[f"score{i}"]) for i in range(1, 6)}
    return found


def test_a_checkpoint_of_before_the_rebuild_is_evaluated_as_it_was(micro, tmp_path, capsys):
    """Nearly: another version of the encoder may draw the videos a little differently."""
    path, written = str(tmp_path / "best.pt"), str(tmp_path / "predictions.csv")
    shutil.copy(f"{BEFORE}.pt", path)
    backbone = image_model_before(tmp_path / "small")
    options = ["--root", micro, "--backbone", backbone, "--predictions", written]
    evaluate.main([path, *options, "--device", "cpu", "--workers", "0"])
    out = capsys.readouterr().out
    assert "top-1 25.00 %   top-5 75.00 %   (8 videos" in out and "note" not in out
    before, now = predictions(f"{BEFORE}.csv"), predictions(written)
    assert before.keys() == now.keys() and len(before) == 8
    for video, scores in before.items():
        for name, score in scores.items():
            assert now[video].get(name, 0) == pytest.approx(score, abs=0.02), video


# ---------------------------------------------------------------- damage, code, full disks
def test_one_flipped_bit_is_refused(tmp_path):
    path = save(build_model(**TINY, method="linear"), tmp_path / "a.pt")
    whole = contents(path)
    somewhere = np.random.default_rng(0).integers(0, len(whole), 20)
    damaged = [whole[:length] for length in (0, 10, 100, len(whole) // 2, len(whole) - 1)]
    for place in [0, 40, *somewhere, len(whole) - 1]:
        spoilt = bytearray(whole)
        spoilt[place] ^= 1
        damaged.append(spoilt)
    for spoilt in damaged:
        with open(path, "wb") as file:
            file.write(spoilt)
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(str(tmp_path / "b.pt"))


class Evil:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    evil = Evil(str(tmp_path / "hacked"))
    path = seal(tmp_path / "a.pt", packed({"format": 1, "model": evil}))
    with pytest.raises(UserError, match="refused"):
        load_checkpoint(path)
    assert not os.path.exists(evil.folder)
    pickle.loads(pickle.dumps(evil))  # it would have run
    assert os.path.exists(evil.folder)


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model = build_model(**TINY, method="linear")
    path = save(model, tmp_path / "a.pt")
    before = contents(path)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    words = "cannot write .*a.pt, which stays as it was: No space left on device"
    with pytest.raises(UserError, match=words):
        save(randomise(model), path)
    assert contents(path) == before and os.listdir(tmp_path) == ["a.pt"]
    monkeypatch.undo()
    smaller = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, smaller[1]))  # a real one
    try:
        with pytest.raises(UserError, match="File too large"):
            save(randomise(model), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, smaller)
    assert contents(path) == before and os.listdir(tmp_path) == ["a.pt"]
    with pytest.raises(UserError, match="No such file"):
        save(model, tmp_path / "absent" / "a.pt")


# ---------------------------------------------------------------- files that mean harm
def laughs(depth):
    """A few lists, but 2 to the power of depth values."""
    value = ["ha"]
    for _ in range(depth):
        value = [value, value]
    return value


def has_classes_by_the_million(content):
    content["model"]["num_classes"] = 900_000
    content["run"]["classes"] = 900_000 * ["x"]


def has_an_optimiser_larger_than_its_bytes(content):
    state = {"exp_avg": torch.zeros(1).expand(10**9)}
    content["training"] = {"optimizer": {"state": {0: state}}}


def puts(part, **values):
    """A spoiler of one part of the content."""
    return lambda content: content[part].update(values)


def replaces(**values):
    return lambda content: content.update(values)


def puts_weight(name, tensor):
    return lambda content: content["weights"].update({name: tensor})


HOSTILE = {
    "a head with strides of 0": puts_weight("head.2.weight", torch.zeros(1).expand(10**9, 128)),
    "a head on no device": puts_weight("head.2.weight", torch.zeros(10**9, 128, device="meta")),
    "classes by the million": has_classes_by_the_million,
    "more values than bytes": puts("run", laughs=laughs(40)),
    "tensors in other places": has_an_optimiser_larger_than_its_bytes,
    "a kind that is not plain": puts("run", data=Counter("abc")),
    "names for other classes": lambda content: content["run"]["classes"].pop(),
    "huge adapters": puts("model", bottleneck=10**9),
    "adapters beyond numbers": puts("model", bottleneck=10**18),
    "frames by the billion": puts("model", num_frames=16 * 10**8),
    "frames by the thousand": puts("model", num_frames=16 * 10**3),
    "huge frames": puts("model", image_size=10**5),
    "no frames": puts("model", spatial_frames=0),
    "a fractional width": puts("model", bottleneck=0.5),
    "another method": puts("model", method="aim"),
    "an unknown option": puts("model", evil=1),
    "no backbone": lambda content: content["model"].pop("backbone"),
    "a backbone that is a number": puts("model", backbone=7),
    "no weights": lambda content: content["weights"].clear(),
    "a list of weights": replaces(weights=[torch.zeros(3)]),
    "sparse weights": puts_weight("head.2.bias", torch.zeros(8).to_sparse()),
    "no run": lambda content: content.pop("run"),
    "another format": replaces(format=2),
}


@pytest.mark.parametrize(
    "name, reason",
    [
        ("another format", "its format is 2, and this version reads 1"),
        ("names for other classes", "its names are those of other classes"),
        ("a kind that is not plain", "it holds a Counter"),
        ("no run", "it holds other things than this project's plain values and tensors"),
    ],
)
def test_a_refusal_says_what_is_wrong(name, reason, tmp_path):
    content = read_checkpoint(save(build_model(**TINY), tmp_path / "a.pt"))
    HOSTILE[name](content)
    with pytest.raises(UserError, match=f"is refused: {reason}"):
        read_checkpoint(seal(tmp_path / "b.pt", packed(content)))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_before_anything_is_built(name, tmp_path, monkeypatch):
    path = save(build_model(**TINY), tmp_path / "a.pt")
    content = read_checkpoint(path)
    built, original = [], video_models.load_image_model

    def recorded(*args, **kwargs):
        built.append(original(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(video_models, "load_image_model", recorded)
    HOSTILE[name](content)
    words = "is refused|does not fit|there is no method"
    with pytest.raises(UserError, match=words) as error:
        load_checkpoint(seal(tmp_path / "b.pt", packed(content)))
    assert "\n" not in str(error.value) and all(visual.proj.is_meta for visual in built)
    load_checkpoint(path)
    assert not built[-1].proj.is_meta  # it would have been seen


def rewritten(body, compression):
    """The same archive, written once more; and the new one's list of entries, to be spoilt."""
    file = io.BytesIO()
    archive = zipfile.ZipFile(file, "w", compression)
    with zipfile.ZipFile(io.BytesIO(body)) as old:
        for entry in old.infolist():
            archive.writestr(entry.filename, old.read(entry))
    return file, archive


def test_a_file_that_unpacks_to_more_than_it_holds_is_refused(tmp_path):
    body = packed(read_checkpoint(save(build_model(**TINY), tmp_path / "a.pt")))
    squeezed, archive = rewritten(body, zipfile.ZIP_DEFLATED)
    archive.close()
    assert len(squeezed.getvalue()) < len(body)
    shared, archive = rewritten(body, zipfile.ZIP_STORED)  # many names, one content
    largest = max(archive.filelist, key=lambda entry: entry.file_size)
    for i in range(10):
        again = copy.copy(largest)
        again.filename = f"{largest.filename}{i}"
        archive.filelist.append(again)
    archive.close()
    for file in (squeezed, shared):
        with pytest.raises(UserError, match="is refused"):
            load_checkpoint(seal(tmp_path / "b.pt", file.getvalue()))


def mutated(rng, content):
    """Bytes with one to three places flipped, overwritten, cut out or put in."""
    spoilt = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(spoilt)))
        kind = rng.integers(4)
        if kind == 0:
            spoilt[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            spoilt[place : place + 4] = rng.bytes(4)
        elif kind == 2:
            del spoilt[place : place + int(rng.integers(1, 100))]
        else:
            other = place // 2
            spoilt[place:place] = spoilt[other : other + int(rng.integers(1, 100))]
    return bytes(spoilt)


def load_or_refuse(path):
    """(model, content), or None where the file is refused with a sentence that names it."""
    started = time.monotonic()
    try:
        loaded = load_checkpoint(path)
    except UserError as error:
        assert "\n" not in str(error) and os.path.basename(path) in str(error)
        loaded = None
    assert time.monotonic() - started < 20
    return loaded


def test_mutated_checkpoints_are_refused_or_the_same(tmp_path):
    model = build_model(**TINY, method="linear")
    path = save(model, tmp_path / "a.pt", data="folder")
    whole, content, video = contents(path), read_checkpoint(path), random_video()
    body, want = whole.rpartition(MARK)[0], model.eval()(video)
    rng, spoilt = np.random.default_rng(0), str(tmp_path / "b.pt")
    number, refused = 500 if THOROUGH else 30, 0
    for _ in range(number):
        with open(spoilt, "wb") as file:
            file.write(mutated(rng, whole))
        assert load_or_refuse(spoilt) is None
        loaded = load_or_refuse(seal(spoilt, mutated(rng, body)))  # by someone who knows how
        if loaded is None:
            refused += 1
            continue
        # What was mutated is then not what the archive reads, or a value that a sealed file may
        # well have.
        again, got = loaded
        same = all(torch.equal(v, content["weights"][k]) for k, v in got["weights"].items())
        if same and got["model"] == content["model"]:
            assert torch.equal(again.eval()(video), want)
    assert refused > 10
