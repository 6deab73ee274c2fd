"""Sentence encoders: models without an output head, whose hidden states are pooled into one vector a text.

A folder, or a Hub's id, is read as sentence-transformers reads it, and a text gets the same vector as there (Reimers
and Gurevych 2019, arXiv 1908.10084). Prototypes of such vectors are all that is answered by: there are no label tokens.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from rayml.errors import ConfigError
from rayml.lm.rows import TokenRow
from rayml.lm.tokens import refuse_unembedded

MARK = "rayml_sentences"
INPUT = "{{ input }}"
"""The prompt unless told otherwise: the text as it is."""
LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How older folders name poolings, in the order in which several are put side by side."""


@dataclass(frozen=True)
class Sentences:
    """How a model's sentences are read and pooled."""

    poolings: tuple[str, ...] = ("mean",)
    """Several give one vector, side by side."""
    is_unit: bool = False
    """Whether vectors are scaled to length 1."""
    prompt: str = ""
    """What the model was trained to find before every text."""
    max_tokens: int | None = None
    """Longest text; None: as the tokenizer says. Longer ones lose their end."""
    lower_case: bool = False


def read_sentences(path: str) -> Sentences | None:
    """Return how a resolved model's sentences are read and pooled; None where it is no sentence encoder.

    It is one if `modules.json` lies beside it, as sentence-transformers writes it, or if its architecture has no output
    head: then the mean is taken, as there.

    Raises:
        ConfigError: it holds modules that are not read here.
    """
    modules = _json(path, "modules.json")
    if modules is None:
        from transformers import AutoConfig  # it takes torch in

        kinds = getattr(AutoConfig.from_pretrained(path), "architectures", None) or []
        headless = [kind for kind in kinds if kind.endswith("Model") and not kind.endswith("HeadModel")]
        return Sentences() if headless else None
    names = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0]["path"]:
        raise ConfigError(
            f"model.name: {path!r} is made of {', '.join(names)}; rayml reads a Transformer in the folder itself, "
            "Pooling, and Normalize"
        )
    pooling = _json(path, f"{modules[1]['path']}/config.json") or {}
    reading = _json(path, "sentence_bert_config.json") or {}
    told = _json(path, "config_sentence_transformers.json") or {}
    prompt = (told.get("prompts") or {}).get(told.get("default_prompt_name") or "") or ""
    if prompt and not pooling.get("include_prompt", True):
        raise ConfigError(f"model.name: {path!r} pools without its prompt, which rayml does not")
    return Sentences(
        poolings_of(pooling),
        names[-1] == "Normalize",
        prompt,
        reading.get("max_seq_length"),
        bool(reading.get("do_lower_case")),
    )


def poolings_of(pooling: dict[str, Any]) -> tuple[str, ...]:
    """Return the poolings that the config of a module `Pooling` names."""
    named = pooling.get("pooling_mode") or [how for key, how in LEGACY.items() if pooling.get(key)] or "mean"
    return (named,) if isinstance(named, str) else tuple(named)


def _json(path: str, name: str) -> Any:
    """Return what a file beside a model holds; None if it is not there."""
    quiet = {f"_raise_exceptions_for_{trouble}": False for trouble in ("missing_entries", "connection_errors")}
    file = cached_file(path, name, **quiet)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else None


def mark_sentences(tokenizer: Any, sentences: Sentences) -> None:
    """Note with a tokenizer that what it reads are sentences: it travels to the workers."""
    tokenizer.init_kwargs[MARK] = asdict(sentences)


def sentences_of(tokenizer: Any) -> Sentences | None:
    told = getattr(tokenizer, "init_kwargs", {}).get(MARK)
    return Sentences(**told) if told else None


def sentence_row(
    tokenizer: Any, sentences: Sentences, text: str, max_tokens: int, keep: Callable[[int], bool] | None = None
) -> TokenRow:
    """Return the row of a text, without a target; a long one loses its end.

    Args:
        keep: whether to keep the token that begins at this character of the text.
    """
    before = sentences.prompt
    text = before + text
    most = min(max_tokens, sentences.max_tokens or tokenizer.model_max_length)
    encoding = tokenizer(
        text.lower() if sentences.lower_case else text, truncation=True, max_length=most, return_offsets_mapping=True
    )
    tokens, offsets = encoding["input_ids"], encoding["offset_mapping"]
    refuse_unembedded(tokenizer, tokens)
    if keep is not None:
        kept = [i for i, (a, b) in enumerate(offsets) if a == b or a < len(before) or keep(a - len(before))]
        tokens = [tokens[i] for i in kept]
    tokens = tokens or [tokenizer.pad_token_id or 0]  # of nothing at all
    return TokenRow(tokens, len(tokens))
