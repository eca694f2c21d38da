"""What each method puts around a frozen transformer block: DualPath, then its peers.

    python adapters.py        # prints the parameters that each method adds to the blocks

Symbols are the paper's: A is an adapter; x are tokens of frames (DualPath's spatial path), z those
of framesets (its temporal path); MHA, MLP, LN1 and LN2 are the frozen parts of one block of the
image model, whose names are open_clip's. This file knows only blocks and tokens, (images, L, d).

A new method is one class here and one line in METHODS, at the end (docs/new_method.md).
"""

import math

import torch
from open_clip.transformer import QuickGELU
from torch import nn
from torch.nn import functional as F

from support.processes import UserError


class Adapter(nn.Module):
    """A(x) = W_up · GELU(W_down · x): (..., d) → (..., d).

    No skip and no LayerNorm of its own: the block says what it is added to. W_up and both biases
    start at zero, so a new adapter contributes exactly nothing.
    """

    def __init__(self, d, bottleneck=128, dropout=0.1, activation=F.gelu):
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
    needs; else it is the identity. serial_skip: z' = z + h + A_t1(h) with h = MHA(…), likewise
    behind the MLP; the block then starts as the image model's. paths: "both", "spatial" or
    "temporal"; the adapters of an unused path are not built.
    """

    needs_class_token = False

    def __init__(
        self,
        d,
        bottleneck=128,
        dropout=0.1,
        pre_attention_adapter=False,
        serial_skip=False,
        paths="both",
    ):
        super().__init__()

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
        x_norm, z_norm = LN(block.ln_1, x), LN(block.ln_1, z).to(x.dtype)  # see DualPath.embed
        h_x, h_z = MHA(block, torch.cat([x_norm, self.A_t0(z_norm)])).split(sizes)
        x = x + h_x + self.A_s1(x_norm)
        z = z + self.serial(self.A_t1, h_z)

        x_norm, z_norm = LN(block.ln_2, x), LN(block.ln_2, z).to(x.dtype)
        h_x, h_z = MLP(block, torch.cat([x_norm, z_norm])).split(sizes)
        x = x + h_x + self.A_s2(x_norm)
        z = z + self.serial(self.A_t2, h_z)
        return x, z

    def serial(self, A, h):
        h = h.clone()  # A keeps its input for backward; a view would keep both paths' tokens
        return h + A(h) if self.serial_skip else A(h)


def quarter_block(d, **options):
    """For image models whose stages differ in width."""
    return DualPathBlock(d, bottleneck=d // 4, **options)


class Unadapted(nn.Module):
    """Around Swin's patch merging, between two stages: no adapters."""

    def forward(self, merging, *paths):
        """paths: x alone, or x and z, (images, L, d) → (images, L / 4, 2d)."""
        merged = merging(torch.cat(paths)).split([path.shape[0] for path in paths])
        merged = [tokens.to(path.dtype) for tokens, path in zip(merged, paths)]
        return merged if len(paths) > 1 else merged[0]


# ---------------------------------------------------------------- the methods it is compared with
class FrameBlock(nn.Module):
    """Base of the blocks that see frames alone: x'' = the image model's own block of x.

    x is (B·frames, L, d), the frames of B clips one after the other, each an ordinary image: its
    class token first, if there is one, then its P patches. x'' has the same shape. A method that
    needs more than a block of its own asks for it here.
    """

    looks_across_frames = False  # for tests: does the order of frames change the model's output?
    pools_tokens = False  # are the frames' tokens averaged, rather than their features?
    trains_image_model = False
    temporal_embedding = False  # a trained vector for each frame is added to its tokens
    needs_class_token = False  # are image models without one refused?

    def __init__(self, d, frames, bottleneck=None, dropout=0.1):
        super().__init__()

    def forward(self, block, x):
        return block(x)


class LinearBlock(FrameBlock):
    """Linear probe: x'' = the image model's own block; the head alone is trained."""


class FullBlock(FrameBlock):
    """Full fine-tuning: x'' = the image model's own block, which is trained."""

    trains_image_model = True


class VPTBlock(FrameBlock):
    """VPT-Deep (Jia et al., ECCV 2022): prompt tokens P beside x, whose outputs are dropped.

    x' = x + MHA(LN1 [x ; P])          x'' = x' + MLP(LN2 x')          (x's own tokens alone)
    """

    needs_class_token = True

    def __init__(self, d, frames, bottleneck=50, dropout=0.1, patch_size=16):
        super().__init__(d, frames)
        bound = math.sqrt(6 / (3 * patch_size**2 + d))  # Xavier's, of a patch's pixels and d
        prompts = torch.empty(bottleneck, d).uniform_(-bound, bound)  # bottleneck: how many
        self.prompt_embedding = nn.Parameter(prompts)
        self.dropout = nn.Dropout(dropout)

    def forward(self, block, x):
        P = self.prompt_embedding.expand(x.shape[0], -1, -1)  # (B·frames, prompts, d)
        x_and_P = torch.cat([x, self.dropout(P).to(x.dtype)], dim=1)
        x = x + MHA(block, LN(block.ln_1, x_and_P))[:, : x.shape[1]]
        return x + MLP(block, LN(block.ln_2, x))


