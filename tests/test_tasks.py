"""Tasks and episodes: reading, splitting, drawing, and what is refused."""

import json
import random
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from conftest import make_config, toy_tasks
from pydantic import ValidationError

from rayml.errors import DataError
from rayml.sections import Data
from rayml.tasks.episodes import Sampler
from rayml.tasks.prepare import prepare_splits, prepare_tasks
from rayml.tasks.read import read_rows
from rayml.tasks.splits import SplitRule, Splits, find_leaks, split_tasks
from rayml.tasks.table import build_tasks
from rayml.tasks.task import Example, Task, normalize_text

LETTERS = Sampler(ways=3, shots=2, queries=3, labels="letters", seed=7)
TEXT = Task("copy", tuple(Example(f"question {i}", f"answer {i}") for i in range(20)))


def row(task="t", text="x", target="y", **more):
    return {"task": task, "input": text, "target": target, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


# Episodes


@pytest.mark.parametrize(
    ("weighting", "share"), [("proportional", 9 / 12), ("uniform", 1 / 2), ("temperature", 3 / (3 + 3**0.5))]
)
def test_tasks_share_the_episodes_as_the_weighting_says(weighting, share):
    """Nine classes beside three; the square roots of those at temperature 2."""
    nine, three = toy_tasks(tasks=1, classes=9)[0], toy_tasks(tasks=1, classes=3, seed=1)[0]
    tasks = (Task("nine", nine.examples, nine.options), Task("three", three.examples, three.options))
    sampler = Data(path="x", ways=3, shots=2, queries=3, weighting=weighting).sampler(seed=0)
    drawn = Counter(sampler.episode(tasks, index).task for index in range(2000))
    assert drawn["nine"] / 2000 == pytest.approx(share, abs=0.04)


def test_an_episode_is_a_function_of_seed_and_index():
    tasks = toy_tasks()
    assert LETTERS.episode(tasks, 5) == LETTERS.episode(list(tasks), 5)
    assert LETTERS.episode(tasks, 5) != LETTERS.episode(tasks, 6)
    other_seed = Sampler(ways=3, shots=2, queries=3, labels="letters", seed=8)
    assert LETTERS.episode(tasks, 5) != other_seed.episode(tasks, 5)


def test_episodes_to_train_on_are_of_all_sizes_and_others_of_one(tmp_path):
    tasks = toy_tasks(classes=10)
    data = {"ways": 8, "fewest_ways": 2, "shots": 4, "fewest_shots": 1, "labels": "words"}
    config = make_config(tmp_path, data=data).data
    drawn = [config.training_sampler(0).episode(tasks, index) for index in range(400)]
    sizes = [(len(e.labels), len(e.support) // len(e.labels), len(e.query) // len(e.labels)) for e in drawn]
    assert {ways for ways, _, _ in sizes} == set(range(2, 9))
    assert {shots for _, shots, _ in sizes} == set(range(1, 5))
    assert {queries for _, _, queries in sizes} == {config.queries}
    # Each doubling as likely: from 2 to 4 ways as often as from 4 to 8.
    assert 0.4 < sum(ways < 4 or (ways == 4 and index % 2) for index, (ways, _, _) in enumerate(sizes)) / 400 < 0.6
    fixed = config.sampler(0).episode(tasks, 3)
    assert (len(fixed.labels), len(fixed.support)) == (8, 32)
    with pytest.raises(ValidationError, match=r"data.fewest_ways: 9 is more than data.ways=8"):
        make_config(tmp_path, data=data | {"fewest_ways": 9})


def test_an_episode_does_not_depend_on_what_was_drawn_before():
    tasks = toy_tasks()
    expected = LETTERS.episode(tasks, 5)
    random.seed(1)
    [LETTERS.episode(tasks, i) for i in range(5)]
    assert LETTERS.episode(tasks, 5) == expected


@pytest.mark.parametrize("labels", ["letters", "words"])
def test_ways_shots_and_queries_count_per_class(labels):
    sampler = Sampler(ways=3, shots=2, queries=3, labels=labels, seed=0)
    for index in range(50):
        episode = sampler.episode(toy_tasks(), index)
        assert Counter(e.target for e in episode.support) == dict.fromkeys(episode.labels, 2)
        assert Counter(e.target for e in episode.query) == dict.fromkeys(episode.labels, 3)
        assert len(episode.labels) == 3


def test_support_and_query_share_no_text():
    for tasks in (toy_tasks(), (TEXT,)):
        for index in range(200):
            episode = LETTERS.episode(tasks, index)
            support, query = ({normalize_text(e.input) for e in side} for side in (episode.support, episode.query))
            assert not support & query
            assert len(support) == len(episode.support)


def test_letters_are_permuted_and_map_back_to_the_words():
    tasks = toy_tasks(tasks=1)
    words = {example.input: example.target for example in tasks[0].examples}
    seen = Counter()
    for index in range(300):
        episode = LETTERS.episode(tasks, index)
        assert set(episode.labels) == {"A", "B", "C"}
        for example in (*episode.support, *episode.query):
            assert words[example.input] == episode.labels[example.target]
        seen[episode.labels["A"]] += 1
    assert len(seen) == 5
    assert min(seen.values()) > 30  # every class is A about as often: 60 times of 300


def test_free_text_counts_per_task_and_keeps_its_targets():
    episode = LETTERS.episode((TEXT,), 0)
    assert (len(episode.support), len(episode.query), episode.labels) == (2, 3, {})
    assert all(e in TEXT.examples for e in (*episode.support, *episode.query))


def test_a_task_with_fewer_classes_gives_all_of_them():
    episode = LETTERS.episode(toy_tasks(tasks=1, classes=2), 0)
    assert len(episode.labels) == 2


def test_too_few_examples_are_refused_with_task_class_have_and_need():
    small = Task("spam", tuple(Example(f"{i}", "ham" if i else "spam") for i in range(9)), ("ham", "spam"))
    with pytest.raises(DataError, match="task 'spam', class 'spam': has 1, needs 5"):
        LETTERS.check((small,))
    LETTERS.check(toy_tasks())


# Reading


def test_rows_are_read_from_files_folders_globs_and_uris(tmp_path):
    rows = [row(text="a"), row(text="b", options=["y", "z"])]
    (tmp_path / "deep").mkdir()
    one = write(tmp_path / "one.jsonl", rows)
    table = pyarrow.Table.from_pylist([row(text="c"), row(text="d")])
    pyarrow.parquet.write_table(table, tmp_path / "deep" / "two.parquet")
    texts = lambda *paths: [r.input for r in read_rows(paths)]  # noqa: E731
    assert texts(one) == ["a", "b"]
    assert sorted(texts(str(tmp_path))) == ["a", "b", "c", "d"]
    assert texts(str(tmp_path / "*.jsonl")) == ["a", "b"]
    assert texts(str(tmp_path / "d*" / "*.parquet")) == ["c", "d"]
    assert texts(f"file://{tmp_path}/deep") == ["c", "d"]
    assert texts(one, str(tmp_path / "deep")) == ["a", "b", "c", "d"]


def test_columns_are_mapped_and_the_file_names_the_task(tmp_path):
    path = write(tmp_path / "intents.jsonl", [{"utterance": "hi", "intent": "greet"}])
    (found,) = read_rows([path], {"input": "utterance", "target": "intent"})
    assert (found.task, found.input, found.target) == ("intents", "hi", "greet")


def test_hugging_face_data_sets_are_read_with_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )
    data = datasets.Dataset.from_dict({"text": ["hello", "win a prize"], "label": [0, 1]}, features=features)
    data.save_to_disk(tmp_path / "sms")
    rows = read_rows([f"hf:{tmp_path / 'sms'}"], {"input": "text", "target": "label"})
    assert [(r.task, r.input, r.target) for r in rows] == [("sms", "hello", "ham"), ("sms", "win a prize", "spam")]


def test_unusable_rows_are_refused_all_at_once_with_their_lines(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(
        '{"task": "t", "input": "x", "target": "y"}\nnot json\n{"input": "x"}\n\n'
        '{"input": "x", "target": " "}\n{"input": "x", "target": {}}\n{"input": "x", "target": "y", "options": ["z"]}\n'
    )
    with pytest.raises(DataError) as error:
        read_rows([str(path)])
    message = str(error.value)
    for part in (":2: not JSON", ":3: 'target' is missing", ":5: 'target' is empty", ":6: 'target' is not text"):
        assert part in message
    assert ":7: target 'y' is not among its options ['z']" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("none.jsonl", None, "no such file"), ("empty.jsonl", "", "is empty"), ("a.csv", "x", "no row")],
)
def test_missing_and_empty_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows([str(tmp_path / name)])


def test_an_empty_path_is_not_this_folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "target": "b"}\n')
    monkeypatch.chdir(tmp_path)
    assert len(read_rows(["."])) == 1
    with pytest.raises(DataError, match="path of the data is empty"):
        read_rows([""])


