"""The real server with vLLM behind it: every request over HTTP, two answerers, one learner."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
import requests
import torch
from rich.console import Console
from serving_process import KEYS, wait_for
from serving_run import TICKETS, change_card, examples, make_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import BESIDE, NEEDED, VllmServer, tiny_for_vllm

import rayml
from rayml.serving.command import publish_adapter
from rayml.tasks.task import format_conversation
from serve.client import ApiError

pytestmark = [NEEDED, pytest.mark.serve]
SWAPPED = [(text, {"billing": "bug", "bug": "billing"}.get(label, label)) for text, label in TICKETS]
WORDS = ["billing", "bug", "bugs and more", "delivery"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return make_run(folder, model={"name": tiny_for_vllm(folder / "base")})


@pytest.fixture(scope="module")
def model(run):
    return rayml.load(run.path)


@pytest.fixture(scope="module")
def server(run):
    server = VllmServer(
        run.path,
        "answerers.min=2",
        "answerers.cpus=1",
        "replicas.cpus=1",
        "answerers.loras=2",
        "answerers.held_loras=3",
        "answerers.cache_bytes=100000000",
        "adapters.cached_bytes=300000",  # some six adapters
        "answerers.tools=hermes",
        "answerers.vllm={structured_outputs_config: {backend: xgrammar, disable_any_whitespace: true}}",
    )
    yield server
    if server.process.poll() is None and server.stop():
        server.process.kill()


@pytest.fixture
def published(server, model, run, tmp_path, monkeypatch):
    """Publishes the tickets' adapter with changes to its card; returns the name and the adapter itself."""
    monkeypatch.setenv("RAYML_API_KEY", KEYS[0])

    def publish(name: str, examples_of=TICKETS, **card):
        model.adapt(examples(examples_of), name=name).save(tmp_path / name)
        change_card(tmp_path / name, **card)
        publish_adapter(tmp_path / name, str(run.path), name, None, Console(quiet=True))
        return f"base:{name}", rayml.load_adapter(tmp_path / name, model=model)

    return publish


@pytest.mark.parametrize(
    ("card", "options"),
    [
        ({}, None),
        ({}, ["bug", "delivery"]),
        ({"labels": {}}, WORDS),
        ({"labels": {}, "scoring": "pmi"}, WORDS),
        ({"ensemble": ["{input} is", "Text: {input}\nWhat:"]}, None),
        ({"labels": {}, "scoring": "channel"}, WORDS),  # the learner answers
    ],
)
def test_probabilities_are_those_of_rayml_predict(server, published, request, card, options):
    name, adapter = published(f"card-{request.node.callspec.indices['card']}", **card)
    texts = ["charged again", "the page is blank", "x"]
    for text, answer in zip(texts, server.client().classify(name, texts, options), strict=True):
        assert answer.probabilities == pytest.approx(adapter.predict(text, options).probabilities, abs=2e-3)


def test_an_adapter_learned_is_asked_at_once_and_a_new_version_is_not_the_old(server, model):
    client = server.client()
    for pairs in (TICKETS, SWAPPED, TICKETS[:4]):  # the same name, and the same prompt in the prefix cache
        learned = client.learn(pairs, name="again")
        began = time.perf_counter()
        (answer,) = client.classify("base:again", ["charged twice " * 12])
        seconds = time.perf_counter() - began
        expected = model.adapt(examples(pairs)).predict("charged twice " * 12).probabilities
        assert answer.probabilities == pytest.approx(expected, abs=2e-3)
        assert client.adapter("again") == learned
        print(f"from the 201 to the answer: {seconds:.2f} s")
        assert seconds < 5  # a second on a machine that is not busy


