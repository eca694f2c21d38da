"""What each method puts around a frozen transformer block: DualPath, then those that it is compared with.

    python adapters.py        # prints the tuned parameters in the blocks of each method

Symbols are the paper's: A is an adapter; x are tokens of frames (DualPath's spatial path), z of its temporal path; MHA, MLP, LN1
and LN2 are the frozen parts of one block of the image model (open_clip calls the last two ln_1 and ln_2). This file knows only
blocks and tokens, (images, tokens, d), but for its last section: where and how whole models run, and what they cost.
"""
import ctypes
import itertools
import math
import os
import random
from functools import partial
from statistics import median
from timeit import timeit

import torch
from open_clip.transformer import QuickGELU
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ---------------------------------------------------------------- pieces that every method shares
class Adapter(nn.Module):
    """A(x) = W_up · GELU(W_down · x): (..., d) → (..., d).

    No skip and no LayerNorm of its own: the block says what it is added to. W_up and both biases
    start at zero, so a new adapter contributes exactly nothing."""

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

# ---------------------------------------------------------------- the frozen parts of a block, cheaply
# Each gives what open_clip's own module gives, but for rounding. A product with frozen weights keeps nothing for backward, so
# what a training step keeps, and the bytes that it moves, are those of LayerNorm, attention and QuickGELU.
def LN(norm, x):
    """A LayerNorm in the tokens' own type. Autocast would run it in float32, and keep its input twice as large."""
    with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):  # (there is no autocast of the meta device)
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

def MHA(block, x):
    """The frozen attention of an open_clip block, its layer scale (and extra norm) included."""
    if not hasattr(block, "attention"):  # open_clip's other kind of block, which does the same by itself
        return block.ls_1(block.ln_attn(block.attn(x)))
    if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return block.ls_1(block.attention(x))  # nn.MultiheadAttention's own kernel, there the fastest; it cannot be compiled
    # In training nn.MultiheadAttention copies q, k and v to rearrange them; fused attention takes them where they are.
    a = block.attn
    qkv = F.linear(x, a.in_proj_weight, a.in_proj_bias).unflatten(-1, (3, a.num_heads, -1))
    h = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv.unbind(2)))  # (images, heads, tokens, d / heads)
    return block.ls_1(a.out_proj(h.transpose(1, 2).flatten(2)))

def MLP(block, x):
    """The frozen MLP of an open_clip block, its layer scale included."""
    mlp = block.mlp
    quick = isinstance(mlp.gelu, QuickGELU) and not hasattr(mlp, "ln") and not mlp.c_fc.weight.requires_grad
    return block.ls_2(QuickMLP.apply(x, *mlp.parameters()) if quick else mlp(x))

class QuickMLP(torch.autograd.Function):
    """W_2 · QuickGELU(W_1 x + b_1) + b_2 with frozen weights, where QuickGELU(u) = u · σ(1.702 u) = SiLU(1.702 u) / 1.702.

    open_clip's three operations for it keep two tensors four times as wide as x, and move more bytes than anything else
    in a step. A product scales its result for free, which leaves SiLU: one pass, and one tensor kept."""

    @staticmethod
    def forward(ctx, x, W_1, b_1, W_2, b_2):
        s = torch.addmm(1.702 * b_1, x.flatten(0, -2), W_1.T, alpha=1.702)  # 1.702 u, (rows, 4d)
        ctx.save_for_backward(s, W_1, W_2)
        return torch.addmm(b_2, F.silu(s), W_2.T, alpha=1 / 1.702).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        s, W_1, W_2 = ctx.saved_tensors
        grad_s = grad.flatten(0, -2) @ W_2.to(grad.dtype)  # over 1.702, which cancels with that of s
        torch.ops.aten.silu_backward(grad_s, s, grad_input=grad_s)  # in place
        return (grad_s @ W_1.to(grad.dtype)).view(grad.shape), None, None, None, None

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
        """block: the frozen one; x: (B·T_s, L, d); z: (B·T_G, L, d) → x'', z'', same shapes. A path that is switched off has no
        images: its tensor has no rows, and every line still holds."""
        # Both paths use the same frozen weights and attention never crosses images, so the tokens of
        # both are one batch in each frozen call: one MHA and one MLP serve two paths.
        images = [x.shape[0], z.shape[0]]
        x_norm, z_norm = LN(block.ln_1, x), LN(block.ln_1, z)
        h_x, h_z = MHA(block, torch.cat([x_norm, self.A_t0(z_norm)])).split(images)
        x = x + h_x + self.A_s1(x_norm)
        z = z + self.serial(self.A_t1, h_z)

        x_norm, z_norm = LN(block.ln_2, x), LN(block.ln_2, z)
        h_x, h_z = MLP(block, torch.cat([x_norm, z_norm])).split(images)
        x = x + h_x + self.A_s2(x_norm)
        z = z + self.serial(self.A_t2, h_z)
        return x, z

    def serial(self, A, h):
        h = h.clone()  # A keeps its input for backward; as a slice that would keep both paths' tokens
        return h + A(h) if self.serial_skip else A(h)

