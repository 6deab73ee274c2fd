"""Log-probabilities of options, from an engine that returns those of single tokens after a prompt."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable

import torch
from torch import Tensor

from rayml.lm.option_scoring import OptionQuery, WeightedPrompts

Tokens = tuple[int, ...]
TokenLogProbs = dict[int, float]
"""Log-probabilities by token."""
Ask = Callable[[Tokens, list[int]], Awaitable[TokenLogProbs]]
"""Returns the log-probabilities of some tokens after a prompt."""
MOST_TOKENS = 128
"""vLLM returns the log-probabilities of at most this many tokens per request."""


async def option_log_probs(ask: Ask, prompts: WeightedPrompts) -> Tensor:
    """Return the log-probabilities of one input's options, `[options]`, as our own engine computes them.

    Args:
        prompts: that one input in each prompt of the ensemble.
    """
    log_probs = await asyncio.gather(*(_prompt_log_probs(ask, query) for _, (query,) in prompts))
    weighted = [weight * scores for (weight, _), scores in zip(prompts, log_probs, strict=True)]
    return torch.stack(weighted).sum(0).log_softmax(-1)


async def _prompt_log_probs(ask: Ask, query: OptionQuery) -> Tensor:
    prompts = [tuple(row.tokens[: row.start]) for row in query.rows]
    needed: dict[Tokens, set[int]] = defaultdict(set)
    for prompt, option, allowed in zip(prompts, query.options, query.allowed, strict=True):
        for position, token in enumerate(option):
            needed[prompt + tuple(option[:position])] |= {token, *allowed[position]}
    log_probs = await _ask_all(ask, needed, set(prompts))
    scores = []
    for prompt, option, allowed, divisor in zip(prompts, query.options, query.allowed, query.divisors, strict=True):
        token_scores = [
            _log_prob_among(log_probs[prompt + tuple(option[:position])], token, allowed[position])
            for position, token in enumerate(option)
        ]
        scores.append(sum(token_scores) / divisor)
    return torch.tensor(scores, dtype=torch.float64).log_softmax(-1).float()


async def _ask_all(ask: Ask, needed: dict[Tokens, set[int]], prompts: set[Tokens]) -> dict[Tokens, TokenLogProbs]:
    """Return the log-probabilities of the needed tokens after each prefix.

    The prompts are asked first, so that the longer prefixes find them in vLLM's prefix cache.
    """
    log_probs: dict[Tokens, TokenLogProbs] = {}
    for prefixes in (list(prompts), list(needed.keys() - prompts)):
        answers = await asyncio.gather(*(_ask_in_parts(ask, prefix, sorted(needed[prefix])) for prefix in prefixes))
        log_probs |= dict(zip(prefixes, answers, strict=True))
    return log_probs


async def _ask_in_parts(ask: Ask, prefix: Tokens, tokens: list[int]) -> TokenLogProbs:
    first, *others = (tokens[start : start + MOST_TOKENS] for start in range(0, len(tokens), MOST_TOKENS))
    answers = [await ask(prefix, first), *await asyncio.gather(*(ask(prefix, part) for part in others))]
    return {token: log_prob for answer in answers for token, log_prob in answer.items()}


def _log_prob_among(log_probs: TokenLogProbs, token: int, allowed: Iterable[int]) -> float:
    """Return a token's log-probability among the allowed tokens; among the whole vocabulary if none are given."""
    rivals = [log_probs[rival] for rival in allowed]
    if not rivals:
        return log_probs[token]
    return log_probs[token] - float(torch.tensor(rivals, dtype=torch.float64).logsumexp(0))
