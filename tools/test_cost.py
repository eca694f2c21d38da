"""The counts, and that the benchmark measures what it says, next to the plain model."""

import pytest
import torch

from adapters import METHODS
from tools import cost
from tools.report import table


@pytest.fixture
def costs(monkeypatch):
    """Runs the script; the rows of the table that it prints."""
    rows = []

    def seen(found):
        rows.extend(found)
        return table(found)

    def run(*words):
        cost.main(words)
        return rows

    monkeypatch.setattr(cost, "table", seen)
    return run


def test_every_method_is_counted(costs):
    found = costs("--count", "--backbone", "tiny")
    assert [row["images"] for row in found if row["method"] == "aim"] == [8, 16, 32]
    rows = {row["method"]: row for row in found}
    assert rows.keys() > METHODS.keys() and rows["full"]["T"] == rows["full"]["images"] == 8
    assert rows["full"]["tuned M"] == rows["full"]["all M"] == rows["linear"]["all M"]
    both, one = rows["st_adapter before=both"], rows["st_adapter"]
    assert both["tuned M"] > 1.5 * one["tuned M"]
    with pytest.raises(SystemExit, match="cost.py: aim needs a class token"):
        cost.main(["--count", "--backbone", "swin_t", "--method", "aim"])


def test_columns_hold_medians_and_medians_of_ratios(costs, monkeypatch):
    seconds = {
        "forward": [2.0, 4.0, 9.0],
        "train": [8.0, 8.0, 8.0],
        "plain forward": [1.0, 4.0, 3.0],
        "plain train": [4.0, 8.0, 16.0],
        "product": [0.5, 2.0, 0.5],
    }

    def take_turns(steps, rounds, wait):
        return {name: seconds[name[1] if len(name) == 2 else name] for name in steps}

    monkeypatch.setattr(cost, "take_turns", take_turns)
    words = ["--backbone", "tiny", "--batch", "2", "--method", "linear", "adaptformer", "full"]
    for row, forwards in zip(costs(*words), (1, 2, 3), strict=True):
        assert row["forward/s"] == 0.5 and row["forward ÷ plain"] == 2  # of 2, 1 and 3
        assert row["train/s"] == 0.25 and row["train ÷ plain"] == 1
        rate, macs = 2048**3 / 0.5, forwards * row["GMACs/view"] * 1e9 * 2
        assert row["MFU"] == pytest.approx(macs / 8 / rate)


def test_the_benchmark_measures_next_to_the_plain_model(costs, capsys):
    words = ["--backbone", "tiny", "--rounds", "1", "--method", "dualpath", "linear"]
    rows = costs(*words)
    out = capsys.readouterr().out
    assert [(row["T"], row["images"]) for row in rows[:3]] == [(16, 9), (32, 10), (48, 11)]
    assert rows[4]["method"] == "linear"
    for row in rows:
        assert f"{row['train ÷ plain']:.5g}" in out and f"{row['GMACs/view']:.5g}" in out
        assert row["MFU"] > 0 and row["train ÷ plain"] > 0 and row["forward ÷ plain"] > 0


def test_memory_is_a_steps_own(monkeypatch):
    """On a GPU that holds other models, too; here its allocator is a pretended one."""
    calls = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e9 + 2**30 * len(calls))
    assert cost.peak_gib(lambda: calls.append("run")) == 2
    assert calls == ["reset", "run"]


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


def test_what_cannot_be_measured_gets_a_sentence(monkeypatch):
    def take_turns(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")

    monkeypatch.setattr(cost, "take_turns", take_turns)
    with pytest.raises(SystemExit, match=r"cost.py: CUDA out of memory. \(a smaller"):
        cost.main(["--backbone", "tiny", "--method", "linear"])
