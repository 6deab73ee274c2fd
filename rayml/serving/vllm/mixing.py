"""Requests that ask for the most probable tokens, and such that name theirs, in one step of vLLM."""

from dataclasses import replace
from typing import Any


def with_top_tokens(logits: Any, asked: Any) -> Any:
    """Return what a step asks, with the most probable tokens named in every row that names none.

    vLLM 0.29 answers no request's `logprobs` in a step in which another asked for `logprob_token_ids`, as classifying
    does: it gives the named tokens to all rows, and to those that named none nothing.

    Args:
        logits: `[N, V]`.
        asked: vLLM's `SamplingMetadata` of these N rows.
    """
    named, most = asked.logprob_token_ids, asked.max_num_logprobs
    if not named or not most or most < 0:
        return asked
    top = logits.topk(most, dim=-1).indices.tolist()
    return replace(asked, logprob_token_ids={row: named.get(row, tokens) for row, tokens in enumerate(top)})
