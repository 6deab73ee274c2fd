"""From clients' texts to what the engine is asked: too long ones are refused, or cut where that was asked for."""

import dataclasses
from collections.abc import Sequence

from rayml.adapter import Adapter
from rayml.errors import DataError
from rayml.lm.encode import Encoder
from rayml.lm.queries import Query
from rayml.serving.errors import ApiError
from rayml.tasks.episodes import relabel
from rayml.tasks.row import unanswered
from rayml.tasks.templates import names, unseen

Given = str | dict[str, str]
"""An input as clients send it: a text, or fields by their names."""
LONGEST_TOKEN = 64
"""Characters of a token, at most: what stands before that many times the tokens that are read is not tokenized."""
Cut = list[tuple[Query, bool]]
"""What is asked about each input (`Adapter.query`), and whether the beginning of its text was cut."""


def queries_of(adapter: Adapter, inputs: Sequence[Given], labels: list[str], context: int, truncate: bool) -> Cut:
    """Return what is asked about each input.

    Args:
        context: tokens of all that is asked about one input, which is read in one piece.

    Raises:
        ApiError: 400, a text is too long, and not to be truncated; 422, a label that cannot be scored.
    """
    encoder = adapter.encoder
    shown = adapter.shown if adapter.algorithm.keeps == "prompt" else []
    most = min(encoder.max_tokens * (len(shown) + 1) + encoder.soft_tokens, context)
    found = []
    for number, given in enumerate(inputs):
        refuse_unseen(encoder.prompt, given, f"input.{number}")
        try:
            fields = adapter.card.fields
            like = relabel(unanswered(given, fields), max(labels, key=len))
            tokens = len(unlimited(encoder).row(like, is_label=True, shown=shown).tokens)
            is_long = tokens > most
            if is_long and not truncate:
                raise too_long(number, tokens, most)
            query = adapter.query(unanswered(ending(given, LONGEST_TOKEN * most), fields), labels)
        except DataError as error:
            if str(error).startswith(("template", "an input")):
                raise ApiError(422, f"input.{number}: {error}", f"input.{number}") from None
            message = f"options: one of them has no token, or is too long beside input.{number}"
            raise ApiError(422, message, "options") from None
        read = sum(len(tree.tokens) for option_query in query.option_queries for tree in option_query.trees)
        if read > context:
            raise too_long(number, read, context)
        found.append((query, is_long))
    return found


def refuse_unseen(prompt: str, given: object, field: str) -> None:
    """Raise ApiError if an input has fields that an adapter's prompt never shows."""
    unknown = unseen(prompt, given) if isinstance(given, dict) else []
    if unknown:
        known = ", ".join(sorted(names(prompt)))
        raise ApiError(422, f"{field}: the adapter reads no {unknown[0][:60]!r}; it reads {known}", field)


def ending(given: Given, most: int) -> Given:
    """Return an input without what stands before its last `most` characters, in each of its fields."""
    return given[-most:] if isinstance(given, str) else {name: text[-most:] for name, text in given.items()}


def too_long(number: int, tokens: int, most: int) -> ApiError:
    message = f"input.{number}: has {tokens} tokens; {most} are read. Shorten it, or say truncate"
    return ApiError(400, message, f"input.{number}", "context_length_exceeded")


def unlimited(encoder: Encoder) -> Encoder:
    return dataclasses.replace(encoder, max_tokens=1 << 30)
