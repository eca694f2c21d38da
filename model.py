"""The video models: an image transformer, frozen, and the few weights that are trained around it.

    python model.py                         # parameters and multiply-accumulates of each method

What they cost in seconds and memory: python -m tools.cost
"""

import argparse
import json
import math
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from adapters import METHODS, FrameBlock, Unadapted, quarter_block
from grid import check_divides, frameset, position_code
from support.backbones import fingerprint, has_class_token, load_image_model
from support.options import at_least
from support.processes import UserError, one_sentence
from support.runs import check_fit, load_weights, read_checkpoint, saved_weights
from support.tables import table


class FrameModel(nn.Module):
    """T_s frames, each an ordinary image; their class features averaged; a linear head on them.

    visual: the image model (support/backbones.py). new_block(d): what goes around a block of width
    d (adapters.py). block_class: their class, whose flags say what else the method needs.
    """

    spatial, temporal = True, False  # which paths the model has

    def __init__(
        self, visual, new_block, num_classes, num_frames, spatial_frames, block_class=FrameBlock
    ):
        super().__init__()
        check_divides("the number of frames", num_frames, spatial_frames)
        check_divides("the image size", visual.image_size[0], visual.patch_size[0])
        self.visual = visual.requires_grad_(block_class.trains_image_model)
        self.num_frames, self.spatial_frames = num_frames, spatial_frames
        self.images_per_clip = spatial_frames
        self.checkpoint_activations = False
        mean, std = 255 * torch.tensor([visual.image_mean, visual.image_std]).view(2, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.head = nn.Linear(visual.output_dim, num_classes)
        self.blocks = nn.ModuleList(new_block(d) if d else Unadapted() for d in visual.widths)
        self.pools_tokens = block_class.pools_tokens
        self.temporal_embedding = 0.0  # added to the positions; AIM trains one
        if block_class.temporal_embedding:
            d = visual.widths[0]
            self.temporal_embedding = nn.Parameter(torch.zeros(spatial_frames, 1, d))

    def train(self, mode=True):
        super().train(mode)
        self.visual.eval()  # the image model's own dropout stays off
        return self

    def forward(self, video):
        """video: (B, T, 3, H, W) uint8 → logits (B, num_classes)."""
        y_sp, y_tp = self.features(video)
        return self.head(torch.cat([y for y in (y_tp, y_sp) if y is not None], dim=-1))

    def features(self, video):
        """(B, T, 3, H, W) uint8 → (y^SP (B, d_out), None): there is no temporal path."""
        self.check(video)
        frames = self.sampled_frames(video)  # (B·T_s, 3, H, W)
        x = self.frame_tokens(self.patches(frames))
        for block, adapted in zip(self.visual.blocks, self.blocks):
            x = self.run_block(adapted, block, x)
        return self.mean_feature(x, video.shape[0]), None

    def check(self, video):
        want, shape = (self.num_frames, 3, *self.visual.image_size), tuple(video.shape)
        if len(shape) != 5 or shape[1:] != want or video.dtype != torch.uint8:
            raise ValueError(
                f"the model takes uint8 video of shape (batch, {str(want)[1:]}, not {video.dtype}"
                f" of shape {shape}"
            )

    def sampled_frames(self, video):
        """Frames 0, T/T_s, 2T/T_s, … of each clip → (B·T_s, 3, H, W), values 0…255."""
        return video[:, :: self.num_frames // self.spatial_frames].flatten(0, 1).float()

    def patches(self, images):
        """(N, 3, H, W), values 0…255 → patch embeddings (N, P, d), no positions yet."""
        return self.visual.patches((images - self.mean) / self.std)

    def frame_tokens(self, patches):
        """Patches of frames → their tokens, with the class token and p^SP where there are any."""
        position = self.visual.positional_embedding
        if position is not None:
            position = position[None] + self.temporal_embedding
        return self.tokens(patches, self.visual.class_embedding, position)

    def tokens(self, patches, class_token, position):
        """(B·n, P, d) → (B·n, L, d): class token in front, position (n, L, d) added, or None."""
        tokens = patches
        if class_token is not None:
            class_tokens = class_token.to(patches.dtype).expand(patches.shape[0], 1, -1)
            tokens = torch.cat([class_tokens, patches], dim=1)
        if position is not None:
            tokens = tokens.unflatten(0, (-1, position.shape[0]))
            tokens = (tokens + position.to(patches.dtype)).flatten(0, 1)
        return self.visual.ln_pre(tokens)

    def run_block(self, adapted, *inputs):
        """adapted(*inputs); with checkpointing its insides are computed again for backward."""
        if self.checkpoint_activations:
            return checkpoint(adapted, *inputs, use_reentrant=False)
        return adapted(*inputs)

    def mean_feature(self, tokens, batch):
        """Features of the images, averaged over each clip: (batch·n, L, d) → (batch, d_out)."""
        if self.pools_tokens:
            return self.visual.feature(tokens.unflatten(0, (batch, -1)).mean(dim=1))
        return self.visual.feature(tokens).unflatten(0, (batch, -1)).mean(dim=1)


class DualPath(FrameModel):
    """Two paths through one frozen image model (section 3 of the paper).

    Trained: the adapters (blocks), both class tokens, p^SP (visual.positional_embedding) and the
    head on [y^TP ; y^SP]. A path that is switched off is not built: it has no images, and its
    feature is None.
    """

    def __init__(
        self,
        visual,
        new_block,
        num_classes,
        num_frames,
        spatial_frames,
        rows=4,
        cols=4,
        position_scale=1.0,
        paths="both",
    ):
        if paths != "spatial":  # the nearest sizes should suit both paths
            what = f"the number of frames (framesets of {rows * cols}, T_s = {spatial_frames})"
            check_divides(what, num_frames, math.lcm(spatial_frames, rows * cols))
            patch, size = visual.patch_size[0], visual.image_size[0]
            what = f"the image size (framesets of {rows} x {cols}, patches of {patch})"
            check_divides(what, size, math.lcm(patch, rows, cols))
        super().__init__(visual, new_block, num_classes, num_frames, spatial_frames)
        self.rows, self.cols = rows, cols
        self.spatial, self.temporal = paths != "temporal", paths != "spatial"
        self.images_per_clip = 0
        if self.spatial:
            for p in (visual.class_embedding, visual.positional_embedding):
                if p is not None:
                    p.requires_grad_()
            self.images_per_clip += spatial_frames
        if self.temporal:
            self.add_temporal_path(position_scale)
            self.images_per_clip += num_frames // (rows * cols)
        d = visual.output_dim
        hidden = nn.Linear(2 * d if paths == "both" else d, d)
        self.head = nn.Sequential(hidden, nn.GELU(), nn.Linear(d, num_classes))

    def add_temporal_path(self, position_scale):
        visual, (H, W) = self.visual, self.visual.image_size
        patch, d = visual.patch_size[0], visual.widths[0]
        T_G = self.num_frames // (self.rows * self.cols)
        code = position_scale * position_code(T_G, H, W, patch, d, self.rows, self.cols)  # p^TP
        self.temporal_class_embedding = None
        if visual.class_embedding is not None:
            # What the frozen blocks know as a class token is the embedding with its position added.
            class_token = visual.class_embedding + visual.positional_embedding[0]
            self.temporal_class_embedding = nn.Parameter(class_token.detach())
            code = nn.functional.pad(code, (0, 0, 1, 0))  # zero for the class token: (T_G, L, d)
        self.register_buffer("temporal_position", code.to(self.mean.device), persistent=False)

    def features(self, video):
        """(B, T, 3, H, W) uint8 → (y^SP, y^TP), the paths' features, (B, d_out) or None."""
        self.check(video)
        x, z = self.embed(video)
        for block, adapted in zip(self.visual.blocks, self.blocks):
            x, z = self.run_block(adapted, block, x, z)
        y_sp = self.mean_feature(x, video.shape[0]) if self.spatial else None
        y_tp = self.mean_feature(z, video.shape[0]) if self.temporal else None
        return y_sp, y_tp

    def embed(self, video):
        """A clip's tokens in each path → x (B·T_s, L, d), z (B·T_G, L, d)."""
        no_images = video[:0, 0].float()  # (0, 3, H, W): those of a path that is switched off
        frames = self.sampled_frames(video) if self.spatial else no_images  # (B·T_s, 3, H, W)
        framesets = no_images
        if self.temporal:
            framesets = frameset(video.float(), self.rows, self.cols).flatten(0, 1)  # (B·T_G, …)
        patches = self.patches(torch.cat([frames, framesets]))  # (B·(T_s + T_G), P, d)
        frame_patches, frameset_patches = patches.split([frames.shape[0], framesets.shape[0]])

        x = self.frame_tokens(frame_patches)
        z = x[:0]
        if self.temporal:
            class_token, position = self.temporal_class_embedding, self.temporal_position
            # In float32 under autocast, too: what the adapters add to z is small at first, and
            # bfloat16 would round part of it away.
            z = self.tokens(frameset_patches.float(), class_token, position)
        return x, z


def build_model(
    method="dualpath",
    num_classes=400,
    backbone="ViT-B-16-quickgelu",
    pretrained="openai",
    num_frames=32,
    spatial_frames=8,
    image_size=None,
    rows=4,
    cols=4,
    bottleneck=None,
    dropout=0.1,
    pre_attention_adapter=False,
    serial_skip=False,
    paths="both",
    position_scale=1.0,
    before="mha",
    aim_scale=0.5,
    aim_temporal_adapters=1,
):
    """A video classifier around a frozen image model: (B, T, 3, H, W) uint8 → (B, num_classes).

    image_size, bottleneck: None for the image model's and the method's own; another size
    interpolates the position embedding. DualPath's bottleneck is 128, or around Swin a quarter of
    each stage's width, as in the authors' code. rows, cols: the frameset's. position_scale:
    amplitude of p^TP. The others are explained in adapters.py. Raises UserError.
    """
    config = dict(locals())  # all arguments
    check_method(method, paths, backbone)
    visual = load_image_model(backbone, pretrained, image_size)
    sizes = (num_classes, num_frames, spatial_frames)
    own_options = {
        "dualpath": {"pre_attention_adapter": pre_attention_adapter, "serial_skip": serial_skip},
        "vpt": {"patch_size": visual.patch_size[0]},
        "st_adapter": {"before": before},
        "aim": {"s": aim_scale, "temporal_adapters": aim_temporal_adapters},
    }
    options = {"dropout": dropout} | own_options.get(method, {})
    if bottleneck is not None:
        options["bottleneck"] = bottleneck
    Block = METHODS[method]
    try:
        if method == "dualpath":
            if len(set(visual.widths)) > 1 and bottleneck is None:
                Block = quarter_block
            new_block = partial(Block, paths=paths, **options)
            model = DualPath(visual, new_block, *sizes, rows, cols, position_scale, paths)
        else:
            new_block = partial(Block, frames=spatial_frames, **options)
            model = FrameModel(visual, new_block, *sizes, Block)
    except ValueError as error:
        raise UserError(error) from error
    model.config = config
    model.fingerprint = fingerprint(model.visual, interpolated=image_size is not None)
    return model.train()


def check_method(method, paths, backbone):
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}; the methods are {', '.join(METHODS)}")
    if paths not in ("both", "spatial", "temporal") or (paths != "both" and method != "dualpath"):
        raise UserError(
            f"paths is {paths!r}; it is both, spatial or temporal, and the last two are for"
            " dualpath alone"
        )
    if METHODS[method].needs_class_token and not has_class_token(backbone):
        raise UserError(
            f"{method} needs a class token, and {backbone!r} has none: it takes ViTs that have"
            " one, such as ViT-B-16-quickgelu"
        )


def load_checkpoint(path, backbone=None, pretrained=None):
    """Rebuild a checkpoint's model, in eval mode → (model, the checkpoint's content).

    backbone, pretrained: where the same image model is found here, if not where it was in
    training. Raises UserError.
    """
    content = read_checkpoint(path)
    try:
        config = dict(content["model"], backbone=backbone or content["model"]["backbone"])
        if config["method"] == "full":
            config["pretrained"] = None  # the checkpoint holds every weight
        elif config["pretrained"] is not None:
            config["pretrained"] = pretrained or config["pretrained"]
        check_claims(path, config, content)
        model = build_model(**config)
        model.config["pretrained"] = content["model"]["pretrained"]  # for saved_weights
        load_weights(model, content, path)
    except (TypeError, LookupError, RuntimeError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{path} is refused: its configuration makes no model: {error}") from error
    return model.eval(), content


def check_claims(path, config, content):
    """Refuse a checkpoint whose weights are not those of the model that it claims to be of.

    The model is built without memory first: a small file can claim a model of any size.
    """
    with torch.device("meta"):
        claimed = build_model(**dict(config, pretrained=None))
    claimed.config = content["model"]
    check_fit(saved_weights(claimed), content["weights"], f"{path} does not fit the model")
    constants = [*claimed.buffers(), *claimed.visual.parameters(recurse=False)]
    if claimed.num_frames > 9999 or sum(t.nbytes for t in constants) > 1 << 30:
        raise UserError(f"{path} is refused: its number of frames, or their size, is too large")


# ---------------------------------------------------------------- what each method costs, counted
def count_parameters(model):
    """(trained, all) parameters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters())


def count(model):
    """Images, parameters and multiply-accumulates of a clip, for a model on the meta device.

    One forward pass, with gradients on: the counter cannot see into a CPU's kernels for inference.
    """
    size = model.visual.image_size
    video = torch.zeros(1, model.num_frames, 3, *size, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(video)
    gmacs = counter.get_total_flops() / 2e9  # a multiply-accumulate is two FLOPs
    tuned, everything = count_parameters(model)
    return {
        "T": model.num_frames,
        "images": model.images_per_clip,
        "all M": everything / 1e6,
        "tuned M": tuned / 1e6,
        "GMACs/view": gmacs,
        "3 views": 3 * gmacs,
    }


def variants(backbone, methods, frames):
    """(name, build_model's arguments) of the table's rows; if none can be built, of all of them."""
    need_it = [method for method in methods if METHODS[method].needs_class_token]
    if 0 < len(need_it) < len(methods) and not has_class_token(backbone):
        print(f"{backbone} has no class token, which these need: {', '.join(need_it)}")
        methods = [method for method in methods if method not in need_it]
    rows = []
    for method in methods:
        if method == "dualpath":
            rows += [(method, {"num_frames": T}) for T in frames]
            rows.append(("dualpath+A_t0", rows[-1][1] | {"pre_attention_adapter": True}))
        else:
            lengths = [8, 16, 32] if method == "aim" else [8]  # in their papers
            for T in lengths:
                rows.append((method, {"method": method, "num_frames": T, "spatial_frames": T}))
    return rows


def count_variants(backbone, methods, frames):
    """A row of counts for each variant."""
    rows = []
    for name, config in variants(backbone, methods, frames):
        with torch.device("meta"):  # shapes without memory: counting needs no weights
            model = build_model(backbone=backbone, pretrained=None, **config)
            rows.append({"method": name} | count(model))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description="Parameters and multiply-accumulates of methods.")
    add_report_options(parser.add_argument)
    args = parser.parse_args(argv)
    with one_sentence("model.py"):
        result = []
        for backbone in args.backbone:
            rows = count_variants(backbone, args.method, args.frames)
            print(f"{backbone}: counted", *table(rows), "", sep="\n")
            result += [{"backbone": backbone} | row for row in rows]
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"rows": result}, file, indent=1)


def add_report_options(add):
    """Options that tools.cost shares."""
    names = ", ".join(METHODS)
    backbones = ["ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "swin_b", "ViT-B-16-SigLIP2"]
    add("--backbone", nargs="+", default=backbones, metavar="NAME", help="(%(default)s)")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=names)
    T, whole = [16, 32, 48], at_least(1)
    add("--frames", nargs="+", type=whole, default=T, metavar="T", help="T (%(default)s)")
    add("--json", metavar="FILE", help="write the table to a file, too")


if __name__ == "__main__":
    main()
