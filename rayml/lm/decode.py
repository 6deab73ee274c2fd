"""Continuous batching: rows of different adapters generate side by side, and join and leave at any token.

transformers' own continuous batching was looked at first: it shares the keys and values of equal prompts whatever the
adapter, draws for a whole batch from one generator (so a request's seed would mean nothing), and keeps the logits to
itself. So the loop is ours, and the rest is transformers': the model's forward, its masks, and the cache that its
config asks for, be it of keys and values, of a sliding window, of chunks, or of a recurrent layer's state. Rows end in
the same column, as in a batch padded on the left, which every model that generates is made for. A long prompt may be
read in parts, with steps of the others in between.
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
from rayml.lm.lora import side_by_side
from rayml.lm.model import TaskLM
from rayml.lm.precision import fused_attention


class DecodingRow(Protocol):
    """One text in the making."""

    tokens: list[int]
    """The prompt, and then what came after it."""
    adapter: Params | None
    """`[r, in]` and `[out, r]` each; None: the bare base."""
    most_tokens: int
    """The longest that `tokens` may become."""

    def take(self, logits: Tensor) -> None:
        """Append a token to `tokens`, chosen by its logits `[V]` in fp32. A row that appends none has to leave."""


class PromptReader:
    """A row whose prompt is read in parts, before it joins others: its own cache, and how far it is."""

    def __init__(self, row: DecodingRow, cache: DynamicCache):
        self.row, self.cache, self.tokens_read = row, cache, 0


class Decoder:
    """The rows that generate at the moment, one token each in a step.

    Args:
        lm: with hooks for every adapter that comes.
        most_rows: rows side by side.
        cache_tokens: most tokens in the cache of keys and values, rows times the longest of them.
    """

    def __init__(self, lm: TaskLM, most_rows: int, cache_tokens: int):
        self.lm, self.most_rows, self.cache_tokens = lm, most_rows, cache_tokens
        self.active: list[DecodingRow] = []
        self.cache = self._empty_cache()
        self._cached: list[DecodingRow] = []
        self._stacked: tuple[list[Params | None], Params | None] = ([], None)
        self._takes = inspect.signature(lm.module.forward).parameters.keys()
        self._is_recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.cache.layers)
        self._attends = any(isinstance(layer, CacheLayerMixin) for layer in self.cache.layers)

    def has_room(self, joining: Sequence[DecodingRow]) -> bool:
        """Return whether these rows may join those that generate; a row alone always may."""
        rows = [*self.active, *joining]
        longest = max(row.most_tokens for row in rows)
        return len(rows) == 1 or (len(rows) <= self.most_rows and len(rows) * longest <= self.cache_tokens)

    @property
    def reads_in_parts(self) -> bool:
        """Whether a prompt can be read in parts: recurrent layers take one whole, or a token at a time."""
        return self._attends and not self._is_recurrent

    def join(self, rows: Sequence[DecodingRow]) -> None:
        """Read the prompts of new rows, and take the first token of each."""
        read = []
        for together in self._read_together(rows):
            cache = self._empty_cache()
            self._forward(together, [row.tokens for row in together], cache)
            read.append((together, cache))
        for together, cache in read:
            self._add(together, cache)

    def reader(self, row: DecodingRow) -> PromptReader:
        """Return what reads a row's prompt in parts; nothing is read yet."""
        return PromptReader(row, self._empty_cache())

    def read_on(self, reader: PromptReader, most_tokens: int) -> bool:
        """Read the next tokens of a prompt; at its end the row takes its first token, and joins.

        Returns:
            whether it has.
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
        self._forget()
        self.cache = joined(self.cache, cache) if self._cached else cache
        self._cached += rows
        self.active = list(self._cached)

    def _read_together(self, rows: Sequence[DecodingRow]) -> Iterator[list[DecodingRow]]:
        """Yield the rows whose prompts share a forward: those of one length, where padding would enter a state."""
        if not self._is_recurrent:
            yield list(rows)
            return
        for _, alike in groupby(sorted(rows, key=lambda row: len(row.tokens)), lambda row: len(row.tokens)):
            yield list(alike)

    def step(self) -> None:
        """Take one more token of every row."""
        self._forget()
        self._forward(self.active, [row.tokens[-1:] for row in self.active], self.cache)

    def leave(self, row: DecodingRow) -> None:
        """End a row. With the last one the cache's memory is given back."""
        self.active.remove(row)
        if not self.active:
            self._forget()

    def _empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self.lm.module.config)

    def _forget(self) -> None:
        """Take out of the cache the rows that have left, and the columns that only they reached into."""
        if len(self._cached) == len(self.active):
            return
        if not self.active:
            self.cache, self._cached = self._empty_cache(), []
            return
        kept = [index for index, row in enumerate(self._cached) if any(row is one for one in self.active)]
        self.cache.reorder_cache(torch.tensor(kept, device=self.lm.device))  # type: ignore[arg-type]
        narrow(self.cache, max(len(row.tokens) for row in self.active) - 1)
        self._cached = list(self.active)

    def _forward(self, rows: Sequence[DecodingRow], new: Sequence[Sequence[int]], cache: DynamicCache) -> None:
        """Run each row's last tokens, which are not in the cache yet, and let each take one more."""
        for row, scores in zip(rows, self._logits(rows, new, [len(row.tokens) for row in rows], cache), strict=True):
            row.take(scores)

    @torch.no_grad()
    def _logits(
        self, rows: Sequence[DecodingRow], new: Sequence[Sequence[int]], ends: Sequence[int], cache: DynamicCache
    ) -> Tensor:
        """Run `new` tokens of each row, which end where `ends` says, and return the logits at the last, `[n, V]`."""
        device, width = self.lm.device, max(map(len, new))
        tokens = torch.tensor([[*[0] * (width - len(some)), *some] for some in new], device=device)
        lengths = torch.tensor(ends, device=device).unsqueeze(1)
        columns = torch.arange(max(ends), device=device)
        positions = columns - (len(columns) - lengths)  # [n, columns], negative where a shorter row has padding
        inputs: dict[str, Any] = {"use_cache": True}
        inputs["cache_params" if "cache_params" in self._takes else "past_key_values"] = cache
        if "position_ids" in self._takes:
            inputs["position_ids"] = positions[:, -width:].clamp(min=0)
        if self._attends and (positions < 0).any():
            inputs["attention_mask"] = (positions >= 0).long()
        last = torch.arange(1, len(rows) + 1, device=device) * width - 1
        with fused_attention(self.lm.module, len(columns)):
            return self.lm.logits_at(last, self._adapters(rows), tokens, **inputs).float()

    def _adapters(self, rows: Sequence[DecodingRow]) -> Params | None:
        """Return the adapters of the rows, `[n, ...]`, or `[1, ...]` where all have the same."""
        adapters = [row.adapter for row in rows]
        if all(adapter is adapters[0] for adapter in adapters):
            adapters = adapters[:1]
        before, stacked = self._stacked
        if len(before) != len(adapters) or any(a is not b for a, b in zip(before, adapters, strict=True)):
            stacked = side_by_side(adapters)
            self._stacked = adapters, stacked
        return stacked


