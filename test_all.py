"""What the paper and the nine files claim, tested. What supports them is tested beside its code."""

import csv
import inspect
import itertools
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    QuickGELU,
    ResidualAttentionBlock,
)
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F

import adapters
import evaluate
import grid
import train
from adapters import METHODS
from conftest import (
    SMALL,
    as_one_of_two,
    lines,
    micro_set,
    random_video,
    randomise,
    tiny,
    two_at_once,
    vit_folder,
    write_anything,
    x264,
)
from data import VideoViews
from evaluate import Prediction, predict
from model import Config, build_model
from support.backbones import BACKBONES
from support.datasets import find_videos
from support.processes import UserError
from support.runs import read_checkpoint
from tools.cost import count

PEERS = [method for method in METHODS if method != "dualpath"]
STARTS_ELSEWHERE = {"vpt"}  # its prompts are random; all others start as the image model


# ---------------------------------------------------------------- grid.py
def test_every_pixel_of_a_frameset_comes_from_the_right_frame():
    rows, cols, h, w = 2, 4, 5, 3
    brightness = torch.arange(2 * 16, dtype=torch.uint8).view(2, 16, 1, 1, 1)
    video = brightness.expand(2, 16, 3, rows * h, cols * w)
    sets = grid.frameset(video, rows, cols)
    assert sets.shape == (2, 2, 3, rows * h, cols * w) and sets.dtype == torch.uint8
    for b, n, y, x in itertools.product(range(2), range(2), range(rows * h), range(cols * w)):
        t = 8 * n + y // h * cols + x // w
        assert (sets[b, n, :, y, x] == 16 * b + t).all()


def test_frames_keep_their_upright_picture_in_the_frameset():
    frames = torch.zeros(1, 4, 1, 8, 8)
    frames[:, 2, :, :4, :] = 1  # the third frame's upper half
    tiled = grid.frameset(frames, 2, 2)[0, 0, 0]
    third = tiled[4:, :4]
    assert third[:2].mean() > 0.8 and third[2:].mean() < 0.2
    assert tiled[:4].abs().max() == 0 and tiled[4:, 4:].abs().max() == 0


def test_shrinking_is_bilinear_with_antialiasing():
    frames = torch.rand(1, 16, 1, 64, 64)
    middles = 4 * torch.arange(16) + 1.5  # of the small frame's pixels, in the large one
    weights = (1 - (torch.arange(64) - middles[:, None]).abs() / 4).clamp(min=0)
    weights = weights / weights.sum(1, keepdim=True)
    sixth = grid.frameset(frames)[0, 0, 0, 16:32, 16:32]
    torch.testing.assert_close(sixth, weights @ frames[0, 5, 0] @ weights.T)