def test_a_broken_parquet_file_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("no parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_rows([str(path)])
    rows = {"input": [f"text {i} " * 20 for i in range(1000)], "target": ["a", "b"] * 500}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    data = bytearray(path.read_bytes())
    data[100:140] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(DataError, match="a damaged one: Corrupt snappy"):
        read_rows([str(path)])
    latin = pyarrow.array([b"caf\xe9", b"tea"])
    column = pyarrow.StringArray.from_buffers(2, *latin.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"input": column, "target": ["a", "b"]}), path)
    with pytest.raises(DataError, match=r"a damaged one: .*UTF8"):
        read_rows([str(path)])


# Tables


def table(tmp_path, rows):
    return build_tasks(read_rows([write(tmp_path / "t.jsonl", rows)]))


def test_each_text_stands_once_and_conflicts_are_left_out(tmp_path):
    rows = [row(text="Hello", target="a"), row(text=" hello ", target="a"), row(text="bye", target="b")]
    rows += [row(text="same", target="a"), row(text="SAME", target="b"), row(text="ciao", target="b")]
    (task,), duplicates = table(tmp_path, rows)
    assert [e.input for e in task.examples] == ["Hello", "bye", "ciao"]
    assert duplicates.repeated == {"t": 1}
    assert duplicates.conflicting == [("t", "same", ("a", "b"))]


