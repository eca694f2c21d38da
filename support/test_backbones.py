"""The other image models: Swin, and the plain ViTs of timm that open_clip wraps."""

import copy
import itertools
import json
import os
from functools import partial

import open_clip
import pytest
import safetensors.torch
import torch
from timm.models import VisionTransformer, register_model
from torch.nn import functional as F
from torchvision.models import SwinTransformer, Weights, WeightsEnum
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.transforms._presets import ImageClassification

import evaluate
import grid
import train
from adapters import METHODS, DualPathBlock
from conftest import SMALL, TINY, assert_same_run, lines, random_video, randomise, save, vit_folder
from model import build_model, count, load_checkpoint
from support import backbones
from support.backbones import SWINS, Swin, TimmViT, ViT, load_plain_model, swin_block
from support.prepare import prepare
from support.processes import UserError
from support.runs import read_checkpoint
from tools import cost
from tools.look import attention


# ---------------------------------------------------------------- miniatures
def mini_vit(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **options):
    options.pop("cache_dir", None)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = VisionTransformer(**sizes, **options)
    model.default_cfg = model.pretrained_cfg = {}
    return model


@register_model
def mini_siglip(**options):
    """As SigLIP's: no class token, attention pooling; open_clip finds it by its name."""
    return mini_vit(**{"class_token": False, "global_pool": "map"} | options)


@register_model
def mini_clip(**options):
    """Class token, a norm before the blocks, layer scale."""
    return mini_vit(pre_norm=True, init_values=0.3, no_embed_class=True, **options)


def mini_swin():
    """Three stages of 16 x 16, 8 x 8 and 4 x 4 tokens at 64 px, windows of 4 x 4."""
    return SwinTransformer([4, 4], 24, [2, 2, 1], [2, 4, 8], [4, 4], num_classes=5)


class MiniWeights(WeightsEnum):
    IMAGENET1K_V1 = Weights(
        url="https://nowhere.invalid/mini-00000000.pth",
        transforms=partial(ImageClassification, crop_size=64),
        meta={},
    )


TIMM = {  # what open_clip's configuration of a miniature says
    "siglip": {"timm_model_name": "mini_siglip", "timm_pool": "map", "timm_proj": "none"},
    "mean": {"timm_model_name": "mini_siglip", "timm_pool": "avg", "timm_proj": "linear"},
    "mean of mlp": {"timm_model_name": "mini_siglip", "timm_pool": "avg", "timm_proj": "mlp"},
    "class token": {"timm_model_name": "mini_clip", "timm_pool": "token", "timm_proj": None},
    "patches": {"timm_model_name": "mini_clip", "timm_pool": "avg", "timm_proj": "none"},
    "attention": {"timm_model_name": "mini_clip", "timm_pool": "map", "timm_proj": "none"},
    "native": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
}
KINDS = ["swin", *TIMM]
WITHOUT_CLASS_TOKEN = ["swin", "siglip"]  # one of each kind


@pytest.fixture(autouse=True)
def miniatures(monkeypatch):
    monkeypatch.setitem(SWINS, "swin_mini", (mini_swin, MiniWeights.IMAGENET1K_V1))


@pytest.fixture
def backbone(tmp_path):
    """The name of a miniature's backbone, by its kind."""

    def name(kind):
        if kind == "swin":
            return "swin_mini"
        size = 160 if kind == "native" else 64
        return vit_folder(tmp_path / kind.replace(" ", "_"), image_size=size, **TIMM[kind])

    return name


@pytest.fixture
def options(backbone):
    """build_model's, for a miniature with random weights."""

    def options_of(kind, **more):
        bottleneck = {"bottleneck": 8}
        return TINY | bottleneck | {"backbone": backbone(kind), "pretrained": None} | more

    return options_of


@pytest.fixture
def plain(backbone, monkeypatch):
    """A library's own module, with weights of which none is zero or one; models get its copies."""

    def load(kind):
        module = randomise(load_plain_model(backbone(kind), None)).eval()

        def copied(*args):
            return copy.deepcopy(module)

        monkeypatch.setattr(backbones, "load_plain_model", copied)
        return module

    return load


def normalised(images, visual):
    mean = torch.tensor(visual.image_mean).view(3, 1, 1)
    std = torch.tensor(visual.image_std).view(3, 1, 1)
    return (images / 255 - mean) / std


