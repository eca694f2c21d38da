"""The video models: an image transformer, frozen, and the few weights that are trained around it.

Config has every option of a model. ViT is the frozen image model, DualPath the paper's model around
it, FrameModel that of the methods it is compared with. What a model costs: python -m tools.cost
"""

import dataclasses
import inspect
import math
from functools import partial

import torch
from open_clip.transformer import QuickGELU
from torch import nn
from torch.utils.checkpoint import checkpoint

from adapters import METHODS
from grid import check_divides, frameset, position_code
from support.backbones import (
    ImageModel,
    Unadapted,
    add_positions,
    interface_of,
    load_plain_model,
)
from support.options import fraction, option, positive_int
from support.processes import UserError
from support.runs import fingerprint, load_weights, read_checkpoint


# ---------------------------------------------------------------- every option of a model, once
@dataclasses.dataclass
class Config:
    """What rebuilds a model; train.py has an option for each field, a checkpoint keeps them all.

    The adapters' options belong to those methods whose block names them in its constructor, and
    the last ones to DualPath. T, T_s and w, h are the paper's.
    """

    num_classes: int = 400
    # fmt: off
    method: str = option("dualpath", tuple(METHODS), "what is trained around the image model")
    backbone: str = option("ViT-B-16-quickgelu", str,
                           "open_clip model, swin_t, swin_s, swin_b, local-dir:DIR, or tiny")
    pretrained: str | None = option("openai", str,
                           "open_clip tag (swins: imagenet1k), a file, or none: random weights")
    frames: int = option(32, positive_int, "frames per clip, T")
    spatial_frames: int = option(8, positive_int, "of these, those seen at full size, T_s")
    size: int | None = option(None, positive_int,
                           "pixels of a frame's side (the image model's own)")
    # the adapters
    bottleneck: int | None = option(None, positive_int,
                           "width of the adapters; of vpt, number of prompts (the method's own)")
    dropout: float = option(0.1, fraction, "in the adapters")
    pre_attention_adapter: bool = option(False, bool, "A_t0, before the temporal path's attention")
    serial_skip: bool = option(False, bool, "z + h + A(h) in the temporal path")
    before: str = option("mha", ("mha", "mlp", "both"), "where st_adapter has its adapters")
    aim_scale: float = option(0.5, float, "weight of AIM's adapter parallel to the MLP")
    aim_temporal_adapters: int = option(1, (1, 2), "2 adds one before AIM's attention over frames")
    # DualPath
    paths: str = option("both", ("both", "spatial", "temporal"), "which paths are built")
    rows: int = option(4, positive_int, "frames of a frameset from top to bottom, h")
    cols: int = option(4, positive_int, "frames of a frameset from left to right, w")
    position_scale: float = option(1.0, float, "amplitude of p^TP, the temporal position code")
    # fmt: on


COMMON_OPTIONS = "num_classes method backbone pretrained frames spatial_frames size".split()
DUALPATH_OPTIONS = ["paths", "rows", "cols", "position_scale"]


def options_of(method):
    """The names of the options that a method has."""
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}; the methods are {', '.join(METHODS)}")
    own = inspect.signature(METHODS[method]).parameters.keys() - {"d", "patch_size"}
    return own.union(COMMON_OPTIONS, DUALPATH_OPTIONS if method == "dualpath" else [])


def check_options(config):
    """UserError where an option that the method does not have is not at its default."""
    for name, default in vars(Config()).items():
        if name not in options_of(config.method) and getattr(config, name) != default:
            have = ", ".join(other for other in METHODS if name in options_of(other))
            word = f"--{name.replace('_', '-')}"
            raise UserError(f"{word} is no option of {config.method}; it is one of {have}")


