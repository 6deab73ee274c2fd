"""What a model cannot do is refused before anything starts, by name, and in words that say what to do."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_config
from families import BASE, make_model, tokenizer
from safetensors.torch import load_file, save_file
from serving_run import ask, learn, make_run, request
from serving_run import write as serve_text
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
)

import rayml
from rayml.errors import ConfigError, DataError, RunError
from rayml.lm import trials
from rayml.lm.abilities import check_model, refuse_misbehaving, refuse_tokens, why_unusable
from rayml.lm.chat import chat_prompt, chat_row, chat_text
from rayml.lm.decode import Decoder
from rayml.lm.encode import Encoder
from rayml.lm.generate import prepare_generations, write
from rayml.lm.load import context_tokens, load_base, load_shape, load_tokenizer
from rayml.lm.model import TaskLM
from rayml.lm.sampling import Sampling
from rayml.lm.trials import small_copy, visibility_fault
from rayml.planning.shape import read_shape
from rayml.serving.errors import ApiError
from rayml.serving.replica import Replica
from rayml.serving.served import refuse_unservable
from rayml.serving.settings import Serving
from rayml.tasks.task import Example, Task

LABELLED = [Task("t", (Example("x", "a"), Example("y", "b")), ("a", "b"), "label")]
WRITTEN = [Task("t", (Example("x", "a"), Example("y", "b")), (), "text")]
LORA = {"targets": ["q_proj"], "rank": 2, "alpha": 4.0}


def config_of(tmp_path, model, targets=("q_proj",), **changes):
    tmp_path.mkdir(exist_ok=True)
    return make_config(
        tmp_path, model={"name": str(model), "attention": "auto"}, lora={"targets": list(targets), "rank": 2}, **changes
    )


def edited(folder: Path, file="config.json", **changes):
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(values))
    return folder


def test_a_checkpoint_without_a_head_answers_by_prototypes_alone(tmp_path):
    """Its architecture says that it has none: it is an encoder of sentences."""
    LlamaModel(LlamaConfig(**BASE)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"algorithm.readout: .* without label tokens"):
        check_model(config_of(tmp_path / "run", tmp_path), str(tmp_path), LABELLED, load_tokenizer(str(tmp_path)))


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    """It would be drawn anew at every load."""
    LlamaForSequenceClassification(LlamaConfig(**BASE)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no weights for lm_head.weight of LlamaForCausalLM"):
        load_base(str(tmp_path), "float32")
    config = config_of(tmp_path / "run", tmp_path)
    with pytest.raises(ConfigError, match=r"lm_head.weight"):
        check_model(config, str(tmp_path), LABELLED, load_tokenizer(str(tmp_path)))


def test_an_encoder_decoder_is_refused_by_name(tmp_path):
    T5Config(vocab_size=90, d_model=32, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"t5 at .* is an encoder-decoder"):
        load_shape(str(tmp_path))


def test_a_weight_of_another_shape_is_refused(tmp_path):
    edited(make_model(tmp_path, "llama"), intermediate_size=96)
    with pytest.raises(ConfigError, match=r"mlp.*shape"):
        load_base(str(tmp_path), "float32")


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MORE = {
    "layer": ("llama", {"num_hidden_layers": 3}, {"num_hidden_layers": 2}, r"layers.2.input_layernorm.weight, "),
    "biases": ("llama", {"attention_bias": True}, {"attention_bias": False}, r"layers.0.self_attn.k_proj.bias"),
    "family": ("qwen2", {}, LLAMA, "q_proj.bias"),
    "norms": ("qwen3", {}, LLAMA, "self_attn.k_norm.weight"),
    "head": ("llama", {}, {}, "lm_head.bias"),
}


def with_weights(folder: Path, *names: str):
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: torch.full((32,), torch.nan) for name in names}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("which", MORE)
def test_weights_that_a_model_does_not_take_are_refused(tmp_path, which):
    family, made, changed, said = MORE[which]
    folder = edited(make_model(tmp_path / "base", family, **made), **changed)
    if not changed:
        with_weights(folder, "lm_head.bias")
    with pytest.raises(ConfigError, match=f"weights that .* does not take.*{said}"):
        load_base(str(folder), "float32")
    with pytest.raises(ConfigError, match="does not take"):
        check_model(config_of(tmp_path, folder), str(folder), LABELLED, load_tokenizer(str(folder)))


def test_weights_that_are_no_part_of_a_model_are_left_out(tmp_path):
    others = "score.weight", "vision_tower.layers.0.weight", "mtp.layers.0.weight"
    old = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.bias"
    load_base(str(with_weights(make_model(tmp_path / "a", "llama"), *others, *old)), "float32")
    ahead = make_model(tmp_path / "b", "deepseek_v3", num_nextn_predict_layers=1)
    load_base(str(with_weights(ahead, "model.layers.2.eh_proj.weight")), "float32")
    pooled = make_model(tmp_path / "c", "bert")
    load_base(str(with_weights(pooled, "bert.pooler.dense.weight", "cls.seq_relationship.bias")), "float32")
    LlamaModel(LlamaConfig(**BASE | {"tie_word_embeddings": True})).save_pretrained(tmp_path / "d")
    load_base(str(edited(tmp_path / "d", architectures=["LlamaForCausalLM"])), "float32")


def test_a_base_with_an_adapter_in_its_folder_is_refused(tmp_path):
    folder = make_model(tmp_path, "llama")
    (folder / "adapter_config.json").write_text("{}")
    for load in (load_shape, lambda path: load_base(path, "float32")):
        with pytest.raises(ConfigError, match="holds a PEFT adapter beside the model"):
            load(str(folder))


def test_files_of_weights_that_are_not_whole_are_named(tmp_path):
    folder = make_model(tmp_path / "base", "llama")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content, said in ((whole[:-100], "is not whole"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=f"model.safetensors is .*{said.removeprefix('is ')}"):
            load_base(str(folder), "float32")
        with pytest.raises(ConfigError, match=said):
            check_model(config_of(tmp_path, folder), str(folder), LABELLED, load_tokenizer(str(folder)))


def test_weights_that_are_no_numbers_are_named(tmp_path):
    folder = with_weights(make_model(tmp_path, "llama"), "model.norm.weight")
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM hold NaN or infinity, such as model.norm.weight"):
        refuse_misbehaving(TaskLM(load_base(str(folder), "float32"), None))


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_an_encoder_is_no_causal_model(tmp_path, family):
    folder = edited(make_model(tmp_path, family), architectures=["RobertaForCausalLM"])
    with pytest.raises(ConfigError, match="looks at later tokens, as encoders do"):
        refuse_misbehaving(TaskLM(load_base(str(folder), "float32"), None))
    assert "as encoders do" in why_unusable(str(folder), {}, 0, writes=False)
    with pytest.raises(ConfigError, match="as encoders do"):
        read_shape(config_of(tmp_path / "run", folder, ["query"]))  # `rayml plan` knows it, too


def test_a_masked_model_whose_config_has_no_padding_does_not_see_it(tmp_path):
    folder = edited(make_model(tmp_path, "bert"), pad_token_id=None)
    lm = TaskLM(load_base(str(folder), "float32"), None)
    assert lm.pad == load_tokenizer(str(folder)).pad_token_id
    assert visibility_fault(lm) is None
    lm.pad = 7
    assert "sees padding" in seeing_padding(lm)
    with pytest.raises(ConfigError, match=r"pad_token_id is 9 .* and 2 in its tokenizer"):
        load_base(str(edited(folder, pad_token_id=9)), "float32")


def seeing_padding(lm):
    """As a model would that takes no notice of its attention mask."""
    forward = lm.module.forward
    lm.module.forward = lambda attention_mask=None, **inputs: forward(**inputs)
    return visibility_fault(lm)


def test_eager_attention_is_taken_where_there_is_no_other(tmp_path):
    folder = str(make_model(tmp_path, "bloom"))
    config = config_of(tmp_path / "run", folder, ["dense"])
    for attention in ("auto", "eager"):
        model = config.model.model_copy(update={"attention": attention})
        check_model(config.model_copy(update={"model": model}), folder, WRITTEN, load_tokenizer(folder))
    fused = config.model_copy(update={"model": config.model.model_copy(update={"attention": "sdpa"})})
    with pytest.raises(ConfigError, match=r"no sdpa for .*model.attention=eager"):
        check_model(fused, folder, LABELLED)


def test_adapters_that_peft_takes_otherwise_are_refused(tmp_path):
    folder = str(make_model(tmp_path, "deepseek_v3"))
    with pytest.raises(ConfigError, match=r"another model in PEFT.* on down_proj; leave it out"):
        check_model(config_of(tmp_path / "run", folder, ["o_proj", "down_proj"]), folder, LABELLED)
    check_model(config_of(tmp_path / "run", folder, ["o_proj"]), folder, LABELLED)


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        ("gpt2", ["c_attn"], "c_attn: GPT2LMHeadModel has no linear layers .*Conv1D.*adapter=soft_prompt"),
        ("llama", ["wq"], "wq is no linear layer of LlamaForCausalLM; it has down_proj"),
        ("jamba", ["dt_proj"], "never calls its dt_proj"),
        ("llama4_text", ["router"], "wrong tasks.* on router"),
        ("lfm2", ["q_proj", "w2"], "the last 1 layers of Lfm2ForCausalLM have no q_proj"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(tmp_path, family, targets, said):
    changes = {"layer_types": ["full_attention", "conv"]} if family == "lfm2" else {}
    folder = str(make_model(tmp_path, family, **changes))
    config = config_of(tmp_path / "run", folder, targets)
    if family == "lfm2":
        config = config.model_copy(update={"lora": config.lora.model_copy(update={"last_layers": 1})})
    with pytest.raises(ConfigError, match=said):
        check_model(config, folder, LABELLED)


def test_texts_are_refused_where_a_model_cannot_write_them(tmp_path):
    folder = str(make_model(tmp_path, "rwkv"))
    config = config_of(tmp_path / "run", folder, ["key"])
    check_model(config, folder, LABELLED)
    with pytest.raises(ConfigError, match=r"RwkvForCausalLM cannot write texts here.*use tasks with labels"):
        check_model(config, folder, WRITTEN)


def test_tokens_without_embeddings_are_refused_where_they_are_used():
    words = tokenizer()
    many = len(words)
    refuse_tokens(words, many)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    refuse_tokens(words, many, LABELLED)  # as Gemma 3 has one for images
    shown = [Task("t", (Example("x", "say <|im_start|>"),), (), "text")]
    with pytest.raises(ConfigError, match=r"your tasks, or the chat template, use <\|im_start\|>"):
        refuse_tokens(words, many, shown)
    words.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    dialogue = [Task("t", (Example("x", "y", (("user", "x"), ("assistant", "y"))),), (), "dialogue")]
    with pytest.raises(ConfigError, match="chat template"):
        refuse_tokens(words, many, dialogue)
    words.add_special_tokens({"eos_token": "<|end|>"})
    with pytest.raises(ConfigError, match=r"eos_token '<\|end\|>'; resize"):
        refuse_tokens(words, many)
    with pytest.raises(ConfigError, match="resize the embeddings, or take its own"):
        refuse_tokens(tokenizer(), many - 3)


def test_of_several_chat_templates_the_default_is_taken():
    words, turns = tokenizer(), [("user", "hi"), ("assistant", "yo")]
    one = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    words.chat_template = {"tool_use": "tools", "default": one}
    assert chat_text(words, turns) == "[hi][yo]"
    words.chat_template = {"tool_use": "tools", "rag": "texts"}
    with pytest.raises(DataError, match="tool_use, rag, and none is called default"):
        chat_text(words, turns)
    words.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(DataError, match="chat template refuses"):
        chat_text(words, turns)


def test_the_context_is_what_the_positions_allow(tmp_path):
    assert context_tokens(load_shape(str(make_model(tmp_path / "a", "llama")))) == 512
    assert context_tokens(load_shape(str(make_model(tmp_path / "b", "roberta")))) == 509  # it counts from 3 on
    assert context_tokens(load_shape(str(make_model(tmp_path / "c", "mamba")))) > 10**6
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    scaled = make_model(tmp_path / "d", "llama", rope_parameters=rope)
    assert context_tokens(load_shape(str(scaled))) == 64
    config = config_of(tmp_path / "run", scaled)
    long = config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": 65})})
    with pytest.raises(ConfigError, match="a row may have 65 tokens, the model takes 64"):
        check_model(long, str(scaled), LABELLED)


def test_texts_end_with_the_context(tmp_path):
    folder = str(make_model(tmp_path, "gpt2", n_positions=32))
    lm, words = TaskLM(load_base(folder, "float32"), None), load_tokenizer(folder)
    texts = prepare_generations(lm, words, [[*range(40, 60)], [*range(40, 72)]], None, 30)
    write(lm, texts)
    assert [len(text.tokens) - text.prompt_tokens for text in texts] <= [12, 1]


def test_a_text_that_has_ended_takes_no_part_in_the_others(tmp_path):
    folder = str(make_model(tmp_path, "llama"))
    lm, words = TaskLM(load_base(folder, "float32"), None), load_tokenizer(folder)
    prompts = [[*range(40, 45)], [*range(60, 80)]]
    alone = []
    for prompt in prompts:
        (text,) = prepare_generations(lm, words, [prompt], None, 12)
        write(lm, [text])
        alone.append(text.tokens)
    first = alone[0][6]
    ends = prepare_generations(lm, words, prompts, None, 12)
    ends[0].ends = {first}
    write(lm, ends)
    assert ends[0].tokens == alone[0][: alone[0].index(first, 5)]
    assert ends[1].tokens == alone[1]


def free_text(folder):
    rows = [{"task": f"t{n % 3}", "input": f"in {n}", "target": f"out {n}"} for n in range(60)]
    (folder / "free.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "path": str(folder / "free.jsonl"),
        "splits": {"val": 0.0, "test": 0.0, "test_tasks": ["t2"]},
        "max_tokens": 40,
        "queries": 2,
    }


def test_a_model_with_recurrent_layers_learns_to_write_is_evaluated_and_saved(tmp_path):
    model = {"name": str(make_model(tmp_path / "lfm2", "lfm2"))}
    lora = {"targets": ["q_proj", "w2"], "rank": 2}
    learned = rayml.load(make_run(tmp_path / "run", model=model, lora=lora, data=free_text(tmp_path)))
    found = rayml.evaluate(learned.run.path, episodes=2)
    assert found["episodes"] == 2
    numbers = learned.adapt([("one", "eins"), ("two", "zwei")], name="numbers")
    inputs = ["five", "a longer one", "x"]
    assert numbers.predict(inputs) == [numbers.predict(one) for one in inputs]
    again = rayml.load_adapter(numbers.save(tmp_path / "saved"), model=learned)
    assert again.predict("five") == numbers.predict("five")


def test_what_peft_takes_otherwise_is_not_written_however_little_was_learned(tmp_path):
    """As of a run from before this was looked at."""
    model = {"name": str(make_model(tmp_path / "deepseek", "deepseek_v2"))}
    run = make_run(tmp_path / "run", inner_lr=1e-6, model=model, lora={"targets": ["down_proj"], "rank": 2})
    learned = rayml.load(run)
    with pytest.raises(RunError, match="another model in PEFT"):
        learned.save(tmp_path / "start")
    small = {name: 1e-6 * weight for name, weight in learned.start.items()}
    tiny = learned.adapt([("one", "x"), ("two", "y")], name="t", steps=0)
    with pytest.raises(RunError, match="another model in PEFT"):
        learned.adapter(small, tiny.card).save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_server_of_a_model_that_writes_no_texts_classifies(tmp_path):
    model = {"name": str(make_model(tmp_path / "rwkv", "rwkv")), "attention": "eager"}
    run = make_run(tmp_path / "run", model=model, lora={"targets": ["key"], "rank": 2})
    replica = Replica(Serving(run=str(run.path)))
    (manifest,) = learn(replica, request())
    assert ask(replica, manifest.id, ["charged twice"])[0]["label"] in ("billing", "bug", "delivery")
    with pytest.raises(ApiError, match=r"RwkvForCausalLM cannot write texts here.*ask /v1/classify"):
        serve_text(replica, None, ["x"], Sampling(4))
    refuse_unservable(run, run.trained()[0])
    free = make_run(tmp_path / "free", model=model, lora={"targets": ["key"], "rank": 2}, data=free_text(tmp_path))
    with pytest.raises(ConfigError, match="cannot write texts here"):
        refuse_unservable(free, free.trained()[0])


def test_a_large_model_is_tried_as_a_shallow_copy_with_all_kinds_of_layers(tmp_path, monkeypatch):
    kinds = ["conv"] * 3 + ["full_attention"] + ["conv"] * 4
    folder = str(make_model(tmp_path, "lfm2", layer_types=kinds, num_hidden_layers=8))
    monkeypatch.setattr(trials, "SMALL_PARAMETERS", 20_000)
    module = small_copy(folder, "sdpa")
    assert module.config.num_hidden_layers == 4
    assert visibility_fault(TaskLM(module, None)) is None
    monkeypatch.setattr(trials, "MOST_PARAMETERS", 20_000)
    assert small_copy(folder, "sdpa") is None


def test_a_joined_row_past_a_window_writes_what_transformers_does(tmp_path):
    folder = str(make_model(tmp_path, "mistral"))
    lm, words = TaskLM(load_base(folder, "float32"), None), load_tokenizer(folder)
    prompts = [[*range(20, 43)], [*range(60, 64)], [*range(80, 110)]]
    texts = prepare_generations(lm, words, prompts, None, 12)
    for text in texts:
        text.ends = {-1}
    decoder = Decoder(lm, 3, 1000)
    for text in texts:
        decoder.join([text])
        decoder.step()
    while decoder.active:
        for text in [text for text in decoder.active if text.finish_reason]:
            decoder.leave(text)
        if decoder.active:
            decoder.step()
    for text, prompt in zip(texts, prompts, strict=True):
        made = lm.module.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
        assert text.tokens == made[0].tolist()


PARTS = (
    "{% for m in messages %}{{ m.role | capitalize }}: {% for line in m['content'] %}{% if line['type'] == 'text' %}"
    "{{ line['text'] }}{% endif %}{% endfor %}END{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""As SmolVLM, LLaVA and Idefics have it."""
