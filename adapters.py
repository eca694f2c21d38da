"""What each method puts around a frozen transformer block: DualPath, then its peers.

Symbols are the paper's: A is an adapter; x are tokens of frames (DualPath's spatial path), z those
of framesets (its temporal path); MHA, MLP, LN1 and LN2 are the frozen parts of one block of the
image model, whose names are open_clip's. This file knows only blocks and tokens, (images, L, d).

What a block's constructor names is what it takes of model.Config, by the same names; `patch_size`
is the image model's. `bottleneck` may be None: the method's own width.

A new method is one class here and one line in METHODS, at the end (docs/new_method.md).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from support.processes import UserError

MOST_SEQUENCES = 65_535  # of one attention call: the largest grid that CUDA's fused kernels have


# ---------------------------------------------------------------- the frozen parts, cheaply
# Each gives what open_clip's own module gives, but for rounding, layer scales included. A matrix
# product with frozen weights keeps no input for backward: of the frozen parts, LayerNorm, attention
# and the MLP's nonlinearity alone keep any, and they move most of the bytes.
def LN(norm, x):
    """A LayerNorm in the tokens' own type: autocast would keep its input in float32."""
    with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def MHA(block, x):
    """The frozen attention of an open_clip block, its layer scale (and extra norm) included."""
    if not hasattr(block, "attention"):  # Swin's, SigLIP's and custom blocks: attn does it all
        return block.ls_1(block.ln_attn(block.attn(x)))
    inference = x.device.type == "cpu" and not torch.is_grad_enabled()
    if inference and not torch.compiler.is_compiling():
        return block.ls_1(block.attention(x))  # nn.MultiheadAttention's own kernel is the fastest
    return attend(block, project(block, x))


def project(block, x):
    """The frozen q, k and v, for methods that change them: (images, L, d) → (images, L, 3d)."""
    if not hasattr(block, "attention"):
        raise UserError("this backbone's blocks project to q, k and v in a way of their own")
    return F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias)


def attend(block, qkv):
    """Attention from its projections on: (images, L, 3d) → (images, L, d).

    Without the copies of q, k and v that nn.MultiheadAttention makes in training.
    """
    qkv = qkv.unflatten(-1, (3, block.attn.num_heads, -1))  # (images, L, 3, heads, d / heads)
    parts = []
    for part in qkv.split(MOST_SEQUENCES):
        q, k, v = (t.transpose(1, 2) for t in part.unbind(2))  # (images, heads, L, d / heads)
        parts.append(F.scaled_dot_product_attention(q, k, v))
    h = parts[0] if len(parts) == 1 else torch.cat(parts)
    return block.ls_1(block.attn.out_proj(h.transpose(1, 2).flatten(2)))


def MLP(block, x):
    """The frozen MLP of an open_clip block, its layer scale included."""
    return block.ls_2(block.mlp(x))


# ---------------------------------------------------------------- the adapter
class Adapter(nn.Module):
    """A(x) = W_up · GELU(W_down · x): (..., d) → (..., d).

    No skip and no LayerNorm of its own: the block says what it is added to. W_up and both biases
    start at zero, so a new adapter contributes exactly nothing.
    """

    def __init__(self, d, bottleneck, dropout, activation=F.gelu):
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(d, bottleneck)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, d)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        return self.up(self.dropout(self.activation(self.down(x))))


# ---------------------------------------------------------------- DualPath
class DualPathBlock(nn.Module):
    """The adapters around one frozen block, which serves both paths (Park et al., CVPR 2023).

        spatial    x' = x + MHA(LN1 x) + A_s1(LN1 x)       x'' = x' + MLP(LN2 x') + A_s2(LN2 x')
        temporal   z' = z + A_t1(MHA(A_t0(LN1 z)))         z'' = z' + A_t2(MLP(LN2 z'))

    Spatial adapters run parallel to the frozen parts: the block starts as the image model's.
    Temporal ones come in series behind them: the block starts as the identity, z'' = z.

    pre_attention_adapter: build A_t0, as the paper's parameter count on Something-Something v2
    needs; else it is the identity. serial_skip: z' = z + A_t1(h) + h with h = MHA(…), likewise
    behind the MLP; the block then starts as the image model's. paths: "both", "spatial" or
    "temporal"; the adapters of an unused path are not built.
    """

    def __init__(self, d, bottleneck, dropout, pre_attention_adapter, serial_skip, paths):
        super().__init__()
        bottleneck = bottleneck or 128

        def adapter_if(wanted):
            return Adapter(d, bottleneck, dropout) if wanted else nn.Identity()

        spatial, temporal = paths != "temporal", paths != "spatial"
        self.A_s1, self.A_s2 = adapter_if(spatial), adapter_if(spatial)
        self.A_t0 = adapter_if(temporal and pre_attention_adapter)
        self.A_t1, self.A_t2 = adapter_if(temporal), adapter_if(temporal)
        self.serial_skip = serial_skip

    def forward(self, block, x, z):
        """block: the frozen one; x: (B·T_s, L, d); z: (B·T_G, L, d) → x'', z'', same shapes.

        A path that is switched off is an empty batch, (0, L, d), and takes the same lines.
        """
        # Both paths use the same frozen weights, and attention never crosses images. So the images
        # of both are one batch in each frozen call: one MHA and one MLP serve two paths.
        sizes = [x.shape[0], z.shape[0]]
        x_norm, z_norm = LN(block.ln_1, x), LN(block.ln_1, z).to(x.dtype)  # z is in float32
        h_x, h_z = MHA(block, torch.cat([x_norm, self.A_t0(z_norm)])).split(sizes)
        x = x + h_x + self.A_s1(x_norm)
        h_z = h_z.clone()  # A_t1 keeps it for backward; a view would keep both paths' tokens
        z = z + self.A_t1(h_z)
        if self.serial_skip:
            z = z + h_z

        x_norm, z_norm = LN(block.ln_2, x), LN(block.ln_2, z).to(x.dtype)
        h_x, h_z = MLP(block, torch.cat([x_norm, z_norm])).split(sizes)
        x = x + h_x + self.A_s2(x_norm)
        h_z = h_z.clone()
        z = z + self.A_t2(h_z)
        if self.serial_skip:
            z = z + h_z
        return x, z


