"""What waits for the model: queries to classify, texts to write, adapters to learn."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from rayml.evaluation.learn import Lesson, Losses
from rayml.lm.batch import Row
from rayml.lm.generate import Generation
from rayml.lm.sampling import Piece
from rayml.meta.adapt import Params
from rayml.meta.protonet import prototype_logits


class Support:
    """The examples that a protonet's adapter tells classes apart by; their states are taken once, `[K, D]`."""

    def __init__(self, rows: list[Row], classes: list[int]):
        self.rows, self.classes = rows, classes
        self.states: Tensor | None = None

    def log_probs(self, state: Tensor, places: Sequence[int]) -> Tensor:
        """Return the log-probabilities of some of the classes for a query's state, `[1, D]` to `[options]`."""
        assert self.states is not None
        classes = torch.tensor([self.classes], device=state.device)
        logits = prototype_logits(self.states.unsqueeze(0), classes, state.unsqueeze(0), max(self.classes) + 1)[0, 0]
        return logits[list(places)].log_softmax(-1)


class Query:
    """One text whose options are to be scored, and what comes of it, their log-probabilities `[options]`.

    Args:
        rows: one for each option; with a `support`, one alone.
        support: score by the classes' prototypes.
        places: of the options among the support's classes.
    """

    def __init__(
        self, rows: list[Row], adapter: Params | None, support: Support | None = None, places: Sequence[int] = ()
    ):
        self.rows, self.adapter, self.support, self.places = rows, adapter, support, places
        self.answer: Future[Tensor] = Future()


class Writing(Generation):
    """A text in the making that somebody waits for, piece by piece."""

    cancelled = False
    error: Exception | None = None

    def take(self, logits: Tensor) -> None:
        try:
            super().take(logits)
        except Exception as error:  # this text's own trouble, and no other's
            self.error, self.finish_reason = error, "error"

    def send_to(self, receive: Callable[[Piece | Exception], None]) -> "Writing":
        self.receive = receive
        return self


class Adaptation:
    """A lesson to be taken in; what comes of it are the weights, and the losses on the way."""

    def __init__(self, lesson: Lesson, steps: int):
        self.lesson, self.steps = lesson, steps
        self.learned: Future[tuple[Params, Losses]] = Future()