def joined(cache: DynamicCache, new: DynamicCache) -> DynamicCache:
    """Return one cache of both's rows, whose last tokens stand in one column."""
    ours: Any
    theirs: Any
    for ours, theirs in zip(cache.layers, new.layers, strict=True):
        if getattr(ours, "keys", None) is not None:
            width = max(ours.keys.shape[-2], theirs.keys.shape[-2])
            ours.keys = torch.cat([padded(ours.keys, width), padded(theirs.keys, width)])
            ours.values = torch.cat([padded(ours.values, width), padded(theirs.values, width)])
        if hasattr(ours, "cumulative_length"):
            ours.cumulative_length = max(ours.cumulative_length, theirs.cumulative_length)
        for kind in ("conv_states", "recurrent_states"):
            states, more = getattr(ours, kind, {}), getattr(theirs, kind, {})
            states.update({n: torch.cat([state, more[n]]) for n, state in states.items() if state is not None})
    return cache


def padded(states: Tensor, width: int) -> Tensor:
    """Return keys or values `[n, heads, tokens, d]` behind zeros, as many tokens as `width`."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))


def narrow(cache: DynamicCache, width: int) -> None:
    """Keep the last columns: no row is longer."""
    layer: Any
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = layer.keys[..., -width:, :], layer.values[..., -width:, :]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = min(layer.cumulative_length, width)
