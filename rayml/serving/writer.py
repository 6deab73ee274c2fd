"""Text generation: which prompts are read in a turn, and which texts get a token."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from rayml.lm.batch import ATTENTION_TOKENS
from rayml.lm.decode import Decoder, DecodingRow, PromptReader
from rayml.lm.model import TaskLM
from rayml.serving.settings import Batching
from rayml.serving.work import Observe, PendingText

log = logging.getLogger(__name__)


class Writer:
    """Writes texts side by side, one token of each in a turn.

    A turn reads short prompts of at most `turn_tokens` together, and as many tokens of one long prompt, so that no
    text waits for long. Short prompts overtake the long one. Texts with long prompts have a cache of their own, since
    all rows of a cache are as wide as the longest.
    """

    def __init__(self, lm: TaskLM, batching: Batching, turn_tokens: int, observe: Observe):
        self.lm, self.batching, self.turn_tokens, self.observe = lm, batching, turn_tokens, observe
        self.waiting: deque[PendingText] = deque()
        self.short, self.long = self._new_decoder(), self._new_decoder()
        self.reader: PromptReader | None = None
        """Of the long prompt that is being read."""

    def _new_decoder(self) -> Decoder:
        return Decoder(self.lm, self.batching.rows, self.batching.cache_tokens)

    def __bool__(self) -> bool:
        """Return whether there is anything to do."""
        return bool(self.waiting or self.reader or self.short.active or self.long.active)

    def parts(self) -> list[Callable[[], None]]:
        """Return the parts of a turn: write a token of every text, then read new prompts."""
        return [self._write_tokens, self._read_short_prompts, self._read_long_prompt] if self else []

    def fail(self, error: Exception) -> None:
        """Give an error to all texts, and start afresh."""
        reading = [self.reader.row] if self.reader else []
        self._fail([*reading, *self.short.active, *self.long.active], error)
        while self.waiting:  # one by one: other threads may add more meanwhile
            self.waiting.popleft().receive(error)
        self.short, self.long = self._new_decoder(), self._new_decoder()
        self.reader = None

    def _fail(self, rows: Sequence[DecodingRow], error: Exception) -> None:
        for writing in cast(Sequence[PendingText], rows):
            writing.receive(error)

    def _write_tokens(self) -> None:
        for decoder in (self.short, self.long):
            if decoder.active:
                self._step(decoder)
            self._send_pieces(decoder)

    def _step(self, decoder: Decoder) -> None:
        try:
            decoder.step()
            self.observe("decode_batch", len(decoder.active))
        except Exception as error:
            log.exception("generation failed")
            self._fail(decoder.active, error)
            if decoder is self.short:
                self.short = self._new_decoder()
            else:
                self.long = self._new_decoder()

    def _send_pieces(self, decoder: Decoder) -> None:
        for writing in cast(list[PendingText], list(decoder.active)):
            piece = writing.piece()
            if piece.text or piece.finish_reason or piece.scores:
                writing.receive(writing.error or piece)
            if piece.finish_reason or writing.cancelled:
                decoder.leave(writing)

    def _is_long(self, writing: PendingText) -> bool:
        return writing.prompt_tokens > self.turn_tokens

    def _drop_cancelled(self) -> list[PendingText]:
        """Drop the waiting texts whose clients have left; return the others. Other threads may add texts meanwhile."""
        for writing in list(self.waiting):
            if writing.cancelled:
                self.waiting.remove(writing)
        return list(self.waiting)

    def _read_short_prompts(self) -> None:
        """Read the next short prompts, as many as a turn allows."""
        writings = self._take_short()
        if not writings:
            return
        try:
            self.short.join(writings)
        except Exception as error:  # such as too little memory for their prompts; the others go on
            log.exception("reading prompts failed")
            self._fail(writings, error)
        self._send_pieces(self.short)

    def _take_short(self) -> list[PendingText]:
        batch: list[PendingText] = []
        longest = 0
        for writing in self._drop_cancelled():
            if self._is_long(writing):
                continue
            longest = max(longest, writing.prompt_tokens)
            exceeds_turn = batch and longest * (len(batch) + 1) > self.turn_tokens
            if exceeds_turn or not self.short.has_room([*batch, writing]):
                break
            batch.append(writing)
        for writing in batch:
            self.waiting.remove(writing)
        return batch

    def _read_long_prompt(self) -> None:
        """Read the next part of the current long prompt, or the first part of the next one."""
        self.reader = reader = self.reader or self._next_reader()
        if reader is None or cast(PendingText, reader.row).cancelled:
            self.reader = None
            return
        try:
            if self.long.prefill(reader, self._part_tokens(reader)):
                self.reader = None
        except Exception as error:
            log.exception("reading a prompt failed")
            self._fail([reader.row], error)
            self.reader = None
        self._send_pieces(self.long)

    def _part_tokens(self, reader: PromptReader) -> int:
        """Return how many tokens of a long prompt to read next. On a CPU, later tokens cost more: they attend to all
        that was read."""
        if not self.long.reads_in_parts:
            return len(reader.row.tokens)
        if self.lm.device.type != "cpu":
            return self.turn_tokens
        return max(1, int(self.turn_tokens / (1 + reader.tokens_read / ATTENTION_TOKENS)))

    def _next_reader(self) -> PromptReader | None:
        for writing in self._drop_cancelled():
            if self._is_long(writing) and self.long.has_room([writing]):
                self.waiting.remove(writing)
                return self.long.reader(writing)
        return None
