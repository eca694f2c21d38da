"""The benchmark measures what it says, next to the plain model."""

import json

import pytest
import torch

from adapters import METHODS
from tools import cost

CPU = torch.device("cpu")


def test_a_row_holds_medians_and_medians_of_ratios():
    seconds = {
        "forward": [2.0, 4.0, 9.0],
        "train": [8.0, 8.0, 8.0],
        "plain forward": [1.0, 4.0, 3.0],
        "plain train": [4.0, 8.0, 16.0],
    }
    counts = {"GMACs/view": 3.0}
    row = cost.cost_row("dualpath", counts, seconds, [1.0, 1.0, 1.0], batch=2, rate=1e10)
    assert row["forward/s"] == 0.5 and row["forward ÷ plain"] == 2  # of 2, 1 and 3
    assert row["train/s"] == 0.25 and row["train ÷ plain"] == 1 and row["growth"] == 4
    assert row["MFU"] == pytest.approx(2 * 3e9 * 2 / 8 / 1e10)
    mfu = {
        name: cost.cost_row(name, counts, seconds, [1.0] * 3, 1, 1e10)["MFU"]
        for name in ("linear", "aim", "full")
    }
    assert mfu["aim"] == pytest.approx(2 * mfu["linear"])
    assert mfu["full"] == pytest.approx(3 * mfu["linear"])


def test_where_nothing_can_be_written_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(cost, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="/no/where/a.json"):
        cost.main(["--backbone", "tiny", "--json", "/no/where/a.json"])


def test_the_benchmark_measures_next_to_the_plain_model(tmp_path, capsys):
    path = str(tmp_path / "a.json")
    frames = ["--frames", "16", "32"]
    cost.main(["--backbone", "tiny", *frames, "--rounds", "1", "--json", path])
    out = capsys.readouterr().out
    with open(path) as file:
        result = json.load(file)
    rows = result["rows"]
    assert (result["batch"], result["rounds"], result["compile"]) == (1, 1, False)
    assert result["type"] == ("torch.bfloat16" if torch.cuda.is_available() else "torch.float32")
    peers = [method for method in METHODS if method != "dualpath"]
    assert [(row["method"], row["T"], row["images"]) for row in rows] == [
        ("dualpath", 16, 9),
        ("dualpath", 32, 10),
        ("dualpath+A_t0", 32, 10),
        *[(m, T, T) for m in peers for T in ((8, 16, 32) if m == "aim" else (8,))],
    ]
    assert rows[0]["growth"] == 1
    for row in rows:
        assert f"{row['train ÷ plain']:.5g}" in out and f"{row['GMACs/view']:.5g}" in out
        assert row["growth"] == pytest.approx(rows[0]["forward/s"] / row["forward/s"], rel=1e-3)
        assert row["MFU"] > 0 and row["train ÷ plain"] > 0 and row["forward ÷ plain"] > 0


def test_memory_is_a_models_own_and_what_its_step_takes(monkeypatch):
    """On a GPU that holds other models, too; here its allocator is a pretended one."""
    net, calls = torch.nn.Linear(1000, 1000, bias=False), []
    frozen = torch.nn.Linear(1000, 1000, bias=False).requires_grad_(False)
    steps = {"train": lambda: calls.append("train"), "plain train": lambda: calls.append("plain")}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e9 + 1e9 * len(calls))
    columns = cost.memory_columns(net, frozen, steps, 2, torch.device("cuda"))
    assert calls == ["reset", "train", "reset", "plain"]
    assert columns == {"GB/clip": (2 + 3 * 4e-3) / 2, "plain GB/clip": (4 + 4e-3) / 2}
    assert cost.memory_columns(net, frozen, steps, 2, CPU) == {}


def test_without_memory_there_is_a_sentence(monkeypatch):
    def measure(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")

    monkeypatch.setattr(cost, "measure", measure)
    with pytest.raises(SystemExit, match=r"^cost.py: CUDA out of memory. \(a smaller --batch"):
        cost.main(["--backbone", "tiny"])


def test_a_training_step_trains_and_a_plain_one_reaches_the_pixels():
    linear = torch.nn.Linear(3, 2)
    before = linear.weight.detach().clone()
    optimizer = torch.optim.AdamW(linear.parameters())
    cost.step(linear, torch.randn(4, 3), train=True, optimizer=optimizer)
    assert not torch.equal(linear.weight, before) and linear.weight.grad is None
    pixels = torch.randn(4, 3, requires_grad=True)
    seen = []
    handle = pixels.register_hook(seen.append)
    cost.step(linear.requires_grad_(False), pixels, train=True)
    handle.remove()
    assert len(seen) == 1 and seen[0].abs().max() > 0 and pixels.grad is None


@pytest.mark.parametrize(
    "options, words",
    [(["--frames", "15"], "15"), (["--backbone", "x"], "'x'")],
)
def test_mistakes_in_the_benchmark_get_a_sentence(options, words):
    with pytest.raises(SystemExit, match=f"^cost.py: .*{words}"):
        cost.main(["--backbone", "tiny", *options])


@pytest.mark.parametrize("option", ["--rounds", "--frames"])
def test_rounds_and_frames_are_whole_numbers_from_one(option, capsys):
    with pytest.raises(SystemExit):
        cost.main([option, "0"])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err
