"""Check what a model can do, and refuse by name, before anything starts, what it cannot.

`train`, `compare`, `sweep`, `plan`, `evaluate`, `adapt`, `export`, `predict` and `serve` check here and nowhere else.
What a config.json does not tell, `rayml.lm.trials` tries out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rayml.algorithms.inner_loop import Params
from rayml.algorithms.outer_loop import initial_log_inner_lrs
from rayml.algorithms.prototypes import is_readout
from rayml.errors import ConfigError, RunError
from rayml.lm.catalog import resolve_model
from rayml.lm.check_tasks import check_tasks
from rayml.lm.load import check_weights, context_tokens, load_shape, load_tokenizer
from rayml.lm.lora import A, B, find_linears
from rayml.lm.model import TaskLM
from rayml.lm.parameters import trained_parameters
from rayml.lm.precision import has_sdpa
from rayml.lm.rows import predicts_masks
from rayml.lm.sentence import SENTENCES_KEY, read_sentences
from rayml.lm.soft_prompt import PROMPT
from rayml.lm.trials import (
    exports_to_peft,
    find_fault,
    fitting_targets,
    matches_peft,
    nonfinite_weights,
    visibility_fault,
)
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.config import Config
    from rayml.lm.encode import Encoder

CAUSAL_SPECIALS = ("bos_token", "eos_token")
MASKED_SPECIALS = ("pad_token", "mask_token", "cls_token", "sep_token")
"""Special tokens that occur in the rows of causal and of masked models."""
NOT_SHARDED = {"recurrent_gemma", "rwkv"}
"""Model types whose code fails with sharded weights: tests/test_families.py tries all types over two workers."""


def checked_model(config: "Config", tasks: Sequence[Task]) -> tuple[str, "Encoder"]:
    """Return where a config's model is loaded from, and its encoder, after checking that it can learn these tasks.

    Raises:
        ConfigError, DataError: it cannot, or the tasks do not suit it.
    """
    base = resolve_model(config.model.name)
    encoder = config.encoder(load_tokenizer(base))
    check_tasks(encoder, tasks)
    check_model(config, base, tasks, encoder.tokenizer)
    return base, encoder


def check_model(config: "Config", base: str, tasks: Sequence[Task] = (), tokenizer: Any = None) -> None:
    """Raise ConfigError if a resolved model cannot do what a config asks for, with these tasks.

    Args:
        tokenizer: of the model. None checks neither tokens nor weights: a plan needs the config.json alone.
    """
    shape = load_shape(base)
    if hasattr(shape, SENTENCES_KEY):
        refuse_label_tokens(config)
    model_type = shape.config.model_type
    if config.engine == "zero" and model_type in NOT_SHARDED:
        raise ConfigError(f"engine: {model_type} computes different results with sharded weights; use engine=local")
    names = learned_names(shape, config)
    if not initial_log_inner_lrs(dict.fromkeys(names, torch.empty(0)), 1.0, config.inner.modules, per_weight=False):
        raise ConfigError(
            f"inner.modules: {', '.join(config.inner.modules)} matches nothing learned, such as {names[0]}"
        )
    refuse_long_rows(config, shape, tasks)
    if tokenizer is not None:
        refuse_tokens(tokenizer, shape.get_input_embeddings().num_embeddings, tasks)
        check_weights(base)
    config.algorithm.check(tasks)
    refuse_unable(base, config, writes=any(not task.options for task in tasks))


def refuse_unable(base: str, config: "Config", writes: bool) -> None:
    """Raise ConfigError if a trial shows that a model with a config's adapters does not do what rayml relies on.

    Args:
        writes: whether the model has to write texts.
    """
    lora = config.lora.shape() if config.mode == "adapters" and config.adapter == "lora" else {}
    if reason := why_unusable(base, lora, config.soft_tokens, writes, config.model.attention):
        raise ConfigError(reason)


def refuse_without_text(config: "Config", tasks: Sequence[Task]) -> None:
    """Raise ConfigError if some tasks have free text as targets, and a config's model cannot write it."""
    if any(not task.options for task in tasks):
        base = resolve_model(config.model.name)
        if reason := why_unusable(base, {}, config.soft_tokens, writes=True, attention=config.model.attention):
            raise ConfigError(reason)


def why_unusable(
    base: str, lora: dict[str, Any], soft_tokens: int, writes: bool, attention: str = "auto"
) -> str | None:
    """Return why a model with such adapters cannot be used, or None.

    Args:
        lora: the adapters' shape; empty without LoRA.
        attention: `model.attention`.
    """
    if read_sentences(base):
        refusal = f"model.name: {base!r} is a sentence encoder, and writes no text; use tasks with labels"
        return refusal if writes else None
    if attention == "sdpa" and not has_sdpa(base):
        return f"model.attention: transformers has no sdpa for {base!r}; use model.attention=eager, or auto"
    targets, rank, alpha = tuple(lora.get("targets", ())), lora.get("rank", 1), lora.get("alpha", 1.0)
    return find_fault(base, trial_attention(base, attention), targets, rank, alpha, soft_tokens, writes)


