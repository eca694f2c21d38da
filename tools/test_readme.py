"""What README.md and docs/ say is there: names, options, links, and Python that runs."""

import glob
import importlib
import json
import os
import pkgutil
import re
import shutil
from functools import partial

import numpy as np
import open_clip
import pytest
import torch

import adapters
import train
from conftest import HERE, SMALL, random_video, script, tiny
from support.backbones import NO_TEXT
from support.datasets import find_videos

README = script("README.md")
DOCS = sorted(glob.glob(script("docs/*.md")))
PAGES = [README, *DOCS]
SCRIPTS = ["train", "evaluate"]
SCRIPTS += [
    f"tools.{name}" for name in ("compare", "cost", "look", "check_data", "copy_data", "reading")
]
ELSEWHERE = set(  # torchrun's, Slurm's and Docker's
    "--nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --max-restarts --standalone"
    " --signals-to-handle --nodes --ntasks-per-node --gpus-per-node --signal --shm-size".split()
)


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def name_of(path):
    return os.path.relpath(path, HERE)


# ---------------------------------------------------------------- names
def test_the_readmes_table_from_paper_to_code_names_what_is_there():
    section = read(README).split("## From the paper to the code")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 12
    for row in rows:
        file = None
        for name in re.findall(r"`([\w.]+)`", row):
            if "." in name:
                file = name.rpartition(".")[0]
            else:  # after the first, a name may stand without its file
                name = f"{file}.{name}"
            assert pkgutil.resolve_name(name) is not None


def options_of(name, capsys):
    """The options in a script's --help, and in that of its parts, as of tools.look."""
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    parts = re.search(r"^  \{([\w,]+)\}", text, re.M)
    for part in parts[1].split(",") if parts else []:
        with pytest.raises(SystemExit):
            main([part, "--help"])
        text += capsys.readouterr().out
    return set(re.findall(r"--[\w-]+", text))


def test_all_pages_name_options_that_are_there(capsys):
    known = ELSEWHERE.union(*(options_of(name, capsys) for name in SCRIPTS))
    assert len(known) > 50
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", read(page)))
        assert named <= known, (name_of(page), named - known)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_that_a_page_names_are_there(page):
    text = read(page)
    files = re.findall(
        r"(?<![\w/.:{-])((?:(?:docs|support|tools|assets)/)?"
        r"(?:\w+\.(?:py|md)|requirements\.txt))\b",
        text,
    )
    for file in set(files):
        beside = os.path.join(os.path.dirname(page), file)
        assert os.path.exists(script(file)) or os.path.exists(beside), file
    for module in re.findall(r"python -m (tools\.\w+)", text):
        assert os.path.exists(script(module.replace(".", "/") + ".py")), module


# ---------------------------------------------------------------- links
def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def targets(page):
    """(file, anchor or "") of each link and picture of a page that leads into the repository."""
    links = re.findall(r"\]\(([^)]+)\)", prose(page)) + re.findall(r'src="([^"]+)"', prose(page))
    for link in links:
        if "://" not in link:
            file, _, anchor = link.partition("#")
            path = os.path.join(os.path.dirname(page), file) if file else page
            yield os.path.normpath(path), anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page):
    for path, anchor in targets(page):
        assert os.path.exists(path), path
        assert not anchor or anchor in anchors(path), anchor


def test_the_links_that_are_checked_are_all_pages_and_all_pictures():
    reached = {path for page in PAGES for path, _ in targets(page)}
    assert {path for path, _ in targets(README)} >= set(DOCS)
    pictures = {path for path in reached if os.path.dirname(path) == script("assets")}
    assert pictures == set(glob.glob(script("assets/*.*")))
    assert len(pictures) >= 4 and all(os.path.getsize(path) < 100_000 for path in pictures)


# ---------------------------------------------------------------- Python
def python_of(page):
    return re.findall(r"^```python\n(.*?)^```$", read(page), re.M | re.S)


def test_the_readmes_model_around_ones_own_gives_logits(monkeypatch):
    code = python_of(README)[0]
    create = open_clip.create_model
    vision = {"layers": 2, "width": 768, "patch_size": 16, "image_size": 224}  # of 12 layers
    without_weights = partial(create, text_cfg=NO_TEXT, vision_cfg=vision)
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: without_weights(name))
    variables = {}
    with torch.no_grad():
        exec(code, variables)
    assert variables["logits"].shape == (1, 8)
    assert variables["y_sp"].shape == variables["y_tp"].shape == (1, 512)
    images = variables["video"][0, ::2].float()
    visual = variables["clip"].eval().visual
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (visual.image_mean, visual.image_std))
    with torch.no_grad():
        want = variables["clip"].encode_image((images / 255 - mean) / std).mean(0)
    torch.testing.assert_close(variables["y_sp"][0], want, rtol=1e-4, atol=1e-4)


def test_the_readmes_features_of_a_folder(micro, tmp_path, monkeypatch):
    code = python_of(README)[1]
    monkeypatch.chdir(tmp_path)
    train.main(SMALL + ["--root", micro, "--epochs", "1"])
    os.mkdir("clips")
    for i, (path, _) in enumerate(find_videos("folder", micro).val[:3]):
        shutil.copy(path, f"clips/{i}.mp4")
    exec(code, {})
    assert np.load("features.npy").shape == (3, 2 * 128)
    open("clips/broken.mp4", "w").close()
    with pytest.raises(SystemExit, match="broken.mp4"):
        exec(code, {})
    with open("runs/folder-dualpath-s0/log.jsonl") as file:
        log = [json.loads(line) for line in file]  # what pandas reads with lines=True
    assert len(log) == 1
    assert all(not isinstance(value, (list, dict)) for value in log[0].values())


def test_the_method_that_the_docs_add_is_one(monkeypatch):
    """It starts as the linear probe does, and all that is trained gets a gradient."""
    block, entry = python_of(script("docs/new_method.md"))[:2]
    names = dict(vars(adapters))
    exec(block, names)
    added = eval("{" + entry + "}", names)
    monkeypatch.setattr("adapters.METHODS", adapters.METHODS | added)
    monkeypatch.setattr("model.METHODS", adapters.METHODS)
    (method,) = added
    video = random_video()
    torch.manual_seed(0)
    probe = tiny(method="linear").eval()
    model = tiny(method=method, dropout=0.0)
    model.head.load_state_dict(probe.head.state_dict())
    logits = model(video)
    torch.testing.assert_close(logits, probe(video))
    for block in model.blocks:
        torch.nn.init.normal_(block.B.weight, std=0.1)
    model(video).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith("visual.")), name
        assert not p.requires_grad or p.grad.abs().max() > 0, name
