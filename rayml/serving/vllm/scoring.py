"""Log-probabilities of options from an engine that tells those of single tokens behind a prompt."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable

import torch
from torch import Tensor

from rayml.lm.option_scoring import OptionQuery, WeightedPrompts

Tokens = tuple[int, ...]
Ask = Callable[[Tokens, list[int]], Awaitable[dict[int, float]]]
"""Returns the log-probabilities of some tokens behind a prompt."""
MOST_TOKENS = 128
"""That vLLM tells of at a time."""


async def option_log_probs(ask: Ask, prompts: WeightedPrompts) -> Tensor:
    """Return the log-probabilities of one input's options, `[options]`, as `Query`'s own model gives them.

    Args:
        prompts: the prompt ensemble, of that one input.
    """
    found = await asyncio.gather(*(_of_one_prompt(ask, query) for _, (query,) in prompts))
    scores = torch.stack([share * of for (share, _), of in zip(prompts, found, strict=True)]).sum(0)
    return scores.log_softmax(-1)


async def _of_one_prompt(ask: Ask, query: OptionQuery) -> Tensor:
    heads = [tuple(row.tokens[: row.start]) for row in query.rows]
    wanted: dict[Tokens, set[int]] = defaultdict(set)
    for head, option, allowed in zip(heads, query.options, query.allowed, strict=True):
        for place, token in enumerate(option):
            wanted[head + tuple(option[:place])] |= {token, *allowed[place]}
    told = await _ask_all(ask, wanted, set(heads))
    scores = []
    for head, option, allowed, divisor in zip(heads, query.options, query.allowed, query.divisors, strict=True):
        of_tokens = [
            _among(told[head + tuple(option[:place])], token, allowed[place]) for place, token in enumerate(option)
        ]
        scores.append(sum(of_tokens) / divisor)
    return torch.tensor(scores, dtype=torch.float64).log_softmax(-1).float()


async def _ask_all(ask: Ask, wanted: dict[Tokens, set[int]], heads: set[Tokens]) -> dict[Tokens, dict[int, float]]:
    """Return the log-probabilities behind every prefix; prompts first, so that what follows finds them in the cache."""
    told: dict[Tokens, dict[int, float]] = {}
    for prefixes in (list(heads), list(wanted.keys() - heads)):
        found = await asyncio.gather(*(_in_parts(ask, prefix, sorted(wanted[prefix])) for prefix in prefixes))
        told |= dict(zip(prefixes, found, strict=True))
    return told


async def _in_parts(ask: Ask, prefix: Tokens, tokens: list[int]) -> dict[int, float]:
    parts = [tokens[first : first + MOST_TOKENS] for first in range(0, len(tokens), MOST_TOKENS)]
    first, *others = parts
    found = [await ask(prefix, first), *await asyncio.gather(*(ask(prefix, part) for part in others))]
    return {token: log for part in found for token, log in part.items()}


def _among(told: dict[int, float], token: int, allowed: Iterable[int]) -> float:
    """Return a token's log-probability among those that compete with it; among the vocabulary, where none is named."""
    rivals = [told[rival] for rival in allowed]
    if not rivals:
        return told[token]
    return told[token] - float(torch.tensor(rivals, dtype=torch.float64).logsumexp(0))