class AdaptFormerBlock(FrameBlock):
    """AdaptFormer (Chen et al., NeurIPS 2022): an adapter with ReLU parallel to the MLP, s = 0.1.

    x' = x + MHA(LN1 x)          x'' = x' + MLP(LN2 x') + s · A(x')

    As in their code, A has no LayerNorm.
    """

    def __init__(self, d, frames, bottleneck=64, dropout=0.1, s=0.1):
        super().__init__(d, frames)
        self.A, self.s = Adapter(d, bottleneck, dropout, activation=F.relu), s

    def forward(self, block, x):
        x = x + MHA(block, LN(block.ln_1, x))
        return x + MLP(block, LN(block.ln_2, x)) + self.s * self.A(x)


class ProTuningBlock(FrameBlock):
    """Pro-tuning (Nie et al., 2022): convolutions make a prompt of the features and add it.

    x' = x + MHA(LN1 x)     y = x' + MLP(LN2 x')     x'' = y + W_up · GELU(DWConv5×5(W_down · y))

    Width, GELU and the start at zero are ours. A class token has no place in the grid of patches
    and gets no prompt; so what the last block adds to the patches is never read.
    """

    needs_class_token = True

    def __init__(self, d, frames, bottleneck=None, dropout=0.1):
        super().__init__(d, frames)
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
        h = self.down(y[:, 1:]).unflatten(1, (rows, -1))  # (B·frames, rows, cols, width)
        h = F.gelu(self.conv(h.permute(0, 3, 1, 2)))  # (B·frames, width, rows, cols)
        h = self.dropout(h).permute(0, 2, 3, 1).flatten(1, 2)  # (B·frames, P, width)
        return y + zero_for_class_token(self.up(h))


class STAdapter(nn.Module):
    """A(x) = x + W_up · DWConv3×1×1(W_down · x): mixes a patch with its neighbours in time."""

    def __init__(self, d, frames, bottleneck, dropout):
        super().__init__()
        self.frames = frames
        self.down, self.up = nn.Linear(d, bottleneck), nn.Linear(bottleneck, d)
        self.dropout = nn.Dropout(dropout)
        # 3×1 over (frames, P) is 3×1×1 over (frames, H, W).
        self.conv = nn.Conv2d(bottleneck, bottleneck, (3, 1), padding=(1, 0), groups=bottleneck)
        for zero in (self.down.bias, self.up.bias, self.conv.weight, self.conv.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        h = self.down(x[:, 1:]).unflatten(0, (-1, self.frames))  # (B, frames, P, bottleneck)
        h = self.dropout(self.conv(h.permute(0, 3, 1, 2)))  # (B, bottleneck, frames, P)
        h = h.permute(0, 2, 3, 1).flatten(0, 1)  # (B·frames, P, bottleneck)
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

    def __init__(self, d, frames, bottleneck=384, dropout=0.1, before="mha"):
        super().__init__(d, frames)
        if before not in ("mha", "mlp", "both"):
            raise ValueError(f"before is {before!r}; it is mha, mlp or both")

        def adapter_if(wanted):
            return STAdapter(d, frames, bottleneck, dropout) if wanted else nn.Identity()

        self.A_1, self.A_2 = adapter_if(before != "mlp"), adapter_if(before != "mha")

    def forward(self, block, x):
        x = self.A_1(x)
        x = x + MHA(block, LN(block.ln_1, x))
        x = self.A_2(x)
        return x + MLP(block, LN(block.ln_2, x))


class AIMBlock(FrameBlock):
    """AIM (Yang et al., ICLR 2023): the frozen attention runs twice, first over time.

        x_t = x + A_t(MHA over time(LN1 x))        x' = x_t + h + A_s(h) with h = MHA(LN1 x_t)
        x'' = x' + MLP(LN2 x') + s · A_m(LN2 x')

    Over time means over the frames of each token. Neither attention knows the order of frames:
    that is in the model's temporal embedding alone. temporal_adapters: with 2, as in theirs for
    Something-Something v2, MHA over time is of u + A_in(u) with u = LN1 x.
    """

    looks_across_frames = True
    temporal_embedding = True
    needs_class_token = True

    def __init__(self, d, frames, bottleneck=None, dropout=0.1, s=0.5, temporal_adapters=1):
        super().__init__(d, frames)
        width = bottleneck or d // 4
        self.A_in = Adapter(d, width, dropout) if temporal_adapters == 2 else None
        self.A_t = Adapter(d, width, dropout)
        self.A_s = Adapter(d, width, dropout)
        self.A_m = Adapter(d, width, dropout)
        self.frames, self.s = frames, s

    def forward(self, block, x):
        u = LN(block.ln_1, x)
        if self.A_in is not None:
            u = u + self.A_in(u)
        u = u.unflatten(0, (-1, self.frames)).transpose(1, 2)  # (B, L, frames, d)
        B, L = u.shape[:2]
        h = MHA(block, u.flatten(0, 1))  # (B·L, frames, d)
        h = h.unflatten(0, (B, L)).transpose(1, 2).flatten(0, 1)  # (B·frames, L, d)
        x = x + self.A_t(h)
        h = MHA(block, LN(block.ln_1, x))
        x = x + h + self.A_s(h)
        u = LN(block.ln_2, x)
        return x + MLP(block, u) + self.s * self.A_m(u)


def zero_for_class_token(patches):
    """(images, P, d) → (images, 1 + P, d): what is added to a class token is zero."""
    return F.pad(patches, (0, 0, 1, 0))


# ---------------------------------------------------------------- the frozen parts, cheaply
# Each gives what open_clip's own module gives, but for rounding. A matrix product with frozen
# weights keeps no input for backward: of the frozen parts, LayerNorm, attention and QuickGELU alone
# keep any, and they move most of the bytes.
def LN(norm, x):
    """A LayerNorm in the tokens' own type: autocast would keep its input in float32."""
    with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def MHA(block, x):
    """The frozen attention of an open_clip block, its layer scale (and extra norm) included."""
    if not hasattr(block, "attention"):  # Swin's, timm's and custom blocks: attn does it all
        return block.ls_1(block.ln_attn(block.attn(x)))
    inference = x.device.type == "cpu" and not torch.is_grad_enabled()
    if inference and not torch.compiler.is_compiling():
        return block.ls_1(block.attention(x))  # nn.MultiheadAttention's own kernel is the fastest
    return attend(block, project(block, x))


def project(block, x):
    """The frozen q, k and v, for methods that change them: (images, L, d) → (images, L, 3d)."""
    if not hasattr(block, "attention"):
        raise UserError(
            "this method changes the projection to q, k and v, which the blocks of this backbone"
            " do in a way of their own: take another backbone"
        )
    return F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias)


