"""Continuous batching: rows with different adapters generate side by side, and join and leave at any token.

transformers' own continuous batching does not fit: it shares the keys and values of equal prompts whatever the adapter,
draws for a whole batch from one generator (so that a request's seed would mean nothing), and does not return logits.
So the loop is ours. The rest is transformers': the model's forward, its masks, and the cache that its config asks for,
with keys and values, a sliding window, chunks, or the state of recurrent layers. Rows are aligned on the right, as in a
left-padded batch, which every generating model supports. A long prompt may be read in parts, with steps of the other
rows in between.
"""

import inspect
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from rayml.algorithms.inner_loop import Params
from rayml.lm.lora import stack_adapters
from rayml.lm.model import TaskLM
from rayml.lm.precision import fused_attention


class DecodingRow(Protocol):
    """A text that is being generated."""

    tokens: list[int]
    """The prompt, followed by the generated tokens."""
    adapter: Params | None
    """`[r, in]` and `[out, r]` each; None for the bare base."""
    most_tokens: int
    """The most tokens that `tokens` may have."""

    def take(self, logits: Tensor) -> None:
        """Append a token to `tokens`, chosen by the logits `[V]` in fp32. A row that appends none has to leave."""


class PromptReader:
    """A row whose prompt is read in parts before it joins the others, with a cache of its own."""

    def __init__(self, row: DecodingRow, cache: DynamicCache):
        self.row, self.cache, self.tokens_read = row, cache, 0


