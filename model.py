"""The video models: an image transformer, frozen, and the few weights that are trained around it.

    python model.py                         # parameters and GMACs of each method
    python model.py --bench --batch 32      # and clips/s and memory, next to the plain image model
"""
import argparse
import difflib
import hashlib
import io
import json
import logging
import math
import os
import zipfile

import open_clip
import torch
from torch import nn

from adapters import FRAME_METHODS, DualPathBlock, compare, count, prepare
from grid import check_divides, frameset, position_code

METHODS = ("dualpath", *FRAME_METHODS)
BACKBONES = {"tiny": "local-dir:" + os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny")}  # short names
NO_TEXT = dict(width=8, heads=1, layers=1, context_length=8, vocab_size=16)  # open_clip insists on a text tower

class ModelError(ValueError):
    """A model or a checkpoint cannot be had as asked; the message is one sentence for the user, on one line."""
    def __init__(self, message):
        super().__init__(message.splitlines()[0])

# ---------------------------------------------------------------- the image model
def load_image_model(backbone, pretrained, image_size=None):
    """open_clip's image tower; raises ModelError, if possible before a download. backbone: an open_clip name, 'tiny', or
    'local-dir:DIR' and 'hf-hub:REPO', which bring their own weights. pretrained: a tag, a file, or None: random weights."""
    name = BACKBONES.get(backbone, backbone)
    file = pretrained if ":" not in name and os.path.isfile(pretrained or "") else None
    check_backbone(name, None if file or ":" in name else pretrained)
    ours = file or pretrained is None  # then open_clip only has to build the image tower
    options = dict(load_weights=False, text_cfg=NO_TEXT) if ours else dict(pretrained=pretrained, require_pretrained=True)
    logging.disable(logging.ERROR)  # what matters in open_clip's log lines is checked here
    try:
        clip = open_clip.create_model(name, device=torch.get_default_device(), force_image_size=image_size, **options)
    except Exception as error:  # "no network" alone has dozens of types
        known = open_clip.get_pretrained_cfg(name, pretrained or "")  # {} of what is in a folder or a file
        place = known.get("url") or f"https://huggingface.co/{known.get('hf_hub')}"
        hint = f" (without a network, download {place} elsewhere and pass the file as --pretrained PATH)" * bool(known)
        raise ModelError(f"cannot load the image model {backbone!r}{hint}: {error}")
    finally:
        logging.disable(logging.NOTSET)
    return load_tower(clip, file, backbone, image_size) if file else clip.visual

def check_backbone(name, tag):
    """Refuse what is no ViT with a class token, and weights trained with another activation, where open_clip only warns."""
    try:
        config = open_clip.get_model_config(name)
    except Exception as error:  # no such folder, not JSON, no network for hf-hub:
        raise ModelError(f"cannot read the configuration of backbone {name!r}: {error}")
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models() + list(BACKBONES), n=3, cutoff=0.4)
        raise ModelError(f"open_clip has no model {name!r}; near: {', '.join(near) or 'none, see open_clip.list_models()'}")
    vision, quick = config.get("vision_cfg", {}), config.get("quick_gelu", False)
    convolutional = "timm_model_name" in vision or isinstance(vision.get("layers"), list)
    if convolutional or vision.get("attentional_pool") or vision.get("pool_type", "tok") != "tok":
        raise ModelError(f"backbone {name!r} has no class token to read (it is convolutional, comes from timm, or pools all"
                         " tokens): take a native open_clip ViT, such as ViT-B-16-quickgelu")
    tags = open_clip.list_pretrained_tags_by_model(name)
    other = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
    tag_quick = open_clip.get_pretrained_cfg(name, tag or "").get("quick_gelu", False)
    if tag and (tag_quick != quick if tag in tags else tag in open_clip.list_pretrained_tags_by_model(other)):
        raise ModelError(f"weights {tag!r} were trained with {'GELU' if quick else 'QuickGELU'}, which {name} does not use:"
                         f" take --backbone {other}")
    if tag and tag not in tags:
        raise ModelError(f"{tag!r} is neither a file nor weights open_clip has for {name}; it has {', '.join(tags) or 'none'}")

