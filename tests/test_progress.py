"""Long work is told also where there is no terminal."""

import re
import time

from rich.console import Console

from rayml.progress import duration, progress, show_activity


def test_without_a_terminal_there_is_a_line_for_each_tenth(capsys):
    with progress(Console(stderr=True)) as bar:
        advance = bar("distilling", 40)
        for _ in range(20):
            advance(2)
    told = capsys.readouterr().err.split("\n")[:-1]
    assert told == [f"distilling: {done} of 40" for done in range(4, 41, 4)]


def test_no_part_is_passed_over_that_holds_more_than_a_tenth(capsys):
    with progress(Console(stderr=True)) as bar:
        advance = bar("adapting", 20)
        for _ in range(4):
            advance(5)
    assert capsys.readouterr().err.split("\n")[:-1] == [f"adapting: {done} of 20" for done in (5, 10, 15, 20)]


def test_work_in_few_parts_ends_with_its_whole(capsys):
    with progress(Console(stderr=True)) as bar:
        first, second = bar("adapting", 3), bar("asking", 1)
        for _ in range(3):
            first()
        second()
    assert capsys.readouterr().err.split("\n")[:-1] == [
        "adapting: 1 of 3",
        "adapting: 2 of 3",
        "adapting: 3 of 3",
        "asking: 1 of 1",
    ]


def test_a_terminal_shows_bars_and_no_lines(capsys):
    with progress(Console(stderr=True, force_terminal=True)) as bar:
        bar("adapting", 2)(2)
        bar("nothing", 0)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "2 of 2" not in shown
    assert "nothing" not in shown


def test_what_takes_long_is_said_again_and_again_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("rayml.progress.QUIET_SECONDS", 0.2)
    with show_activity(Console(stderr=True), "loading"):
        time.sleep(0.9)
    with progress(Console(stderr=True)) as bar:
        bar("adapting", 860)(1)
        time.sleep(1.3)
    first, *told = capsys.readouterr().err.split("\n")[:-1]
    assert first == "loading ..."
    assert told[0] == "loading: 0 s so far"
    assert len(told) > 5
    assert re.fullmatch(r"adapting: 1 of 860, about 1[5-9] min left|adapting: 1 of 860, about 2\d min left", told[-1])


def test_durations_are_said_as_people_say_them():
    assert [duration(seconds) for seconds in (3.4, 89, 91, 5000, 12000)] == [
        "3 s",
        "89 s",
        "2 min",
        "83 min",
        "3 h 20 min",
    ]