# ---------------------------------------------------------------- the two paths
@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"image_size": 210}, r"4 x 4, patches of 14\) is 210, .* is 196 or 224"),
        ({"image_size": 378}, "is 364 or 392"),
        ({"spatial_frames": 10, "num_frames": 50}, r"framesets of 16, T_s = 10\) is 50, .* is 80"),
        ({"spatial_frames": 10, "num_frames": 96}, "is 80 or 160"),
    ],
    ids=str,
)
def test_a_size_that_is_refused_comes_with_one_that_suits_both_paths(sizes, words):
    refused = next(reversed(sizes))
    with torch.device("meta"):
        options = {"backbone": "ViT-L-14-quickgelu", "pretrained": None} | sizes
        with pytest.raises(UserError, match=words) as error:
            build_model(**options)
        build_model(**options | {refused: int(str(error.value).split()[-1])})


@pytest.mark.parametrize("method", ["dualpath", "linear", "full", "adaptformer"])
@pytest.mark.parametrize("kind", KINDS)
def test_spatial_feature_starts_as_the_librarys_own(kind, method, plain, options):
    module = plain(kind)
    model = build_model(**options(kind, method=method))  # in train mode, with dropout
    video = random_video(2, 16, model.visual.image_size[0])
    with torch.no_grad():
        y_sp = model.features(video)[0]
        frames = video[:, [0, 4, 8, 12]].flatten(0, 1)
        want = module(normalised(frames, module)).view(2, 4, -1).mean(1)
    assert y_sp.shape == want.shape == (2, model.visual.output_dim)
    assert ((y_sp - want).norm() / want.norm()).item() <= 1e-5


def test_each_kind_has_its_class(backbone):
    classes = {"tiny": ViT, "swin_mini": Swin, backbone("siglip"): TimmViT}
    for name, kind in classes.items():
        assert type(backbones.load_image_model(name, None)) is kind


def naive_merging(merging, tokens):
    """Each 2 x 2 tokens → one: theirs are joined as (0, 0), (1, 0), (0, 1), (1, 1)."""
    side = int(tokens.shape[1] ** 0.5)
    merged = []
    for r, c in itertools.product(range(0, side, 2), range(0, side, 2)):
        four = [tokens[:, (r + i) * side + c + j] for j in (0, 1) for i in (0, 1)]
        merged.append(torch.cat(four, -1))
    return merging.reduction(merging.norm(torch.stack(merged, 1)))


@pytest.mark.parametrize("kind", WITHOUT_CLASS_TOKEN)
def test_temporal_path_starts_with_the_framesets_tokens_and_positions(kind, plain, options):
    """Its blocks are the identity: only what lies around and between them changes anything."""
    module = plain(kind)
    model = build_model(**options(kind, position_scale=0.3))
    video = random_video()
    images = normalised(grid.frameset(video.float())[:, 0], module)
    if kind == "swin":
        conv, _, norm = module.features[0]
        z = norm(F.conv2d(images, conv.weight, conv.bias, stride=4).flatten(2).transpose(1, 2))
        z = z + 0.3 * grid.position_code(1, 64, 64, 4, 24)[0]
        z = naive_merging(module.features[4], naive_merging(module.features[2], z))
        want = module.norm(z).mean(1)
    else:
        conv = module.trunk.patch_embed.proj
        z = F.conv2d(images, conv.weight, conv.bias, stride=8).flatten(2).transpose(1, 2)
        z = module.trunk.norm(z + 0.3 * grid.position_code(1, 64, 64, 8, 48)[0])
        want = module.trunk.attn_pool(z)
    torch.testing.assert_close(model.features(video)[1], want, rtol=1e-4, atol=1e-5)
    assert model.temporal_class_embedding is None
    assert not any("temporal" in name for name in model.state_dict())


