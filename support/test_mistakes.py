"""Whatever users get wrong ends with one sentence that says what to do, and spoils nothing."""

import importlib
import os
import re
import shutil

import pytest
import torch

import evaluate
import train
from conftest import SMALL
from support.datasets import find_videos


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


def as_name(value):
    """A case's name: its options."""
    return " ".join(value) if isinstance(value, list) else ""


# ---------------------------------------------------------------- train.py
DATA_MISTAKES = [
    (["--root", "/no/where"], "/no/where is not there; say with --root"),
    (["--root", "one"], "one has 2 train videos and 1 classes; it needs at least 1 .* 2"),
    (["--root", "no-val"], "no-val/val is not there"),
    (["--root", "other"], "other gives the val video .*sideways"),
    (["--root", "empty"], "empty/train is not there"),
    (["--data", "k400", "--root", "empty"], "empty/train.csv is not there"),
    (["--data", "list", "--root", "empty"], "empty/train.txt is not there"),
    (["--split", "2"], "--split chooses"),
    (
        ["--batch", "99"],
        "--batch 99 must be a multiple .* of processes, 1, and at most .* clips, 16",
    ),
]
FOLDER_MISTAKES = [
    (["--out", __file__], "test_mistakes.py"),
    (
        ["--out", "run"],
        "run holds a run already: --resume continues it, --overwrite deletes it",
    ),
    (
        ["--out", "run", "--resume", "--method", "aim"],
        "run/last.pt is of a run with other options: .*--method aim .was dualpath",
    ),
    (["--resume", "run/best.pt"], "run/best.pt holds weights only"),
    (["--resume", "text.mp4"], "text.mp4 is not a checkpoint of this project"),
    (["--init", "absent.pt"], "no checkpoint absent.pt"),
    (["--init", "text.mp4"], "text.mp4 is not a checkpoint"),
    (
        ["--init", "run/best.pt", "--method", "aim"],
        "run/best.pt, of dualpath around .*, does not fit this aim around 'tiny'",
    ),
]
MODEL_MISTAKES = [
    (["--frames", "15"], r"T_s = 4\) is 15, .* works is 16"),
    (["--frames", "20"], "20, .* 16 or 32"),
    (["--spatial-frames", "3"], "16, which is not a multiple of 48"),
    (["--size", "100"], "100.*96 or 104"),
    (["--method", "aim", "--paths", "spatial"], "paths is 'spatial'; it is both"),
    (["--backbone", "ViT-B16"], "no model 'ViT-B16'; near: ViT-B-16"),
    (["--backbone", "RN50"], "'RN50' is not supported: it is conv"),
    (
        ["--backbone", "ViT-B-16"],
        "'openai' were trained with QuickGELU, .* --backbone ViT-B-16-quickgelu",
    ),
    (
        ["--backbone", "ViT-B-16", "--pretrained", "opnai"],
        "'opnai' is neither a file nor weights",
    ),
    (
        ["--backbone", "ViT-B-16", "--pretrained", "text.mp4"],
        "cannot read weights from text.mp4",
    ),
    (["--backbone", "local-dir:/no/where"], "'local-dir:/no/where'"),
]
MACHINE_MISTAKES = [
    (["--amp", "fp16"], "--amp fp16 needs a CUDA GPU"),
    (["--device", "cuda"], "--device cuda finds no device for process 0"),
    (["--device", "mps"], "--device mps finds no device for process 0"),
]
VALUE_MISTAKES = [
    ["--bottleneck", "0"],
    ["--epochs", "0"],
    ["--batch", "-1"],
    ["--workers", "-1"],
    ["--erasing", "2"],
    ["--lr", "-1"],
    ["--warmup", "nan"],
    ["--dropout", "x"],
    ["--seed", "-1"],
    ["--seed", "9223372036854775808"],
    ["--views", "0x1"],
    ["--method", "dualpth"],
    ["--data", "k600"],
]


def refused_training(options, micro, mistakes, tmp_path, monkeypatch):
    """The exit code of a training that is refused and leaves everything as it was."""
    monkeypatch.chdir(mistakes)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        train.main(SMALL + ["--root", micro, "--out", str(out), *options])
    assert not os.path.exists(out)
    assert sorted(os.listdir(mistakes / "run")) == ["best.pt", "last.pt", "log.jsonl"]
    return error.value.code


