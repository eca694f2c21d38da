"""Image models: open_clip's ViTs, SigLIP, Swin; their weights, and what is refused."""

import copy
import json
from functools import partial

import open_clip
import pytest
import torch
from timm.models import VisionTransformer, register_model
from torch.nn import functional as F
from torchvision.models import SwinTransformer, Weights, WeightsEnum
from torchvision.transforms._presets import ImageClassification

import adapters
import evaluate
import grid
import train
from adapters import METHODS
from conftest import (
    SMALL,
    TINY,
    lines,
    random_video,
    randomise,
    save,
    tiny,
    vit_folder,
)
from model import Config, ViT, build_model, load_checkpoint, options_of, prepare
from support.backbones import NO_TEXT, SWINS, SigLIP, Swin, load_plain_model
from support.processes import UserError
from support.runs import count_parameters, read_checkpoint


# ---------------------------------------------------------------- miniatures
def mini_vit(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **options):
    options.pop("cache_dir", None)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = VisionTransformer(**sizes | options)
    model.default_cfg = model.pretrained_cfg = {}
    return model


@register_model
def mini_siglip(**options):
    """As SigLIP's: no class token, attention pooling; open_clip finds it by its name."""
    return mini_vit(**{"class_token": False, "global_pool": "map"} | options)


def mini_swin():
    """Three stages of 16 x 16, 8 x 8 and 4 x 4 tokens at 64 px, windows of 4 x 4."""
    return SwinTransformer([4, 4], 24, [2, 1, 1], [2, 4, 8], [4, 4], num_classes=5)


class MiniWeights(WeightsEnum):
    IMAGENET1K_V1 = Weights(
        url="https://nowhere.invalid/mini-00000000.pth",
        transforms=partial(ImageClassification, crop_size=64),
        meta={},
    )


# What open_clip's configuration of a miniature says.
SIGLIP = {"timm_model_name": "mini_siglip", "timm_pool": "map", "timm_proj": "none"}
SWINS["swin_mini"] = (mini_swin, MiniWeights.IMAGENET1K_V1)


@pytest.fixture
def backbone(tmp_path):
    """The name of a miniature's backbone, by its kind."""

    def name(kind):
        if kind == "swin":
            return "swin_mini"
        vision = {"image_size": 64} | (SIGLIP if kind == "siglip" else {})
        return vit_folder(tmp_path / kind, quick_gelu=kind == "vit", **vision)

    return name


@pytest.fixture
def mini(backbone):
    """A model around a miniature with weights of which none is zero or one, and its own module."""

    def build(kind, **options):
        config = TINY | {"bottleneck": 8, "pretrained": None, "backbone": backbone(kind)} | options
        plain = randomise(load_plain_model(config["backbone"], None)).eval()
        own = options_of(config.get("method", "dualpath"))
        config = Config(**{name: value for name, value in config.items() if name in own})
        return build_model(config, copy.deepcopy(plain)), plain

    return build


def normalised(images, plain):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (plain.image_mean, plain.image_std))
    return (images / 255 - mean) / std


def plain_features(plain, video):
    """The mean over frames 0, 4, 8, 12 of what a library's own module makes of them."""
    frames = normalised(video[:, ::4].flatten(0, 1), plain)
    return plain(frames).unflatten(0, (len(video), 4)).mean(1)


def assert_close(got, want):
    assert got.shape == want.shape
    assert ((got - want).norm() / want.norm()).item() <= 1e-5


# ---------------------------------------------------------------- behind one interface
@pytest.mark.parametrize(
    "kind, method",
    [("vit", "dualpath"), ("swin", "dualpath"), ("siglip", "dualpath"), ("swin", "adaptformer")],
)
def test_spatial_feature_starts_as_the_librarys_own(kind, method, mini):
    model, plain = mini(kind, method=method)  # in train mode, with dropout
    assert type(model.visual) is {"vit": ViT, "swin": Swin, "siglip": SigLIP}[kind]
    video = random_video(2, 16, model.visual.image_size[0])
    assert_close(model.features(video)[0], plain_features(plain, video))


