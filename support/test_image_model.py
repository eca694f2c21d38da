"""The image model: what does not belong together is refused, and weights come from many files."""

import json
import logging

import open_clip
import pytest
import safetensors.torch
import torch

from conftest import SHARED, TINY, needs_shared, random_video, vit_folder
from model import build_model
from support import backbones
from support.backbones import NO_TEXT
from support.processes import UserError

# SHA-256 of the tiny image model's frozen weights. DualPath trains two of them, and leaves those
# out. The checkpoints that people have name the weights by these numbers.
FROZEN = {
    "aim": "174434e4f0c766973abb3230745cb0ab384f0b5402a9a2e2787017c54a86fc6d",
    "dualpath": "4615910ce04c129aafc12ab2a07a257f3f4a04f1b29bd07a1d72c769606a4d25",
}


@pytest.mark.parametrize("method", FROZEN)
def test_the_fingerprint_of_weights_stays_what_it_has_been(method):
    assert build_model(**TINY, method=method).fingerprint == FROZEN[method]


# ---------------------------------------------------------------- refused before a download
@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("this must be refused before anything is built or downloaded")

    monkeypatch.setattr(open_clip, "create_model", refuse)


@pytest.mark.parametrize(
    "backbone, tag, words",
    [
        ("ViT-B-16", "openai", "QuickGELU.*ViT-B-16-quickgelu"),
        ("ViT-L-14", "dfn2b", "ViT-L-14-quickgelu"),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "with GELU.*--backbone ViT-B-16$"),
        ("ViT-B-16", "nonsense", "nonsense.*openai"),
        ("ViT-B-61", "openai", "ViT-B-16"),
        ("RN50", "openai", "not supported"),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "not supported"),
        ("local-dir:/no/where", "openai", "/no/where"),
        ("ViT-B-32", "openai", "take --backbone ViT-B-32-quickgelu"),
    ],
)
def test_weights_and_backbones_that_do_not_belong_together_are_refused_at_once(
    backbone, tag, words, offline
):
    with pytest.raises(UserError, match=words):
        build_model(backbone=backbone, pretrained=tag)


def test_what_was_logged_before_is_logged_again(builtin):
    for level in (logging.NOTSET, logging.CRITICAL):
        logging.disable(level)
        backbones.load_image_model(str(builtin), None)
        assert logging.root.manager.disable == level
    logging.disable(logging.NOTSET)


def test_without_a_network_the_sentence_says_what_to_do(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known\nand forty more lines")

    monkeypatch.setattr(open_clip, "create_model", no_network)
    words = "without a network.*--pretrained PATH.*not known"
    with pytest.raises(UserError, match=words) as error:
        build_model(pretrained="openai")
    assert "forty" not in str(error.value)
    assert "download https://openaipublic.azureedge.net/clip/models/" in str(error.value)
    words = "download https://huggingface.co/laion/CLIP-ViT-B-16.* elsewhere"
    with pytest.raises(UserError, match=words):
        build_model(backbone="ViT-B-16", pretrained="laion2b_s34b_b88k")
    with pytest.raises(UserError, match="cannot load the image model 'tiny': Name"):
        build_model(**TINY)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="could not be loaded"):
        build_model(backbone=vit_folder(tmp_path), pretrained="openai")


# ---------------------------------------------------------------- weights from local files
@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    """A small model under a name that open_clip knows, so that --pretrained PATH can be tried."""
    folder = tmp_path_factory.mktemp("config")
    vision = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": NO_TEXT}
    with open(folder / "small-vit.json", "w") as file:
        json.dump(config, file)
    open_clip.add_model_config(folder / "small-vit.json")
    return "small-vit"


class Holder(torch.nn.Module):
    """A module with the state of a CLIP, to be scripted as OpenAI's archives are."""

    def __init__(self, clip):
        super().__init__()
        self.visual, self.logit_scale = torch.nn.Module(), clip.logit_scale
        for name, p in clip.visual.named_parameters():
            *path, last = name.split(".")
            module = self.visual
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, torch.nn.Parameter(p.detach().half()))
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self):
        return self.logit_scale


