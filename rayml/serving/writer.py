"""Texts in the making: which prompts are read in a turn, and which texts grow by a token."""

import logging
from collections import deque
from collections.abc import Callable, Sequence

from rayml.lm.batch import ATTENTION_TOKENS
from rayml.lm.decode import Decoder, PromptReader
from rayml.lm.model import TaskLM
from rayml.serving.settings import Batching
from rayml.serving.work import Writing

log = logging.getLogger(__name__)


class Writer:
    """Writes texts, a token of each in a turn.

    A turn reads new prompts of no more than `turn_tokens`, and as much of one long prompt, so that nobody waits for
    longer than that. Short prompts overtake the long one. Texts with long prompts lie in a cache of their own, since
    all rows of a cache are as wide as the longest.
    """

    def __init__(self, lm: TaskLM, batching: Batching, turn_tokens: int, observe: Callable[[str, float], None]):
        self.lm, self.batching, self.turn_tokens, self.observe = lm, batching, turn_tokens, observe
        self.waiting: deque[Writing] = deque()
        self._begin()

    def _begin(self) -> None:
        self.short, self.long = (Decoder(self.lm, self.batching.rows, self.batching.cache_tokens) for _ in range(2))
        self.reader: PromptReader | None = None

    def __bool__(self) -> bool:
        """Return whether there is anything to do."""
        return bool(self.waiting or self.reader or self.short.active or self.long.active)

    def parts(self) -> list[Callable[[], None]]:
        """Return what is done in a turn: one token of every text is written, then new prompts are read."""
        return [self._grow, self._join, self._read_on] if self else []

    def _grow(self) -> None:
        for decoder in (self.short, self.long):
            if decoder.active:
                self._step(decoder)
            self._send(decoder)

    def fail(self, error: Exception) -> None:
        """Give an error to all that wait, and begin anew."""
        reading = [self.reader.row] if self.reader else []
        self._lose([*reading, *self.short.active, *self.long.active, *self.waiting], error)
        self.waiting.clear()
        self._begin()

    def _lose(self, writings: Sequence[object], error: Exception) -> None:
        for writing in writings:
            assert isinstance(writing, Writing)
            writing.receive(error)

    def _step(self, decoder: Decoder) -> None:
        try:
            decoder.step()
            self.observe("decode_batch", len(decoder.active))
        except Exception as error:
            log.exception("generation failed")
            self._lose(decoder.active, error)
            self._renew(decoder)

    def _renew(self, decoder: Decoder) -> None:
        new = Decoder(self.lm, self.batching.rows, self.batching.cache_tokens)
        self.short, self.long = (new if one is decoder else one for one in (self.short, self.long))

    def _send(self, decoder: Decoder) -> None:
        for writing in list(decoder.active):
            assert isinstance(writing, Writing)
            piece = writing.piece()
            if piece.text or piece.finish_reason or piece.scores:
                writing.receive(writing.error or piece)
            if piece.finish_reason or writing.cancelled:
                decoder.leave(writing)

    def _is_long(self, writing: Writing) -> bool:
        return writing.prompt_tokens > self.turn_tokens

    def _join(self) -> None:
        """Read the short prompts that are next, as many as a turn bears."""
        joining = self._next_short()
        if not joining:
            return
        try:
            self.short.join(joining)
        except Exception as error:  # such as no memory for their prompts; those that write go on
            log.exception("reading prompts failed")
            self._lose(joining, error)
        self._send(self.short)

    def _next_short(self) -> list[Writing]:
        joining: list[Writing] = []
        longest = 0
        for writing in self._still_wanted():
            if self._is_long(writing):
                continue
            longest = max(longest, writing.prompt_tokens)
            too_many = joining and longest * (len(joining) + 1) > self.turn_tokens
            if too_many or not self.short.has_room([*joining, writing]):
                break
            joining.append(writing)
        for writing in joining:
            self.waiting.remove(writing)
        return joining

    def _still_wanted(self) -> list[Writing]:
        """Return what waits, without the texts whose clients have left; others add to it at any time."""
        for writing in list(self.waiting):
            if writing.cancelled:
                self.waiting.remove(writing)
        return list(self.waiting)

    def _read_on(self) -> None:
        """Read the next part of the long prompt whose turn it is."""
        self.reader = reader = self.reader or self._next_reader()
        if reader is None or self._has_left(reader):
            self.reader = None
            return
        try:
            if self.long.read_on(reader, self._part(reader)):
                self.reader = None
        except Exception as error:
            log.exception("reading a prompt failed")
            self._lose([reader.row], error)
            self.reader = None
        self._send(self.long)

    def _part(self, reader: PromptReader) -> int:
        """Return how many tokens of a long prompt are read next: on a CPU, the fewer the more it attends to."""
        if not self.long.reads_in_parts:
            return len(reader.row.tokens)
        if self.lm.device.type != "cpu":
            return self.turn_tokens
        return max(1, int(self.turn_tokens / (1 + reader.tokens_read / ATTENTION_TOKENS)))

    def _has_left(self, reader: PromptReader) -> bool:
        return isinstance(reader.row, Writing) and reader.row.cancelled

    def _next_reader(self) -> PromptReader | None:
        for writing in self._still_wanted():
            if self._is_long(writing) and self.long.has_room([writing]):
                self.waiting.remove(writing)
                return self.long.reader(writing)
        return None
