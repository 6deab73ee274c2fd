"""Folders of what was learned, for stock libraries.

In mode adapters `adapter_config.json` and `adapter_model.safetensors`, which PEFT, vLLM and LoRAX load; in mode full a
whole Hugging Face model. Beside a task's lies `rayml.json`: how examples were shown to the model, and the user's own
labels; and `readout.safetensors`, where prototypes are answered by.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import MEANS, is_readout
from rayml.errors import RunError
from rayml.lm.encode import Encoder
from rayml.lm.lora import A, layer_number
from rayml.lm.soft_prompt import PROMPT
from rayml.tasks.task import Example

CARD, WEIGHTS, READOUT = "rayml.json", "adapter_model.safetensors", "readout.safetensors"
PREFIX = "base_model.model."
PROMPT_KEY = "prompt_embeddings"
EMBEDS = "FEATURE_EXTRACTION"
"""PEFT's `task_type` of a sentence encoder; its pooler, which we leave out, may have linears of the names adapted."""


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter needs beside its weights."""

    name: str
    model: str
    """`model.name` of the run."""
    dtype: str
    prompt: str
    max_tokens: int
    labels: dict[str, str] = field(default_factory=dict)
    """What the model sees to the user's own label; empty for free text."""
    lora: dict = field(default_factory=dict)
    soft_tokens: int = 0
    algorithm: str = ""
    """Its name; "" where nothing but label tokens is answered by."""
    shown: list[tuple[str, str]] = field(default_factory=list)
    """Examples that answering needs (`Algorithm.keeps`)."""
    label_loss: str = "options"
    kind: str = ""
    ensemble: list[str] = field(default_factory=list)
    scoring: str = "learned"
    shown_parts: list[list[tuple[str, str]]] = field(default_factory=list)
    """Of each example in `shown`, where its input has parts."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the algorithm."""
    label_tokens: list[int] = field(default_factory=list)
    """The first token of each label, where prototypes are answered by."""
    fields: list[str] | None = None
    """Of its inputs, in their order; none, where they are texts; None, where they differ, or it is not known."""

    def examples(self) -> list[Example]:
        """Return the examples in `shown`."""
        parts = self.shown_parts or [[]] * len(self.shown)
        pairs = zip(self.shown, parts, strict=True)
        return [Example(text, target, tuple((name, part) for name, part in of)) for (text, target), of in pairs]


def encoder_of(card: AdapterCard, tokenizer: Any, max_tokens: int | None = None) -> Encoder:
    """Return how an adapter's task is shown to the model."""
    return Encoder(
        tokenizer,
        card.prompt,
        card.max_tokens if max_tokens is None else max_tokens,
        card.label_loss,
        kind=card.kind,
        ensemble=tuple(card.ensemble),
        scoring=card.scoring,
        soft_tokens=card.soft_tokens,
    )


def write_card(folder: Path, card: AdapterCard) -> None:
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_adapter(
    folder: Path, weights: Params, lora: dict[str, Any], base: str, kind: str | None = "CAUSAL_LM"
) -> None:
    """Write one adapter as a stock PEFT folder: LoRA, `[r, in]` and `[out, r]` each, or prompt tuning, `[P, d]`.

    The prototypes of a task, and what is learned of its readout, lie beside it.

    Args:
        lora: its shape (`AdapterCard.lora`); nothing of a soft prompt.
        base: where `base_model_name_or_path` is to point.
        kind: PEFT's `task_type`.
    """
    from peft import LoraConfig, PeftConfig, PromptTuningConfig  # slow to import, and only needed to write

    folder.mkdir(parents=True, exist_ok=True)
    readout = {name: weight for name, weight in weights.items() if is_readout(name)}
    weights = {name: weight for name, weight in weights.items() if name not in readout}
    common: dict[str, Any] = {"task_type": kind, "base_model_name_or_path": base, "inference_mode": True}
    if not lora:
        tokens, width = weights[PROMPT].shape
        peft: PeftConfig = PromptTuningConfig(num_virtual_tokens=tokens, token_dim=width, **common)
        peft.num_transformer_submodules = 1  # type: ignore[attr-defined]  # PEFT sets it at training
        tensors = {PROMPT_KEY: weights[PROMPT]}
    else:
        is_whole = kind == EMBEDS  # by whole names: a pooler's linears are called as layers' are, and hang on no layer
        layers = sorted({layer_number(name) for name in weights})
        peft = LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            target_modules=sorted({name[: -len(A)] for name in weights if name.endswith(A)})
            if is_whole
            else list(lora["targets"]),
            layers_to_transform=layers if lora["last_layers"] and not is_whole else None,
            lora_dropout=0.0,
            bias="none",
            **common,
        )
        tensors = {f"{PREFIX}{name}.weight": weight for name, weight in weights.items()}
    peft.save_pretrained(str(folder))
    for file, held in ((WEIGHTS, tensors), (READOUT, readout if MEANS in readout else {})):
        whole = {name: weight.detach().cpu().contiguous() for name, weight in held.items()}
        if whole:
            save_file(whole, folder / file, metadata={"format": "pt"})


def peft_logits(module: Any, folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits `[N, L, V]` of tokens `[N, L]` by PEFT, with an adapter's folder; the model stays as it was."""
    from peft import PeftModel

    own = dict(module.named_modules())
    try:
        return PeftModel.from_pretrained(module, str(folder)).eval()(input_ids=tokens).logits
    finally:  # also where it could not be put in whole
        for name, part in own.items():
            parent, _, last = name.rpartition(".")
            if name:
                setattr(own[parent], last, part)
        vars(module).pop("peft_config", None)


def save_model(folder: Path, module: Any, weights: Params, tokenizer: Any) -> None:
    """Write the model with `weights` in it, by its parameters' names, as a Hugging Face folder; it stays as it was."""
    own = {name: module.get_parameter(name) for name in weights}
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = weights[name].to(parameter.data)
        module.save_pretrained(folder)
    finally:
        for name, parameter in own.items():
            parameter.data = before[name]
    tokenizer.save_pretrained(folder)


def load_learned(folder: Path) -> tuple[Params, AdapterCard, str | None]:
    """Return the adapter's weights and card of a folder that `rayml adapt` wrote.

    In mode full there are no weights to put on a base: the third value is then the folder of the model itself.

    Raises:
        RunError: it is not there, or not whole.
    """
    try:
        card = AdapterCard(**json.loads((folder / CARD).read_text(encoding="utf-8")))
        if not card.lora and not card.soft_tokens:
            return {}, card, str(folder)
        tensors = load_file(folder / WEIGHTS)
        if (folder / READOUT).exists():
            tensors |= load_file(folder / READOUT)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{folder}: no adapter that `rayml adapt` wrote: {error}") from error
    return {weight_name(key): tensor.float() for key, tensor in tensors.items()}, card, None


def weight_name(key: str) -> str:
    """Return what rayml calls a tensor that PEFT calls `key`."""
    return PROMPT if key == PROMPT_KEY else key.removeprefix(PREFIX).removesuffix(".weight")
