"""The image model's weights and what is refused; Swin and SigLIP by the ViT's interface.

The interface, of which model.ViT is the plain case:

    image_size, patch_size   (height, width) in pixels
    output_dim               channels of a feature
    class_embedding          (d,), the class token; None where there is none
    positional_embedding     (L, d), of the class token and the P patches; None where there is none
    patches(images)          (N, 3, H, W), values 0…255 → patch tokens (N, P, d), no positions yet
    tokens(patches, class_token, position)
                             (B·n, P, d) → (B·n, L, d); position (n, L, d) or (L, d); the last two
                             are None where the model has none
    blocks                   called one after the other, (N, L, d) → the same shape
    widths                   their d; 0 for what is no transformer block and changes the shape
    feature(tokens)          (N, L, d) behind the last block → (N, output_dim)

A block has ln_1, attn, ln_attn, ls_1, ln_2, mlp and ls_2, by open_clip's names.

A mistake should be found before gigabytes are downloaded, and weights that belong to another
architecture should not be taken silently.
"""

import logging
import os

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import nn
from torchvision import models

from support.processes import UserError, say


class ImageModel(nn.Module):
    """What the three kinds of image model share. None of them has dropout of its own."""

    def __init__(self, plain):
        super().__init__()
        self.image_size, self.output_dim = plain.image_size, plain.output_dim
        self.register_buffer("mean", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(3, 1, 1), persistent=False)
        self.set_normalisation([plain.image_mean, plain.image_std])

    def set_normalisation(self, mean_and_std):
        """What was subtracted from pixels in [0, 1], and what divided them, in its training."""
        self.normalisation = [list(values) for values in mean_and_std]
        for buffer, values in zip((self.mean, self.std), self.normalisation):
            buffer.copy_(255 * torch.tensor(values).view(3, 1, 1))

    def tokens(self, patches, class_token, position):
        """Without a class token; model.ViT has one of its own."""
        return patches if position is None else add_positions(patches, position)


class Block(nn.Module):
    """x' = x + MHA(LN1 x), x'' = x' + MLP(LN2 x'): another library's parts, by open_clip's names.

    attn and mlp take and give tokens (N, L, d).
    """

    def __init__(self, ln_1, attn, ln_2, mlp):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = ln_1, attn, ln_2, mlp
        self.ln_attn, self.ls_1, self.ls_2 = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


# ---------------------------------------------------------------- Swin
class Swin(ImageModel):
    """torchvision's Swin transformer (Liu et al., ICCV 2021), the paper's second image model.

    Attention is within windows of 7 x 7 tokens, which every other block shifts by 3. Between
    stages, patch merging makes one token of 2 x 2, of twice the width. There is no class token: a
    feature is the mean over the last stage's normalised tokens. Positions are in the relative
    biases of each attention alone, so that there is no p^SP to train; p^TP is added to the
    framesets' tokens behind the LayerNorm of the patch embedding.

    Amplitude of p^TP: LayerNorm gives tokens with an RMS of 1 where its weight is 1, as at random;
    p^TP has one of 0.7 at an amplitude of 1 (--position-scale).
    """

    def __init__(self, plain):
        plain.output_dim = plain.norm.normalized_shape[0]
        super().__init__(plain)
        self.patch_size = plain.features[0][0].kernel_size
        self.class_embedding = self.positional_embedding = None
        embedding, *stages = plain.features  # stages, with patch merging between them
        self.conv, self.ln_patch = embedding[0], embedding[2]
        self.blocks = nn.ModuleList()
        self.widths = []
        rows = self.image_size[0] // self.patch_size[0]  # of tokens
        for stage in stages:
            if isinstance(stage, nn.Sequential):
                for block in stage:  # no stochastic depth: it is for training the image model
                    attn = OnGrid(block.attn, rows)
                    self.blocks.append(Block(block.norm1, attn, block.norm2, block.mlp))
                self.widths += [stage[0].norm1.normalized_shape[0]] * len(stage)
            else:  # patch merging
                self.blocks.append(OnGrid(stage, rows))
                self.widths.append(0)
                rows //= 2
        self.ln_post = plain.norm

    def patches(self, images):
        patches = self.conv((images - self.mean) / self.std).flatten(2).transpose(1, 2)
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