def test_twenty_adapters_in_flight_are_never_mixed_up(server, model):
    """Adapters make room for others all the time: vLLM holds three of them, the disk six."""
    client = server.client()
    pairs = {n: [(f"red {n}", f"yes-{n}"), (f"blue {n}", f"no-{n}")] for n in range(20)}
    with ThreadPoolExecutor(16) as pool:
        adapters = dict(zip(pairs, pool.map(lambda n: client.learn(pairs[n], name=f"load-{n}"), pairs), strict=True))
        expected = {n: model.adapt(examples(pairs[n])).predict(f"red {n}").probabilities for n in pairs}

        def ask(n: int):
            (answer,) = client.classify(adapters[n].model, [f"red {n}"])
            assert answer.probabilities == pytest.approx(expected[n], abs=2e-3)
            return json.dumps(answer.probabilities)

        def write(_):
            openai_client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0])
            (choice,) = openai_client.completions.create(model="base", prompt="hello", max_tokens=8, logprobs=3).choices
            assert [len(top) for top in choice.logprobs.top_logprobs] == [3] * 8
            return choice.logprobs.token_logprobs

        written = [pool.submit(write, n) for n in range(10)]
        told = set(pool.map(ask, [n % 20 for n in range(200)]))
    assert len({tuple(round(p, 3) for p in json.loads(one).values()) for one in told}) > 10
    for one in written[1:]:
        assert one.result() == pytest.approx(written[0].result(), abs=1e-3)


def test_openai_s_own_client_gets_what_vllm_has(server, model):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0])
    two = client.completions.create(model="base", prompt=["hello", "you"], max_tokens=5, n=2, temperature=1, seed=1)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    penalized = client.completions.create(model="base", prompt="hello", max_tokens=8, frequency_penalty=2)
    plain = client.completions.create(model="base", prompt="hello", max_tokens=8)
    assert penalized.choices[0].text != plain.choices[0].text
    pieces = list(
        client.completions.create(
            model="base", prompt="hello", max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == plain.choices[0].text
    assert pieces[-1].usage.completion_tokens == 8
    asked = [{"role": "user", "content": "hi"}]
    schema = {"type": "object", "properties": {"kind": {"enum": ["bug", "billing"]}}, "required": ["kind"]}
    schema["additionalProperties"] = False  # a random model would write them without end
    chat = client.chat.completions.create(
        model="base",
        messages=asked,
        max_tokens=120,
        response_format={"type": "json_schema", "json_schema": {"name": "kind", "schema": schema}},
    )
    assert json.loads(chat.choices[0].message.content)["kind"] in {"bug", "billing"}
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    choice = {"type": "function", "function": {"name": "look"}}  # by "required" it would call without end
    tokenizer = model.encoder.tokenizer  # the grammar lets white space go on for ever, and so does a random model
    blanks = {str(token): -100 for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()}
    called = client.chat.completions.create(
        model="base", messages=asked, max_tokens=120, tools=[tool], tool_choice=choice, logit_bias=blanks
    )
    assert called.choices[0].message.tool_calls, called
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["kind"] in {"bug", "billing"}
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="base", prompt="x", temperature=9)
    with pytest.raises(openai.UnprocessableEntityError, match="max_tokens"):
        client.completions.create(model="base", prompt="x", max_tokens=10**6)
    with pytest.raises(openai.UnprocessableEntityError, match="texts"):
        client.completions.create(model="base", prompt="x", n=65, temperature=1)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="base", prompt="x " * 9000)
    questions = [{"input": {"context": f"red {n}", "question": "which?"}, "target": f"the {n}th"} for n in range(3)]
    body = {"name": "fields", "kind": "qa", "examples": questions}
    learned = requests.post(f"{server.url}/v1/adapters", json=body, headers={"Authorization": f"Bearer {KEYS[0]}"})
    with pytest.raises(openai.BadRequestError, match="expected the fields context, question, got a text"):
        client.completions.create(model=learned.json()["model"], prompt="x")