def naive_window_MHA(attn, tokens, window, shift):
    """Attention from its definition: who may see whom is decided for each pair of tokens."""
    heads, L = attn.num_heads, tokens.shape[1]
    side = int(L**0.5)
    bias = torch.full((heads, L, L), -torch.inf, dtype=tokens.dtype)
    for i, j in itertools.product(range(L), range(L)):
        steps, same_window = [], True
        for a, b in zip(divmod(i, side), divmod(j, side)):
            place_a, place_b = (a - shift) % side, (b - shift) % side
            same_window &= place_a // window == place_b // window
            same_window &= (a < shift) == (b < shift)  # not from opposite sides of the image
            steps.append(place_a - place_b + window - 1)
        if same_window:
            row = steps[0] * (2 * window - 1) + steps[1]
            bias[:, i, j] = attn.relative_position_bias_table[row]
    q, k, v = (tokens @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, -1)
    split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    q, k, v = split  # (images, heads, L, d / heads)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    h = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return h @ attn.proj.weight.T + attn.proj.bias


def naive_swin_MLP(mlp, x):
    hidden = x @ mlp[0].weight.T + mlp[0].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ mlp[3].weight.T + mlp[3].bias


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("pre, skip", [(False, False), (True, False), (False, True)])
def test_swin_block_is_the_papers_equations_with_shifted_windows(shift, pre, skip):
    theirs = SwinTransformerBlock(24, 2, [4, 4], [shift, shift], stochastic_depth_prob=0.5)
    theirs = randomise(theirs).double().requires_grad_(False)
    A = DualPathBlock(24, 8, pre_attention_adapter=pre, serial_skip=skip)
    randomise(A).double().eval()
    x, z = (torch.randn(n, 64, 24, dtype=torch.float64) for n in (3, 2))
    got_x, got_z = A(swin_block(theirs, rows=8), x, z)

    def MHA(tokens):
        return naive_window_MHA(theirs.attn, tokens, 4, shift)

    u = theirs.norm1(x)
    x = x + MHA(u) + A.A_s1(u)
    u = theirs.norm2(x)
    x = x + naive_swin_MLP(theirs.mlp, u) + A.A_s2(u)
    v = theirs.norm1(z)
    h = MHA(A.A_t0(v) if pre else v)
    z = z + A.A_t1(h) + (h if skip else 0)
    h = naive_swin_MLP(theirs.mlp, theirs.norm2(z))
    z = z + A.A_t2(h) + (h if skip else 0)
    torch.testing.assert_close(got_x, x)
    torch.testing.assert_close(got_z, z)


def test_unshifted_windows_lie_within_one_moment(options):
    """As at 224 px in stages 1 and 2 of swin_b: here a little frame is a window of stage 1."""
    model = randomise(build_model(**options("swin", serial_skip=True))).eval()
    video = random_video(1)
    changed = video.clone()
    changed[:, 5] = 255 - changed[:, 5]  # in row 1 and column 1 of the frameset
    moments = []
    with torch.no_grad():
        before, after = (model.embed(v) for v in (video, changed))
        for block, adapted in zip(model.visual.blocks[:2], model.blocks):
            before, after = adapted(block, *before), adapted(block, *after)
            # Each little frame has 4 x 4 tokens.
            moved = (before[1] - after[1]).abs().amax(-1).view(4, 4, 4, 4).amax((1, 3)) > 1e-6
            moments.append(moved.flatten().nonzero().flatten().tolist())
    assert moments[0] == [5]
    assert 5 in moments[1] and len(moments[1]) > 1


EVERY_MODEL = [
    {"pre_attention_adapter": True},
    {"serial_skip": True},
    {"paths": "spatial"},
    {"paths": "temporal"},
    {"method": "linear"},
    {"method": "full"},
    {"method": "adaptformer"},
]


@pytest.mark.parametrize("more", EVERY_MODEL, ids=str)
@pytest.mark.parametrize("kind", [*WITHOUT_CLASS_TOKEN, "class token"])
def test_gradients_reach_what_is_trained_and_nothing_else(kind, more, options):
    model = randomise(build_model(**options(kind, **more)))
    F.cross_entropy(model(random_video(4)), torch.arange(4)).backward()
    for name, p in model.named_parameters():
        reached = p.grad is not None and p.grad.abs().max() > 0
        assert reached == p.requires_grad, name
    trained = {name for name, p in model.visual.named_parameters() if p.requires_grad}
    tokens = {"class_embedding", "positional_embedding"} & set(
        dict(model.visual.named_parameters())
    )
    if "method" not in more:
        assert trained == (set() if more.get("paths") == "temporal" else tokens)
        has_own_token = kind == "class token" and more.get("paths") != "spatial"
        assert ("temporal_class_embedding" in dict(model.named_parameters())) == has_own_token
    else:
        assert bool(trained) == (more["method"] == "full")


