"""The frozen image model: open_clip's image towers, their weights, and what is refused.

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

from support.checkpoints import check_fit
from support.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BACKBONES = {"tiny": "local-dir:" + os.path.join(ROOT, "assets", "tiny")}  # short names
NO_TEXT = {  # open_clip insists on a text tower; nobody uses it
    "width": 8,
    "heads": 1,
    "layers": 1,
    "context_length": 8,
    "vocab_size": 16,
}


def load_image_model(backbone, pretrained, image_size=None):
    """open_clip's image tower; raises UserError, if possible before a download.

    backbone: an open_clip name, 'tiny', or 'local-dir:DIR' and 'hf-hub:REPO', which bring their
    own weights. pretrained: a tag, a file, or None for random weights. image_size: of a side,
    None for the model's own; another one interpolates the position embedding.
    """
    name = BACKBONES.get(backbone, backbone)
    brings_weights = ":" in name
    is_file = not brings_weights and pretrained is not None and os.path.isfile(pretrained)
    check_backbone(name)
    if pretrained is not None and not brings_weights and not is_file:
        check_tag(name, pretrained)
    if is_file or pretrained is None:  # then open_clip only has to build the image tower
        options = {"load_weights": False, "text_cfg": NO_TEXT}
    else:
        options = {"pretrained": pretrained, "require_pretrained": True}
    try:
        with silent_log():
            clip = open_clip.create_model(
                name,
                device=torch.get_default_device(),
                force_image_size=image_size,
                **options,
            )
    except Exception as error:  # "no network" alone has dozens of types
        hint = download_hint(name, pretrained)
        raise UserError(f"cannot load the image model {backbone!r}{hint}: {error}") from error
    if is_file:
        load_tower(clip, pretrained, backbone, image_size)
    return clip.visual


@contextmanager
def silent_log():
    """open_clip's log lines are kept back: what matters in them is checked here."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def download_hint(name, tag):
    """What to do without a network; nothing for what lies in a folder or a file."""
    known = open_clip.get_pretrained_cfg(name, tag or "")
    if not known:
        return ""
    place = known.get("url") or f"https://huggingface.co/{known.get('hf_hub')}"
    return (
        f" (without a network, download {place} elsewhere and pass the file as --pretrained PATH)"
    )


def check_backbone(name):
    """Refuse what is not there, and what is no ViT with a class token."""
    try:
        config = open_clip.get_model_config(name)
    except Exception as error:  # no such folder, not JSON, no network for hf-hub:
        raise UserError(f"cannot read the configuration of backbone {name!r}: {error}") from error
    if config is None:
        names = open_clip.list_models() + list(BACKBONES)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        near = ", ".join(near) or "none, see open_clip.list_models()"
        raise UserError(f"open_clip has no model {name!r}; near: {near}")
    vision = config.get("vision_cfg", {})
    from_timm = "timm_model_name" in vision
    convolutional = isinstance(vision.get("layers"), list)
    pools = vision.get("attentional_pool") or vision.get("pool_type", "tok") != "tok"
    if from_timm or convolutional or pools:
        raise UserError(
            f"backbone {name!r} has no class token to read (it is convolutional, comes from timm,"
            " or pools all tokens): take a native open_clip ViT, such as ViT-B-16-quickgelu"
        )


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
    try:
        if is_torchscript(path):  # OpenAI's own archives
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = open_clip.factory.load_state_dict(path)
    except Exception as error:  # zip, pickle, json and C++ readers each raise their own kinds
        raise UserError(f"cannot read weights from {path}: {error}") from error
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not any(k.startswith("visual.") for k in state):
        state = {f"visual.{k}": v for k, v in state.items()}
    if image_size is not None:
        open_clip.model.resize_pos_embed(state, clip)
    prefix = "visual."
    tower = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    check_fit(clip.visual.state_dict(), tower, f"{path} does not fit {backbone}")
    clip.visual.load_state_dict(tower)
    if os.environ.get("RANK", "0") == "0":  # once, not once per process
        activation = type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__
        print(
            f"note: {path} cannot tell its activation; OpenAI's, dfn2b's and metaclip's weights"
            f" want a -quickgelu backbone, and {backbone} uses {activation}"
        )


def is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    return any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist())


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
