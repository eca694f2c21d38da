"""A comparison: its runs, what they leave, its table and its intervals."""

import concurrent.futures
import csv
import fcntl
import glob
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import evaluate
import train
from adapters import METHODS
from conftest import (
    SHARED,
    SMALL,
    THOROUGH,
    TINY,
    children,
    group_is_gone,
    lines,
    needs_shared,
    pixels,
    randomise,
    start,
    wait_for,
)
from data import clip_frames
from model import build_model
from support.processes import UserError
from tools import compare, jobs, results, shuffled
from tools.results import Result, write_table


# ---------------------------------------------------------------- accuracies and intervals
def answers(right, label="a"):
    """{video: answer}, for videos 0, 1, … that are right or wrong."""
    return {f"v{i}": (label, {"a" if r else "b": 0.6}) for i, r in enumerate(right)}


def test_an_answer_is_the_likeliest_class_and_an_unreadable_video_is_wrong():
    assert results.top1("a", {"b": 0.3, "a": 0.4}) and not results.top1("b", {"b": 0.3, "a": 0.4})
    assert not results.top1("a", {})
    assert results.accuracy({"v": ("a", {"a": 1.0}), "w": ("a", {})}) == 0.5


def test_within_a_set_of_classes_the_likeliest_of_these_is_the_answer():
    is_right = results.among([["a", "b"], ["c", "d"]])
    scores = {"c": 0.5, "b": 0.3, "a": 0.15, "d": 0.05}
    assert [is_right(label, scores) for label in "abcd"] == [False, True, True, False]
    assert not is_right("a", {})
    certain = {"c": 1.0, "b": 0.0, "a": 0.0, "d": 0.0}  # rounded: the first one is the likeliest
    assert is_right("b", certain) and not is_right("a", certain)


def test_folds_are_pooled_and_videos_left_out_by_their_paths():
    one = Result({}, {"../videos/v": ("a", {"a": 1.0}), "w": ("a", {"a": 1.0})})
    two = Result({}, {"../videos/x": ("a", {"b": 1.0}), "w": ("a", {"b": 1.0})})
    pooled = results.pool({"fold0": one, "fold1": two})
    assert sorted(pooled) == ["fold0/w", "fold1/w", "videos/v", "videos/x"]
    assert results.accuracy(pooled) == 0.5 and pooled["fold0/w"] == ("a", {"a": 1.0})
    assert results.without(answers([1, 0, 1]), "v[01]").keys() == {"v2"}


def test_mean_and_deviation():
    assert results.with_deviation([72.58, 75.81, 77.42]) == "75.3 ± 2.5"
    assert results.with_deviation([50.0]) == "50.0" and results.with_deviation([]) == "–"


def test_a_paired_difference_is_over_videos_and_its_interval_over_groups():
    own, other = answers([1] * 60 + [0] * 40), answers([0] * 20 + [1] * 40 + [0] * 40)
    points, (low, high) = results.paired_difference([own], [other])
    assert points == pytest.approx(20)
    # The mean of 100 draws of which a fifth is 1: its deviation is 4 points.
    assert low == pytest.approx(20 - 1.96 * 4, abs=1) and high == pytest.approx(
        20 + 1.96 * 4, abs=1
    )
    grouped = results.paired_difference([own], [other], r"v(\d)")  # by first digit
    assert grouped[0] == pytest.approx(20) and grouped[1][1] - grouped[1][0] > high - low
    # Of two seeds the mean; one that agrees with the other method halves the difference.
    assert results.paired_difference([own, other], [other])[0] == pytest.approx(10)
    same = results.paired_difference([own], [own])
    assert same == (0, (0, 0))


def test_a_group_is_what_the_expression_finds():
    assert results.group_of("videos/set1_11_2_3.avi", None) == "videos/set1_11_2_3.avi"
    assert results.group_of("videos/set1_11_2_3.avi", r"set(\d+)_\d+_(\d+)_") == ("1", "2")
    assert results.group_of("clips/005_080_f.mp4", r"clips/\d+") == "clips/005"
    assert results.group_of("v", "x") is None


def test_a_difference_is_over_the_seeds_that_both_rows_have():
    first, other = {0: answers([1, 1]), 1: answers([0, 0])}, {1: answers([1, 0]), 2: answers([1])}
    assert results.difference(first, other, None).startswith("-50.0 (")
    assert results.difference(first, {2: answers([1])}, None) == "–"
    assert results.difference(first, first, None) == "–"