# ---------------------------------------------------------------- the frozen image model
class ViT(ImageModel):
    """open_clip's ViT with a class token; its parts keep their names and their order.

    Swin and SigLIP have the same methods in support/backbones.py.
    """

    def __init__(self, plain):
        super().__init__(plain)
        self.patch_size = plain.patch_size
        self.class_embedding = plain.class_embedding  # (d,)
        self.positional_embedding = plain.positional_embedding  # (1 + P, d)
        self.proj = plain.proj
        self.conv1 = plain.conv1
        self.ln_pre = plain.ln_pre
        self.transformer = plain.transformer
        self.ln_post = plain.ln_post
        self.widths = [plain.transformer.width] * plain.transformer.layers

    @property
    def blocks(self):
        return self.transformer.resblocks

    def forward(self, images):
        """The image model itself, which the video models take apart: (N, 3, H, W) → (N, d_out)."""
        x = self.patches(images)
        x = self.tokens(x, self.class_embedding, self.positional_embedding)
        for block in self.blocks:
            x = block(x)
        return self.feature(x)

    def patches(self, images):
        """(N, 3, H, W), values 0…255 → patch embeddings (N, P, d), no positions yet."""
        images = (images - self.mean) / self.std  # both in units of 0…255
        h, w = self.patch_size
        pixels = images.unflatten(3, (-1, w)).unflatten(2, (-1, h))  # (N, 3, down, h, across, w)
        pixels = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (N, P, 3·h·w)
        # conv1 at a patch's stride, as the product that it is: 2.4 ms less of 98 on an H100.
        return nn.functional.linear(pixels, self.conv1.weight.flatten(1), self.conv1.bias)

    def tokens(self, patches, class_token, position):
        """Class token in front, positions added: (B·n, P, d) → (B·n, 1 + P, d).

        position: (n, 1 + P, d), or (1 + P, d) for all images.
        """
        class_tokens = class_token.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([class_tokens, patches], dim=1)
        return self.ln_pre(add_positions(x, position))  # in x's type, as open_clip's LayerNorms

    def feature(self, x):
        """The class token behind the last block, projected: (N, 1 + P, d) → (N, d_out)."""
        return self.ln_post(x[:, 0]) @ self.proj


