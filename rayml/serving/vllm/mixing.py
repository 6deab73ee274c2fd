"""What vLLM 0.29 mixes up where unlike requests share a step: whose tokens were asked for, and whose adapter it is."""

from collections.abc import Callable
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


def without_strangers(shrink: Callable[..., None]) -> Callable[..., None]:
    """Return vLLM's product of inputs and LoRA's A for CPUs, with nothing in the rows of the bare base.

    Those rows have the index -1, by which vLLM 0.29 takes the last adapter that it holds: while that one is there, the
    base answers as if it were asked with it.
    """

    def shrunk(inputs: Any, weights: Any, buffer: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(inputs, weights, buffer, indices, scaling)
        buffer.masked_fill_((indices < 0)[:, None], 0)

    return shrunk