# ---------------------------------------------------------------- the methods that it is compared with
# Each takes x, (B·frames, L, d), the frames of B clips one after the other, as ordinary images, and gives x'' of the same shape.
# A frame's class token comes first, then its P patches. All but VPT start as the image model.
class PlainBlock(nn.Module):
    """x'' = the image model's own block: nothing is added, so there is no width and no dropout. `linear` trains none of it,
    `full` all."""

    def __init__(self, d, frames, bottleneck=None, dropout=0.0):
        super().__init__()

    def forward(self, block, x):
        return block(x)

class VPTBlock(nn.Module):
    """VPT-Deep (Jia et al., ECCV 2022): every block gets prompt tokens P of its own beside x, whose outputs are dropped.

        x' = x + MHA(LN1 [x ; P])          x'' = x' + MLP(LN2 x')          (the rows of x alone)
    """

    def __init__(self, d, frames, prompts=50, dropout=0.1):
        super().__init__()
        bound = math.sqrt(3 / d)  # theirs is √(6 / (3·patch² + d)), which is this where d = 3·patch², as in ViT-B/16
        self.prompt_embedding = nn.Parameter(torch.empty(prompts, d).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, block, x):
        P = self.dropout(self.prompt_embedding.expand(x.shape[0], -1, -1)).to(x.dtype)  # (B·frames, prompts, d)
        x = x + MHA(block, LN(block.ln_1, torch.cat([x, P], dim=1)))[:, :x.shape[1]]
        return x + MLP(block, LN(block.ln_2, x))

class AdaptFormerBlock(nn.Module):
    """AdaptFormer (Chen et al., NeurIPS 2022): an adapter with ReLU parallel to the MLP, s = 0.1.

        x' = x + MHA(LN1 x)          x'' = x' + MLP(LN2 x') + s · A(x')          (as in their code: A without a LayerNorm)
    """

    def __init__(self, d, frames, bottleneck=64, dropout=0.1, s=0.1):
        super().__init__()
        self.A, self.s = Adapter(d, bottleneck, dropout, activation=F.relu), s

    def forward(self, block, x):
        x = x + MHA(block, LN(block.ln_1, x))
        return x + MLP(block, LN(block.ln_2, x)) + self.s * self.A(x)

class ProTuningBlock(nn.Module):
    """Pro-tuning (Nie et al., 2022): a prompt, made of the block's features by three light convolutions, is added to them.

        x' = x + MHA(LN1 x)     y = x' + MLP(LN2 x')     x'' = y + W_up · GELU(DWConv5×5(W_down · y))

    Width, GELU and the start at zero are ours. A class token has no place in the grid of patches and gets no prompt; so what the
    last block adds to the patches is never read.
    """

    def __init__(self, d, frames, bottleneck=None, dropout=0.1):
        super().__init__()
        bottleneck = bottleneck or d // 4
        self.down, self.up, self.dropout = nn.Linear(d, bottleneck), nn.Linear(bottleneck, d), nn.Dropout(dropout)
        self.conv = nn.Conv2d(bottleneck, bottleneck, 5, padding=2, groups=bottleneck)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, block, x):
        x = x + MHA(block, LN(block.ln_1, x))
        y = x + MLP(block, LN(block.ln_2, x))
        h = self.down(y[:, 1:]).unflatten(1, (math.isqrt(y.shape[1] - 1), -1)).permute(0, 3, 1, 2)  # (…, bottleneck, rows, cols)
        h = self.dropout(F.gelu(self.conv(h))).permute(0, 2, 3, 1).flatten(1, 2)  # (B·frames, P, bottleneck)
        return y + F.pad(self.up(h), (0, 0, 1, 0))  # nothing for class tokens

