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
from open_clip.timm_model import TimmModel
from torch import nn
from torchvision import models
from torchvision.models import SwinTransformer
from torchvision.ops import StochasticDepth

from support.processes import UserError, say
from support.runs import check_fit

POOLS = ("token", "avg", "map")  # timm's: class token, mean of the patches, attention


class ViT(nn.Module):
    """open_clip's ViT with a class token; its parts keep their names and their order."""

    def __init__(self, plain):
        super().__init__()
        self.image_size, self.patch_size = plain.image_size, plain.patch_size
        self.image_mean, self.image_std = plain.image_mean, plain.image_std
        self.output_dim = plain.output_dim
        self.class_embedding = plain.class_embedding
        self.positional_embedding = plain.positional_embedding
        self.proj = plain.proj
        self.conv1 = plain.conv1
        self.ln_pre = plain.ln_pre
        self.transformer = plain.transformer
        self.ln_post = plain.ln_post
        self.widths = [plain.transformer.width] * plain.transformer.layers

    @property
    def blocks(self):
        return self.transformer.resblocks

    def patches(self, images):
        return self.conv1(images).flatten(2).transpose(1, 2)

    def feature(self, tokens):
        return self.ln_post(tokens[:, 0]) @ self.proj


class Block(nn.Module):
    """x' = x + MHA(LN1 x), x'' = x' + MLP(LN2 x'): another library's parts, by open_clip's names.

    attn and mlp take and give tokens (N, L, d); ls_1 and ls_2 are their layer scales, if any.
    """

    def __init__(self, ln_1, attn, ln_2, mlp, ls_1=None, ls_2=None):
        super().__init__()
        self.ln_1, self.attn, self.ln_attn = ln_1, attn, nn.Identity()
        self.ls_1 = ls_1 or nn.Identity()
        self.ln_2, self.mlp = ln_2, mlp
        self.ls_2 = ls_2 or nn.Identity()

    def forward(self, x):
        x = x + self.ls_1(self.attn(self.ln_1(x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


# ---------------------------------------------------------------- Swin
class Swin(nn.Module):
    """torchvision's Swin transformer (Liu et al., ICCV 2021), the paper's second image model.

    Attention is within windows of 7 x 7 tokens, which every other block shifts by 3. Between
    stages, patch merging makes one token of 2 x 2, of twice the width. There is no class token: a
    feature is the mean over the last stage's normalised tokens. Positions are in the relative
    biases of each attention alone, so that there is no p^SP to train; p^TP is added to the
    framesets' tokens behind the LayerNorm of the patch embedding.

    What do windows see of a frameset? At 224 px, a little frame of 56 px has 14 x 14 tokens in
    stage 1 and 7 x 7 in stage 2, so an unshifted window lies within one moment there, and only
    shifted ones mix neighbours: left and right are the moments before and after, above and below
    those 4 away. In stage 3 a window covers 2 x 2 little frames, in stage 4 all 16.

    Amplitude of p^TP: LayerNorm gives tokens with an RMS of 1 where its weight is 1, as at random;
    p^TP has one of 0.7 at an amplitude of 1 (--position-scale).
    """

    def __init__(self, plain):
        super().__init__()
        self.image_size, self.patch_size = plain.image_size, plain.features[0][0].kernel_size
        self.image_mean, self.image_std = plain.image_mean, plain.image_std
        self.class_embedding = self.positional_embedding = None
        embedding, *stages = plain.features  # stages, with patch merging between them
        self.conv, self.ln_patch = embedding[0], embedding[2]
        self.ln_pre = nn.Identity()
        self.blocks = nn.ModuleList()
        self.widths = []
        rows = self.image_size[0] // self.patch_size[0]  # of tokens
        for stage in stages:
            if isinstance(stage, nn.Sequential):
                self.blocks.extend(swin_block(block, rows) for block in stage)
                self.widths += [stage[0].norm1.normalized_shape[0]] * len(stage)
            else:  # patch merging
                self.blocks.append(OnGrid(stage, rows))
                self.widths.append(0)
                rows //= 2
        self.ln_post = plain.norm
        self.output_dim = plain.norm.normalized_shape[0]

    def patches(self, images):
        patches = self.conv(images).flatten(2).transpose(1, 2)
        return self.ln_patch(patches).to(patches.dtype)  # autocast's LayerNorm gives float32

    def feature(self, tokens):
        return self.ln_post(tokens).mean(dim=1)


class OnGrid(nn.Module):
    """What takes a square grid (N, rows, rows, d), for the same tokens in a row (N, L, d)."""

    def __init__(self, inner, rows):
        super().__init__()
        self.inner, self.rows = inner, rows

    def forward(self, tokens):
        return self.inner(tokens.unflatten(1, (self.rows, self.rows))).flatten(1, 2)


def swin_block(block, rows):
    """Without stochastic depth, which is for training the image model."""
    return Block(block.norm1, OnGrid(block.attn, rows), block.norm2, block.mlp)


def check_windows(plain, size):
    """ValueError, unless windows tile the grid of every stage.

    torchvision would fill the last ones up with zeros, which attention then sees as tokens.
    """
    merging = sum(not isinstance(part, nn.Sequential) for part in plain.features)
    window = plain.features[1][0].attn.window_size[0]
    unit = plain.features[0][0].kernel_size[0] * 2**merging * window
    if size % unit:
        below = size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(
            f"the image size is {size}, which windows of {window} x {window} tokens do not tile in"
            f" every stage; the nearest that works is {nearest}"
        )


# ---------------------------------------------------------------- SigLIP and other ViTs of timm
class TimmViT(nn.Module):
    """The plain ViTs of timm that open_clip wraps, such as SigLIP 2: no rotary positions.

    The feature is the model's own: its frozen attention pooling, the mean over the patches, or the
    class token; then open_clip's projection, if it has one.
    """

    def __init__(self, plain):
        super().__init__()
        trunk = plain.trunk
        self.image_size, self.patch_size = plain.image_size, trunk.patch_embed.patch_size
        self.image_mean, self.image_std = plain.image_mean, plain.image_std
        position = trunk.pos_embed.detach()[0]
        self.class_embedding = None
        if trunk.cls_token is not None:
            self.class_embedding = nn.Parameter(trunk.cls_token.detach()[0, 0])
            if trunk.no_embed_class:  # then the class token has no position
                position = nn.functional.pad(position, (0, 0, 1, 0))
        self.positional_embedding = nn.Parameter(position)
        self.patch_embed = trunk.patch_embed
        self.norm_pre = trunk.norm_pre
        self.blocks = nn.ModuleList(
            Block(block.norm1, block.attn, block.norm2, block.mlp, block.ls1, block.ls2)
            for block in trunk.blocks
        )
        self.widths = [trunk.embed_dim] * len(self.blocks)
        self.ln_post = trunk.norm
        self.pooling, self.attn_pool = trunk.global_pool, trunk.attn_pool
        self.head = nn.Sequential(trunk.fc_norm, trunk.head, plain.head)
        linear = [part for part in self.head.modules() if isinstance(part, nn.Linear)]
        self.output_dim = linear[-1].out_features if linear else trunk.embed_dim

    def patches(self, images):
        return self.patch_embed(images).flatten(1, -2)  # some give (N, rows, cols, d)

    def ln_pre(self, tokens):
        return self.norm_pre(tokens).to(tokens.dtype)

    def feature(self, tokens):
        tokens = self.ln_post(tokens)
        patches = tokens if self.class_embedding is None else tokens[:, 1:]
        if self.pooling == "map":
            return self.head(self.attn_pool(patches))
        if self.pooling == "avg":
            return self.head(patches.mean(dim=1))
        return self.head(tokens[:, 0])


def is_plain(trunk):
    """Is it a model of timm that TimmViT is for? Names tell, since timm is open_clip's affair."""
    if type(trunk).__name__ != "VisionTransformer" or trunk.pos_embed is None:
        return False
    names = [type(trunk.patch_embed).__name__]
    for block in trunk.blocks:
        names += [type(part).__name__ for part in (block, block.attn, block.mlp, block.norm1)]
    plain = {"PatchEmbed", "Block", "Attention", "Mlp", "LayerNorm"}
    extras = trunk.num_reg_tokens or trunk.pool_include_prefix
    return set(names) == plain and not extras and trunk.global_pool in POOLS


def tower(plain):
    """The library's own module → the same weights, as the video models take them."""
    if isinstance(plain, SwinTransformer):
        return Swin(plain)
    return TimmViT(plain) if isinstance(plain, TimmModel) else ViT(plain)


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