def test_a_table_is_written_as_markdown_and_csv(tmp_path):
    text = write_table([{"method": "aim", "without a|b": "50.0"}], str(tmp_path / "table"))
    want = "| method | without a\\|b |\n| --- | --- |\n| aim | 50.0 |\n"
    assert (tmp_path / "table.md").read_text() == want == text
    assert (tmp_path / "table.csv").read_text() == "method,without a|b\naim,50.0\n"


def test_a_result_survives_its_file(tmp_path):
    odd = 'na\udcffme, "quoted".mp4'  # a byte that is no text
    about = dict.fromkeys(results.ABOUT, 3)
    result = Result(about, {odd: ("a, b", {"a, b": 0.75, "c": 0.25}), "v": ("c", {})})
    results.write_result(str(tmp_path / "r.csv"), result)
    assert results.read_result(str(tmp_path / "r.csv")) == result
    for text in ("video,label\n", "# {}\nvideo,label\n", "# 3\nvideo,label\n", ""):
        (tmp_path / "r.csv").write_text(text)
        with pytest.raises(UserError, match="r.csv is no result of a run"):
            results.read_result(str(tmp_path / "r.csv"))


def test_an_option_of_a_row_may_have_several_values():
    words = compare.words_of("sampling=dense stride=1 2 4 8 serial_skip 'out=a b'")
    want = ["--sampling", "dense", "--stride", "1", "2", "4", "8", "--serial-skip", "--out", "a b"]
    assert words == want


# ---------------------------------------------------------------- whole comparisons
@pytest.fixture
def folds(micro, tmp_path, monkeypatch):
    """Two folds of lists over the micro videos, in the folder where the test works."""
    monkeypatch.chdir(tmp_path)
    videos = sorted(glob.glob(f"{micro}/*/*/*.mp4"))
    labels = {name: i for i, name in enumerate(sorted(os.listdir(f"{micro}/train")))}
    for fold in range(2):
        os.makedirs(f"set/fold{fold}")
        train_rows, val_rows = [], []
        for i, path in enumerate(videos):
            line = f"{os.path.relpath(path, f'set/fold{fold}')} {labels[path.split('/')[-2]]}\n"
            is_val = "/val/" in path and i % 2 == fold
            (val_rows if is_val else train_rows).append(line)
        for name, rows in (("train", train_rows), ("val", val_rows)):
            with open(f"set/fold{fold}/{name}.txt", "w") as file:
                file.writelines(rows)
    return tmp_path


COMMON = " ".join(SMALL).replace("--data folder ", "").split() + ["--epochs", "1", "--limit", "8"]


def command(*words, methods=("dualpath", "linear"), options=()):
    folds = ["--data", "list", "--root", "set/fold*", "--method", *methods]
    return [*folds, *words, "--", *COMMON, *options]


class InLine(concurrent.futures.Executor):
    """Does the work at once, in this process."""

    def submit(self, work, *args):
        future = concurrent.futures.Future()
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def in_process(monkeypatch):
    """Scripts run in this process, which imports them once; their calls are listed."""
    calls = []

    def call(runner, job, place, script, *words):
        calls.append((job.name, script))
        main = {"train.py": train.main, "evaluate.py": evaluate.main}.get(script, shuffled.main)
        try:
            main(list(words))
        except SystemExit as stop:
            raise UserError(stop) from stop

    monkeypatch.setattr(concurrent.futures, "ThreadPoolExecutor", lambda workers: InLine())
    monkeypatch.setattr(jobs.Runner, "call", call)
    return calls