# ---------------------------------------------------------------- the methods it is compared with
class FrameBlock(nn.Module):
    """Base of the blocks that see only frames: x'' = the image model's own block of x.

    x is (B·T_s, L, d), the frames of B clips one after the other, each an ordinary image: its
    class token first, if there is one, then its P patches. x'' has the same shape. A method that
    needs more than a block of its own asks for it here.
    """

    looks_across_frames = False  # for tests: does the order of frames change the output?
    pools_tokens = False  # are the frames' tokens averaged, rather than their features?
    temporal_embedding = False  # a trained vector for each frame is added to its tokens
    needs_class_token = False  # are image models without one refused?

    def __init__(self, d):
        super().__init__()

    @staticmethod
    def trains(name):
        """Is the image model's own parameter of this name trained, too?"""
        return False

    def forward(self, block, x):
        x = x + MHA(block, LN(block.ln_1, x))
        return x + MLP(block, LN(block.ln_2, x))


class LinearBlock(FrameBlock):
    """Linear probe: x'' = the image model's own block; only the head is trained."""


class FullBlock(FrameBlock):
    """Full fine-tuning: x'' = the image model's own block, which is trained."""

    @staticmethod
    def trains(name):
        return True


class VPTBlock(FrameBlock):
    """VPT-Deep (Jia et al., ECCV 2022): prompt tokens P beside x, whose outputs are dropped.

    x' = x + MHA(LN1 [x ; P])          x'' = x' + MLP(LN2 x')          (x's own tokens alone)
    """

    needs_class_token = True

    def __init__(self, d, bottleneck, dropout, patch_size):
        super().__init__(d)
        number = bottleneck or 50
        bound = math.sqrt(6 / (3 * patch_size**2 + d))  # Xavier's, of a patch's pixels and d
        self.prompt_embedding = nn.Parameter(torch.empty(number, d).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, block, x):
        P = self.prompt_embedding.expand(x.shape[0], -1, -1)  # (B·T_s, prompts, d)
        x_and_P = torch.cat([x, self.dropout(P).to(x.dtype)], dim=1)
        x = x + MHA(block, LN(block.ln_1, x_and_P))[:, : x.shape[1]]
        return x + MLP(block, LN(block.ln_2, x))


class AdaptFormerBlock(FrameBlock):
    """AdaptFormer (Chen et al., NeurIPS 2022): an adapter with ReLU parallel to the MLP.

    x' = x + MHA(LN1 x)          x'' = x' + MLP(LN2 x') + 0.1 · A(x')

    As in their code, A has no LayerNorm.
    """

    def __init__(self, d, bottleneck, dropout):
        super().__init__(d)
        self.A = Adapter(d, bottleneck or 64, dropout, activation=F.relu)

    def forward(self, block, x):
        x = x + MHA(block, LN(block.ln_1, x))
        return x + MLP(block, LN(block.ln_2, x)) + 0.1 * self.A(x)


class ProTuningBlock(FrameBlock):
    """Pro-tuning (Nie et al., 2022): convolutions make a prompt of the features and add it.

    x' = x + MHA(LN1 x)     y = x' + MLP(LN2 x')     x'' = y + W_up · GELU(DWConv5×5(W_down · y))

    Width, GELU and the start at zero are ours. A class token has no place in the grid of patches
    and gets no prompt; so what the last block adds to the patches is never read.
    """

    needs_class_token = True

    def __init__(self, d, bottleneck, dropout):
        super().__init__(d)
        width = bottleneck or d // 4
        self.down, self.up = nn.Linear(d, width), nn.Linear(width, d)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(width, width, 5, padding=2, groups=width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, block, x):
        x = x + MHA(block, LN(block.ln_1, x))
        y = x + MLP(block, LN(block.ln_2, x))
        rows = math.isqrt(y.shape[1] - 1)
        h = self.down(y[:, 1:]).unflatten(1, (rows, -1))  # (B·T_s, rows, cols, width)
        h = F.gelu(self.conv(h.permute(0, 3, 1, 2)))  # (B·T_s, width, rows, cols)
        h = self.dropout(h).permute(0, 2, 3, 1).flatten(1, 2)  # (B·T_s, P, width)
        return y + zero_for_class_token(self.up(h))