@pytest.mark.parametrize("method", ["dualpath", "linear", "adaptformer"])
@pytest.mark.parametrize("kind", WITHOUT_CLASS_TOKEN)
def test_shuffled_frames_change_what_knows_time_and_nothing_else(kind, method, options):
    frames = 16 if method == "dualpath" else 4  # the others see all frames
    model = randomise(build_model(**options(kind, method=method, num_frames=frames))).eval()
    video = random_video(2, frames)
    order = torch.arange(frames).roll(1).view(2, -1).T.flatten()
    with torch.no_grad():
        want, got = model(video), model(video[:, order])
    difference = ((got - want).norm() / want.norm()).item()
    assert difference > 1e-3 if method == "dualpath" else difference <= 1e-5


@pytest.mark.parametrize("kind", WITHOUT_CLASS_TOKEN)
def test_paths_and_clips_do_not_leak_into_each_other(kind, options):
    model = randomise(build_model(**options(kind))).eval()
    video = random_video(3)
    changed = video.clone()
    changed[1, 1::4] = 255 - changed[1, 1::4]  # frames that the spatial path of clip 1 never sees
    with torch.no_grad():
        (y_sp, y_tp), (new_sp, new_tp) = model.features(video), model.features(changed)
    torch.testing.assert_close(new_sp, y_sp)
    torch.testing.assert_close(new_tp[[0, 2]], y_tp[[0, 2]])
    assert not torch.allclose(new_tp[1], y_tp[1], atol=1e-4)


# ---------------------------------------------------------------- what it costs
@pytest.mark.parametrize(
    "name, tuned, gmacs",
    [("swin_b", 16.53, (150.0, 166.6, 183.3)), ("ViT-B-16-SigLIP2", 11.12, (167.7, 186.3, 205.0))],
)
def test_weights_and_costs(name, tuned, gmacs):
    for frames, want in zip((16, 32, 48), gmacs):
        with torch.device("meta"):
            cost = count(build_model(backbone=name, pretrained=None, num_frames=frames))
        assert cost["tuned M"] == pytest.approx(tuned, abs=0.005)
        assert cost["GMACs/view"] == pytest.approx(want, abs=0.05)


def test_bottlenecks_are_a_quarter_of_each_stage_of_swin_or_what_is_given(options):
    def widths(**more):
        blocks = build_model(**options("swin", **more)).blocks
        return [block.A_s1.down.out_features for block in blocks if hasattr(block, "A_s1")]

    assert widths(bottleneck=None) == [6, 6, 12, 12, 24] and widths(bottleneck=7) == 5 * [7]


@pytest.mark.parametrize("kind", WITHOUT_CLASS_TOKEN)
def test_the_benchmark_measures_next_to_the_librarys_own(kind, backbone, tmp_path, capsys):
    path = str(tmp_path / "a.json")
    cost.main(["--backbone", backbone(kind), "--frames", "16", "--rounds", "1", "--json", path])
    assert "has no class token, which these need: vpt, protuning, st_adapter, aim" in (
        capsys.readouterr().out
    )
    with open(path) as file:
        methods = [row["method"] for row in json.load(file)["rows"]]
    assert methods == ["dualpath", "dualpath+A_t0", "linear", "full", "adaptformer"]


# ---------------------------------------------------------------- what is refused
NEED_A_CLASS_TOKEN = ["vpt", "protuning", "st_adapter", "aim"]


def test_the_methods_that_need_a_class_token_say_so():
    assert NEED_A_CLASS_TOKEN == [name for name in METHODS if METHODS[name].needs_class_token]


@pytest.mark.parametrize("method", NEED_A_CLASS_TOKEN)
@pytest.mark.parametrize("kind", WITHOUT_CLASS_TOKEN)
def test_methods_that_need_a_class_token_are_refused_before_a_download(kind, method, options):
    words = f"{method} needs a class token, and .* has none.* ViT-B-16-quickgelu"
    with pytest.raises(UserError, match=words):
        build_model(**options(kind, method=method, pretrained="imagenet1k"))