@pytest.mark.parametrize("kind", ["swin", "siglip"])
def test_temporal_path_starts_with_the_framesets_tokens_and_positions(kind, mini):
    """Its blocks are the identity: only what lies around and between them changes anything."""
    model, plain = mini(kind, position_scale=0.3, frames=32)  # two framesets
    video = random_video(frames=32)
    images = normalised(grid.frameset(video.float()).flatten(0, 1), plain)
    if kind == "swin":
        conv, _, norm = plain.features[0]
        z = norm(F.conv2d(images, conv.weight, conv.bias, stride=4).flatten(2).transpose(1, 2))
        z = z + 0.3 * grid.position_code(2, 64, 64, 4, 24).repeat(2, 1, 1)
        merged = plain.features[4](plain.features[2](z.unflatten(1, (16, 16))))
        want = plain.norm(merged).mean((1, 2))
    else:
        conv = plain.trunk.patch_embed.proj
        z = F.conv2d(images, conv.weight, conv.bias, stride=8).flatten(2).transpose(1, 2)
        z = plain.trunk.norm(z + 0.3 * grid.position_code(2, 64, 64, 8, 48).repeat(2, 1, 1))
        want = plain.trunk.attn_pool(z)
    want = want.unflatten(0, (2, 2)).mean(1)
    torch.testing.assert_close(model.features(video)[1], want, rtol=1e-4, atol=1e-5)
    assert not any("temporal" in name for name in model.state_dict())


def test_positions_of_the_spatial_path_are_trained(mini):
    for kind, want in (("siglip", ["positional_embedding"]), ("swin", [])):
        visual = mini(kind)[0].visual
        assert [name for name, p in visual.named_parameters() if p.requires_grad] == want


class Partial(adapters.FrameBlock):
    """Trains part of the image model's own weights, through the frozen parts of adapters.py."""

    part = None

    @staticmethod
    def trains(name):
        return Partial.part in name or (Partial.part == "norm" and "ln_" in name)

    def forward(self, block, x):
        x = x + adapters.MHA(block, adapters.LN(block.ln_1, x))
        return x + adapters.MLP(block, adapters.LN(block.ln_2, x))


@pytest.mark.parametrize("part", ["bias", "norm", "blocks.1."])
@pytest.mark.parametrize("kind", ["vit", "swin", "siglip"])
def test_any_part_of_an_image_model_can_be_trained(kind, part, backbone, monkeypatch):
    monkeypatch.setitem(METHODS, "partial", Partial)
    monkeypatch.setattr(Partial, "part", part)
    name = backbone(kind)
    plain = randomise(load_plain_model(name, None)).eval()
    config = Config(method="partial", backbone=name, frames=16, spatial_frames=4)
    model = prepare(build_model(config, plain))  # whose parameters are the plain module's
    video, label = random_video(2, 16, model.visual.image_size[0]), torch.tensor([3, 1])
    trained = [p for p in model.visual.parameters() if p.requires_grad]
    assert 0 < len(trained) < len(list(model.visual.parameters()))
    got = torch.autograd.grad(F.cross_entropy(model(video), label), trained)
    loss = F.cross_entropy(model.head(plain_features(plain, video)), label)
    for mine, theirs in zip(got, torch.autograd.grad(loss, trained)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name, tuned", [("swin_b", 16.53), ("ViT-B-16-SigLIP2", 11.12)])
def test_tuned_parameters_of_other_image_models(name, tuned):
    with torch.device("meta"):  # of Swin, bottlenecks are a quarter of each stage
        model = build_model(Config(backbone=name, pretrained=None))
    assert round(count_parameters(model)[0] / 1e6, 2) == tuned


def test_no_weight_decay_for_position_tables_and_queries(mini):
    for kind, query in (("swin", "relative_position_bias_table"), ("siglip", "attn_pool.latent")):
        model = mini(kind, method="full")[0]
        decay, no_decay = train.parameter_groups(model, 0.05)
        names = {id(p): name for name, p in model.named_parameters()}
        assert all(names[id(p)].endswith("weight") for p in decay["params"])
        assert any(names[id(p)].endswith(query) for p in no_decay["params"])


# ---------------------------------------------------------------- what is refused
@pytest.fixture
def offline(monkeypatch):
    original = open_clip.create_model

    def without_weights(*args, load_weights=True, **options):
        if load_weights:
            raise OSError("Name or service not known\nand forty more lines")
        return original(*args, load_weights=False, **options)

    monkeypatch.setattr(open_clip, "create_model", without_weights)
    monkeypatch.setattr(MiniWeights, "get_state_dict", without_weights)


@pytest.mark.parametrize(
    "backbone, tag, words",
    [
        ("ViT-B-16", "openai", "want QuickGELU, not GELU: take --backbone ViT-B-16-quickgelu$"),
        ("ViT-B-16", "nonsense", "'nonsense' is neither a file.*openai"),
        ("ViT-B-16-SigLIP2", "openai", "'openai' is neither a file .*which has webli"),
        ("swin_b", "openai", "'openai' is neither a file nor weights of swin_b: imagenet1k is"),
        ("swin_x", "imagenet1k", "no model 'swin_x'; there are tiny, swin_t.*list_models"),
        ("local-dir:/no/where", "openai", "/no/where"),
        ("RN50", "openai", "RN50.* is not supported.*convolutional.*swin_b"),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "not supported"),
        ("ViT-H-14-CLIPA", "datacomp1b", "not supported.*pools in a way of its own"),
        ("EVA02-B-16", "merged2b_s8b_b131k", "not supported.*rotary"),
        ("MobileCLIP-B", "datacompdr", "not supported"),
        ("vit_medium_patch16_gap_256", "none", "not supported"),
        # what is downloaded
        ("ViT-B-16-quickgelu", "openai", "without a network, .*--pretrained FILE.*: Name or"),
        ("swin_mini", "imagenet1k", "without a network, .*--pretrained FILE.*: Name or"),
    ],
)
def test_refused_before_a_download_or_told_what_to_do(backbone, tag, words, offline):
    with pytest.raises(UserError, match=words):  # within the first line, which a script prints
        build_model(Config(backbone=backbone, pretrained=tag))