@pytest.mark.parametrize(
    "options, words",
    DATA_MISTAKES + FOLDER_MISTAKES + MODEL_MISTAKES + MACHINE_MISTAKES,
    ids=as_name,
)
def test_mistakes_in_training_get_a_sentence(
    options, words, mistakes, micro, monkeypatch, tmp_path
):
    if torch.accelerator.is_available() and (options, words) in MACHINE_MISTAKES:
        pytest.skip("this machine has a GPU")
    said = refused_training(options, micro, mistakes, tmp_path, monkeypatch)
    assert re.search(words, said)
    assert re.match(r"\w+\.py: ", said) and "\n" not in said


@pytest.mark.parametrize("options", VALUE_MISTAKES, ids=as_name)
def test_values_that_are_none_get_a_sentence(
    options, mistakes, micro, monkeypatch, tmp_path, capsys
):
    assert refused_training(options, micro, mistakes, tmp_path, monkeypatch) == 2
    printed = capsys.readouterr().err  # argparse prints the sentence itself
    assert f"argument {options[0]}: " in printed and options[1] in printed


def test_without_a_compiler_there_is_a_sentence(micro, tmp_path, monkeypatch):
    def no_compiler(*args, **options):
        raise RuntimeError("No working C++ compiler found\nand its long explanation")

    monkeypatch.setattr(torch, "compile", no_compiler)
    words = "--compile does not work on this machine: No working C.. compiler found$"
    with pytest.raises(SystemExit, match=words):
        train.main(SMALL + ["--root", micro, "--out", str(tmp_path / "out"), "--compile"])
    assert not os.path.exists(tmp_path / "out")


# ---------------------------------------------------------------- the other scripts
@pytest.mark.parametrize(
    "module, argv, words",
    [
        ("evaluate", ["absent.pt"], "no checkpoint absent.pt"),
        ("evaluate", ["text.mp4"], "text.mp4 is not a checkpoint"),
        ("evaluate", ["run/best.pt", "--root", "/no/where"], "/no/where is not there"),
        ("evaluate", ["run/best.pt", "--root", "one"], "one has 1 val videos and 1 classes"),
        ("evaluate", ["run/best.pt", "--data", "hmdb51"], "data/hmdb51 is not there"),
        ("evaluate", ["run/best.pt", "--predictions", "/no/where/a.csv"], "/no/where/a.csv"),
        ("evaluate", ["run/best.pt", "a.mp4", "--predictions", "a.csv"], "for a data set, not for"),
        ("evaluate", ["run/best.pt", "--backbone", "RN50"], "'RN50' is not supported"),
        ("evaluate", ["run/best.pt", "--views", "3"], "'3' is not CLIPSxCROPS"),
        ("evaluate", ["run/best.pt", "--batch", "0"], "'0' is not a whole number of at least 1"),
        ("grid", [], "usage"),
        ("grid", ["text.mp4", "a.png"], "cannot read text.mp4"),
        ("grid", ["absent.mp4", "a.png"], "cannot read absent.mp4"),
        ("grid", ["empty", "a.png"], "cannot read empty"),
        ("tools.check_data", ["--data", "k400"], "data/k400 is not there"),
        ("tools.check_data", ["--frames", "0"], "of at least 1"),
        ("model", ["--backbone", "x"], "no model 'x'"),
        ("model", ["--backbone", "tiny", "--frames", "0"], "of at least 1"),
        ("model", ["--backbone", "tiny", "--json", "/no/where/x"], "/no/where/x"),
    ],
    ids=as_name,
)
def test_other_mistakes_get_a_sentence(module, argv, words, mistakes, monkeypatch, capsys):
    monkeypatch.chdir(mistakes)
    with pytest.raises(SystemExit) as error:
        importlib.import_module(module).main(argv)
    said = error.value.code
    if not isinstance(said, str):
        said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(words, said) and "\n" not in said


def test_a_file_that_is_no_video_is_named_and_the_others_are_classified(
    mistakes, micro, monkeypatch, capsys
):
    monkeypatch.chdir(mistakes)
    good = find_videos("folder", micro).val[0][0]
    assert evaluate.main(["run/best.pt", "text.mp4", good, "absent.mp4"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("cannot read text.mp4: ") and said[1] == good
    assert said[-1].startswith("cannot read absent.mp4: there is no")
    assert len(said) == 8  # five classes of the one that can be read
