"""The plan against closed forms for three Llamas, and the command."""

import json
import math

import pytest
import torch
import yaml
from transformers import GPT2Config, LlamaConfig
from typer.testing import CliRunner

from rayml.cli import app
from rayml.config import Config, parse_config
from rayml.errors import ConfigError
from rayml.planning.memory import plan_memory
from rayml.planning.plan import smallest_change, with_overrides
from rayml.planning.shape import read_shape
from rayml.planning.step import largest_pass, tokens_per_step

# hidden, layers, intermediate, heads, key heads, tied, parameters
LLAMAS = {
    "1B": (2048, 16, 8192, 32, 8, True, 1_235_814_400),
    "8B": (4096, 32, 14336, 32, 8, False, 8_030_261_248),
    "70B": (8192, 80, 28672, 64, 8, False, 70_553_706_496),
}
VOCABULARY = 128256


def write_llama(folder, name: str) -> str:
    """Write a config.json and nothing else."""
    hidden, layers, intermediate, heads, key_heads, tied, _ = LLAMAS[name]
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
    ).save_pretrained(folder / name)
    return str(folder / name)


def plan_config(model: str, *overrides: str) -> Config:
    """4 ways, 2 shots, 3 queries of 64 tokens; 8 tasks; r = 16 on the four default targets."""
    values = {
        "model": {"name": model, "dtype": "bfloat16"},
        "data": {"path": "none.jsonl", "ways": 4, "shots": 2, "queries": 3, "max_tokens": 64},
        "run": {"dir": "none"},
        "lora": {"rank": 16},
        "tasks_per_step": 8,
    }
    return parse_config(values, "test", overrides)


def device(plan) -> dict[str, int]:
    return {part.name: part.device_bytes for part in plan.parts}


def host(plan) -> dict[str, int]:
    return {part.name: part.host_bytes for part in plan.parts if part.host_bytes}


