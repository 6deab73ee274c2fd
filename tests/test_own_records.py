"""JSON and well-known records that people bring: nothing of them is lost, or taken for something else, in silence."""

import json
from datetime import date
from decimal import Decimal

import numpy
import pyarrow.parquet
import pytest
import torch
from test_own_data import lines, read

from rayml.errors import DataError
from rayml.tasks.read import read_rows, rows_from_examples
from rayml.tasks.table import build_tasks

ASKED = {"role": "user", "content": "where is it?"}
ANSWERED = {"role": "assistant", "content": "on its way"}
PAIR = [{"input": "a", "target": "x"}, {"input": "b", "target": "y"}]


def pairs(rows):
    return [(row.input, row.target) for row in rows]


# JSON


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("second", [[PAIR[1]], PAIR[1]])
@pytest.mark.parametrize("indent", [None, 1])
def test_what_follows_a_list_is_read(name, second, indent, tmp_path):
    rows, _ = read(tmp_path, name, f"{json.dumps([PAIR[0]], indent=indent)}\n{json.dumps(second, indent=indent)}\n")
    assert pairs(rows) == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize("more", ["oops", '[{"input": "b"', '["text"]', "]"])
def test_what_follows_a_list_and_is_no_row_is_named_by_its_line(more, tmp_path):
    with pytest.raises(DataError, match=r"a.json:2: (not JSON|expected a JSON object)"):
        read(tmp_path, "a.json", f"{json.dumps(PAIR)}\n{more}\n")


@pytest.mark.parametrize("key", ["examples", "data", "train"])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_list_of_a_document_is_its_own_and_none_further_in(key, indent, tmp_path):
    wrong = {key: [{"input": "wrong", "target": "w"}]}
    document = {"metadata": wrong, "about": f'"{key}": [', key: PAIR}
    rows, _ = read(tmp_path, "a.json", json.dumps(document, indent=indent))
    assert pairs(rows) == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize(
    ("row", "read_as"),
    [
        ({"input": {"premise": "aaa", "hypothesis": "bbb"}, "target": ["x", "y"]}, ("aaa\nbbb", "x; y")),
        ({"input": "a", "target": "x", "examples": []}, ("a", "x")),
        ({"question": "who?", "answer": "she", "ctxs": [{"title": "t", "text": "p"}]}, ("who?", "she")),
        ({"prompt": "who?", "answers": ["she"], "ctxs": [{"title": "t", "text": "p"}]}, ("who?", "she")),
        ({"input": [ASKED, ANSWERED], "target": ["x", "y"]}, ("user: where is it?\nassistant: on its way", "x; y")),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_one_row_with_lists_in_it_is_one_row(row, read_as, indent, tmp_path):
    rows, _ = read(tmp_path, "a.jsonl" if indent is None else "a.json", json.dumps(row, indent=indent))
    assert pairs(rows) == [read_as]


def test_columns_side_by_side_are_paired_by_their_index(tmp_path):
    rows, _ = read(tmp_path, "a.json", '{"text": {"0": "a", "1": "b"}, "label": {"1": "y", "0": "x"}}')
    assert pairs(rows) == [("a", "x"), ("b", "y")]
    with pytest.raises(DataError):
        read(tmp_path, "a.json", '{"text": {"0": "a", "1": "b"}, "label": {"1": "y", "2": "x"}}')


def test_columns_that_pandas_numbers_are_named_by_number(tmp_path):
    table = '{"columns": [0, 1], "index": [0, 1], "data": [["a", "x"], ["b", "y"]]}'
    rows, _ = read(tmp_path, "a.json", table, columns={"input": "0", "target": "1"})
    assert pairs(rows) == [("a", "x"), ("b", "y")]
    with pytest.raises(DataError, match=r"which columns are input and target. There are 0, 1"):
        read(tmp_path, "a.json", table)


def test_spacys_pairs_of_a_text_and_its_entities_are_read(tmp_path):
    content = [["Foo bar", {"entities": [[0, 3, "ORG"]]}], ["nothing", {"entities": []}]]
    rows, _ = read(tmp_path, "a.json", json.dumps(content))
    assert (rows[0].input, rows[0].target, rows[0].kind) == ("Foo bar", "ORG: Foo", "ner")
    assert len(rows) == 2
    rows, _ = read(tmp_path, "a.jsonl", lines(content))
    assert rows[0].target == "ORG: Foo"


# Conversations


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [ASKED, ANSWERED], "label": "complaint"}, None),
        ({"messages": [ASKED, ANSWERED], "target": "complaint"}, None),
        ({"input": [ASKED, ANSWERED], "target": "complaint"}, None),
        ({"messages": [ASKED, ANSWERED], "target": "complaint"}, {"input": "messages", "target": "target"}),
        (
            {"conversations": [{"from": "human", "value": "where is it?"}, {"from": "gpt", "value": "on its way"}]}
            | {"intent": "complaint"},
            None,
        ),
    ],
)
def test_the_label_of_a_conversation_is_kept(row, columns, tmp_path):
    rows, _ = read(tmp_path, "a.jsonl", lines([row, row]), columns=columns)
    assert pairs(rows) == [("user: where is it?\nassistant: on its way", "complaint")] * 2
    assert not rows[0].kind


