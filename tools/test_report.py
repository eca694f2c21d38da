"""Measurements are fair."""

import time

from tools.report import take_turns


def test_steps_take_turns_and_the_first_round_does_not_count():
    calls, waits = [], []

    def slow():
        calls.append("a")
        time.sleep(0.02 if len(calls) > 3 else 0.5)

    steps = {"a": slow, "b": lambda: calls.append("b"), "c": lambda: calls.append("c")}
    seconds = take_turns(steps, 4, wait=lambda: waits.append(len(calls)))
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 5 and all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(0.02 <= s < 0.5 for s in seconds["a"]) and min(seconds["b"]) < 0.02
    assert waits == list(range(1, 16))  # after each step
