"""From clients' texts to the rows that the engine scores."""

import dataclasses
from collections.abc import Sequence

from rayml.algorithms.base import Algorithm
from rayml.errors import DataError
from rayml.lm.ask import Kept
from rayml.lm.encode import Encoder
from rayml.serving.adapter_files import Adapter
from rayml.serving.errors import ApiError
from rayml.serving.labels import shown_of
from rayml.serving.work import Query
from rayml.tasks.episodes import relabel
from rayml.tasks.row import unanswered

Given = str | dict[str, str]
"""An input as clients send it: a text, or fields by their names."""
LONGEST_TOKEN = 64
"""Characters of a token, at most: what stands before that many times the tokens that are read is not tokenized."""
Ways = list[tuple[float, Query]]
"""The ways in which one input is asked about, each with its weight (`Encoder.questions`)."""
Cut = list[tuple[Ways, bool]]
"""The ways of each input, and whether the beginning of its text was cut."""


def option_queries(
    encoder: Encoder,
    loaded: Adapter | None,
    algorithm: Algorithm,
    inputs: Sequence[Given],
    labels: list[str],
    context: int,
    truncate: bool,
) -> Cut:
    """Return the queries of each input, with a row for each label.

    Raises:
        ApiError: 400, a text is too long, and not to be truncated; 422, a label that cannot be scored.
    """
    shown = shown_of(loaded) if algorithm.keeps == "prompt" else []
    most = min(encoder.max_tokens * (len(shown) + 1) + encoder.soft_tokens, context)
    queries = []
    for place, given in enumerate(inputs):
        try:
            (row,) = unlimited(encoder).option_rows([unanswered(given)], [max(labels, key=len)], shown)[0]
            is_long = len(row.tokens) > most
            if is_long and not truncate:
                raise too_long(place, len(row.tokens), most)
            ways = encoder.questions([unanswered(ending(given, LONGEST_TOKEN * most))], labels, shown)
        except DataError as error:
            message = f"options: one of them has no token, or is too long beside input.{place}"
            if str(error).startswith("template"):
                raise ApiError(422, f"input.{place}: {error}", f"input.{place}") from None
            raise ApiError(422, message, "options") from None
        longest = max(len(row.tokens) for _, (rows,) in ways for row in rows)
        if longest > context:
            raise too_long(place, longest, context)
        weights = loaded.weights if loaded else None
        queries.append(([(share, Query(rows, weights, algorithm)) for share, (rows,) in ways], is_long))
    return queries


def kept_queries(
    encoder: Encoder, loaded: Adapter, kept: Kept, inputs: Sequence[Given], labels: list[str], truncate: bool
) -> Cut:
    """Return a query for each input, to be answered by the hidden states of a support; raises as `option_queries`."""
    known = list(loaded.card.labels)
    places = [known.index(label) for label in labels]
    queries = []
    for place, given in enumerate(inputs):
        example = relabel(unanswered(given), known[0])
        tokens = len(unlimited(encoder).row(example, is_label=True).tokens)
        is_long = tokens > encoder.max_tokens + encoder.soft_tokens
        if is_long and not truncate:
            raise too_long(place, tokens, encoder.max_tokens)
        (rows,) = encoder.option_rows([example], labels if loaded.algorithm.by_tokens else known[:1])
        query = Query(rows, loaded.weights, loaded.algorithm, kept, places)
        queries.append(([(1.0, query)], is_long))
    return queries


def ending(given: Given, most: int) -> Given:
    """Return an input without what stands before its last `most` characters, in each of its fields."""
    return given[-most:] if isinstance(given, str) else {name: text[-most:] for name, text in given.items()}


def support_of(encoder: Encoder, loaded: Adapter) -> Kept:
    """Return the examples that an adapter keeps, with the class of each."""
    shown, known = shown_of(loaded), list(loaded.card.labels)
    return Kept(encoder.rows(shown, is_label=True), [known.index(example.target) for example in shown])


def too_long(place: int, tokens: int, most: int) -> ApiError:
    message = f"input.{place}: has {tokens} tokens; {most} are read. Shorten it, or say truncate"
    return ApiError(400, message, f"input.{place}", "context_length_exceeded")


def unlimited(encoder: Encoder) -> Encoder:
    return dataclasses.replace(encoder, max_tokens=1 << 30)