@pytest.mark.parametrize(
    "shape, numbers",
    [
        ((1, 20, 3, 64, 64), ("20", "16", "32")),
        ((1, 16, 3, 62, 64), ("62", "60", "64")),
        ((1, 16, 3, 64, 66), ("66", "64", "68")),
        ((1, 0, 3, 64, 64), ("0", "16")),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(shape, numbers):
    with pytest.raises(ValueError) as error:
        grid.frameset(torch.zeros(shape))
    assert all(number in str(error.value) for number in numbers)


def naive_code(position, d):
    angles = [position / 10000 ** (k / (d // 2)) for k in range(d // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


@pytest.mark.parametrize(
    "rows, cols, height, width, patch, dim",
    [(4, 4, 56, 56, 8, 64), (2, 3, 28, 42, 7, 20), (2, 2, 32, 32, 8, 48)],
)
def test_position_code_is_the_mean_over_pixels_of_the_pixels_codes(
    rows, cols, height, width, patch, dim
):
    d_yx, sets = 2 * (dim // 6), 2
    want = np.zeros((sets, height // patch, width // patch, dim))
    for n, py, px in itertools.product(range(sets), range(height), range(width)):
        row, y = divmod(py, height // rows)
        col, x = divmod(px, width // cols)
        code = naive_code((y + 0.5) / patch - 0.5, d_yx)
        code += naive_code((x + 0.5) / patch - 0.5, d_yx)
        code += naive_code(n * rows * cols + row * cols + col, dim - 2 * d_yx)
        want[n, py // patch, px // patch] += np.array(code) / patch**2
    got = grid.position_code(sets, height, width, patch, dim, rows, cols)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want.reshape(sets, -1, dim), atol=1e-6)


# ---------------------------------------------------------------- adapters.py
def test_adapter_is_its_equation_and_starts_as_nothing():
    A = adapters.Adapter(12, 5, 0.1).double().eval()
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    assert (A(x) == 0).all() and 0.25 < A.down.weight.abs().max() <= 12**-0.5
    randomise(A)
    hidden = x @ A.down.weight.T + A.down.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(A(x), gelu @ A.up.weight.T + A.up.bias)
    assert A.train()(x).ne(A(x)).any()


def naive_MHA(block, x, heads=3):
    """Attention from its definition, for the weights of an open_clip block of either kind."""

    def split(t):
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)  # (images, heads, L, d/heads)

    a = block.attn
    q, k, v = (x @ a.in_proj_weight.T + a.in_proj_bias).chunk(3, -1)
    scores = split(q) @ split(k).transpose(-1, -2) / (x.shape[-1] // heads) ** 0.5
    h = (scores.softmax(-1) @ split(v)).transpose(1, 2).flatten(2)
    h = h @ a.out_proj.weight.T + a.out_proj.bias
    h = getattr(block, "ln_attn", torch.nn.Identity())(h)
    return h * getattr(block.ls_1, "gamma", 1)


def naive_MLP(block, x):
    hidden = F.gelu(x @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias)
    y = hidden @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
    return y * getattr(block.ls_2, "gamma", 1)


def new_block(method, d=24, **options):
    """What a method puts around a block: three frames, small, the other options by default."""
    wanted = vars(Config()) | {"patch_size": 16, "bottleneck": 8, "spatial_frames": 3} | options
    names = inspect.signature(METHODS[method]).parameters.keys() - {"d"}
    return METHODS[method](d, **{name: wanted[name] for name in names})


def frozen_block(kind):
    if kind == "custom":
        block = CustomResidualAttentionBlock(24, 3, ls_init_value=0.5, scale_attn=True)
    else:
        layer_scale = 0.5 if kind == "layer scale" else None
        block = ResidualAttentionBlock(24, 3, ls_init_value=layer_scale)
    return randomise(block).double().requires_grad_(False)


def tokens_of(images, length=5):
    return torch.randn(images, length, 24, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["plain", "layer scale", "custom"])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_block_is_the_papers_equations(kind, pre, skip):
    block = frozen_block(kind)
    A = new_block("dualpath", pre_attention_adapter=pre, serial_skip=skip)
    randomise(A).double().eval()
    x, z = tokens_of(6), tokens_of(2)
    got_x, got_z = A(block, x, z)

    u = block.ln_1(x)
    x = x + naive_MHA(block, u) + A.A_s1(u)
    u = block.ln_2(x)
    x = x + naive_MLP(block, u) + A.A_s2(u)

    v = block.ln_1(z)
    h = naive_MHA(block, A.A_t0(v) if pre else v)
    z = z + A.A_t1(h) + (h if skip else 0)
    h = naive_MLP(block, block.ln_2(z))
    z = z + A.A_t2(h) + (h if skip else 0)
    torch.testing.assert_close(got_x, x)
    torch.testing.assert_close(got_z, z)


def test_new_block_is_the_image_models_on_one_path_and_the_identity_on_the_other():
    block = frozen_block("plain")
    x, z = tokens_of(4), tokens_of(2)
    new_x, new_z = new_block("dualpath").double()(block, x, z)
    torch.testing.assert_close(new_x, block(x))
    assert torch.equal(new_z, z)
    _, new_z = new_block("dualpath", serial_skip=True).double()(block, x, z)
    torch.testing.assert_close(new_z, block(z))


@pytest.mark.parametrize("paths", ["spatial", "temporal"])
def test_block_of_one_path_is_that_path_of_both(paths):
    block = frozen_block("plain")
    both = randomise(new_block("dualpath")).double().eval()
    one = new_block("dualpath", paths=paths).double().eval()
    one.load_state_dict({k: v for k, v in both.state_dict().items() if k in one.state_dict()})
    assert 0 < len(list(one.parameters())) == len(list(both.parameters())) // 2
    x, z = tokens_of(4), tokens_of(2)
    want_x, want_z = both(block, x, z)
    if paths == "spatial":
        got_x, got_z = one(block, x, z[:0])
        torch.testing.assert_close(got_x, want_x)
        assert len(got_z) == 0
    else:
        got_x, got_z = one(block, x[:0], z)
        torch.testing.assert_close(got_z, want_z)
        assert len(got_x) == 0


# The peers' equations, for clips of three frames of 3 x 3 patches, as plainly as can be.
def naive_vpt(A, block, x, MHA, MLP):
    """With the prompts where theirs stand, and their own outputs, which are dropped at the end."""
    prompts = A.prompt_embedding.expand(len(x), -1, -1)
    y = torch.cat([x[:, :1], prompts, x[:, 1:]], 1)
    y = y + MHA(block.ln_1(y))
    y = y + MLP(block.ln_2(y))
    return torch.cat([y[:, :1], y[:, 1 + prompts.shape[1] :]], 1)


def naive_adaptformer(A, block, x, MHA, MLP):
    x = x + MHA(block.ln_1(x))
    hidden = (x @ A.A.down.weight.T + A.A.down.bias).clamp(min=0)
    return x + MLP(block.ln_2(x)) + 0.1 * (hidden @ A.A.up.weight.T + A.A.up.bias)


def naive_protuning(A, block, x, MHA, MLP):
    x = x + MHA(block.ln_1(x))
    x = x + MLP(block.ln_2(x))
    hidden, side = A.down(x[:, 1:]), math.isqrt(x.shape[1] - 1)
    mixed = torch.zeros_like(hidden) + A.conv.bias
    for r, c, i, j in itertools.product(range(side), range(side), range(-2, 3), range(-2, 3)):
        if 0 <= r + i < side and 0 <= c + j < side:
            neighbour = hidden[:, (r + i) * side + c + j]
            mixed[:, r * side + c] += A.conv.weight[:, 0, i + 2, j + 2] * neighbour
    return torch.cat([x[:, :1], x[:, 1:] + A.up(F.gelu(mixed))], 1)


def naive_st_adapter(A, block, x, MHA, MLP):
    def adapt(A, x):
        if isinstance(A, torch.nn.Identity):
            return x
        new = x.clone()
        for n in range(len(x)):
            mixed = A.conv.bias
            for i in (-1, 0, 1):
                if n // 3 == (n + i) // 3:  # a frame of the same clip of 3
                    mixed = mixed + A.conv.weight[:, 0, i + 1, 0] * A.down(x[n + i, 1:])
            new[n, 1:] += A.up(mixed)
        return new

    x = adapt(A.A_1, x)
    x = x + MHA(block.ln_1(x))
    x = adapt(A.A_2, x)
    return x + MLP(block.ln_2(x))


def naive_aim(A, block, x, MHA, MLP):
    two = A.A_in is not None  # as theirs on Something-Something v2
    u, x = block.ln_1(x), x.clone()
    u = u + A.A_in(u) if two else u
    for clip, token in itertools.product(range(0, len(x), 3), range(x.shape[1])):
        x[clip : clip + 3, token] += A.A_t(MHA(u[None, clip : clip + 3, token]))[0]
    h = MHA(block.ln_1(x))
    x = x + h + A.A_s(h)
    u = block.ln_2(x)
    return x + MLP(u) + (1 if two else 0.5) * A.A_m(u)


@pytest.mark.parametrize("kind", ["plain", "layer scale", "custom"])
@pytest.mark.parametrize(
    "method, naive, options",
    [
        ("vpt", naive_vpt, {}),
        ("adaptformer", naive_adaptformer, {}),
        ("protuning", naive_protuning, {}),
        ("aim", naive_aim, {}),
        ("aim", naive_aim, {"aim_scale": 1, "aim_temporal_adapters": 2}),
        ("st_adapter", naive_st_adapter, {"before": "mha"}),
        ("st_adapter", naive_st_adapter, {"before": "mlp"}),
        ("st_adapter", naive_st_adapter, {"before": "both"}),
    ],
)
def test_other_blocks_are_their_papers_equations(method, naive, options, kind):
    block, x = frozen_block(kind), tokens_of(6, 1 + 3 * 3)
    new = randomise(new_block(method, **options)).double().eval()

    def MHA(x):
        return naive_MHA(block, x)

    def MLP(x):
        return naive_MLP(block, x)

    got = new(block, x)
    torch.testing.assert_close(got, naive(new, block, x, MHA, MLP))
    assert not torch.allclose(got, block(x), atol=1e-3)
    assert new.train()(block, x).ne(got).any()  # dropout


@pytest.mark.parametrize("kind", ["plain", "layer scale", "custom"])
@pytest.mark.parametrize(
    "method, options",
    [
        *[(method, {}) for method in PEERS if method not in STARTS_ELSEWHERE],
        ("st_adapter", {"before": "mlp"}),
        ("st_adapter", {"before": "both"}),
        ("aim", {"aim_temporal_adapters": 2}),
    ],
)
def test_other_blocks_start_as_the_image_models(method, options, kind):
    block, x = frozen_block(kind), tokens_of(6, 1 + 3 * 3)
    new = new_block(method, **options).double()
    try:
        got = new(block, x)
    except UserError as refusal:
        pytest.skip(str(refusal))
    torch.testing.assert_close(got, block(x))  # with dropout: it adds exactly nothing


def test_prompts_start_in_vpts_range_and_are_dropped_in_each_image_anew():
    block, vpt = frozen_block("plain"), new_block("vpt", d=768, bottleneck=None)
    bound = math.sqrt(6 / (3 * 16**2 + 768))
    assert vpt.prompt_embedding.shape == (50, 768)
    assert 0.99 * bound < vpt.prompt_embedding.abs().max() <= bound
    prompts = tiny(method="vpt", bottleneck=100).blocks[0].prompt_embedding
    assert 0.99 * math.sqrt(6 / (192 + 128)) < prompts.abs().max() <= math.sqrt(6 / (192 + 128))
    vpt = new_block("vpt", bottleneck=4, dropout=0.5).double().train()
    y = vpt(block, tokens_of(1, 10).expand(2, -1, -1))
    assert not torch.allclose(y[0], y[1])


KINDS_OF_BLOCK = {
    "gelu": (ResidualAttentionBlock, {}),
    "quick": (ResidualAttentionBlock, {"act_layer": QuickGELU}),
    "layer scale": (ResidualAttentionBlock, {"ls_init_value": 0.5, "act_layer": QuickGELU}),
    "custom": (CustomResidualAttentionBlock, {"scale_attn": True, "act_layer": QuickGELU}),
    "inner norm": (CustomResidualAttentionBlock, {"scale_fc": True, "act_layer": QuickGELU}),
}


def open_clips_attention(block, x):
    if hasattr(block, "attention"):
        return block.ls_1(block.attention(x))
    return block.ls_1(block.ln_attn(block.attn(x)))


@pytest.mark.parametrize("kind", KINDS_OF_BLOCK)
@pytest.mark.parametrize("training", [True, False])
def test_frozen_parts_give_what_open_clips_modules_give(kind, training):
    Block, options = KINDS_OF_BLOCK[kind]
    block = randomise(Block(24, 3, **options)).double().requires_grad_(False).eval()
    x = tokens_of(4).requires_grad_(training)
    with torch.set_grad_enabled(training):
        pairs = [
            (adapters.MHA(block, x), open_clips_attention(block, x)),
            (adapters.MLP(block, x), block.ls_2(block.mlp(x))),
            (adapters.LN(block.ln_1, x), block.ln_1(x)),
        ]
    for got, want in pairs:
        torch.testing.assert_close(got, want)
        if training:
            weight = torch.randn_like(want)
            ours, theirs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want))
            torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------- model.py
@pytest.mark.parametrize("backbone", ["tiny", "random", "no ln_pre, layer scale"])
def test_spatial_feature_starts_as_open_clips_own(backbone, tmp_path):
    options = {}
    if backbone != "tiny":
        vision = {"no_ln_pre": True, "ls_init_value": 0.3} if "," in backbone else {}
        folder = vit_folder(tmp_path, quick_gelu=True, **vision)
        options = {"backbone": folder, "pretrained": None}
    model = tiny(**options)  # in train mode: the adapters' dropout is on
    video = random_video(size=model.visual.image_size[0])
    y_sp, y_tp = model.features(video)

    if backbone == "tiny":
        clip = open_clip.create_model_and_transforms(BACKBONES["tiny"])[0]
    else:
        clip = open_clip.create_model(options["backbone"])
        clip.visual.load_state_dict(model.visual.state_dict())
    images = video[:, [0, 4, 8, 12]].flatten(0, 1) / 255
    mean = torch.tensor(clip.visual.image_mean).view(3, 1, 1)
    std = torch.tensor(clip.visual.image_std).view(3, 1, 1)
    want = clip.eval().encode_image((images - mean) / std).view(2, 4, -1).mean(1)
    assert y_sp.shape == y_tp.shape == want.shape
    assert ((y_sp - want).norm() / want.norm()).item() <= 1e-5


def test_temporal_path_starts_with_the_framesets_tokens_and_positions():
    model = tiny(position_scale=0.3, rows=2, cols=8)
    video = random_video()
    visual = model.visual
    images = (grid.frameset(video.float(), 2, 8)[:, 0] / 255 - 0.5) / 0.5
    patches = F.conv2d(images, visual.conv1.weight, stride=8).flatten(2).transpose(1, 2)
    code = 0.3 * grid.position_code(1, 64, 64, 8, 128, rows=2, cols=8)[0]
    class_token = (visual.class_embedding + visual.positional_embedding[0]).expand(2, 1, -1)
    z = visual.ln_pre(torch.cat([class_token, patches + code], 1))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda adapters, inputs: seen.append(inputs[2]))
    y_tp = model.features(video)[1]
    torch.testing.assert_close(seen[0], z, rtol=1e-4, atol=1e-4)
    want = visual.ln_post(z[:, 0]) @ visual.proj  # the blocks are the identity
    torch.testing.assert_close(y_tp, want, rtol=1e-4, atol=1e-5)
    assert not any("temporal_position" in name for name in model.state_dict())


def test_framesets_positions_differ_and_each_is_used(tmp_path):
    options = {"backbone": vit_folder(tmp_path), "pretrained": None, "frames": 32}
    model = randomise(tiny(**options)).eval()
    video = random_video(1, 16, 32)
    forward = torch.cat([video, 255 - video], 1)
    backward = torch.cat([255 - video, video], 1)
    assert model.temporal_position.shape[0] == 2
    y_forward, y_backward = model.features(forward)[1], model.features(backward)[1]
    assert not torch.allclose(y_forward, y_backward, atol=1e-4)


EVERY_MODEL = [
    {"pre_attention_adapter": True},
    {"serial_skip": True},
    {"paths": "spatial"},
    {"paths": "temporal"},
    *[{"method": method} for method in PEERS],
    {"method": "st_adapter", "before": "both"},
]


# What changes only patches in the last block moves nothing that is read, and has a gradient of 0.
UNREAD = {"protuning": "blocks.3.", "st_adapter": "blocks.3.A_2."}


@pytest.mark.parametrize("options", EVERY_MODEL, ids=str)
def test_gradients_reach_what_is_trained_and_nothing_else(options):
    model = randomise(tiny(**options))
    F.cross_entropy(model(random_video(4)), torch.arange(4)).backward()
    unread = UNREAD.get(options.get("method"), "none")
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert (p.grad.abs().max() > 0) == (not name.startswith(unread)), name
        else:
            assert p.grad is None, name


@pytest.mark.parametrize("options", EVERY_MODEL, ids=str)
def test_what_a_method_trains_is_what_it_says(options):
    model = tiny(**options)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    of_visual = {name for name in trained if name.startswith("visual.")}
    of_blocks = {name for name in trained if name.startswith("blocks.")}
    elsewhere = trained - of_visual - of_blocks
    if "method" in options:
        Block = METHODS[options["method"]]
        every = {f"visual.{name}" for name, _ in model.visual.named_parameters()}
        assert of_visual == (every if options["method"] == "full" else set())
        in_each = len(list(new_block(**options, d=8).parameters()))
        assert len(of_blocks) >= 4 * in_each and bool(of_blocks) == (in_each > 0)
        embedding = {"temporal_embedding"} if Block.temporal_embedding else set()
        assert elsewhere == {"head.weight", "head.bias"} | embedding
    else:
        paths = options.get("paths", "both")
        own = {"visual.class_embedding", "visual.positional_embedding"}
        assert of_visual == (set() if paths == "temporal" else own)
        assert ("temporal_class_embedding" in elsewhere) == (paths != "spatial")
        assert any(".A_t" in name for name in of_blocks) == (paths != "spatial")
        assert any(".A_s" in name for name in of_blocks) == (paths != "temporal")
        assert model.blocks[0].serial_skip == options.get("serial_skip", False)


def same(a, b):
    return torch.allclose(a, b, atol=1e-5)


def test_paths_and_clips_do_not_leak_into_each_other():
    model = randomise(tiny()).eval()
    video = random_video(3)
    y_sp, y_tp = model.features(video)
    changed = video.clone()
    changed[1, 1::4] = 255 - changed[1, 1::4]  # frames that the spatial path of clip 1 never sees
    new_sp, new_tp = model.features(changed)
    assert same(new_sp, y_sp) and not same(new_tp[1], y_tp[1])
    assert same(new_tp[[0, 2]], y_tp[[0, 2]])
    with torch.no_grad():
        model.visual.positional_embedding += torch.randn(65, 128)  # p^SP: the spatial path's alone
        new_sp, new_tp = model.features(video)
        assert same(new_tp, y_tp) and not same(new_sp, y_sp)
        model.temporal_class_embedding += torch.randn(128)
        last_sp, last_tp = model.features(video)
    assert same(last_sp, new_sp) and not same(last_tp, new_tp)


@pytest.mark.parametrize("method", METHODS)
def test_shuffled_frames_change_what_knows_time_and_nothing_else(method):
    knows_time = method == "dualpath" or METHODS[method].looks_across_frames
    frames = 32 if method == "dualpath" else 4  # two framesets; the others see all frames
    model = randomise(tiny(**{"frames": frames, "method": method})).eval()
    video = random_video(2, frames)
    order = torch.arange(frames).roll(1).view(2, -1).T.flatten()
    with torch.no_grad():
        want, got = model(video), model(video[:, order])
        torch.testing.assert_close(model(video[1:]), want[1:], rtol=1e-4, atol=1e-5)
    difference = ((got - want).norm() / want.norm()).item()
    assert difference > 1e-3 if knows_time else difference <= 1e-5


@pytest.mark.parametrize("method", [m for m in METHODS if m not in STARTS_ELSEWHERE])
def test_a_new_model_has_the_image_models_features(method):
    video = random_video()
    frames = 1 if method == "st_adapter" else 4  # it averages tokens: of one frame, the same
    with torch.no_grad():  # in train mode, with dropout
        got = tiny(method=method, spatial_frames=frames).features(video)[0]
        want = tiny(method="linear", spatial_frames=frames).features(video)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("method", ["st_adapter", "aim"])
def test_st_adapter_averages_tokens_and_the_others_features(method):
    model = randomise(tiny(method=method)).eval()
    tokens = []
    model.blocks[-1].register_forward_hook(lambda block, inputs, x: tokens.append(x[:, 0]))
    got = model.features(random_video())[0]
    x, visual = tokens[0].view(2, 4, -1), model.visual
    want = visual.ln_post(x.mean(1) if method == "st_adapter" else x) @ visual.proj
    torch.testing.assert_close(got, want if method == "st_adapter" else want.mean(1))


def test_aim_knows_time_by_its_temporal_embedding_alone():
    options = {"frames": 4, "method": "aim", "aim_scale": 2}
    model = randomise(tiny(**options)).eval()
    assert model.blocks[0].s == 2
    video = random_video(2, 4)
    with torch.no_grad():
        model.temporal_embedding.zero_()
        torch.testing.assert_close(model(video), model(video.flip(1)), atol=1e-5, rtol=1e-5)
        model.temporal_embedding[1] = torch.randn(128)
        moved = torch.cat([video[:, 1:], video[:, :1]], 1)
        assert not torch.allclose(model(moved), model(video), atol=1e-3)


def test_a_still_is_a_clip_of_one_frame():
    options = {"method": "full", "frames": 1, "spatial_frames": 1}
    assert tiny(**options)(random_video(2, 1)).shape == (2, 8)


def test_wrong_video_is_refused():
    model = tiny()
    right = random_video()
    for video in (random_video(frames=32), random_video(size=32), right.float(), right[0]):
        with pytest.raises(ValueError, match="16, 3, 64, 64"):
            model(video)


def test_another_image_size_interpolates_the_position_embedding():
    model = tiny(size=96)
    assert model.visual.positional_embedding.shape[0] == 1 + 12 * 12
    assert model(random_video(size=96)).shape == (2, 8)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"frames": 20}, "20.*16 or 32"),
        ({"spatial_frames": 3}, "16, T_s = 3.*is 16,.* is 48"),
        ({"size": 72, "frames": 20, "rows": 5}, "5 x 4.*72.*40 or 80"),
        ({"method": "magic"}, "'magic'; the methods are dualpath, "),
        (
            {"method": "linear", "paths": "spatial"},
            "--paths is no option of linear; it is one of d",
        ),
    ],
)
def test_wrong_options_get_a_sentence(options, words):
    with pytest.raises(UserError, match=words):
        sizes = {"backbone": "tiny", "pretrained": "here", "frames": 16, "spatial_frames": 4}
        build_model(Config(**sizes | options))


def counted(**options):
    """A model without memory."""
    with torch.device("meta"):
        return build_model(Config(pretrained=None, **options))


@pytest.mark.parametrize(
    "method, frames, backbone, tuned, gmacs",
    [
        ("aim", 8, "ViT-B-16-quickgelu", 11, 606 / 3),
        ("aim", 16, "ViT-B-16-quickgelu", 11, 1214 / 3),
        ("aim", 32, "ViT-B-16-quickgelu", 11, 2428 / 3),
        # Their 2902 for 8 frames is more than half of their 5604 for 16.
        ("aim", 8, "ViT-L-14-quickgelu", 38, 5604 / 6),
        ("aim", 16, "ViT-L-14-quickgelu", 38, 5604 / 3),
        ("aim", 32, "ViT-L-14-quickgelu", 38, 11208 / 3),
        ("st_adapter", 8, "ViT-B-16-quickgelu", 7.1 + 0.2, 152),  # theirs is without the head's 0.2
    ],
)
def test_other_methods_weights_and_costs_are_their_papers(method, frames, backbone, tuned, gmacs):
    cost = count(counted(method=method, backbone=backbone, frames=frames, spatial_frames=frames))
    assert cost["GMACs/view"] == pytest.approx(gmacs, rel=0.005) and cost["images"] == frames
    assert cost["tuned M"] == pytest.approx(tuned, abs=0.5 if method == "aim" else 0.05)


@pytest.mark.parametrize(
    "backbone, classes, pre, tuned",
    [
        ("ViT-B-16-quickgelu", 400, False, 10.36),
        ("ViT-L-14-quickgelu", 400, False, 27.03),
        ("ViT-B-16-quickgelu", 174, True, 12.62),
        ("ViT-L-14-quickgelu", 174, True, 33.17),
    ],
)
def test_tuned_parameters_are_the_papers(backbone, classes, pre, tuned):
    model = counted(backbone=backbone, num_classes=classes, pre_attention_adapter=pre)
    assert round(count(model)["tuned M"], 2) == tuned


@pytest.mark.parametrize(
    "backbone, frames, gmacs",
    [
        ("ViT-B-16-quickgelu", 16, 166),
        ("ViT-B-16-quickgelu", 32, 185),
        ("ViT-B-16-quickgelu", 48, 203),
        ("ViT-L-14-quickgelu", 16, 758),
        ("ViT-L-14-quickgelu", 32, 842),
        ("ViT-L-14-quickgelu", 48, 927),
    ],
)
def test_multiply_accumulates_grow_by_one_image_per_16_frames(backbone, frames, gmacs):
    model = counted(backbone=backbone, frames=frames)
    assert count(model)["GMACs/view"] == pytest.approx(gmacs, rel=0.01)


CPU = torch.device("cpu")


# ---------------------------------------------------------------- train.py
def test_train_then_evaluate(micro, tmp_path, capsys):
    out, table = str(tmp_path / "run"), str(tmp_path / "table.csv")
    train.main(SMALL + ["--root", micro, "--out", out])
    printed = capsys.readouterr().out
    assert "0.001 x 8/256 = 3.125e-05" in printed
    assert "16 training and 8 validation videos, 8 classes" in printed
    assert f"python evaluate.py {out}/best.pt" in printed
    log = lines(out)
    assert [line["epoch"] for line in log] == [1, 2]
    assert [line["lr"] for line in log] == pytest.approx([3.125e-5, 3.125e-5 / 2])
    assert 1.5 < log[0]["train_loss"] < 3
    groups = read_checkpoint(f"{out}/last.pt")["training"]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.05, 0]
    for line in log:
        assert 0 <= line["val_top1"] <= line["val_top5"] <= 1
        assert line["clips_per_second"] > 0 and line["seconds"] > 0

    assert evaluate.main([f"{out}/last.pt", "--workers", "0", "--predictions", table]) == 0
    with open(f"{out}/last.folder-1x1.json") as file:
        result = json.load(file)
    assert (result["videos"], result["failed"]) == (8, 0)
    assert result["top1"] == log[-1]["val_top1"]
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert sum(row["class1"] == row["label"] for row in rows) / 8 == result["top1"]
    assert all(float(row["score1"]) >= float(row["score5"]) > 0 for row in rows)

    video = find_videos("folder", micro).val[0][0]
    capsys.readouterr()
    assert evaluate.main([f"{out}/last.pt", video]) == 0
    printed = capsys.readouterr().out
    assert printed.count("%") == 5 and rows[0]["class1"] in printed and video in printed
    assert evaluate.main([f"{out}/last.pt", __file__]) == 1
    assert "cannot read" in capsys.readouterr().out


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("dualpath", "linear")])
def test_every_method_trains_and_is_evaluated(method, micro_run, tmp_path, capsys):
    out = str(tmp_path / "run")
    options = ["--method", method] + ["--before", "both"] * (method == "st_adapter")
    train.main(micro_run + ["--out", out, *options])
    assert f"model     {method} around local-dir:" in capsys.readouterr().out
    evaluate.main([f"{out}/last.pt", "--workers", "0"])
    assert f"top-1 {lines(out)[-1]['val_top1']:.2%} " in capsys.readouterr().out
    weights = read_checkpoint(f"{out}/last.pt")["weights"]
    if method == "st_adapter":
        assert {"blocks.0.A_1.up.weight", "blocks.0.A_2.up.weight"} <= set(weights)
    # What starts at zero has moved, but in the last block what no class token reads.
    for name, weight in weights.items():
        starts_at_zero = name.endswith(("up.weight", "conv.weight", "temporal_embedding"))
        if starts_at_zero and not name.startswith("blocks.1."):
            assert weight.abs().max() > 0, name