def load_tower(clip, path, backbone, image_size):
    """Fill clip.visual from a file that holds a whole CLIP or an image tower; every key must match."""
    try:  # OpenAI's own archives are TorchScript
        script = zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist())
        state = torch.jit.load(path, map_location="cpu").state_dict() if script else open_clip.factory.load_state_dict(path)
    except Exception as error:  # zip, pickle, json and C++ readers each raise their own kinds
        raise ModelError(f"cannot read weights from {path}: {error}")
    prefix = "" if any(k.startswith("visual.") for k in state) else "visual."
    state = {prefix + k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if image_size is not None:
        open_clip.model.resize_pos_embed(state, clip)
    state = {k.removeprefix("visual."): v.float() for k, v in state.items() if k.startswith("visual.")}
    load_strictly(clip.visual, clip.visual.state_dict(), state, f"{path} does not fit {backbone}")
    if os.environ.get("RANK", "0") == "0":  # once, not once per process
        print(f"note: {path} cannot tell its activation; OpenAI's, dfn2b's and metaclip's weights want a -quickgelu backbone, and"
              f" {backbone} uses {type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__}")
    return clip.visual

def load_strictly(module, own, state, what):
    """Copy `state` over `own`, a part of module's state; a missing, surplus or misshapen tensor is a ModelError."""
    have, want = ({k: tuple(v.shape) for k, v in tensors.items() if isinstance(v, torch.Tensor)} for tensors in (state, own))
    wrong = ([f"{k} is missing" for k in want if k not in have] + [f"{k} is too many" for k in have if k not in want]
             + [f"{k} has shape {have[k]}, not {want[k]}" for k in want if k in have and have[k] != want[k]])
    if wrong:
        raise ModelError(f"{what}: {'; '.join(wrong[:3])}" + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    module.load_state_dict(state, strict=False)

# ---------------------------------------------------------------- the video models
class FrameModel(nn.Module):
    """T_s frames, each an ordinary image; their class features averaged; one linear layer on them. visual: the image model, under
    open_clip's own names. new_block(d): what goes around a block. temporal_embedding: a trained vector for each frame (AIM's)."""
    spatial, temporal = True, False  # the paths that there are

    def __init__(self, visual, new_block, num_classes, num_frames, spatial_frames, full=False, temporal_embedding=False):
        super().__init__()
        check_divides("the number of frames", num_frames, spatial_frames)
        check_divides("the image size", visual.image_size[0], visual.patch_size[0])
        self.visual = visual.requires_grad_(full)
        self.num_frames, self.spatial_frames, self.images = num_frames, spatial_frames, spatial_frames  # images a clip costs
        self.run = nn.Module.__call__  # how a block is run: run(block, *inputs)
        for name, value in (("mean", visual.image_mean), ("std", visual.image_std)):
            self.register_buffer(name, 255 * torch.tensor(value).view(3, 1, 1), persistent=False)
        self.head = nn.Linear(visual.output_dim, num_classes)
        d = visual.class_embedding.shape[0]
        self.blocks = nn.ModuleList(new_block(d) for _ in visual.transformer.resblocks)
        self.temporal_embedding = nn.Parameter(torch.zeros(spatial_frames, 1, d)) if temporal_embedding else 0.0

    def train(self, mode=True):
        super().train(mode)
        self.visual.eval()  # the image model's own dropout stays off
        return self

    def forward(self, video):
        """video: (B, T, 3, H, W) uint8 → logits (B, num_classes)."""
        return self.head(torch.cat([y for y in reversed(self.features(video)) if y is not None], dim=-1))  # [y^TP ; y^SP]

    def features(self, video):
        """(B, T, 3, H, W) uint8 → (y_sp (B, d_out), None): there is no temporal path."""
        self.check(video)
        frames = video[:, ::self.num_frames // self.spatial_frames].flatten(0, 1).float()  # (B·T_s, 3, H, W)
        position = self.visual.positional_embedding[None] + self.temporal_embedding  # (1, 1 + P, d); AIM's (T_s, 1 + P, d)
        x = self.tokens(self.patches(frames), self.visual.class_embedding, position)
        for block, adapted in zip(self.visual.transformer.resblocks, self.blocks):
            x = self.run(adapted, block, x)
        return self.class_feature(x, video.shape[0]), None

    def check(self, video):
        want, shape = (self.num_frames, 3, *self.visual.image_size), tuple(video.shape)
        if len(shape) != 5 or shape[1:] != want or video.dtype != torch.uint8:
            raise ValueError(f"the model takes uint8 video of shape (batch, {str(want)[1:]}, not {video.dtype} of shape {shape}")

    def patches(self, images):
        """(N, 3, H, W), values 0…255 → patch embeddings (N, P, d), no positions yet."""
        return self.visual.conv1((images - self.mean) / self.std).flatten(2).transpose(1, 2)

    def tokens(self, patches, class_token, position):
        """(B·n, P, d) → (B·n, 1 + P, d): class token in front, position (n, 1 + P, d) added, ln_pre where there is one."""
        x = torch.cat([class_token.to(patches.dtype).expand(patches.shape[0], 1, -1), patches], dim=1)
        x = x.unflatten(0, (-1, position.shape[0])) + position.to(patches.dtype)
        return self.visual.ln_pre(x.flatten(0, 1))

    def class_feature(self, tokens, batch):
        """The class tokens' features, averaged over each clip's images: (batch·n, L, d) → (batch, d_out)."""
        return (self.visual.ln_post(tokens[:, 0]) @ self.visual.proj).unflatten(0, (batch, -1)).mean(dim=1)

class DualPath(FrameModel):
    """Two paths through one frozen image model (section 3 of the paper). Trained: the adapters (blocks), both class tokens, p^SP
    and the head on [y^TP ; y^SP]. A path that is switched off is not built: it has no images, and its feature is None."""

    def __init__(self, visual, new_block, num_classes, num_frames, spatial_frames, rows, cols, position_scale, paths):
        super().__init__(visual, new_block, num_classes, num_frames, spatial_frames)
        (H, W), d, d_out = visual.image_size, visual.class_embedding.shape[0], visual.output_dim
        self.rows, self.cols, self.spatial, self.temporal = rows, cols, paths != "temporal", paths != "spatial"
        visual.class_embedding.requires_grad_(self.spatial)
        visual.positional_embedding.requires_grad_(self.spatial)
        if self.temporal:
            frameset(torch.empty(0, num_frames, 3, H, W), rows, cols)  # says what does not divide
            # What the frozen blocks know as a class token is the embedding with its position added.
            self.temporal_class_embedding = nn.Parameter((visual.class_embedding + visual.positional_embedding[0]).detach())
            code = position_scale * position_code(num_frames // (rows * cols), H, W, visual.patch_size[0], d, rows, cols)
            code = nn.functional.pad(code.to(visual.proj.device), (0, 0, 1, 0))  # the class token's code is zero
            self.register_buffer("temporal_position", code, persistent=False)  # p^TP (T_G, 1 + P, d)
        self.images = spatial_frames * self.spatial + num_frames // (rows * cols) * self.temporal
        self.head = nn.Sequential(nn.Linear(d_out * (1 + (paths == "both")), d_out), nn.GELU(), nn.Linear(d_out, num_classes))

    def features(self, video):
        """(B, T, 3, H, W) uint8 → (y_sp, y_tp), each (B, d_out) or None: the two paths' class features."""
        self.check(video)
        B, v, x = video.shape[0], self.visual, video[:0, 0].float()  # a path that is switched off has no images
        if self.spatial:
            x = video[:, ::self.num_frames // self.spatial_frames].flatten(0, 1).float()  # (B·T_s, 3, H, W)
        z = frameset(video.float(), self.rows, self.cols).flatten(0, 1) if self.temporal else x[:0]  # (B·T_G, 3, H, W)
        x, z = self.patches(torch.cat([x, z])).split([x.shape[0], z.shape[0]])  # each path's (B·n, P, d)
        x = self.tokens(x, v.class_embedding, v.positional_embedding[None])
        z = self.tokens(z, self.temporal_class_embedding, self.temporal_position) if self.temporal else x[:0]
        for block, adapted in zip(v.transformer.resblocks, self.blocks):
            x, z = self.run(adapted, block, x, z)
        return self.class_feature(x, B) if self.spatial else None, self.class_feature(z, B) if self.temporal else None

def attention(model, video):
    """Where the class tokens look in the last block: (1, T, 3, H, W) uint8 → shares of what goes to patches, mean over heads,
    (T_s, rows, cols) of frames and (T_G, rows, cols) of framesets, in patches; a path that is not there has no rows. For a model
    on the CPU, in float32, where nn.MultiheadAttention itself is run: it can tell its weights."""
    attn, size, seen = model.visual.transformer.resblocks[-1].attn, model.visual.grid_size, []
    if not isinstance(attn, nn.MultiheadAttention) or video.device.type != "cpu":
        raise ModelError(f"the attention of {model.config['backbone']!r} on {video.device} does not tell its weights: no picture")
    ask = attn.register_forward_pre_hook(lambda _, x, options: (x, dict(options, need_weights=True)), with_kwargs=True)
    hear = attn.register_forward_hook(lambda _, x, result: seen.append(result[1]))  # (images, tokens, tokens)
    with ask, hear, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.eval()(video)
    look = seen[-1][:, 0, 1:1 + math.prod(size)].unflatten(1, size)  # AIM's last call is over space; last are VPT's prompts
    return (look / look.sum((1, 2), keepdim=True)).tensor_split([model.spatial_frames * model.spatial])

def build_model(method="dualpath", num_classes=400, backbone="ViT-B-16-quickgelu", pretrained="openai",
                num_frames=32, spatial_frames=8, image_size=None, rows=4, cols=4, bottleneck=None, dropout=0.1,
                pre_attention_adapter=False, serial_skip=False, paths="both", position_scale=1.0, before="mha"):
    """A video classifier around a frozen image model: forward((B, T, 3, H, W) uint8) → (B, num_classes). Raises ModelError.
    image_size, bottleneck: None for the image model's and the method's own; another size interpolates the position embedding.
    rows, cols: the frameset's. position_scale: amplitude of p^TP. The rest is explained in adapters.py."""
    config = dict(locals())
    if method not in METHODS:
        raise ModelError(f"there is no method {method!r}; the methods are {', '.join(METHODS)}")
    if paths not in (("both", "spatial", "temporal") if method == "dualpath" else ("both",)):
        raise ModelError(f"paths is {paths!r}; it is both, spatial or temporal, and the last two are for dualpath alone")
    visual = load_image_model(backbone, pretrained, image_size)
    width = () if bottleneck is None else (bottleneck,)
    try:
        if method == "dualpath":
            new_block = lambda d: DualPathBlock(d, *width, dropout=dropout, pre_attention_adapter=pre_attention_adapter,
                                                serial_skip=serial_skip, paths=paths)
            model = DualPath(visual, new_block, num_classes, num_frames, spatial_frames, rows, cols, position_scale, paths)
        else:
            where = dict(before=before) if method == "st_adapter" else {}
            new_block = lambda d: FRAME_METHODS[method](d, spatial_frames, *width, dropout=dropout, **where)
            model = FrameModel(visual, new_block, num_classes, num_frames, spatial_frames, method == "full", method == "aim")
    except ValueError as error:
        raise ModelError(str(error))
    model.config = config
    model.fingerprint = fingerprint(model)
    return model.train()

# ---------------------------------------------------------------- checkpoints
MARK = b"\nsha256 "  # a checkpoint is torch.save's output, this mark, and the SHA-256 of that output in hexadecimal

def fingerprint(model):
    """SHA-256 of the frozen weights as loaded, without an interpolated position embedding: its last bits vary by processor."""
    digest = hashlib.sha256()
    for name, p in model.visual.named_parameters():
        if not (p.requires_grad or p.is_meta or name == "positional_embedding" and model.config["image_size"] is not None):
            digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode() + p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

def saved_weights(model):
    """What a checkpoint holds: the trained weights; where the frozen ones are random, those too."""
    every = model.config["pretrained"] is None
    return {k: v.detach() for k, v in model.state_dict(keep_vars=True).items() if v.requires_grad or every}

def save_checkpoint(path, model, run, training=None):
    """Write what was trained, and what rebuilds the model around it, atomically, with a SHA-256 over all. run: plain
    values that describe data and recipe, class names among them; training: what resuming needs, or None."""
    content = dict(format=1, model=model.config, weights=saved_weights(model), fingerprint=model.fingerprint, run=run,
                   training=training, versions=dict(torch=str(torch.__version__), open_clip=open_clip.__version__))
    whole = io.BytesIO()
    torch.save(content, whole)
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.writelines([whole.getbuffer(), MARK + hashlib.sha256(whole.getbuffer()).hexdigest().encode()])
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        os.path.exists(f"{path}.tmp") and os.remove(f"{path}.tmp")
        raise ModelError(f"cannot write {path}, which stays as it was: {error.strerror or error}")

def read_checkpoint(path):
    """The content of a checkpoint, once its SHA-256 has been checked; raises ModelError."""
    if not os.path.isfile(path):
        raise ModelError(f"there is no checkpoint {path}")
    with open(path, "rb") as file:
        whole, mark, digest = file.read().rpartition(MARK)
    if not mark or digest != hashlib.sha256(whole).hexdigest().encode():
        raise ModelError(f"{path} is not a checkpoint of this project, or is damaged: its SHA-256 does not fit its content")
    try:  # whoever made the file: no code is run, nothing is larger than its bytes in the file
        size = sum(e.file_size + len(whole) * e.compress_type for e in zipfile.ZipFile(io.BytesIO(whole)).infolist())
        content = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True) if size <= len(whole) else None
        sound = (all(ok and i < 10**6 for i, ok in enumerate(plain(content))) and content["format"] == 1
                 and len(content["run"]["classes"]) == content["model"]["num_classes"])
    except Exception:  # pickle, zip and C++ readers each raise their own kinds
        sound = False
    if not sound:
        raise ModelError(f"{path} is refused: it holds other things than this project's plain values and tensors")
    return content

def plain(value):
    """For a value and all its parts: is it of a kind that checkpoints hold, and no tensor that is larger than its bytes?"""
    yield type(value) in (dict, list, tuple, str, int, float, bool, type(None)) or value.is_cpu and value.is_contiguous()
    for part in (*value, *value.values()) if type(value) is dict else value if type(value) in (list, tuple) else ():
        yield from plain(part)

def load_weights(model, content, path, head=True):
    """Copy a checkpoint's weights, or all but its head's, into a model that was built alike; raises ModelError."""
    theirs = content["model"]
    if theirs["pretrained"] is not None and model.fingerprint != content["fingerprint"]:
        raise ModelError(f"{path} is of {theirs['method']} around {theirs['backbone']!r} with weights {theirs['pretrained']!r},"
                         f" other frozen weights than those of this {model.config['method']} around {model.config['backbone']!r}")
    chosen = lambda weights: {k: v for k, v in weights.items() if head or not k.startswith("head.")}
    load_strictly(model, chosen(saved_weights(model)), chosen(content["weights"]), f"{path} does not fit the model")

def load_checkpoint(path, backbone=None, pretrained=None):
    """Rebuild the model of a checkpoint, in eval mode → (model, the checkpoint's content); raises ModelError.
    backbone, pretrained: where the same image model is found here, if not where it was in training."""
    content = read_checkpoint(path)
    try:
        config = dict(content["model"], backbone=backbone or content["model"]["backbone"])
        if config["pretrained"] is not None:  # else, as with `full`, the checkpoint holds every weight
            config["pretrained"] = None if config["method"] == "full" else pretrained or config["pretrained"]
        with torch.device("meta"):  # first without memory: a small file can claim a model of any size
            claimed = build_model(**dict(config, pretrained=None))
            claimed.config = content["model"]
            load_strictly(nn.Module(), saved_weights(claimed), content["weights"], f"{path} does not fit the model")
        if claimed.num_frames > 9999 or sum(t.nbytes for t in [*claimed.buffers(), claimed.visual.positional_embedding]) > 1 << 30:
            raise ModelError(f"{path} is refused: no model has so many frames, or frames so large")
        model = build_model(**config)
        load_weights(model, content, path)
    except (TypeError, LookupError, RuntimeError, OverflowError, ArithmeticError, AttributeError) as error:
        raise ModelError(f"{path} is refused: its configuration makes no model: {error}")
    return model.eval(), content

# ---------------------------------------------------------------- the report
PEERS = """Others on Kinetics-400, by their own READMEs; GMACs (they say GFLOPs) of 3 views:
AIM         ViT-B/16   8 / 16 / 32 frames    606 /  1214 /  2428 GMACs   11 M tuned   top-1 83.9 / 84.5 / 84.7 %
AIM         ViT-L/14   8 / 16 / 32 frames   2902 /  5604 / 11208 GMACs   38 M tuned   top-1 86.8 / 87.3 / 87.5 %
ZeroI2V     ViT-B/16   8 frames    422 GMACs   top-1 83.0 %      ViT-L/14   32 frames   7783 GMACs   top-1 87.2 %
ST-Adapter  ViT-B/16   8 frames                top-1 82.2 %"""

def report(args):
    """Prints a table per backbone, a row per model: what is counted, and with args.bench what adapters.compare measures."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    variants = [("dualpath", dict(num_frames=T)) for T in args.frames]
    variants += [("dualpath", dict(num_frames=args.frames[-1], pre_attention_adapter=True))]
    variants += [(m, dict(num_frames=T, spatial_frames=T)) for m in METHODS[1:] for T in ((8, 16, 32) if m == "aim" else (8,))]
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    result = dict(vars(args), torch=str(torch.__version__), device=machine, type=str(dtype), rows=[])
    for backbone in args.backbone:
        rows, models = [], []
        for method, options in [v for v in variants if v[0] in args.method]:
            config = dict(options, method=method, backbone=backbone, pretrained=None)
            with torch.device("meta"):  # shapes without memory: counting needs no weights
                rows.append({"method": method + "+A_t0" * ("pre_attention_adapter" in options)} | count(build_model(**config)))
            if args.bench:
                models.append(prepare(build_model(**config).to(device), dtype, args.compile, args.checkpoint_activations))
        if args.bench:
            rate = compare(rows, models, load_image_model(backbone, None).to(device, dtype), args.batch, args.rounds)
        cells = [[f"{c:.5g}" if isinstance(c, float) else str(c) for c in line] for line in [rows[0], *(r.values() for r in rows)]]
        table = ["  ".join(cell.rjust(max(map(len, column))) for cell, column in zip(line, zip(*cells))) for line in cells]
        how = f"{args.batch} clips, {machine}, {dtype}; a large product: {2e-12 * rate:.3g} TFLOP/s" if args.bench else "counted"
        print(f"{backbone}: {how}", *table, "", sep="\n")
        result["rows"] += [{"backbone": backbone} | row for row in rows]
    print(PEERS)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)

def main(argv=None):
    parser = argparse.ArgumentParser(description="Parameters, multiply-accumulates and speed of each method.")
    add = parser.add_argument
    add("--backbone", nargs="+", default=["ViT-B-16-quickgelu", "ViT-L-14-quickgelu"], metavar="NAME", help="(%(default)s)")
    add("--method", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help=f"{', '.join(METHODS)} (all)")
    add("--frames", nargs="+", type=int, default=[16, 32, 48], metavar="T", help="frames of DualPath's clips (%(default)s)")
    add("--json", metavar="FILE", help="write the table to a file, too")
    add("--bench", action="store_true", help="measure speed and memory, too")
    add("--batch", type=int, default=1, metavar="N", help="clips per step, for --bench; less if memory runs out (%(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="in which all take turns, for --bench (%(default)s)")
    for option in ("--compile", "--checkpoint-activations"):
        add(option, action="store_true", help="as in train.py, for --bench")
    args = parser.parse_args(argv)
    try:
        if min(args.batch, args.rounds, *args.frames) < 1:
            raise ModelError("--batch, --rounds and --frames are numbers from 1")
        report(args)
    except (ModelError, OSError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"model.py: {str(error).splitlines()[0]}")

if __name__ == "__main__":
    main()