THINKS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3 has it."""


def learned_text(words, row):
    loss_masked = set(row.loss_masked)
    return words.decode([t for i, t in enumerate(row.tokens) if i >= row.start and i not in loss_masked])


@pytest.mark.parametrize("template", [PARTS, PARTS.replace("END", "")])
def test_a_chat_template_of_content_parts_gets_parts(template):
    words, turns = tokenizer(), [("user", "hi there"), ("assistant", "yo man")]
    words.chat_template = template
    row = chat_row(words, turns, 256)
    end = "END" if "END" in template else ""
    assert words.decode(row.tokens).strip() == f"User: hi there{end}\nAssistant: yo man{end}"
    assert learned_text(words, row).strip() == f"yo man{end}"
    assert words.decode(chat_prompt(words, turns[:1])) == f"User: hi there{end}\nAssistant: "


@pytest.mark.parametrize(("kept", "lost"), [("user", "assistant"), ("assistant", "user")])
def test_a_chat_template_that_leaves_a_turn_out_is_refused(kept, lost):
    words = tokenizer()
    words.chat_template = "{% for m in messages if m.role == 'KEPT' %}{{ m.content }}{% endfor %}".replace("KEPT", kept)
    with pytest.raises(DataError, match=f"leaves out what the {lost} says"):
        chat_row(words, [("user", "hi there"), ("assistant", "yo man")], 256)


def test_an_empty_thought_stands_in_the_prompt_and_is_not_learned():
    words, turns = tokenizer(), [("user", "hi"), ("assistant", "yo")]
    words.chat_template = THINKS
    row = chat_row(words, turns, 256)
    assert learned_text(words, row) == "yo[end]"
    assert Encoder(words, "", 256, kind="dialogue").prompt_tokens(Example("hi", "", turns)) == row.tokens[: row.start]
    # What was thought before an earlier answer may be gone from what asks for the next.
    words.chat_template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    thought = [("user", "hi"), ("assistant", "<think>hm</think>yo"), ("user", "so")]
    assert words.decode(chat_prompt(words, thought)) == "hiyoso"