def test_learning_rate_rises_then_falls_as_half_a_cosine(micro_run, tmp_path):
    out = str(tmp_path / "run")
    options = "--epochs 4 --warmup 2 --lr 0.032 --method linear --batch 8".split()
    train.main(micro_run + ["--out", out, *options])
    # 2 steps an epoch; the rate logged is that of an epoch's second step.
    falling = [0.5 + 0.5 * math.cos(math.pi * part) for part in (1 / 4, 3 / 4)]
    want = [1e-3 * factor for factor in (1 / 2, 1, *falling)]
    assert [line["lr"] for line in lines(out)] == pytest.approx(want)


def test_global_batches_do_not_depend_on_the_number_of_processes():
    whole = train.batches(22, 2, 8, seed=3)
    assert len(whole) == 2 and len({i for batch in whole for _, i in batch}) == 16
    assert {epoch for batch in whole for epoch, _ in batch} == {2}
    parts = [train.batches(22, 2, 8, 3, rank, 4) for rank in range(4)]
    assert [sum(step, []) for step in zip(*parts)] == whole
    later = train.batches(22, 3, 8, seed=3)
    assert [[i for _, i in batch] for batch in later] != [[i for _, i in batch] for batch in whole]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "linear"])
def test_no_weight_decay_on_biases_norms_tokens_and_positions(method):
    model = tiny(method=method)
    decayed, others = train.parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and others["weight_decay"] == 0
    assert len(others["params"]) + len(decayed["params"]) == sum(
        p.requires_grad for p in model.parameters()
    )
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith(("weight", "proj")) for p in decayed["params"])
    undecayed = {names[id(p)] for p in others["params"]}
    assert all(name.endswith(("bias", "embedding")) or "ln_" in name for name in undecayed)
    tokens = {"vpt": {"blocks.0.prompt_embedding"}, "aim": {"temporal_embedding"}}
    assert tokens.get(method, set()) <= undecayed
    if method in ("dualpath", "full"):
        assert {"visual.class_embedding", "visual.positional_embedding"} <= undecayed