class Decoder:
    """Generates a token for each of its rows in every step.

    Args:
        lm: with hooks for the adapters of all rows.
        most_rows: limits the rows side by side.
        cache_tokens: limits the tokens in the cache of keys and values: rows times the longest of them.
    """

    def __init__(self, lm: TaskLM, most_rows: int, cache_tokens: int):
        self.lm, self.most_rows, self.cache_tokens = lm, most_rows, cache_tokens
        self.active: list[DecodingRow] = []
        self.cache = self._empty_cache()
        self._cached: list[DecodingRow] = []
        """The rows in the cache, in its order; rows that have left are dropped before the next forward."""
        self._stacked: tuple[list[Params | None], Params | None] = ([], None)
        """The adapters of the last forward, and the same stacked."""
        self._arguments = inspect.signature(lm.module.forward).parameters.keys()
        self._is_recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.cache.layers)
        self._attends = any(isinstance(layer, CacheLayerMixin) for layer in self.cache.layers)

    def has_room(self, joining: Sequence[DecodingRow]) -> bool:
        """Return whether these rows may join the active ones; a row by itself always may."""
        rows = [*self.active, *joining]
        longest = max(row.most_tokens for row in rows)
        return len(rows) == 1 or (len(rows) <= self.most_rows and len(rows) * longest <= self.cache_tokens)

    @property
    def reads_in_parts(self) -> bool:
        """Whether a prompt can be read in parts: recurrent layers take all of it, or one token at a time."""
        return self._attends and not self._is_recurrent

    def join(self, rows: Sequence[DecodingRow]) -> None:
        """Read the prompts of new rows, and take the first token of each."""
        groups = []
        for group in self._prompt_groups(rows):
            cache = self._empty_cache()
            self._forward(group, [row.tokens for row in group], cache)
            groups.append((group, cache))
        for group, cache in groups:
            self._add(group, cache)

    def reader(self, row: DecodingRow) -> PromptReader:
        """Return a reader of the row's prompt that has read nothing yet."""
        return PromptReader(row, self._empty_cache())

    def prefill(self, reader: PromptReader, most_tokens: int) -> bool:
        """Read the next tokens of a prompt; return whether that was the last of them.

        The row has then taken its first token, and joined.
        """
        row, begin = reader.row, reader.tokens_read
        end = min(begin + most_tokens, len(row.tokens))
        logits = self._logits([row], [row.tokens[begin:end]], [end], reader.cache)
        reader.tokens_read = end
        if end < len(row.tokens):
            return False
        row.take(logits[0])
        self._add([row], reader.cache)
        return True

    @torch.no_grad()
    def _add(self, rows: Sequence[DecodingRow], cache: DynamicCache) -> None:
        self._evict_finished()
        self.cache = join_caches(self.cache, cache) if self._cached else cache
        self._cached += rows
        self.active = list(self._cached)

    def _prompt_groups(self, rows: Sequence[DecodingRow]) -> Iterator[list[DecodingRow]]:
        """Yield groups of rows whose prompts share a forward: of equal length if padding would enter a state."""
        if not self._is_recurrent:
            yield list(rows)
            return
        for _, group in groupby(sorted(rows, key=lambda row: len(row.tokens)), lambda row: len(row.tokens)):
            yield list(group)

    def step(self) -> None:
        """Generate one more token for every row."""
        self._evict_finished()
        self._forward(self.active, [row.tokens[-1:] for row in self.active], self.cache)

    def leave(self, row: DecodingRow) -> None:
        """Remove a row. When the last one leaves, the cache's memory is freed."""
        self.active.remove(row)
        if not self.active:
            self._evict_finished()

    def _empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self.lm.module.config)

    def _evict_finished(self) -> None:
        """Remove from the cache the rows that have left, and the columns that only they used."""
        if len(self._cached) == len(self.active):
            return
        if not self.active:
            self.cache, self._cached = self._empty_cache(), []
            return
        indices = [index for index, row in enumerate(self._cached) if any(row is active for active in self.active)]
        self.cache.reorder_cache(torch.tensor(indices, device=self.lm.device))  # type: ignore[arg-type]
        crop_cache(self.cache, max(len(row.tokens) for row in self.active) - 1)
        self._cached = list(self.active)

    def _forward(self, rows: Sequence[DecodingRow], new: Sequence[Sequence[int]], cache: DynamicCache) -> None:
        """Run the `new` tokens of each row, its last and not in the cache yet, and let it take one more."""
        for row, logits in zip(rows, self._logits(rows, new, [len(row.tokens) for row in rows], cache), strict=True):
            row.take(logits)

    @torch.no_grad()
    def _logits(
        self, rows: Sequence[DecodingRow], new: Sequence[Sequence[int]], ends: Sequence[int], cache: DynamicCache
    ) -> Tensor:
        """Run the `new` tokens of each row, which end at position `ends`; return the logits at the last, `[n, V]`."""
        device, width = self.lm.device, max(map(len, new))
        tokens = torch.tensor([[*[0] * (width - len(row)), *row] for row in new], device=device)
        lengths = torch.tensor(ends, device=device).unsqueeze(1)
        columns = torch.arange(max(ends), device=device)
        positions = columns - (len(columns) - lengths)  # [n, columns], negative where a shorter row has padding
        inputs: dict[str, Any] = {"use_cache": True}
        inputs["cache_params" if "cache_params" in self._arguments else "past_key_values"] = cache
        if "position_ids" in self._arguments:
            inputs["position_ids"] = positions[:, -width:].clamp(min=0)
        if self._attends and (positions < 0).any():
            inputs["attention_mask"] = (positions >= 0).long()
        last = torch.arange(1, len(rows) + 1, device=device) * width - 1
        with fused_attention(self.lm.module, len(columns)):
            return self.lm.logits_at(last, self._adapters(rows), tokens, **inputs).float()

    def _adapters(self, rows: Sequence[DecodingRow]) -> Params | None:
        """Return the adapters of the rows, `[n, ...]`, or `[1, ...]` if all rows have the same."""
        adapters = [row.adapter for row in rows]
        if all(adapter is adapters[0] for adapter in adapters):
            adapters = adapters[:1]
        last, stacked = self._stacked
        if len(last) != len(adapters) or any(a is not b for a, b in zip(last, adapters, strict=True)):
            stacked = stack_adapters(adapters)
            self._stacked = adapters, stacked
        return stacked


def join_caches(cache: DynamicCache, new: DynamicCache) -> DynamicCache:
    """Add the rows of `new` to `cache`, aligned on the right, and return it."""
    layer: Any
    other: Any
    for layer, other in zip(cache.layers, new.layers, strict=True):
        if getattr(layer, "keys", None) is not None:
            width = max(layer.keys.shape[-2], other.keys.shape[-2])
            layer.keys = torch.cat([pad_left(layer.keys, width), pad_left(other.keys, width)])
            layer.values = torch.cat([pad_left(layer.values, width), pad_left(other.values, width)])
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = max(layer.cumulative_length, other.cumulative_length)
        for kind in ("conv_states", "recurrent_states"):
            states, more = getattr(layer, kind, {}), getattr(other, kind, {})
            states.update({n: torch.cat([state, more[n]]) for n, state in states.items() if state is not None})
    return cache


def pad_left(states: Tensor, width: int) -> Tensor:
    """Pad keys or values `[n, heads, tokens, d]` with zeros on the left, to `width` tokens."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))


def crop_cache(cache: DynamicCache, width: int) -> None:
    """Keep the last `width` columns."""
    layer: Any
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = layer.keys[..., -width:, :], layer.values[..., -width:, :]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = min(layer.cumulative_length, width)
