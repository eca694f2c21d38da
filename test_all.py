"""Every claim of the other files, tested: pytest test_all.py"""
import copy
import csv
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from fractions import Fraction

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing
from PIL import Image
from torch.nn import functional as F

import adapters
import data
import evaluate
import grid
import model as models
import train

SHARED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "shared")
needs_shared = pytest.mark.skipif(not os.path.isdir(SHARED), reason="the folder ../shared with real videos and weights is not here")
TINY = dict(backbone="tiny", pretrained="here", num_classes=8, num_frames=16, spatial_frames=4, bottleneck=16)

def pytest_addoption(parser):
    """pytest -p test_all test_all.py --thorough: the tests of what is rare, with all their repetitions (20 minutes)."""
    parser.addoption("--thorough", action="store_true")

@pytest.fixture
def thorough(request):
    return request.config.getoption("--thorough", False)

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def random_video(batch=2, frames=16, size=64):
    return torch.randint(0, 256, (batch, frames, 3, size, size), dtype=torch.uint8)

def vit_folder(folder, quick_gelu=False, **vision):
    """An open_clip folder without weights: the backbone local-dir:FOLDER for --pretrained none."""
    vision = dict(dict(image_size=32, layers=2, width=48, head_width=16, patch_size=8), **vision)
    config = dict(embed_dim=24, quick_gelu=quick_gelu, vision_cfg=vision, text_cfg=models.NO_TEXT)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "open_clip_config.json"), "w") as file:
        json.dump(dict(model_cfg=config, preprocess_cfg=dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])), file)
    return f"local-dir:{folder}"

def randomise(module):
    """At the start W_up and the biases are zero, which would hide most mistakes."""
    for p in module.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return module

# ---------------------------------------------------------------- grid.py

def test_every_pixel_of_a_frameset_comes_from_the_right_frame():
    rows, cols, h, w = 2, 4, 5, 3
    video = torch.arange(2 * 16).view(2, 16, 1, 1, 1).expand(2, 16, 3, rows * h, cols * w).float()
    sets = grid.frameset(video, rows, cols)
    assert sets.shape == (2, 2, 3, rows * h, cols * w)
    for b in range(2):
        for n in range(2):
            for y in range(rows * h):
                for x in range(cols * w):
                    t = 8 * n + y // h * cols + x // w
                    assert (sets[b, n, :, y, x] - (16 * b + t)).abs().max() < 1e-4

def test_frames_keep_their_upright_picture_in_the_frameset():
    frame = torch.zeros(1, 4, 1, 8, 8)
    frame[:, 2, :, :4, :] = 1  # the third frame's upper half
    small = grid.frameset(frame, 2, 2)[0, 0, 0]
    assert small[4:, :4][:2].mean() > 0.8 and small[4:, :4][2:].mean() < 0.2
    assert small[:4].abs().max() == 0 and small[4:, 4:].abs().max() == 0