# ---------------------------------------------------------------- SigLIP
class SigLIP(ImageModel):
    """The ViTs of timm that open_clip wraps for SigLIP and SigLIP 2.

    There is no class token: a feature is the frozen attention pooling of the last tokens.
    """

    def __init__(self, plain):
        trunk = plain.trunk
        plain.output_dim = trunk.embed_dim
        super().__init__(plain)
        self.patch_size = trunk.patch_embed.patch_size
        self.class_embedding = None
        self.positional_embedding = nn.Parameter(trunk.pos_embed.detach()[0])
        self.patch_embed = trunk.patch_embed
        self.blocks = nn.ModuleList(
            Block(block.norm1, block.attn, block.norm2, block.mlp) for block in trunk.blocks
        )
        self.widths = [trunk.embed_dim] * len(self.blocks)
        self.ln_post, self.attn_pool = trunk.norm, trunk.attn_pool

    def patches(self, images):
        return self.patch_embed((images - self.mean) / self.std)

    def feature(self, tokens):
        return self.attn_pool(self.ln_post(tokens))


def add_positions(tokens, position):
    """tokens (B·n, L, d), position (n, L, d), or (L, d) for all of them → (B·n, L, d)."""
    by_image = tokens.reshape(-1, *position.shape)
    return (by_image + position.to(tokens.dtype)).view_as(tokens)


class Unadapted(nn.Module):
    """In an adapter's place around Swin's patch merging, between two stages: it adds nothing."""

    def forward(self, merging, *paths):
        """paths: x alone, or x and z, (images, L, d) → (images, L / 4, 2d)."""
        merged = merging(torch.cat(paths)).split([path.shape[0] for path in paths])
        merged = [tokens.to(path.dtype) for tokens, path in zip(merged, paths)]
        return merged if len(paths) > 1 else merged[0]


# ---------------------------------------------------------------- weights, and what is refused
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BACKBONES = {"tiny": "local-dir:" + os.path.join(ROOT, "assets", "tiny")}  # short names
SWINS = {  # torchvision's: what builds one, and the weights that imagenet1k stands for
    "swin_t": (models.swin_t, models.Swin_T_Weights.IMAGENET1K_V1),
    "swin_s": (models.swin_s, models.Swin_S_Weights.IMAGENET1K_V1),
    "swin_b": (models.swin_b, models.Swin_B_Weights.IMAGENET1K_V1),
}
# open_clip insists on a text tower; nobody uses it.
NO_TEXT = {"width": 8, "heads": 1, "layers": 1, "context_length": 8, "vocab_size": 16}


