"""An adapter's labels, between the client's words and what the model sees."""

import math
from collections.abc import Sequence

import torch

from rayml.adapter import Adapter
from rayml.errors import ConfigError
from rayml.lm.sampling import Piece, Sampling, TokenScore
from rayml.serving.errors import ApiError


def choices(adapter: Adapter, options: Sequence[str] | None) -> dict[str, str]:
    """Return what the model sees of each option, by the client's own label.

    Raises:
        ApiError: 422, no options are known, or one that the adapter did not learn.
    """
    if not adapter.labels and len(options or ()) < 2:
        raise ApiError(422, "options: this model has no labels of its own; give two or more", "options")
    try:
        return adapter.choices(options)
    except ConfigError as error:
        raise ApiError(422, str(error), "options") from None


def label_piece(probabilities: dict[str, float], sampling: Sampling) -> Piece:
    """Return one of the labels: the most probable, or one drawn where a temperature is given."""
    label = max(probabilities, key=lambda option: probabilities[option])
    if sampling.temperature:
        generator = torch.Generator()
        generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
        scores = torch.tensor(list(probabilities.values()), dtype=torch.float64).log()
        weights = ((scores - scores.max()) / sampling.temperature).softmax(-1)
        label = list(probabilities)[int(torch.multinomial(weights, 1, generator=generator))]
    if sampling.logprobs is None:
        return Piece(label, tokens=1, finish_reason="stop")
    logs = {option: math.log(max(p, 1e-45)) for option, p in probabilities.items()}
    best = sorted(logs.items(), key=lambda item: -item[1])[: sampling.logprobs]
    return Piece(label, [TokenScore(label, logs[label], best)], tokens=1, finish_reason="stop")