@pytest.mark.parametrize("method", NEED_A_CLASS_TOKEN)
def test_methods_that_need_a_class_token_take_timms_vits_that_have_one(method, options):
    model = randomise(build_model(**options("class token", method=method)))
    F.cross_entropy(model(random_video(4)), torch.arange(4)).backward()
    trained = [p.grad is not None for p in model.parameters() if p.requires_grad]
    assert trained and all(trained)


@pytest.mark.parametrize(
    "name",
    [
        "EVA02-B-16",
        "PE-Core-B-16",
        "ViTamin-S",
        "vit_relpos_medium_patch16_cls_224",
        "MobileCLIP-B",
    ],
)
def test_what_is_no_plain_vit_is_refused_before_a_download(name, monkeypatch):
    original = open_clip.create_model

    def without_weights(*args, load_weights=True, **options):
        assert not load_weights, "this must be refused before anything is downloaded"
        return original(*args, load_weights=load_weights, **options)

    monkeypatch.setattr(open_clip, "create_model", without_weights)
    with pytest.raises(UserError, match=f"{name}.* is not supported.*rotary.*swin_b"):
        build_model(backbone=name, pretrained="laion2b_s8b_b131k")


@pytest.mark.parametrize("name", ["test_vit2", "test_vit3", "test_vit4"])
def test_registers_are_refused(name, tmp_path):
    folder = vit_folder(tmp_path, timm_model_name=name, timm_pool="", timm_proj="linear")
    with pytest.raises(UserError, match="other tokens"):
        build_model(backbone=folder, pretrained=None)


@pytest.mark.parametrize(
    "name, size, words",
    [
        ("swin_b", 256, "256.*7 x 7.*224 or 448"),
        ("swin_t", 112, "112.*works is 224$"),
        ("swin_mini", 72, "72.*4 x 4.*64 or 128"),
    ],
)
def test_sizes_that_windows_do_not_tile_are_refused(name, size, words):
    with torch.device("meta"), pytest.raises(UserError, match=words):
        build_model(backbone=name, pretrained=None, image_size=size)


@pytest.mark.parametrize(
    "name, tag, words",
    [
        ("swin_b", "openai", "'openai' is neither a file nor weights .* swin_b; it has imagenet1k"),
        ("swin_x", "imagenet1k", "no model 'swin_x'; near: swin_"),
        ("ViT-B-16-SigLIP2", "openai", "'openai' is neither a file.*it has webli"),
    ],
)
def test_weights_that_there_are_not_are_refused(name, tag, words):
    with pytest.raises(UserError, match=words):
        build_model(backbone=name, pretrained=tag)


@pytest.mark.parametrize("kind", WITHOUT_CLASS_TOKEN)
def test_a_picture_of_attention_is_refused(kind, options):
    model = build_model(**options(kind))
    with pytest.raises(UserError, match="cannot return its weights: no picture"):
        attention(model, random_video(1))


# ---------------------------------------------------------------- weights
def test_normalisation_is_that_of_the_models_own_weights():
    with torch.device("meta"):
        siglip = backbones.load_image_model("ViT-B-16-SigLIP2", None)
        swin = backbones.load_image_model("swin_b", None)
    assert tuple(siglip.image_mean) == tuple(siglip.image_std) == (0.5, 0.5, 0.5)
    assert tuple(swin.image_mean) == (0.485, 0.456, 0.406)
    assert tuple(swin.image_std) == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("kind", ["swin.pth", "swin.safetensors", "headless.pth"])
def test_swins_weights_come_from_local_files(kind, tmp_path, options):
    theirs, path = randomise(mini_swin()).eval(), str(tmp_path / kind)
    state = theirs.state_dict()
    if kind.startswith("headless"):
        state = {name: weight for name, weight in state.items() if not name.startswith("head.")}
    if kind.endswith("safetensors"):
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    model = build_model(**options("swin", pretrained=path))
    theirs.head = torch.nn.Identity()
    video = random_video(1)
    with torch.no_grad():
        want = theirs(normalised(video[0, ::4], model.visual)).mean(0)
        got = model.features(video)[0][0]
    assert (got - want).norm() / want.norm() <= 1e-5
    again = build_model(**options("swin", pretrained=path))
    other = build_model(**options("swin", pretrained=None))
    assert again.fingerprint == model.fingerprint != other.fingerprint
    large = build_model(**options("swin", pretrained=path, image_size=128))
    assert large(random_video(1, 16, 128)).shape == (1, 8)