class STAdapter(nn.Module):
    """A(x) = x + W_up · DWConv3×1×1(W_down · x): mixes a patch with its neighbours in time."""

    def __init__(self, d, spatial_frames, bottleneck, dropout):
        super().__init__()
        self.spatial_frames = spatial_frames
        self.down, self.up = nn.Linear(d, bottleneck), nn.Linear(bottleneck, d)
        self.dropout = nn.Dropout(dropout)
        # 3×1 over (T_s, P) is 3×1×1 over (T_s, H, W).
        self.conv = nn.Conv2d(bottleneck, bottleneck, (3, 1), padding=(1, 0), groups=bottleneck)
        for zero in (self.down.bias, self.up.bias, self.conv.weight, self.conv.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        h = self.down(x[:, 1:]).unflatten(0, (-1, self.spatial_frames))  # (B, T_s, P, bottleneck)
        h = self.dropout(self.conv(h.permute(0, 3, 1, 2)))  # (B, bottleneck, T_s, P)
        h = h.permute(0, 2, 3, 1).flatten(0, 1)  # (B·T_s, P, bottleneck)
        return x + zero_for_class_token(self.up(h))


class STAdapterBlock(FrameBlock):
    """ST-Adapter (Pan et al., NeurIPS 2022): one of their adapters before MHA, MLP or both.

    x' = A_1(x) + MHA(LN1 A_1(x))          x'' = A_2(x') + MLP(LN2 A_2(x'))

    before: "mha" builds A_1 alone, as in the paper, "mlp" A_2 alone, as in their code, "both" both:
    12 or 24 adapters of width 384 on ViT-B. Class tokens pass an adapter unchanged, so A_2 of the
    last block has no effect on the output. As in their code, the frames' class tokens are averaged
    before the image model's last norm.
    """

    looks_across_frames = True
    pools_tokens = True
    needs_class_token = True

    def __init__(self, d, spatial_frames, bottleneck, dropout, before):
        super().__init__(d)

        def adapter_if(wanted):
            if not wanted:
                return nn.Identity()
            return STAdapter(d, spatial_frames, bottleneck or 384, dropout)

        self.A_1, self.A_2 = adapter_if(before != "mlp"), adapter_if(before != "mha")

    def forward(self, block, x):
        x = self.A_1(x)
        x = x + MHA(block, LN(block.ln_1, x))
        x = self.A_2(x)
        return x + MLP(block, LN(block.ln_2, x))


class AIMBlock(FrameBlock):
    """AIM (Yang et al., ICLR 2023): the frozen attention runs twice, first over time.

        x_t = x + A_t(MHA over time(LN1 x))        x' = x_t + h + A_s(h) with h = MHA(LN1 x_t)
        x'' = x' + MLP(LN2 x') + s · A_m(LN2 x')           s is aim_scale

    Over time means over the frames of each token. Neither attention knows the order of frames:
    only the model's temporal embedding does. aim_temporal_adapters: with 2, as in theirs for
    Something-Something v2, MHA over time is of u + A_in(u) with u = LN1 x.
    """

    looks_across_frames = True
    temporal_embedding = True
    needs_class_token = True

    def __init__(self, d, spatial_frames, bottleneck, dropout, aim_scale, aim_temporal_adapters):
        super().__init__(d)
        width = bottleneck or d // 4
        self.A_in = Adapter(d, width, dropout) if aim_temporal_adapters == 2 else None
        self.A_t = Adapter(d, width, dropout)
        self.A_s = Adapter(d, width, dropout)
        self.A_m = Adapter(d, width, dropout)
        self.spatial_frames, self.s = spatial_frames, aim_scale

    def forward(self, block, x):
        u = LN(block.ln_1, x)
        if self.A_in is not None:
            u = u + self.A_in(u)
        u = u.unflatten(0, (-1, self.spatial_frames)).transpose(1, 2)  # (B, L, T_s, d)
        B, L = u.shape[:2]
        h = MHA(block, u.flatten(0, 1))  # (B·L, T_s, d)
        h = h.unflatten(0, (B, L)).transpose(1, 2).flatten(0, 1)  # (B·T_s, L, d)
        x = x + self.A_t(h)
        h = MHA(block, LN(block.ln_1, x))
        x = x + h + self.A_s(h)
        u = LN(block.ln_2, x)
        return x + MLP(block, u) + self.s * self.A_m(u)


def zero_for_class_token(patches):
    """(images, P, d) → (images, 1 + P, d): what is added to a class token is zero."""
    return F.pad(patches, (0, 0, 1, 0))


# ---------------------------------------------------------------- all of them
METHODS = {
    "dualpath": DualPathBlock,
    "linear": LinearBlock,
    "full": FullBlock,
    "vpt": VPTBlock,
    "adaptformer": AdaptFormerBlock,
    "protuning": ProTuningBlock,
    "st_adapter": STAdapterBlock,
    "aim": AIMBlock,
}
