"""What users choose: the recipes, and that mistakes end with one sentence and spoil nothing."""

import os
import re
import shutil

import pytest
import torch

import evaluate
import train
from support.datasets import SOURCES


@pytest.fixture(scope="module")
def mistakes(micro, micro_run, tmp_path_factory):
    """A folder with a run and with what new users get wrong."""
    folder = tmp_path_factory.mktemp("mistakes")
    train.main(micro_run + ["--out", str(folder / "run"), "--epochs", "1"])
    shutil.copytree(micro, folder / "one")
    for path in [*os.scandir(folder / "one/train"), *os.scandir(folder / "one/val")]:
        if path.name != "up_vertical":
            shutil.rmtree(path)
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty").mkdir()
    return folder


TRAINING = {
    # data
    "--root /no/where": "data folder /no/where is not there; say with --root where it is",
    "--root one": "one has 2 train videos and 1 classes; it needs at least 1 .* 2",
    "--data k400 --root empty": "there is no train list: looked for train.csv",
    "--split 2": "--split chooses",
    "--batch 99": "--batch 99 must be at most the number of training clips, 16, and a multiple",
    # the run's folder, and files
    "--out text.mp4": "text.mp4",
    "--out run": "run holds a run already: --resume continues from a last.pt, --overwrite de",
    "--out run --resume --lr 1": "run holds another run: .*--lr was 0.001",
    "--out run --resume --overwrite": "--resume continues the run that --overwrite deletes",
    "--init text.mp4": "text.mp4 is not a checkpoint of this project, or is damaged",
    "--init run/best.pt --method aim": "run/best.pt, of dualpath .* does not fit this aim",
    # the model
    "--frames 20": r"T_s = 4\) is 20, .* works is 16 or 32",
    "--method linear --serial-skip": "--serial-skip is no option of linear; it is one of dualp",
    "--aim-scale 1": "--aim-scale is no option of dualpath; it is one of aim",
    "--method aim --paths spatial": "--paths is no option of aim; it is one of dualpath",
    "--backbone ViT-B-16 --pretrained openai": "QuickGELU, .* --backbone ViT-B-16-quickgelu",
    "--backbone ViT-B-16 --pretrained opnai": "'opnai' is neither a file nor weights",
    # the optimisation
    "--sampling uniform --stride 2": "strides are for --sampling dense; uniform takes one frame",
    "--warmup 3": "--epochs 2 end before the learning rate is up: lower --warmup",
    "--amp fp16": "--amp fp16 needs a CUDA GPU",
    # values
    "--bottleneck 0": "argument --bottleneck: '0' is not a whole number of at least 1",
    "--views 0x1": "argument --views: '0' is not a whole number of at least 1",
    "--lr -1": "argument --lr: '-1' is not a number of at least 0",
}
EVALUATION = {
    "absent.pt": "no checkpoint absent.pt",
    "run/best.pt --root one": "one has 1 val videos and 1 classes",
    "run/best.pt --batch 0": "'0' is not a whole number of at least 1",
}


@pytest.mark.parametrize("options", [*TRAINING, *EVALUATION])
def test_a_mistake_is_one_sentence(options, mistakes, micro_run, monkeypatch, capsys):
    monkeypatch.chdir(mistakes)
    before = sorted(os.listdir(mistakes)), sorted(os.listdir("run"))
    with pytest.raises(SystemExit) as error:
        if options in TRAINING:
            train.main([*micro_run, "--out", "new", *options.split()])
        else:
            evaluate.main([*options.split(), "--workers", "0"])
    said = error.value.code
    if said == 2:  # argparse has printed it
        said = capsys.readouterr().err.splitlines()[-1]
    assert re.search((TRAINING | EVALUATION)[options], said) and "\n" not in said
    assert before == (sorted(os.listdir(mistakes)), sorted(os.listdir("run")))


def test_a_batch_must_divide_among_processes(micro_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 3)
    with pytest.raises(SystemExit, match="--batch 4 must be .* a multiple of .* processes, 3$"):
        train.main(micro_run + ["--out", str(tmp_path)])


def test_without_a_compiler_there_is_a_sentence(micro_run, tmp_path, monkeypatch):
    def no_compiler(*args, **options):
        raise RuntimeError("No working C++ compiler found\nand its long explanation")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(SystemExit, match="--compile does not .*: No working C.. compiler found$"):
        train.main(micro_run + ["--out", str(tmp_path), "--compile"])


# ---------------------------------------------------------------- recipes
@pytest.mark.parametrize(
    "name, published",
    [
        ("ssv2", (5e-4, 60, 0.1, (1, 3), "uniform", 48, True)),
        ("hmdb51", (3e-2, 50, 0.5, (3, 1), "dense", 16, False)),
        ("diving48", (7e-4, 50, 0.1, (3, 1), "uniform", 16, False)),
        ("k400", (1.2e-3, 30, 0, (3, 1), "dense", 32, False)),
    ],
)
def test_a_recipe_has_the_published_figures(name, published):
    args = train.parse(["--data", name])
    optimisation = (args.lr, args.epochs, args.erasing, args.views)
    assert (*optimisation, args.sampling, args.frames, args.pre_attention_adapter) == published
    assert args.batch % 8 == 0 and args.flip == (name != "ssv2")
    assert (args.augment, args.weight_decay, args.warmup) == ("rand", 0.05, 3)


def test_options_overrule_the_recipe_and_help_shows_it(capsys):
    assert set(train.RECIPES) == set(SOURCES)
    options = "--data ssv2 --sampling dense --stride 1 2 --flip --erasing 0".split()
    args = train.parse(options)
    assert (args.sampling, args.stride, args.flip, args.erasing) == ("dense", (1, 2), True, 0)
    assert args.epochs == 60  # the others stay the recipe's
    for name in SOURCES:  # a recipe's values for other methods are no mistake
        assert train.parse(["--data", name, "--method", "linear"]).bottleneck is None
    skips = {name for name in SOURCES if train.parse(["--data", name]).serial_skip}
    assert skips == {"folder", "list"}
    assert not train.parse(["--data", "list", "--no-serial-skip"]).serial_skip
    assert train.parse(["--data", "hmdb51"]).out == "runs/hmdb51-split1-dualpath-s0"
    assert train.parse(["--paths", "temporal"]).out == "runs/demo-dualpath-temporal-s0"
    with pytest.raises(SystemExit) as error:
        train.main(["--data", "ssv2", "--help"])
    printed = capsys.readouterr().out
    assert error.value.code == 0 and re.search(r"frames per\s+clip, T\s+\(48\)", printed)