def attend(block, qkv):
    """Attention from its projections on: (images, L, 3d) → (images, L, d).

    Without the copies of q, k and v that nn.MultiheadAttention makes in training.
    """
    qkv = qkv.unflatten(-1, (3, block.attn.num_heads, -1))  # (images, L, 3, heads, d / heads)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # (images, heads, L, d / heads)
    h = F.scaled_dot_product_attention(q, k, v)
    return block.ls_1(block.attn.out_proj(h.transpose(1, 2).flatten(2)))


def MLP(block, x):
    """The frozen MLP of an open_clip block, its layer scale included."""
    mlp = block.mlp
    quick = isinstance(getattr(mlp, "gelu", None), QuickGELU) and not hasattr(mlp, "ln")
    if quick and not mlp.c_fc.weight.requires_grad:
        return block.ls_2(QuickMLP.apply(x, *mlp.parameters()))
    return block.ls_2(mlp(x))


class QuickMLP(torch.autograd.Function):
    """W_2 · QuickGELU(W_1 x + b_1) + b_2 with frozen weights.

    QuickGELU(u) = u · σ(1.702 u) = SiLU(1.702 u) / 1.702. open_clip's three operations for it keep
    two tensors four times as wide as x, and move more bytes than anything else in a step. addmm's
    alpha applies both factors for free, which leaves SiLU: one pass, and one tensor kept.
    """

    @staticmethod
    def forward(ctx, x, W_1, b_1, W_2, b_2):
        s = torch.addmm(1.702 * b_1, x.flatten(0, -2), W_1.T, alpha=1.702)  # 1.702 u, (rows, 4d)
        ctx.save_for_backward(s, W_1, W_2)
        return torch.addmm(b_2, F.silu(s), W_2.T, alpha=1 / 1.702).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        s, W_1, W_2 = ctx.saved_tensors
        grad_h = grad.flatten(0, -2) @ W_2.to(grad.dtype)  # h = SiLU(s) / 1.702: dh/du = SiLU'(s)
        grad_u = torch.ops.aten.silu_backward(grad_h, s, grad_input=grad_h)  # in place
        return (grad_u @ W_1.to(grad.dtype)).view(grad.shape), None, None, None, None


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


def main():
    print("parameters that each method adds to the blocks, at its own width")
    for vit, d, layers in (("ViT-B", 768, 12), ("ViT-L", 1024, 24)):
        blocks = {"dualpath": DualPathBlock(d)}
        blocks["dualpath+A_t0"] = DualPathBlock(d, pre_attention_adapter=True)
        for method, Block in METHODS.items():
            if method != "dualpath":
                blocks[method] = Block(d, frames=8)
        blocks["st_adapter, both"] = STAdapterBlock(d, frames=8, before="both")
        for name, block in blocks.items():
            tuned = layers * sum(p.numel() for p in block.parameters())
            print(f"  {vit}  {name:16s}  {tuned / 1e6:6.2f} M")


if __name__ == "__main__":
    main()
