"""Classification, apart from running the model: from clients' inputs and labels to queries, from scores to answers."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rayml.adapter import Adapter, most_probable
from rayml.errors import ConfigError, DataError
from rayml.lm.encode import Encoder
from rayml.lm.generate import choose, new_generator
from rayml.lm.queries import Query
from rayml.lm.sampling import Piece, Sampling, TokenScore
from rayml.serving.answers import IndexedPiece
from rayml.serving.errors import ApiError
from rayml.tasks.episodes import relabel
from rayml.tasks.row import Input, query_example
from rayml.tasks.templates import template_variables, unused_fields

Given = str | dict[str, str]
"""An input as clients send it: a text, or fields by name."""
LONGEST_TOKEN = 64
"""Upper bound on the characters of a token. An input of many more characters than the model can read is cut before it
is tokenized."""


def label_options(adapter: Adapter, options: Sequence[str] | None) -> dict[str, str]:
    """Return what the model sees of each option, by the client's own label.

    Raises:
        ApiError: 422, there are no options, or one that the adapter did not learn.
    """
    if not adapter.labels and len(options or ()) < 2:
        raise ApiError(422, "options: this model has no labels of its own; give two or more", "options")
    try:
        return adapter.choices(options)
    except ConfigError as error:
        raise ApiError(422, str(error), "options") from None


def build_queries(
    adapter: Adapter, inputs: Sequence[Given], labels: list[str], context: int, truncate: bool
) -> list[tuple[Query, bool]]:
    """Return the query for each input, and whether the beginning of the input was cut off.

    Args:
        labels: as the model sees them.
        context: the most tokens that an input may have with all its options, since they are read in one piece.

    Raises:
        ApiError: 400, an input is too long, and not to be truncated; 422, a label that cannot be scored.
    """
    encoder = adapter.encoder
    shown = adapter.shown if adapter.algorithm.shows_examples(bool(adapter.labels)) else []
    most_tokens = min(encoder.max_tokens * (len(shown) + 1) + encoder.soft_tokens, context)
    queries = []
    for number, given in enumerate(inputs):
        refuse_unseen_fields(encoder.prompt, given, f"input.{number}")
        try:
            fields = adapter.card.fields
            example = query_example(last_characters(given, LONGEST_TOKEN * most_tokens), fields)
            query = adapter.query(example, labels)
            whole = relabel(query_example(given, fields), labels[0])
            prompts = (encoder.prompt, *encoder.ensemble) if len(query.prompts) > 1 else (encoder.prompt,)
            encoders = [dataclasses.replace(without_limit(encoder), prompt=prompt) for prompt in prompts]
            prompt_tokens = max(e.row(whole, is_label=True, shown=shown).start for e in encoders)
            tokens = prompt_tokens + max(len(row.tokens) - row.start for row in query.option_queries[0].rows)
            is_too_long = tokens > most_tokens
            if is_too_long and not truncate:
                raise too_long_error(number, tokens, most_tokens)
            while truncate and (excess := query.tokens - context) > 0:
                fewer = math.ceil(excess / sum(len(option_query.trees) for option_query in query.option_queries))
                max_tokens = (query.longest - encoder.soft_tokens - fewer) // (len(shown) + 1)
                query, is_too_long = adapter.query(example, labels, max_tokens), True
        except DataError as error:
            if str(error).startswith(("template", "an input")):
                raise ApiError(422, f"input.{number}: {error}", f"input.{number}") from None
            message = f"options: one of them has no tokens, or is too long to be read with input.{number}"
            raise ApiError(422, message, "options") from None
        if query.tokens > context:
            raise too_long_error(number, query.tokens, context)
        queries.append((query, is_too_long))
    return queries


def refuse_unseen_fields(prompt: str, given: object, field: str) -> None:
    """Raise ApiError if an input has fields that the adapter's prompt does not show."""
    unknown = unused_fields(prompt, given) if isinstance(given, dict) else []
    if unknown:
        known = ", ".join(sorted(template_variables(prompt)))
        raise ApiError(422, f"{field}: the adapter has no field {unknown[0][:60]!r}; it has {known}", field)


def last_characters(given: Given, count: int) -> Given:
    """Return the last characters of an input, or of each of its fields."""
    return given[-count:] if isinstance(given, str) else {name: text[-count:] for name, text in given.items()}


def too_long_error(number: int, tokens: int, limit: int) -> ApiError:
    message = f"input.{number}: has {tokens} tokens; at most {limit} are read. Shorten it, or set truncate"
    return ApiError(400, message, f"input.{number}", "context_length_exceeded")


def task_prompt(adapter: Adapter, given: Input) -> list[int]:
    """Return the tokens of an input in an adapter's own prompt, however many they are.

    Raises:
        DataError: an input with other fields than the task's, or one that does not fit its prompt.
    """
    example = query_example(given, adapter.card.fields)
    return without_limit(adapter.encoder).prompt_tokens(example, adapter.shown)


def without_limit(encoder: Encoder) -> Encoder:
    """Return the encoder without its limit on tokens: it shows how long an input is, in place of cutting it."""
    return dataclasses.replace(encoder, max_tokens=1 << 30)


def classification(
    labels: Iterable[str], queries: Sequence[tuple[Query, bool]], scores: Iterable[Tensor]
) -> dict[str, Any]:
    """Return the answer for each input, and the tokens of all inputs.

    Args:
        labels: the client's.
        queries: what `build_queries` returned.
        scores: the log-probabilities of each query's options, `[options]`.
    """
    answers = []
    for (_, is_cut), log_probs in zip(queries, scores, strict=True):
        prediction = most_probable(labels, log_probs)
        answers.append({"label": prediction.text, "probabilities": prediction.probabilities, "truncated": is_cut})
    tokens = sum(len(option_query.rows[0].tokens) for query, _ in queries for option_query in query.option_queries)
    return {"answers": answers, "tokens": tokens}


def label_pieces(result: dict[str, Any], sampling: Sampling) -> list[IndexedPiece]:
    """Return a classification as generated texts: a label for each prompt."""
    pieces = [label_piece(answer["probabilities"], sampling) for answer in result["answers"]]
    # The first piece has the tokens of all prompts: they are summed in the end.
    return [(index, piece, 0 if index else result["tokens"]) for index, piece in enumerate(pieces)]


def label_piece(probabilities: dict[str, float], sampling: Sampling) -> Piece:
    """Return a label as a text, chosen as tokens are: the most probable one, or by temperature and `top_p`."""
    log_probs = torch.tensor(list(probabilities.values()), dtype=torch.float64).log()
    label = list(probabilities)[choose(log_probs, sampling, new_generator(sampling.seed))]
    if sampling.logprobs is None:
        return Piece(label, tokens=1, finish_reason="stop")
    logs = {option: math.log(max(p, 1e-45)) for option, p in probabilities.items()}
    top = sorted(logs.items(), key=lambda item: -item[1])[: sampling.logprobs]
    return Piece(label, [TokenScore(label, logs[label], top)], tokens=1, finish_reason="stop")
