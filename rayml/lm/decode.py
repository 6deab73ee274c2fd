"""Continuous batching: rows of different adapters generate side by side, and join and leave at any token.

transformers' own continuous batching was looked at first: it shares the keys and values of equal prompts whatever the
adapter, draws for a whole batch from one generator (so a request's seed would mean nothing), and keeps the logits to
itself. So the loop is ours, and the model's forward and its cache interface are transformers'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from rayml.algorithms.inner_loop import Params
from rayml.errors import ConfigError
from rayml.lm.lora import side_by_side
from rayml.lm.model import TaskLM


class DecodingRow(Protocol):
    """One text in the making."""

    tokens: list[int]
    """The prompt, and then what came after it."""
    adapter: Params | None
    """`[r, in]` and `[out, r]` each; None: the bare base."""
    most_tokens: int
    """The longest that `tokens` may become."""

    def take(self, logits: Tensor) -> None:
        """Append a token to `tokens`, chosen by its logits `[V]` in fp32."""


@dataclass
class Window:
    """Which slots the next forward reads and writes: `first` and those after it, one a row."""

    first: int
    positions: Tensor
    """`[n, q]`: where each row's next q tokens stand in their text."""
    longest: int
    """Read no further than this many tokens."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `[slots, tokens, heads, width]`: row i is written at its own positions."""

    is_compileable, is_sliding = False, False

    def __init__(self, slots: "SlotCache"):
        super().__init__()
        self.slots = slots
        self.keys: Any = None
        self.values: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._room(states, None) for states in (key_states, value_states))
        self.is_initialized = True

    def _room(self, states: Tensor, old: Tensor | None) -> Tensor:
        room = states.new_zeros(self.slots.rows, self.slots.tokens, states.shape[1], states.shape[3])
        if old is not None:
            kept = old[: self.slots.rows, : self.slots.tokens]
            room[: kept.shape[0], : kept.shape[1]] = kept
        return room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the new `[n, heads, q, width]`; return what these rows may attend to, `[n, heads, longest, width]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys.shape[:2] != (self.slots.rows, self.slots.tokens):
            self.keys, self.values = self._room(key_states, self.keys), self._room(value_states, self.values)
        window = self.slots.window
        last = window.first + len(window.positions)
        row = torch.arange(window.first, last, device=self.keys.device).unsqueeze(1)
        self.keys[row, window.positions] = key_states.transpose(1, 2)
        self.values[row, window.positions] = value_states.transpose(1, 2)
        seen = (part[window.first : last, : window.longest].transpose(1, 2) for part in (self.keys, self.values))
        return next(seen), next(seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.window.longest, 0

    def get_seq_length(self) -> int:
        return self.slots.window.longest

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """One slot for each row; it is laid out anew when a longer row, or one more, comes.

    Args:
        most_tokens: of all slots together, as long as one row more would not break it anyway.
    """

    def __init__(self, layers: int, most_tokens: int):
        self.most_tokens = most_tokens
        self.rows, self.tokens = 0, 0
        self.window = Window(0, torch.zeros(0, 0), 0)
        self.slots = [SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.slots))

    def make_room(self, rows: int, tokens: int) -> None:
        """Have a slot for each of the rows there are now, the longest of `tokens`."""
        if rows <= self.rows and tokens <= self.tokens:
            return
        self.tokens = -(-tokens // 64) * 64
        # Twice as many slots as rows, so that not every row that joins moves all the others.
        spare = min(2 * rows, self.most_tokens // self.tokens)
        self.rows = max(rows, spare)

    def move(self, source: int, target: int) -> None:
        for layer in self.slots:
            if layer.is_initialized and source != target:
                layer.keys[target], layer.values[target] = layer.keys[source], layer.values[source]


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
        self._stacked: tuple[list[Params | None], Params | None] = ([], None)

    def has_room(self, joining: Sequence[DecodingRow]) -> bool:
        """Return whether these rows may join those that generate; a row alone always may."""
        rows = [*self.active, *joining]
        longest = max(row.most_tokens for row in rows)
        return len(rows) == 1 or (len(rows) <= self.most_rows and len(rows) * longest <= self.cache_tokens)

    @torch.no_grad()
    def join(self, rows: Sequence[DecodingRow]) -> None:
        """Read the prompts of new rows, in one forward, and take the first token of each."""
        first = len(self.active)
        lengths = [len(row.tokens) for row in rows]
        self.cache.make_room(first + len(rows), max(row.most_tokens for row in (*self.active, *rows)))
        tokens = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, : lengths[index]] = torch.tensor(row.tokens)
        # What a shorter row writes behind its end is overwritten before it is ever attended to.
        positions = torch.arange(max(lengths)).expand(len(rows), -1)
        ends = torch.arange(len(rows)) * max(lengths) + torch.tensor(lengths) - 1
        self._forward(rows, tokens, Window(first, positions, max(lengths)), ends)
        self.active.extend(rows)

    @torch.no_grad()
    def step(self) -> None:
        """Take one more token of every row."""
        tokens = torch.tensor([[row.tokens[-1]] for row in self.active])
        positions = torch.tensor([[len(row.tokens) - 1] for row in self.active])
        self._forward(
            self.active, tokens, Window(0, positions, int(positions.max()) + 1), torch.arange(len(self.active))
        )

    def leave(self, row: DecodingRow) -> None:
        """Free a row's slot; the last row moves into it."""
        index = self.active.index(row)
        self.cache.move(len(self.active) - 1, index)
        last = self.active.pop()
        if last is not row:
            self.active[index] = last
        if not self.active:
            self.cache = self._empty_cache()

    def _empty_cache(self) -> SlotCache:
        return SlotCache(self.lm.module.config.num_hidden_layers, self.cache_tokens)

    def _forward(self, rows: Sequence[DecodingRow], tokens: Tensor, window: Window, at: Tensor) -> None:
        device, dtype = self.lm.device, self.lm.module.dtype
        window.positions = window.positions.to(device)
        self.cache.window = window
        later = torch.arange(window.longest, device=device) > window.positions.unsqueeze(-1)  # [n, q, longest]
        mask = torch.zeros(later.shape, dtype=dtype, device=device).masked_fill(later, torch.finfo(dtype).min)
        logits = self.lm.logits_at(
            at.to(device),
            self._adapters(rows),
            tokens.to(device),
            position_ids=window.positions,
            attention_mask=mask.unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
        )
        for row, scores in zip(rows, logits.float(), strict=True):
            row.take(scores)

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


def context_tokens(config: Any) -> int:
    """Return the longest text that the decoder can make with a model of this config.

    Raises:
        ConfigError: the model has layers that do not attend to a cache of keys and values.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"model.name: serving knows attention layers alone, and {config.model_type} has {kinds}")
    window = getattr(config, "sliding_window", None)
    # As long as the text fits the window, sliding attention and full attention are the same.
    return min(config.max_position_embeddings, window or config.max_position_embeddings)