@pytest.fixture(autouse=True)
def one_thread():
    """Small products: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """The shapes of each Llama: by name, for adapters and for mode full."""
    folder = tmp_path_factory.mktemp("llamas")
    found = {}
    for name in LLAMAS:
        path = write_llama(folder, name)
        found[name] = path, {mode: read_shape(plan_config(path, f"mode={mode}")) for mode in ("adapters", "full")}
    return found


@pytest.mark.parametrize("name", LLAMAS)
def test_adapters_match_the_closed_forms(llamas, name):
    path, shapes = llamas[name]
    hidden, layers, wide, heads, key_heads, tied, parameters = LLAMAS[name]
    keys = hidden * key_heads // heads
    assert shapes["adapters"].parameters == parameters
    adapter = 16 * layers * ((hidden + hidden) + (hidden + keys) + (hidden + hidden) + (wide + hidden))
    whole = plan_config(path)
    plan = plan_memory(shapes["adapters"], whole)
    tokens = 8 * 12 * 64  # tasks, query rows, tokens a row
    # bf16 twice, fp32 four bytes: norms, q and attention's output, k and v, log-sum-exp, MLP, inputs of v and down
    layer = tokens * (2 * hidden * 4 + 2 * (2 * hidden + 2 * keys + 3 * wide + hidden + wide) + heads * 4)
    working = tokens * max(2 * wide * 2, 5 * hidden * 4)
    # The last norm's input counts where the first layer's, which needs no gradient, does not.
    activations = layers * layer + working
    logits = 8 * 12 * VOCABULARY * (3 * 4 + 2)
    expected = {
        "parameters": 2 * parameters + 4 * adapter,
        "gathered layers": 0,
        "gradients": 8 * 4 * adapter,
        "optimizer": 2 * 4 * adapter,
        "fast weights": 2 * 8 * 4 * adapter,
        "meta-gradient": 4 * adapter,
        "activations": activations,
        "logits": logits,
    }
    assert device(plan) == expected | {"allowance": sum(expected.values()) // 10}
    assert plan.host_bytes == 0

    sharded = plan_memory(shapes["adapters"], with_overrides(whole, ["engine=zero", "workers=4"]))
    norms = (2 * layers + 1) * hidden
    base = math.ceil((parameters - norms) / 4) + norms
    biggest = (
        2 * VOCABULARY * hidden // 2 + (parameters - norms - (2 - tied) * VOCABULARY * hidden) // layers + 2 * hidden
    )
    assert device(sharded)["parameters"] == 2 * base + 4 * adapter
    assert device(sharded)["gathered layers"] == 2 * min(parameters, max(10**9, biggest))
    assert device(sharded)["gradients"] == 2 * 4 * adapter  # two tasks a worker
    assert device(sharded)["meta-gradient"] == 2 * 4 * adapter  # and the flat copy that is sent


@pytest.mark.parametrize("name", LLAMAS)
def test_mode_full_matches_the_closed_forms(llamas, name):
    path, shapes = llamas[name]
    hidden, layers, wide, heads, key_heads, _, parameters = LLAMAS[name]
    keys = hidden * key_heads // heads
    shape = shapes["full"]
    assert shape.trained == parameters
    local = plan_memory(shape, plan_config(path, "mode=full", "model.dtype=float32"))
    rows = 12  # one task at a time
    inputs = 2 * hidden + wide  # of q, k, v; of gate and up; of down: o_proj's is attention's output
    layer = rows * 64 * 4 * (4 * hidden + 2 * hidden + 2 * keys + heads + 3 * wide + inputs)
    expected = {
        "parameters": 8 * parameters,  # the model, and what is learned of it
        "gathered layers": 0,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "fast weights": 8 * parameters,
        "meta-gradient": 4 * parameters,
        "activations": layers * layer + rows * 64 * 4 * (hidden + max(2 * wide, 5 * hidden)),
        "logits": rows * VOCABULARY * 3 * 4,
    }
    assert device(local) == expected | {"allowance": sum(expected.values()) // 10}

    zero = ["mode=full", "engine=zero", "workers=8"]
    shard = math.ceil(parameters / 8)
    for stage in (1, 2, 3):
        plan = plan_memory(shape, plan_config(path, *zero, f"zero.stage={stage}"))
        found = device(plan)
        assert found["optimizer"] + found["fast weights"] + found["meta-gradient"] == 20 * shard
        assert found["gradients"] == 2 * (parameters if stage == 1 else shard)
        assert found["reduce bucket"] == 4 * 50_000_000
        norms = (2 * layers + 1) * hidden
        whole = 2 * (parameters if stage < 3 else math.ceil((parameters - norms) / 8) + norms)
        assert found["parameters"] == whole
        assert found["logits"] == 2 * VOCABULARY * 14  # 12 rows over 8 workers: 2 each
        away = plan_memory(shape, plan_config(path, *zero, f"zero.stage={stage}", "zero.offload=optimizer"))
        assert sum(host(away).values()) == 20 * shard
        assert device(away)["parameters"] == whole
        assert away.device_bytes == pytest.approx(plan.device_bytes - 1.1 * 20 * shard, rel=1e-6)
    all_away = plan_memory(shape, plan_config(path, *zero, "zero.offload=all"))
    assert host(all_away)["parameters"] == whole
    assert device(all_away)["parameters"] == 0


def test_mode_full_trains_what_the_config_leaves(llamas):
    path, _ = llamas["1B"]
    hidden, wide, keys = 2048, 8192, 512
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * wide + 2 * hidden

    def trained(*overrides):
        shape = read_shape(plan_config(path, "mode=full", *overrides))
        return shape.trained, shape.first_layer

    assert trained("full.embeddings=false") == (16 * layer + hidden, 0)
    assert trained("full.embeddings=false", "full.last_layers=3") == (3 * layer + hidden, 13)
    assert trained("full.last_layers=3") == (3 * layer + hidden + VOCABULARY * hidden, 0)  # the head is tied
    assert trained("full.freeze='*.mlp.*'") == (16 * (layer - 3 * hidden * wide) + hidden + VOCABULARY * hidden, 0)
    untied, _ = llamas["8B"]
    shape = read_shape(plan_config(untied, "mode=full", "full.last_layers=1"))
    assert shape.trained < 2 * VOCABULARY * 4096  # the head, but not the embeddings
    assert shape.first_layer == 31
    with pytest.raises(ConfigError, match="nothing is left to train"):
        trained("full.freeze='*'")


def test_algorithms_differ_in_what_they_keep_and_read(llamas):
    path, shapes = llamas["1B"]

    def at(*overrides):
        config = plan_config(path, *overrides)
        return device(plan_memory(shapes["adapters"], config)), tokens_per_step(config), largest_pass(config, 1)

    plain, tokens, batch = at()
    assert tokens == 8 * 64 * (3 * 8 + 12)
    assert (batch.rows, batch.row_tokens) == (8 * 12, 64)
    rates, _, _ = at("algorithm.name=meta_sgd")
    assert rates["optimizer"] == 5 * plain["optimizer"] / 2
    assert rates["meta-gradient"] == 2 * plain["meta-gradient"]
    eager, _, _ = at("model.attention=eager")
    exact, _, _ = at("model.attention=eager", "algorithm.name=maml", "inner.steps=2")
    assert exact["activations"] == 6 * eager["activations"]
    assert at("algorithm.name=multitask")[0]["fast weights"] == 0
    _, tokens, batch = at("algorithm.name=metaicl")
    assert (batch.rows, batch.row_tokens, tokens) == (8 * 12, 9 * 64, 8 * 12 * 9 * 64)
    assert at("algorithm.name=protonet")[2].rows == 8 * 20
    joined = plan_config(path, "mode=full", "algorithm.name=multitask", "engine=zero", "workers=8")
    assert largest_pass(joined, 1).rows == 3  # of 20, over 8 workers
    assert at("algorithm.name=reptile")[1] == 8 * 64 * (8 + 12 + 8)


def test_the_smallest_change_that_fits(llamas):
    path, shapes = llamas["8B"]
    zero = plan_config(path, "mode=full", "engine=zero", "workers=8", "zero.stage=1")

    def change(shape, config, gib):
        return smallest_change(shape, config, 1, int(gib * 2**30))

    assert change(shapes["full"], zero, 50) == ["zero.stage=2"]
    assert change(shapes["full"], zero, 24) == ["zero.stage=2", "zero.offload=optimizer"]
    adapters = plan_config(path, "engine=zero", "workers=8", "data.max_tokens=256")
    assert change(shapes["adapters"], adapters, 10) == ["model.activation_checkpointing=true"]
    more = change(shapes["adapters"], plan_config(path, "data.max_tokens=512"), 12)
    assert "engine=zero" in more
    assert any(part.startswith("workers=") for part in more)
    fitting = with_overrides(plan_config(path, "data.max_tokens=512"), more)
    assert plan_memory(shapes["adapters"], fitting).fits(12 * 2**30)
    assert change(shapes["adapters"], adapters, 0.1) is None


@pytest.fixture
def run_plan(tmp_path):
    """Run the command on the 1B Llama's config.json, which lies alone in its folder."""
    path = tmp_path / "run.yaml"
    config = plan_config(write_llama(tmp_path, "1B"), "device=cpu")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return lambda *arguments: CliRunner().invoke(app, ["plan", str(path), *arguments])


