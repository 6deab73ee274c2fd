"""Sentence encoders: models without an output head, whose hidden states are pooled into one vector for each text.

A folder, or a Hugging Face id, is read as sentence-transformers reads it, and texts get the same vectors (Reimers and
Gurevych 2019, arXiv 1908.10084). Answers come from prototypes of such vectors alone, since there are no label tokens.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from rayml.errors import ConfigError
from rayml.lm.catalog import base_config
from rayml.lm.rows import TokenRow
from rayml.lm.tokens import refuse_unembedded

SENTENCES_KEY = "rayml_sentences"
INPUT = "{{ input }}"
"""The default prompt: the text itself."""
LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The poolings of older folders, in the order in which several are concatenated."""


@dataclass(frozen=True)
class Sentences:
    """How a model's sentences are read and pooled."""

    poolings: tuple[str, ...] = ("mean",)
    """The vectors of several are concatenated."""
    is_unit: bool = False
    """Whether vectors are scaled to length 1."""
    prompt: str = ""
    """The text that the model was trained to see before every text."""
    max_tokens: int | None = None
    """Longer texts lose their end; None is the tokenizer's limit, or the model's context if that is shorter."""
    lower_case: bool = False


def read_sentences(path: str) -> Sentences | None:
    """Return how a resolved model's sentences are read and pooled; None if it is no sentence encoder.

    It is one if it comes with the `modules.json` of sentence-transformers, or if its architecture has no output head,
    in which case the mean is taken, as in sentence-transformers.

    Raises:
        ConfigError: it has modules that are not supported; or as `base_config`.
    """
    modules = _read_json(path, "modules.json")
    if modules is None:
        architectures = getattr(base_config(path), "architectures", None) or []
        headless = [name for name in architectures if name.endswith("Model") and not name.endswith("HeadModel")]
        return Sentences() if headless else None
    names = [str(module.get("type")).rsplit(".", 1)[-1] for module in modules]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0].get("path"):
        raise ConfigError(
            f"model.name: {path!r} is made of {', '.join(names)}; rayml reads a Transformer in the folder itself, "
            "Pooling, and Normalize"
        )
    pooling = _read_json(path, f"{modules[1]['path']}/config.json") or {}
    text_settings = _read_json(path, "sentence_bert_config.json") or {}
    settings = _read_json(path, "config_sentence_transformers.json") or {}
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name") or "") or ""
    if prompt and not pooling.get("include_prompt", True):
        raise ConfigError(f"model.name: {path!r} pools without its prompt, which rayml does not")
    return Sentences(
        poolings_of(pooling),
        names[-1] == "Normalize",
        prompt,
        text_settings.get("max_seq_length"),
        bool(text_settings.get("do_lower_case")),
    )


def poolings_of(pooling: dict[str, Any]) -> tuple[str, ...]:
    """Return the poolings in the config of a `Pooling` module."""
    modes = pooling.get("pooling_mode") or [mode for key, mode in LEGACY.items() if pooling.get(key)] or "mean"
    return (modes,) if isinstance(modes, str) else tuple(modes)


def _read_json(path: str, name: str) -> Any:
    """Return the content of a JSON file beside a model; None if there is no such file."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(path, name, **quiet)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else None


def mark_sentences(tokenizer: Any, sentences: Sentences) -> None:
    """Mark the tokenizer of a sentence encoder; unlike the model, it travels to all workers."""
    tokenizer.init_kwargs[SENTENCES_KEY] = asdict(sentences)


def sentences_of(tokenizer: Any) -> Sentences | None:
    """Return how a sentence encoder's texts are read, by its tokenizer; None for a language model's."""
    settings = getattr(tokenizer, "init_kwargs", {}).get(SENTENCES_KEY)
    return Sentences(**settings) if settings else None


def sentence_row(
    tokenizer: Any, sentences: Sentences, text: str, max_tokens: int, keep: Callable[[int], bool] | None = None
) -> TokenRow:
    """Return the row of a text, without a target; a long text loses its end.

    Args:
        keep: tells whether to keep the token that begins at a character of the text; None keeps all.
    """
    prompt = len(sentences.prompt)
    text = sentences.prompt + text
    limit = min(max_tokens, sentences.max_tokens or tokenizer.model_max_length)
    # The tokenizer's own truncation is a state of it: threads with other limits would cut each other's texts.
    encoding = tokenizer(text.lower() if sentences.lower_case else text, return_offsets_mapping=True, verbose=False)
    tokens, offsets = encoding["input_ids"], encoding["offset_mapping"]
    excess, ending = len(tokens) - limit, takewhile(lambda span: span[0] == span[1], reversed(offsets))
    if excess > 0:
        end = len(tokens) - sum(1 for _ in ending)  # what ends every text, such as [SEP], stays
        del tokens[end - excess : end], offsets[end - excess : end]
    refuse_unembedded(tokenizer, tokens)
    if keep is not None:
        spans = zip(tokens, offsets, strict=True)
        # Tokens of no width, such as [CLS], and those of the prompt stay.
        tokens = [token for token, (a, b) in spans if a == b or a < prompt or keep(a - prompt)]
    tokens = tokens or [tokenizer.pad_token_id or 0]  # an empty text
    return TokenRow(tokens, len(tokens))