def trial_attention(base: str, attention: str) -> str:
    """Return the attention that a small copy is tried with."""
    return ("sdpa" if has_sdpa(base) else "eager") if attention == "auto" else attention


def working_targets(base: str, config: "Config") -> list[str]:
    """Return those of a config's LoRA targets that work in a model, in rayml and in PEFT alike.

    Raises:
        ConfigError: none works; the message says why.
    """
    lora, attention = config.lora.shape(), config.model.attention
    reason = why_unusable(base, lora, 0, writes=False, attention=attention)
    if not reason:
        return lora["targets"]
    targets = fitting_targets(base, trial_attention(base, attention), lora["targets"], lora["rank"], lora["alpha"])
    if not targets or targets == lora["targets"]:
        raise ConfigError(reason)
    return targets


def learned_names(shape: Any, config: "Config") -> list[str]:
    """Return the names of the tensors that a config trains.

    Args:
        shape: the model on the meta device.

    Raises:
        ConfigError: the model has no such part.
    """
    if config.mode == "full":
        return list(trained_parameters(shape, config.full))
    if config.soft_tokens:
        return [PROMPT]
    linears = find_linears(shape, config.lora.targets, config.lora.last_layers)
    return [name + part for name in linears for part in (A, B)]


def refuse_label_tokens(config: "Config") -> None:
    """Raise ConfigError if a sentence encoder's config needs label tokens or an output head."""
    if config.algorithm.readout != "prototypes":
        raise ConfigError(
            f"algorithm.readout: {config.model.name} is a sentence encoder, without label tokens; use "
            "algorithm.readout=prototypes"
        )
    if config.mode == "full" or config.adapter != "lora":
        raise ConfigError(
            f"mode, adapter: {config.model.name} is a sentence encoder, and has mode=adapters adapter=lora"
        )


def refuse_long_rows(config: "Config", shape: Any, tasks: Sequence[Task]) -> None:
    """Raise ConfigError if rows may be longer than the model's context."""
    longest = config.data.max_tokens + config.soft_tokens
    algorithm = config.algorithm
    ways = [min(config.data.ways, len(t.options) or 1) for t in tasks if algorithm.shows_examples(bool(t.options))]
    longest *= max(ways, default=0) * config.data.shots + 1
    context = context_tokens(shape)
    if longest > context and not hasattr(shape, SENTENCES_KEY):  # a sentence encoder's texts are cut to its context
        raise ConfigError(
            f"data.max_tokens: a row may have {longest} tokens, the model takes {context}; lower it or shots"
        )


def refuse_tokens(tokenizer: Any, embeddings: int, tasks: Sequence[Task] = ()) -> None:
    """Raise ConfigError if tokens that rows may hold have no embeddings.

    Args:
        embeddings: how many the model has.
    """
    missing = {token for token, number in tokenizer.get_vocab().items() if number >= embeddings}
    names = MASKED_SPECIALS if predicts_masks(tokenizer) else CAUSAL_SPECIALS
    special = [f"{name} {token!r}" for name in names if (token := getattr(tokenizer, name)) in missing]
    words = sorted(missing - tokenizer.get_added_vocab().keys())
    problem = f"model.name: the tokenizer has tokens that the model has no embeddings for (it has {embeddings})"
    if special or words:
        raise ConfigError(f"{problem}: {', '.join([*special, *words][:4])}; resize the embeddings, or take its own")
    texts = [f"{e.input}{e.target}{''.join(text for _, text in e.parts)}" for task in tasks for e in task.examples]
    if any(task.kind == "dialogue" for task in tasks):
        texts.append(str(tokenizer.chat_template or ""))
    used = sorted(token for token in missing if any(token in text for text in texts))
    if used:
        raise ConfigError(f"{problem}, and your tasks, or the chat template, use {', '.join(used[:4])}")


def refuse_misbehaving(lm: TaskLM) -> None:
    """Raise ConfigError if a model that was just loaded sees later tokens, or padding, or has weights of NaN."""
    if lm.sentences:  # it looks both ways by design, with a mask over padding
        if reason := nonfinite_weights(lm.module):
            raise ConfigError(f"model.name: {reason}")
        return
    with torch.no_grad():
        if reason := visibility_fault(lm):
            raise ConfigError(reason)


def refuse_peft_mismatch(folder: Path, lm: TaskLM, weights: Params, lora: dict[str, Any], base: str) -> None:
    """Raise RunError if PEFT, with the adapter written to a folder, does not compute the same as these weights.

    A short inner loop may leave the weights too small to tell, so random ones are tried, too.
    """
    if not lm.adapter or lm.sentences:
        return
    weights = {name: weight for name, weight in weights.items() if not is_readout(name)}
    if not (matches_peft(lm, weights, folder) and exports_to_peft(lm, base, lora, weights)):
        raise RunError(
            f"{type(lm.module).__name__} with this adapter is another model in PEFT, so it is not written; see "
            "lora.targets, or keep it by `rayml serve`"
        )