def test_the_command_prints_a_bar_for_each_part_and_a_verdict(run_plan):
    found = run_plan("--gpu-gib", "80")
    assert found.exit_code == 0, found.output
    for part in (
        "parameters",
        "fast weights",
        "activations",
        "logits",
        "allowance (10%)",
        "with activation checkpoint",
    ):
        assert part in found.output
    assert "█" in found.output
    assert "an outer step: 8 episodes, 18,432 tokens" in found.output
    refused = run_plan("--gpu-gib", "8")
    assert refused.exit_code == 1
    assert "this would fit: tasks_at_once=4\n" in refused.output  # of 8
    without = run_plan()
    assert without.exit_code == 0
    assert "no GPU here to compare with" in without.output


def test_the_command_gives_json_in_bytes(run_plan):
    found = json.loads(run_plan("--json", "--gpu-gib", "80", "workers=4").stdout)
    assert found["model"]["parameters"] == 1_235_814_400
    assert found["device_bytes"] == sum(part["device_bytes"] for part in found["parts"])
    assert found["fits"] is True
    assert [row["overrides"] for row in found["shardings"] if row["is_config"]] == [["engine=local"]]


def test_soft_prompts_are_planned(run_plan):
    """It was refused by `min() arg is an empty sequence`: the first layer has no adapter to begin at."""
    found = run_plan("adapter=soft_prompt", "soft_prompt.tokens=8")
    assert found.exit_code == 0, found.output
    assert "16,384 an adapter" in " ".join(found.output.split())  # a long path breaks the line


def test_other_models_are_estimated_and_unknown_ones_refused(tmp_path):
    GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100).save_pretrained(tmp_path / "gpt2")
    shape = read_shape(plan_config(str(tmp_path / "gpt2"), "mode=full"))
    assert (shape.intermediate, shape.key_width, shape.is_measured) == (256, 64, False)
    with pytest.raises(ConfigError, match=r"lora\.targets: down_proj"):
        read_shape(plan_config(str(tmp_path / "gpt2")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no config of a model"):
        read_shape(plan_config(str(tmp_path / "empty")))