# ---------------------------------------------------------------- the paper's model
class DualPath(nn.Module):
    """Two paths through one frozen image model (section 3 of the paper).

    visual: the image model. Trained: the adapters (`blocks`, by the name that checkpoints know),
    both class tokens, p^SP (visual.positional_embedding) and the head on [y^TP ; y^SP]. A path
    that is switched off is not built: it has no images, and its feature is None.
    """

    def __init__(self, visual, config):
        super().__init__()
        check_sizes(visual, config)
        self.visual = visual.requires_grad_(False)
        self.config = config
        self.spatial, self.temporal = config.paths != "temporal", config.paths != "spatial"
        T_G = config.frames // (config.rows * config.cols) if self.temporal else 0
        self.images_per_clip = T_G + (config.spatial_frames if self.spatial else 0)
        d_out = visual.output_dim
        # Replaced below. Without it a seed would give other weights than it used to, and an
        # optimiser's state in a checkpoint would have another order.
        self.head = nn.Linear(d_out, config.num_classes)
        self.blocks = adapters_around(visual, config)
        if self.spatial:
            for p in (visual.class_embedding, visual.positional_embedding):  # the latter: p^SP
                if p is not None:
                    p.requires_grad_()
        if self.temporal:
            patch, d = visual.patch_size[0], visual.widths[0]
            code = position_code(T_G, *visual.image_size, patch, d, config.rows, config.cols)
            code = config.position_scale * code  # p^TP, (T_G, P, d)
            self.temporal_class_embedding = None
            if visual.class_embedding is not None:
                # What frozen blocks know as a class token has its position added.
                class_token = visual.class_embedding + visual.positional_embedding[0]
                self.temporal_class_embedding = nn.Parameter(class_token.detach())
                code = nn.functional.pad(code, (0, 0, 1, 0))  # zero for the class token
            self.register_buffer("temporal_position", code.to(visual.mean.device), persistent=False)
        hidden = nn.Linear(2 * d_out if config.paths == "both" else d_out, d_out)
        self.head = nn.Sequential(hidden, nn.GELU(), nn.Linear(d_out, config.num_classes))

    def forward(self, video):
        """video: (B, T, 3, H, W) uint8 → logits (B, num_classes)."""
        y_sp, y_tp = self.features(video)
        return self.head(torch.cat([y for y in (y_tp, y_sp) if y is not None], dim=-1))

    def features(self, video):
        """(B, T, 3, H, W) uint8 → (y^SP, y^TP), the paths' features, (B, d_out) or None."""
        check_video(video, self)
        config, visual = self.config, self.visual

        # Frames 0, T/T_s, 2T/T_s, … for the spatial path, all of them for the temporal one. A path
        # that is switched off is an empty batch, (0, 3, H, W), and takes the same lines.
        frames = framesets = video[:0, 0].float()
        if self.spatial:
            sampled = video[:, :: config.frames // config.spatial_frames]
            frames = sampled.flatten(0, 1).float()  # (B·T_s, 3, H, W), values 0…255
        if self.temporal:
            framesets = frameset(video.float(), config.rows, config.cols)
            framesets = framesets.flatten(0, 1)  # (B·T_G, 3, H, W)

        # One batch of images: both paths share the frozen weights.
        patches = visual.patches(torch.cat([frames, framesets]))  # (B·(T_s + T_G), P, d)
        x, z = patches.split([frames.shape[0], framesets.shape[0]])
        x = visual.tokens(x, visual.class_embedding, visual.positional_embedding)  # + p^SP
        if self.temporal:
            # In float32 under autocast, too: what the adapters add to z is small at first, and
            # bfloat16 would round part of it away.
            z = visual.tokens(z.float(), self.temporal_class_embedding, self.temporal_position)
        else:
            z = x[:0]
        for block, adapters in zip(visual.blocks, self.blocks):
            x, z = adapters(block, x, z)  # the frozen block, adapted: (B·T_s, L, d), (B·T_G, L, d)

        B, y_sp, y_tp = video.shape[0], None, None
        if self.spatial:
            y_sp = visual.feature(x).unflatten(0, (B, -1)).mean(dim=1)  # over T_s frames
        if self.temporal:
            y_tp = visual.feature(z).unflatten(0, (B, -1)).mean(dim=1)  # over T_G framesets
        return y_sp, y_tp


# ---------------------------------------------------------------- what it is compared with
class FrameModel(nn.Module):
    """T_s frames, each an ordinary image; their class features averaged; a linear head on them.

    What the method needs besides a block of its own is in the flags of its class (adapters.py).
    """

    spatial = True  # as a DualPath's

    def __init__(self, visual, config):
        super().__init__()
        check_sizes(visual, config)
        self.config, self.method = config, METHODS[config.method]
        self.images_per_clip = config.spatial_frames
        if self.method.needs_class_token and visual.class_embedding is None:
            raise UserError(
                f"{config.method} needs a class token, and {config.backbone!r} has none"
            )
        self.visual = visual
        for name, p in visual.named_parameters():
            p.requires_grad_(self.method.trains(name))
        self.head = nn.Linear(visual.output_dim, config.num_classes)
        self.blocks = adapters_around(visual, config)
        if self.method.temporal_embedding:
            embedding = torch.zeros(config.spatial_frames, 1, visual.widths[0])
            self.temporal_embedding = nn.Parameter(embedding)

    def forward(self, video):
        """video: (B, T, 3, H, W) uint8 → logits (B, num_classes)."""
        return self.head(self.features(video)[0])

    def features(self, video):
        """(B, T, 3, H, W) uint8 → (the clips' features (B, d_out), None)."""
        check_video(video, self)
        config, visual = self.config, self.visual
        frames = video[:, :: config.frames // config.spatial_frames].flatten(0, 1).float()
        position = visual.positional_embedding
        if self.method.temporal_embedding:
            position = position + self.temporal_embedding  # (T_s, L, d)
        x = visual.tokens(visual.patches(frames), visual.class_embedding, position)  # (B·T_s, L, d)
        for block, adapters in zip(visual.blocks, self.blocks):
            x = adapters(block, x)
        of_clips = (video.shape[0], config.spatial_frames)
        if self.method.pools_tokens:
            return visual.feature(x.unflatten(0, of_clips).mean(dim=1)), None
        return visual.feature(x).unflatten(0, of_clips).mean(dim=1), None


# ---------------------------------------------------------------- what both are built of
def adapters_around(visual, config):
    """What the method puts around each block of the image model → a ModuleList."""
    Block = METHODS[config.method]
    options = vars(config) | {"patch_size": visual.patch_size[0]}
    options = {k: options[k] for k in inspect.signature(Block).parameters if k != "d"}
    adapters, stages = nn.ModuleList(), len(set(visual.widths)) > 1
    for d in visual.widths:
        if stages and config.method == "dualpath" and config.bottleneck is None:
            options["bottleneck"] = d // 4  # Swin's stages differ in width: as in their code
        adapters.append(Block(d, **options) if d else Unadapted())
    return adapters


def check_sizes(visual, config):
    """ValueError where the numbers of frames or pixels do not divide, with the nearest that do."""
    patch, size = visual.patch_size[0], visual.image_size[0]
    if config.method == "dualpath" and config.paths != "spatial":
        rows, cols, T_s = config.rows, config.cols, config.spatial_frames
        what = f"the number of frames (framesets of {rows * cols}, T_s = {T_s})"
        check_divides(what, config.frames, math.lcm(T_s, rows * cols))
        what = f"the image size (framesets of {rows} x {cols}, patches of {patch})"
        check_divides(what, size, math.lcm(patch, rows, cols))
    else:
        check_divides("the number of frames", config.frames, config.spatial_frames)
        check_divides("the image size", size, patch)


def check_video(video, model):
    want, shape = (model.config.frames, 3, *model.visual.image_size), tuple(video.shape)
    if len(shape) != 5 or shape[1:] != want or video.dtype != torch.uint8:
        raise ValueError(
            f"the model takes uint8 video of shape (batch, {str(want)[1:]}, not {video.dtype} of"
            f" shape {shape}"
        )


# ---------------------------------------------------------------- building and loading
def build_model(config, visual=None):
    """A video classifier around a frozen image model: (B, T, 3, H, W) uint8 → (B, num_classes).

    visual: the image model, if it is at hand (open_clip's own `model.visual`); else config.backbone
    and pretrained say what is loaded. Which weights are trained follows from the Config: one that
    is frozen or unfrozen later would not fit the model of its checkpoint. Raises UserError.
    """
    check_options(config)
    if visual is None:
        visual = load_plain_model(config.backbone, config.pretrained, config.size)
    visual = (interface_of(visual, type(visual).__name__) or ViT)(visual)
    try:
        model = (DualPath if config.method == "dualpath" else FrameModel)(visual, config)
    except ValueError as error:
        raise UserError(error) from error
    model.fingerprint = fingerprint(model)  # now, before `prepare` may round the weights
    return model.train()


def prepare(model, dtype=None, compile=False, checkpoint_activations=False):
    """Make a model ready for long work under autocast to dtype; returns it.

    Frozen weights take in QuickGELU's factors, and are held in dtype instead of being cast at every
    call, but for LayerNorms' few. checkpoint_activations: only the blocks' inputs are kept, and
    activations are recomputed in backward. compile: the blocks, which share their graphs.
    """
    fold_quick_gelu(model)
    if dtype is not None:
        for module in model.visual.modules():
            for p in module.parameters(recurse=False):
                if not p.requires_grad and not isinstance(module, nn.LayerNorm):
                    p.data = p.data.to(dtype)
    if checkpoint_activations:
        for adapters in model.blocks:
            adapters.forward = partial(checkpoint, adapters.forward, use_reentrant=False)
    if compile:
        try:  # something small, so that a missing compiler is a sentence now
            torch.compile(torch.neg)(model.visual.mean)
        except Exception as error:  # each backend raises its own kinds
            raise UserError(f"--compile does not work on this machine: {error}") from error
        # It would cut the (small) graphs for DDP and, past its limit, go on without compiling.
        dynamo = torch._dynamo.config
        dynamo.optimize_ddp, dynamo.recompile_limit = False, 64
        dynamo.fail_on_recompile_limit_hit = True
        for adapters in model.blocks:
            adapters.compile()
    return model


def fold_quick_gelu(model):
    """QuickGELU(u) = u · σ(1.702 u) = SiLU(1.702 u) / 1.702, the factors into frozen weights.

    QuickGELU is three operations on the widest tensors, and keeps two of them for backward; SiLU is
    one and keeps one. Random weights stay as they are, for checkpoints hold them.
    """
    for block in model.visual.blocks if model.config.pretrained else []:
        mlp = getattr(block, "mlp", None)  # Swin's patch merging has none
        quick = isinstance(getattr(mlp, "gelu", None), QuickGELU) and not hasattr(mlp, "ln")
        if quick and not any(p.requires_grad for p in mlp.parameters()):
            mlp.c_fc.weight.mul_(1.702)
            mlp.c_fc.bias.mul_(1.702)
            mlp.c_proj.weight.div_(1.702)
            mlp.gelu = nn.SiLU()


def load_checkpoint(path, backbone=None, pretrained=None):
    """Rebuild a checkpoint's model, in eval mode → (model, the checkpoint's content).

    backbone, pretrained: where the same image model is found here, if not where it was in
    training. Raises UserError.
    """
    content = read_checkpoint(path)
    options = content["model"]
    unknown = sorted(options.keys() - {f.name for f in dataclasses.fields(Config)})
    if unknown:
        raise UserError(f"{path} has an option that this version does not know: {unknown[0]}")
    own = options_of(options["method"])  # a recipe's values for other methods are of no use
    config = Config(**{name: value for name, value in options.items() if name in own})
    was = config.pretrained
    config.backbone = backbone or config.backbone
    if config.method == "full":
        config.pretrained = None  # the checkpoint holds every weight
    elif was is not None:
        config.pretrained = pretrained or was
    model = build_model(config)
    model.config.pretrained = was  # for saved_weights and prepare
    load_weights(model, content, path)
    return model.eval(), content
