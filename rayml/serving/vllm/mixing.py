"""Fixes for two faults of vLLM 0.29 when different requests share a step: missing log-probabilities, wrong adapters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any


def with_top_tokens(logits: Any, metadata: Any) -> Any:
    """Return the metadata with the most probable tokens named for every row that names no tokens.

    In a step in which one request asks for `logprob_token_ids`, as classification does, vLLM 0.29 returns only named
    tokens: the requests that ask for `logprobs` get nothing.

    Args:
        logits: `[N, V]`.
        metadata: vLLM's `SamplingMetadata` of these N rows.
    """
    named_tokens, top_count = metadata.logprob_token_ids, metadata.max_num_logprobs
    if not named_tokens or not top_count or top_count < 0:
        return metadata
    top_tokens = logits.topk(top_count, dim=-1).indices.tolist()
    token_ids = {row: named_tokens.get(row, tokens) for row, tokens in enumerate(top_tokens)}
    return replace(metadata, logprob_token_ids=token_ids)


def without_base_rows(shrink: Callable[..., None]) -> Callable[..., None]:
    """Wrap vLLM's CPU kernel that multiplies inputs by LoRA's A, so that rows of the bare base get zeros.

    Those rows have the adapter index -1. vLLM 0.29 takes it for the last adapter in memory, and applies that one to
    the base's requests.
    """

    def masked_shrink(inputs: Any, weights: Any, buffer: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(inputs, weights, buffer, indices, scaling)
        buffer.masked_fill_((indices < 0)[:, None], 0)

    return masked_shrink
