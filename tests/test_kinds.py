"""Kinds of tasks: rows with parts, spans, labels and turns; what the model reads of them; what answers score."""

import json

import pytest
import torch
from conftest import make_config
from transformers import AutoModelForCausalLM

from rayml.errors import DataError
from rayml.experiments.metrics import scores, span_report
from rayml.lm.batch import collate
from rayml.lm.catalog import resolve_model
from rayml.lm.encode import Encoder
from rayml.lm.label_trie import IGNORE
from rayml.lm.load import load_tokenizer
from rayml.lm.model import TaskLM
from rayml.tasks.kinds import CHAT, format_target, parse_labels, parse_spans, parse_target
from rayml.tasks.prepare import prepare_tasks
from rayml.tasks.read import read_rows
from rayml.tasks.row import query_example
from rayml.tasks.table import build_tasks
from rayml.tasks.task import Example

TURNS = [("user", "我的包裹还没到"), ("assistant", "请告诉我单号"), ("user", "12345"), ("assistant", "明天送达")]
ROWS = {
    "pair": {
        "input": {"premise": "小王在北京上班", "hypothesis": "小王在中国工作"},
        "target": "entailment",
    },
    "relation": {
        "input": {"text": "Marie Curie was born in Warsaw.", "head": "Marie Curie", "tail": "Warsaw"},
        "target": "born in",
    },
    "multilabel": {"input": "late again, and the box was crushed", "target": ["delay", "damage"]},
    "ner": {
        "input": "李明昨天去了上海",
        "target": [{"text": "李明", "type": "PER"}, {"text": "上海", "type": "LOC"}],
    },
    "qa": {
        "input": {"context": "The bridge was opened in 1932.", "question": "When was it opened?"},
        "target": "in 1932",
        "answers": ["1932"],
    },
    "dialogue": {"messages": [{"role": role, "content": text} for role, text in TURNS]},
}
SHOWN = {
    "pair": "premise: 小王在北京上班\nhypothesis: 小王在中国工作\nLabel: entailment",
    "relation": "Marie Curie was born in Warsaw.\nRelation of Marie Curie to Warsaw: born in",
    "multilabel": "late again, and the box was crushed\nLabels: delay; damage",
    "ner": "李明昨天去了上海\nEntities: PER: 李明; LOC: 上海",
    "qa": "The bridge was opened in 1932.\nQuestion: When was it opened?\nAnswer: in 1932",
    "dialogue": "user: 我的包裹还没到\nassistant: 请告诉我单号\nuser: 12345\nassistant: 明天送达\n",
}


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(resolve_model("smollm2-135m-instruct"))


def task_of(tmp_path, *rows: dict, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"task": "some", **row, **more}, ensure_ascii=False) + "\n" for row in rows))
    (task,), _ = build_tasks(read_rows([str(path)]))
    return task


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_tells_its_kind_and_is_shown_by_its_kinds_prompt(kind, tmp_path, smollm2):
    task = task_of(tmp_path, ROWS[kind])
    assert task.kind == kind
    encoder = Encoder(smollm2, "{input}\nLabel:", 128).for_task(task.name, task.kind)
    row = encoder.row(task.examples[0], is_label=kind in ("pair", "relation"))
    text = smollm2.decode(row.tokens, skip_special_tokens=kind != "dialogue")
    if kind == "dialogue":  # by SmolLM2's own chat template
        stock = smollm2.apply_chat_template([{"role": r, "content": t} for r, t in TURNS], tokenize=False)
        assert text == stock.rstrip()
        asked = smollm2.apply_chat_template(
            [{"role": r, "content": t} for r, t in TURNS[:3]], tokenize=False, add_generation_prompt=True
        )
        assert smollm2.decode(encoder.prompt_tokens(task.examples[0])) == asked
    else:
        assert text == SHOWN[kind]
        prompt = SHOWN[kind].removesuffix(" " + task.examples[0].target)
        assert smollm2.decode(encoder.prompt_tokens(task.examples[0])) == prompt


def test_only_the_assistants_turns_are_learned(tmp_path, smollm2):
    task = task_of(tmp_path, ROWS["dialogue"])
    encoder = Encoder(smollm2, "{input}", 128).for_task(task.name, task.kind)
    batch = collate([[encoder.row(task.examples[0], is_label=False)]], smollm2.eos_token_id)
    learned = batch.targets[batch.targets != IGNORE]
    assert smollm2.decode(learned) == "请告诉我单号<|im_end|>明天送达<|im_end|>"
    # Each is predicted where it stands: one place before it, in the text as it is read.
    places = (batch.targets[0] != IGNORE).nonzero().flatten()
    inside = places[places + 1 < batch.tokens.shape[1]]
    assert torch.equal(batch.tokens[0, inside + 1], batch.targets[0, inside])


