"""Checkpoints: sealed files that hold what was trained, and what rebuilds the model around it.

A file is torch.save's output, a mark, and the SHA-256 of that output. It may come from anyone:
no code in it is run, and nothing is built before its size has been compared with the file's.
"""

import hashlib
import io
import os
import zipfile

import open_clip
import torch

from support.errors import UserError

MARK = b"\nsha256 "  # followed by the SHA-256 of all before it, in hexadecimal
MAX_VALUES = 10**6


def saved_weights(model):
    """What a checkpoint holds: the trained weights; where the frozen ones are random, those too."""
    everything = model.config["pretrained"] is None
    state = model.state_dict(keep_vars=True)
    return {k: v.detach() for k, v in state.items() if v.requires_grad or everything}


def normalisation(model):
    """Of the image model's pixels; weights alone do not show them."""
    return [list(model.visual.image_mean), list(model.visual.image_std)]


def save_checkpoint(path, model, settings, training=None):
    """Write what was trained, atomically; raises UserError, upon which the old file stays.

    settings: plain values that describe data and recipe, class names among them. training: what
    resuming needs, or None.
    """
    content = {
        "format": 1,
        "model": model.config,
        "weights": saved_weights(model),
        "fingerprint": model.fingerprint,
        "normalisation": normalisation(model),
        "run": settings,
        "training": training,
        "versions": {"torch": str(torch.__version__), "open_clip": open_clip.__version__},
    }
    body = io.BytesIO()
    torch.save(content, body)
    seal = MARK + hashlib.sha256(body.getbuffer()).hexdigest().encode()
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.writelines([body.getbuffer(), seal])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = error.strerror or error
        raise UserError(f"cannot write {path}, which stays as it was: {reason}") from error


def read_checkpoint(path):
    """The content of a checkpoint, once its SHA-256 has been checked; raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}")
    with open(path, "rb") as file:
        body, mark, digest = file.read().rpartition(MARK)
    if not mark or digest != hashlib.sha256(body).hexdigest().encode():
        raise UserError(
            f"{path} is not a checkpoint of this project, or is damaged: its SHA-256 does not fit"
            " its content"
        )
    try:
        content = unpack(body)
    except Exception as error:  # pickle, zip and C++ readers each raise their own kinds
        reason = "it holds other things than this project's plain values and tensors"
        if type(error) is ValueError:  # our own
            reason = error
        raise UserError(f"{path} is refused: {reason}") from error
    return content


def unpack(body):
    """The content of an archive, whoever made it; raises where it is not what we write."""
    entries = zipfile.ZipFile(io.BytesIO(body)).infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it unpacks to more than it holds")
    if sum(entry.file_size for entry in entries) > len(body):
        raise ValueError("its entries share their bytes")
    content = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    check_plain(content)
    if content["format"] != 1:
        raise ValueError(f"its format is {content['format']}, and this version reads 1")
    if len(content["run"]["classes"]) != content["model"]["num_classes"]:
        raise ValueError("its names are those of other classes")
    return content


def check_plain(content):
    """Raise unless all parts are of kinds that checkpoints hold, no tensor larger than its bytes.

    Parts are counted: a list may hold itself many times over.
    """
    parts, count = [content], 0
    while parts:
        part, count = parts.pop(), count + 1
        if count > MAX_VALUES:
            raise ValueError("it holds too many values")
        if type(part) is dict:
            parts += [*part, *part.values()]
        elif type(part) in (list, tuple):
            parts += part
        elif isinstance(part, torch.Tensor):
            if not (part.is_cpu and part.is_contiguous()):
                raise ValueError("it holds a tensor that is larger than its bytes")
        elif type(part) not in (str, int, float, bool, type(None)):
            raise ValueError(f"it holds a {type(part).__name__}")


def load_weights(model, content, path, head=True):
    """Copy a checkpoint's weights, or all but its head's, into a model that was built alike."""
    own, weights = saved_weights(model), content["weights"]
    if not head:
        own = {k: v for k, v in own.items() if not k.startswith("head.")}
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
    configs = content["model"], model.config
    theirs, ours = (f"{config['method']} around {config['backbone']!r}" for config in configs)
    check_fit(own, weights, f"{path}, of {theirs}, does not fit this {ours}")
    pixels = content.get("normalisation")  # older checkpoints do not have it
    if pixels not in (None, normalisation(model)):
        raise UserError(
            f"{path} was trained on pixels of mean and deviation {pixels}, and this {ours} has"
            f" {normalisation(model)}"
        )
    tag = content["model"]["pretrained"]
    if tag is not None and model.fingerprint != content["fingerprint"]:
        raise UserError(
            f"{path}, of {theirs} with weights {tag!r}, needs other frozen weights, or another"
            f" image size, than this {ours} has"
        )
    model.load_state_dict(weights, strict=False)


def check_fit(own, theirs, what):
    """UserError where a tensor of two state dicts is missing, surplus or misshapen."""
    want, have = tensor_shapes(own), tensor_shapes(theirs)
    wrong = [f"{name} is missing" for name in want if name not in have]
    wrong += [f"{name} is not expected" for name in have if name not in want]
    for name in want:
        if name in have and have[name] != want[name]:
            wrong.append(f"{name} has shape {have[name]}, not {want[name]}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{what}: {'; '.join(wrong[:3])}{more}")


def tensor_shapes(state):
    return {k: tuple(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor)}
