"""How the weights in assets/tiny were made: by pretraining on drawn stills, in which nothing moves.

    python -m tools.make_tiny              # 15 minutes on two CPU cores; overwrites the weights

Either one striped thing, class = its texture and cell (4 x 4); or a sheet of 16 small ones, each in
a little frame of its own, all in the same cell (3 x 3), which is the class. A still is a clip of
one frame, so train.py's `full` trains on them.
"""

import numpy as np
import open_clip
import safetensors.torch
import torch

import train
from grid import frameset
from model import load_checkpoint
from support.backbones import ROOT
from support.demo import SIZE, TEXTURES, Scene, draw_data

TINY = f"{ROOT}/assets/tiny"
CLASSES = [(texture, cell) for texture in TEXTURES for cell in range(16)]
CLASSES += [("sheet", cell) for cell in range(9)]
OPTIONS = (
    "--data folder --root data/stills --out runs/stills --overwrite --method full --backbone tiny"
    " --pretrained none --frames 1 --spatial-frames 1 --sampling dense --stride 1 --test-stride 1"
    " --views 1x1 --augment translate --batch 64 --lr 4e-3 --warmup 1"
).split()


def draw_still(seed, kind, cell):
    """→ (1, 64, 64, 3) uint8; kind: a texture, or sheet."""
    rng = np.random.default_rng(seed)
    scene = Scene(rng)
    if kind != "sheet":
        low, high = scene.radius // 2, SIZE - scene.radius // 2
        corner = [np.clip(rng.integers(c * 16, c * 16 + 16), low, high) for c in divmod(cell, 4)]
        return scene.draw(kind, *corner)[None]
    texture, frames = TEXTURES[rng.integers(2)], []
    for _ in range(16):
        corner = [rng.integers(8 + c * 16, 24 + c * 16) for c in divmod(cell, 3)]
        frames.append(scene.draw(texture, *corner))
    video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)  # (16, 3, 64, 64)
    return frameset(video[None])[0].permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    draw_data("data/stills", (24600, 410), draw_still, CLASSES)
    train.main([*OPTIONS, "--epochs", "5"])
    # open_clip insists on a text tower; nobody uses it.
    clip = open_clip.create_model(f"local-dir:{TINY}", load_weights=False)
    clip.visual = load_checkpoint("runs/stills/last.pt")[0].visual
    safetensors.torch.save_file(clip.state_dict(), f"{TINY}/open_clip_model.safetensors")