# ---------------------------------------------------------------- evaluate.py
def test_scores_are_averaged_over_views(micro, tmp_path):
    model = randomise(tiny())  # in train mode, with dropout
    wide = write_anything(str(tmp_path / "a.mp4"), **x264() | {"size": (64, 96)})
    samples = [*find_videos("folder", micro).val[:5], (wide, 0)]
    test_views = VideoViews(samples, 16, 64, views=(2, 3))
    rows = predict(model, test_views, CPU, batch=3)
    assert [row.index for row in rows] == list(range(6))
    with torch.no_grad():
        scores = model(test_views[5].pixels).softmax(-1)
    assert (scores[0] - scores[-1]).abs().max() > 1e-3
    want = scores.mean(0).topk(5)
    assert rows[5].classes == want.indices.tolist()
    assert rows[5].scores == pytest.approx(want.values.tolist(), rel=1e-4)


def test_accuracy_counts_unreadable_videos_as_wrong():
    rows = [Prediction(i, label, [1, 2], [0.6, 0.4], None) for i, label in enumerate((1, 2, 0))]
    rows.append(Prediction(3, 1, [], [], "broken"))
    assert evaluate.summarise(rows) == {
        "videos": 4,
        "failed": 1,
        "top1": 1 / 4,
        "top5": 2 / 4,
        "mean_class": (0 / 1 + 1 / 2 + 0 / 1) / 3,
    }


