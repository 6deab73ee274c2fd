"""Answering by vLLM, as far as no vLLM is needed: what it is told, what it is not asked, and how options are scored."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import make_config
from ray.exceptions import ActorDiedError
from serving_process import wait_for
from serving_run import change_card, examples, make_run, manifest_of

from rayml import load, load_adapter
from rayml.errors import ConfigError
from rayml.lm.catalog import resolve_model
from rayml.lm.load import load_shape
from rayml.serving import answering
from rayml.serving.app import resources
from rayml.serving.command import with_cpus
from rayml.serving.errors import ApiError
from rayml.serving.served import adapter_constraints
from rayml.serving.settings import Adapters, Serving
from rayml.serving.store import AdapterStore
from rayml.serving.vllm import engine, scoring
from rayml.serving.vllm.answerer import Answerer
from rayml.serving.vllm.engine import engine_args, lora_rank, refuse_without_vllm, with_gpus
from rayml.serving.vllm.mixing import with_top_tokens, without_base_rows
from rayml.serving.vllm.scoring import option_log_probs
from rayml.serving.vllm.versions import Versions
from rayml.tasks.row import query_example


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "words"
    load(run).adapt(examples(), name="words").save(folder)
    return folder


def vllm(**answerers) -> Serving:
    return Serving(run="r", engine="vllm", answerers=answerers)


def test_two_gpus_are_one_each_and_one_is_shared():
    one, two = with_gpus(vllm(), 1), with_gpus(vllm(), 2)
    assert (two.replicas.gpus, two.answerers.gpus) == (1.0, 1.0)
    assert one.replicas.gpus + one.answerers.gpus < 1
    assert resources(one.answerers)["num_gpus"] == one.answerers.gpus
    assert with_gpus(vllm(min=2), 2).answerers.gpus < 1
    assert with_gpus(vllm(gpus=4), 5).answerers.gpus == 4
    assert with_gpus(vllm(), 0).answerers.gpus is None


def test_the_plan_s_figures_reach_vllm(run):
    config = run.read_config()

    def args(on_gpu=True, gpus=1, **answerers):
        return engine_args(with_gpus(vllm(**answerers), gpus), config, "base", ["q_proj"], "bfloat16", 512, on_gpu)

    shared = args()
    assert shared["gpu_memory_utilization"] == with_gpus(vllm(), 1).answerers.gpus
    assert args(gpus=2)["gpu_memory_utilization"] == 0.9
    assert args(memory_share=0.4)["gpu_memory_utilization"] == 0.4
    assert args(gpus=2)["tensor_parallel_size"] == 1
    assert engine_args(vllm(gpus=4), config, "b", [], "float32", 512, True)["tensor_parallel_size"] == 4
    assert shared["kv_cache_memory_bytes"] is None
    assert args(on_gpu=False, gpus=0)["kv_cache_memory_bytes"] == 1 << 30
    assert args(cache_bytes=7)["kv_cache_memory_bytes"] == 7
    assert (shared["max_loras"], shared["max_cpu_loras"], shared["max_lora_rank"]) == (16, 256, 8)
    assert args(loras=300)["max_cpu_loras"] == 300
    assert args(vllm={"quantization": "fp8"})["quantization"] == "fp8"


def test_the_rank_is_the_run_s_rounded_up(run):
    config = run.read_config()  # rank 4
    assert lora_rank(config, vllm().answerers) == 8
    assert lora_rank(config, vllm(lora_rank=17).answerers) == 32
    with pytest.raises(ConfigError, match="512"):
        lora_rank(config, vllm(lora_rank=600).answerers)


def test_learners_and_answerers_share_the_processors():
    shared = with_cpus(vllm(min=2), 8)
    assert (shared.replicas.cpus, shared.answerers.cpus) == (2, 2)
    assert with_cpus(vllm(cpus=5), 8).answerers.cpus == 5
    assert with_cpus(Serving(run="r"), 8).replicas.cpus == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": "soft_prompt"}, "soft prompts.*engine=local"),
        ({"model": {"name": "tiny-masked"}}, "masked tokens.*engine=local"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_with_what_to_do(tmp_path, changes, said):
    config = make_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=said):
        refuse_without_vllm(config, resolve_model(config.model.name))


def test_without_vllm_the_error_names_the_command(run, monkeypatch):
    monkeypatch.setattr(engine, "vllm_version", lambda: "")
    with pytest.raises(ConfigError, match=r"pip install 'vllm>=0.29,<0.30'"):
        refuse_without_vllm(run.read_config(), resolve_model("tiny"))


MANY = [f"{a}{b}" for a in "abcdefghijklmnop" for b in "qrstuvwxyz"]
WORDS = ["billing", "bug", "bugs and more", "delivery"]


@pytest.mark.parametrize(
    ("card", "options"),
    [
        ({}, None),  # the adapter's letters
        ({"labels": {}}, WORDS),  # several tokens, alike at first; and one the beginning of another
        ({"labels": {}}, MANY),
        ({"labels": {}, "label_loss": "vocabulary"}, WORDS),
        ({"labels": {}, "scoring": "sum"}, WORDS),
        ({"labels": {}, "scoring": "pmi"}, WORDS[1:]),
        ({"ensemble": ["{input} is", "Text: {input}\nWhat:"]}, None),
    ],
)
def test_single_tokens_log_probabilities_give_what_predict_does(adapter, tmp_path, monkeypatch, card, options):
    monkeypatch.setattr(scoring, "MOST_TOKENS", 5)
    folder = shutil.copytree(adapter, tmp_path / "a")
    change_card(folder, **card)
    learned = load_adapter(folder)
    asked: list[int] = []

    async def ask(prompt, tokens):
        asked.append(len(tokens))
        row = torch.tensor([prompt])
        position = torch.tensor([len(prompt) - 1])
        weights = {name: weight.unsqueeze(0) for name, weight in learned.weights.items()}
        with torch.no_grad():
            logits = learned.lm.logits_at(position, weights, row)
        logs = logits[0].float().log_softmax(-1)
        return {token: float(logs[token]) for token in tokens}

    query = learned.query(query_example("charged"), list(learned.choices(options).values()))
    found = asyncio.run(option_log_probs(ask, query.prompts)).exp().tolist()
    assert found == pytest.approx(list(learned.predict("charged", options).probabilities.values()), abs=1e-4)
    assert max(asked) <= 5


def test_top_tokens_are_named_where_others_name_theirs():
    @dataclass
    class Asked:
        logprob_token_ids: dict | None
        max_num_logprobs: int | None

    logits = torch.tensor([[0.0, 3, 2, 1], [5, 4, 3, 0]])
    assert with_top_tokens(logits, Asked({1: [3]}, 2)).logprob_token_ids == {0: [1, 2], 1: [3]}
    for alone in (Asked(None, 2), Asked({1: [3]}, None)):
        assert with_top_tokens(logits, alone) is alone


def test_rows_of_the_base_get_nothing_of_the_last_adapter():
    def shrink(inputs, weights, buffer, indices, scaling):  # as vLLM's own
        buffer[:] = scaling * torch.einsum("bi,boi->bo", inputs, weights[indices])

    inputs, weights, buffer = torch.ones(3, 4), torch.arange(16.0).reshape(2, 2, 4), torch.zeros(3, 2)
    without_base_rows(shrink)(inputs, weights, buffer, torch.tensor([1, -1, 0]), 0.5)
    assert buffer.tolist() == [[19, 27], [0, 0], [3, 11]]


def test_what_is_being_asked_is_never_deleted(run, adapter, tmp_path):
    """Thirty requests at a time to twelve adapters, with room for two, while vLLM is slow to forget one."""
    store = AdapterStore(str(tmp_path / "store"))
    ids = [store.publish("me", manifest_of(f"a{n}", n), adapter).id for n in range(12)]
    config, base = run.read_config(), resolve_model("tiny")
    observed: list[str] = []
    learned, copies = load_adapter(adapter), tmp_path / "copies"

    async def drop(version):
        assert version.folder.exists()
        await asyncio.sleep(0.01)

    async def all_at_once():
        fits = adapter_constraints(config, base, load_shape(base), Adapters())
        size = sum(file.stat().st_size for file in adapter.iterdir())
        versions = Versions(
            store, fits, lambda card: learned, copies, 2 * size, drop, lambda name, _: observed.append(name)
        )
        names = set()

        async def ask(n):
            async with versions.use("me", ids[n % 12]) as version:
                for _ in range(5):
                    assert (version.folder / "adapter_config.json").exists()
                    await asyncio.sleep(0.002)
                names.add(version.name)

        for _ in range(3):
            await asyncio.gather(*map(ask, range(30)))
        for n in range(12):
            await ask(n)
        await asyncio.sleep(0.2)
        assert len(names) == 12  # the same content has the same name, however often it is loaded
        assert len(list(copies.iterdir())) <= 2

    asyncio.run(asyncio.wait_for(all_at_once(), 60))
    assert observed.count("evictions") > 9


@pytest.mark.parametrize(
    ("kind", "changes", "status", "says"),
    [
        ("completions", {"prompt": ""}, 400, "prompt: is empty"),
        ("completions", {"prompt": ["x", " "]}, 400, "prompt: is empty"),
        ("chat", {"messages": [{"role": "user", "content": " "}]}, 400, "messages: is empty"),
        ("completions", {"prompt": []}, 422, "prompt: 0 given"),
        ("completions", {"prompt": ["x"] * 65}, 422, "prompt: 65 given"),
    ],
)
def test_an_adapter_with_labels_is_asked_within_the_limits_by_vllm_too(kind, changes, status, says):
    async def respond():
        return [
            item async for item in answerer._write_labels(kind, json.dumps({"model": "m"} | changes).encode(), None)
        ]

    answerer = object.__new__(Answerer)
    answerer.serving = vllm()
    with pytest.raises(ApiError, match=says) as refused:
        asyncio.run(respond())
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("completions", {}, {"max_tokens": 64}),
        ("completions", {"max_tokens": None}, {"max_tokens": 64}),
        ("completions", {"max_tokens": 7}, {"max_tokens": 7}),
        ("chat", {}, {}),
    ],
)
def test_a_completion_has_by_default_as_many_tokens_as_without_vllm(monkeypatch, kind, given, expected):
    async def respond(kind, fields, version):
        return json.dumps(fields)

    async def text():
        return [item async for item in answerer._respond(kind, json.dumps(given).encode(), None)]

    monkeypatch.setitem(sys.modules, "rayml.serving.vllm.protocol", SimpleNamespace(is_tokens=None))
    answerer = object.__new__(Answerer)
    answerer.serving, answerer.protocol = vllm(), SimpleNamespace(respond=respond)
    assert [json.loads(item) for item in asyncio.run(text())] == [expected]


def test_a_lost_request_is_sent_again_and_a_refused_one_is_not(monkeypatch):
    monkeypatch.setattr(answering, "PAUSE_SECONDS", 0)
    told: list[int] = []

    def ask(error, seconds):
        async def once():
            told.append(1)
            if len(told) < 4:
                raise error
            return "answer"

        told.clear()
        return asyncio.run(answering.AnswererClient(None, seconds)._until_answered(once))

    lost = ActorDiedError()
    assert ask(lost, 60) == "answer"
    assert ask(ApiError(503, "the engine was lost", code=answering.LOST), 60) == "answer"
    with pytest.raises(ApiError, match="send the request again"):
        ask(lost, 0)
    with pytest.raises(ApiError, match="too long"):
        ask(ApiError(400, "too long"), 60)
    assert len(told) == 1


CHILD = "from rayml.serving.vllm.parent import end_with_answerer as end; import time; end(); time.sleep(60)"
PARENT = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=os.environ | {{"RAYML_ANSWERER": str(os.getpid())}})
print(child.pid, flush=True)
time.sleep(60)
"""


def test_the_engine_s_process_ends_with_the_replica_that_was_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as replica:
        engine_process = psutil.Process(int(replica.stdout.readline()))
        time.sleep(1)
        assert engine_process.is_running()
        replica.kill()
    wait_for(lambda: not engine_process.is_running() or engine_process.status() == psutil.STATUS_ZOMBIE, 20)