class STAdapter(nn.Module):
    """A(x) = x + W_up · DWConv3×1×1(W_down · x): mixes every patch with those at its place in the frames before and after."""

    def __init__(self, d, frames, bottleneck, dropout):
        super().__init__()
        self.frames = frames
        self.down, self.up, self.dropout = nn.Linear(d, bottleneck), nn.Linear(bottleneck, d), nn.Dropout(dropout)
        self.conv = nn.Conv2d(bottleneck, bottleneck, (3, 1), padding=(1, 0), groups=bottleneck)
        for zero in (self.down.bias, self.up.bias, self.conv.weight, self.conv.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        h = self.down(x[:, 1:]).unflatten(0, (-1, self.frames)).permute(0, 3, 1, 2)  # (B, bottleneck, frames, P)
        h = self.dropout(self.conv(h)).permute(0, 2, 3, 1).flatten(0, 1)  # 3×1 over (frames, P) is 3×1×1 over (frames, H, W)
        return x + F.pad(self.up(h), (0, 0, 1, 0))  # nothing for class tokens

class STAdapterBlock(nn.Module):
    """ST-Adapter (Pan et al., NeurIPS 2022): one of their adapters before MHA, MLP or both.

        x' = A_1(x) + MHA(LN1 A_1(x))          x'' = A_2(x') + MLP(LN2 A_2(x'))

    before: "mha" builds A_1, "mlp" A_2, "both" both: 12×384 (the paper's is before MHA, their code's before the MLP) and 24×384
    on ViT-B. Class tokens pass an adapter unchanged, so A_2 of the last block moves nothing that is read.
    """

    def __init__(self, d, frames, bottleneck=384, dropout=0.1, before="mha"):
        super().__init__()
        if before not in ("mha", "mlp", "both"):
            raise ValueError(f"before is {before!r}; it is mha, mlp or both")
        new = lambda wanted: STAdapter(d, frames, bottleneck, dropout) if wanted else nn.Identity()
        self.A_1, self.A_2 = new(before != "mlp"), new(before != "mha")

    def forward(self, block, x):
        x = self.A_1(x)
        x = x + MHA(block, LN(block.ln_1, x))
        x = self.A_2(x)
        return x + MLP(block, LN(block.ln_2, x))

class AIMBlock(nn.Module):
    """AIM (Yang et al., ICLR 2023): the frozen attention runs twice, over the frames of each token, then over each frame's tokens.

        x_t = x + A_t(MHA over time(LN1 x))          x' = x_t + h + A_s(h) with h = MHA(LN1 x_t)
        x'' = x' + MLP(LN2 x') + s · A_m(LN2 x'), s = 0.5

    Neither attention knows the order of frames: that is in the model's temporal_embedding alone.
    """

    def __init__(self, d, frames, bottleneck=None, dropout=0.1, s=0.5):
        super().__init__()
        self.A_t, self.A_s, self.A_m = (Adapter(d, bottleneck or d // 4, dropout) for _ in range(3))
        self.frames, self.s = frames, s

    def forward(self, block, x):
        h = LN(block.ln_1, x).unflatten(0, (-1, self.frames)).transpose(1, 2)  # (B, L, frames, d)
        h = MHA(block, h.flatten(0, 1)).unflatten(0, h.shape[:2]).transpose(1, 2)  # (B, frames, L, d)
        x = x + self.A_t(h.flatten(0, 1))
        h = MHA(block, LN(block.ln_1, x))
        x = x + h + self.A_s(h)
        h = LN(block.ln_2, x)
        return x + MLP(block, h) + self.s * self.A_m(h)

FRAME_METHODS = {"linear": PlainBlock, "full": PlainBlock, "vpt": VPTBlock, "adaptformer": AdaptFormerBlock,
                 "protuning": ProTuningBlock, "st_adapter": STAdapterBlock, "aim": AIMBlock}

# ---------------------------------------------------------------- whole models: where and how they run; counted, measured
def choose_device(name):
    """auto: a CUDA GPU, of several processes each its own; else Apple's mps, which nobody has tried here; else the CPU."""
    local, gpus, mps = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count(), torch.backends.mps.is_available()
    kind = name if name != "auto" else "cuda" if gpus else "mps" if mps else "cpu"
    if kind == "cuda" and local >= gpus or kind == "mps" and (local or not mps):
        raise OSError(f"--device {name} finds no GPU for process {local} of this machine, which has {gpus} of CUDA's and"
                      f" {int(mps)} of Apple's: start fewer processes, or take --device cpu")
    if kind == "cuda":
        torch.cuda.set_device(local)
    return torch.device(f"cuda:{local}" if kind == "cuda" else kind)

def prepare(model, dtype=None, compile=False, checkpoint_activations=False):
    """Make ready for long work under autocast to dtype: hold the frozen weights in it, else cast at every call; compile the
    blocks, which share their graphs; keep only the blocks' inputs for backward, and compute the rest again."""
    if checkpoint_activations:
        model.run = partial(checkpoint, use_reentrant=False)
    for p in [p for p in model.visual.parameters() if not p.requires_grad]:
        p.data = p.data.to(dtype or p.dtype)
    if compile:
        try:  # something small, so that a missing compiler is a sentence now
            torch.compile(torch.neg)(model.mean)
        except Exception as error:  # each backend raises its own kinds
            raise OSError(f"--compile does not work on this machine: {str(error).splitlines()[0]}")
        dynamo = torch._dynamo.config  # it would cut the (small) graphs for DDP and, past its limit, go on without compiling
        dynamo.optimize_ddp, dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = False, 64, True
        for block in model.blocks:
            block.compile()
    return model

def count(model):
    """Frames and images of a clip, parameters, and 10⁹ multiply-accumulates per view and per test, three views on all benchmarks,
    of a model on the meta device: counted is what a training step runs; a CPU's inference kernels would hide their own."""
    video = torch.zeros(1, model.num_frames, 3, *model.visual.image_size, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(video)
    gmacs, (tuned, everything) = counter.get_total_flops() / 2e9, count_parameters(model)
    return {"T": model.num_frames, "images": model.images, "all M": everything / 1e6, "tuned M": tuned / 1e6, "GMACs/view": gmacs,
            "3 views": 3 * gmacs}

def count_parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())

def parameter_groups(model, weight_decay):
    """Weight decay for matrices; none for biases, norms, tokens and position embeddings."""
    tuned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrix = lambda name, p: p.ndim > 1 and not name.endswith("embedding")
    return [dict(params=[p for n, p in tuned if matrix(n, p)], weight_decay=weight_decay),
            dict(params=[p for n, p in tuned if not matrix(n, p)], weight_decay=0.0)]

def step(net, x, dtype=None, train=False, optimizer=None):
    """A forward of net(x), or a training step, or, where x asks for gradients and nothing is trained, one back to x."""
    with torch.set_grad_enabled(train), torch.autocast(x.device.type, dtype, enabled=dtype not in (None, torch.float32)):
        y = net.train(train)(x)
    if train:
        y.float().logsumexp(-1).sum().backward()  # costs what cross-entropy costs
        x.grad = None
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()

def take_turns(steps, rounds):
    """Seconds of each step in each round but the first, which warms up; in random order, so that noise falls on all alike."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = {name: [] for name in steps}
    for _ in tqdm(range(rounds + 1), "measuring", unit="round", leave=False):
        for name in random.sample(list(steps), len(steps)):
            wait()
            seconds[name].append(timeit(lambda: (steps[name](), wait()), number=1))
    return {name: taken[1:] for name, taken in seconds.items()}

def peak_memory(run):
    """The bytes that run() takes at its peak beyond what was there before; None where the system cannot tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
    else:
        resident = lambda key: 1024 * int(open("/proc/self/status").read().split(key)[1].split()[0])
        held, peak = partial(resident, "VmRSS:"), partial(resident, "VmHWM:")
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else what was freed, but not given back, would hide what is taken now
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # Linux: the peak starts anew
        except (AttributeError, OSError, TypeError):
            return None
    before = held()
    run()
    return peak() - before

def compare(rows, models, plain, batch, rounds):
    """Adds to the row of each model what it costs next to the plain image model (never compiled) on as many images: clips/s;
    ratio: its seconds over the plain model's forward, or forward and backward to the pixels, the least that a method costs that
    trains inside (medians of the rounds' ratios); growth: of the forward, over the first row's; GB/clip: the peak of training,
    weights and optimiser included, inputs not, over the batch; use: the share of the device's own rate, that of a large product,
    that training comes to if the forward's products count twice (linear: once, full: three times). Returns that rate, in MAC/s."""
    plain.requires_grad_(False)
    device, dtype, size = plain.conv1.weight.device, plain.conv1.weight.dtype, (3, *plain.image_size)
    square = torch.randn(2 * [8192 if device.type == "cuda" else 2048], device=device, dtype=dtype)
    steps = {"product": lambda: square @ square}
    for i, model in enumerate(models):
        video = torch.randint(256, (batch, model.num_frames, *size), dtype=torch.uint8, device=device)
        pixels = torch.randn(batch * model.images, *size, device=device, dtype=dtype, requires_grad=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        steps[i, "forward"], steps[i, "plain forward"] = partial(step, model, video, dtype), partial(step, plain, pixels)
        steps[i, "train"] = partial(step, model, video, dtype, True, optimizer)
        steps[i, "plain train"] = partial(step, plain, pixels, None, True)
    seconds = take_turns(steps, rounds)
    ratio = lambda a, b: median(x / y for x, y in zip(seconds[a], seconds[b]))
    rate = len(square) ** 3 / median(seconds["product"])
    for i, (row, model) in enumerate(zip(rows, models)):
        for kind in ("forward", "train"):
            for who in ("", "plain "):
                row[f"{who}{kind}/s"] = batch / median(seconds[i, who + kind])
            row[f"{kind} ratio"] = ratio((i, kind), (i, f"plain {kind}"))
        row["growth"] = ratio((i, "forward"), (0, "forward"))
        for key, net, kind in (("GB/clip", model, "train"), ("plain GB", plain, "plain train")):
            held = sum(p.nbytes * (1 + 2 * p.requires_grad) for p in net.parameters())  # AdamW holds two averages of a weight
            taken = peak_memory(steps[i, kind])
            row[key] = taken and (held + taken) / batch / 1e9
        products = {"linear": 1e9, "full": 3e9}.get(row["method"], 2e9) * row["GMACs/view"] * batch
        row["use"] = products / median(seconds[i, "train"]) / rate
    return rate

def main():
    print("tuned parameters in the blocks of each method, at its own width")
    kinds = {"dualpath": DualPathBlock, "dualpath+A_t0": partial(DualPathBlock, pre_attention_adapter=True)}
    kinds |= {method: partial(kind, frames=8) for method, kind in FRAME_METHODS.items() if kind is not PlainBlock}
    kinds["st_adapter, both"] = partial(STAdapterBlock, frames=8, before="both")
    for (name, d, layers), method in itertools.product((("ViT-B", 768, 12), ("ViT-L", 1024, 24)), kinds):
        print(f"  {name}  {method:16s}  {layers * count_parameters(kinds[method](d))[0] / 1e6:6.2f} M")

if __name__ == "__main__":
    main()