def read_table():
    """{row: its cells}, without the seconds, which differ when a run is made again."""
    with open("results/table.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row.pop("s/epoch")) > 0 for row in rows)
    return {row["method"]: row for row in rows}


def test_a_comparison_pools_folds_and_goes_on_elsewhere(folds, in_process, capsys):
    words = ["--seed", "0", "1", "--set", "spatial", "paths=spatial lr=0.01", "--shuffled"]
    methods = ("dualpath", "spatial=dualpath")
    assert compare.main(command(*words, methods=methods)) == 0
    out = capsys.readouterr().out
    assert "8 runs, 0 of them done" in out and "8 of 8, about 0 minutes to go" in out
    assert len(in_process) == 24  # train, shuffled, evaluate
    rows = read_table()
    for name in ("dualpath", "spatial"):
        seeds = []
        for seed in (0, 1):
            right = total = 0
            for fold in (0, 1):
                folder = f"runs/compare/{name}-fold{fold}-s{seed}"
                videos = len(open(f"set/fold{fold}/val.txt").readlines())
                right += lines(folder)[-1]["val_top1"] * videos
                total += videos
            seeds.append(f"{100 * right / total:.1f}")
        assert rows[name]["each seed"] == ", ".join(seeds)
    assert int(rows["dualpath"]["tuned weights"].replace(",", "")) > 50_000
    assert re.fullmatch(r"[+-]\d+\.\d \(.* to .*\)", rows["spatial"]["dualpath − this (95 %)"])
    settings = results.read_result("results/spatial-fold1-s1.csv").about["settings"]
    assert settings["paths"] == "spatial" and settings["lr"] == 0.01 and settings["seed"] == 1
    names = results.read_result("results/spatial-fold1-s1.csv").answers
    assert len(names) == 4 and all(os.path.exists(f"set/fold1/{name}") for name in names)

    # In another checkout, with the results alone: nothing runs, and the table is the same.
    shutil.rmtree("runs")
    in_process.clear()
    assert compare.main(command(*words, methods=methods)) == 0
    assert "8 runs, 8 of them done" in capsys.readouterr().out
    assert in_process == [] and read_table() == rows
    # A result that is lost is made again; one of other options is refused.
    os.remove("results/spatial-fold1-s1.csv")
    assert compare.main(command(*words, methods=methods)) == 0
    assert {name for name, _ in in_process} == {"spatial-fold1-s1"} and read_table() == rows
    refusal = (
        "s0.csv is of a run with lr 0.001: delete res.*s0.csv, res.*s0.shuffled.csv and runs/c"
    )
    with pytest.raises(SystemExit, match=refusal):
        compare.main(command(*words, methods=methods, options=["--lr", "0.5"]))
    more = command(*words, methods=methods, options=["--limit", "7", "--batch", "7"])
    with pytest.raises(SystemExit, match="with limit 8, batch 8, other training videos: delete "):
        compare.main(more)
    with open("set/fold1/val.txt") as file:
        kept = file.readlines()[1:]
    with open("set/fold1/val.txt", "w") as file:
        file.writelines(kept)
    with pytest.raises(SystemExit, match="fold1-s0.csv is of a run with other validation videos"):
        compare.main(command(*words, methods=methods))


def test_a_result_is_taken_only_for_the_run_that_it_is_of(folds, in_process, capsys):
    few = ["--limit", "3", "--batch", "3"]
    words = command(methods=("linear",), options=few)

    def refused(sentence):
        with pytest.raises(SystemExit, match=sentence):
            compare.main(words)

    # One fold alone; then, among all, it is done.
    assert compare.main([word.replace("fold*", "fold0") for word in words]) == 0
    assert compare.main(words) == 0 and "2 runs, 1 of them done" in capsys.readouterr().out
    for fold in (0, 1):
        answers = results.read_result(f"results/linear-fold{fold}-s0.csv").answers
        assert len(answers) == 3, "--limit holds for the test, too"
    names = "\n".join("abcdefgh")
    for fold in (0, 1):
        (folds / f"set/fold{fold}/classes.txt").write_text(names)
    refused("fold0-s0.csv is of a run with other validation videos or classes: delete")
    # Files that a run starts from are known by what is in them.
    shutil.copy("runs/compare/linear-fold0-s0/best.pt", "best.pt")
    shutil.copy("runs/compare/linear-fold1-s0/best.pt", "other.pt")
    for fold in (0, 1):
        os.remove(f"set/fold{fold}/classes.txt")
    shutil.rmtree("results")
    shutil.rmtree("runs")
    words += ["--init", "best.pt"]
    assert compare.main(words) == 0
    os.replace("other.pt", "best.pt")
    jobs.digest_of_files.cache_clear()  # which lasts as long as a command
    refused("fold0-s0.csv is of a run with other files of --init: delete")


def test_shuffled_answers_of_a_seed_that_is_not_done_are_left_out(folds, in_process):
    words = command("--seed", "0", "1", "--shuffled", methods=("linear",))
    compare.main(words)
    whole = read_table()["linear"]
    for fold in (0, 1):
        os.remove(f"results/linear-fold{fold}-s1.csv")
    args = compare.parse(words)
    shared = compare.find_folds(args)
    [row] = results.table_of(compare.plan(args, *shared), args)
    assert " ± " in whole["shuffled"] and " ± " not in row["shuffled"]


def test_a_failed_run_is_named_and_the_others_go_on(folds, in_process, capsys):
    words = ["--set", "bad", "lr=1e30", "--set", "bad", "warmup=0"]
    methods = ("bad=dualpath", "linear")
    assert compare.main(command(*words, methods=methods)) == 1
    out, err = capsys.readouterr()
    assert "failed: bad-fold0-s0: " in err and "bad-fold1-s0" in err and "finite" in err
    assert list(read_table()) == ["linear"] and "linear-fold1-s0" in out


def test_what_we_did_not_foresee_is_named_by_its_kind(folds, in_process, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "about_run", lambda job: {}["seconds"])
    assert compare.main(command(methods=["linear"])) == 1
    assert "failed: linear-fold0-s0: KeyError('seconds')" in capsys.readouterr().err


def test_what_is_blind_to_order_keeps_its_answers_on_shuffled_frames(folds, in_process):
    compare.main(
        command(
            "--shuffled",
            methods=("linear", "aim", "dualpath"),
            options=["--lr", "0.2", "--epochs", "4"],
        )
    )
    for row, is_blind in (("linear", True), ("aim", False), ("dualpath", False)):
        plain = results.read_result(f"results/{row}-fold0-s0.csv").answers
        mixed = results.read_result(f"results/{row}-fold0-s0.shuffled.csv").answers
        assert plain.keys() == mixed.keys()
        same = [mixed[v][1] == pytest.approx(plain[v][1], abs=1e-5) for v in plain]
        assert all(same) if is_blind else sum(same) <= 1, row  # an order may be the old one
    with pytest.raises(SystemExit, match="single videos have no accuracy"):
        shuffled.main(["runs/compare/aim-fold0-s0/last.pt", "clip.mp4"])


def job_in(folder):
    path = str(folder / "run")
    return jobs.Job("row", 0, [], "", ".", {}, {}, path, f"{path}.csv", None)


def test_a_script_that_fails_is_quoted_and_one_that_is_killed_says_so(tmp_path):
    job, path = job_in(tmp_path), tmp_path / "script.py"
    (tmp_path / "run.txt").write_text("of an earlier try\n")
    path.write_text("import os, sys\nprint(os.environ['OMP_NUM_THREADS'])\nsys.exit(sys.argv[1])")
    with jobs.Runner(1) as runner:
        with pytest.raises(UserError, match=r"^full disk \(more in .*run.txt\)$"):
            runner.call(job, 0, str(path), "full disk")
        path.write_text("import os, signal\nprint('epoch 1')\nos.kill(os.getpid(), signal.SIGKILL)")
        with pytest.raises(UserError, match="^ended by signal 9 "):
            runner.call(job, 0, str(path))
        path.write_text("import sys\nsys.exit(3)")
        with pytest.raises(UserError, match="^ended with status 3 "):
            runner.call(job, 0, str(path))
    assert (tmp_path / "run.txt").read_text().split("\n")[1] == str(os.cpu_count())


def test_where_the_image_model_lies_does_not_matter():
    here, there = (["--backbone", f"local-dir:{folder}"] for folder in ("vit", "../weights/vit/"))
    assert jobs.learned_from(here) == jobs.learned_from(there)
    assert jobs.learned_from(here)["backbone"] == "vit"
    assert jobs.learned_from(here) != jobs.learned_from(["--backbone", "local-dir:other"])
    hubs = (["--backbone", f"hf-hub:{owner}/vit"] for owner in ("one", "other"))
    assert jobs.learned_from(next(hubs)) != jobs.learned_from(next(hubs))
    assert jobs.learned_from(["--init", "a/best.pt"])["init"] == "best.pt"
    named = jobs.digests_of_files(train.parse([]))
    assert named == {}, "an image model with a name is no file"
    tiny = jobs.digests_of_files(train.parse(["--backbone", "local-dir:assets/tiny"]))
    assert tiny.keys() == {"files of --backbone"}
    assert jobs.learned_from(["--root", "a", "--workers", "3"]) == jobs.learned_from([])


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    job = job_in(tmp_path)
    with open(tmp_path / "run.txt", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with jobs.Runner(1) as runner, pytest.raises(UserError, match="another process is at work"):
            runner.call(job, 0, "train.py")


@pytest.mark.parametrize("visible, want", [(None, ["0", "1", "0"]), ("2,5", ["2", "5", "2"])])
def test_gpus_are_given_out_in_turn(visible, want, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    runner = jobs.Runner(3)
    assert [runner.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == want


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT][: 1 + THOROUGH])
def test_a_comparison_that_is_stopped_goes_on_where_it_was(signal_number, folds):
    words = command("--jobs", "2", methods=("dualpath",), options=["--epochs", "25"])
    process = start("-m", "tools.compare", *words)
    wait_for(process, "2 runs, 0 of them done")
    logs = [f"runs/compare/dualpath-fold{fold}-s0/log.jsonl" for fold in (0, 1)]
    while not all(os.path.exists(log) and os.path.getsize(log) for log in logs):
        assert process.poll() is None
        time.sleep(0.1)
    assert len(children(process.pid)) == 2
    os.kill(process.pid, signal_number)
    assert "stopped by a signal; the same command goes on" in process.communicate()[0]
    assert process.returncode == 128 + signal_number and group_is_gone(process)
    done = [len(lines(os.path.dirname(log))) for log in logs]
    assert all(1 <= epochs < 25 for epochs in done) and glob.glob("results/*") == []
    process = start("-m", "tools.compare", *words)
    assert process.wait() == 0, process.stdout.read()
    assert [len(lines(os.path.dirname(log))) for log in logs] == [25, 25]
    for log in logs:
        with open(f"{os.path.dirname(log)}.txt") as file:
            assert "resumed after epoch" in file.read()
    assert list(read_table()) == ["dualpath"]


MISTAKES = [
    (command("--set", "aim", "lr=1"), "--set aim: there is no such row"),
    (command("--set", "linear", "lr=1 'x"), '--set linear "lr=1 \'x": No closing quotation'),
    (command(methods=["x=nothing"]), "'nothing' is no method; the methods are dualpath, "),
    (command(methods=["a/b=aim"]), "'a/b' names files, so it may have no slash"),
    (command("--among", "left_horizontal,no"), "--among names left_horizontal, no; it must name"),
    (["--data", "list", "--root", "no/where", "--method", "aim"], "no/where is not there"),
    (command("--root", "set/fold0", "set/fold0/../fold0/."), "is validated in two folds"),
    (command("--seed", "0", "0"), "two runs would be called dualpath-fold0-s0"),
    (command("--group", "nothing"), "--group nothing finds nothing in "),
    (command("--group", "("), "'(' is no regular expression: "),
    (command("--leave-out", "mp4"), "--leave-out mp4 leaves no video"),
    (command("--leave-out", "down", options=["--limit", "1"]), "--leave-out down leaves no video"),
    (command("--set", "linear", "limit=2"), "--limit of linear must be 8, not 2"),
    (command(options=["--seed", "5"]), "--seed of dualpath must be 0, not 5"),
    (command("--set", "linear", "method=aim"), "--method of linear must be linear, not aim"),
    (command(options=["--split", "2"]), "--split chooses"),
    (command(options=["--colour", "2"]), "unrecognized arguments: --colour"),
]


@pytest.mark.parametrize("words, sentence", MISTAKES, ids=[s for _, s in MISTAKES])
def test_mistakes_get_a_sentence(words, sentence, folds, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(words)
    said = f"{stop.value} {capsys.readouterr().err}"
    assert sentence in said and "Traceback" not in said and stop.value.code != 0
    assert not os.path.exists("results")


# ---------------------------------------------------------------- classes that are made of time
@needs_shared
@pytest.mark.parametrize("method", METHODS)
def test_a_clip_and_its_reverse_are_one_to_what_is_blind_to_order(method):
    """The robot's clips are there forward and reversed, with the opposite label."""
    model = randomise(build_model(**TINY | {"method": method})).eval()
    clips = []
    for way in "fr":
        path = f"{SHARED}/robot/clips/005_080_{way}.mp4"
        frames = pixels(path, clip_frames(16, 16, "dense", 1, 0.5))[:, 40:104, 60:124]
        clips.append(torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2))
    with torch.no_grad():
        forward, backward = model(torch.stack(clips))
    sees_order = method == "dualpath" or METHODS[method].looks_across_frames
    difference = (forward - backward).abs().max()
    assert difference > 1e-3 if sees_order else difference <= 1e-4