def test_a_dialogue_and_a_target_are_refused(tmp_path):
    row = {"messages": [ASKED, ANSWERED], "target": "x", "kind": "dialogue"}
    with pytest.raises(DataError, match="kind 'dialogue' has no target"):
        read(tmp_path, "a.jsonl", lines([row, row]))


def test_the_system_text_beside_a_conversation_is_its_first_turn(tmp_path):
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    rows, _ = read(tmp_path, "a.jsonl", lines([{"system": "be kind", "conversations": sharegpt}] * 2))
    assert rows[0].parts == (("system", "be kind"), ("user", "hi"), ("assistant", "hello"))
    rows, _ = read(tmp_path, "a.jsonl", lines([{"system": "be kind", "messages": [ASKED, ANSWERED]}] * 2))
    assert rows[0].parts[0] == ("system", "be kind")
    twice = {"system": "be kind", "messages": [{"role": "system", "content": "be rude"}, ASKED, ANSWERED]}
    with pytest.raises(DataError, match="'system' is another than the system's turn"):
        read(tmp_path, "a.jsonl", lines([twice]))


@pytest.mark.parametrize(
    ("more", "message"), [({"weight": 0}, "message 2: has weight 0"), ({"tool_calls": [{}]}, "'tool_calls' is not")]
)
def test_turns_that_would_be_learned_otherwise_are_refused(more, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(tmp_path, "a.jsonl", lines([{"messages": [ASKED, ANSWERED | more, ASKED, ANSWERED]}]))


# Well-known records


@pytest.mark.parametrize(
    ("row", "read_as"),
    [
        (
            {"instruction": "add", "input": "1 2", "output": "3", "system": "be exact", "history": [["hi", "yes?"]]},
            ("system: be exact\nuser: hi\nassistant: yes?\nuser: add\n1 2", "3"),
        ),
        ({"instruction": "add", "input": "", "output": "3", "system": "", "history": []}, ("add", "3")),
        ({"instruction": "sum up", "context": "a b", "response": "c"}, ("sum up\na b", "c")),
        ({"passage": "p", "question": "q", "answer": True}, ("p\nq", "true")),
    ],
)
def test_all_of_a_well_known_record_is_taken(row, read_as, tmp_path):
    rows, said = read(tmp_path, "a.jsonl", lines([row, row]))
    assert pairs(rows) == [read_as] * 2
    assert "left out" not in said


@pytest.mark.parametrize(
    "row",
    [
        {"question": "who?", "answer": ["she", "her"]},
        {"question": "who?", "answers": ["she", "her"]},
        {"input": {"question": "who?"}, "target": ["she", "her"], "kind": "qa"},
    ],
)
def test_several_answers_to_a_question_are_each_right(row, tmp_path):
    """As in NQ and TriviaQA. They were several labels, of which the model had to write all."""
    rows, _ = read(tmp_path, "a.jsonl", lines([row, row]))
    assert (rows[0].target, rows[0].kind) == ("she", "qa")
    assert "her" in rows[0].answers
    tags, _ = read(tmp_path, "b.jsonl", lines([{"question": "how?", "tags": ["x", "y"]}] * 2))
    assert (tags[0].target, tags[0].kind) == ("x; y", "multilabel")


def test_true_and_false_are_labels_of_a_question(tmp_path):
    """As in BoolQ. They were answers to write."""
    rows, _ = read(tmp_path, "a.jsonl", lines([{"passage": "p", "question": "q", "answer": True}]))
    assert (rows[0].target, rows[0].kind) == ("true", "pair")
    texts, _ = read(tmp_path, "b.jsonl", lines([{"passage": "p", "question": "q", "answer": "true"}]))
    assert texts[0].kind == "qa"
    alone, _ = read(tmp_path, "c.jsonl", lines([{"input": {"question": "q"}, "target": False}]))
    assert (alone[0].target, alone[0].kind) == ("false", "")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": ["human"], "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"context": "c", "question": "q", "answers": {"text": [["a"]]}},
        {"text": "t", "answer": "accept", "accept": ["a"], "config": "single"},
        {"instruction": "i", "output": "o", "system": ["be kind"]},
    ],
)
def test_a_field_of_another_type_than_its_formats_is_refused_by_its_line(row, tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl:1: a field is of another type"):
        read(tmp_path, "a.jsonl", lines([row]))


def test_the_answer_to_a_question_is_among_its_columns(tmp_path):
    rows, _ = read(tmp_path, "a.csv", "question,A,B,C,answer\nbig?,mouse,whale,,B\nold?,1,2,3,a\nred?,x,y,z,y\n")
    assert [row.target for row in rows] == ["whale", "1", "y"]
    assert rows[0].input == "big?\nOptions: mouse; whale"
    with pytest.raises(DataError, match=r"a.csv:2: expected an answer among A, B, got 'C'"):
        read(tmp_path, "a.csv", "question,A,B,answer\nbig?,mouse,whale,C\n")


def test_columns_that_a_guess_leaves_out_are_said(tmp_path):
    _, said = read(tmp_path, "a.csv", "id,text,label,source\n1,a,x,web\n")
    assert "text as input, label as target, and id, source left out; or say" in said
    _, said = read(tmp_path, "a.jsonl", lines([{"messages": [ASKED, ANSWERED], "source": "web", "task": "t"}]))
    assert "chat (its keys, such as messages, source, task), and source left out" in said


def test_records_that_are_left_out_are_counted(tmp_path):
    answers = [{"text": ["she"]}, {"text": []}, {"text": []}]
    _, said = read(tmp_path, "a.jsonl", lines({"context": "c", "question": "q", "answers": one} for one in answers))
    assert "2 row(s) are left out: without an answer" in said
    squad = {
        "paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": a} for a in ([{"text": "she"}], [])]}]
    }
    _, said = read(tmp_path, "a.json", json.dumps({"data": [squad]}))
    assert "1 row(s) are left out: without an answer" in said
    _, said = read(
        tmp_path, "a.jsonl", lines({"text": "t", "label": "l", "answer": one} for one in ("accept", "reject"))
    )
    assert "1 row(s) are left out: not accepted in Prodigy" in said
    scored = [{"x": 1, "y": 0}, {"x": 1, "y": 1}]
    rows, said = read(
        tmp_path, "a.json", json.dumps({"examples": [{"input": "i", "target_scores": one} for one in scored]})
    )
    assert pairs(rows) == [("i", "x")]
    assert "1 row(s) are left out: several targets have the best score" in said