def test_an_evaluation_harness_gets_log_probabilities_of_what_it_sends(server, run):
    """What lm-eval's `local-completions` asks: tokens, echoed with their log-probabilities."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0])
    rows, base = [[5, 6, 7, 8], [9, 8, 7]], AutoModelForCausalLM.from_pretrained(run.read_config().model.name)
    found = client.completions.create(model="base", prompt=rows, max_tokens=1, echo=True, logprobs=1, temperature=0)
    for tokens, choice in zip(rows, found.choices, strict=True):
        with torch.no_grad():
            logs = base(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        expected = [float(logs[place, token]) for place, token in enumerate(tokens[1:])]
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1 : len(tokens)] == pytest.approx(expected, abs=2e-3)


HARNESS_TASK = """
task: ten_items
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{input}}}} is"
doc_to_choice: [bug, billing]
doc_to_target: target
metric_list: [{{metric: acc}}]
"""


@pytest.mark.skipif(not (BESIDE / "lm_eval").is_dir(), reason="lm-eval is not there: `make .venv/.vllm`")
def test_lm_eval_itself_scores_ten_items(server, run, tmp_path):
    """The harness over HTTP, beside a plain forward of the same items."""
    base = run.read_config().model.name
    items = [{"input": "x" * count, "target": "bug"} for count in range(1, 11)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "ten.yaml").write_text(HARNESS_TASK.format(data=tmp_path / "items.jsonl"))
    asked = f"model=base,base_url={server.url}/v1/completions,tokenizer={base},num_concurrent=4"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", asked]
    command += ["--tasks", "ten_items", "--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples"]
    env = os.environ | {"PYTHONPATH": str(BESIDE), "OPENAI_API_KEY": KEYS[0], "HF_HOME": str(tmp_path)}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    assert len(found) == len(items)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    for item, one in zip(items, found, strict=True):
        for word, (answer, *_) in zip(("bug", "billing"), one["filtered_resps"], strict=True):
            prompt, whole = (
                tokenizer(text).input_ids for text in (f"{item['input']} is", f"{item['input']} is {word}")
            )
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            expected = sum(float(logs[place - 1, whole[place]]) for place in range(len(prompt), len(whole)))
            assert float(answer) == pytest.approx(expected, abs=1e-2)


def test_an_adapter_writes_as_it_was_trained_to(server, published):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0])
    name, adapter = published("labels")
    asked = [{"role": "user", "content": "charged twice"}]
    chat = client.chat.completions.create(model=name, messages=asked, logprobs=True, top_logprobs=3)
    assert chat.choices[0].message.content == adapter.predict(format_conversation([("user", "charged twice")])).label
    streamed = list(client.chat.completions.create(model=name, messages=asked, stream=True))
    assert streamed[0].choices[0].delta.content == chat.choices[0].message.content
    name, adapter = published("texts", labels={})
    for text in ("charged twice", "x"):
        whole = client.completions.create(model=name, prompt=text, max_tokens=12)
        assert whole.model == name
        assert adapter.predict(text).text.startswith(whole.choices[0].text.strip())
        pieces = client.completions.create(model=name, prompt=text, max_tokens=12, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_a_key_sees_its_own_adapters_alone(server, published):
    name, _ = published("mine")
    other = server.client(KEYS[1])
    for call in (lambda: other.classify(name, ["x"]), lambda: other.complete(name, "x")):
        with pytest.raises(ApiError, match="404"):
            call()
    with pytest.raises(ApiError, match="401"):
        server.client("wrong-key-of-nobody").complete("base", "x")


def test_a_killed_answerer_loses_no_request(server, model):
    client = server.client(tries=1)
    pairs = {n: [(f"red {n}", f"yes-{n}"), (f"blue {n}", f"no-{n}")] for n in range(4)}
    adapters = {n: client.learn(pairs[n], name=f"kill-{n}") for n in pairs}
    expected = {n: client.classify(adapters[n].model, [f"red {n}"])[0].probabilities for n in pairs}
    answerers = server.replicas()
    assert len(answerers) == 2
    engines = [child for one in answerers for child in one.children(recursive=True) if "EngineCor" in child.name()]
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(client.classify, adapters[n % 4].model, [f"red {n % 4}"]) for n in range(200)]
        texts = [pool.submit(client.complete, "base", "hello", max_tokens=30) for _ in range(20)]
        answerers[0].kill()
        for n, one in enumerate(asked):
            assert one.result()[0].probabilities == pytest.approx(expected[n % 4], abs=1e-3)
        assert len({one.result() for one in texts}) == 1
    assert len(engines) == 2
    wait_for(lambda: sum(map(has_ended, engines)) == 1, 30)  # no orphan holds the memory


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
