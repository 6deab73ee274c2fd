"""Kinds of tasks: how each is shown to the model unless told otherwise, what its targets are, and what it is scored by.

A kind is a template, a way to write targets as text, and metrics; everything else is the same for all. Which loss is
taken depends on one thing alone: targets that are chosen among (`options`) compete with each other, others are free
text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

KindName = Literal["label", "pair", "relation", "multilabel", "ner", "qa", "translation", "summary", "dialogue", "text"]
NAMES: tuple[str, ...] = get_args(KindName)
SEPARATOR = "; "
NOTHING = "none"
"""What a list of labels or spans is written as when it is empty."""
NO_RELATION = "no_relation", "none", "other", "na"
"""Relations that are none: they do not count in a relation task's F1 (as in TACRED, Zhang et al. 2017)."""
PART_LINES = (
    "{% if parts %}{% for name, text in parts %}{{ name }}: {{ text }}\n{% endfor %}{% else %}{{ input }}\n{% endif %}"
)
CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""For models without a chat template of their own."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How tasks of one kind are shown and scored."""

    prompt: str
    """Jinja, what stands before the target; empty: `data.prompt`."""
    metrics: tuple[str, ...]
    """Of `rayml.experiments.metrics`; the first decides."""


LABELS = "accuracy", "macro_f1"
KINDS = {
    "label": Kind("", LABELS),
    "pair": Kind(PART_LINES + "Label:", LABELS),
    "relation": Kind("{{ text }}\nRelation of {{ head }} to {{ tail }}:", (*LABELS, "relation_f1")),
    "multilabel": Kind("{{ input }}\nLabels:", ("micro_f1", "macro_f1", "exact_match")),
    "ner": Kind("{{ input }}\nEntities:", ("span_f1", "span_precision", "span_recall")),
    "qa": Kind(
        "{% if context is defined %}{{ context }}\n{% endif %}"
        "Question: {% if question is defined %}{{ question }}{% else %}{{ input }}{% endif %}\nAnswer:",
        ("token_f1", "exact_match"),
    ),
    "translation": Kind("{{ input }}\nTranslation:", ("chrf", "bleu")),
    "summary": Kind("{{ input }}\nSummary:", ("rouge_l", "rouge_1", "rouge_2")),
    "dialogue": Kind("", ("chrf", "token_f1")),
    "text": Kind("", ("chrf", "exact_match", "token_f1", "rouge_l")),
}


def kind_of(fields: Sequence[str], target: Any) -> str:
    """Return the kind that a row's fields and target tell; "" where it is a plain label or text."""
    names = set(fields)
    if isinstance(target, list):
        return "ner" if any(isinstance(one, dict) for one in target) else "multilabel"
    if {"head", "tail"} <= names:
        return "relation"
    if "question" in names:
        return "qa"
    return "pair" if len(names) == 2 else ""


def written(target: Sequence[Any]) -> str:
    r"""Return a list of labels, or of spans `{"text", "type"}`, as the model is to write it.

    What marks ends in it is written behind a backslash in a label or span that has it.

    >>> written([{"text": "Berlin", "type": "place"}, {"text": "Ada", "type": "person"}])
    'place: Berlin; person: Ada'
    >>> written(["tools; hardware", "cars"])
    'tools\\; hardware; cars'
    """
    texts = [
        f"{_escaped(one['type'], ':')}: {_escaped(one['text'])}" if is_span(one) else _escaped(one) for one in target
    ]
    return "\\" + NOTHING if texts == [NOTHING] else SEPARATOR.join(texts) or NOTHING


def is_span(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("text"), str) and isinstance(one.get("type"), str)


def _escaped(text: str, mark: str = "") -> str:
    return re.sub(rf"[\\;{mark}]", r"\\\g<0>", text.strip())


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text.strip(), flags=re.DOTALL)


def _apart(text: str) -> list[str]:
    found = [part.strip() for part in re.findall(r"(?:\\.|[^\\;]|\\\Z)+", text, flags=re.DOTALL)]
    return [] if found == [NOTHING] else [part for part in found if part]


def listed(text: str) -> list[str]:
    """Return the labels in a text that `written` made, or that a model wrote."""
    return [_plain(part) for part in _apart(text)]


def spans(text: str) -> list[tuple[str, str]]:
    """Return the (type, text) of the spans in a text that `written` made, or that a model wrote."""
    pairs = [re.match(r"((?:\\.|[^\\:])+):(.+)", part, flags=re.DOTALL) for part in _apart(text)]
    found = [(_plain(pair[1]), _plain(pair[2])) for pair in pairs if pair]
    return [(kind, span) for kind, span in found if kind and span]