def write_weights(clip, path, kind):
    """The weights of a CLIP as one of the files that they come in; returns those of its tower."""
    whole, tower = clip.state_dict(), clip.visual.state_dict()
    if kind == "clip.safetensors":
        safetensors.torch.save_file(whole, path)
    elif kind == "torchscript.pt":
        torch.jit.script(Holder(clip)).save(path)
        tower = {name: weight.half().float() for name, weight in tower.items()}
    elif kind == "training.pt":
        state = {f"module.{name}": weight for name, weight in whole.items()}
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save({"clip.pt": whole, "tower.bin": tower}[kind], path)
    return tower


@pytest.mark.parametrize(
    "kind", ["clip.pt", "tower.bin", "training.pt", "clip.safetensors", "torchscript.pt"]
)
def test_weights_come_from_local_files(kind, builtin, tmp_path, capsys):
    path = str(tmp_path / kind)
    tower = write_weights(open_clip.create_model(builtin), path, kind)
    visual = build_model(**TINY | {"backbone": builtin, "pretrained": path}).visual
    assert all(torch.equal(weight, tower[name]) for name, weight in visual.state_dict().items())
    assert "uses GELU" in capsys.readouterr().out


@pytest.mark.parametrize("size, tokens", [(48, 1 + 6 * 6), (None, 1 + 4 * 4)])
def test_weights_from_a_file_fit_another_image_size(size, tokens, builtin, tmp_path):
    path = str(tmp_path / "clip.pt")
    tower = write_weights(open_clip.create_model(builtin), path, "clip.pt")
    options = {"backbone": builtin, "pretrained": path, "image_size": size}
    visual = build_model(**TINY | options).visual
    assert visual.positional_embedding.shape == (tokens, 48)
    assert torch.equal(visual.conv1.weight, tower["conv1.weight"])
    torch.testing.assert_close(visual.positional_embedding[0], tower["positional_embedding"][0])


@pytest.mark.parametrize("size", [3, 7])
def test_an_image_smaller_than_a_patch_is_refused(size, builtin, tmp_path):
    path = str(tmp_path / "clip.pt")
    write_weights(open_clip.create_model(builtin), path, "clip.pt")
    with pytest.raises(UserError, match=f"'small-vit' at {size} does not take {path}: "):
        build_model(**TINY | {"backbone": builtin, "pretrained": path, "image_size": size})


def test_a_file_of_weights_goes_into_a_folders_model(tmp_path):
    folder = vit_folder(tmp_path)  # which has no weights of its own
    tower = write_weights(open_clip.create_model(folder), tmp_path / "clip.pt", "clip.pt")
    visual = build_model(backbone=folder, pretrained=str(tmp_path / "clip.pt")).visual
    assert torch.equal(visual.conv1.weight, tower["conv1.weight"])


def test_a_name_with_one_activation_alone_is_not_sent_to_another_that_there_is_not():
    backbones.check_tag("roberta-ViT-B-32", "laion2b_s12b_b32k")


def without_projection(state):
    del state["proj"]


def with_another_tensor(state):
    state["extra"] = torch.zeros(1)


def with_a_wider_projection(state):
    state["proj"] = torch.zeros(48, 25)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (without_projection, "proj is missing"),
        (with_another_tensor, "extra is not expected"),
        (with_a_wider_projection, r"proj has shape \(48, 25\), not \(48, 24\)"),
    ],
)
def test_files_that_do_not_fit_are_refused(spoil, words, builtin, tmp_path):
    state = open_clip.create_model(builtin).visual.state_dict()
    spoil(state)
    path = str(tmp_path / "tower.pt")
    torch.save(state, path)
    with pytest.raises(UserError, match=words):
        build_model(**TINY | {"backbone": builtin, "pretrained": path})


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin"])
def test_a_file_that_holds_no_weights_is_refused(name, builtin, tmp_path):
    path = tmp_path / name
    path.write_text("not weights")
    with pytest.raises(UserError, match="cannot read weights"):
        build_model(**TINY | {"backbone": builtin, "pretrained": str(path)})


@needs_shared
def test_real_pretrained_weights_load():
    backbone = f"local-dir:{SHARED}/weights/vit_tiny_in21k"
    model = build_model(backbone=backbone, num_frames=16).eval()
    clip = open_clip.create_model_and_transforms(backbone)[0].eval()
    video = random_video(1, 16, 224)
    with torch.no_grad():
        want = clip.encode_image((video[0, ::2] / 255 - 0.5) / 0.5).mean(0)
        assert (model.features(video)[0][0] - want).norm() / want.norm() <= 1e-5
