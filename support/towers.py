"""What the video models need of an image model, for each of the three kinds that there are.

    image_size, patch_size   (height, width) in pixels
    image_mean, image_std    of pixels from 0 to 1, as in the image model's own training
    output_dim               channels of a feature
    class_embedding          (d,), the class token; None where there is none
    positional_embedding     (P, d), with a class token (1 + P, d); None where there is none
    patches(images)          normalised (N, 3, H, W) → patch tokens (N, P, d), no positions yet
    ln_pre(tokens)           what comes behind the positions
    blocks                   called one after the other, (N, L, d) → the same shape
    widths                   their d; 0 for what is no transformer block and changes the shape
    feature(tokens)          (N, L, d) behind the last block → (N, output_dim)

A block has ln_1, attn, ln_attn, ls_1, ln_2, mlp and ls_2, by open_clip's names.
"""

from open_clip.timm_model import TimmModel
from torch import nn
from torchvision.models import SwinTransformer

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