def test_a_module_that_is_not_supported_is_refused(tmp_path):
    folder = vit_folder(tmp_path, timm_model_name="test_vit2", timm_pool="", timm_proj="linear")
    with pytest.raises(UserError, match="other tokens"):  # registers
        build_model(Config(backbone=folder, pretrained=None))
    resnet = open_clip.create_model("RN50", device="meta", load_weights=False).visual
    with pytest.raises(UserError, match="ModifiedResNet.*not supported"):
        build_model(Config(), resnet)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"size": 210}, r"4 x 4, patches of 14\) is 210, .* is 196 or 224"),
        ({"spatial_frames": 10, "frames": 50}, r"of 16, T_s = 10\) is 50, .* is 80"),
        ({"backbone": "swin_b", "size": 256}, "256, .* multiples of 224"),
        ({"backbone": "swin_mini", "size": 32}, "32, .* multiples of 64"),
    ],
    ids=str,
)
def test_a_refused_size_comes_with_one_that_works(options, words):
    refused = list(options)[-1]
    options = {"backbone": "ViT-L-14-quickgelu", "pretrained": None} | options
    with torch.device("meta"):
        with pytest.raises(UserError, match=words) as error:
            build_model(Config(**options))
        build_model(Config(**options | {refused: int(str(error.value).split()[-1])}))


@pytest.mark.parametrize("method", ["vpt", "protuning", "st_adapter", "aim"])
def test_methods_that_need_a_class_token_say_so(method, mini):
    for kind in ("swin", "siglip"):
        with pytest.raises(UserError, match=f"{method} needs a class token, .* has none"):
            mini(kind, method=method)


# ---------------------------------------------------------------- weights
def test_normalisation_is_that_of_the_models_own_weights():
    with torch.device("meta"):
        siglip = load_plain_model("ViT-B-16-SigLIP2", None)
        swin = load_plain_model("swin_b", None)
    assert tuple(siglip.image_mean) == tuple(siglip.image_std) == (0.5, 0.5, 0.5)
    assert tuple(swin.image_mean) == (0.485, 0.456, 0.406)
    assert tuple(swin.image_std) == (0.229, 0.224, 0.225)


# SHA-256 of the tiny image model's frozen weights. DualPath trains two of them, and leaves those
# out. The checkpoints that people have name the weights by these numbers.
FROZEN = {
    "aim": "174434e4f0c766973abb3230745cb0ab384f0b5402a9a2e2787017c54a86fc6d",
    "dualpath": "4615910ce04c129aafc12ab2a07a257f3f4a04f1b29bd07a1d72c769606a4d25",
}


@pytest.mark.parametrize("method", FROZEN)
def test_the_fingerprint_of_weights_stays_what_it_has_been(method):
    assert tiny(method=method).fingerprint == FROZEN[method]


@pytest.fixture(scope="module", autouse=True)
def small_clips(tmp_path_factory):
    """Names that open_clip knows, of a small CLIP and a small SigLIP."""
    folder = tmp_path_factory.mktemp("config")
    vit = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
    visions = {"small-vit": vit, "small-siglip": {"image_size": 64} | SIGLIP}
    for name, vision in visions.items():
        config = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": NO_TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")


FILES = {  # how weights come, and what they are the weights of
    "clip.pt": "small-vit",
    "tower.bin": "small-vit",
    "torchscript.pt": "small-vit",
    "siglip.pt": "small-siglip",
    "swin.pth": "swin_mini",
}