def test_a_split_of_what_has_none_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(PAIR).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="is one data set, and has no splits, such as 'test'"):
        read_rows([f"hf:{tmp_path / 'one'}:test"])
    assert len(read_rows([f"hf:{tmp_path / 'one'}"])) == 2


# What to type


def refusal(tmp_path, name, content):
    with pytest.raises(DataError) as error:
        read(tmp_path, name, content)
    return str(error.value)


def table(heading, *rows):
    return "\n".join([heading, *rows]) + "\n"


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (
            table("hello there 0,positive", *(f"some text {n},{'positive' if n % 2 else 'bad'}" for n in range(6))),
            "0,1",
        ),
        (table("v1,v2,,,", *(f"{'spam' if n % 2 else 'ham'},some text {n},,," for n in range(6))), "v2,v1"),
        (
            table("when,body,mood", *(f"2024-01-0{n},some text {n},{'up' if n % 2 else 'down'}" for n in range(1, 7))),
            "body,mood",
        ),
    ],
)
def test_advice_is_what_reads_the_file(content, advice, tmp_path):
    text, label = advice.split(",")
    assert f"--columns input={text},target={label}" in refusal(tmp_path, "a.csv", content)
    rows, _ = read(tmp_path, "a.csv", content, columns={"input": text, "target": label})
    assert len({row.target for row in rows}) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p q", "chosen": "good one", "rejected": "bad one"},
        {"prompt": "p q", "completion": "good one", "label": True},
        {"sentence1": "a b", "sentence2": "c d", "score": 2.5},
        {"text": "a b", "options": ["x", "y"], "label": 1},
        {"text": "a b", "cats": {"x": 1, "y": 0}},
        {"data": "a b", "annotations": [{"result": []}]},
        {"tokens": ["a", "b"], "labels": ["x", "y"]},
    ],
)
def test_advice_that_would_be_wrong_is_not_given(row, tmp_path):
    said = refusal(tmp_path, "a.jsonl", lines([row | {"n": n} for n in range(4)]))
    assert "--columns input=COLUMN,target=COLUMN" in said


# In memory