def test_swins_own_weights_are_downloaded(tmp_path, monkeypatch, options):
    def get_state_dict(self, **options):
        return state

    monkeypatch.setattr(MiniWeights, "get_state_dict", get_state_dict)
    state = randomise(mini_swin()).state_dict()
    visual = build_model(**options("swin", pretrained="imagenet1k")).visual
    assert torch.equal(visual.ln_post.weight, state["norm.weight"])


def test_without_a_network_the_sentence_says_what_to_do(monkeypatch, options):
    def no_network(self, **options):
        raise OSError("Name or service not known\nand forty more lines")

    monkeypatch.setattr(MiniWeights, "get_state_dict", no_network)
    words = r"download https://nowhere.invalid/mini-00000000.pth elsewhere.*--pretrained PATH"
    with pytest.raises(UserError, match=words) as error:
        build_model(**options("swin", pretrained="imagenet1k"))
    assert "forty" not in str(error.value)


def test_a_file_that_does_not_fit_is_refused(tmp_path, options):
    state = mini_swin().state_dict()
    del state["features.1.0.attn.qkv.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="does not fit swin_mini: features.1.0.attn.qkv.weight is"):
        build_model(**options("swin", pretrained=str(tmp_path / "a.pth")))


@pytest.fixture
def builtin(tmp_path):
    """The small SigLIP by a name that open_clip knows, so that --pretrained PATH can be tried."""
    config = {"embed_dim": 48, "vision_cfg": {"image_size": 64} | TIMM["siglip"]}
    with open(tmp_path / "small-siglip.json", "w") as file:
        json.dump(config | {"text_cfg": backbones.NO_TEXT}, file)
    open_clip.add_model_config(tmp_path / "small-siglip.json")
    return "small-siglip"


@pytest.mark.parametrize("size", [None, 96])
def test_siglips_weights_come_from_local_files(size, builtin, tmp_path):
    theirs, path = randomise(open_clip.create_model(builtin)).eval(), str(tmp_path / "clip.pt")
    torch.save(theirs.state_dict(), path)
    model = build_model(**TINY | {"backbone": builtin, "pretrained": path, "image_size": size})
    side = size or 64
    assert model.visual.image_size == (side, side)
    assert model.visual.positional_embedding.shape == ((side // 8) ** 2, 48)
    theirs.visual.set_input_size(side)
    video = random_video(1, 16, side)
    with torch.no_grad():
        want = theirs.visual(normalised(video[0, ::4], model.visual)).mean(0)
        got = model.features(video)[0][0]
    assert (got - want).norm() / want.norm() <= 1e-5


# ---------------------------------------------------------------- long work
def loss_and_gradients(model, video, dtype=None):
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = F.cross_entropy(model(video).float(), torch.arange(len(video)))
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("kind", [*WITHOUT_CLASS_TOKEN, "class token"])
def test_checkpointed_activations_change_nothing(kind, options):
    model, video = randomise(build_model(**options(kind))), random_video()
    want = loss_and_gradients(model, video)
    got = loss_and_gradients(prepare(model, checkpoint_activations=True), video)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])  # dropout, too


@pytest.mark.parametrize("kind", [*WITHOUT_CLASS_TOKEN, "class token"])
def test_mixed_precision_keeps_frozen_weights_and_tokens_in_the_small_type(kind, options):
    model, video = build_model(**options(kind, dropout=0.0)), random_video()
    randomise(model.blocks)
    want = loss_and_gradients(model, video)
    prepare(model, torch.bfloat16)
    got = loss_and_gradients(model, video, torch.bfloat16)
    assert abs(got[0] - want[0]) <= 0.03 * want[0]
    assert F.cosine_similarity(got[1], want[1], dim=0) >= 0.98
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, outputs: seen.extend(outputs))
    with torch.autocast("cpu", torch.bfloat16):
        model(video)
    assert {x.dtype for x in seen[0::2]} == {torch.bfloat16}
    assert {z.dtype for z in seen[1::2]} == {torch.float32}  # the temporal path's