def write_weights(path, kind):
    """→ the library's own module, whose weights the file has."""
    if FILES[kind] == "swin_mini":
        plain = randomise(load_plain_model("swin_mini", None))
        whole = plain.state_dict() | {"head.weight": torch.zeros(5, 96)}
    else:
        clip = randomise(open_clip.create_model(FILES[kind]))
        plain, whole = clip.visual, clip.state_dict()
    if kind == "torchscript.pt":
        torch.jit.script(clip).save(path)  # as OpenAI's archives are
    else:
        torch.save(plain.state_dict() if kind == "tower.bin" else whole, path)
    return plain.eval()


@pytest.mark.parametrize("kind", FILES)
def test_weights_come_from_local_files(kind, tmp_path, capsys):
    path, name = str(tmp_path / kind), FILES[kind]
    plain = write_weights(path, kind)
    model = tiny(backbone=name, pretrained=path)
    video = random_video(size=model.visual.image_size[0])
    assert_close(model.features(video)[0], plain_features(plain, video))
    assert ("weights of OpenAI" in capsys.readouterr().out) == (name == "small-vit")


def test_an_image_size_interpolates_the_position_embedding(tmp_path):
    path = str(tmp_path / "a.bin")
    plain = write_weights(path, "tower.bin")
    visual = tiny(backbone="small-vit", pretrained=path, size=48).visual
    position = plain.positional_embedding
    patches = position[1:].unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    patches = F.interpolate(patches, (6, 6), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(visual.positional_embedding, torch.cat([position[:1], patches]))
    assert torch.equal(visual.conv1.weight, plain.conv1.weight)
    with pytest.raises(UserError, match="cannot load the image model 'small-vit' with weights"):
        tiny(backbone="small-vit", pretrained=path, size=7)  # smaller than a patch


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda state: state.pop("proj"), "proj is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra is not expected"),
        (lambda state: state.update(proj=torch.zeros(48, 25)), r"shape \(48, 25\), not \(48, 48\)"),
    ],
)
def test_files_that_do_not_fit_are_refused(spoil, words, tmp_path):
    state = load_plain_model("small-vit", None).state_dict()
    spoil(state)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt does not fit small-vit: .*{words}"):
        tiny(backbone="small-vit", pretrained=str(tmp_path / "a.pt"))
    (tmp_path / "a.pt").write_text("not weights")
    with pytest.raises(UserError, match="cannot load .* with weights .*/a.pt: "):
        tiny(backbone="small-vit", pretrained=str(tmp_path / "a.pt"))


# ---------------------------------------------------------------- runs and checkpoints
@pytest.mark.parametrize("kind", ["swin", "siglip"])
def test_a_miniature_trains_and_is_evaluated(kind, backbone, micro, tmp_path):
    out = str(tmp_path / "run")
    image_model = ["--backbone", backbone(kind), "--pretrained", "none"]
    train.main([*SMALL, *image_model, "--root", micro, "--out", out])
    assert evaluate.main([f"{out}/last.pt", "--workers", "0"]) == 0
    with open(f"{out}/last.folder-1x1.json") as file:
        assert json.load(file)["top1"] == lines(out)[-1]["val_top1"]
    weights = read_checkpoint(f"{out}/last.pt")["weights"]
    assert all(w.any() for name, w in weights.items() if name.endswith("up.weight"))


@pytest.mark.parametrize("kind", ["swin.pth", "siglip.pt"])
def test_a_checkpoint_wants_the_frozen_weights_it_was_made_with(kind, tmp_path):
    file = str(tmp_path / kind)
    write_weights(file, kind)
    model = randomise(tiny(backbone=FILES[kind], pretrained=file)).eval()
    path = save(model, tmp_path / "a.pt")
    content = read_checkpoint(path)
    assert content["weights"] and not any(".qkv." in name for name in content["weights"])
    video = random_video(1)
    assert torch.equal(load_checkpoint(path)[0](video), model(video))
    write_weights(file, kind)  # other ones
    with pytest.raises(UserError, match="needs other frozen weights"):
        load_checkpoint(path)


@pytest.mark.parametrize("kind", ["swin", "siglip"])
def test_a_fully_tuned_checkpoint_holds_every_weight(kind, mini, tmp_path):
    model = randomise(mini(kind, method="full", pretrained="of my own")[0]).eval()
    # As with a tag whose pixels are not those of the first one's, by which a file is built.
    model.visual.set_normalisation([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    again = load_checkpoint(save(model, tmp_path / "a.pt"))[0]
    video = random_video(1)
    assert torch.equal(again(video), model(video))