def test_the_loss_of_a_dialogue_is_transformers_own_with_all_else_masked(tmp_path, tiny):
    """A reference that knows nothing of our rows: the characters of the assistant's turns, found by hand."""
    tokenizer, model = load_tokenizer(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    turns = [("user", "hello"), ("assistant", "good day"), ("user", "more"), ("assistant", "no")]
    task = task_of(tmp_path, {"messages": [{"role": role, "content": text} for role, text in turns]})
    text = "user: hello\nassistant: good day\nuser: more\nassistant: no\n<end>"
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    labels = torch.full_like(tokens, -100)
    for start, end in ((23, 31), (54, 58)):  # one token a character; the end is one
        labels[0, start:end] = tokens[0, start:end]
    wanted = model(tokens, labels=labels).loss
    encoder = Encoder(tokenizer, "{input}", 128).for_task(task.name, task.kind)
    batch = collate([[encoder.row(task.examples[0], is_label=False)]], tokenizer.eos_token_id)
    found = TaskLM(model, None).losses(None, batch)[0]
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_a_long_dialogue_loses_its_beginning_and_never_its_last_turn(tmp_path, smollm2):
    task = task_of(tmp_path, ROWS["dialogue"])
    encoder = Encoder(smollm2, "{input}", 20).for_task(task.name, task.kind)
    row = encoder.row(task.examples[0], is_label=False)
    assert len(row.tokens) == 20
    assert smollm2.decode(row.tokens[-9:]).endswith("明天送达<|im_end|>")
    with pytest.raises(DataError, match="leaves no room"):
        Encoder(smollm2, "{input}", 4).for_task(task.name, task.kind).row(task.examples[0], is_label=False)


def test_a_long_dialogue_keeps_the_token_that_texts_begin_with(tiny):
    """As any other prompt that is cut. The hidden states of many models are far off without it."""
    words = load_tokenizer(tiny)
    words.bos_token = "~"
    words.chat_template = "~" + CHAT
    turns = [("user", "hello " * 20), ("assistant", "good day")]
    encoder = Encoder(words, "{input}", 40, kind="dialogue")
    row = encoder.row(Example("", "good day", tuple(turns)), is_label=False)
    prompt = encoder.prompt_tokens(Example("", "", (*turns[:1], ("assistant", ""))))
    assert [len(row.tokens), len(prompt)] == [40, 40]
    assert words.decode(row.tokens[row.start :]) == "good day"
    assert [words.decode(tokens)[0] for tokens in (row.tokens, prompt)] == ["~", "~"]
    assert words.decode(prompt).endswith("assistant: ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": {"premise": "a", "hypothesis": ""}, "target": "no"}, "'input.hypothesis' is empty"),
        ({"input": "a", "target": ["x", {}]}, "'target' is not text"),
        ({"input": "a", "target": [{"text": "x"}]}, "'target' is not text"),
        ({"input": "a", "target": "b", "kind": "poem"}, "'kind' is 'poem'; there are label"),
        ({"messages": [{"role": "user", "content": "a"}]}, "ends with one"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 1: expected a role among system"),
        ({"input": "a", "target": "b", "answers": "c"}, "'answers' is not a list"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_by_their_line(row, message, tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*" + message):
        task_of(tmp_path, row)


def test_a_task_is_of_one_kind(tmp_path):
    with pytest.raises(DataError, match=r"'pair' at .*:1 and 'ner' at .*:2"):
        task_of(tmp_path, ROWS["pair"], ROWS["ner"])


def test_a_column_mapping_makes_parts_and_a_setting_names_the_kind(tmp_path):
    path = tmp_path / "nli.jsonl"
    rows = [{"s1": f"first {n}", "s2": "second", "gold": "yes" if n % 2 else "no"} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        tmp_path,
        data={
            "path": str(path),
            "columns": {"input.premise": "s1", "input.hypothesis": "s2", "target": "gold"},
            "kind": "translation",
        },
    )
    (task,) = prepare_tasks(config.data)
    assert task.kind == "pair"  # what the fields tell is not overruled
    assert task.options == ("no", "yes")
    assert task.examples[0].parts == (("premise", "first 0"), ("hypothesis", "second"))


def test_targets_are_written_and_read_back():
    assert format_target(["delay", "damage"]) == "delay; damage"
    assert parse_labels("delay;damage ; ") == ["delay", "damage"]
    assert format_target([]) == "none"
    assert parse_labels("none") == parse_spans("none") == []
    assert parse_spans(format_target([{"text": "上海", "type": "LOC"}])) == [("LOC", "上海")]
    spans = [{"text": "a; b: c\\", "type": "x: y"}, {"text": "none", "type": "z"}]
    assert (parse_target("ner", format_target(spans)), parse_target("ner", "none")) == (spans, [])
    assert parse_target("multilabel", format_target(["none", "a; b"])) == ["none", "a; b"]
    assert parse_target("text", "a; b") is None
    assert parse_spans("LOC: ; what, PER: 李明: x") == [("what, PER", "李明: x")]


def query(target: str, answer: str, text: str = "", **more) -> dict:
    return {"input": text, "target": target, "answer": answer, **more}


def test_spans_score_as_conll_counts_them():
    text = "Angela Merkel visited Berlin, then Rome."
    asked = [
        query("person: Angela Merkel; place: Berlin", "person: Angela Merkel; place: Rome; place: Oslo", text),
        query("PER: 李明; LOC: 上海", "PER: 李; LOC: 上海", "李明昨天去了上海"),
        query("none", "none", "nothing here"),
    ]
    found = scores("ner", asked)
    # Right: Angela Merkel and 上海, of four; said were five. 李 is a part of a span, Oslo stands nowhere.
    assert found["span_precision"] == pytest.approx(2 / 5)
    assert found["span_recall"] == pytest.approx(2 / 4)
    assert found["span_f1"] == pytest.approx(2 * 2 / (5 + 4))
    assert "person       1.00      1.00      1.00         1" in span_report(asked)
    assert scores("ner", asked[2:])["span_f1"] == 1.0


@pytest.mark.parametrize(
    ("text", "target", "answer", "f1"),
    [
        ("Apple's CEO", "org: Apple", "org: Google", 0),  # neither is a whole word of the text
        ("Apple's CEO", "org: Apple", "org: Apple", 1),
        ("Apple's and BMW's CEO", "org: Apple; org: BMW", "org: Oslo; org: BMW", 1 / 2),
        ("New York and York", "place: New York; place: York", "place: York; place: New York", 1),
        ("Rome, Rome.", "place: Rome; place: Rome", "place: Rome; city: Rome", 1 / 2),
        ("in Rome", "place: Rome", "place: Rome; place: Rome", 2 / 3),
    ],
)
def test_a_span_is_right_by_its_type_and_words_wherever_and_in_whichever_order_it_stands(text, target, answer, f1):
    assert scores("ner", [query(target, answer, text)])["span_f1"] == pytest.approx(f1)


def test_a_task_without_any_span_has_a_report():
    assert span_report([query("none", "none", "nothing here")]) == "no spans, neither in targets nor in answers"


def test_labels_of_which_several_hold_score_by_label_and_as_a_whole():
    found = scores("multilabel", [query("a; b", "b; a"), query("a", "a; c"), query("none", "none")])
    assert found == pytest.approx({"micro_f1": 2 * 3 / (3 + 4), "macro_f1": (1 + 1 + 0) / 3, "exact_match": 2 / 3})
    assert set(scores("multilabel", [query("a", "a")]).values()) == {1.0}


def test_chinese_answers_score_by_their_characters():
    asked = [query("我爱北京天安门", "我爱北京", answers=["我喜欢北京"])]
    qa, summary, translation = (scores(kind, asked) for kind in ("qa", "summary", "translation"))
    assert qa["token_f1"] == pytest.approx(2 * 4 / (4 + 7))
    assert qa["exact_match"] == 0
    assert scores("qa", [query("天安门", "北京", answers=["北京"])]) == {"token_f1": 1.0, "exact_match": 1.0}
    assert summary["rouge_l"] == pytest.approx(2 * 4 / (4 + 7))
    assert 0.3 < translation["bleu"] < 1
    assert scores("translation", [query("我爱北京", "我爱北京")])["bleu"] == pytest.approx(1)
    assert scores("summary", [query("नमस्ते दुनिया", "नमस्ते")])["rouge_1"] == pytest.approx(2 / 3)


def test_relations_that_are_none_do_not_count():
    chosen = [query("no relation", "born in"), query("born in", "born in"), query("no relation", "no relation")]
    found = scores("relation", [one | {"confidence": 1.0} for one in chosen])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["relation_f1"] == pytest.approx(2 * 1 / (2 + 1))


def test_an_input_alone_is_a_text_fields_or_turns():
    assert query_example("hi").input == "hi"
    assert query_example({"premise": "a", "hypothesis": "b"}).parts == (("premise", "a"), ("hypothesis", "b"))
    assert query_example(TURNS[:1]).parts == (TURNS[0], ("assistant", ""))
