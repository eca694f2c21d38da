"""The frozen image model: open_clip's and torchvision's, their weights, and what is refused.

A mistake should be found before gigabytes are downloaded, and weights that belong to another
architecture should not be taken silently.
"""

import difflib
import hashlib
import logging
import os
import zipfile
from contextlib import contextmanager

import open_clip
import torch
from torchvision import models
from torchvision.ops import StochasticDepth

from support.checkpoints import check_fit
from support.errors import UserError
from support.processes import say
from support.towers import check_windows, is_plain, tower

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BACKBONES = {"tiny": "local-dir:" + os.path.join(ROOT, "assets", "tiny")}  # short names
SWINS = {  # torchvision's: what builds one, and the weights that imagenet1k stands for
    "swin_t": (models.swin_t, models.Swin_T_Weights.IMAGENET1K_V1),
    "swin_s": (models.swin_s, models.Swin_S_Weights.IMAGENET1K_V1),
    "swin_b": (models.swin_b, models.Swin_B_Weights.IMAGENET1K_V1),
}
NO_TEXT = {  # open_clip insists on a text tower; nobody uses it
    "width": 8,
    "heads": 1,
    "layers": 1,
    "context_length": 8,
    "vocab_size": 16,
}


def load_image_model(backbone, pretrained, image_size=None):
    """The image model as the video models take it (towers.py); raises UserError, if possible before
    a download.

    backbone: an open_clip name, swin_t, swin_s or swin_b, 'tiny', or 'local-dir:DIR' and
    'hf-hub:REPO', which bring their own weights. pretrained: a tag, a file, or None for random
    weights. image_size: of a side, None for the model's own; another one interpolates the position
    embedding, if there is one.
    """
    return tower(load_plain_model(backbone, pretrained, image_size))


def has_class_token(backbone):
    """Found by building it, without memory, weights or a download."""
    with torch.device("meta"):
        return load_image_model(backbone, None).class_embedding is not None


def load_plain_model(backbone, pretrained, image_size=None):
    """The same as the library's own module: normalised images (N, 3, H, W) → features."""
    if backbone in SWINS:
        return load_swin(backbone, pretrained, image_size)
    name = BACKBONES.get(backbone, backbone)
    brings_weights = ":" in name
    is_file = pretrained is not None and os.path.isfile(pretrained)
    check_backbone(name)
    if pretrained is not None and not brings_weights and not is_file:
        check_tag(name, pretrained)
    if is_file or pretrained is None:  # then open_clip only has to build the image tower
        options = {"load_weights": False, "text_cfg": NO_TEXT}
        if not brings_weights:
            options["force_preprocess_cfg"] = preprocessing(name)
    else:
        options = {"pretrained": pretrained, "require_pretrained": True}
    resize_last = is_file and is_timm(name)  # a file of timm's weights fits its own size alone
    try:
        with silent_log():
            clip = open_clip.create_model(
                name,
                device=torch.get_default_device(),
                force_image_size=None if resize_last else image_size,
                **options,
            )
    except Exception as error:  # "no network" alone has dozens of types
        hint = download_hint(name, pretrained)
        raise UserError(f"cannot load the image model {backbone!r}{hint}: {error}") from error
    try:
        if is_file:
            load_tower(clip, pretrained, backbone, image_size)
        if resize_last and image_size is not None:
            clip.visual.set_input_size(image_size)
    except RuntimeError as error:  # such as an image smaller than a patch
        size = image_size or "its own size"
        raise UserError(f"{backbone!r} at {size} does not take {pretrained}: {error}") from error
    return clip.visual


def is_timm(name):
    """Is the image tower one of timm's, which open_clip wraps?"""
    return "timm_model_name" in open_clip.get_model_config(name).get("vision_cfg", {})


def preprocessing(name):
    """Mean and standard deviation of the weights that open_clip has for a model, if they agree."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    both = {(config.get("mean"), config.get("std")) for config in known}
    mean, std = both.pop() if len(both) == 1 else (None, None)
    return {"mean": mean, "std": std} if mean and std else {}


@contextmanager
def silent_log():
    """open_clip's log lines are kept back: what matters in them is checked here."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.disable(before)


def download_hint(name, tag):
    """What to do without a network; nothing for what lies in a folder or a file."""
    known = open_clip.get_pretrained_cfg(name, tag or "")
    if not known:
        return ""
    return how_without_network(known.get("url") or f"https://huggingface.co/{known.get('hf_hub')}")


def how_without_network(place):
    return (
        f" (without a network, download {place} elsewhere and pass the file as --pretrained PATH)"
    )


