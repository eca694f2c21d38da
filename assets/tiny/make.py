"""How the weights in this folder were made: by pretraining on drawn stills, in which nothing moves.

    python assets/tiny/make.py              # 15 minutes on two CPU cores; in the project's folder

Either one striped thing, class = its texture and cell (4 x 4); or a sheet of 16 small ones, class = the ninth of their little
frames that all are in, each at its own place there. A still is a clip of one frame, so train.py's `full` trains on them.
"""
import os
import sys

import numpy as np
import open_clip
import safetensors.torch
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import data
import grid
import model
import train

CLASSES = [(texture, cell) for texture in data.TEXTURES for cell in range(16)] + [("sheet", cell) for cell in range(9)]

def draw_still(seed, kind, cell):
    """→ (1, 64, 64, 3) uint8; kind: a texture, or sheet."""
    rng = np.random.default_rng(seed)
    scene = data.Scene(rng)
    if kind != "sheet":
        low, high = scene.radius // 2, data.SIZE - scene.radius // 2
        return scene.draw(kind, *[int(np.clip(rng.integers(c * 16, c * 16 + 16), low, high)) for c in divmod(cell, 4)])[None]
    texture = data.TEXTURES[rng.integers(2)]
    frames = [scene.draw(texture, *[int(rng.integers(8 + c * 16, 24 + c * 16)) for c in divmod(cell, 3)]) for _ in range(16)]
    return grid.frameset(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None])[0].permute(0, 2, 3, 1).numpy()

def main(numbers=(24600, 410), epochs=5, stills="data/stills", run="runs/stills", folder=HERE):
    data.drawn_data(stills, numbers, draw_still, CLASSES)
    train.main(["--data", "folder", "--root", stills, "--out", run, "--epochs", str(epochs)] +
               "--method full --backbone tiny --pretrained none --frames 1 --spatial-frames 1 --sampling dense --stride 1"
               " --test-stride 1 --views 1x1 --augment translate --batch 64 --lr 4e-3 --warmup 1".split())
    clip = open_clip.create_model(f"local-dir:{HERE}", load_weights=False)  # open_clip insists on a text tower; nobody uses it
    clip.visual = model.load_checkpoint(os.path.join(run, "last.pt"))[0].visual
    safetensors.torch.save_file(clip.state_dict(), os.path.join(folder, "open_clip_model.safetensors"))

if __name__ == "__main__":
    main()
