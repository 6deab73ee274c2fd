"""What a model can do: the one place where it is refused, by name and before anything starts, what it cannot.

`train`, `compare`, `sweep`, `plan`, `evaluate`, `adapt`, `export`, `publish`, `predict` and `serve` all ask here. What a
config.json does not tell, `rayml.lm.trials` tries.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rayml.errors import ConfigError
from rayml.lm.load import check_weights, load_shape
from rayml.lm.lora import A, B, find_linears
from rayml.lm.parameters import trained_parameters
from rayml.lm.precision import has_sdpa
from rayml.lm.soft_prompt import PROMPT
from rayml.lm.trials import fault
from rayml.meta.learner import initial_log_rates
from rayml.tasks.task import Task

if TYPE_CHECKING:
    from rayml.config import Config

NO_LIMIT = 1 << 30
"""Tokens of a model that states none."""
SPECIAL = "bos_token", "eos_token", "pad_token", "mask_token", "cls_token", "sep_token", "unk_token"


def check_model(config: "Config", base: str, tasks: Sequence[Task] = (), tokenizer: Any = None) -> None:
    """Raise ConfigError if a resolved model cannot do what a config asks for, with these tasks.

    Args:
        tokenizer: of the model; its tokens are looked at where it is given.
    """
    bare = load_shape(base)
    names = learned_names(bare, config)
    if not initial_log_rates(dict.fromkeys(names, torch.empty(0)), 1.0, config.inner.modules, per_weight=False):
        raise ConfigError(
            f"inner.modules: {', '.join(config.inner.modules)} matches nothing learned, such as {names[0]}"
        )
    refuse_long_rows(config, bare, tasks)
    if tokenizer is not None:
        refuse_tokens(tokenizer, bare.get_input_embeddings().num_embeddings, tasks)
    config.algorithm.check(tasks)
    check_weights(base)
    lora = config.lora.shape() if config.mode == "adapters" and config.adapter == "lora" else {}
    writes = any(not task.options for task in tasks)
    refuse_unable(base, config.model.attention, lora, config.soft_tokens, writes)


def refuse_unable(base: str, attention: str, lora: dict[str, Any], soft_tokens: int, writes: bool) -> None:
    """Raise ConfigError if a model, with adapters of a shape, was tried and does otherwise than rayml relies on.

    Args:
        attention: `model.attention`.
        lora: the adapters' shape; nothing where there are none.
        writes: whether it is to write texts.
    """
    fused = has_sdpa(base)
    if attention == "sdpa" and not fused:
        raise ConfigError(f"model.attention: transformers has no sdpa for {base!r}; use model.attention=eager, or auto")
    attention = ("sdpa" if fused else "eager") if attention == "auto" else attention
    targets = tuple(lora.get("targets", ()))
    found = fault(base, attention, targets, lora.get("rank", 1), lora.get("alpha", 1.0), soft_tokens, writes)
    if found:
        raise ConfigError(found)


def learned_names(bare: Any, config: "Config") -> list[str]:
    """Return the names of what a config learns of a model.

    Raises:
        ConfigError: the model has no such part.
    """
    if config.mode == "full":
        return list(trained_parameters(bare, config.full))
    if config.soft_tokens:
        return [PROMPT]
    linears = find_linears(bare, config.lora.targets, config.lora.last_layers)
    return [name + part for name in linears for part in (A, B)]


def refuse_long_rows(config: "Config", bare: Any, tasks: Sequence[Task]) -> None:
    longest = config.data.max_tokens + config.soft_tokens
    if config.algorithm.keeps == "prompt":
        shown = max((min(config.data.ways, len(task.options) or 1) for task in tasks), default=1) * config.data.shots
        longest *= shown + 1
    most = context_tokens(bare)
    if longest > most:
        raise ConfigError(
            f"data.max_tokens: a row may have {longest} tokens, the model takes {most}; lower it or shots"
        )


def context_tokens(model: Any) -> int:
    """Return the longest text that a model takes, on the meta device or any other; NO_LIMIT where it states none."""
    config = model.config.get_text_config()
    stated = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if one.get("rope_type") in ("dynamic", "longrope"):
            # Beyond it positions hang on the longest row of a batch: its neighbours would change a text.
            stated.append(one.get("original_max_position_embeddings"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rsplit(".", 1)[-1]:
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # as RoBERTa counts
            stated.append(module.num_embeddings - unused)
    return min((most for most in stated if most), default=NO_LIMIT)


def refuse_tokens(tokenizer: Any, embeddings: int, tasks: Sequence[Task] = ()) -> None:
    """Raise ConfigError if a tokenizer gives tokens that a model has no embeddings for, where they would be read."""
    beyond = {token for token, number in tokenizer.get_vocab().items() if number >= embeddings}
    special = [f"{name} {getattr(tokenizer, name)!r}" for name in SPECIAL if getattr(tokenizer, name) in beyond]
    own = beyond - tokenizer.get_added_vocab().keys()
    said = f"model.name: the tokenizer has tokens that the model has no embeddings for ({embeddings} there are)"
    if special or own:
        raise ConfigError(f"{said}: {', '.join([*special, *sorted(own)][:4])}; resize the embeddings, or take its own")
    texts = [f"{e.input}{e.target}{''.join(text for _, text in e.parts)}" for task in tasks for e in task.examples]
    if any(task.kind == "dialogue" for task in tasks):
        texts.append(str(tokenizer.chat_template or ""))
    used = sorted(token for token in beyond if any(token in text for text in texts))
    if used:
        raise ConfigError(f"{said}, and your tasks, or the chat template, use {', '.join(used[:4])}")