# ---------------------------------------------------------------- two processes are as one
TOGETHER = "--dropout 0 --clip-grad 0.001 --batch 8".split()
FIRST_SEVEN = "--limit 7 --workers 0 --device cpu --predictions".split()  # of two processes' shares


def two_trainings(rank, ports, run, one, two, broken):
    """What torchrun starts, three times: a training, an evaluation and a training that fails."""
    as_one_of_two(rank, ports[0])
    exchanged = []  # bytes of gradients, after each forward pass

    def count(state, bucket):
        exchanged[-1] += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)

    class Counting(train.DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, count)

        def forward(self, *args):
            exchanged.append(0)
            return super().forward(*args)

    train.DistributedDataParallel = Counting
    train.main(run + ["--out", two, "--workers", "1", "--micro-batch", "3"])
    tuned = sum(moment.nbytes for moment in first_moments(two))
    # Two steps in each of two epochs, of two micro-batches each, exchange the gradients once.
    assert exchanged == 4 * [0, tuned]
    as_one_of_two(rank, ports[1])  # a port of its own: another's store may not have closed yet
    evaluate.main([f"{one}/last.pt", *FIRST_SEVEN, f"{two}/seven.csv"])
    as_one_of_two(rank, ports[2])
    words = "3 training videos could not be read in epoch 1" if rank == 0 else "1"
    with pytest.raises(SystemExit, match=words):
        train.main(run + ["--root", broken, "--out", f"{two}-broken"])