@pytest.mark.parametrize("kind", WITHOUT_CLASS_TOKEN)
def test_compiled_blocks_compute_the_same(kind, options, monkeypatch):
    model, video = randomise(build_model(**options(kind, dropout=0.0))), random_video(4)
    want = loss_and_gradients(model, video)
    original = torch.compile

    def compile_without_a_compiler(function):
        return original(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_without_a_compiler)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    prepare(model, compile=True)
    for batch in (4, 3):  # the second makes the batch dynamic
        loss_and_gradients(model, video[:batch])
    assert counters["frames"]["ok"] >= 2 and not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        got = loss_and_gradients(model, video)
        loss_and_gradients(model, video[:2])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("more", [{}, {"paths": "temporal"}, {"method": "linear"}], ids=str)
@pytest.mark.parametrize("kind", WITHOUT_CLASS_TOKEN)
def test_a_model_is_exported_with_any_batch(kind, more, options):
    model = randomise(build_model(**options(kind, **more))).eval()
    any_batch = {"video": {0: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(model, (random_video(3),), dynamic_shapes=any_batch)
        exported = program.module()
        for batch in (1, 3):
            video = random_video(batch)
            torch.testing.assert_close(exported(video), model(video), rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_spares_swins_biases_and_siglips_query(options):
    for kind in WITHOUT_CLASS_TOKEN:
        model = build_model(**options(kind, method="full"))
        decayed, spared = train.parameter_groups(model, 0.05)
        names = {id(p): name for name, p in model.named_parameters()}
        assert all(names[id(p)].endswith("weight") for p in decayed["params"])
        tables = {"swin": "relative_position_bias_table", "siglip": "attn_pool.latent"}
        assert any(names[id(p)].endswith(tables[kind]) for p in spared["params"])


# ---------------------------------------------------------------- runs
@pytest.mark.parametrize("kind", [*WITHOUT_CLASS_TOKEN, "class token"])
def test_a_miniature_trains_is_evaluated_and_resumes(kind, backbone, micro, tmp_path, monkeypatch):
    small = ["--backbone", backbone(kind), "--pretrained", "none", "--root", micro]
    one, parts = str(tmp_path / "one"), str(tmp_path / "parts")
    train.main(SMALL + small + ["--out", one])
    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "end_epoch", stop_after_an_epoch(train.Run.end_epoch))
        with pytest.raises(KeyboardInterrupt):
            train.main(SMALL + small + ["--out", parts])
    assert len(lines(parts)) == 1
    train.main(SMALL + small + ["--out", parts, "--resume"])
    assert_same_run(one, parts)
    assert evaluate.main([f"{one}/last.pt", "--workers", "0"]) == 0
    with open(f"{one}/last.folder.json") as file:
        assert json.load(file)["top1"] == lines(one)[-1]["val_top1"]
    content = read_checkpoint(f"{one}/last.pt")
    moved = [w.abs().max() > 0 for k, w in content["weights"].items() if k.endswith("up.weight")]
    assert moved and all(moved)


def stop_after_an_epoch(original):
    def end_epoch(run, *args):
        original(run, *args)
        raise KeyboardInterrupt

    return end_epoch


@pytest.mark.parametrize("kind", WITHOUT_CLASS_TOKEN)
def test_a_checkpoint_wants_the_frozen_weights_that_it_was_made_with(
    kind, plain, options, tmp_path
):
    plain(kind)
    model = randomise(build_model(**options(kind, pretrained="here"))).eval()
    path = save(model, tmp_path / "a.pt")
    assert not any(".qkv." in name for name in read_checkpoint(path)["weights"])
    again = load_checkpoint(path)[0]
    video = random_video(1)
    with torch.no_grad():
        torch.testing.assert_close(again(video), model(video))
    plain(kind)  # other random weights
    with pytest.raises(UserError, match="other frozen weights"):
        load_checkpoint(path)
    assert os.path.getsize(path) < 1 << 20


@pytest.mark.parametrize("pretrained", [None, "here"])
@pytest.mark.parametrize("kind", [*WITHOUT_CLASS_TOKEN, "class token"])
def test_a_fully_tuned_checkpoint_holds_every_weight(kind, pretrained, plain, options, tmp_path):
    if pretrained:
        plain(kind)
    model = randomise(build_model(**options(kind, method="full", pretrained=pretrained))).eval()
    again = load_checkpoint(save(model, tmp_path / "a.pt"))[0]
    video = random_video(1)
    with torch.no_grad():
        assert torch.equal(again(video), model(video))
