"""The options: recipes, what they do to the defaults, and what --help shows of them."""

import argparse
import importlib
import os

import pytest

import train
from support.datasets import SOURCES
from support.options import at_least, number, views

BENCHMARKS = ("k400", "ssv2", "hmdb51", "diving48")


# ---------------------------------------------------------------- recipes
def test_recipes_are_complete_and_the_authors():
    assert set(train.RECIPES) == set(SOURCES)
    for name in SOURCES:
        args = train.parse(["--data", name])
        assert set(train.RECIPES[name]) <= set(vars(args))
        assert args.root == os.path.join("data", name)
    for name in BENCHMARKS:
        args = train.parse(["--data", name])
        assert args.batch % 8 == 0
        assert args.frames % 16 == 0 and args.frames % args.spatial_frames == 0
        assert (args.augment, args.weight_decay, args.warmup) == ("rand", 0.05, 3)
        assert args.flip == (name != "ssv2")


@pytest.mark.parametrize(
    "name, lr, epochs, erasing, test_views, sampling, frames, pre_attention_adapter",
    [
        ("ssv2", 5e-4, 60, 0.1, (1, 3), "uniform", 48, True),
        ("hmdb51", 3e-2, 50, 0.5, (3, 1), "dense", 16, False),
        ("diving48", 7e-4, 50, 0.1, (3, 1), "uniform", 16, False),
        ("k400", 1.2e-3, 30, 0, (3, 1), "dense", 32, False),
    ],
)
def test_a_recipe_has_the_published_figures(
    name, lr, epochs, erasing, test_views, sampling, frames, pre_attention_adapter
):
    args = train.parse(["--data", name])
    assert (args.lr, args.epochs, args.erasing, args.views) == (lr, epochs, erasing, test_views)
    assert (args.sampling, args.frames) == (sampling, frames)
    assert args.pre_attention_adapter == pre_attention_adapter


def test_options_overrule_the_recipe():
    assert train.parse(["--data", "hmdb51"]).stride == (1, 2, 4, 8)
    options = "--sampling dense --stride 1 2 --flip --erasing 0".split()
    args = train.parse(["--data", "ssv2", *options])
    assert (args.sampling, args.stride, args.flip, args.erasing) == ("dense", (1, 2), True, 0)
    assert args.epochs == 60  # the others stay the recipe's


@pytest.mark.parametrize(
    "options, folder",
    [
        ([], "demo-dualpath-s0"),
        (["--data", "folder", "--method", "aim", "--seed", "3"], "folder-aim-s3"),
        (["--data", "k400", "--paths", "temporal"], "k400-dualpath-temporal-s0"),
        (["--data", "hmdb51"], "hmdb51-split1-dualpath-s0"),
        (["--data", "hmdb51", "--split", "2"], "hmdb51-split2-dualpath-s0"),
    ],
)
def test_runs_that_differ_have_folders_of_their_own(options, folder):
    assert train.parse(options).out == os.path.join("runs", folder)


# ---------------------------------------------------------------- types of values
@pytest.mark.parametrize(
    "parse, text, value",
    [
        (number(0, 1), "0.5", 0.5),
        (number(0, 1), "1.01", None),
        (number(0), "nan", None),
        (number(0), "inf", None),
        (at_least(1), "7", 7),
        (at_least(1), "7.0", None),
        (at_least(1), "0", None),
        (views, "3x1", (3, 1)),
        (views, "3x0", None),
        (views, "3x1x1", None),
    ],
)
def test_values_are_checked_as_they_are_read(parse, text, value):
    if value is None:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not"):
            parse(text)
    else:
        assert parse(text) == value


# ---------------------------------------------------------------- --help
def printed_help(module, argv, capsys):
    with pytest.raises(SystemExit) as error:
        importlib.import_module(module).main([*argv, "--help"])
    assert error.value.code == 0
    return capsys.readouterr().out


def assert_fits(printed, most_lines):
    printed = printed.splitlines()
    assert len(printed) <= most_lines
    assert max(map(len, printed)) <= 131


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["frames per clip, T (default: 16)", "per 256 clips (default: 0.04)"]),
        (["--data", "ssv2"], ["frames per clip, T (default: 48)", "A_t0 (default: True)"]),
    ],
)
def test_help_fits_a_screen_and_shows_the_recipe(argv, words, capsys):
    printed = printed_help("train", argv, capsys)
    assert all(word in printed for word in words)
    assert_fits(printed, most_lines=60)


@pytest.mark.parametrize(
    "module, words",
    [
        ("evaluate", ["(default: 8)", "(default: auto)", "(that of the training)"]),
        ("model", ["[16, 32, 48]"]),
        ("tools.check_data", ["(default: 16)", "(default: demo)", "(all)"]),
        ("tools.cost", ["(5)", "(1)", "[16, 32, 48]"]),
    ],
)
def test_the_other_helps_fit_a_screen_and_say_the_defaults(module, words, capsys):
    printed = printed_help(module, [], capsys)
    assert all(word in printed for word in words)
    assert_fits(printed, most_lines=40)