def test_shrinking_is_antialiased():
    stripes = (torch.arange(64) // 2 % 2 * 100.0).expand(1, 16, 3, 64, 64)
    inner = grid.frameset(stripes)[..., 2:14]
    assert (inner - 50).abs().max() < 1

def test_framesets_keep_uint8():
    assert grid.frameset(random_video()).dtype == torch.uint8

@pytest.mark.parametrize("shape, numbers", [((1, 20, 3, 64, 64), ("20", "16", "32")), ((1, 16, 3, 62, 64), ("62", "60", "64")),
                                            ((1, 16, 3, 64, 66), ("66", "64", "68")), ((1, 0, 3, 64, 64), ("0", "16"))])
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(shape, numbers):
    with pytest.raises(ValueError) as error:
        grid.frameset(torch.zeros(shape))
    assert all(number in str(error.value) for number in numbers)

@pytest.mark.parametrize("rows, cols, height, width, patch, dim", [(4, 4, 56, 56, 8, 64), (2, 3, 28, 42, 7, 20), (2, 2, 32, 32, 8, 48)])
def test_position_code_is_the_mean_over_pixels_of_the_pixels_codes(rows, cols, height, width, patch, dim):
    def code(position, d):
        angles = [position / 10000 ** (k / (d // 2)) for k in range(d // 2)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    d_yx = 2 * (dim // 6)
    sets = 2
    want = np.zeros((sets, height // patch, width // patch, dim))
    for n in range(sets):
        for py in range(height):
            for px in range(width):
                row, y = divmod(py, height // rows)
                col, x = divmod(px, width // cols)
                t = n * rows * cols + row * cols + col
                pixel = (code((y + 0.5) / patch - 0.5, d_yx) + code((x + 0.5) / patch - 0.5, d_yx) + code(t, dim - 2 * d_yx))
                want[n, py // patch, px // patch] += np.array(pixel) / patch**2
    got = grid.position_code(sets, height, width, patch, dim, rows, cols)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want.reshape(sets, -1, dim), atol=1e-6)

@pytest.fixture
def figures(monkeypatch):
    """The pictures that are written, as matplotlib's figures."""
    import matplotlib.figure
    figures, write = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path: figures.append(figure) or write(figure, path))
    return figures

def shown(stripe):
    """The images of a stripe, and the texts on each."""
    return [(axes.images[0].get_array(), [text.get_text() for text in axes.texts]) for axes in stripe.axes]

def test_grid_as_a_script(tmp_path, capsys, figures):
    clip, picture = str(tmp_path / "a:b$1$.mp4"), str(tmp_path / "grid.png")
    data.write_video(clip, data.draw_moving(1, "left", "vertical"))
    grid.main([clip, picture])
    assert "16 moments of" in capsys.readouterr().out
    frames = np.stack(decode_whole(clip))
    above, below = figures[-1].subfigs
    for (image, texts), number in zip(shown(above), range(0, 16, 2), strict=True):
        assert np.array_equal(image, frames[number]) and texts == [str(number)]
    (image, texts), = shown(below)
    assert np.array_equal(image.transpose(2, 0, 1), grid.frameset(torch.from_numpy(frames).permute(0, 3, 1, 2)[None])[0, 0])
    assert texts == [str(i) for i in range(16)]
    places = [text.get_position() for text in below.axes[0].texts]  # from the lower left corner
    assert all(0 < x - i % 4 / 4 < 0.03 and 0 < 1 - i // 4 / 4 - y < 0.03 for i, (x, y) in enumerate(places))
    drawn = np.array(Image.open(picture).convert("RGB"))
    assert drawn.shape[1] == 1000 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 100
    grid.main([video_of(tmp_path / "long.mp4", 40), picture])
    assert "32 moments of" in capsys.readouterr().out and len(shown(figures[-1].subfigs[1])) == 2
    assert [texts for _, texts in shown(figures[-1].subfigs[0])] == [[str(i * 4 * 40 // 32)] for i in range(8)]

def test_classes_are_drawn_by_accuracy_and_confusion(tmp_path, figures):
    labels, guesses = [0] * 4 + [1] * 4 + [2] * 2, [0, 0, 0, 1] + [1, 2, 2, 0] + [None, None]
    grid.draw_classes(tmp_path / "a.png", "title", labels, guesses, ["x", "$y", "z"])
    bars = [([label.get_text() for label in axes.get_yticklabels()], [bar.get_width() for bar in axes.patches])
            for axes in (stripe.axes[0] for stripe in figures[0].subfigs)]
    assert bars[0] == (["z (2)", "$y (4)", "x (4)"], [0, 0.25, 0.75])
    assert bars[1] == (["$y → z (2 of 4)", "x → $y (1 of 4)", "$y → x (1 of 4)"], [0.5, 0.25, 0.25])
    assert "75.0 %" in [text.get_text() for text in figures[0].subfigs[0].axes[0].texts] and figures[0].get_suptitle() == "title"
    grid.draw_classes(tmp_path / "a.png", "all right", [0, 1], [0, 1], ["x", "y"])  # nothing to confuse
    names = [f"class {i} with a very long name, as of Something-Something, which has to be cut somewhere" for i in range(400)]
    grid.draw_classes(tmp_path / "a.png", "many", list(range(400)), [0] * 400, names)
    assert all(len(stripe.axes[0].patches) == 20 for stripe in figures[2].subfigs)
    label = figures[2].subfigs[1].axes[0].get_yticklabels()[0].get_text()
    assert label.startswith("class 1 with") and "… → class 0 with" in label and label.endswith("… (1 of 1)")  # both are cut, not one
    grid.draw_classes(tmp_path / "a.png", os.fsdecode(b"caf\xe9"), [0], [1], [os.fsdecode(b"\xe9t\xe9"), "x"])  # no font has such letters
    assert figures[3].get_suptitle() == "caf?" and figures[3].subfigs[0].axes[0].get_yticklabels()[0].get_text() == "?t? (1)"

@needs_shared
def test_the_grids_picture_is_upright_as_the_models_see_it(tmp_path, figures):
    clip = f"{SHARED}/videos/rot90.mov"
    grid.main([clip, str(tmp_path / "a.png")])
    first = torch.from_numpy(data.read_frames(clip, [0]))[0]
    image, texts = shown(figures[0].subfigs[0])[0]
    (H, W), side = first.shape[:2], len(image)
    assert H > W and side == W == image.shape[1]  # the middle square of a tall frame
    assert texts == ["0"] and np.array_equal(image, first[(H - side) // 2:(H + side) // 2])

def video_of(path, number):
    data.write_video(str(path), numbered_frames(number))
    return str(path)

# ---------------------------------------------------------------- README.md

def test_the_readmes_table_from_paper_to_code_names_what_is_there():
    section = open(script("README.md")).read().split("## From the paper to the code")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 12
    for row in rows:
        module = None
        for name in re.findall(r"`([\w.]+)`", row):  # after the first, a name may stand without its file
            file, _, attribute = name.rpartition(".")
            module = sys.modules[file] if file else module
            assert hasattr(module, attribute), name

def test_the_readme_names_options_that_are_there(capsys):
    known = set()
    for main in (train.main, evaluate.main, data.main, models.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    elsewhere = ("--nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --max-restarts --signals-to-handle --standalone --thorough"
                 " --nodes --ntasks-per-node --gpus-per-node --signal").split()  # torchrun's, pytest's and Slurm's
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", open(script("README.md")).read()))
    assert len(named) > 30 and named <= known | set(elsewhere), named - known - set(elsewhere)

def test_the_readmes_links_lead_somewhere():
    readme = open(script("README.md")).read()
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in readme.splitlines() if line.startswith("#")}
    anchors, files = re.findall(r"\]\(#([^)]+)\)", readme), re.findall(r'(?:\]\(|src=")(assets/[^)"]+)', readme)
    assert len(anchors) > 6 and set(anchors) <= headings
    assert len(files) == 3 and all(os.path.getsize(script(file)) < 100_000 for file in files)

def test_the_readmes_python_runs(micro, tmp_path, monkeypatch, capsys):
    code = open(script("README.md")).read().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    train.main(SMALL + ["--root", micro, "--epochs", "1"])
    shutil.copy(data.find_videos("folder", micro).val[0][0], "clip.mp4")
    capsys.readouterr()
    variables = {}
    exec(code, variables)
    assert capsys.readouterr().out.strip() in variables["info"]["run"]["classes"]
    assert variables["y_sp"].shape == variables["y_tp"].shape == (1, 128)
    log = [json.loads(line) for line in open("runs/folder-dualpath-s0/log.jsonl")]  # what pandas reads with lines=True
    assert len(log) == 1 and all(not isinstance(value, (list, dict)) for value in log[0].values())

def script(name):
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), name)

# ---------------------------------------------------------------- adapters.py

def test_adapter_is_its_equation_and_starts_as_nothing():
    A = adapters.Adapter(12, 5).double().eval()
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    assert (A(x) == 0).all() and A.down.weight.abs().max() > 0
    randomise(A)
    hidden = x @ A.down.weight.T + A.down.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(A(x), gelu @ A.up.weight.T + A.up.bias)
    assert A.train()(x).ne(A(x)).any()  # dropout

def naive_MHA(block, x, heads):
    """Attention from its definition, for the weights of an open_clip block of either kind."""
    a = block.attn
    q, k, v = (x @ a.in_proj_weight.T + a.in_proj_bias).chunk(3, -1)
    split = lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split(q) @ split(k).transpose(-1, -2) / (x.shape[-1] // heads) ** 0.5
    h = (scores.softmax(-1) @ split(v)).transpose(1, 2).flatten(2) @ a.out_proj.weight.T + a.out_proj.bias
    h = getattr(block, "ln_attn", torch.nn.Identity())(h)
    return h * getattr(block.ls_1, "gamma", 1)

def naive_MLP(block, x):
    hidden = F.gelu(x @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias)
    return (hidden @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias) * getattr(block.ls_2, "gamma", 1)

def frozen_block(kind):
    from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
    if kind == "custom":
        return randomise(CustomResidualAttentionBlock(24, 3, ls_init_value=0.5, scale_attn=True)).double().requires_grad_(False)
    return randomise(ResidualAttentionBlock(24, 3, ls_init_value=0.5 if kind == "layer scale" else None)).double().requires_grad_(False)

@pytest.mark.parametrize("kind", ["plain", "layer scale", "custom"])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_block_is_the_papers_equations(kind, pre, skip):
    block = frozen_block(kind)
    adapted = randomise(adapters.DualPathBlock(24, 8, pre_attention_adapter=pre, serial_skip=skip)).double().eval()
    x, z = torch.randn(6, 5, 24, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    got_x, got_z = adapted(block, x, z)
    A = adapted

    u = block.ln_1(x)
    x = x + naive_MHA(block, u, 3) + A.A_s1(u)
    u = block.ln_2(x)
    x = x + naive_MLP(block, u) + A.A_s2(u)

    v = block.ln_1(z)
    h = naive_MHA(block, A.A_t0(v) if pre else v, 3)
    z = z + A.A_t1(h) + (h if skip else 0)
    h = naive_MLP(block, block.ln_2(z))
    z = z + A.A_t2(h) + (h if skip else 0)
    torch.testing.assert_close(got_x, x)
    torch.testing.assert_close(got_z, z)

def test_new_block_is_the_image_models_on_one_path_and_the_identity_on_the_other():
    block = frozen_block("plain")
    x, z = torch.randn(4, 5, 24, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    new_x, new_z = adapters.DualPathBlock(24, 8).double()(block, x, z)
    torch.testing.assert_close(new_x, block(x))
    assert torch.equal(new_z, z)
    _, new_z = adapters.DualPathBlock(24, 8, serial_skip=True).double()(block, x, z)
    torch.testing.assert_close(new_z, block(z))

@pytest.mark.parametrize("paths", ["spatial", "temporal"])
def test_block_of_one_path_is_that_path_of_both(paths):
    block = frozen_block("plain")
    both = randomise(adapters.DualPathBlock(24, 8)).double().eval()
    one = adapters.DualPathBlock(24, 8, paths=paths).double().eval()
    one.load_state_dict({k: v for k, v in both.state_dict().items() if k in one.state_dict()})
    assert 0 < len(list(one.parameters())) == len(list(both.parameters())) // 2
    x, z = torch.randn(4, 5, 24, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    want = both(block, x, z)
    got = one(block, x if paths == "spatial" else x[:0], z if paths == "temporal" else z[:0])
    for g, w in zip(got, want):
        assert len(g) == 0 or torch.allclose(g, w)
    assert sorted(map(len, got)) == sorted([0, 4 if paths == "spatial" else 2])

def naive_vpt(A, block, x, MHA, MLP):
    """With the prompts' own outputs, which are dropped at the end."""
    y = torch.cat([x[:, :1], A.prompt_embedding.expand(len(x), -1, -1), x[:, 1:]], 1)  # where theirs stand
    y = y + MHA(block.ln_1(y))
    y = y + MLP(block.ln_2(y))
    return torch.cat([y[:, :1], y[:, 1 + len(A.prompt_embedding):]], 1)

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
            mixed[:, r * side + c] += A.conv.weight[:, 0, i + 2, j + 2] * hidden[:, (r + i) * side + c + j]
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
    u, x = block.ln_1(x), x.clone()
    for clip, token in itertools.product(range(0, len(x), 3), range(x.shape[1])):
        x[clip:clip + 3, token] += A.A_t(MHA(u[None, clip:clip + 3, token]))[0]
    h = MHA(block.ln_1(x))
    x = x + h + A.A_s(h)
    u = block.ln_2(x)
    return x + MLP(u) + 0.5 * A.A_m(u)

@pytest.mark.parametrize("kind", ["plain", "layer scale", "custom"])
@pytest.mark.parametrize("method, options", [("vpt", {}), ("adaptformer", {}), ("protuning", {}), ("aim", {}),
                                             *[("st_adapter", dict(before=before)) for before in ("mha", "mlp", "both")]])
def test_other_blocks_are_their_papers_equations(method, options, kind):
    block, x = frozen_block(kind), torch.randn(6, 10, 24, dtype=torch.float64)  # two clips of three frames of 3x3 patches
    new = adapters.FRAME_METHODS[method](24, 3, 8, dropout=0.1, **options).double()
    if method != "vpt":
        torch.testing.assert_close(new(block, x), block(x))  # dropout is on: a new adapter adds exactly nothing
    randomise(new).eval()
    MHA, MLP = lambda x: naive_MHA(block, x, 3), lambda x: naive_MLP(block, x)
    got, want = new(block, x), globals()[f"naive_{method}"](new, block, x, MHA, MLP)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, block(x), atol=1e-3)
    assert new.train()(block, x).ne(got).any()  # dropout

def test_prompts_start_in_vpts_range_and_are_dropped_in_each_image_anew():
    block, vpt = frozen_block("plain"), adapters.VPTBlock(768, 3)
    bound = math.sqrt(6 / (3 * 16**2 + 768))
    assert vpt.prompt_embedding.shape == (50, 768) and 0.99 * bound < vpt.prompt_embedding.abs().max() <= bound
    vpt = adapters.VPTBlock(24, 3, prompts=4, dropout=0.5).double().train()
    y = vpt(block, torch.randn(1, 10, 24, dtype=torch.float64).expand(2, -1, -1))
    assert not torch.allclose(y[0], y[1])

def test_an_unknown_place_of_an_adapter_is_refused():
    with pytest.raises(ValueError, match="before is 'x'"):
        adapters.STAdapterBlock(24, 3, before="x")

@pytest.mark.parametrize("kind", ["gelu", "quick", "layer scale", "custom", "inner norm"])
@pytest.mark.parametrize("training", [True, False])
def test_frozen_parts_give_what_open_clips_modules_give(kind, training):
    from open_clip.transformer import CustomResidualAttentionBlock, LayerNormFp32, QuickGELU, ResidualAttentionBlock
    block = {"gelu": lambda: ResidualAttentionBlock(24, 3), "quick": lambda: ResidualAttentionBlock(24, 3, act_layer=QuickGELU),
             "layer scale": lambda: ResidualAttentionBlock(24, 3, ls_init_value=0.5, act_layer=QuickGELU),
             "custom": lambda: CustomResidualAttentionBlock(24, 3, scale_attn=True, act_layer=QuickGELU),
             "inner norm": lambda: CustomResidualAttentionBlock(24, 3, scale_fc=True, act_layer=QuickGELU)}[kind]()
    block = randomise(block).double().requires_grad_(False).eval()
    attention = getattr(block, "attention", None) or (lambda x: block.ln_attn(block.attn(x)))
    x = torch.randn(4, 5, 24, dtype=torch.float64, requires_grad=training)
    for ours, theirs in ((lambda: adapters.MHA(block, x), lambda: block.ls_1(attention(x))),
                         (lambda: adapters.MLP(block, x), lambda: block.ls_2(block.mlp(x))),
                         (lambda: adapters.LN(block.ln_1, x), lambda: block.ln_1(x))):
        with torch.set_grad_enabled(training):
            got, want = ours(), theirs()
        torch.testing.assert_close(got, want)
        if training:
            weight = torch.randn_like(want)
            torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)))

def test_an_mlp_that_is_trained_gets_its_gradients():
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock
    block = ResidualAttentionBlock(24, 3, act_layer=QuickGELU)
    adapters.MLP(block, torch.randn(2, 5, 24)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in block.mlp.parameters())

def kept_for_backward(work):
    """The storages that work() keeps for its backward, as {address: (bytes, dtype)}, without parameters."""
    kept = {}
    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not (tensor._base is not None and isinstance(tensor._base, torch.nn.Parameter)):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = (storage.nbytes(), tensor.dtype)
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    return kept, result

def test_a_training_step_keeps_little():
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock
    d, block = 96, randomise(ResidualAttentionBlock(96, 3, act_layer=QuickGELU)).requires_grad_(False)
    adapted = adapters.DualPathBlock(d, 16)
    x, z = torch.randn(16, 50, d, requires_grad=True), torch.randn(4, 50, d, requires_grad=True)
    kept, _ = kept_for_backward(lambda: adapted(block, x, z))
    # In units of all tokens: q, k, v, their attention, the MLP's hidden 4; x, z and what LN makes of x twice; inputs of A_t; and
    # the adapters' own 2/6 of what they see, three times with dropout. Anything more is something that need not be kept.
    assert sum(n for n, _ in kept.values()) / (20 * 50 * d * 4) <= 4 + 4 + 2 * (1 + 0.8 + 0.2) + 3 * 2 / 6 + 0.1

# ---------------------------------------------------------------- adapters.py: what it costs

def test_steps_take_turns_and_the_first_round_does_not_count(monkeypatch):
    calls = []
    steps = {"a": lambda: calls.append("a") or time.sleep(0.02 if len(calls) > 3 else 1), "b": lambda: calls.append("b"),
             "c": lambda: calls.append("c")}
    seconds = adapters.take_turns(steps, 4)
    rounds = [calls[i:i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 5 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert {k: len(v) for k, v in seconds.items()} == dict(a=4, b=4, c=4)
    assert all(0.02 <= s < 0.9 for s in seconds["a"]) and min(seconds["b"]) < 0.02

@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak of memory")
def test_peak_memory_is_what_was_taken_at_once():
    def work(at_once):
        for _ in range(2):
            held = [torch.ones(1 << 20) for _ in range(at_once)]  # 4 MiB each
            del held
    for at_once in (100, 200, 100):
        assert adapters.peak_memory(lambda: work(at_once)) == pytest.approx(at_once * 2**22, rel=0.15)

def test_the_benchmark_measures_next_to_the_plain_model(tmp_path, capsys):
    models.main(["--backbone", "tiny", "--frames", "16", "32", "--bench", "--rounds", "1", "--json", str(tmp_path / "a.json")])
    out, result = capsys.readouterr().out, json.load(open(tmp_path / "a.json"))
    rows = result["rows"]
    assert (result["batch"], result["rounds"], result["compile"], result["type"]) == (1, 1, False, "torch.float32")
    assert [(r["method"], r["T"], r["images"]) for r in rows] == [
        ("dualpath", 16, 9), ("dualpath", 32, 10), ("dualpath+A_t0", 32, 10), *[(m, 8, 8) for m in models.METHODS[1:]],
        ("aim", 16, 16), ("aim", 32, 32)]
    assert all(f"{row['train ratio']:.5g}" in out and f"{row['GMACs/view']:.5g}" in out for row in rows) and "AIM" in out and rows[0]["growth"] == 1
    for row in rows:
        for kind in ("forward", "train"):  # of a single round
            assert row[f"{kind} ratio"] == pytest.approx(row[f"plain {kind}/s"] / row[f"{kind}/s"], rel=1e-3, abs=1e-3)
        assert row["growth"] == pytest.approx(rows[0]["forward/s"] / row["forward/s"], rel=1e-3, abs=1e-3) and row["use"] > 0
        assert sys.platform != "linux" or row["GB/clip"] > 4e-3 * row["all M"] and row["plain GB"] > 3e-3  # the weights alone

# ---------------------------------------------------------------- model.py: the video models

@pytest.mark.parametrize("backbone", ["tiny", "random", "no ln_pre, layer scale"])
def test_spatial_feature_starts_as_open_clips_own(backbone, tmp_path):
    options = dict(TINY)
    if backbone != "tiny":
        vision = dict(no_ln_pre=True, ls_init_value=0.3) if "," in backbone else {}
        options.update(backbone=vit_folder(tmp_path, quick_gelu=True, **vision), pretrained=None)
    model = models.build_model(**options)  # in train mode: the adapters' dropout is on, the image model's is not
    video = random_video(size=model.visual.image_size[0])
    y_sp, y_tp = model.features(video)

    if backbone == "tiny":
        clip = open_clip.create_model_and_transforms(models.BACKBONES["tiny"])[0]
    else:
        clip = open_clip.create_model(options["backbone"])
        clip.visual.load_state_dict(model.visual.state_dict())
    images = video[:, [0, 4, 8, 12]].flatten(0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.visual.image_mean, clip.visual.image_std))
    want = clip.eval().encode_image((images - mean) / std).view(2, 4, -1).mean(1)
    assert y_sp.shape == y_tp.shape == want.shape
    assert ((y_sp - want).norm() / want.norm()).item() <= 1e-5

def test_temporal_path_starts_with_the_framesets_tokens_and_positions():
    model = models.build_model(**TINY, position_scale=0.3)
    video = random_video()
    v = model.visual
    images = (grid.frameset(video.float())[:, 0] / 255 - 0.5) / 0.5
    patches = F.conv2d(images, v.conv1.weight, stride=8).flatten(2).transpose(1, 2)
    code = 0.3 * grid.position_code(1, 64, 64, 8, 128)[0]
    cls = (v.class_embedding + v.positional_embedding[0]).expand(2, 1, -1)
    z = v.ln_pre(torch.cat([cls, patches + code], 1))
    want = v.ln_post(z[:, 0]) @ v.proj  # the blocks are the identity
    torch.testing.assert_close(model.features(video)[1], want, rtol=1e-4, atol=1e-5)
    assert not any("temporal_position" in k for k in model.state_dict())

def test_framesets_positions_differ_and_each_is_used(tmp_path):
    options = dict(TINY, backbone=vit_folder(tmp_path), pretrained=None, num_frames=32)
    model = randomise(models.build_model(**options)).eval()
    video = random_video(1, 16, 32)
    forward, backward = torch.cat([video, 255 - video], 1), torch.cat([255 - video, video], 1)
    assert model.temporal_position.shape[0] == 2
    assert not torch.allclose(model.features(forward)[1], model.features(backward)[1], atol=1e-4)

@pytest.mark.parametrize("options", [dict(pre_attention_adapter=True), dict(serial_skip=True), dict(paths="spatial"),
                                     dict(paths="temporal"), *[dict(method=m) for m in models.METHODS[1:]],
                                     dict(method="st_adapter", before="both")])
def test_gradients_reach_what_is_trained_and_nothing_else(options):
    model = randomise(models.build_model(**TINY, **options))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    F.cross_entropy(model(random_video(4)), torch.arange(4)).backward()
    unread = {"protuning": ("blocks.3.",), "st_adapter": ("blocks.3.A_2.",)}.get(options.get("method"), ())  # only patches change
    for name, p in model.named_parameters():
        reached = not name.startswith(unread) if unread else True
        assert (p.grad is not None and (p.grad.abs().max() > 0) == reached) if p.requires_grad else p.grad is None, name
    tuned = {n for n, p in model.named_parameters() if p.requires_grad}
    own = {n for n in tuned if n.startswith("visual.")}
    paths = options.get("paths", "both")
    if options.get("method", "full") != "full":
        assert not own and ("temporal_embedding" in tuned) == (options["method"] == "aim")
        assert {"head.weight", "head.bias"} == {n for n in tuned if not n.startswith(("blocks.", "temporal_embedding"))}
        assert any(n.startswith("blocks.3.") for n in tuned) == (options["method"] != "linear")
    elif options.get("method") != "full":
        assert own == (set() if paths == "temporal" else {"visual.class_embedding", "visual.positional_embedding"})
        assert ("temporal_class_embedding" in tuned) == (paths != "spatial")
        assert any(".A_t" in n for n in tuned) == (paths != "spatial") and any(".A_s" in n for n in tuned) == (paths != "temporal")
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

def test_paths_and_clips_do_not_leak_into_each_other():
    model = randomise(models.build_model(**TINY)).eval()
    video = random_video(3)
    y_sp, y_tp = model.features(video)
    unseen = video.clone()
    unseen[1, 1::4] = 255 - unseen[1, 1::4]  # the spatial path of clip 1 does not see these frames
    new_sp, new_tp = model.features(unseen)
    same = lambda a, b: torch.allclose(a, b, atol=1e-5)
    assert same(new_sp, y_sp) and not same(new_tp[1], y_tp[1])
    assert same(new_tp[[0, 2]], y_tp[[0, 2]])
    with torch.no_grad():
        model.visual.positional_embedding += torch.randn(65, 128)  # p^SP is the spatial path's alone
        new_sp, new_tp = model.features(video)
        assert same(new_tp, y_tp) and not same(new_sp, y_sp)
        model.temporal_class_embedding += torch.randn(128)
        last_sp, last_tp = model.features(video)
    assert same(last_sp, new_sp) and not same(last_tp, new_tp)

@pytest.mark.parametrize("method", models.METHODS)
def test_shuffled_frames_change_what_knows_time_and_nothing_else(method):
    frames = 16 if method == "dualpath" else 4  # the others see all frames
    model = randomise(models.build_model(**dict(TINY, num_frames=frames, method=method))).eval()
    video, order = random_video(2, frames), torch.arange(frames).roll(1).view(2, -1).T.flatten()
    with torch.no_grad():
        want, got = model(video), model(video[:, order])
    difference = ((got - want).norm() / want.norm()).item()
    assert difference > 1e-3 if method in ("st_adapter", "aim", "dualpath") else difference <= 1e-5

@pytest.mark.parametrize("method", [m for m in models.METHODS if m not in ("dualpath", "vpt")])
def test_a_new_model_has_the_image_models_features(method):
    video, new = random_video(), models.build_model(**dict(TINY, method=method))
    with torch.no_grad():  # in train mode, with dropout
        torch.testing.assert_close(new.features(video)[0], models.build_model(**dict(TINY, method="linear")).features(video)[0])

def test_a_width_is_the_methods_own_if_none_is_given():
    for method, width in (("dualpath", 128), ("vpt", 50), ("adaptformer", 64), ("protuning", 32), ("st_adapter", 384), ("aim", 32)):
        for given in (None, 7):
            weights = models.build_model(**dict(TINY, method=method, bottleneck=given)).state_dict()
            first = next(w for k, w in weights.items() if k.startswith("blocks.0.") and k.endswith(("down.weight", "prompt_embedding")))
            assert first.shape == (given or width, 128)

def test_aim_knows_time_by_its_temporal_embedding_alone():
    model = randomise(models.build_model(**dict(TINY, num_frames=4, method="aim"))).eval()
    video = random_video(2, 4)
    with torch.no_grad():
        model.temporal_embedding.zero_()
        torch.testing.assert_close(model(video), model(video.flip(1)), atol=1e-5, rtol=1e-5)
        model.temporal_embedding[1] = torch.randn(128)
        moved, logits = torch.cat([video[:, 1:], video[:, :1]], 1), model(video)
        assert not torch.allclose(model(moved), logits, atol=1e-3)

@pytest.mark.parametrize("method, frames, backbone, tuned, gmacs", [
    ("aim", 8, "ViT-B-16-quickgelu", 11, 606 / 3), ("aim", 16, "ViT-B-16-quickgelu", 11, 1214 / 3),
    ("aim", 32, "ViT-B-16-quickgelu", 11, 2428 / 3),
    ("aim", 8, "ViT-L-14-quickgelu", 38, 5604 / 6),  # their 2902 for 8 frames is more than half of their 5604 for 16
    ("aim", 16, "ViT-L-14-quickgelu", 38, 5604 / 3),
    ("aim", 32, "ViT-L-14-quickgelu", 38, 11208 / 3), ("st_adapter", 8, "ViT-B-16-quickgelu", 7.1 + 0.2, 152)])
def test_other_methods_weights_and_costs_are_their_papers(method, frames, backbone, tuned, gmacs):
    with torch.device("meta"):
        cost = adapters.count(models.build_model(method, 400, backbone, None, frames, frames))
    assert cost["GMACs/view"] == pytest.approx(gmacs, rel=0.005) and cost["images"] == frames
    assert abs(cost["tuned M"] - tuned) <= (0.5 if method == "aim" else 0.05)  # "11 M"; 7.1 M without the head's 0.2

def test_a_still_is_a_clip_of_one_frame():
    model = models.build_model(**dict(TINY, method="full", num_frames=1, spatial_frames=1))
    assert model(random_video(2, 1)).shape == (2, 8)

def test_the_image_models_own_dropout_stays_off(tmp_path):
    options = dict(TINY, backbone=vit_folder(tmp_path, patch_dropout=0.5), pretrained=None, dropout=0.0)
    model = models.build_model(**options).train()
    video = random_video(size=32)
    assert model.training and torch.equal(model(video), model(video))

@pytest.mark.parametrize("backbone, classes, pre, tuned", [
    ("ViT-B-16-quickgelu", 400, False, 10.36), ("ViT-L-14-quickgelu", 400, False, 27.03),
    ("ViT-B-16-quickgelu", 174, True, 12.62), ("ViT-L-14-quickgelu", 174, True, 33.17)])
def test_tuned_parameters_are_the_papers(backbone, classes, pre, tuned):
    with torch.device("meta"):
        model = models.build_model(backbone=backbone, pretrained=None, num_classes=classes, pre_attention_adapter=pre)
    assert round(adapters.count(model)["tuned M"], 2) == tuned

@pytest.mark.parametrize("backbone, frames, gmacs", [
    ("ViT-B-16-quickgelu", 16, 166), ("ViT-B-16-quickgelu", 32, 185), ("ViT-B-16-quickgelu", 48, 203),
    ("ViT-L-14-quickgelu", 16, 758), ("ViT-L-14-quickgelu", 32, 842), ("ViT-L-14-quickgelu", 48, 927)])
def test_multiply_accumulates_grow_by_one_image_per_16_frames(backbone, frames, gmacs):
    with torch.device("meta"):
        model = models.build_model(backbone=backbone, pretrained=None, num_frames=frames)
        assert adapters.count(model)["GMACs/view"] == pytest.approx(gmacs, rel=0.01)

def test_the_reports(capsys):
    models.main(["--backbone", "tiny", "--frames", "16"])
    assert "dualpath" in capsys.readouterr().out
    adapters.main()
    rows = dict(line.strip().rsplit("  ", 1) for line in capsys.readouterr().out.splitlines()[1:])
    rows = {" ".join(name.split()): float(tuned.split()[0]) for name, tuned in rows.items()}
    assert rows["ViT-B dualpath"] == 9.48 and rows["ViT-B adaptformer"] == 1.19 and rows["ViT-B st_adapter"] == 7.11
    assert rows["ViT-L aim"] == 37.84 and rows["ViT-B st_adapter, both"] == 14.22 and rows["ViT-B vpt"] == 0.46

def loss_and_gradients(model, video, dtype=None):
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = F.cross_entropy(model(video).float(), torch.arange(len(video)))
    tuned = [p for p in model.parameters() if p.requires_grad]
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuned)])

@pytest.mark.parametrize("method", ["dualpath", *models.METHODS[2:]])
def test_checkpointed_activations_change_nothing_but_what_is_kept(method):
    model, video = randomise(models.build_model(**dict(TINY, method=method))), random_video()
    kept, want = kept_for_backward(lambda: loss_and_gradients(model, video))
    assert adapters.prepare(model, checkpoint_activations=True) is model
    kept_less, got = kept_for_backward(lambda: loss_and_gradients(model, video))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])  # dropout, too
    x = video.shape[0] * model.images * 65 * 128 * 4  # bytes of all tokens; of four blocks' inputs, 10 % for head and tokens
    assert sum(n for n, _ in kept_less.values()) <= 1.1 * (4 + 3) * x < sum(n for n, _ in kept.values()) / 4

@pytest.mark.parametrize("method", [m for m in models.METHODS if m != "full"])
def test_mixed_precision_holds_frozen_weights_and_activations_in_the_small_type(method, tmp_path):
    model, video = randomise(models.build_model(**dict(TINY, method=method, dropout=0.0))), random_video()
    want, fingerprint = loss_and_gradients(model, video), model.fingerprint
    saved = {k: v.clone() for k, v in models.saved_weights(model).items()}
    adapters.prepare(model, torch.bfloat16)
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    kept, got = kept_for_backward(lambda: loss_and_gradients(model, video, torch.bfloat16))
    assert abs(got[0] - want[0]) <= 0.03 * want[0] and got[1].dtype == torch.float32
    assert F.cosine_similarity(got[1], want[1], dim=0) >= 0.99
    tokens = video.shape[0] * 65 * 128 * 4  # bytes of one image's tokens per clip in float32
    large = [dtype for n, dtype in kept.values() if n >= tokens * 2]
    assert method == "linear" or large.count(torch.bfloat16) > 12 and large.count(torch.float32) <= 2  # those of ln_pre
    assert all(torch.equal(v, saved[k]) for k, v in models.saved_weights(model).items()) and model.fingerprint == fingerprint
    again = models.load_checkpoint(save(model, tmp_path / "a.pt"))[0]
    assert all(p.dtype == torch.float32 for p in again.parameters())

@pytest.mark.parametrize("method, checkpoint_activations", [("dualpath", True), *[(m, False) for m in models.METHODS]])
def test_compiled_blocks_compute_the_same_and_are_not_compiled_again_and_again(method, checkpoint_activations, monkeypatch):
    compile_it = torch.compile  # what differs from --compile is that no compiler for C++ or the GPU is needed
    monkeypatch.setattr(torch, "compile", lambda function: compile_it(function, backend="aot_eager"))
    torch.compiler.reset()
    model, video = randomise(models.build_model(**dict(TINY, method=method, dropout=0.0))), random_video(batch=4)
    want = loss_and_gradients(model, video), model.eval()(video).detach()
    adapters.prepare(model.train(), compile=True, checkpoint_activations=checkpoint_activations)
    torch._dynamo.utils.counters.clear()
    for batch in (4, 3):  # the second makes the batch dynamic
        got = loss_and_gradients(model.train(), video[:batch])
        with torch.no_grad():
            logits = model.eval()(video[:batch])
    torch.testing.assert_close(logits, want[1][:3], rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2 and not torch._dynamo.utils.counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        got = loss_and_gradients(model.train(), video)
        loss_and_gradients(model, video[:2])
        with torch.no_grad():
            assert model.eval()(video[:2]).shape == (2, 8)
    torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-5)
    torch.compiler.reset()

@pytest.mark.parametrize("options", [dict(serial_skip=True, pre_attention_adapter=True), dict(paths="temporal"), dict(method="aim")])
def test_a_model_is_exported_with_any_batch(options):
    model = randomise(models.build_model(**{**TINY, **options})).eval()
    with torch.no_grad():
        exported = torch.export.export(model, (random_video(3),), dynamic_shapes=dict(video={0: torch.export.Dim.DYNAMIC})).module()
        for batch in (1, 3, 5):
            video = random_video(batch)
            torch.testing.assert_close(exported(video), model(video), rtol=1e-4, atol=1e-5)

def test_wrong_video_is_refused():
    model = models.build_model(**TINY)
    for video in (random_video(frames=32), random_video(size=32), random_video().float(), random_video()[0]):
        with pytest.raises(ValueError, match="16, 3, 64, 64"):
            model(video)

def test_another_image_size_interpolates_the_position_embedding():
    model = models.build_model(**TINY, image_size=96)
    assert model.visual.positional_embedding.shape[0] == 1 + 12 * 12
    assert model(random_video(size=96)).shape == (2, 8)

@pytest.mark.parametrize("options, words", [
    (dict(num_frames=20), "20.*16 or 32"), (dict(spatial_frames=3), "16.*3.*15 or 18"), (dict(image_size=72, num_frames=20, rows=5), "72.*5.*70 or 75"),
    (dict(method="magic"), "magic"), (dict(method="linear", paths="spatial"), "spatial")])
def test_wrong_options_get_a_sentence(options, words):
    with pytest.raises(models.ModelError, match=words):
        models.build_model(**{**TINY, **options})

def test_attention_is_that_of_the_last_blocks_class_tokens():
    model = randomise(models.build_model(**TINY)).eval()
    video, inputs = random_video(1), []
    hook = model.blocks[-1].register_forward_pre_hook(lambda _, args: inputs.append(args))
    frames, framesets = models.attention(model, video)
    hook.remove()
    assert frames.shape == (4, 8, 8) and framesets.shape == (1, 8, 8)
    block, *tokens = inputs[0]
    heads = block.attn.num_heads
    for got, x in zip((frames, framesets), tokens):
        q, k, _ = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).unflatten(-1, (3, heads, -1)).unbind(2)
        weights = torch.einsum("nhd,nlhd->nhl", q[:, 0], k) / q.shape[-1] ** 0.5
        weights = weights.softmax(-1).mean(1)[:, 1:]  # of the patches
        torch.testing.assert_close(got.flatten(1), weights / weights.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert torch.equal(model(video), model(video)) and not block.attn._forward_hooks and not block.attn._forward_pre_hooks

@pytest.mark.parametrize("options", [dict(paths="spatial"), dict(paths="temporal"), *[dict(method=m) for m in models.METHODS[1:]]])
def test_attention_of_every_method(options):
    frames, framesets = models.attention(models.build_model(**{**TINY, **options}).eval(), random_video(1))
    assert frames.shape == (4 * (options.get("paths") != "temporal"), 8, 8)
    assert framesets.shape == (1 * (options.get("paths") == "temporal"), 8, 8)
    for look in (frames, framesets):
        torch.testing.assert_close(look.sum((1, 2)), torch.ones(len(look)))
        assert (look > 0).all()

def test_attention_that_keeps_its_weights_is_a_sentence(tmp_path):
    folder = vit_folder(tmp_path / "custom", block_type="custom", scale_attn=True)
    model = models.build_model(**dict(TINY, backbone=folder, pretrained=None)).eval()
    with pytest.raises(models.ModelError, match="custom.*does not tell its weights"):
        models.attention(model, random_video(1, size=32))
    with pytest.raises(models.ModelError, match="on meta does not tell its weights"):
        models.attention(models.build_model(**TINY), random_video(1).to("meta"))

# ---------------------------------------------------------------- model.py: the image model's weights

@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("this must be refused before anything is built or downloaded")
    monkeypatch.setattr(open_clip, "create_model", refuse)

@pytest.mark.parametrize("backbone, tag, words", [
    ("ViT-B-16", "openai", "QuickGELU.*ViT-B-16-quickgelu"), ("ViT-L-14", "dfn2b", "ViT-L-14-quickgelu"),
    ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "with GELU.*--backbone ViT-B-16$"), ("ViT-B-16", "nonsense", "nonsense.*openai"),
    ("ViT-B-61", "openai", "ViT-B-16"), ("RN50", "openai", "class token"), ("ViT-B-16-SigLIP", "webli", "class token"),
    ("coca_ViT-B-32", "laion2b_s13b_b90k", "class token"), ("local-dir:/no/where", "openai", "/no/where")])
def test_weights_and_backbones_that_do_not_belong_together_are_refused_at_once(backbone, tag, words, offline):
    with pytest.raises(models.ModelError, match=words):
        models.build_model(backbone=backbone, pretrained=tag)

def test_without_a_network_the_sentence_says_what_to_do(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known\nand forty more lines")
    monkeypatch.setattr(open_clip, "create_model", no_network)
    with pytest.raises(models.ModelError, match="without a network.*--pretrained PATH.*not known") as error:
        models.build_model(pretrained="openai")
    assert "forty" not in str(error.value) and "download https://openaipublic.azureedge.net/clip/models/" in str(error.value)
    with pytest.raises(models.ModelError, match="download https://huggingface.co/laion/CLIP-ViT-B-16.* elsewhere"):
        models.build_model(backbone="ViT-B-16", pretrained="laion2b_s34b_b88k")
    with pytest.raises(models.ModelError, match="cannot load the image model 'tiny': Name"):
        models.build_model(**TINY)

def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(models.ModelError, match="could not be loaded"):
        models.build_model(backbone=vit_folder(tmp_path), pretrained="openai")

@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    """A small model under a name that open_clip knows, so that --pretrained PATH can be tried."""
    folder = tmp_path_factory.mktemp("config")
    vision = dict(image_size=32, layers=2, width=48, head_width=16, patch_size=8)
    with open(folder / "small-vit.json", "w") as file:
        json.dump(dict(embed_dim=24, vision_cfg=vision, text_cfg=models.NO_TEXT), file)
    open_clip.add_model_config(folder / "small-vit.json")
    return "small-vit"

class Holder(torch.nn.Module):
    """A module with the state of a CLIP, to be scripted as OpenAI's archives are."""

    def __init__(self, clip):
        super().__init__()
        self.visual, self.logit_scale = torch.nn.Module(), clip.logit_scale
        for name, p in clip.visual.named_parameters():
            *path, last = name.split(".")
            module = self.visual
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, torch.nn.Parameter(p.detach().half()))
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self):
        return self.logit_scale

@pytest.mark.parametrize("kind", ["clip.pt", "tower.bin", "training.pt", "clip.safetensors", "torchscript.pt"])
def test_weights_come_from_local_files(kind, builtin, tmp_path, capsys):
    clip = open_clip.create_model(builtin)
    path, whole, tower = str(tmp_path / kind), clip.state_dict(), clip.visual.state_dict()
    if kind == "clip.safetensors":
        safetensors.torch.save_file(whole, path)
    elif kind == "torchscript.pt":
        torch.jit.script(Holder(clip)).save(path)
        tower = {k: v.half().float() for k, v in tower.items()}
    else:
        torch.save({"clip.pt": whole, "tower.bin": tower,
                    "training.pt": dict(epoch=3, state_dict={f"module.{k}": v for k, v in whole.items()})}[kind], path)
    model = models.build_model(**dict(TINY, backbone=builtin, pretrained=path))
    assert all(torch.equal(v, tower[k]) for k, v in model.visual.state_dict().items())
    assert "uses GELU" in capsys.readouterr().out

@pytest.mark.parametrize("spoil, words", [
    (lambda s: s.pop("proj"), "proj is missing"), (lambda s: s.update(extra=torch.zeros(1)), "extra is too many"),
    (lambda s: s.update(proj=torch.zeros(48, 25)), r"proj has shape \(48, 25\), not \(48, 24\)")])
def test_files_that_do_not_fit_are_refused(spoil, words, builtin, tmp_path):
    state = open_clip.create_model(builtin).visual.state_dict()
    spoil(state)
    torch.save(state, tmp_path / "tower.pt")
    with pytest.raises(models.ModelError, match=words):
        models.build_model(**dict(TINY, backbone=builtin, pretrained=str(tmp_path / "tower.pt")))

@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin"])
def test_a_file_that_holds_no_weights_is_refused(name, builtin, tmp_path):
    (tmp_path / name).write_text("not weights")
    with pytest.raises(models.ModelError, match="cannot read weights"):
        models.build_model(**dict(TINY, backbone=builtin, pretrained=str(tmp_path / name)))

@needs_shared
def test_real_pretrained_weights_load():
    backbone = f"local-dir:{SHARED}/weights/vit_tiny_in21k"
    model = models.build_model(backbone=backbone, num_frames=16).eval()
    clip = open_clip.create_model_and_transforms(backbone)[0].eval()
    video = random_video(1, 16, 224)
    with torch.no_grad():
        want = clip.encode_image((video[0, ::2] / 255 - 0.5) / 0.5).mean(0)
        assert (model.features(video)[0][0] - want).norm() / want.norm() <= 1e-5

# ---------------------------------------------------------------- model.py: checkpoints

def class_names(model):
    return [f"class {i}" for i in range(model.config["num_classes"])]

def save(model, path, **run):
    models.save_checkpoint(str(path), model, dict(classes=class_names(model), **run))
    return str(path)

@pytest.mark.parametrize("options", [*[dict(method=m) for m in models.METHODS], dict(paths="temporal"), dict(pretrained=None),
                                     dict(method="st_adapter", before="both")])
def test_checkpoint_round_trip_gives_identical_logits(options, tmp_path):
    model = randomise(models.build_model(**{**TINY, **options})).eval()
    path = save(model, tmp_path / "a.pt", views=(3, 1))
    again, content = models.load_checkpoint(path)
    video = random_video()
    assert torch.equal(model(video), again(video)) and not again.training
    assert content["run"] == dict(classes=class_names(model), views=(3, 1)) and again.config == {**content["model"], "pretrained": again.config["pretrained"]}
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert (set(frozen) <= set(content["weights"])) == (options.get("pretrained", "") is None or not frozen)
    assert not os.path.exists(path + ".tmp")

def test_a_kinetics_checkpoint_is_small(tmp_path):
    model = models.build_model(pretrained=None)
    model.config["pretrained"] = "openai"  # as it would be, with weights that need not be saved
    assert os.path.getsize(save(model, tmp_path / "a.pt")) <= 45e6

def test_other_frozen_weights_are_refused(tmp_path):
    path = save(models.build_model(**TINY), tmp_path / "a.pt")
    other = tmp_path / "other"
    shutil.copytree(models.BACKBONES["tiny"].removeprefix("local-dir:"), other)
    assert models.load_checkpoint(path, backbone=f"local-dir:{other}")
    state = safetensors.torch.load_file(other / "open_clip_model.safetensors")
    state["visual.proj"][3, 5] += 1e-3
    safetensors.torch.save_file(state, other / "open_clip_model.safetensors")
    with pytest.raises(models.ModelError, match="other frozen weights"):
        models.load_checkpoint(path, backbone=f"local-dir:{other}")

def test_one_flipped_bit_is_refused(tmp_path):
    path = save(models.build_model(**dict(TINY, method="linear")), tmp_path / "a.pt")
    whole = open(path, "rb").read()
    for place in [0, 40, *np.random.default_rng(0).integers(0, len(whole), 20), len(whole) - 1]:
        spoilt = bytearray(whole)
        spoilt[place] ^= 1
        open(path, "wb").write(spoilt)
        with pytest.raises(models.ModelError, match="damaged"):
            models.load_checkpoint(path)
    for length in (0, 10, 100, len(whole) // 2, len(whole) - 1):
        open(path, "wb").write(whole[:length])
        with pytest.raises(models.ModelError, match="damaged"):
            models.load_checkpoint(path)
    with pytest.raises(models.ModelError, match="no checkpoint"):
        models.load_checkpoint(str(tmp_path / "b.pt"))

class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.folder,)

def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    Evil.folder = str(tmp_path / "hacked")
    path = str(tmp_path / "a.pt")
    torch.save(dict(format=1, model=Evil()), path)
    body = open(path, "rb").read()
    open(path, "ab").write(models.MARK + hashlib.sha256(body).hexdigest().encode())
    with pytest.raises(models.ModelError, match="refused"):
        models.load_checkpoint(path)
    assert not os.path.exists(Evil.folder)
    pickle.loads(pickle.dumps(Evil()))  # it would have run
    assert os.path.exists(Evil.folder)

def test_a_failed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model = models.build_model(**dict(TINY, method="linear"))
    path = save(model, tmp_path / "a.pt")
    before = open(path, "rb").read()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(models.ModelError, match="cannot write .*a.pt, which stays as it was: No space left on device"):
        save(randomise(model), path)
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["a.pt"]
    monkeypatch.undo()
    smaller = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, smaller[1]))  # a real one
    try:
        with pytest.raises(models.ModelError, match="File too large"):
            save(randomise(model), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, smaller)
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["a.pt"]
    with pytest.raises(models.ModelError, match="No such file"):
        save(model, tmp_path / "absent" / "a.pt")

# ---------------------------------------------------------------- data.py

def numbered_frames(number, height=48, width=64):
    """Frames whose number can be read back from their brightness, in 8 blocks for 8 bits."""
    bits = (np.arange(number)[:, None] >> np.arange(8)) & 1
    blocks = np.repeat(bits * 200 + 20, width // 8, axis=1)
    return np.broadcast_to(blocks[:, None, :, None], (number, height, width, 3)).astype(np.uint8)

def count_frames(path):
    counts = []
    data.read_frames(path, lambda count: counts.append(count) or [0])
    return counts[0]

def read_numbers(frames):
    middle = frames.mean(axis=(1, 3)).reshape(len(frames), 8, -1).mean(-1)
    return ((middle > 120) << np.arange(8)).sum(1).tolist()

def test_frames_are_the_ones_asked_for(tmp_path):
    path = str(tmp_path / "a #1: [x].mp4")
    data.write_video(path, numbered_frames(100))
    assert count_frames(path) == 100
    wanted = [99, 0, 7, 7, 50, 3]
    frames = data.read_frames(path, wanted)
    assert frames.shape == (6, 48, 64, 3) and frames.dtype == np.uint8 and read_numbers(frames) == wanted
    assert read_numbers(data.read_frames(path, lambda n: [n - 1, n // 2])) == [99, 50]
    for bad in (-1, 100):
        with pytest.raises(data.VideoError, match=f"100 frames, so no frame {bad}"):
            data.read_frames(path, [0, bad])

def test_what_is_no_video_is_one_kind_of_error(tmp_path):
    path = str(tmp_path / "a.mp4")
    data.write_video(path, numbered_frames(30))
    whole = open(path, "rb").read()
    sound = str(tmp_path / "sound.wav")
    with data.av.open(sound, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = data.av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    for name, content in (("empty.mp4", b""), ("text.mp4", b"hello"), ("cut.mp4", whole[:200])):
        (tmp_path / name).write_bytes(content)
    for name in ("empty.mp4", "text.mp4", "cut.mp4", "sound.wav", "absent.mp4", "."):
        with pytest.raises(data.VideoError, match=name):
            data.read_frames(str(tmp_path / name), [0])
        with pytest.raises(data.VideoError):
            count_frames(str(tmp_path / name))

def write_anything(path, codec, number=60, size=(48, 64), pix_fmt="yuv420p", pts=None, rate=30, options=None, **stream_options):
    """A video of noise that moves, so that a wrong frame or reference would show."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (size[0] + 2 * number, size[1] + number, 3)).astype(np.uint8)
    picture = (picture // 4 + np.arange(picture.shape[1])[None, :, None] * 2 % 192).astype(np.uint8)
    with data.av.open(path, "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.options = *size, pix_fmt, stream_options.pop("codec_options", {})
        for name, value in stream_options.items():
            getattr(stream, name)(*value) if callable(getattr(stream, name)) else setattr(stream.codec_context, name, value)
        for i in range(number):
            frame = data.av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[2 * i:2 * i + size[0], i:i + size[1]]), format="rgb24")
            frame.pts = i if pts is None else pts[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path

def decode_whole(path):
    """The reference: every frame, in order, each by a fresh converter."""
    with data.av.open(f"file:{path}") as container:
        return [data.av.video.reformatter.VideoReformatter().reformat(frame, format="rgb24").to_ndarray()
                for frame in container.decode(container.streams.best("video"))]

def x264(**options):
    return dict(codec="libx264", codec_options={"preset": "medium", "threads": "1", "bf": "3", "g": "300", **options})

UNEVEN = np.cumsum(np.random.default_rng(1).integers(1, 9, 60)).tolist()
FILES = {
    "one-key.mp4": x264(), "two-keys.mp4": x264(g="30", sc_threshold="0"), "many-keys.mp4": x264(g="6", sc_threshold="0"),
    "open-gop.mp4": x264(g="12", sc_threshold="0", **{"x264-params": "open-gop=1"}), "intra.mp4": x264(g="1"),
    "refresh.mp4": x264(g="20", **{"x264-params": "intra-refresh=1"}), "pyramid.mkv": x264(g="25", **{"b-pyramid": "normal"}),
    "odd.mp4": dict(x264(), size=(47, 63), pix_fmt="yuv444p"), "one-frame.mp4": dict(x264(), number=1),
    "uneven.mp4": dict(x264(g="20"), pts=UNEVEN), "uneven.mkv": dict(x264(g="20"), pts=UNEVEN),
    "late.mp4": dict(x264(g="20"), pts=[i + 40 for i in range(60)]), "late.mkv": dict(x264(g="20"), pts=[i + 40 for i in range(60)]),
    "ntsc.mkv": dict(x264(g="20"), rate=Fraction(30000, 1001)), "stream.ts": x264(g="20"),
    "h265.mp4": dict(codec="libx265", codec_options={"x265-params": "keyint=20:bframes=3:log-level=none"}),
    "mpeg4.avi": dict(codec="mpeg4", codec_options={"g": "15"}), "mpeg4-b.avi": dict(codec="mpeg4", codec_options={"g": "15", "bf": "2"}),
    "mpeg4-b.mp4": dict(codec="mpeg4", codec_options={"g": "15", "bf": "2"}), "mpeg2.mpg": dict(codec="mpeg2video", codec_options={"bf": "2"}),
    "vp9.webm": dict(codec="libvpx-vp9", codec_options={"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9-odd.webm": dict(codec="libvpx-vp9", size=(47, 63), codec_options={"g": "20"}),
    "vp8.webm": dict(codec="libvpx", codec_options={"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "mjpeg.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"), "wmv.wmv": dict(codec="wmv2", codec_options={"g": "12"}),
}
IN_ORDER = ("mpeg4-b.avi", "vp8.webm", "refresh.mp4")  # no timestamps, packets that show nothing, key frames that are not

@pytest.mark.parametrize("name", FILES)
def test_frames_are_bit_identical_to_decoding_the_whole_file(name, tmp_path, monkeypatch):
    path = write_anything(str(tmp_path / name), **FILES[name])
    want = decode_whole(path)
    if name not in IN_ORDER:
        monkeypatch.setattr(data, "decode_all", None)  # the fast way must do
    assert count_frames(path) == len(want) == FILES[name].get("number", 60)
    rng = np.random.default_rng(0)
    for numbers in (range(len(want)), *(rng.integers(0, len(want), n) for n in (1, 3, 8)), [len(want) - 1], [0]):
        got = data.read_frames(path, numbers)
        assert all(np.array_equal(image, want[i]) for image, i in zip(got, numbers, strict=True))

@needs_shared
@pytest.mark.parametrize("name, number", [("k400_demo.mp4", 280), ("k400_clip2.mp4", 300), ("pancake.mkv", 310), ("two_video_streams.mp4", 390)])
def test_real_files_are_read_exactly(name, number, monkeypatch):
    path = f"{SHARED}/videos/{name}"
    want = decode_whole(path)
    monkeypatch.setattr(data, "decode_all", None)
    assert count_frames(path) == len(want) == number
    for numbers in (range(60, 60 + 32 * 4, 4), range(number), np.random.default_rng(0).integers(0, number, 16)):
        assert all(np.array_equal(image, want[i]) for image, i in zip(data.read_frames(path, numbers), numbers))

@needs_shared
def test_the_best_stream_is_read_upright_and_damage_is_an_error():
    assert data.read_frames(f"{SHARED}/videos/two_video_streams.mp4", [0]).shape == (1, 270, 480, 3)
    path = f"{SHARED}/videos/rot90.mov"
    assert np.array_equal(data.read_frames(path, [1])[0], np.rot90(decode_whole(path)[1], -1))
    with pytest.raises(data.VideoError, match="corrupted.mp4"):
        data.read_frames(f"{SHARED}/videos/corrupted.mp4", lambda n: range(n))

@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_all_eight_orientations_are_turned_upright(degrees, hflip, tmp_path):
    plain = write_anything(str(tmp_path / "plain.mp4"), **x264(), number=2)
    turned = write_anything(str(tmp_path / "turned.mp4"), **x264(), number=2, set_display_rotation=(degrees, hflip))
    want = np.rot90(data.read_frames(plain, [1])[0], degrees // 90)  # counter-clockwise, and mirrored after that
    assert np.array_equal(data.read_frames(turned, [1])[0], want[:, ::-1] if hflip else want)

@pytest.mark.parametrize("space, full, red, blue", [(1, False, 0.2126, 0.0722), (5, False, 0.299, 0.114), (6, True, 0.299, 0.114),
                                                     (9, False, 0.2627, 0.0593), (1, True, 0.2126, 0.0722), (10, False, 0.2627, 0.0593),
                                                     (14, False, 0.299, 0.114), (2, False, 0.299, 0.114)])
def test_colour_matrix_and_range_are_honoured(space, full, red, blue, tmp_path):
    path = write_anything(str(tmp_path / "a.mkv"), "ffv1", number=2, pix_fmt="yuv444p", colorspace=space, color_range=2 if full else 1)
    with data.av.open(path) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (space, 2 if full else 1)
        y, u, v = (p.astype(float) for p in frame.to_ndarray())
    y, u, v = (y / 255, (u - 128) / 255, (v - 128) / 255) if full else ((y - 16) / 219, (u - 128) / 224, (v - 128) / 224)
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    rgb = np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], -1).clip(0, 1) * 255
    assert abs(data.read_frames(path, [0])[0] - rgb).max() <= 3

def test_little_is_decoded_for_a_few_frames_near_the_end(tmp_path):
    path = write_anything(str(tmp_path / "a.mp4"), **x264(g="30", sc_threshold="0"), number=300)
    with data.av.open(path) as container:
        _, packets = data.video_packets(container, path)
    assert sum(p.is_keyframe for p in packets) == 10
    times = sorted(p.pts for p in packets)
    assert 8 <= data.needed_packets(packets, {times[i] for i in range(272, 296, 3)}).sum() <= 40
    assert data.needed_packets(packets, {times[i] for i in (0, 299)}).sum() <= 1 + 31

def test_a_lost_index_does_not_give_wrong_frames(tmp_path, monkeypatch):
    path = write_anything(str(tmp_path / "a.mp4"), codec="mpeg4", codec_options={"g": "60"})
    want, original = decode_whole(path), data.video_packets

    def every_packet_marked(container, path):
        stream, packets = original(container, path)
        for packet in packets:
            packet.is_keyframe = True
        return stream, packets
    monkeypatch.setattr(data, "video_packets", every_packet_marked)
    assert all(np.array_equal(a, want[i]) for a, i in zip(data.read_frames(path, [40, 50]), (40, 50)))

def test_names_that_look_like_protocols_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.write_video("http:x.mp4", numbered_frames(5))
    assert read_numbers(data.read_frames("http:x.mp4", [3])) == [3]
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile 'http:x.mp4'\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1\nhttp:x.mp4\n#EXT-X-ENDLIST\n")
    for name in ("concat:http:x.mp4", "http://127.0.0.1/x.mp4", "list.txt", "list.m3u8", "/dev/zero"):
        with pytest.raises(data.VideoError):
            data.read_frames(name, [0])

def test_hostile_files_meet_limits(tmp_path, monkeypatch):
    path = write_anything(str(tmp_path / "a.mp4"), **x264())
    for limit, value, words in (("MAX_PACKETS", 40, "cut it into clips"), ("MAX_BYTES", 40, "cut it into clips"), ("MAX_PIXELS", 40, "frames of 64x48, which is more than 40 pixels"),
                                ("MAX_BYTES", os.path.getsize(path), "frames are too large")):
        with monkeypatch.context() as patch:
            patch.setattr(data, limit, value)
            with pytest.raises(data.VideoError, match=words):
                data.read_frames(path, [0] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(data.time, "monotonic", itertools.count(0, 30).__next__)
        with pytest.raises(data.VideoError, match="more than 120 seconds"):
            data.read_frames(path, [59])

def mutate(rng, content, other):
    """A damaged copy of a file: bytes flipped, set, cut out, doubled, truncated, or another file's header in front."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        kind, size = rng.integers(8), len(content)
        front = rng.random() < 0.5  # headers and indices are worth more damage than pictures
        at = int(rng.integers(min(size, 2000))) if front else size - 1 - int(rng.integers(min(size, 4000))) if rng.random() < 0.5 else int(rng.integers(size))
        length = int(rng.integers(1, 200))
        if kind <= 2:
            for place in rng.integers(0, min(size, 4000) if front else size, rng.integers(1, 50)):
                content[place] ^= 1 << rng.integers(8)
        elif kind == 3:
            content[at:at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"])
        elif kind == 4:
            del content[at:at + length]
        elif kind == 5:
            content[at:at] = content[at:at + length]
        elif kind == 6:
            del content[max(1, at):]
        else:
            content[:length] = other[:length]
        content = content or bytearray(b"x")
    return bytes(content)

def fuzz(sources, folder, number, seed=0):
    """Reads `number` mutations of the source files → how many gave frames and errors, the slowest in s, the memory's growth
    over the second half in MiB. Anything else than frames or VideoError is raised. By hand: python -c "import glob, test_all;
    print(test_all.fuzz(glob.glob('DIR/*'), '/tmp', 5000))"."""
    rng, files = np.random.default_rng(seed), [open(path, "rb").read() for path in sources]
    suffixes, counts, slowest, memory = [os.path.splitext(path)[1] for path in sources], [0, 0], 0, []
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    for i in range(number):
        k, other = rng.integers(len(files), size=2)
        path = os.path.join(folder, f"mutated{suffixes[k]}")
        with open(path, "wb") as file:
            file.write(mutate(rng, files[k], files[other]))
        start = time.perf_counter()
        try:
            frames = data.read_frames(path, lambda n: data.clip_frames(n, 8, "uniform", 1, 0.5))
            assert frames.dtype == np.uint8 and frames.shape[0] == 8 and frames.shape[3] == 3
            counts[0] += 1
        except data.VideoError as error:
            assert path in str(error) and "\n" not in str(error)
            counts[1] += 1
        slowest = max(slowest, time.perf_counter() - start)
        memory.append(resident())
    return dict(frames=counts[0], errors=counts[1], slowest=round(slowest, 2), growth=round(max(memory) - max(memory[:number // 2 + 1]), 1))

def test_damaged_files_give_frames_or_the_one_error(tmp_path):
    for name in ("two-keys.mp4", "pyramid.mkv", "mpeg4-b.avi", "vp9.webm", "stream.ts", "mpeg2.mpg", "wmv.wmv"):
        write_anything(str(tmp_path / name), **FILES[name])
    (tmp_path / "out").mkdir()
    code = (f"import glob, json, test_all\nprint(json.dumps(test_all.fuzz(sorted(glob.glob({str(tmp_path)!r} + '/*.*')),"
            f" {str(tmp_path / 'out')!r}, 250)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=os.path.dirname(os.path.abspath(__file__)))
    assert done.returncode == 0, done.stderr[-2000:]  # a crash of the decoder would be a signal here
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["frames"] + result["errors"] == 250 and min(result["frames"], result["errors"]) > 20
    assert result["slowest"] < 20 and result["growth"] < 100

def test_reading_does_not_leak(tmp_path):
    path = write_anything(str(tmp_path / "a.mp4"), **x264())
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    for i in range(300):
        data.read_frames(path, [i % 60])
        if i == 99:
            before = resident()
    assert resident() - before < 8
    assert len(os.listdir("/proc/self/fd")) < 200

def test_dense_clips_cover_the_video_and_repeat_the_last_frame():
    frames = lambda n, position, T=4, stride=2: data.clip_frames(n, T, "dense", stride, position).tolist()
    assert frames(10, 0) == [0, 2, 4, 6] and frames(10, 1) == [3, 5, 7, 9]
    assert frames(7, 0.9) == [0, 2, 4, 6]
    assert frames(3, 0.5) == [0, 2, 2, 2] and frames(1, 0.5) == [0, 0, 0, 0]
    starts = [frames(100, c / 2)[0] for c in range(3)]
    assert starts == [0, 46, 93]

def test_uniform_clips_take_one_frame_of_each_segment():
    frames = lambda n, position, T=4: data.clip_frames(n, T, "uniform", 1, position).tolist()
    assert frames(40, 0.5) == [5, 15, 25, 35]
    assert [frames(120, (c + 0.5) / 3)[:2] for c in range(3)] == [[5, 35], [15, 45], [25, 55]]
    assert frames(40, np.array([0, 0.99, 0, 1.0])) == [0, 19, 20, 39]
    assert frames(4, 0.999) == [0, 1, 2, 3] and frames(2, 0.5) == [0, 1, 1, 1]

def test_twins_show_the_same_sampled_frames_in_opposite_order():
    for seed in range(20):
        for one, other in (("left", "right"), ("up", "down")):
            a, b = (data.draw_moving([5, seed], motion, "vertical") for motion in (one, other))
            a, b = a[list(data.SAMPLED)], b[list(data.SAMPLED)]
            assert np.array_equal(a, b[::-1]) and not np.array_equal(a, b)

def centre(image, background):
    y, x = np.nonzero(abs(image.astype(float).mean(-1) - background.mean(-1)) > 20)
    return np.array([(y.min() + y.max()) / 2, (x.min() + x.max()) / 2])

def test_motion_covers_half_the_frame_in_the_direction_of_its_name():
    for motion, direction in data.MOTIONS.items():
        for seed in range(10):
            background = data.Scene(np.random.default_rng(seed)).background
            clip = data.draw_moving(seed, motion, "vertical")
            path = centre(clip[12], background) - centre(clip[0], background)  # both are whole within the picture
            assert path @ direction * 15 / 12 >= data.SIZE / 2 - 1 and abs(path @ direction[::-1]) < 1.5

def test_texture_is_seen_at_full_size_and_vanishes_in_the_frameset(tmp_path):
    for seed in range(10):
        clips = []
        for texture in data.TEXTURES:
            clip = data.draw_moving([6, seed], "left", texture)
            data.write_video(str(tmp_path / "a.mp4"), clip)
            clips.append(torch.from_numpy(data.read_frames(str(tmp_path / "a.mp4"), range(16))).permute(0, 3, 1, 2).float())
        background = data.Scene(np.random.default_rng([6, seed])).background.mean(-1)
        thing = torch.from_numpy(abs(clip.mean(-1) - background) > 5).float()[:, None].expand(-1, 3, -1, -1)
        distance = lambda a, b, where: ((a - b).abs() * where).sum() / where.sum()
        inside = (grid.frameset(thing[None]) > 0.5).float()
        assert distance(*clips, thing) >= 30
        assert distance(*(grid.frameset(c[None]) for c in clips), inside) <= 4

def stop_midway(*args):
    raise RuntimeError("stopped midway")

def test_drawing_is_deterministic_and_whole_or_absent(tmp_path):
    for name in "ab":
        data.drawn_data(str(tmp_path / name), (16, 8), data.draw_moving, data.MOVING_CLASSES)
    files = sorted(os.path.relpath(os.path.join(d, f), tmp_path / "a") for d, _, fs in os.walk(tmp_path / "a") for f in fs)
    assert len(files) == 24
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)

    with pytest.raises(RuntimeError, match="stopped midway"):
        data.drawn_data(str(tmp_path / "c"), (16, 8), stop_midway, data.MOVING_CLASSES)
    assert os.listdir(tmp_path / "c") == []

@pytest.fixture(scope="module")
def make():
    """The script that made the tiny image model."""
    spec = importlib.util.spec_from_file_location("make", script("assets/tiny/make.py"))
    sys.modules["make"] = make = importlib.util.module_from_spec(spec)  # where processes that draw find it
    spec.loader.exec_module(make)
    return make

def test_the_tiny_image_model_can_be_made(make, tmp_path):
    shutil.copytree(make.HERE, tmp_path / "out")
    before = open_clip.create_model(f"local-dir:{tmp_path}/out").visual.state_dict()
    make.main((128, 41), 1, str(tmp_path / "stills"), str(tmp_path / "run"), str(tmp_path / "out"))
    clip, trained = open_clip.create_model(f"local-dir:{tmp_path}/out"), models.load_checkpoint(str(tmp_path / "run/last.pt"))[0].visual
    assert all(torch.equal(v, clip.visual.state_dict()[k]) for k, v in trained.state_dict().items())
    assert not torch.equal(before["conv1.weight"], trained.conv1.weight) and tuple(clip.visual.image_mean) == (0.5, 0.5, 0.5)
    assert os.path.getsize(tmp_path / "out/open_clip_model.safetensors") < 6e6

def test_stills_show_their_class(make):
    for cell in range(16):
        for texture in data.TEXTURES:
            background = data.Scene(np.random.default_rng([2, cell])).background
            still = make.draw_still([2, cell], texture, cell)
            assert still.shape == (1, 64, 64, 3)
            y, x = centre(still[0], background)
            if cell in (5, 6, 9, 10):  # not cut off by the border
                assert abs(y - cell // 4 * 16 - 8) <= 9 and abs(x - cell % 4 * 16 - 8) <= 9
                patch = still[0].mean(-1)[int(y) - 4:int(y) + 4, int(x) - 4:int(x) + 4]
                down, across = (abs(np.diff(patch, axis=axis)).max() for axis in (0, 1))
                assert (down > 40 > across) if texture == "horizontal" else (across > 40 > down)
    for cell in range(9):
        background = data.Scene(np.random.default_rng([1, cell])).background[::4, ::4]
        sheet = make.draw_still([1, cell], "sheet", cell)[0]
        for row in range(4):
            for col in range(4):
                y, x = centre(sheet[row * 16:row * 16 + 16, col * 16:col * 16 + 16], background)
                assert abs(y - 2 - cell // 3 * 4 - 2) <= 4 and abs(x - 2 - cell % 3 * 4 - 2) <= 4

def micro_set(root, train=16, val=8):
    """A demo of a few videos, by the demo's own code."""
    data.drawn_data(str(root), (train, val), data.draw_moving, data.MOVING_CLASSES)
    return str(root)

@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    return micro_set(tmp_path_factory.mktemp("micro") / "data")

def test_folders_and_their_mistakes(micro, tmp_path):
    videos = data.find_videos("folder", micro)
    assert (len(videos.train), len(videos.val), len(videos.classes)) == (16, 8, 8)
    assert all(videos.classes[label] == os.path.basename(os.path.dirname(path)) for path, label in videos.train)
    root = tmp_path / "x"
    find = lambda: data.find_videos("folder", str(root))
    touch = lambda path: ((root / path).parent.mkdir(parents=True, exist_ok=True), (root / path).touch())
    for make, words in ((lambda: None, "x is not there"), (root.mkdir, "train is not there"),
                        (lambda: (root / "train/a").mkdir(parents=True), "val is not there"),
                        (lambda: (root / "val/a").mkdir(parents=True), "has 0 train videos and 1 classes"),
                        (lambda: touch("train/a/1.mp4"), "has 1 train videos and 1 classes"),
                        (lambda: touch("val/a/2.MKV"), "has 1 train videos and 1 classes"),
                        (lambda: (root / "train/b").mkdir(), "no training video of the class 'b'"),
                        (lambda: (touch("val/c/note.txt"), touch("train/b/deep/3.webm"), touch("val/c/4.mp4")), "4.mp4 the class 'c'")):
        make()
        with pytest.raises(data.DataError, match=words):
            find()
    (root / "val/c/4.mp4").unlink()
    for path in ("train/a/._1.mp4", "train/.ipynb_checkpoints/x.mp4"):  # left behind by other programs
        touch(path)
    (root / "train/b/gone.mp4").symlink_to(root / "moved.mp4")
    assert [os.path.relpath(path, root) for path, _ in find().train + find().val] == ["train/a/1.mp4", "train/b/deep/3.webm", "val/a/2.MKV"]

def test_lists_and_their_mistakes(tmp_path):
    for name in ("a.mp4", "b c.mp4", "d,e.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "val.txt").write_text("a.mp4,1\n")
    train = tmp_path / "train.txt"
    train.write_text('a.mp4 0\n"b c.mp4" 1\n\nb c.mp4, 0\n"d,e.mp4",1\n')
    videos = data.find_videos("list", str(tmp_path))
    assert [(os.path.basename(p), label) for p, label in videos.train] == [("a.mp4", 0), ("b c.mp4", 1), ("b c.mp4", 0), ("d,e.mp4", 1)]
    assert videos.classes == ["0", "1"] and videos.val == [(str(tmp_path / "a.mp4"), 1)]
    (tmp_path / "classes.txt").write_bytes("\ufeffwalk\nrun\n\n".encode())
    assert data.find_videos("list", str(tmp_path)).classes == ["walk", "run"]
    for text, words in (("a.mp4\n", "line 1"), ("a.mp4 0\na.mp4 x\n", "line 2"), ("a.mp4 0\na.mp4 7\n", "a.mp4 the class 7.* none of its 2"),
                        ("a.mp4 0\na.mp4 4000000000\n", "line 2: .*4000000000"), ("", "has 0 train videos"), ("a.mp4 0\n7\n", "line 2"),
                        ("a.mp4 0\nz.mp4 1\n", "1 of 2 train videos are not there .*such as .*z.mp4"), ("a.mp4 1\n", "no training video of the class 'walk'")):
        train.write_text(text)
        with pytest.raises(data.DataError, match=words):
            data.find_videos("list", str(tmp_path))

MPEG4, VP9 = dict(codec="mpeg4", codec_options={"g": "12", "bf": "2"}), dict(codec="libvpx-vp9", codec_options={"g": "20"})
CLIMB = "Moving something up"

def benchmark(name, root):
    """A miniature of a benchmark, in the layout of its download: → {split: [(file, class)]}, files relative to the root."""
    def video(path, **how):
        os.makedirs(os.path.dirname(root / path), exist_ok=True)
        write_anything(str(root / path), **{**x264(), "number": 20, **how})
        return path

    def text(path, content):
        os.makedirs(os.path.dirname(root / path), exist_ok=True)
        (root / path).write_text(content if isinstance(content, str) else json.dumps(content))

    head = "label,youtube_id,time_start,time_end,split\n"
    if name.startswith("k400"):  # nested folders, or flat as the archives have it with the lists in their own folder
        at = lambda split, label, file: f"{split}/{label}/{file}" if name == "k400" else f"{split}/{file}"
        lists = "" if name == "k400" else "annotations/"
        found = {split: [(video(at(split, label, f"{video_id}_{start:06d}_{start + 10:06d}.mp4")), label) for label, video_id, start in rows]
                 for split, rows in (("train", [("zumba", "--a_000001", 1), ("petting animal (not cat)", "b-#_c", 15), ("zumba", "d", 123)]),
                                     ("val", [("petting animal (not cat)", "e", 0), ("zumba", "f", 7)]))}
        text(lists + "train.csv", head + '"zumba",--a_000001,1,11,train\n"petting animal (not cat)",b-#_c,15,25,train\nzumba,d,123,133,train\n')
        text(lists + "val.csv", head + '"petting animal (not cat)",e,0,10,val\nzumba,f,7,17,val\n')
        text(lists + "test.csv", "youtube_id,time_start,time_end,split\nx,1,11,test\n")
        return found
    if name.startswith("ssv2"):
        file = lambda split: f"something-something-v2-{split}.json" if name == "ssv2" else f"labels/{split}.json"
        clip = lambda i, template: {"id": str(i), "label": "moving a pen up", "template": template, "placeholders": ["a pen"]}
        text(file("labels"), {CLIMB: "1", "Putting something, into something": "0"})
        text(file("train"), [clip(7, "Moving [something] up"), clip(8, "Putting [something], into [something]"), clip(70, "Moving [something] up")])
        text(file("validation"), [clip(100, "Putting [something], into [something]"), clip(9, "Moving [something] up")])
        text(file("test"), [{"id": "11"}])
        webm = lambda i, label, **how: (video(f"20bn-something-something-v2/{i}.webm", **dict(VP9, **how)), label)
        return dict(train=[webm(7, CLIMB, number=9), webm(8, "Putting something, into something"), webm(70, CLIMB)],
                    val=[webm(100, "Putting something, into something"), webm(9, CLIMB, number=1)])
    if name.startswith("hmdb51"):
        splits, place = ("testTrainMulti_7030_splits/", "hmdb51_org/") if name == "hmdb51 as unpacked" else ("", "")
        uses = {"draw_sword": {"a#1_(x);y!_@z.avi": (1, 2, 0), "b[0]&.avi": (2, 1, 1), "c.avi": (0, 1, 2)}, "sword": {"a#1_(x);y!_@z.avi": (2, 1, 2), "%d.AVI": (1, 2, 1)}}
        for label, videos in uses.items():
            for file in videos:
                video(f"{place}{label}/{file}", **MPEG4)
            for i in range(3):
                text(f"{splits}{label}_test_split{i + 1}.txt", "".join(f"{file} {use[i]} \n" for file, use in videos.items()) + "\n")
        return {split: [(f"{place}{label}/{file}", label) for label, videos in uses.items() for file, use in videos.items() if use[0] == number]
                for split, number in (("train", 1), ("val", 2))}
    text("Diving48_vocab.json", [["Back", "15som", "05Twis", "FREE"], ["Reverse", "Dive", "NoTwis", "PIKE"], ["Back", "Dive", "NoTwis", "TUCK"]])
    dive = lambda file, label: {"vid_name": file, "label": label, "start_frame": 0, "end_frame": 19}
    text("Diving48_V2_train.json", [dive("-mmq0PT-u8k_00155", 2), dive("_8Vy3_00000", 0), dive("q_00001", 2)])
    text("Diving48_V2_test.json", [dive("z_00003", 0)])
    return dict(train=[(video("rgb/-mmq0PT-u8k_00155.mp4"), "Back Dive NoTwis TUCK"), (video("rgb/_8Vy3_00000.mp4"), "Back 15som 05Twis FREE"),
                       (video("rgb/q_00001.mp4"), "Back Dive NoTwis TUCK")], val=[(video("rgb/z_00003.mp4"), "Back 15som 05Twis FREE")])

BENCHMARKS = ["k400", "k400 flat", "ssv2", "ssv2 newer", "hmdb51", "hmdb51 as unpacked", "diving48"]

@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_read_trained_and_evaluated_as_it_is_downloaded(name, tmp_path, capsys):
    root, out, source = tmp_path / "my data", str(tmp_path / "out"), name.split()[0]
    want = benchmark(name, root)
    videos = data.find_videos(source, str(root))
    for split in data.SPLITS:
        got = [(os.path.relpath(path, root), videos.classes[label]) for path, label in getattr(videos, split)]
        assert sorted(got) == sorted(want[split])
        assert all(os.path.isfile(path) for path, _ in getattr(videos, split))
    assert videos.missing == [] and len(videos.classes) == (3 if source == "diving48" else 2)
    # The recipe's own sampling, augmentation and views, on the tiny backbone.
    train.main(["--data", source, "--root", str(root), "--out", out, "--backbone", "tiny", "--spatial-frames", "4", "--bottleneck", "8",
                "--batch", "2", "--workers", "0", "--epochs", "1"])
    assert lines(out)[0]["failed"] == 0 and math.isfinite(lines(out)[0]["train_loss"])
    path = os.path.join(out, "last.pt")
    run = torch.load(path, weights_only=True)["run"]
    assert run["val_videos"] == len(want["val"]) and run["val_fingerprint"] == evaluate.fingerprint(videos.val) and len(run["val_fingerprint"]) == 64
    capsys.readouterr()
    evaluate.main([path, "--workers", "0"])
    assert f"({len(want['val'])} videos, {'%d clips x %d crops' % train.RECIPES[source]['views']})" in (out := capsys.readouterr().out)
    assert "note:" not in out
    split = "-split1" if source == "hmdb51" else ""
    result = json.load(open(path.replace("last.pt", f"last.{source}{split}.json")))
    assert result["failed"] == 0 and result["missing"] == 0 and result["fingerprint"] == run["val_fingerprint"]

def test_classes_are_in_the_benchmarks_own_order(tmp_path):
    for name in ("ssv2", "hmdb51", "diving48", "k400"):
        benchmark(name, tmp_path / name)
    classes = {name: data.find_videos(name, str(tmp_path / name)).classes for name in ("ssv2", "hmdb51", "diving48", "k400")}
    assert classes["ssv2"] == ["Putting something, into something", CLIMB] and classes["hmdb51"] == ["draw_sword", "sword"]
    assert classes["diving48"][1] == "Reverse Dive NoTwis PIKE" and classes["k400"] == ["petting animal (not cat)", "zumba"]

def test_hmdb51_has_three_splits(tmp_path, capsys):
    benchmark("hmdb51", tmp_path)
    read = lambda split: [[os.path.basename(path) for path, _ in samples] for samples in data.find_videos("hmdb51", str(tmp_path), split)[:2]]
    assert read(1) == read(None) == [["a#1_(x);y!_@z.avi", "%d.AVI"], ["b[0]&.avi", "a#1_(x);y!_@z.avi"]]
    assert read(2) == [["b[0]&.avi", "a#1_(x);y!_@z.avi", "c.avi"], ["a#1_(x);y!_@z.avi", "%d.AVI"]]
    with pytest.raises(data.DataError, match="HMDB51's three; k400 has one"):
        data.find_videos("k400", str(tmp_path), 2)
    assert train.parse(["--data", "hmdb51"]).out == os.path.join("runs", "hmdb51-split1-dualpath-s0")
    out = str(tmp_path / "out")
    train.main(["--data", "hmdb51", "--split", "3", "--root", str(tmp_path), "--out", out, "--backbone", "tiny", "--spatial-frames", "4",
                "--bottleneck", "8", "--batch", "2", "--workers", "0", "--epochs", "1"])
    for options, note in (([], False), (["--split", "1"], True)):  # a split's training videos are another's validation videos
        capsys.readouterr()
        evaluate.main([os.path.join(out, "last.pt"), "--workers", "0", *options])
        assert ("note: these 2 validation videos are not the 2 of the training" in capsys.readouterr().out) == note

def test_kinetics_may_lack_videos_and_says_how_many(tmp_path, capsys):
    benchmark("k400", tmp_path)
    for split, number in (("train", 9), ("val", 4)):
        with open(tmp_path / f"{split}.csv", "a") as file:
            for i in range(number):
                file.write(f"zumba,more{i},0,10,{split}\n")
                shutil.copy(tmp_path / "val/zumba/f_000007_000017.mp4", tmp_path / f"{split}/more{i}_000000_000010.mp4")
    before = data.find_videos("k400", str(tmp_path))
    os.remove(tmp_path / "train/more8_000000_000010.mp4")
    os.remove(tmp_path / "val/more3_000000_000010.mp4")
    videos = data.find_videos("k400", str(tmp_path))
    assert videos.missing == [(split, f"{tmp_path}/{split}/more{i}_000000_000010.*") for split, i in (("train", 8), ("val", 3))]
    assert len(videos.train) == 11 and len(videos.val) == 5 and evaluate.fingerprint(videos.val) != evaluate.fingerprint(before.val)
    out = str(tmp_path / "out")
    train.main(["--data", "k400", "--root", str(tmp_path), "--out", out, "--backbone", "tiny", "--frames", "16", "--spatial-frames", "4",
                "--bottleneck", "8", "--batch", "8", "--workers", "0", "--epochs", "1"])
    assert "11 training and 5 validation videos, 2 classes; 2 listed ones are not there" in capsys.readouterr().out
    evaluate.main([os.path.join(out, "last.pt"), "--workers", "0"])
    assert "(5 videos, 3 clips x 1 crops); 1 listed videos are not there" in capsys.readouterr().out
    os.remove(tmp_path / "train/more7_000000_000010.mp4")
    assert len(data.find_videos("k400", str(tmp_path)).train) == 10
    os.remove(tmp_path / "train/more6_000000_000010.mp4")  # more than a fifth
    with pytest.raises(data.DataError, match="3 of 12 train videos are not there .*such as .*more6"):
        data.find_videos("k400", str(tmp_path))
    shutil.rmtree(tmp_path / "train")  # evaluation needs no training video
    capsys.readouterr()
    evaluate.main([os.path.join(out, "last.pt"), "--workers", "0"])
    assert "(5 videos, 3 clips x 1 crops)" in capsys.readouterr().out

@pytest.mark.parametrize("name, file, content, words", [
    ("k400", "train.csv", None, "train.csv is not there, nor is .*annotations/train.csv"), ("k400", "val.csv", "a.mp4,0\nb.mp4,1\n", "val.csv.*KeyError"),
    ("k400", "val.csv", "label,youtube_id,time_start,time_end,split\nzumba,e,zero,10,val\n", "val.csv.*zero"),
    ("k400", "val.csv", "label,youtube_id,time_start,time_end,split\njuggling,e,0,10,val\n", "val video e_000000_000010 the class 'juggling'"),
    ("k400", "train.csv", "label,youtube_id,time_start,time_end,split\n", "no training video"),
    ("k400", "val.csv", "label,youtube_id,time_start,time_end,split\n", "has 0 val videos"),
    ("ssv2", "something-something-v2-labels.json", None, "labels.json is not there, nor is .*labels/labels.json"),
    ("ssv2", "something-something-v2-train.json", "[{]", "train.json.*JSONDecodeError"),
    ("ssv2", "something-something-v2-validation.json", '[{"id": "11"}]', "validation.json.*KeyError: 'template'"),
    ("ssv2", "something-something-v2-validation.json", '[{"id": 9, "template": "Eating [something]"}]', "val video 9 the class 'Eating something'"),
    ("ssv2", "something-something-v2-train.json", '[{"id": "7", "template": "Moving [something] up"}]', "no training video of the class 'Putting"),
    ("ssv2", "20bn-something-something-v2/9.webm", None, "1 of 2 val videos are not there .*such as .*20bn-something-something-v2/9"),
    ("hmdb51", "sword_test_split1.txt", "a.avi one", "sword_test_split1.txt.*one"), ("hmdb51", "draw_sword_test_split1.txt", "", "class 'draw_sword'"),
    ("hmdb51", "sword/%d.AVI", None, "1 of 2 train videos are not there .*such as .*sword/%d"),
    ("diving48", "Diving48_vocab.json", None, "Diving48_vocab.json is not there"), ("diving48", "Diving48_vocab.json", "5", "vocab.json.*TypeError"), ("diving48", "Diving48_vocab.json", "[" * 100000, "vocab.json.*RecursionError"),
    ("diving48", "Diving48_V2_test.json", '[{"vid_name": "z_00003", "label": 3}]', "val video z_00003 the class 3, which is none of its 3"),
    ("diving48", "Diving48_V2_test.json", '[{"vid_name": "z_00003", "label": -1}]', "class -1"),
    ("diving48", "Diving48_V2_train.json", '{"vid_name": "z_00003"}', "V2_train.json.*TypeError")])
def test_annotations_and_their_mistakes(name, file, content, words, tmp_path):
    benchmark(name, tmp_path)
    os.remove(tmp_path / file) if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(data.DataError, match=words) as error:
        data.find_videos(name, str(tmp_path))
    assert str(tmp_path) in str(error.value)
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(data.DataError, match="is not there|has no file CLASS_test_split1.txt"):
        data.find_videos(name, str(tmp_path))

def test_a_training_clip_depends_on_seed_epoch_and_index_alone(micro):
    videos = data.find_videos("folder", micro).train
    make = lambda seed=0: data.Clips(videos, 8, 48, "uniform", seed=seed)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = make()[3, 5][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    clips = make()
    clips[0, 1]
    assert torch.equal(clips[3, 5][0], one) and one.shape == (8, 3, 48, 48) and one.dtype == torch.uint8
    assert not torch.equal(clips[4, 5][0], one) and not torch.equal(make(seed=1)[3, 5][0], one)
    loader = torch.utils.data.DataLoader(clips, batch_sampler=[[(3, 4), (3, 5)]], num_workers=1, collate_fn=data.collate)
    batch, labels, failures = next(iter(loader))
    assert torch.equal(batch[1], one) and labels.tolist() == [videos[4][1], videos[5][1]] and failures == []

def test_translation_moves_whole_pixels_and_all_frames_alike():
    transform = data.training_transform("translate", 64, flip=True)
    clip = torch.arange(64 * 64).view(1, 1, 64, 64).expand(2, 3, -1, -1).contiguous()
    shifts = set()
    for _ in range(50):
        out = transform(clip)
        dy, dx = divmod(int(out[0, 0, 32, 32]), 64)
        shifts.add((dy - 32, dx - 32))
        assert torch.equal(out[0], out[1])
        assert torch.equal(out[0, 0, 8:56, 8:56], clip[0, 0, dy - 24:dy + 24, dx - 24:dx + 24])
    assert len(shifts) > 20 and max(abs(s) for shift in shifts for s in shift) == 4

def pil_operations(s, d):
    """RandAugment's operations as timm's "increasing" set defines them, by Pillow, in the order of data.OPERATIONS."""
    from PIL import Image, ImageEnhance, ImageOps
    factor, size = max(0.1, 1 + 0.9 * s * d), 48
    enhance = lambda kind: lambda image: kind(image).enhance(factor)
    matrix = lambda *m: lambda image: image.transform(image.size, Image.AFFINE, m, Image.BILINEAR, fillcolor=(128,) * 3)
    return [ImageOps.autocontrast, ImageOps.equalize, ImageOps.invert, lambda image: ImageOps.posterize(image, 4 - int(4 * s)),
            lambda image: ImageOps.solarize(image, 256 - int(256 * s)),
            lambda image: image.point([v + int(110 * s) if v < 128 else v for v in range(256)] * 3),
            enhance(ImageEnhance.Brightness), enhance(ImageEnhance.Contrast), enhance(ImageEnhance.Color), enhance(ImageEnhance.Sharpness),
            lambda image: image.rotate(-30 * s * d, Image.BILINEAR, fillcolor=(128,) * 3),
            matrix(1, 0.3 * s * d, 0, 0, 1, 0), matrix(1, 0, 0, 0.3 * s * d, 1, 0),
            matrix(1, 0, -round(0.45 * s * d * size), 0, 1, 0), matrix(1, 0, 0, 0, 1, -round(0.45 * s * d * size))]

@pytest.mark.parametrize("number", range(15))
def test_randaugments_operations_are_pillows(number):
    from PIL import Image
    y, x = np.mgrid[:48, :48] / 48
    pictures = np.stack([np.stack([60 + 90 * y + 60 * np.sin(9 * x + t), 30 + 200 * x * y, 200 - 150 * x + 9 * t], -1) for t in range(3)]).astype(np.uint8)
    clip = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    assert len(data.OPERATIONS) == 15
    for s, d in ((0.7, 1), (0.7, -1), (0.62, 1)):
        got = data.OPERATIONS[number](clip, s, d)
        assert got.dtype == torch.uint8 and got.shape == clip.shape
        for frame, picture in zip(got, pictures):
            want = np.asarray(pil_operations(s, d)[number](Image.fromarray(picture))).astype(int)
            off = abs(frame.permute(1, 2, 0).numpy() - want)
            assert off.mean() < 1.5 and np.median(off) <= 1, (s, d, off.mean())  # rims and roundings differ a little

def test_randaugment_draws_four_with_probability_one_half_and_noisy_strength(monkeypatch):
    calls = []
    monkeypatch.setattr(data, "OPERATIONS", [lambda x, s, d, n=n: calls.append((n, s, d)) or x for n in range(15)])
    clip = random_video(1, 2, 8)[0]
    numbers = []
    for _ in range(1000):
        before = len(calls)
        data.rand_augment(clip)
        numbers.append(len(calls) - before)
    assert max(numbers) == 4 and abs(np.mean(numbers) - 2) < 0.15
    operations, strengths, directions = map(np.array, zip(*calls))
    assert abs(strengths.mean() - 0.7) < 0.005 and abs(strengths.std() - 0.05) < 0.005 and set(directions) == {-1, 1}
    assert abs(directions.mean()) < 0.1 and (np.bincount(operations, minlength=15) > 80).all()

def test_augmentation_treats_all_frames_alike_and_stays_uint8():
    picture = random_video(1, 1, 80)[0].expand(4, -1, -1, -1)
    transform, outs = data.training_transform("rand", 48, flip=True, erasing=0.5), []
    for _ in range(60):
        out = transform(picture)
        assert out.shape == (4, 3, 48, 48) and out.dtype == torch.uint8 and all(torch.equal(out[0], frame) for frame in out)
        outs.append(out)
    assert not any(torch.equal(a, b) for a, b in zip(outs, outs[1:]))

def test_erasing_greys_one_box_of_some_clips():
    bright, erased = torch.full((3, 3, 64, 64), 255, dtype=torch.uint8), 0
    transform = data.training_transform("crop", 64, flip=False, erasing=0.5)
    for _ in range(100):
        grey = (transform(bright) == 128)
        assert torch.equal(grey[0], grey[2])
        if grey.any():
            erased += 1
            rows, columns = grey[0, 0].any(1).sum(), grey[0, 0].any(0).sum()
            assert grey[0, 0].sum() == rows * columns and 0.01 * 64**2 < rows * columns < 0.36 * 64**2
    assert 30 <= erased <= 70
    assert not any((data.training_transform("crop", 64, flip=False)(bright) == 128).any() for _ in range(20))

def test_crops_are_alike_in_all_frames_and_flip_can_be_switched_off():
    picture = torch.arange(64.0).expand(64, 64).to(torch.uint8).expand(3, 3, -1, -1).contiguous()  # brighter to the right
    for flip in (True, False):
        transform = data.training_transform("crop", 32, flip)
        outs = [transform(picture).float() for _ in range(30)]
        rising = [bool(out[0, 0, 16, -1] > out[0, 0, 16, 0]) for out in outs]
        assert all(torch.equal(out[0], out[2]) and out.shape == (3, 3, 32, 32) for out in outs)
        assert len({out[0, 0, 16, 0].item() for out in outs}) > 5
        assert (5 <= sum(rising) <= 25) if flip else all(rising)

def test_a_crop_keeps_at_least_its_share_of_the_frame():
    picture = (torch.arange(64.0) * 4).expand(64, 64).to(torch.uint8).expand(1, 3, -1, -1).contiguous()
    for least in (0.08, 0.9):
        transform = data.training_transform("crop", 64, flip=False, crop_area=least)
        widths = [(out[0, 0, 32, -1].item() - out[0, 0, 32, 0].item()) / 252 for out in (transform(picture) for _ in range(40))]
        assert (min(widths) < 0.5 if least == 0.08 else min(widths) > 0.85) and len(set(widths)) > 5  # 0.9 of the area is 0.9 wide

def test_views_are_start_centre_and_end(micro, monkeypatch):
    samples = data.find_videos("folder", micro).val
    views, label, index, numbers = data.Views(samples, 4, 32, stride=2, views=(2, 3))[1]
    assert views.shape == (6, 4, 3, 32, 32) and (label, index, numbers) == (1, 1, [0, 2, 4, 6, 9, 11, 13, 15])

    picture = np.empty((1, 64, 128, 3), np.uint8)
    picture[:] = np.arange(128)[:, None]
    number = lambda plan: np.reshape(plan(10), (-1, 1, 1, 1)) * np.array([0, 0, 1], np.uint8)  # blue is the frame's number
    read = lambda path, plan: np.concatenate([np.broadcast_to(picture, (4, 64, 128, 3))[..., :2],
                                              np.broadcast_to(number(plan)[..., 2:], (4, 64, 128, 1))], -1).astype(np.uint8)
    monkeypatch.setattr(data, "read_frames", read)
    views, *_, numbers = data.Views(samples, 2, 64, stride=1, views=(2, 3))[0]
    assert numbers == [0, 1, 8, 9] and views[:, :, 2, 0, 0].tolist() == [[0, 1]] * 3 + [[8, 9]] * 3  # clip by clip
    assert views[:, 0, 0, 0, [0, -1]].tolist() == [[0, 63], [32, 95], [64, 127]] * 2
    monkeypatch.setattr(data, "read_frames", lambda path, plan: read(path, plan).transpose(0, 2, 1, 3))
    assert data.Views(samples, 4, 64)[0][0][0, 0, 0, [0, -1], 0].tolist() == [32, 95]

def test_views_and_clips_ask_for_their_frames(monkeypatch):
    asked = []
    monkeypatch.setattr(data, "read_frames", lambda path, plan: asked.append(plan(120)) or np.zeros((len(asked[-1]), 32, 32, 3), np.uint8))
    data.Views([("a", 0)], 4, 32, "dense", 2, (3, 1))[0]
    assert np.reshape(asked.pop(), (3, 4))[:, 0].tolist() == [0, 56, 113]
    data.Views([("a", 0)], 4, 32, "uniform", 2, (3, 2))[0]
    assert np.reshape(asked.pop(), (3, 4)).tolist() == [[5, 35, 65, 95], [15, 45, 75, 105], [25, 55, 85, 115]]
    data.Views([("a", 0)], 4, 32, "dense", 2, (1, 3))[0]
    assert asked.pop() == [56, 58, 60, 62]
    for sampling in ("dense", "uniform"):
        clips = data.Clips([("a", 0)], 4, 32, sampling, (2,), "crop")
        starts = [(clips[epoch, 0], asked.pop()[0])[1] for epoch in range(50)]
        assert len(set(starts)) > 15 and (min(starts) < 10 and max(starts) > (100 if sampling == "dense" else 20))

def test_crop_and_rand_differ_by_randaugment(monkeypatch):
    monkeypatch.setattr(data, "OPERATIONS", [lambda x, s, d: torch.zeros_like(x)])
    bright = torch.full((2, 3, 40, 40), 200, dtype=torch.uint8)
    black = {augment: sum(not data.training_transform(augment, 32, True)(bright).any() for _ in range(60)) for augment in ("crop", "rand")}
    assert black["crop"] == 0 and black["rand"] > 45  # 15/16 of them

def test_an_unreadable_video_is_replaced_in_training_and_reported_in_testing(micro, tmp_path):
    bad = str(tmp_path / "bad.mp4")
    open(bad, "w").close()
    samples = [(bad, 0)] + data.find_videos("folder", micro).train
    clip, label, failures = data.Clips(samples, 4, 32)[0, 0]
    assert clip.shape == (4, 3, 32, 32) and len(failures) == 1 and bad in failures[0]
    views, label, index, error = data.Views(samples, 4, 32)[0]
    assert views is None and bad in error
    items = [data.Clips([(bad, 0)], 4, 32)[0, 0], (clip, label, [])]
    assert items[0][0] is None and len(items[0][2]) == 10
    assert data.collate(items)[0] is None and len(data.collate(items)[2]) == 10

def test_global_batches_do_not_depend_on_the_number_of_processes():
    whole = train.batches(22, 2, 8, seed=3)
    assert len(whole) == 2 and len({i for batch in whole for _, i in batch}) == 16 and {e for batch in whole for e, _ in batch} == {2}
    parts = [train.batches(22, 2, 8, 3, rank, 4) for rank in range(4)]
    assert [sum(step, []) for step in zip(*parts)] == whole
    assert [[i for _, i in batch] for batch in train.batches(22, 3, 8, seed=3)] != [[i for _, i in batch] for batch in whole]

def test_data_as_a_script(micro, tmp_path, monkeypatch, capsys):
    shutil.copytree(micro, tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    table = lambda name: list(csv.reader(open(f"problems-{name}.csv", errors="surrogateescape")))
    assert data.main(["--data", "folder", "--root", "set", "--frames", "8", "--sampling", "dense"]) == 0
    out = capsys.readouterr().out
    assert "16 training and 8 validation videos, 8 classes" in out and "samples/s per worker" in out
    assert "24 read; problems-folder.csv: 24 x short" in out
    assert len(table("folder")) == 25 and all(row[0] == "short" and row[2] == "16 frames" for row in table("folder")[1:])
    shutil.rmtree("set/val/up_vertical")
    bad, gone = [os.path.join("set/train/up_vertical", f) for f in os.listdir("set/train/up_vertical")]
    os.rename(bad, bad := os.fsdecode(b"set/train/up_vertical/caf\xe9.mp4"))
    open(bad, "w").close()
    assert data.main(["--data", "folder", "--root", "set"]) == 1
    assert "23 read; problems-folder.csv: 1 x no val video, 1 x unreadable" in capsys.readouterr().out
    assert table("folder")[1] == ["no val video", "up_vertical", ""] and table("folder")[2][:2] == ["unreadable", bad] and len(table("folder")) == 3
    (tmp_path / "lists").mkdir()
    for split in data.SPLITS:
        (tmp_path / f"lists/{split}.txt").write_text(f"../{gone} 0\nnone.mp4 1\n")
    data.main(["--data", "list", "--root", "lists", "--limit", "5"])
    assert "1 read; problems-list.csv: 2 x missing" in capsys.readouterr().out
    benchmark("k400", tmp_path / "k400")
    assert data.main(["--data", "k400", "--root", "k400"]) == 0 and table("k400")[1:] == []
    for options, words in ((["--root", "/no/where"], "/no/where is not there"), (["--data", "k400", "--root", "set"], "train.csv is not there, nor")):
        with pytest.raises(SystemExit, match=words):
            data.main(["--data", "folder", *options])

def killed(*job):
    os.kill(os.getpid(), signal.SIGKILL)

def test_a_check_that_is_killed_says_so_and_keeps_what_it_found(micro, tmp_path, monkeypatch):
    shutil.copytree(micro, tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("set/val/up_vertical")
    monkeypatch.setattr(data, "try_video", killed)
    with pytest.raises(SystemExit, match="data.py: .*terminated"):
        data.main(["--data", "folder", "--root", "set"])
    monkeypatch.setattr(data, "draw_file", killed)
    with pytest.raises(SystemExit, match="terminated"):
        train.main(["--root", "drawn", "--out", "run"])
    assert not os.path.exists("drawn/train")
    assert open("problems-folder.csv").read().split() == ["problem,video", "or", "class,details", "no", "val", "video,up_vertical,"]

# ---------------------------------------------------------------- train.py and evaluate.py

SMALL = ["--data", "folder", "--backbone", "tiny", "--frames", "16", "--spatial-frames", "4", "--bottleneck", "8", "--batch", "8",
         "--workers", "0", "--epochs", "2", "--sampling", "dense", "--test-stride", "1", "--stride", "1", "--views", "1x1", "--warmup", "1"]

def lines(out):
    return [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))]

def test_recipes_are_complete_and_the_authors():
    for name in data.SOURCES:
        args = train.parse(["--data", name])
        assert set(train.RECIPES[name]) <= set(vars(args)) and args.root == os.path.join("data", name)
        if name in ("k400", "ssv2", "hmdb51", "diving48"):
            assert args.batch % 8 == 0 and args.frames % 16 == 0 and args.frames % args.spatial_frames == 0
            assert (args.augment, args.weight_decay, args.warmup, args.flip) == ("rand", 0.05, 3, name != "ssv2")
    got = {name: [vars(train.parse(["--data", name]))[k] for k in ("lr", "epochs", "erasing", "views", "sampling", "frames", "pre_attention_adapter")]
           for name in ("ssv2", "hmdb51", "diving48", "k400")}
    assert got == dict(ssv2=[5e-4, 60, 0.1, (1, 3), "uniform", 48, True], hmdb51=[3e-2, 50, 0.5, (3, 1), "dense", 16, False],
                       diving48=[7e-4, 50, 0.1, (3, 1), "uniform", 16, False], k400=[1.2e-3, 30, 0, (3, 1), "dense", 32, False])
    assert train.parse(["--data", "hmdb51"]).stride == (1, 2, 4, 8)
    args = train.parse(["--data", "ssv2", "--sampling", "dense", "--stride", "1", "2", "--flip", "--erasing", "0"])
    assert (args.sampling, args.stride, args.flip, args.erasing, args.epochs) == ("dense", (1, 2), True, 0, 60)

@pytest.mark.parametrize("options, words", [(["--rounds", "0"], "--rounds.*from 1"), (["--frames", "15"], "15"), (["--backbone", "x"], "'x'")])
def test_mistakes_in_the_benchmark_get_a_sentence(options, words):
    with pytest.raises(SystemExit, match=f"^model.py: .*{words}"):
        models.main(["--bench", "--backbone", "tiny", *options])

def test_options_for_speed_change_no_result(micro, tmp_path, monkeypatch, capsys):
    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_it(function, backend="aot_eager"))
    logs = {}
    for option in ("--seed 0", "--checkpoint-activations", "--compile"):
        out = str(tmp_path / option.strip("-"))
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        train.main(SMALL + ["--root", micro, "--out", out, "--micro-batch", "3", "--epochs", "1", *option.split()])
        assert (torch._dynamo.utils.counters["frames"]["ok"] > 1) == (option == "--compile")
        logs[option] = [{k: v for k, v in line.items() if "second" not in k} for line in lines(out)]
    plain, checkpointed, compiled = logs.values()
    assert plain == checkpointed and compiled[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=1e-4)
    capsys.readouterr()
    frames = torch._dynamo.utils.counters["frames"]
    for option in ([], ["--compile"]):
        torch.compiler.reset()
        frames.clear()
        assert evaluate.main([f"{tmp_path}/compile/last.pt", "--workers", "0", *option]) == 0
        assert frames["ok"] == 2 * len(option)  # a block, and what tries the compiler
    first, second = (line for line in capsys.readouterr().out.splitlines() if "top-1" in line)
    assert first == second
    torch.compiler.reset()

def test_without_a_compiler_there_is_a_sentence(micro, tmp_path, monkeypatch):
    def no_compiler(*args, **options):
        raise RuntimeError("No working C++ compiler found\nand its long explanation")
    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(SystemExit, match="--compile does not work on this machine: No working C.. compiler found$"):
        train.main(SMALL + ["--root", micro, "--out", str(tmp_path / "out"), "--compile"])
    assert not os.path.exists(tmp_path / "out")

def test_of_several_strides_one_is_drawn(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(data, "read_frames", lambda path, plan: seen.append(np.diff(plan(500)).tolist()) or np.zeros((8, 64, 64, 3), np.uint8))
    clips = data.Clips([("a", 0)] * 200, 8, 64, "dense", (1, 2, 4, 8), "crop")
    for i in range(200):
        clips[0, i]
    assert all(steps == [steps[0]] * 7 for steps in seen)
    assert set(steps[0] for steps in seen) == {1, 2, 4, 8} and min(np.bincount([steps[0] for steps in seen])[[1, 2, 4, 8]]) > 25

def test_train_then_evaluate(micro, tmp_path, capsys):
    out = str(tmp_path / "run")
    train.main(SMALL + ["--root", micro, "--out", out])
    printed = capsys.readouterr().out
    assert "0.001 x 8/256 = 3.125e-05" in printed and "16 training and 8 validation videos, 8 classes" in printed
    log = lines(out)
    assert [line["epoch"] for line in log] == [1, 2]
    assert all(0 <= line["val_top1"] <= line["val_top5"] <= 1 and line["clips_per_second"] > 0 and line["seconds"] > 0 for line in log)
    assert [line["lr"] for line in log] == pytest.approx([3.125e-5, 3.125e-5 / 2]) and 1.5 < log[0]["train_loss"] < 3
    assert f"python evaluate.py {out}/best.pt" in printed

    table = str(tmp_path / "table.csv")
    assert evaluate.main([f"{out}/last.pt", "--workers", "0", "--predictions", table]) == 0
    result = json.load(open(f"{out}/last.folder.json"))
    assert (result["videos"], result["failed"]) == (8, 0) and result["top1"] == log[-1]["val_top1"]
    rows = list(csv.DictReader(open(table)))
    assert len(rows) == 8 and sum(r["class1"] == r["label"] for r in rows) / 8 == result["top1"]
    assert all(float(r["score1"]) >= float(r["score5"]) > 0 for r in rows)

    video = data.find_videos("folder", micro).val[0][0]
    capsys.readouterr()
    assert evaluate.main([f"{out}/last.pt", video]) == 0
    printed = capsys.readouterr().out
    assert printed.count("%") == 5 and rows[0]["class1"] in printed and video in printed
    assert evaluate.main([f"{out}/last.pt", __file__]) == 1 and "cannot read" in capsys.readouterr().out

def test_pictures_of_what_decided_and_of_what_is_confused(micro, tmp_path, capsys, figures):
    out, picture = str(tmp_path / "run"), str(tmp_path / "picture.png")
    train.main(SMALL + ["--root", micro, "--out", out])
    log = lines(out)
    assert len(figures) == 2  # a picture an epoch
    for axes, key in zip(figures[1].subfigs[0].axes, ("train_loss", "lr", "val_top1"), strict=True):
        line, = axes.lines
        assert axes.get_title() == key and line.get_xydata().tolist() == [[row["epoch"], row[key]] for row in log]
    assert Image.open(f"{out}/curves.png").size[0] == 1000

    sample = data.find_videos("folder", micro).val[0]
    assert evaluate.main([f"{out}/last.pt", sample[0], "--picture", picture, "--views", "3x3"]) == 0
    assert len(figures) == 4  # the one before the work says whether it can be written
    printed, (above, below, bars) = capsys.readouterr().out, figures[3].subfigs
    view, *_ = data.Views([sample], 16, 64, views=(3, 3))[0]
    spatial, temporal = models.attention(models.load_checkpoint(f"{out}/last.pt")[0], view[4:5])
    for (image, texts), number, axes, look in zip(shown(above), (0, 4, 8, 12), above.axes, spatial, strict=True):
        assert np.array_equal(image.transpose(2, 0, 1), view[4, number]) and texts == [str(number)]
        np.testing.assert_allclose(axes.images[1].get_array(), look / spatial.max(), rtol=1e-4)
    (image, texts), = shown(below)
    assert np.array_equal(image.transpose(2, 0, 1), grid.frameset(view[4:5])[0, 0])
    np.testing.assert_allclose(below.axes[0].images[1].get_array(), temporal[0] / temporal.max(), rtol=1e-4)
    shares = temporal[0].unflatten(0, (4, 2)).unflatten(2, (4, 2)).sum((1, 3)).flatten()  # 8 x 8 patches, each in one little frame
    assert texts == [f"{i}: {100 * share:.0f} %" for i, share in enumerate(shares)]
    names = [label.get_text() for label in bars.axes[0].get_yticklabels()]
    assert len(names) == 5 and all(f"{100 * bar.get_width():.1f} %  {name}" in printed for bar, name in zip(bars.axes[0].patches, names))
    assert Image.open(picture).size[0] == 1000

    assert evaluate.main([f"{out}/last.pt", "--workers", "0", "--picture", picture]) == 0
    assert f"top-1 {100 * log[-1]['val_top1']:.2f} %" in figures[-1].get_suptitle() and len(figures[-1].subfigs[0].axes[0].patches) == 8
    for argv, words in (([sample[0], "--picture", str(tmp_path / "a.xyz")], "cannot write .*a.xyz"),
                        (["--picture", str(tmp_path / "absent/a.png")], "cannot write .*absent/a.png")):
        with pytest.raises(SystemExit, match=words), pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "predict", None)  # it says so before it works
            evaluate.main([f"{out}/last.pt", *argv])
    with pytest.raises(SystemExit):
        evaluate.main([f"{out}/last.pt", sample[0], sample[0], "--picture", picture])
    assert "--picture for one or one video, and there are 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([f"{out}/last.pt", sample[0], "--predictions", "a.csv"])
    assert "--predictions is for a data set" in capsys.readouterr().err

def test_the_middle_view_is_drawn_and_a_little_frames_share_counts_the_parts_of_its_patches(monkeypatch, tmp_path, figures):
    """A grid of 6 x 6 patches does not divide by 4: the second patch of a row is half in the first little frame."""
    folder = vit_folder(tmp_path / "vit", image_size=48)
    model = models.build_model(**dict(TINY, backbone=folder, pretrained=None)).eval()
    look = torch.rand(1, 6, 6)
    monkeypatch.setattr(models, "attention", lambda model, video: (torch.zeros(0, 6, 6), look / look.sum()))
    views = random_video(6, 16, 48)  # 3 clips x 2 crops
    clips = [(views, 0, 0, list(range(48)))]

    class Views(list):
        samples = [("a.mp4", 0)]
    evaluate.draw_clip(tmp_path / "a.png", model, Views(clips), (0, 0, [1], [1.0], None), ["x", "y"])
    pixels = (look / look.sum())[0].repeat_interleave(8, 0).repeat_interleave(8, 1) / 64
    want = [pixels[12 * (i // 4):12 * (i // 4) + 12, 12 * (i % 4):12 * (i % 4) + 12].sum() for i in range(16)]
    (image, texts), = shown(figures[0].subfigs[0])
    assert texts == [f"{i}: {100 * share:.0f} %" for i, share in enumerate(want, 16)]
    assert np.array_equal(image.transpose(2, 0, 1), grid.frameset(views[3:4])[0, 0])

def test_scores_are_averaged_over_views(micro):
    model = randomise(models.build_model(**TINY)).eval()
    videos = data.find_videos("folder", micro)
    clips = data.Views(videos.val, 16, 64, views=(2, 3))
    rows = evaluate.predict(model, clips, torch.device("cpu"), batch=3)
    assert [row[0] for row in rows] == list(range(8))
    with torch.no_grad():
        want = model(clips[5][0]).softmax(-1).mean(0).topk(5)
    assert rows[5][2] == want.indices.tolist() and rows[5][3] == pytest.approx(want.values.tolist(), rel=1e-4)

def test_accuracy_counts_unreadable_videos_as_wrong():
    rows = [(0, 1, [1, 2], [0.6, 0.4], None), (1, 2, [1, 2], [0.6, 0.4], None), (2, 0, [1, 2], [0.6, 0.4], None), (3, 1, [], [], "broken")]
    assert evaluate.summarise(rows) == dict(videos=4, failed=1, top1=1 / 4, top5=2 / 4, top1_readable=1 / 3, top5_readable=2 / 3)

def test_evaluation_reports_unreadable_videos(micro, tmp_path, capsys):
    root, out = str(tmp_path / "data"), str(tmp_path / "run")
    shutil.copytree(micro, root)
    bad = data.find_videos("folder", root).val[2][0]
    open(bad, "w").close()
    train.main(SMALL + ["--root", root, "--out", out, "--epochs", "1"])
    assert "0 + 1 unreadable, see failed.txt" in capsys.readouterr().out and bad in open(f"{out}/failed.txt").read()
    assert (lines(out)[0]["failed"], lines(out)[0]["val_failed"]) == (0, 1)
    evaluate.main([f"{out}/last.pt", "--workers", "0"])
    printed = capsys.readouterr().out
    assert "1 videos could not be read and count as wrong" in printed and bad in printed
    assert json.load(open(f"{out}/last.folder.json"))["unreadable"] == [bad]

def test_broken_training_videos_are_logged_once_and_too_many_stop_the_run(tmp_path):
    root = micro_set(tmp_path / "data", train=40)
    path = lambda i: data.find_videos("folder", root).train[i][0]
    odd = os.path.join(os.path.dirname(path(3)), os.fsdecode(b"caf\xe9.mp4"))
    os.rename(path(3), odd)
    for bad in (odd, path(20)):
        open(bad, "w").close()
    # 2 of 40 are 5 %, and they may be.
    train.main(SMALL + ["--root", root, "--out", str(tmp_path / "run")])
    assert [line["failed"] for line in lines(tmp_path / "run")] == [2, 2]
    logged = open(tmp_path / "run/failed.txt", errors="surrogateescape").read().splitlines()
    assert len(logged) == 2 and all(any(bad in line for line in logged) for bad in (odd, path(20)))
    open(path(30), "w").close()
    with pytest.raises(SystemExit, match="3 training videos could not be read in epoch 1, and 5 %"):
        train.main(SMALL + ["--root", root, "--out", str(tmp_path / "two"), "--epochs", "1"])
    assert len(open(tmp_path / "two/failed.txt", errors="surrogateescape").readlines()) == 3

def test_a_run_uses_its_recipe(tmp_path, monkeypatch):
    seen = []

    def recorded_arguments(original):
        def make(*args, **kwargs):
            bound = inspect.signature(original).bind(*args, **kwargs)
            bound.apply_defaults()
            seen.append(bound.arguments)
            return original(*args, **kwargs)
        return make
    monkeypatch.setattr(data, "Clips", recorded_arguments(data.Clips))
    monkeypatch.setattr(data, "Views", recorded_arguments(data.Views))
    for name in ("ssv2", "hmdb51"):
        recipe, out = train.parse(["--data", name]), str(tmp_path / "out" / name)
        benchmark(name, tmp_path / name)
        train.main(["--data", name, "--root", str(tmp_path / name), "--out", out, "--backbone", "tiny", "--spatial-frames", "4",
                    "--bottleneck", "8", "--batch", "2", "--workers", "0", "--epochs", "1", "--test-stride", "3", "--seed", "5",
                    "--crop-area", "0.25"])
        evaluate.main([f"{out}/best.pt", "--workers", "0"])
        clips, validation, evaluation = seen
        for made in seen:
            assert (made["num_frames"], made["size"], made["sampling"]) == (recipe.frames, 64, recipe.sampling)
        assert [clips[k] for k in ("strides", "augment", "seed")] == [recipe.stride, "rand", 5]
        assert clips["options"] == dict(flip=recipe.flip, erasing=recipe.erasing, crop_area=0.25)
        assert [(made["stride"], made["views"]) for made in (validation, evaluation)] == [(3, (1, 1)), (3, recipe.views)]
        seen.clear()

def test_a_run_is_not_resumed_with_other_classes(micro, tmp_path):
    train.main(SMALL + ["--root", micro, "--out", str(tmp_path / "run")])
    other = shutil.copytree(micro, tmp_path / "other")
    for split in data.SPLITS:
        os.rename(other / split / "up_vertical", other / split / "a_class")
    with pytest.raises(SystemExit, match="other has other classes than the run"):
        train.main(SMALL + ["--root", str(other), "--out", str(tmp_path / "run"), "--resume"])

def test_a_run_is_not_overwritten_by_accident(micro, tmp_path, capsys):
    out = str(tmp_path / "run")
    one = SMALL + ["--root", micro, "--out", out, "--epochs", "1"]
    train.main(one + ["--resume"])
    assert "the run starts afresh" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--resume continues it.*--overwrite deletes it"):
        train.main(one)
    with pytest.raises(SystemExit, match=r"--bottleneck 4 \(was 8\)"):
        train.main(one + ["--resume", "--bottleneck", "4"])
    assert len(lines(out)) == 1 and os.path.exists(f"{out}/best.pt")
    mine = [f"{out}/mine.txt", f"{out}/log.txt", f"{out}/best.mp4", f"{out}/curves.csv"]
    for name in mine:
        open(name, "w").close()
    evaluate.main([f"{out}/best.pt", "--workers", "0"])
    with pytest.raises(SystemExit, match="/no/where"):  # what is not sure to start deletes nothing
        train.main(one + ["--overwrite", "--root", "/no/where"])
    assert os.path.exists(f"{out}/last.pt") and os.path.exists(f"{out}/best.folder.json")
    train.main(one + ["--overwrite", "--seed", "1"])
    assert len(lines(out)) == 1 and all(map(os.path.exists, mine)) and not os.path.exists(f"{out}/best.folder.json")
    shutil.copy(f"{out}/best.pt", f"{out}/last.pt")
    with pytest.raises(SystemExit, match="weights only"):
        train.main(one + ["--resume", "--seed", "1"])
    os.remove(f"{out}/last.pt")
    with pytest.raises(SystemExit, match="holds a run already"):
        train.main(one + ["--resume"])
    assert os.path.exists(f"{out}/best.pt")

def test_init_starts_from_another_runs_weights_with_a_new_head(micro, tmp_path):
    out = str(tmp_path / "run")
    model = randomise(models.build_model(**dict(TINY, num_classes=3, bottleneck=8)))
    path = save(model, tmp_path / "a.pt")
    train.main(SMALL + ["--root", micro, "--out", out, "--init", path, "--lr", "0", "--epochs", "1"])
    weights = models.read_checkpoint(f"{out}/last.pt")["weights"]
    assert all(torch.equal(v, weights[k]) for k, v in models.saved_weights(model).items() if not k.startswith("head."))
    assert weights["head.2.weight"].shape[0] == 8
    with pytest.raises(SystemExit, match="does not fit the model.*missing"):
        train.main(SMALL + ["--root", micro, "--out", str(tmp_path / "two"), "--init", path, "--pre-attention-adapter"])

def test_micro_batches_give_the_same_step(micro, tmp_path):
    weights = []
    for name, options in (("a", []), ("b", ["--micro-batch", "3"])):
        train.main(SMALL + ["--root", micro, "--out", str(tmp_path / name), "--dropout", "0", "--epochs", "1", *options])
        weights.append(models.read_checkpoint(str(tmp_path / name / "last.pt")))
    a, b = weights
    for one, other in zip(a["training"]["optimizer"]["state"].values(), b["training"]["optimizer"]["state"].values()):
        torch.testing.assert_close(one["exp_avg"], other["exp_avg"], rtol=1e-3, atol=1e-7)

def test_no_weight_decay_on_biases_norms_tokens_and_positions():
    for method in ("dualpath", *models.METHODS[2:]):
        model = models.build_model(**{**TINY, "method": method})
        decayed, spared = adapters.parameter_groups(model, 0.05)
        assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
        names = {id(p): n for n, p in model.named_parameters()}
        spared = [names[id(p)] for p in spared["params"]]
        assert all(n.endswith(("bias", "embedding")) or "ln_" in n for n in spared)
        tokens = {"vpt": {"blocks.0.prompt_embedding"}, "aim": {"temporal_embedding"}}
        whole = {"visual.class_embedding", "visual.positional_embedding"} if method in ("dualpath", "full") else set()
        assert tokens.get(method, set()) | whole <= set(spared)
        assert len(spared) + len(decayed["params"]) == sum(p.requires_grad for p in model.parameters())
        assert all(names[id(p)].endswith(("weight", "proj")) for p in decayed["params"])

@pytest.mark.parametrize("method", [m for m in models.METHODS if m not in ("dualpath", "linear", "full")])
def test_every_method_trains_and_is_evaluated(method, micro, tmp_path, capsys):
    out = str(tmp_path / "run")
    train.main(SMALL + ["--root", micro, "--out", out, "--method", method, "--before", "both", "--pre-attention-adapter"])
    assert f"model     {method} around tiny" in capsys.readouterr().out
    evaluate.main([f"{out}/last.pt", "--workers", "0"])
    assert f"top-1 {100 * lines(out)[-1]['val_top1']:.2f} %" in capsys.readouterr().out
    content = models.read_checkpoint(f"{out}/last.pt")
    assert method != "st_adapter" or {"blocks.0.A_1.up.weight", "blocks.0.A_2.up.weight"} <= set(content["weights"])
    for k, v in content["weights"].items():  # what starts at zero has moved, but what no class token reads
        if k.endswith(("up.weight", "conv.weight", "temporal_embedding")) and not k.startswith("blocks.3."):
            assert v.abs().max() > 0, k

def test_a_run_of_before_an_option_was_there_goes_on(micro, tmp_path):
    out = str(tmp_path / "run")
    train.main(SMALL + ["--root", micro, "--out", out, "--limit", "8", "--epochs", "1"])
    content = models.read_checkpoint(f"{out}/last.pt")
    del content["run"]["before"], content["run"]["crop_area"], content["model"]["before"]
    model = models.build_model(**content["model"])
    models.load_weights(model, content, out)
    models.save_checkpoint(f"{out}/last.pt", model, content["run"], content["training"])
    with pytest.raises(SystemExit, match=r"--crop-area 0.5 \(was 0.08\)"):
        train.main(SMALL + ["--root", micro, "--out", out, "--limit", "8", "--epochs", "1", "--resume", "--crop-area", "0.5"])
    train.main(SMALL + ["--root", micro, "--out", out, "--limit", "8", "--epochs", "1", "--resume"])
    assert len(lines(out)) == 1

def test_learning_rate_rises_then_falls_as_half_a_cosine(micro, tmp_path):
    out = str(tmp_path / "run")
    train.main(SMALL + ["--root", micro, "--out", out, "--epochs", "4", "--warmup", "2", "--lr", "0.032", "--method", "linear"])
    # 2 steps an epoch; the rate logged is that of an epoch's second step
    want = [1e-3 * f for f in (1 / 2, 1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5 + 0.5 * math.cos(math.pi * 3 / 4))]
    assert [line["lr"] for line in lines(out)] == pytest.approx(want)

def test_help_fits_a_screen_and_shows_the_recipe(capsys):
    for argv, words in (([], ["frames per clip, T (16)", "per 256 clips (0.04)"]), (["--data", "ssv2"], ["frames per clip, T (48)", "A_t0 (True)"])):
        with pytest.raises(SystemExit) as error:
            train.main([*argv, "--help"])
        printed = capsys.readouterr().out
        assert error.value.code == 0 and all(word in printed for word in words)
        assert len(printed.splitlines()) <= 60 and max(map(len, printed.splitlines())) <= 131

@pytest.mark.parametrize("main, words", [(evaluate, ["(8)", "(auto)", "(that of the training)"]), (data, ["(16)", "(demo)", "(all)"]),
                                         (models, ["(5)", "(1)", "[16, 32, 48]"])])
def test_the_other_helps_fit_a_screen_and_say_the_defaults(main, words, capsys):
    with pytest.raises(SystemExit) as error:
        main.main(["--help"])
    printed = capsys.readouterr().out
    assert error.value.code == 0 and all(word in printed for word in words)
    assert len(printed.splitlines()) <= 40 and max(map(len, printed.splitlines())) <= 131

@pytest.fixture(scope="module")
def mistakes(micro, tmp_path_factory):
    """A folder with a run and with what new users get wrong."""
    folder = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(SMALL + ["--root", micro, "--out", "run", "--epochs", "1"])
        for name in ("one", "no-val", "other"):
            shutil.copytree(micro, name)
        for path in [*os.scandir("one/train"), *os.scandir("one/val")]:
            if path.name != "up_vertical":
                shutil.rmtree(path)
        shutil.rmtree("no-val/val")
        shutil.copytree("other/val/up_vertical", "other/val/sideways")
        (folder / "text.mp4").write_text("not a video")
        (folder / "empty").mkdir()
    return folder

TRAIN_MISTAKES = [
    (["--root", "/no/where"], "/no/where is not there; say with --root"), (["--root", "one"], "one has 2 train videos and 1 classes; it needs 1 and 2"),
    (["--root", "no-val"], "no-val/val is not there"), (["--root", "other"], "other gives the val video .*sideways"),
    (["--root", "empty"], "empty/train is not there"), (["--data", "k400", "--root", "empty"], "empty/train.csv is not there"),
    (["--data", "list", "--root", "empty"], "empty/train.txt is not there"),
    (["--batch", "99"], "--batch 99 must divide by 1 processes, and there are 16"), (["--amp", "fp16"], "--amp fp16 needs a CUDA GPU"),
    (["--device", "cuda"], "--device cuda finds no GPU for process 0"), (["--device", "mps"], "--device mps finds no GPU"),
    (["--frames", "15"], "frames is 15, .* 12 or 16"), (["--frames", "20"], "20, .* 16 or 32"), (["--spatial-frames", "3"], "16, which does not divide by 3"),
    (["--size", "100"], "100.*96 or 104"), (["--split", "2"], "--split chooses"), (["--out", __file__], "test_all.py"),
    (["--out", "run"], "run holds a run already: --resume continues it, --overwrite deletes it"),
    (["--out", "run", "--resume", "--method", "aim"], "run/last.pt is of a run with other options: .*--method aim .was dualpath"),
    (["--resume", "run/best.pt"], "run/best.pt holds weights only"), (["--resume", "text.mp4"], "text.mp4 is not a checkpoint of this project"),
    (["--init", "absent.pt"], "no checkpoint absent.pt"), (["--init", "text.mp4"], "text.mp4 is not a checkpoint"),
    (["--init", "run/best.pt", "--method", "aim"], "run/best.pt is of dualpath around .* than those of this aim around 'tiny'"),
    (["--backbone", "ViT-B16"], "no model 'ViT-B16'; near: ViT-B-16"), (["--backbone", "RN50"], "'RN50' has no class token"),
    (["--backbone", "ViT-B-16"], "'openai' were trained with QuickGELU, .* --backbone ViT-B-16-quickgelu"),
    (["--backbone", "ViT-B-16", "--pretrained", "opnai"], "'opnai' is neither a file nor weights"),
    (["--backbone", "ViT-B-16", "--pretrained", "text.mp4"], "cannot read weights from text.mp4"),
    (["--backbone", "local-dir:/no/where"], "'local-dir:/no/where'"), (["--method", "aim", "--paths", "spatial"], "paths is 'spatial'; it is both"),
    *[([option, value], None) for option, value in (
        ("--bottleneck", "0"), ("--epochs", "0"), ("--batch", "-1"), ("--workers", "-1"), ("--erasing", "2"), ("--lr", "-1"), ("--warmup", "nan"),
        ("--dropout", "x"), ("--seed", "-1"), ("--views", "0x1"), ("--method", "dualpth"), ("--data", "k600"))]]

@pytest.mark.parametrize("options, words", TRAIN_MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_mistakes_in_training_get_a_sentence(options, words, mistakes, micro, monkeypatch, tmp_path, capsys):
    if torch.cuda.is_available() and ("--amp" in options or "--device" in options):
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(mistakes)
    with pytest.raises(SystemExit, match=words) as error:
        train.main(SMALL + ["--root", micro, "--out", str(tmp_path / "run"), *options])
    if words is None:  # argparse prints the sentence itself
        assert error.value.code == 2 and f"argument {options[0]}: " in (printed := capsys.readouterr().err) and options[1] in printed
    else:
        assert re.match(r"\w+\.py: ", error.value.code) and "\n" not in error.value.code
    assert not os.path.exists(tmp_path / "run") and sorted(os.listdir(mistakes / "run")) == ["best.pt", "curves.png", "last.pt", "log.jsonl"]

@pytest.mark.parametrize("main, argv, words", [
    (evaluate, ["absent.pt"], "no checkpoint absent.pt"), (evaluate, ["text.mp4"], "text.mp4 is not a checkpoint"),
    (evaluate, ["run/best.pt", "--root", "/no/where"], "/no/where is not there"),
    (evaluate, ["run/best.pt", "--root", "one"], "one has 1 val videos and 1 classes"),
    (evaluate, ["run/best.pt", "--data", "hmdb51"], "data/hmdb51 is not there"),
    (evaluate, ["run/best.pt", "--predictions", "/no/where/a.csv"], "/no/where/a.csv"),
    (evaluate, ["run/best.pt", "--picture", "a.docx"], "cannot write a.docx"), (evaluate, ["run/best.pt", "--backbone", "RN50"], "'RN50' has no"),
    (evaluate, ["run/best.pt", "--views", "3"], "'3' is not CLIPSxCROPS"), (evaluate, ["run/best.pt", "--batch", "0"], "'0' is not a whole number from 1"),
    (grid, [], "usage"), (grid, ["text.mp4", "a.png"], "cannot read text.mp4"), (grid, ["absent.mp4", "a.png"], "cannot read absent.mp4"),
    (grid, ["empty", "a.png"], "cannot read empty"), (data, ["--data", "k400"], "data/k400 is not there"), (data, ["--frames", "15"], "15"),
    (models, ["--backbone", "x"], "no model 'x'"), (models, ["--backbone", "tiny", "--frames", "0"], "--frames are numbers from 1"),
    (models, ["--backbone", "tiny", "--json", "/no/where/x"], "/no/where/x")], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_other_mistakes_get_a_sentence(main, argv, words, mistakes, monkeypatch, capsys):
    monkeypatch.chdir(mistakes)
    with pytest.raises(SystemExit) as error:
        main.main(argv)
    said = error.value.code if isinstance(error.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert re.search(words, said) and "\n" not in said

def test_a_file_that_is_no_video_is_named_and_the_others_are_classified(mistakes, micro, monkeypatch, capsys):
    monkeypatch.chdir(mistakes)
    good = data.find_videos("folder", micro).val[0][0]
    assert evaluate.main(["run/best.pt", "text.mp4", good, "absent.mp4"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("cannot read text.mp4: ") and said[1] == good and said[-1].startswith("cannot read absent.mp4: there is no")
    assert len(said) == 8

def test_a_port_in_use_is_a_sentence(micro, tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=other.getsockname()[1]).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit, match=f"port in use: --standalone.*port: {other.getsockname()[1]}"):
            train.main(SMALL + ["--root", micro, "--out", str(tmp_path / "run")])
    assert not dist.is_initialized()

@pytest.mark.parametrize("gpus, mps, local, asked, device", [
    (0, False, 0, "auto", "cpu"), (0, True, 0, "auto", "mps"), (2, True, 1, "auto", "cuda:1"), (2, False, 1, "cpu", "cpu"), (0, True, 1, "cpu", "cpu"),
    (1, True, 0, "mps", "mps"), (0, False, 3, "auto", "cpu"), (0, False, 0, "cuda", None), (2, False, 2, "auto", None), (0, True, 1, "auto", None)])
def test_the_device_is_the_best_there_is_or_the_one_asked_for(gpus, mps, local, asked, device, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    if device is None:
        with pytest.raises(OSError, match=f"--device {asked} finds no GPU for process {local}.*{gpus} of CUDA's and {int(mps)} of Apple's"):
            adapters.choose_device(asked)
    else:
        assert adapters.choose_device(asked) == torch.device(device) and chosen == [local] * device.startswith("cuda")

def test_in_the_log_of_a_job_progress_is_a_line_a_minute(monkeypatch):
    assert not sys.stderr.isatty() and data.BAR["mininterval"] == data.BAR["maxinterval"] == data.BAR["delay"] == 60
    log, now = io.StringIO(), [0.0]
    for name in ("time", "_time"):
        monkeypatch.setattr(data.tqdm, name, lambda self=None: now[0], raising=False)
    import tqdm.std
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    bar = data.tqdm(range(600), "epoch 1/2", file=log, unit="clip", **data.BAR)
    for i in bar:
        now[0] += 1
        if i % 20 == 0:
            bar.set_postfix_str(f"loss {i}", False)
    said = [line.strip("\r ") for line in log.getvalue().split("\n") if line.strip("\r ")]
    assert 9 <= len(said) <= 11 and said[2].startswith("epoch 1/2: 180 of 600 in 03:00, 07:00 to go") and "loss 160" in said[2]

def test_a_loss_that_is_not_finite_stops_the_run(micro, tmp_path):
    out = str(tmp_path / "run")
    with pytest.raises(SystemExit, match="the loss of step 2 of epoch 1 is not finite") as error:
        train.main(SMALL + ["--root", micro, "--out", out, "--lr", "1e30", "--warmup", "0"])
    videos = data.find_videos("folder", micro).train  # the second step's clips, by their paths
    named = error.value.code.split("the step's clips: ")[1].split(", ")
    assert named == [videos[i][0] for _, i in train.batches(16, 0, 8)[1]]
    assert models.read_checkpoint(f"{out}/last.pt")["training"]["batch"] == 0  # as it was before

def test_data_that_is_all_unreadable_stops_the_run(micro, tmp_path):
    shutil.copytree(micro, tmp_path / "data")
    for path, _ in data.find_videos("folder", str(tmp_path / "data")).train:
        open(path, "w").close()
    with pytest.raises(SystemExit, match="could not be read"):
        train.main(SMALL + ["--root", str(tmp_path / "data"), "--out", str(tmp_path / "run")])

def test_evaluate_refuses_other_classes(micro, tmp_path):
    path = save(models.build_model(**TINY), tmp_path / "a.pt", data="folder", root=micro, views=(1, 1), sampling="dense", test_stride=1)
    with pytest.raises(SystemExit, match="the classes of folder .8. are not the 8 that"):
        evaluate.main([path, "--root", micro])
    with pytest.raises(SystemExit, match="no checkpoint"):
        evaluate.main([str(tmp_path / "b.pt")])

def two_processes(rank, folder, root):
    """One of two gloo processes: its half's gradients through DDP, and its part of an evaluation."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = models.load_checkpoint(f"{folder}/a.pt")[0].train()
    video, label = torch.load(f"{folder}/batch.pt")
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    mine = slice(rank * 2, rank * 2 + 2)
    F.cross_entropy(parallel(video[mine]), label[mine]).backward()
    clips = data.Views(data.find_videos("folder", root).val[:7], 16, 64)  # 7 videos: uneven shares
    rows = evaluate.predict(model, clips, torch.device("cpu"), batch=2)
    torch.save(([p.grad for p in model.parameters()], rows), f"{folder}/{rank}.pt")
    dist.destroy_process_group()

def as_one_of_two(rank, port):
    torch.multiprocessing.set_start_method("fork", force=True)  # of data workers, as under torchrun
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

def two_trainings(rank, ports, root, out, broken):
    """What torchrun starts, three times: a training run, an evaluation and a failing run by one of two processes."""
    torch.set_num_threads(1)
    as_one_of_two(rank, ports[0])
    exchanged = []  # bytes of gradients, by forward
    class Counting(train.DistributedDataParallel):
        def forward(self, *args):
            size = self._get_ddp_logging_data()["total_parameter_size_bytes"]
            exchanged.append(size * self.require_backward_grad_sync)
            return super().forward(*args)
    train.DistributedDataParallel = Counting
    train.main(SMALL + ["--root", root, "--out", out, *TOGETHER, "--workers", "1", "--micro-batch", "3"])
    tuned = sum(v.nbytes for v in models.read_checkpoint(f"{out}/last.pt")["weights"].values()) if rank == 0 else None
    # Two steps in each of two epochs, of two micro-batches each, exchange the trained weights' gradients once.
    assert rank > 0 or exchanged == 4 * [0, tuned]
    as_one_of_two(rank, ports[1])  # a port of its own: another's store may not have closed yet
    evaluate.main([f"{out}/last.pt", "--limit", "7", "--workers", "0"])
    as_one_of_two(rank, ports[2])
    with pytest.raises(SystemExit, match="3 training videos could not be read in epoch 1" if rank == 0 else "1"):
        train.main(SMALL + ["--root", broken, "--out", out + "-broken"])

TOGETHER = ["--dropout", "0", "--clip-grad", "1", "--limit", "16"]

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

def test_two_processes_train_and_evaluate_as_one(micro, tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    broken = micro_set(tmp_path / "data", train=40)
    videos = data.find_videos("folder", broken).train
    shares = [sum(train.batches(40, 0, 8, 0, rank, 2), []) for rank in (0, 1)]
    for _, i in shares[0][6:8] + shares[1][6:7]:  # neither process has more than 5 % of 40, both together have
        open(videos[i][0], "w").close()
    torch.multiprocessing.spawn(two_trainings, ([free_port() for _ in range(3)], micro, two, broken), nprocs=2)
    assert len(open(f"{two}-broken/failed.txt").readlines()) == 3 and lines(f"{two}-broken") == []
    train.main(SMALL + ["--root", micro, "--out", one, *TOGETHER])
    evaluate.main([f"{one}/last.pt", "--limit", "7", "--workers", "0"])
    for a, b in zip(lines(one), lines(two), strict=True):
        assert (a["lr"], a["val_top1"], a["val_top5"]) == (b["lr"], b["val_top1"], b["val_top5"])
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    a, b = (json.load(open(f"{out}/last.folder.json")) for out in (one, two))
    assert a["videos"] == 7 and {**a, "checkpoint": ""} == {**b, "checkpoint": ""}
    a, b = (models.read_checkpoint(f"{out}/last.pt")["training"]["optimizer"]["state"] for out in (one, two))
    for i in a:
        torch.testing.assert_close(a[i]["exp_avg"], b[i]["exp_avg"], rtol=1e-2, atol=1e-6)

def test_two_processes_give_the_gradients_and_the_evaluation_of_one(micro, tmp_path):
    model = randomise(models.build_model(**TINY, dropout=0.0))
    save(model, tmp_path / "a.pt")
    video, label = random_video(4), torch.tensor([1, 5, 2, 2])
    torch.save((video, label), tmp_path / "batch.pt")
    torch.multiprocessing.spawn(two_processes, (str(tmp_path), micro), nprocs=2)
    F.cross_entropy(model(video), label).backward()
    clips = data.Views(data.find_videos("folder", micro).val[:7], 16, 64)
    rows = evaluate.predict(model, clips, torch.device("cpu"))
    for rank in range(2):
        gradients, other = torch.load(tmp_path / f"{rank}.pt")
        for p, gradient in zip(model.parameters(), gradients):
            assert (gradient is None) == (p.grad is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-6)
        assert [row[:3] for row in other] == [row[:3] for row in rows]

# ---------------------------------------------------------------- cut off, stopped, moved, fed bad files: nothing is lost

def start(*command, **options):
    """A script of ours in a process, and a session, of its own; one thread, so that its sums have one order."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", PYTHONPATH=os.path.dirname(os.path.abspath(__file__)))
    process = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True, **options)
    watchdog = threading.Timer(300, lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))  # nothing hangs
    watchdog.daemon = True
    watchdog.start()
    return process

def wait_for(process, word):
    """The lines that the process prints, up to the one with the word."""
    seen = []
    while not seen or word not in seen[-1]:
        line = process.stdout.readline()
        assert line, f"it ended: {''.join(seen)}"
        seen.append(line)
    return "".join(seen)

def group_is_gone(process, seconds=20):
    """No process that it started is left."""
    for _ in range(10 * seconds):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False

def untimed(out):
    return [{k: v for k, v in line.items() if k not in ("seconds", "clips_per_second")} for line in lines(out)]

def assert_same_run(one, other):
    """The same to the last bit: log, weights, optimiser and everything else that is saved."""
    assert untimed(one) == untimed(other) and len(lines(one)) > 0
    for name in ("last.pt", "best.pt"):
        a, b = (models.read_checkpoint(f"{out}/{name}") for out in (one, other))
        assert all(torch.equal(v, b["weights"][k]) for k, v in a["weights"].items()) and a["weights"].keys() == b["weights"].keys()
        if name == "last.pt":
            a, b = a["training"], b["training"]
            assert all(a[k] == b[k] for k in ("epoch", "batch", "loss", "failed", "best", "scheduler", "scaler"))
            assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"] and a["optimizer"]["state"]
            for i, state in a["optimizer"]["state"].items():
                assert all(torch.equal(v, b["optimizer"]["state"][i][k]) for k, v in state.items())

class Killed(BaseException):
    """What SIGKILL does, from inside: nothing catches it."""

ENDLESS = ["--save-every", "0", "--dropout", "0.5", "--augment", "rand", "--epochs", "2", "--batch", "4"]

def test_a_run_that_is_cut_off_at_any_write_ends_as_if_it_had_not_been(tmp_path, monkeypatch, capsys, thorough):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    root = micro_set(tmp_path / "data", train=24)
    open(data.find_videos("folder", root).train[8][0], "w").close()
    run = SMALL + ENDLESS + ["--root", root]
    train.main(run + ["--out", whole])
    assert [line["failed"] for line in lines(whole)] == [1, 1]
    midway = 0
    for number in itertools.count(1, 1 if thorough else 9):  # dies at this call of those that change a file
        calls = itertools.count(1)
        def dying(original):
            def call(*args, **kwargs):
                if next(calls) == number:
                    if original is os.replace:
                        open(args[0], "r+b").truncate(100)  # as if it had not been written to its end
                    raise Killed
                return original(*args, **kwargs)
            return call
        shutil.rmtree(parts, ignore_errors=True)
        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "replace"), (json, "dumps")):
                patch.setattr(module, name, dying(getattr(module, name)))
            try:
                train.main(run + ["--out", parts])
                break
            except Killed:
                pass
        capsys.readouterr()
        train.main(run + ["--out", parts, "--resume"])
        printed = capsys.readouterr().out
        assert ("the run starts afresh" if number <= 2 else "resumed after epoch") in printed
        midway += bool(re.search("resumed after epoch . and [1-5] steps", printed))
        assert_same_run(whole, parts)
    assert number > 30 and midway >= (12 if thorough else 2)

def test_a_killed_process_resumes_to_the_bit(tmp_path, thorough):
    root, whole, parts = micro_set(tmp_path / "data", train=64), str(tmp_path / "whole"), str(tmp_path / "parts")
    run = [script("train.py"), *SMALL, *ENDLESS, "--root", root, "--workers", "1", "--epochs", "30" if thorough else "4"]
    process = start(*run, "--out", whole)
    process.communicate(timeout=300)
    assert process.returncode == 0
    rng, kills, positions = np.random.default_rng(0), 20 if thorough else 2, set()
    while kills:
        process = start(*run, "--out", parts, "--resume")
        wait_for(process, "writes")
        time.sleep(rng.uniform(0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == -signal.SIGKILL, printed
        kills -= 1
        if os.path.exists(f"{parts}/last.pt"):
            training = models.read_checkpoint(f"{parts}/last.pt")["training"]
            positions.add((training["epoch"], training["batch"]))
    process = start(*run, "--out", parts, "--resume")
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert_same_run(whole, parts)
    assert len(positions) >= (8 if thorough else 1)

@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_a_step_with_a_checkpoint_and_no_orphans(number, status, micro, tmp_path):
    out = str(tmp_path / "run")
    process = start(script("train.py"), *SMALL, "--root", micro, "--out", out, "--workers", "2", "--epochs", "1000")
    wait_for(process, "epoch   2")
    started = time.monotonic()
    os.killpg(process.pid, number)  # to the workers, too, as a terminal and Slurm do
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == status and time.monotonic() - started < 30
    assert "train.py: stopped by a signal; --resume continues the run" in printed and "Traceback" not in printed and "Error" not in printed
    assert models.read_checkpoint(f"{out}/last.pt")["training"]["epoch"] >= 2
    assert group_is_gone(process)

def test_signals_in_a_step_in_validation_and_in_evaluation(micro, tmp_path, monkeypatch, capsys):
    out, run = str(tmp_path / "run"), SMALL + ["--root", micro, "--out", str(tmp_path / "run"), "--batch", "4"]
    train.main(run + ["--out", str(tmp_path / "whole")])
    images, seen = models.DualPath.patches, []

    def signalled(self, *args):
        seen.append(self.training)
        if seen == signal_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return images(self, *args)
    monkeypatch.setattr(models.DualPath, "patches", signalled)
    before = signal.getsignal(signal.SIGTERM)
    signal_after = [True, True]  # in the second step
    with pytest.raises(SystemExit) as error:
        train.main(run)
    assert error.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    training = models.read_checkpoint(f"{out}/last.pt")["training"]
    assert (training["epoch"], training["batch"], lines(out)) == (0, 2, [])
    signal_after = [True, True, True, True, False, False]  # in the second batch of the validation
    with pytest.raises(SystemExit) as error:
        train.main(run + ["--resume"])
    printed = capsys.readouterr().out
    assert error.value.code == 143 and "resumed after epoch 0 and 2 steps" in printed and "validating: 4 of 8 videos were done" in printed
    training = models.read_checkpoint(f"{out}/last.pt")["training"]
    assert (training["epoch"], training["batch"], lines(out)) == (0, 4, [])
    signal_after = None
    train.main(run + ["--resume"])
    assert "resumed after epoch 0 and 4 steps" in capsys.readouterr().out
    assert_same_run(str(tmp_path / "whole"), out)
    seen.clear()
    signal_after = [False, False]
    with pytest.raises(SystemExit) as error:
        evaluate.main([f"{out}/last.pt", "--workers", "0", "--batch", "3"])
    assert error.value.code == 143 and "evaluating: 3 of 8 videos were done" in capsys.readouterr().out

def test_a_dead_data_worker_ends_the_run_with_a_sentence(micro, tmp_path, monkeypatch, capsys):
    original = data.Clips.__getitem__
    def dies(self, item):
        if item[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, item)
    monkeypatch.setattr(data.Clips, "__getitem__", dies)
    run = SMALL + ["--root", micro, "--out", str(tmp_path / "run"), "--workers", "2"]
    with pytest.raises(SystemExit, match="a process that reads videos has died.*--workers.*DataLoader worker"):
        train.main(run)
    monkeypatch.undo()
    train.main(run + ["--resume"])
    assert "resumed after epoch 1 and 0 steps" in capsys.readouterr().out and len(lines(tmp_path / "run")) == 2

def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(micro, tmp_path, monkeypatch):
    run, last = SMALL + ["--root", micro, "--out", str(tmp_path / "run")], tmp_path / "run" / "last.pt"
    train.main(run + ["--limit", "8", "--epochs", "1", "--out", str(tmp_path / "other")])
    assert os.path.getsize(tmp_path / "other" / "best.pt") < 400_000 < 900_000 < os.path.getsize(tmp_path / "other" / "last.pt")
    smaller = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, smaller[1]))
        with pytest.raises(SystemExit, match="train.py: cannot write .*last.pt, which stays as it was: File too large"):
            train.main(run)
        assert os.listdir(tmp_path / "run") == []
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, smaller[1]))  # the optimiser's state comes with the first step
        with pytest.raises(SystemExit, match="train.py: cannot write .*last.pt"):
            train.main(run)
        assert models.read_checkpoint(str(last))["training"]["batch"] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, smaller)
    train.main(run + ["--resume"])
    assert len(lines(tmp_path / "run")) == 2

def test_weights_that_are_not_finite_are_not_saved(micro, tmp_path, monkeypatch):
    out, step = str(tmp_path / "run"), torch.optim.AdamW.step
    def spoils(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data[0] = math.inf
    monkeypatch.setattr(torch.optim.AdamW, "step", spoils)
    with pytest.raises(SystemExit, match="weights are not finite any more"):
        train.main(SMALL + ["--root", micro, "--out", out, "--limit", "8"])  # its one step has a finite loss
    assert models.read_checkpoint(f"{out}/last.pt")["training"]["batch"] == 0

def test_steps_that_fp16_skips_are_counted_and_shown(micro, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "autocast_type", lambda *_: torch.float16)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, init_scale=2.0**127, backoff_factor=2.0**-126, **kwargs))
    train.main(SMALL + ["--root", micro, "--out", str(tmp_path / "run"), "--method", "linear", "--limit", "8"])
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [1, 1] and "1 steps skipped" in capsys.readouterr().out

@pytest.mark.parametrize("spoil", [lambda s: s[0].update(exp_avg=torch.zeros(3)), lambda s: s[0].update(exp_avg=torch.zeros(1).expand(s[0]["exp_avg"].shape))])
def test_an_optimiser_state_that_does_not_fit_is_refused(spoil, micro, tmp_path):
    run = SMALL + ["--root", micro, "--out", str(tmp_path / "run"), "--epochs", "1"]
    train.main(run)
    content = models.read_checkpoint(str(tmp_path / "run" / "last.pt"))
    spoil(content["training"]["optimizer"]["state"])
    seal(tmp_path / "run" / "last.pt", packed(content))
    with pytest.raises(SystemExit, match="is refused|does not fit the model"):
        train.main(run + ["--resume"])

def test_a_signal_while_the_epochs_checkpoint_is_written_is_not_lost(micro, tmp_path, monkeypatch):
    saves, original = [], models.save_checkpoint
    def signalled(path, *args):
        original(path, *args)
        saves.append(path)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(models, "save_checkpoint", signalled)
    with pytest.raises(SystemExit) as error:
        train.main(SMALL + ["--root", micro, "--out", str(tmp_path / "run")])
    assert error.value.code == 143 and len(saves) == 2

def test_resume_takes_a_file_and_refuses_what_is_none(micro, tmp_path, capsys):
    one, other, run = str(tmp_path / "one"), str(tmp_path / "other"), SMALL + ["--root", micro]
    train.main(run + ["--out", one])
    with pytest.raises(SystemExit, match="there is no checkpoint absent.pt"):
        train.main(run + ["--out", other, "--resume", "absent.pt"])
    with pytest.raises(SystemExit, match="weights only"):
        train.main(run + ["--out", other, "--resume", f"{one}/best.pt"])
    train.main(run + ["--out", other, "--resume", f"{one}/last.pt"])
    assert untimed(one) == untimed(other) and "resumed after epoch 2 and 0 steps" in capsys.readouterr().out
    train.main(run + ["--out", str(tmp_path / "third"), "--seed", "1"])
    with pytest.raises(SystemExit, match="third holds a run already"):
        train.main(run + ["--out", str(tmp_path / "third"), "--resume", f"{one}/last.pt"])
    for absent in (f"{tmp_path}/new/last.pt", ""):
        with pytest.raises(SystemExit, match="there is no checkpoint"):
            train.main(run + ["--out", str(tmp_path / "new"), "--resume", absent])
    shutil.copy(f"{one}/last.pt", f"{one}/kept.pt")  # going on from it would overwrite what is further
    with pytest.raises(SystemExit, match="one holds a run already"):
        train.main(run + ["--out", one, "--resume", f"{one}/kept.pt"])

def test_a_folder_whose_start_failed_can_be_used_again(micro, tmp_path, monkeypatch):
    run = SMALL + ["--root", micro, "--out", str(tmp_path / "run")]
    train.main(run)
    def full(*args):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit, match="cannot write .*No space left"):
            train.main(run + ["--overwrite"])
    train.main(run + ["--resume"])
    assert len(lines(tmp_path / "run")) == 2

def test_the_initial_weights_are_not_needed_to_resume(micro, tmp_path):
    out, first = str(tmp_path / "run"), str(tmp_path / "first.pt")
    save(models.build_model(**dict(TINY, bottleneck=8)), first)
    train.main(SMALL + ["--root", micro, "--out", out, "--init", first])
    os.remove(first)
    train.main(SMALL + ["--root", micro, "--out", out, "--init", first, "--resume"])

def torchrun(*arguments):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--signals-to-handle",
                 "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", *arguments)

def children(pid):
    """Process ids of the processes that a process has started."""
    tasks = [f"/proc/{pid}/task/{task}/children" for task in os.listdir(f"/proc/{pid}/task")]
    return [int(child) for task in tasks for child in open(task).read().split()]

@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in Linux's /proc")
def test_torchrun_passes_signals_on_restarts_the_dead_and_continues(micro, tmp_path):
    out = str(tmp_path / "run")
    run = [script("train.py"), *SMALL, "--root", micro, "--out", out, "--workers", "1", "--save-every", "0", "--resume"]
    process = torchrun("--max-restarts=3", *run, "--epochs", "1000")
    wait_for(process, "epoch   2")
    os.kill(children(process.pid)[1], signal.SIGKILL)  # one of the two
    printed = wait_for(process, "resumed after epoch")
    wait_for(process, "epoch   4")
    os.kill(process.pid, signal.SIGUSR1)
    started = time.monotonic()
    printed += process.communicate(timeout=60)[0]
    assert process.returncode == 1 and time.monotonic() - started < 30 and group_is_gone(process)
    assert "the run starts afresh" not in printed and printed.count("train.py: stopped by a signal; --resume continues") == 1
    training = models.read_checkpoint(f"{out}/last.pt")["training"]
    assert training["epoch"] >= 4 and [line["epoch"] for line in lines(out)] == list(range(1, training["epoch"] + 1))

def stopped_midway(rank, port, run):
    """What torchrun starts; one of the two processes gets a signal in its third step."""
    torch.set_num_threads(1)
    as_one_of_two(rank, port)
    cross_entropy, calls = F.cross_entropy, itertools.count(1)
    def signalled(*args, **kwargs):
        if rank == 1 and next(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return cross_entropy(*args, **kwargs)
    F.cross_entropy = signalled
    with pytest.raises(SystemExit) as error:
        train.main(run)
    assert error.value.code == 143

def test_a_run_continues_with_another_number_of_processes(micro, tmp_path, capsys):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run = SMALL + ["--root", micro, "--dropout", "0", "--batch", "4", "--lr", "0.1"]
    train.main(run + ["--out", whole])
    torch.multiprocessing.spawn(stopped_midway, (free_port(), run + ["--out", parts]), nprocs=2)
    training = models.read_checkpoint(f"{parts}/last.pt")["training"]
    assert (training["epoch"], training["batch"], lines(parts)) == (0, 3, [])
    train.main(run + ["--out", parts, "--resume"])
    assert "resumed after epoch 0 and 3 steps" in capsys.readouterr().out
    for a, b in zip(untimed(whole), untimed(parts), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4) and a["lr"] == b["lr"]

def seal(path, body):
    """A checkpoint of any content, with the SHA-256 that belongs to it."""
    with open(path, "wb") as file:
        file.write(body + models.MARK + hashlib.sha256(body).hexdigest().encode())
    return str(path)

def packed(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()

def laughs(depth):
    value = ["ha"]
    for _ in range(depth):
        value = [value, value]
    return value

HOSTILE = {
    "a head with strides of 0": lambda c: c["weights"].update({"head.2.weight": torch.zeros(1).expand(10**9, 128)}),
    "a head on no device": lambda c: c["weights"].update({"head.2.weight": torch.zeros(10**9, 128, device="meta")}),
    "classes by the million": lambda c: (c["model"].update(num_classes=900_000), c["run"].update(classes=900_000 * ["x"])),
    "more values than bytes": lambda c: c["run"].update(laughs=laughs(40)),
    "tensors in other places": lambda c: c.update(training=dict(optimizer=dict(state={0: dict(exp_avg=torch.zeros(1).expand(10**9))}))),
    "a kind that is not plain": lambda c: c["run"].update(data=Counter("abc")),
    "names for other classes": lambda c: c["run"].update(classes=c["run"]["classes"][:-1]),
    "huge adapters": lambda c: c["model"].update(bottleneck=10**9),
    "adapters beyond numbers": lambda c: c["model"].update(bottleneck=10**18),
    "frames by the billion": lambda c: c["model"].update(num_frames=16 * 10**8),
    "frames by the thousand": lambda c: c["model"].update(num_frames=16 * 10**3),
    "huge frames": lambda c: c["model"].update(image_size=10**5),
    "no frames": lambda c: c["model"].update(spatial_frames=0),
    "a fractional width": lambda c: c["model"].update(bottleneck=0.5),
    "another method": lambda c: c["model"].update(method="aim"),
    "an unknown option": lambda c: c["model"].update(evil=1),
    "no backbone": lambda c: c["model"].pop("backbone"),
    "a backbone that is a number": lambda c: c["model"].update(backbone=7),
    "no weights": lambda c: c["weights"].clear(),
    "a list of weights": lambda c: c.update(weights=[torch.zeros(3)]),
    "sparse weights": lambda c: c["weights"].update({"head.2.bias": torch.zeros(8).to_sparse()}),
    "no run": lambda c: c.pop("run"),
    "another format": lambda c: c.update(format=2),
}

@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_before_anything_is_built(name, tmp_path, monkeypatch):
    model = models.build_model(**TINY)
    content = models.read_checkpoint(save(model, tmp_path / "a.pt"))
    built, original = [], models.load_image_model
    monkeypatch.setattr(models, "load_image_model", lambda *args, **kwargs: built.append(original(*args, **kwargs)) or built[-1])
    HOSTILE[name](content)
    with pytest.raises(models.ModelError, match="is refused|does not fit|there is no method") as error:
        models.load_checkpoint(seal(tmp_path / "b.pt", packed(content)))
    assert "\n" not in str(error.value) and all(visual.proj.is_meta for visual in built)

def test_a_file_that_unpacks_to_more_than_it_holds_is_refused(tmp_path):
    body = packed(models.read_checkpoint(save(models.build_model(**TINY), tmp_path / "a.pt")))
    squeezed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert len(squeezed.getvalue()) < len(body)
    shared = io.BytesIO()  # many names, one content
    with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(shared, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        largest = max(new.filelist, key=lambda entry: entry.file_size)
        for i in range(10):
            again = copy.copy(largest)
            again.filename = f"{largest.filename}{i}"
            new.filelist.append(again)
    for file in (squeezed, shared):
        with pytest.raises(models.ModelError, match="is refused"):
            models.load_checkpoint(seal(tmp_path / "b.pt", file.getvalue()))

def test_mutated_checkpoints_are_refused_or_the_same(tmp_path, thorough):
    model = models.build_model(**dict(TINY, method="linear"))
    path = save(model, tmp_path / "a.pt", data="folder")
    whole, content, video = open(path, "rb").read(), models.read_checkpoint(path), random_video()
    body, want, outcomes = whole.rpartition(models.MARK)[0], model.eval()(video), Counter()
    rng = np.random.default_rng(0)
    for i in range(1000 if thorough else 60):
        spoilt = bytearray(body if i % 2 else whole)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(len(spoilt)))
            kind = rng.integers(4)
            if kind == 0:
                spoilt[place] ^= 1 << rng.integers(8)
            elif kind == 1:
                spoilt[place:place + 4] = rng.bytes(4)
            elif kind == 2:
                del spoilt[place:place + int(rng.integers(1, 100))]
            else:
                spoilt[place:place] = spoilt[place // 2:place // 2 + int(rng.integers(1, 100))]
        if i % 2:
            seal(tmp_path / "b.pt", bytes(spoilt))  # by someone who knows how
        else:
            (tmp_path / "b.pt").write_bytes(spoilt)
        started = time.monotonic()
        try:
            again, got = models.load_checkpoint(str(tmp_path / "b.pt"))
        except models.ModelError as error:
            assert "\n" not in str(error) and "b.pt" in str(error)
            outcomes["refused", i % 2] += 1
        else:  # what was mutated is then not what the archive reads, or a value that a sealed file may well have
            assert i % 2
            outcomes["loaded", i % 2] += 1
            same = all(torch.equal(v, content["weights"][k]) for k, v in got["weights"].items())
            assert not same or got["model"] != content["model"] or torch.equal(again.eval()(video), want)
        assert time.monotonic() - started < 20
    assert outcomes["refused", 0] == len(range(0, 1000 if thorough else 60, 2)) and outcomes["refused", 1] > 10

def test_memory_and_files_stay_as_they_are(micro, tmp_path, thorough, monkeypatch):
    number = 2000 if thorough else 60
    videos = [path for path, _ in data.find_videos("folder", micro).train]
    (tmp_path / "train.txt").write_text("".join(f'"{videos[i % 16]}" {i % 2}\n' for i in range(8 * number)))
    (tmp_path / "val.txt").write_text("".join(f'"{path}" {i % 2}\n' for i, path in enumerate(videos)))
    samples, calls, agree = [], itertools.count(1), evaluate.agree
    def sampled(*numbers):
        if len(numbers) == 3 and next(calls) % (number // 20) == 0:  # once a step
            ids = [os.getpid(), *children(os.getpid())]
            samples.append([sum(1 for _ in os.scandir(f"/proc/{i}/fd")) for i in ids] + [
                int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{i}/status").read())[1]) for i in ids])
        return agree(*numbers)
    monkeypatch.setattr(train, "agree", sampled)
    train.main(["--data", "list", "--root", str(tmp_path), "--out", str(tmp_path / "run"), "--backbone", "tiny", "--frames", "16",
                "--spatial-frames", "1", "--batch", "8", "--epochs", "1", "--workers", "2", "--sampling", "dense", "--stride", "1",
                "--save-every", "0.1"])
    assert len(samples) == 20 and len({len(sample) for sample in samples}) == 1
    files, memory = np.split(np.array(samples), 2, axis=1)  # (20, processes)
    assert (files[5:] <= files[2:5].max(axis=0)).all()
    growth = memory[-5:].mean(axis=0) / memory[5:10].mean(axis=0)
    print(f"after {number} batches: {files[-1]} files, {memory[-1] // 1024} MB, grown by {growth} from a third on")
    assert (growth < (1.05 if thorough else 1.3)).all()
