"""Label tasks from the wheel evals: the rules on a fake package, and what they leave of the wheel where it is."""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import pytest

from rayml.errors import DataError
from rayml.tasks import evals
from rayml.tasks.read import read_rows
from rayml.tasks.table import build_tasks
from rayml.tasks.task import normalize_text

COLOURS = ("amber", "beige", "coral", "denim", "ebony", "fawn", "green", "hazel", "ivory", "jade", "khaki", "lilac")


def row(text, ideal, system="Answer Y or N."):
    return {"input": [{"role": "system", "content": system}, {"role": "user", "content": text}], "ideal": ideal}


def rows(count, ideal, word=None, start=0):
    """Rows whose texts differ in their first and their last word, so that none is cut off."""
    return [row(f"{i}-{word or ideal} is like number {i}", ideal) for i in range(start, start + count)]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package `evals` to fill: `wheel(task=rows, ...)` writes its files and returns the tasks."""
    package = tmp_path / "site" / "evals"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')\n")
    monkeypatch.syspath_prepend(package.parent)

    def fill(**files):
        for name, records in files.items():
            folder, _, file = name.partition("/")
            path = package / "registry" / "data" / folder / (file or "samples.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            path.write_text("".join(lines) + "\n", encoding="utf-8")
        return evals.label_tasks(package / "registry" / "data")

    return fill


def labels(pairs):
    return dict(Counter(label for _, label in pairs))


# The item


def test_what_all_rows_share_is_cut_off(wheel):
    words = [(f"{letter}{number}", letter) for letter in "YN" for number in range(8)]
    found = wheel(words=[row(f"Is it a word?\nThe word: {word} Your answer:", label) for word, label in words])
    assert sorted(found["evals/words"]) == sorted(words)


def test_it_is_cut_between_words_never_within_one(wheel):
    words = [(f"re{letter}{number}ing", letter) for letter in "YN" for number in range(8)]
    found = wheel(words=[row(f"Word {word}", label) for word, label in words])
    assert sorted(found["evals/words"]) == sorted(words)


def test_an_instruction_that_differs_between_rows_belongs_to_the_item(wheel):
    questions = [
        (row(f"{i} and {-i}", label, f"Two numbers. {question} Say {label}."), f"{question} Say {label}.\n{i} and {-i}")
        for question, label in (("Equal?", "no"), ("Opposite?", "yes"))
        for i in range(1, 9)
    ]
    found = wheel(numbers=[record for record, _ in questions])
    assert {text for text, _ in found["evals/numbers"]} == {text for _, text in questions}


def test_of_a_dialogue_the_last_user_message_counts(wheel):
    example = [{"role": "user", "content": "an example"}, {"role": "assistant", "content": "Y"}]
    records = rows(8, "Y") + rows(8, "N")
    for number, record in enumerate(records):
        shown = [{**message, "content": f"{number} {message['content']}"} for message in example]
        record["input"][1:1] = shown
    texts = {text for text, _ in wheel(dialogues=records)["evals/dialogues"]}
    assert texts == {record["input"][-1]["content"] for record in records}


def test_without_a_user_message_the_last_one_is_the_item(wheel):
    records = rows(8, "Y") + rows(8, "N")
    asked = [{"role": "user", "content": f"{i} asked {i}"} for i in range(16)]
    found = wheel(
        user_first=[
            {"input": [user, *r["input"][:1]], "ideal": r["ideal"]} for user, r in zip(asked, records, strict=True)
        ],
        system_only=[{"input": [r["input"][1] | {"role": "system"}], "ideal": r["ideal"]} for r in records],
    )
    assert {text for text, _ in found["evals/user_first"]} == {user["content"] for user in asked}
    assert {text for text, _ in found["evals/system_only"]} == {r["input"][1]["content"] for r in records}


def test_an_item_spread_over_user_messages_is_left_out(wheel):
    records = rows(8, "Y") + rows(9, "N")
    records[-1]["input"].insert(1, {"role": "user", "content": "the first half"})
    assert labels(wheel(halves=records)["evals/halves"]) == {"Y": 8, "N": 8}


def test_long_items_are_left_out_and_so_are_tasks_of_few_short_ones(wheel):
    long = [row(f"{i} {'long ' * 80} {i}", "Y") for i in range(5)]
    found = wheel(kept=rows(8, "Y") + rows(8, "N") + long, dropped=rows(7, "Y", "yes") + rows(8, "N", "no") + long)
    assert list(found) == ["evals/kept"]
    assert labels(found["evals/kept"]) == {"Y": 8, "N": 8}


# The label


def test_answers_that_differ_by_case_are_one_and_several_answers_are_none(wheel):
    same = [row(f"{i} once more {i}", ["rangt", "Rangt"]) for i in range(8)]
    several = [row(f"{i} or else {i}", ["N", "perhaps"]) for i in range(8)]
    assert labels(wheel(ideals=same + several + rows(8, "N"))["evals/ideals"]) == {"rangt": 8, "N": 8}


def test_labels_merge_by_case_into_the_frequent_spelling(wheel):
    records = rows(6, "yes", "low") + rows(9, "Yes", "high") + rows(8, " No. ") + rows(2, "NO")
    assert labels(wheel(cases=records)["evals/cases"]) == {"Yes": 15, "No": 10}


@pytest.mark.parametrize("frame", ["[{}]", "{{{}}}", "ANSWER: {}", "{} answers total"])
def test_what_frames_every_label_is_cut_off(wheel, frame):
    records = rows(8, frame.format("on"), "on") + rows(8, frame.format("off"), "off")
    assert labels(wheel(frames=records)["evals/frames"]) == {"on": 8, "off": 8}


def test_rows_of_another_kind_are_left_out(wheel):
    other = [{"sample": []}, {"input": "text", "ideal": "Y"}, {"input": [], "ideal": "Y"}, row("no answer", [])]
    assert labels(wheel(mixed=[*other, *rows(8, "Y"), *rows(8, "N")])["evals/mixed"]) == {"Y": 8, "N": 8}


# The classes


def test_small_classes_are_left_out_and_so_is_a_task_of_one_class(wheel):
    found = wheel(three=rows(8, "Y") + rows(8, "N") + rows(7, "maybe"), one=rows(50, "X", "one") + rows(7, "Z", "one!"))
    assert list(found) == ["evals/three"]
    assert labels(found["evals/three"]) == {"Y": 8, "N": 8}


def test_a_class_has_at_most_forty_rows_from_all_of_the_file(wheel):
    found = wheel(many=rows(200, "Y") + rows(60, "N"))["evals/many"]
    assert labels(found) == {"Y": 40, "N": 40}
    numbers = [int(text.split("-")[0]) for text, label in found if label == "Y"]
    assert min(numbers) < 50 < 150 < max(numbers)  # such files are often sorted: the first forty would be alike


def test_no_class_is_more_than_three_quarters(wheel):
    assert labels(wheel(uneven=rows(100, "Y") + rows(10, "N"))["evals/uneven"]) == {"Y": 30, "N": 10}


def test_of_many_classes_the_largest_stay(wheel):
    more = [*COLOURS, "mauve"]
    records = [record for number, colour in enumerate(more) for record in rows(8 + number, colour)]
    assert set(labels(wheel(colours=records)["evals/colours"])) == set(more[1:])


def test_frequent_answers_to_free_questions_are_no_classes(wheel):
    free = [row(f"{i} times {i} is what", str(i * i)) for i in range(100, 117)]
    classes = rows(8, "Y") + rows(8, "N")
    assert "evals/free" not in wheel(free=classes + free)
    assert "evals/free" in wheel(free=classes + free[:16])


@pytest.mark.parametrize("option", ["{}. {}", "{}) {}", "({}) {}", "{}: {}", "{}、{}"])
def test_multiple_choice_is_left_out(wheel, option):
    choices = "\n".join(option.format(letter, "{}" + letter) for letter in "ABCD")
    records = [row(f"Question {i}?\n{choices.replace('{}', str(i))}", "ABCD"[i % 4]) for i in range(40)]
    assert wheel(exam=records, letters=rows(8, "A") + rows(8, "B")).keys() == {"evals/letters"}


# Texts that stand twice


def test_a_repeated_text_counts_once_and_one_under_two_labels_not_at_all(wheel):
    records = rows(9, "Y") + rows(9, "N")
    repeated = [row(records[0]["input"][1]["content"].upper(), "Y"), row(records[-1]["input"][1]["content"], "Y")]
    assert labels(wheel(twice=records + repeated)["evals/twice"]) == {"Y": 9, "N": 8}


def test_a_corpus_under_a_second_name_is_left_out(wheel):
    corpus = rows(50, "Y") + rows(50, "N")
    overlapping = [*corpus[:12], *rows(44, "Y", "other"), *rows(44, "N", "another")]
    assert list(wheel(b=overlapping, a=corpus, c=corpus)) == ["evals/a"]


def test_a_few_shared_texts_stay_in_the_first_task(wheel):
    corpus = rows(50, "Y") + rows(50, "N")
    found = wheel(a=corpus, b=[*corpus[:4], *rows(20, "Y", "other"), *rows(20, "N", "another")])
    assert labels(found["evals/b"]) == {"Y": 20, "N": 20}


def test_a_folder_is_one_task(wheel):
    few, many = rows(8, "Y") + rows(8, "N"), rows(9, "Y", "yes") + rows(9, "N", "no")
    found = wheel(**{"t/0_few_shot.jsonl": [{"sample": []}], "t/easy.jsonl": few, "t/hard.jsonl": many})
    assert {name: len(pairs) for name, pairs in found.items()} == {"evals/t": 16}


def test_excluded_folders_are_left_out(wheel):
    records = rows(8, "Y") + rows(8, "N")
    assert not wheel(**dict.fromkeys(evals.EXCLUDED, records))


# The file


def test_the_command_writes_one_file_that_rayml_reads(wheel, tmp_path):
    wheel(a=rows(8, "Y") + rows(8, "N"), b=rows(8, "да", "yes") + rows(9, "нет", "no"))
    command = [sys.executable, "-m", "rayml", "data", "evals", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert "2 tasks, 33 rows" in found.stdout
    assert "LICENSE.md" in found.stdout
    assert '"target": "да"' in (tmp_path / "out" / "evals.jsonl").read_text(encoding="utf-8")
    tasks, duplicates = build_tasks(read_rows([str(tmp_path / "out")]))
    assert {task.name: task.options for task in tasks} == {"evals/a": ("N", "Y"), "evals/b": ("да", "нет")}
    assert not duplicates.repeated
    assert not duplicates.conflicting


@pytest.mark.parametrize("installed", [False, True])
def test_without_the_wheel_the_error_says_how_to_get_it(installed, wheel, tmp_path, monkeypatch):
    if not installed:
        monkeypatch.setattr(evals, "find_spec", lambda name: None)  # else another package of that name is there
    with pytest.raises(DataError, match=r"pip install --no-deps evals==3\.0\.1\.post1"):
        evals.write_tasks(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not find_spec("evals"), reason="a wheel is missing: `.venv/bin/pip install --no-deps evals==3.0.1.post1`"
)
def test_the_wheel_gives_many_tasks_that_keep_the_rules(tmp_path):
    written = evals.write_tasks(tmp_path)
    tasks, duplicates = build_tasks(read_rows([str(tmp_path / "evals.jsonl")]))
    assert {task.name: len(task.examples) for task in tasks} == written
    assert len(tasks) >= 60
    assert not duplicates.repeated
    assert not duplicates.conflicting
    texts = [normalize_text(example.input) for task in tasks for example in task.examples]
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= 400
    for task in tasks:
        sizes = [len(examples) for examples in task.classes.values()]
        assert 2 <= len(sizes) <= 12, task.name
        assert 8 <= min(sizes) <= max(sizes) <= 40, task.name
        assert max(sizes) <= 0.75 * sum(sizes), task.name