def test_labels_and_free_text_are_told_apart(tmp_path):
    labels = [row("l", f"{i}", "ab"[i % 2]) for i in range(6)]
    text = [row("f", f"{i}", f"answer {i}") for i in range(6)]
    given = [row("g", "1", "a", options=["b", "a"])]
    tasks, _ = table(tmp_path, labels + text + given)
    assert {t.name: t.options for t in tasks} == {"l": ("a", "b"), "f": (), "g": ("b", "a")}


# Splits


def test_a_row_without_options_has_a_target_among_those_of_its_task(tmp_path):
    """One row may tell the options for all; a target that none of them tells was a KeyError."""
    rows = [row(text="a", target="x", options=["x", "y"]), row(text="b", target="y")]
    assert table(tmp_path, rows)[0][0].options == ("x", "y")
    with pytest.raises(DataError, match=r"task 't': target 'z' at .*:3 is none of the options .*: x, y$"):
        table(tmp_path, [*rows, row(text="c", target="z")])


def test_adding_tasks_moves_none_that_was_there():
    rule = SplitRule(val=0.2, test=0.3)
    tasks = [Task(f"task-{i}", TEXT.examples) for i in range(200)]
    before, after = split_tasks(tasks[:100], rule), split_tasks(tasks, rule)
    for small, large in zip(before, after, strict=True):
        assert {t.name for t in small} == {t.name for t in large} & {t.name for t in tasks[:100]}
    assert [len(split) for split in after] == pytest.approx([100, 40, 60], abs=20)


def test_classes_of_one_task_are_split_without_overlap():
    tasks = toy_tasks(tasks=1, classes=40)
    splits = split_tasks(tasks, SplitRule(val=0.2, test=0.3, by_class=("toy-*",)))
    parts = [set(split[0].options) for split in splits]
    assert set.union(*parts) == set(tasks[0].options)
    assert sum(map(len, parts)) == 40
    assert all({e.target for e in split[0].examples} == part for split, part in zip(splits, parts, strict=True))


def test_named_tasks_go_where_they_are_told_and_unknown_names_are_refused():
    splits = split_tasks(toy_tasks(), SplitRule(val=0, test=0, test_tasks=("toy-1",), val_tasks=("toy-[23]",)))
    assert [[t.name for t in s] for s in splits] == [["toy-0", "toy-4", "toy-5"], ["toy-2", "toy-3"], ["toy-1"]]
    with pytest.raises(DataError, match="'toyy' matches no task"):
        split_tasks(toy_tasks(), SplitRule(val=0, test=0, test_tasks=("toyy",)))


def test_the_same_text_under_two_task_names_is_a_leak(tmp_path):
    one = Task("sick", (Example("A dog runs", "yes"),))
    two = Task("renamed", (Example("a  dog RUNS", "true"),))
    assert find_leaks(Splits((one,), (), (two,))) == [("a  dog RUNS", "train/sick", "test/renamed")]
    assert find_leaks(Splits((one, two), (), ())) == []


def data(tmp_path, tasks, **settings):
    from conftest import write_tasks

    return Data(path=str(write_tasks(tmp_path / "d.jsonl", tasks)), shots=2, queries=2, **settings)


def test_leaking_data_is_refused_before_training(tmp_path):
    tasks = toy_tasks()
    leaked = Task("toy-leak", tasks[0].examples, tasks[0].options)
    splits = {"val": 0, "test": 0, "test_tasks": "toy-leak"}
    with pytest.raises(DataError, match="are in two splits"):
        prepare_splits(data(tmp_path, (*tasks, leaked), splits=splits))


def test_small_classes_are_dropped_on_request_only(tmp_path):
    (task,) = toy_tasks(tasks=1)
    short = Task(task.name, task.examples[:-18], task.options)  # leaves 2 of the last class
    with pytest.raises(DataError, match="has 2, needs 4"):
        prepare_tasks(data(tmp_path, (short,)))
    (kept,) = prepare_tasks(data(tmp_path, (short,), drop_small_classes=True))
    assert kept.options == task.options[:-1]
