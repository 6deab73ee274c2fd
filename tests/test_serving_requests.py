"""Requests as clients send them: what is taken, what is refused, and what the refusal names."""

import asyncio
import json
import time

import pytest
from fastapi import Request

from rayml.lm.sampling import Piece, TokenScore
from rayml.serving.answers import ResponseBodies
from rayml.serving.errors import ApiError
from rayml.serving.http import read_body
from rayml.serving.schema import AdapterRequest, Body, ChatRequest, ClassifyRequest, CompletionRequest, parse
from rayml.serving.settings import Limits
from rayml.tasks.row import parse_row
from rayml.tasks.templates import unused_fields

USER = {"role": "user", "content": "x"}
ASKED = {"model": "m", "input": "x"}
CHAT = {"model": "m", "messages": [USER]}
TEXT = {"model": "m", "prompt": "x"}
ADAPTATION = {"examples": [{"input": "a", "target": "b"}]}
BODIES: dict[type[Body], dict] = {ClassifyRequest: ASKED, ChatRequest: CHAT, CompletionRequest: TEXT}
BODIES[AdapterRequest] = ADAPTATION


def parsed(kind: type[Body], changes: dict):
    return parse(kind, json.dumps(BODIES[kind] | changes).encode())


@pytest.mark.parametrize(
    ("kind", "changes", "field", "says"),
    [
        (ClassifyRequest, {"options": ["a", "a"]}, "options", "appears twice"),
        (ClassifyRequest, {"options": ["a", " a"]}, "options", "appears twice"),
        (ClassifyRequest, {"options": ["a"]}, "options", "at least 2"),
        (ClassifyRequest, {"options": []}, "options", "at least 2"),
        (AdapterRequest, {"options": ["a", "a"]}, "options", "appears twice"),
        (ClassifyRequest, {"input": ""}, "input", "empty"),
        (ClassifyRequest, {"input": "\u200b \ufeff"}, "input", "empty"),
        (ClassifyRequest, {"input": ["x", "\u2060"]}, "input.1", "empty"),
        (ClassifyRequest, {"input": {"premise": "", "hypothesis": " "}}, "input", "no text"),
        (ClassifyRequest, {"truncate": "yes"}, "truncate", "boolean"),
        (ClassifyRequest, {"truncate": 1}, "truncate", "boolean"),
        (AdapterRequest, {"steps": "3"}, "steps", "integer"),
        (AdapterRequest, {"steps": True}, "steps", "integer"),
        (AdapterRequest, {"ttl_seconds": 1e-9}, "ttl_seconds", "greater than or equal to 1"),
        (AdapterRequest, {"strict": True}, "strict", "strict: unknown field; the fields are examples"),
        (AdapterRequest, {"str": 1}, "str", "unknown field"),
        (AdapterRequest, {"examples": [{"input": "a", "target": "b", "list[x": 1}]}, "examples.0.list[x", "unknown"),
        (AdapterRequest, {"examples": [{"input": "a", "target": 1}]}, "examples.0.target", "string"),
        (AdapterRequest, {"examples": [{"input": "a", "target": ["x", 1]}]}, "examples.0.target.1", "string"),
        (AdapterRequest, {"examples": [{"input": "a", "target": [{"text": "x"}]}]},
         "examples.0.target.0.type", "required"),
        (AdapterRequest, {"kind": "qa", "examples": [{"input": "a", "target": ["x"]}]}, None, "kind 'multilabel'"),
        (AdapterRequest, {"kind": ["ner"], "examples": [{"input": "a", "target": ["x"]}]}, None, "ner"),
        (CompletionRequest, {"temperature": "1"}, "temperature", "number"),
        (CompletionRequest, {"n": True}, "n", "integer"),
        (CompletionRequest, {"echo": True}, "echo", "False"),
        (ChatRequest, {"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        (ChatRequest, {"store": True}, "store", "False"),
        (ChatRequest, {"logit_bias": {"1": 2}}, "logit_bias", "at most 0"),
        (ChatRequest, {"tools": [{"type": "function"}]}, "tools", "at most 0"),
        (ChatRequest, {"messages": [{"role": "user", "content": None}]}, "messages.0", "content"),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "txt": "x"}]}]},
         "messages.0.content.0.text", "required"),
    ],
)  # fmt: skip
def test_what_would_succeed_wrongly_is_refused_by_name(kind, changes, field, says):
    with pytest.raises(ApiError, match=f"(?i){says}") as refused:
        parsed(kind, changes)
    assert (refused.value.status, refused.value.param) == (400, field)


