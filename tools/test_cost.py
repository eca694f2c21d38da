"""The counts, and that the benchmark measures what it says, next to the plain model."""

import json
import re

import pytest
import torch

from adapters import METHODS
from tools import cost


def costs(path, *words):
    """The rows of the table, from its file."""
    cost.main([*words, "--json", str(path)])
    with open(path) as file:
        return json.load(file)["rows"]


def test_the_count_is_the_papers(tmp_path):
    words = ["--count", "--backbone", "ViT-B-16-quickgelu", "--method", "dualpath", "st_adapter"]
    rows = costs(tmp_path / "a.json", *words)
    in_blocks = {row["method"]: round(row["in blocks M"], 2) for row in rows}
    assert in_blocks["dualpath"] == 9.48
    assert in_blocks["dualpath pre_attention_adapter=True"] == 11.85
    assert in_blocks["st_adapter"] == 7.11 and in_blocks["st_adapter before=both"] == 14.22
    assert rows[0]["3 views"] == 3 * rows[0]["GMACs/view"]


def test_every_method_has_a_row_where_its_backbone_allows(tmp_path, capsys):
    found = costs(tmp_path / "a.json", "--count", "--backbone", "tiny")
    assert [row["images"] for row in found if row["method"] == "aim"] == [8, 16, 32]
    rows = {row["method"]: row for row in found}
    assert rows.keys() > METHODS.keys() and rows["full"]["T"] == rows["full"]["images"] == 8
    assert rows["full"]["tuned M"] == rows["full"]["all M"] == rows["linear"]["all M"]
    assert rows["linear"]["in blocks M"] == 0 < rows["vpt"]["in blocks M"]
    capsys.readouterr()
    words = ["--count", "--backbone", "swin_t", "--method", "aim", "linear", "vpt"]
    rows = costs(tmp_path / "a.json", *words)
    assert [row["method"] for row in rows] == ["linear"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", and")[0] for line in lines[:2]] == [
        "aim needs a class token",
        "vpt needs a class token",
    ]


def test_columns_hold_medians_and_medians_of_ratios():
    seconds = {
        "forward": [2.0, 4.0, 9.0],
        "train": [8.0, 8.0, 8.0],
        "plain forward": [1.0, 4.0, 3.0],
        "plain train": [4.0, 8.0, 16.0],
    }
    row = cost.speeds("dualpath", 3.0, seconds, [1.0, 1.0, 1.0], batch=2, rate=1e10)
    assert row["forward/s"] == 0.5 and row["forward ÷ plain"] == 2  # of 2, 1 and 3
    assert row["train/s"] == 0.25 and row["train ÷ plain"] == 1 and row["growth"] == 4
    for name, forwards in (("linear", 1), ("aim", 2), ("full", 3)):
        mfu = cost.speeds(name, 3.0, seconds, [1.0] * 3, 2, 1e10)["MFU"]
        assert mfu == pytest.approx(forwards * 3e9 * 2 / 8 / 1e10)


def test_the_benchmark_measures_next_to_the_plain_model(tmp_path, capsys):
    words = ["--backbone", "tiny", "--rounds", "1", "--method", "dualpath", "linear"]
    rows = costs(tmp_path / "a.json", *words)
    out = capsys.readouterr().out
    assert [(row["T"], row["images"]) for row in rows[:3]] == [(16, 9), (32, 10), (48, 11)]
    assert rows[4]["method"] == "linear" and rows[0]["growth"] == 1
    for row in rows:
        assert f"{row['train ÷ plain']:.5g}" in out and f"{row['GMACs/view']:.5g}" in out
        assert row["growth"] == pytest.approx(rows[0]["forward/s"] / row["forward/s"], rel=1e-3)
        assert row["MFU"] > 0 and row["train ÷ plain"] > 0 and row["forward ÷ plain"] > 0


def test_memory_is_a_models_own_and_its_steps(monkeypatch):
    """On a GPU that holds other models, too; here its allocator is a pretended one."""
    net, calls = torch.nn.Linear(1000, 1000, bias=False), []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e9 + 1e9 * len(calls))
    assert cost.peak_gigabytes(net, lambda: calls.append("run")) == 2 + 3 * 4e-3
    assert calls == ["reset", "run"]
    assert cost.peak_gigabytes(net.requires_grad_(False), calls.clear) == 4e-3


def test_a_training_step_trains_and_a_plain_one_reaches_pixels():
    linear = torch.nn.Linear(3, 2)
    before = linear.weight.detach().clone()
    optimizer = torch.optim.AdamW(linear.parameters())
    cost.step(linear, torch.randn(4, 3), train=True, optimizer=optimizer)
    assert not torch.equal(linear.weight, before) and linear.weight.grad is None
    pixels = torch.randn(4, 3, requires_grad=True)
    seen = []
    pixels.register_hook(seen.append)
    cost.step(linear.requires_grad_(False), pixels, train=True)
    assert len(seen) == 1 and seen[0].abs().max() > 0 and pixels.grad is None


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--backbone", "x"], "cost.py: .*'x'"),
        (["--json", "/no/where/a.json"], "cost.py: .*/no/where/a.json"),
        (["--rounds", "0"], "2"),  # argparse says it
        ([], r"cost.py: CUDA out of memory. \(a smaller"),
    ],
)
def test_what_cannot_be_measured_gets_a_sentence(words, sentence, monkeypatch):
    def take_turns(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")

    monkeypatch.setattr(cost, "take_turns", take_turns)
    with pytest.raises(SystemExit) as stop:
        cost.main(["--backbone", "tiny", "--method", "linear", *words])
    assert re.match(sentence, str(stop.value))
