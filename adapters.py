"""The bottleneck adapter, and where each method puts it around a frozen transformer block.

    python adapters.py        # prints the tuned parameters that each choice adds to a block

Symbols are the paper's: A is an adapter; x are tokens of the spatial path, z of the temporal path;
MHA, MLP, LN1 and LN2 are the frozen parts of one block of the image model (open_clip calls the
last two ln_1 and ln_2). This file knows only blocks and tokens: (images, tokens, d).
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------- pieces that every method shares
class Adapter(nn.Module):
    """A(x) = W_up · GELU(W_down · x): (..., d) → (..., d).

    No skip and no LayerNorm of its own: the block says what it is added to. W_up and both biases
    start at zero, so a new adapter contributes exactly nothing.
    """

    def __init__(self, d, bottleneck=128, dropout=0.1):
        super().__init__()
        self.down = nn.Linear(d, bottleneck)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, d)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        return self.up(self.dropout(F.gelu(self.down(x))))

def MHA(block, x):
    """The frozen attention of an open_clip block, its layer scale (and extra norm) included."""
    h = block.attention(x) if hasattr(block, "attention") else block.ln_attn(block.attn(x))
    return block.ls_1(h)

def MLP(block, x):
    """The frozen MLP of an open_clip block, its layer scale included."""
    return block.ls_2(block.mlp(x))

# ---------------------------------------------------------------- DualPath (Park, Lee, Sohn, CVPR 2023)
class DualPathBlock(nn.Module):
    """The adapters around one frozen block, which serves both paths.

        spatial    x' = x + MHA(LN1 x) + A_s1(LN1 x)          x'' = x' + MLP(LN2 x') + A_s2(LN2 x')
        temporal   z' = z + A_t1(MHA(A_t0(LN1 z)))            z'' = z' + A_t2(MLP(LN2 z'))

    Spatial adapters run parallel to the frozen parts: the block starts as the image model's. Temporal
    ones come in series behind them: the block starts as the identity, z'' = z.

    pre_attention_adapter: has A_t0, which the paper's parameter count on Something-Something v2 takes; else left out.
    serial_skip: z' = z + h + A_t1(h) with h = MHA(…), and so behind the MLP: starts as the image model.
    paths: "both", "spatial" or "temporal"; the adapters of an unused path are not built.
    """

    def __init__(self, d, bottleneck=128, dropout=0.1, pre_attention_adapter=False, serial_skip=False, paths="both"):
        super().__init__()
        spatial, temporal = paths != "temporal", paths != "spatial"
        new = lambda wanted: Adapter(d, bottleneck, dropout) if wanted else nn.Identity()
        self.A_s1, self.A_s2 = new(spatial), new(spatial)
        self.A_t0 = new(temporal and pre_attention_adapter)
        self.A_t1, self.A_t2 = new(temporal), new(temporal)
        self.serial_skip = serial_skip

    def forward(self, block, x, z):
        """block: the frozen one; x: (B·T_s, L, d); z: (B·T_G, L, d) → x'', z'', same shapes.

        A path that is switched off has no images: its tensor has no rows, and every line still holds.
        """
        # Both paths use the same frozen weights and attention never crosses images, so the tokens of
        # both are one batch in each frozen call: one MHA and one MLP serve two paths.
        N = x.shape[0]
        x_norm, z_norm = block.ln_1(x), block.ln_1(z)
        h = MHA(block, torch.cat([x_norm, self.A_t0(z_norm)]))
        x = x + h[:N] + self.A_s1(x_norm)
        z = z + self.serial(self.A_t1, h[N:])

        x_norm, z_norm = block.ln_2(x), block.ln_2(z)
        h = MLP(block, torch.cat([x_norm, z_norm]))
        x = x + h[:N] + self.A_s2(x_norm)
        z = z + self.serial(self.A_t2, h[N:])
        return x, z

    def serial(self, A, h):
        return h + A(h) if self.serial_skip else A(h)

def main():
    print("tuned parameters in the adapters of all blocks, bottleneck 128")
    for name, d, layers in (("ViT-B", 768, 12), ("ViT-L", 1024, 24)):
        for pre in (False, True):
            with torch.device("meta"):
                block = DualPathBlock(d, pre_attention_adapter=pre)
            tuned = layers * sum(p.numel() for p in block.parameters())
            print(f"  {name}  dualpath{' + A_t0' if pre else '':7s}  {tuned / 1e6:6.2f} M")

if __name__ == "__main__":
    main()