def said_of(examples, caplog):
    caplog.clear()
    rows = rows_from_examples(examples)
    return rows, caplog.text


def test_guesses_on_what_is_in_memory_are_said(caplog):
    rows, said = said_of([{"text": "a", "label": 1, "id": 7}], caplog)
    assert pairs(rows) == [("a", "1")]
    assert "text as input, label as target, and id left out" in said
    assert "taken as their text" in said
    assert said_of([("a", "x")], caplog)[1] == ""
    rows, said = said_of([{"messages": [ASKED, ANSWERED]}], caplog)
    assert rows[0].kind == "dialogue"
    with pytest.raises(DataError, match="which columns are input and target"):
        rows_from_examples([{"one": "a b", "two": "c"}])
    rows, _ = said_of([("Foo bar", {"entities": [(0, 3, "ORG")]})], caplog)
    assert rows[0].target == "ORG: Foo"


def test_data_frames_are_read_or_refused_by_name():
    pandas = pytest.importorskip("pandas")
    assert pairs(rows_from_examples(pandas.DataFrame([["t", "a"], ["u", "b"]]))) == [("t", "a"), ("u", "b")]
    assert pairs(rows_from_examples(pandas.DataFrame({"text": ["t"], "label": [numpy.float32(0.1)]}))) == [("t", "0.1")]
    missing = pandas.DataFrame({"text": ["t", "u"], "label": pandas.array([1, None], "Int64")})
    with pytest.raises(DataError, match="example 1: 'label' is missing"):
        rows_from_examples(missing)
    with pytest.raises(DataError, match="two columns label"):
        rows_from_examples(pandas.DataFrame([["t", "a", "b"]], columns=["text", "label", "label"]))
    with pytest.raises(DataError, match="columns of several parts"):
        rows_from_examples(pandas.DataFrame([["t", "a"]], columns=[("x", "text"), ("x", "label")]))
    with pytest.raises(DataError, match="got a Series"):
        rows_from_examples(pandas.Series(["t", "a"]))
    with pytest.raises(DataError, match="which columns are input and target"):
        rows_from_examples(pandas.DataFrame([["t", "a", "b"]]))


@pytest.mark.parametrize("format", ["arrow", "torch", "numpy", "pandas", None])
def test_data_sets_are_read_whatever_they_are_shown_as(format):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"input": datasets.Value("string"), "target": datasets.Value("float32")})
    data = datasets.Dataset.from_dict({"input": ["a", "b"], "target": [0.1, 2]}, features=features)
    assert pairs(rows_from_examples(data.with_format(format))) == [("a", "0.1"), ("b", "2")]


def test_values_of_arrays_are_plain():
    given = [("a", numpy.int64(3)), ("b", numpy.bool_(True)), ("c", torch.tensor(1)), numpy.array(["d", "x"])]
    assert pairs(rows_from_examples(given)) == [("a", "3"), ("b", "true"), ("c", "1"), ("d", "x")]


def test_numbers_dates_and_decimals_of_a_table_are_their_text(tmp_path):
    short = pyarrow.array([0.1, 1], pyarrow.float32())
    day, money = [date(2024, 1, 2)] * 2, [Decimal("1.50")] * 2
    for values, text in ((short, "0.1"), (day, "2024-01-02"), (money, "1.50")):
        pyarrow.parquet.write_table(pyarrow.table({"input": ["a", "b"], "target": values}), tmp_path / "a.parquet")
        assert read_rows([str(tmp_path / "a.parquet")])[0].target == text


# Labels


@pytest.mark.parametrize("targets", [["yes", "no", "maybe"], ["yes"] * 3])
def test_short_targets_that_are_taken_for_texts_are_said_to_be(targets, caplog):
    rows = rows_from_examples([(f"text {n}", target) for n, target in enumerate(targets)])
    (task,), _ = build_tasks(rows)
    assert not task.options
    assert caplog.text.count("targets are taken for free text") == 1
    caplog.clear()
    for more in ({"kind": "text"}, {"options": [*targets, "other"]}):
        build_tasks(rows_from_examples([{"input": f"text {n}", "target": t} | more for n, t in enumerate(targets)]))
    assert not caplog.text


@pytest.mark.parametrize("other", ["cafe\u0301", "caf\u00e9\u200b", "\ufeffcaf\u00e9"])
def test_labels_that_look_the_same_are_refused_by_name(other):
    rows = [(f"text {n}", other if n % 2 else "caf\u00e9") for n in range(4)]
    with pytest.raises(DataError, match=r"labels .*caf.* and .*caf.* are other characters, and look the same"):
        build_tasks(rows_from_examples(rows))
