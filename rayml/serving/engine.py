"""One model, and the thread that shares it: adapters of many tasks answer, and new ones are learned, side by side.

A turn of the thread takes one step of each kind of work that waits: a batch of queries to classify, one token of every
text in the making, one inner step of the adapters being learned. So nothing waits for another's end, and adaptations
get no more than their share of the time while queries wait.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rayml.adaptation import Losses, adapt_requests
from rayml.algorithms.inner_loop import Params
from rayml.lm.decode import Decoder
from rayml.lm.queries import first_batch, log_probs
from rayml.model import MetaModel
from rayml.serving.errors import ApiError, busy
from rayml.serving.settings import Batching, Limits
from rayml.serving.work import Adaptation, Waiting, Writing

log = logging.getLogger(__name__)
Observe = Callable[[str, float], None]


class Engine:
    """Answers queries and learns adapters on one model, from any thread.

    Args:
        model: with hooks on every linear that an adapter may change.
        observe: takes the name and the value of what is measured.
    """

    def __init__(
        self, model: MetaModel, batching: Batching, limits: Limits, observe: Observe = lambda name, value: None
    ):
        self.model, self.batching, self.limits, self.observe = model, batching, limits, observe
        self.decoder = self._new_decoder()
        self._queries: deque[Waiting] = deque()
        self._writings: deque[Writing] = deque()
        self._adaptations: deque[Adaptation] = deque()
        self._pings: deque[Future[None]] = deque()
        self._learning: list[Adaptation] = []
        self._inner_loop: Generator[None, None, list[tuple[Params, Losses]]] | None = None
        self._owed_seconds = 0.0
        self._turn_began: float | None = None
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="rayml-engine", daemon=True)
        self._thread.start()

    def classify(self, queries: list[Waiting]) -> None:
        """Take queries in; their answers come as futures.

        Raises:
            ApiError: 429, too many wait.
        """
        self._submit(self._queries, queries, self.limits.waiting_queries, "queries")

    def write(self, writings: list[Writing]) -> None:
        """Queue texts to be written; raises as `classify` does."""
        self._submit(self._writings, writings, self.limits.waiting_queries, "texts")

    def adapt(self, adaptation: Adaptation) -> None:
        """Queue a request to adapt; raises as `classify` does."""
        self._submit(self._adaptations, [adaptation], self.limits.waiting_adaptations, "adaptations")

    def ping(self) -> Future[None]:
        """Run the model on one token, ahead of all that waits."""
        answer: Future[None] = Future()
        self._submit(self._pings, [answer], None, "pings")
        return answer

    def working_seconds(self) -> float:
        """Return how long the present turn has taken; 0 between turns."""
        began = self._turn_began
        return time.monotonic() - began if began is not None else 0.0

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def cancel(self, writing: Writing) -> None:
        writing.cancelled = True

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _submit(self, waiting: deque, jobs: list[Any], most: int | None, what: str) -> None:
        with self._changed:
            if not self._thread.is_alive():
                raise ApiError(503, "this replica is going away; send the request again", code="replica_lost")
            if most is not None and len(waiting) + len(jobs) > most:
                raise busy(f"{len(waiting)} {what} wait in this replica already; at most {most} may")
            waiting.extend(jobs)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._open and not self._pings and not self._has_queries() and not self._has_adaptations():
                    self._changed.wait()
                if not self._open:
                    return
            self._turn_began = time.monotonic()
            try:
                self._turn()
            except Exception as error:  # no work is known to bring this about; whoever waits must not wait for ever
                log.exception("a turn failed")
                self._fail_all(error)
            self._turn_began = None

    def _fail_all(self, error: Exception) -> None:
        self._settle_adaptations([error] * len(self._learning))
        waiting: list[Future] = [*self._pings, *(asked.answer for asked in self._queries)]
        for future in (*waiting, *(one.learned for one in self._adaptations)):
            settle(future, error)
        for queue in (self._queries, self._adaptations, self._pings):
            queue.clear()
        self._lose([*self._rows(), *self._writings], error)
        self._writings.clear()
        self.decoder = self._new_decoder()

    def _rows(self) -> list[Writing]:
        return [row for row in self.decoder.active if isinstance(row, Writing)]

    def _lose(self, writings: Sequence[Writing], error: Exception) -> None:
        for writing in writings:
            writing.receive(error)

    def _new_decoder(self) -> Decoder:
        return Decoder(self.model.lm, self.batching.rows, self.batching.cache_tokens)

    def _turn(self) -> None:
        if self._pings:
            self._pong([self._pings.popleft() for _ in range(len(self._pings))])
        if self._has_adaptations() and (self._owed_seconds <= 0 or not self._has_queries()):
            share = self.batching.adaptation_share
            self._owed_seconds = self._timed(self._take_inner_step) * (1 / share - 1)
        if self._has_queries():
            self._owed_seconds -= self._timed(self._answer)

    def _has_queries(self) -> bool:
        return bool(self._queries or self._writings or self.decoder.active)

    def _has_adaptations(self) -> bool:
        return bool(self._adaptations or self._learning)

    def _timed(self, work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def _pong(self, answers: list[Future[None]]) -> None:
        result: Exception | None = None
        try:
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.lm.device)
            with torch.no_grad():
                logits = self.model.lm.logits_at(token[0], None, token)
            if not torch.isfinite(logits).all():
                raise RuntimeError("the model's logits are not finite")
        except Exception as error:
            result = error
        for answer in answers:
            settle(answer, result)

    def _answer(self) -> None:
        if self._queries:
            self._classify_batch()
        if self._writings or self.decoder.active:
            self._write_tokens()

    def _classify_batch(self) -> None:
        batch = self._next_queries()
        if not batch:
            return
        found: Sequence[Tensor | Exception]
        try:
            scores = log_probs(self.model.lm, self.model.encoder.pad, [asked.query for asked in batch])
            found = [of.cpu() for of in scores]
            self.observe("classify_batch", len(batch))
        except Exception as error:
            log.exception("classification failed")
            found = [error] * len(batch)
        for asked, result in zip(batch, found, strict=True):
            settle(asked.answer, result)

    def _next_queries(self) -> list[Waiting]:
        """Take queries that are answered in one way from the front, as many as one forward bears."""
        waiting = [asked.query for asked in islice(self._queries, self.batching.queries)]
        taken = [self._queries.popleft() for _ in range(first_batch(waiting, self.batching.prompt_tokens))]
        return [asked for asked in taken if not asked.answer.cancelled()]  # whoever left needs no answer

    def _write_tokens(self) -> None:
        joining = self._next_writings()
        if self.decoder.active:
            self._step()
        if joining:
            try:
                self.decoder.join(joining)
            except Exception as error:  # such as no memory for their prompts; those that write go on
                log.exception("reading prompts failed")
                self._lose(joining, error)
        for writing in self._rows():
            piece = writing.piece()
            if piece.text or piece.finish_reason or piece.scores:
                writing.receive(writing.error or piece)
            if piece.finish_reason or writing.cancelled:
                self.decoder.leave(writing)

    def _step(self) -> None:
        try:
            self.decoder.step()
            self.observe("decode_batch", len(self.decoder.active))
        except Exception as error:
            log.exception("generation failed")
            self._lose(self._rows(), error)
            self.decoder = self._new_decoder()

    def _next_writings(self) -> list[Writing]:
        joining: list[Writing] = []
        longest = 0
        while self._writings:
            writing = self._writings[0]
            longest = max(longest, writing.prompt_tokens)
            too_many = joining and longest * (len(joining) + 1) > self.batching.prompt_tokens
            if not writing.cancelled and (too_many or not self.decoder.has_room([*joining, writing])):
                break
            self._writings.popleft()
            joining += [] if writing.cancelled else [writing]
        return joining

    def _take_inner_step(self) -> None:
        if self._inner_loop is None:
            self._learning = self._next_adaptations()
            requests, steps = [one.request for one in self._learning], [one.steps for one in self._learning]
            self._inner_loop = adapt_requests(self.model, requests, steps)
            self.observe("adaptation_batch", len(requests))
        try:
            next(self._inner_loop)
        except StopIteration as end:
            self._settle_adaptations(end.value)
        except Exception as error:
            log.exception("adaptation failed")
            self._settle_adaptations([error] * len(self._learning))

    def _settle_adaptations(self, found: Sequence[tuple[Params, Losses] | Exception]) -> None:
        for one, learned in zip(self._learning, found, strict=True):
            settle(one.learned, learned)
        self._inner_loop, self._learning = None, []

    def _next_adaptations(self) -> list[Adaptation]:
        chosen = [self._adaptations.popleft()]
        while self._adaptations and len(chosen) < self.batching.adaptations:
            requests = [one.request.rows for one in (*chosen, self._adaptations[0])]
            longest = max(len(row.tokens) for rows in requests for row in rows)
            if len(requests) * max(map(len, requests)) * longest > self.batching.adaptation_tokens:
                break
            chosen.append(self._adaptations.popleft())
        return chosen


def settle(future: Future, result: Any) -> None:
    """Give a result, or an error, to whoever still waits for it."""
    with contextlib.suppress(InvalidStateError):  # cancelled: nobody does
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