def check_backbone(name):
    """Refuse what open_clip does not have, and what towers.py has no class for."""
    try:
        config = open_clip.get_model_config(name)
    except Exception as error:  # no such folder, not JSON, no network for hf-hub:
        raise UserError(f"cannot read the configuration of backbone {name!r}: {error}") from error
    if config is None:
        names = open_clip.list_models() + list(BACKBONES) + list(SWINS)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        near = ", ".join(near) or "none, see open_clip.list_models()"
        raise UserError(f"there is no model {name!r}; near: {near}")
    vision = config.get("vision_cfg", {})
    convolutional = isinstance(vision.get("layers"), list)
    pools = vision.get("attentional_pool") or vision.get("pool_type", "tok") != "tok"
    if is_timm(name):
        fits = fits_timm(name)
    else:
        fits = not convolutional and not pools
    if not fits:
        raise UserError(
            f"backbone {name!r} is not supported: it is convolutional, has rotary positions or"
            " other tokens, or pools in a way of its own; take an open_clip ViT, such as"
            " ViT-B-16-quickgelu or ViT-B-16-SigLIP2, or torchvision's swin_b"
        )


def fits_timm(name):
    """Is its trunk a plain ViT? Found by building it, without memory and weights."""
    try:
        with silent_log(), torch.device("meta"):
            clip = open_clip.create_model(name, device="meta", load_weights=False, text_cfg=NO_TEXT)
    except Exception as error:  # timm's models raise their own kinds
        raise UserError(f"cannot build the image model {name!r}: {error}") from error
    return is_plain(clip.visual.trunk)


def check_tag(name, tag):
    """Refuse weights that open_clip does not have, or that were trained with another activation.

    open_clip only warns of the latter.
    """
    quick = open_clip.get_model_config(name).get("quick_gelu", False)
    if name.endswith("-quickgelu"):
        other = name.removesuffix("-quickgelu")
    else:
        other = f"{name}-quickgelu"
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag in tags:
        fits = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False) == quick
    else:
        fits = tag not in open_clip.list_pretrained_tags_by_model(other)
    fits = fits or other not in open_clip.list_models()  # then the name has one activation alone
    if not fits:
        theirs = "GELU" if quick else "QuickGELU"
        raise UserError(
            f"weights {tag!r} were trained with {theirs}, which {name} does not use: take"
            f" --backbone {other}"
        )
    if tag not in tags:
        have = ", ".join(tags) or "none"
        raise UserError(
            f"{tag!r} is neither a file nor weights open_clip has for {name}; it has {have}"
        )


def load_tower(clip, path, backbone, image_size):
    """Fill clip.visual from a file that holds a whole CLIP or an image tower; all keys match."""
    state = read_state(path)
    if not any(k.startswith("visual.") for k in state):
        state = {f"visual.{k}": v for k, v in state.items()}
    if image_size is not None:
        open_clip.model.resize_pos_embed(state, clip)
    prefix = "visual."
    weights = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    check_fit(clip.visual.state_dict(), weights, f"{path} does not fit {backbone}")
    clip.visual.load_state_dict(weights)
    native = not hasattr(clip.visual, "trunk")  # timm's all use GELU
    if native:
        activation = type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__
        say(
            f"note: {path} cannot tell its activation; OpenAI's, dfn2b's and metaclip's weights"
            f" want a -quickgelu backbone, and {backbone} uses {activation}"
        )


def read_state(path):
    """The tensors of a file of weights, by name."""
    try:
        if is_torchscript(path):  # OpenAI's own archives
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = open_clip.factory.load_state_dict(path)
    except Exception as error:  # zip, pickle, json and C++ readers each raise their own kinds
        raise UserError(f"cannot read weights from {path}: {error}") from error
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    return any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist())


def load_swin(name, pretrained, image_size):
    """torchvision's Swin transformer without its classifier."""
    build, weights = SWINS[name]
    is_file = pretrained is not None and os.path.isfile(pretrained)
    if pretrained not in (None, "imagenet1k") and not is_file:
        raise UserError(
            f"{pretrained!r} is neither a file nor weights torchvision has for {name}; it has"
            " imagenet1k"
        )
    preset = weights.transforms()
    size = image_size or preset.crop_size[0]
    plain = build()
    plain.head = torch.nn.Identity()
    try:
        check_windows(plain, size)
    except ValueError as error:
        raise UserError(error) from error
    if pretrained is not None:
        state = read_state(pretrained) if is_file else download_swin(name, weights)
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
        check_fit(plain.state_dict(), state, f"{pretrained} does not fit {name}")
        plain.load_state_dict(state)
    for part in plain.modules():
        if isinstance(part, StochasticDepth):
            part.p = 0.0  # it is for training the image model
    plain.image_size, plain.image_mean, plain.image_std = (size, size), preset.mean, preset.std
    return plain


def download_swin(name, weights):
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # "no network" alone has dozens of types
        raise UserError(
            f"cannot load the image model {name!r}{how_without_network(weights.url)}: {error}"
        ) from error


def fingerprint(visual, interpolated):
    """SHA-256 of the frozen weights as loaded.

    interpolated: the position embedding was, and is left out: its last bits vary by processor.
    """
    digest = hashlib.sha256()
    for name, p in visual.named_parameters():
        if p.requires_grad or p.is_meta or (interpolated and name == "positional_embedding"):
            continue
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