def first_moments(out):
    """Of the gradients of all trained weights, by AdamW."""
    states = read_checkpoint(f"{out}/last.pt")["training"]["optimizer"]["state"]
    return [state["exp_avg"] for state in states.values()]


def broken_set(root):
    """Neither process has more than 5 % of 40 unreadable videos; both together have."""
    videos = find_videos("folder", micro_set(root, train=40)).train
    shares = [sum(train.batches(40, 0, 8, 0, rank, 2), []) for rank in (0, 1)]
    for _, i in shares[0][6:8] + shares[1][6:7]:
        open(videos[i][0], "w").close()
    return str(root)


def test_two_processes_train_and_evaluate_as_one(micro_run, tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    run, results = micro_run + TOGETHER, []
    train.main(run + ["--out", one])
    two_at_once(two_trainings, run, one, two, broken_set(tmp_path / "data"), ports=3)
    for a, b in zip(lines(one), lines(two), strict=True):
        for name in ("lr", "val_top1", "val_top5"):
            assert a[name] == b[name]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    for a, b in zip(first_moments(one), first_moments(two), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-8)
    norm = torch.nn.utils.get_total_norm(first_moments(one))
    assert 1e-5 < norm <= 0.001 * (1 - 0.9**4) + 1e-7  # of four steps
    with open(f"{two}-broken/failed.txt") as file:
        assert len(file.readlines()) == 3 and lines(f"{two}-broken") == []

    results.append(seven(one, f"{two}/seven.csv"))
    evaluate.main([f"{one}/last.pt", *FIRST_SEVEN, f"{one}/seven.csv"])
    results.append(seven(one, f"{one}/seven.csv"))
    assert results[0] == results[1] and len(results[0][0]) == 7


def seven(out, table):
    """Of the last evaluation: each video's class, and the accuracies."""
    with open(table) as file, open(f"{out}/last.folder-first7-1x1.json") as accuracies:
        rows = [(row["video"], row["class1"]) for row in csv.DictReader(file)]
        return rows, json.load(accuracies)
