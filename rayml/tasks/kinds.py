"""Kinds of tasks: how each is shown to the model by default, what its targets are, and how it is scored.

A kind is a prompt template, a way to write targets as text, and metrics; everything else is the same for all kinds. The
loss depends on one thing only: targets with `options` compete with each other, all others are free text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

KindName = Literal["label", "pair", "relation", "multilabel", "ner", "qa", "translation", "summary", "dialogue", "text"]
NAMES: tuple[str, ...] = get_args(KindName)
SEPARATOR = "; "
NOTHING = "none"
"""An empty list of labels or spans, as text."""
NO_RELATION = "no_relation", "none", "other", "na"
"""Labels for the absence of a relation. A relation task's F1 leaves them out (as in TACRED, Zhang et al. 2017)."""
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
    """A Jinja template of the text before the target; "" for `data.prompt`."""
    metrics: tuple[str, ...]
    """From `rayml.experiments.metrics`; the first one is the main metric."""


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


def infer_kind(fields: Sequence[str], target: Any, verdict: bool = False) -> str:
    """Return the kind that a row's fields and target imply; "" for a plain label or text.

    Args:
        verdict: the target is true or false: a label of what is asked (as in BoolQ), and no text to write.
    """
    if isinstance(target, list):
        return "ner" if any(isinstance(item, dict) for item in target) else "multilabel"
    names = set(fields)
    if {"head", "tail"} <= names:
        return "relation"
    if "question" in names and not verdict:
        return "qa"
    return "pair" if len(names) == 2 else ""


def format_target(items: Sequence[Any]) -> str:
    r"""Return a list of labels, or of spans `{"text", "type"}`, as the text that the model is to write.

    Separators within a label or span are escaped by a backslash.

    >>> format_target([{"text": "Berlin", "type": "place"}, {"text": "Ada", "type": "person"}])
    'place: Berlin; person: Ada'
    >>> format_target(["tools; hardware", "cars"])
    'tools\\; hardware; cars'
    """
    texts = [
        f"{_escape(item['type'], ':')}: {_escape(item['text'])}" if is_span(item) else _escape(item) for item in items
    ]
    return "\\" + NOTHING if texts == [NOTHING] else SEPARATOR.join(texts) or NOTHING


def parse_target(kind: str, text: str) -> list[Any] | None:
    """Return the list that `format_target` wrote, or a model did; None if targets of this kind are no lists.

    >>> parse_target("ner", "place: Berlin; person: Ada")
    [{'text': 'Berlin', 'type': 'place'}, {'text': 'Ada', 'type': 'person'}]
    """
    if kind == "ner":
        return [{"text": span, "type": span_type} for span_type, span in parse_spans(text)]
    return parse_labels(text) if kind == "multilabel" else None


def is_span(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("text"), str) and isinstance(item.get("type"), str)


def _escape(text: str, mark: str = "") -> str:
    return re.sub(rf"[\\;{mark}]", r"\\\g<0>", text.strip())


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text.strip(), flags=re.DOTALL)


def _split(text: str) -> list[str]:
    items = [item.strip() for item in re.findall(r"(?:\\.|[^\\;]|\\\Z)+", text, flags=re.DOTALL)]
    return [] if items == [NOTHING] else [item for item in items if item]


def parse_labels(text: str) -> list[str]:
    """Return the labels in a text from `format_target`, or from a model."""
    return [_unescape(item) for item in _split(text)]


def parse_spans(text: str) -> list[tuple[str, str]]:
    """Return the (type, text) of the spans in a text from `format_target`, or from a model."""
    matches = [re.match(r"((?:\\.|[^\\:])+):(.+)", item, flags=re.DOTALL) for item in _split(text)]
    pairs = [(_unescape(match[1]), _unescape(match[2])) for match in matches if match]
    return [(span_type, span_text) for span_type, span_text in pairs if span_type and span_text]
