"""An adapter's labels, between the client's words and what the model sees."""

import math
from collections.abc import Sequence

import torch

from rayml.lm.sampling import Piece, Sampling, TokenScore
from rayml.serving.adapter_files import Adapter
from rayml.serving.errors import ApiError
from rayml.tasks.task import Example


def choices(loaded: Adapter | None, options: Sequence[str] | None) -> dict[str, str]:
    """Return what the model sees of each option, by the client's own label.

    Raises:
        ApiError: 422, no options are known, or one that the adapter did not learn.
    """
    own = {option: label for label, option in loaded.card.labels.items()} if loaded else {}
    if not own:
        if not options or len(options) < 2:
            raise ApiError(422, "options: this model has no labels of its own; give two or more", "options")
        return {option: option for option in options}
    unknown = [option for option in options or () if option not in own]
    if unknown:
        raise ApiError(422, f"options: {unknown[0]!r} is none of this adapter's: {', '.join(own)}", "options")
    return {option: own[option] for option in options or own}


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


def shown_of(loaded: Adapter | None) -> list[Example]:
    return loaded.card.examples() if loaded else []