def load_plain_model(backbone, pretrained, image_size=None):
    """The library's own module: normalised images (N, 3, H, W) → features. Raises UserError, if
    possible before a download.

    backbone: an open_clip name, swin_t, swin_s or swin_b, 'tiny', or 'local-dir:DIR' and
    'hf-hub:REPO', which bring their own weights. pretrained: a tag, a file, or None for random
    weights. image_size: of a side, None for the model's own; another one interpolates the position
    embedding, if there is one.
    """
    is_file = pretrained is not None and os.path.isfile(pretrained)
    load = load_swin if backbone in SWINS else load_clip
    logging.disable(logging.ERROR)  # what matters in open_clip's lines is checked here
    try:
        return load(backbone, pretrained, is_file, image_size)
    except UserError:
        raise
    except Exception as error:  # "no network" alone has dozens of types
        hint = "" if is_file else " (without a network, fetch them elsewhere: --pretrained FILE)"
        raise UserError(
            f"cannot load the image model {backbone!r} with weights {pretrained}{hint}: {error}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def load_clip(backbone, pretrained, is_file, image_size):
    """open_clip's image tower."""
    name = BACKBONES.get(backbone, backbone)
    if ":" not in name and name not in open_clip.list_models():
        have = ", ".join([*BACKBONES, *SWINS])
        raise UserError(f"there is no model {name!r}; there are {have} and open_clip.list_models()")
    with torch.device("meta"):  # nothing is downloaded for what is not supported
        clip = open_clip.create_model(name, device="meta", load_weights=False, text_cfg=NO_TEXT)
    interface_of(clip.visual, name)
    if is_file or pretrained is None:  # then open_clip only has to build the tower
        # Mean and deviation of pixels: those of open_clip's first weights for it, the usual ones.
        tags = open_clip.list_pretrained_tags_by_model(name)
        pixels = open_clip.get_pretrained_cfg(name, tags[0] if tags else "")
        options = {"load_weights": False, "text_cfg": NO_TEXT, "force_preprocess_cfg": pixels}
    else:
        options = {"pretrained": pretrained, "require_pretrained": True}
        if ":" not in name:
            check_tag(name, pretrained)
            say(f"note: loading weights {pretrained!r} of {name}, a download at the first use")
    device = torch.empty(0).device  # the default one; get_default_device misses contexts up to 2.7
    options |= {"device": device, "force_image_size": image_size}
    clip = open_clip.create_model(name, **options)
    if is_file:
        load_tower(clip, pretrained, backbone, image_size)
    return clip.visual


def interface_of(plain, name):
    """Swin or SigLIP; None for a ViT that model.ViT takes; UserError for any other module."""
    trunk = getattr(plain, "trunk", None)
    is_timm_vit = type(trunk).__name__ == "VisionTransformer"  # its name, not to import timm
    is_vit = isinstance(plain, VisionTransformer)
    if isinstance(plain, models.SwinTransformer):
        return Swin
    if is_timm_vit and trunk.global_pool == "map" and trunk.num_prefix_tokens == 0:
        others = (trunk.norm_pre, trunk.fc_norm, trunk.blocks[0].ls1)  # which SigLIP does without
        if all(isinstance(part, nn.Identity) for part in others):
            return SigLIP
    if is_vit and plain.attn_pool is None and plain.pool_type == "tok":
        return None
    raise UserError(
        f"backbone {name!r} is not supported: it is convolutional, has rotary positions or other"
        " tokens, or pools in a way of its own; take an open_clip ViT, such as ViT-B-16-quickgelu"
        " or ViT-B-16-SigLIP2, or torchvision's swin_b"
    )


def check_tag(name, tag):
    """UserError where open_clip lacks the weights, or only warns that they want QuickGELU."""
    known, other = open_clip.get_pretrained_cfg(name, tag), f"{name}-quickgelu"
    if not known:
        have = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"{tag!r} is neither a file nor weights of {name}, which has {have}")
    if known.get("quick_gelu") and other in open_clip.list_models():
        raise UserError(f"weights {tag!r} want QuickGELU, not GELU: take --backbone {other}")


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
    if isinstance(clip.visual, VisionTransformer):  # SigLIPs all use GELU
        activation = type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__
        say(
            f"note: {path} cannot tell its activation, and {backbone} has {activation}; weights of"
            " OpenAI, dfn2b and metaclip want QuickGELU"
        )


def read_state(path):
    """The tensors of a file of weights, by name."""
    try:
        state = open_clip.factory.load_state_dict(path)
    except RuntimeError:  # as of OpenAI's own archives
        state = torch.jit.load(path, map_location="cpu").state_dict()
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def load_swin(name, pretrained, is_file, image_size):
    """torchvision's Swin transformer without its classifier."""
    build, weights = SWINS[name]
    if pretrained not in (None, "imagenet1k") and not is_file:
        raise UserError(f"{pretrained!r} is neither a file nor weights of {name}: imagenet1k is")
    preset, plain = weights.transforms(), build()
    plain.head = nn.Identity()
    own_size = preset.crop_size[0]
    size = image_size or own_size
    if size % own_size:  # torchvision would fill the last windows up with zeros, seen as tokens
        raise UserError(f"the image size is {size}, and {name} takes multiples of {own_size}")
    if pretrained is not None:
        state = read_state(pretrained) if is_file else weights.get_state_dict(check_hash=True)
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
        check_fit(plain.state_dict(), state, f"{pretrained} does not fit {name}")
        plain.load_state_dict(state)
    plain.image_size, plain.image_mean, plain.image_std = (size, size), preset.mean, preset.std
    return plain


def check_fit(own, theirs, what):
    """UserError where a tensor of two state dicts is missing, unexpected or of the wrong shape."""
    want, have = ({k: tuple(v.shape) for k, v in state.items()} for state in (own, theirs))
    wrong = [f"{name} is missing" for name in want if name not in have]
    wrong += [f"{name} is not expected" for name in have if name not in want]
    for name in want:
        if name in have and have[name] != want[name]:
            wrong.append(f"{name} has shape {have[name]}, not {want[name]}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{what}: {'; '.join(wrong[:3])}{more}")