def test_lists_of_labels_and_of_spans_are_read_as_in_a_file():
    spans = [{"text": "Ada; Bo", "type": "who: all"}, {"text": "May", "type": "day"}]
    records = [{"input": "nothing", "target": []}, {"input": "Ada; Bo in May", "target": spans}]
    rows = [parse_row(record, {}, "t", "") for record in records]
    request = parsed(AdapterRequest, {"examples": records})
    assert [example.example().target for example in request.examples] == [row.target for row in rows]
    assert request.kind == rows[1].kind == "ner"
    as_texts = {"kind": "ner", "examples": [{"input": row.input, "target": row.target} for row in rows]}
    assert request == parsed(AdapterRequest, as_texts)  # and so has the same id, and can be kept as text
    topics = parsed(AdapterRequest, {"examples": [{"input": "a", "target": ["x", "y"]}], "kind": "multilabel"})
    assert (topics.kind, topics.examples[0].example().target) == ("multilabel", "x; y")


@pytest.mark.parametrize("body", [b'{"model": "m", "input": "x", "input": "y"}', b'{"model": "m", "input": {"input": "x", "input": "y"}}'])  # fmt: skip  # noqa: E501
def test_a_key_that_stands_twice_is_refused(body):
    with pytest.raises(ApiError, match="input: appears twice") as refused:
        parse(ClassifyRequest, body)
    assert refused.value.code == "duplicate_key"


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (AdapterRequest, {"examples": [{"text": "a", "label": "b"}] * 10_000}, "examples.0.text: unknown field"),
        (ClassifyRequest, {"options": [f"label {n}" for n in range(30_000)]}, None),
        (CompletionRequest, {"metadata": {f"key {n}": "" for n in range(30_000)}}, None),
    ],
)
def test_a_long_body_does_not_hold_up_others(kind, changes, says):
    began = time.perf_counter()
    if says is None:
        parsed(kind, changes)
    else:
        with pytest.raises(ApiError, match=says):
            parsed(kind, changes)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("text", ["\U0001fae8", "\U0001fae9", "\ue000", "\U0005ffff"])
def test_characters_newer_than_python_are_visible(text):
    assert parsed(ClassifyRequest, {"input": text}).inputs == [text]


def test_what_asks_for_nothing_is_taken():
    """What OpenAI's clients and others send along with every request."""
    both = {
        "temperature": None, "top_p": None, "stop": None, "max_tokens": None, "n": 1, "presence_penalty": 0.0,
        "frequency_penalty": 0, "logit_bias": {}, "store": False, "metadata": {"team": "a"}, "service_tier": "auto",
        "user": None, "seed": None, "stream_options": None,
    }  # fmt: skip
    chat = {
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True,
        "functions": None, "function_call": None, "modalities": ["text"], "logprobs": None, "top_logprobs": None,
    }  # fmt: skip
    assert parsed(CompletionRequest, both | {"best_of": 1, "echo": False, "suffix": None}).temperature == 0
    assert parsed(ChatRequest, both | chat).temperature == 0
    assert parsed(AdapterRequest, {"options": None, "steps": None}).steps is None


def test_an_answer_of_openai_s_comes_back_as_a_message():
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
    }
    (_, said, _) = parsed(ChatRequest, {"messages": [USER, answer, USER]}).messages
    assert said.text == ""


def test_fields_that_a_prompt_never_shows_are_known():
    assert unused_fields("{{ premise }} {{ hypothesis }}", ["premise", "hypothesis", "hypotesis"]) == ["hypotesis"]
    assert unused_fields("{% for name, text in parts %}{{ text }}{% endfor %}", ["anything"]) == []
    assert unused_fields("{input}", ["anything"]) == []


def test_the_offsets_of_streamed_tokens_go_on():
    async def pieces():
        for texts in (["ab", "c"], [], ["de"], ["f"]):
            for index in (0, 1):
                yield index, Piece("".join(texts), [TokenScore(text, -1.0, []) for text in texts]), 1

    async def offsets(bodies):
        *events, _ = [event.removeprefix("data: ") async for event in bodies.events(pieces(), with_usage=False)]
        choices = [json.loads(event)["choices"][0] for event in events]
        return [choice["logprobs"]["text_offset"] for choice in choices if choice["index"] == 1]

    async def whole(bodies):
        return bodies.whole([piece async for piece in pieces()])["choices"][1]["logprobs"]["text_offset"]

    asked = parsed(CompletionRequest, {"logprobs": 0})
    assert asyncio.run(offsets(ResponseBodies(asked))) == [[0, 2], [], [3], [5]]
    assert asyncio.run(whole(ResponseBodies(asked))) == [0, 2, 3, 5]


def test_a_client_that_leaves_while_it_sends_is_no_error_of_the_server_s():
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    with pytest.raises(ApiError, match="left") as refused:
        asyncio.run(read_body(Request({"type": "http"}, receive), Limits()))
    assert refused.value.status == 400
