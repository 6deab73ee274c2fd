"""Work that waits for the model: queries to classify, texts to write, adapters to learn."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from torch import Tensor

from rayml.adaptation import AdaptationRequest, Losses
from rayml.algorithms.inner_loop import Params
from rayml.lm.generate import Generation
from rayml.lm.queries import Query
from rayml.lm.sampling import Piece

Observe = Callable[[str, float], None]
"""Takes the name and the value of a metric."""


class PendingQuery:
    """A query to classify. Its result are the log-probabilities of its options, `[options]`."""

    def __init__(self, query: Query):
        self.query = query
        self.answer: Future[Tensor] = Future()


class PendingText(Generation):
    """A text to write. `receive` gets it piece by piece."""

    cancelled = False
    error: Exception | None = None

    def take(self, logits: Tensor) -> None:
        try:
            super().take(logits)
        except Exception as error:  # must not end the other texts of the batch
            self.error, self.finish_reason = error, "error"

    def send_to(self, receive: Callable[[Piece | Exception], None]) -> "PendingText":
        self.receive = receive
        return self


class PendingAdaptation:
    """An adapter to learn. Its result are the weights, and the support loss before each step and after the last.

    Args:
        owner: owners take turns.
    """

    def __init__(self, request: AdaptationRequest, steps: int, owner: str = ""):
        self.request, self.steps, self.owner = request, steps, owner
        self.steps_taken = 0
        self.learned: Future[tuple[Params, Losses]] = Future()


def settle(future: Future, result: Any) -> None:
    """Set the result, or the exception, of a future, unless it was cancelled."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
