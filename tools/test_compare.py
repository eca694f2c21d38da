"""A comparison: its runs, what they leave, its table and its intervals."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import pytest

import evaluate
import train
from conftest import HERE, lines
from support.processes import UserError
from support.runs import read_checkpoint
from tools import compare


# ---------------------------------------------------------------- accuracies and intervals
def seeds(*rights):
    """{seed: {video: right}} of videos v0, v1, … that are right (1) or wrong (0)."""
    return {
        seed: {f"v{i}": bool(r) for i, r in enumerate(right)} for seed, right in enumerate(rights)
    }


def numbers(first, other, group=".*"):
    text = compare.difference(first, other, re.compile(group))
    return [float(number) for number in re.findall(r"[+-]\d+\.\d", text)]


def test_a_difference_is_over_videos_its_interval_over_groups():
    own, other = [1] * 60 + [0] * 40, [0] * 20 + [1] * 40 + [0] * 40
    points, low, high = numbers(seeds(own), seeds(other))
    assert points == 20
    # The mean of 100 draws of which a fifth is 1: its deviation is 4 points.
    assert low == pytest.approx(20 - 1.96 * 4, abs=1)
    assert high == pytest.approx(20 + 1.96 * 4, abs=1)
    grouped = numbers(seeds(own), seeds(other), r"v(\d)")  # by first digit
    assert grouped[0] == 20 and grouped[2] - grouped[1] > high - low
    # Of two seeds the mean; one that agrees with the other row halves the difference.
    assert numbers(seeds(own, other), seeds(other, other))[0] == 10
    with pytest.raises(UserError, match="tested on different videos"):
        numbers(seeds(own), seeds(own + [1]))
    with pytest.raises(UserError, match="--group finds nothing in v0"):
        numbers(seeds(own), seeds(other), "x")


def cells(path):
    """A table of a Markdown file, as dicts."""
    with open(path) as file:
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in file]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_published_tables_follow_from_the_predictions(tmp_path, monkeypatch, capsys):
    """By the commands and the Python in docs/results/README.md, without the data or a training."""
    with open(f"{HERE}/docs/results/README.md") as file:
        text = file.read()
    commands = re.findall(r"^    python -m tools.compare (.*)", text.replace("\\\n", ""), re.M)
    shutil.copytree(f"{HERE}/docs/results", tmp_path / "docs/results")
    monkeypatch.chdir(tmp_path)
    assert len(commands) == 3
    for command in commands:
        for root, last in (("ut_interaction", 4), ("ut_fast", 2)):  # as a shell expands them
            folds = " ".join(f"{root}/fold{i}" for i in range(last + 1))
            command = command.replace(f"{root}/fold{{0..{last}}}", folds)
        words = shlex.split(command)
        table = f"{words[words.index('--runs') + 1]}/table.md"
        os.remove(table)
        assert compare.main(words) == 0
        for now, published in zip(cells(table), cells(f"{HERE}/{table}"), strict=True):
            assert "top-1, %" in now and now.items() <= published.items()
    capsys.readouterr()
    exec(re.search(r"^```python\n(.*?)^```$", text, re.M | re.S)[1], {})
    counted = dict(line.split() for line in capsys.readouterr().out.splitlines())
    for row in cells(f"{HERE}/docs/results/robot/table.md"):
        for file, column in (("predictions", "top-1, %"), ("shuffled", "shuffled")):
            runs = [
                f"docs/results/robot/{row['method']}-robot-s{seed}/{file}.csv" for seed in (0, 1)
            ]
            assert f"({counted[runs[0]]}, {counted[runs[1]]})" in row[f"{column}, within its set"]


# ---------------------------------------------------------------- whole comparisons
@pytest.fixture
def command(micro, micro_run, tmp_path, monkeypatch):
    """The words of a comparison of runs of a second, in the folder where the test works."""
    monkeypatch.chdir(tmp_path)
    os.symlink(micro, "fold0")

    def words(*own, methods=("dualpath",), options=()):
        data = ["--data", "folder", "--root", "fold0", "--method", *methods]
        return [*data, *own, "--", *micro_run[2:-2], *options]  # without its --data and --root

    return words


class Here:
    """A process that runs in this one: it has what takes long to import."""

    def __init__(self, command, env, stdout, stderr):
        script, words = (
            {train.__file__: train, evaluate.__file__: evaluate}[command[1]],
            command[2:],
        )
        with contextlib.redirect_stdout(stdout):
            self.status = script.main(words)

    def wait(self):
        return self.status


def test_a_comparison_trains_and_tests_what_is_not_done(command, monkeypatch):
    monkeypatch.setattr(compare.subprocess, "Popen", Here)
    in_turn = contextlib.nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(compare, "ThreadPoolExecutor", lambda at_once: in_turn)
    words = command(
        "--shuffled", "--set", "dualpath", "bottleneck=4 serial-skip", options=("--limit", "7")
    )
    assert compare.main(words) == 0
    folder = "runs/compare/dualpath-fold0-s0"
    (row,) = cells("runs/compare/table.md")
    assert row["top-1, %"] == f"{100 * lines(folder)[-1]['val_top1']:.1f}" and row["shuffled"]
    content = read_checkpoint(f"{folder}/last.pt")
    assert content["model"]["bottleneck"] == 4
    with open(f"{folder}/predictions.csv") as one, open(f"{folder}/shuffled.csv") as other:
        predicted, shuffled = one.readlines(), other.readlines()
    assert len(predicted) == len(shuffled) == 1 + 7 and predicted != shuffled
    os.remove("fold0")  # a run that is done needs its data no more
    assert compare.main(words) == 0
    with pytest.raises(SystemExit, match="s0/options.txt has other options: delete this run"):
        compare.main(command(options=("--epochs", "3")))


GOOD = "open(sys.argv[1] + '/predictions.part', 'w').write('video,label,class1\\nv,a,a')"
SLOW = """
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1] + '/saved', 'w'), sys.exit(143)))
open(sys.argv[1] + '/begun', 'w')
time.sleep(60)
"""


def test_a_failed_run_is_named_and_a_signal_pauses(command, monkeypatch, capsys):
    code = {"dualpath": GOOD, "bad": "sys.exit('no weights')", "slow": SLOW, "late": GOOD}
    start = "import signal, sys, time\n"

    def commands(run):
        return [["-c", start + code[run.row], run.folder]]

    monkeypatch.setattr(compare, "commands", commands)
    words = command(methods=("dualpath", "bad=aim", "slow=aim", "late=aim"))

    def interrupt():
        while not os.path.exists("runs/compare/slow-fold0-s0/begun"):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        compare.main(words)
    assert stop.value.code == 143
    said = capsys.readouterr().out
    assert "/dualpath-fold0-s0 is done\n" in said and "/slow-fold0-s0 is not done" in said
    assert "/bad-fold0-s0 is not done, see runs/compare/bad-fold0-s0/output.txt" in said
    with open("runs/compare/bad-fold0-s0/output.txt") as file:
        assert file.read() == "no weights\n"
    assert os.path.exists("runs/compare/slow-fold0-s0/saved")
    assert not os.path.exists("runs/compare/late-fold0-s0")

    code["slow"] = GOOD
    assert compare.main(["--jobs", "2", *words]) == 1
    assert "4 runs, 1 of them done" in capsys.readouterr().out
    rows = cells("runs/compare/table.md")
    assert [row["method"] for row in rows] == ["dualpath", "slow", "late"]


def test_each_run_has_its_share_of_the_machine(monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "make", lambda run, environment, _: seen.append(environment))
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    compare.make_all([None] * 3, 2)
    assert [own["CUDA_VISIBLE_DEVICES"] for own in seen] == ["2", "5", "2"]
    assert {own["OMP_NUM_THREADS"] for own in seen} == {"4"}


MISTAKES = [
    ({"own": ["--set", "aim", "lr=1"]}, "--set aim: there is no such row"),
    ({"own": ["--group", "("]}, "--group '(' is no regular expression"),
    ({"methods": ["x=nothing"]}, "'nothing'"),
    ({"own": ["--seed", "0", "0"]}, "two runs would share runs/compare/dualpath-fold0-s0"),
    ({"options": ["--seed=5"]}, "--seed=5 cannot be given after the --"),
    ({"options": ["--colour", "2"]}, "unrecognized arguments: --colour"),
]


@pytest.mark.parametrize("words, sentence", MISTAKES, ids=[s for _, s in MISTAKES])
def test_user_errors_get_a_sentence(words, sentence, command, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(command(*words.pop("own", ()), **words))
    said = f"{stop.value} {capsys.readouterr().err}"
    assert sentence in said and "Traceback" not in said and stop.value.code != 0
    assert not os.path.exists("runs")
