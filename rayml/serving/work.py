"""What waits for the model: queries to classify, texts to write, adapters to learn."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import Tensor

from rayml.algorithms.base import Algorithm
from rayml.evaluation.learn import Lesson, Losses
from rayml.lm.ask import Kept
from rayml.lm.batch import Row
from rayml.lm.generate import Generation
from rayml.lm.sampling import Piece
from rayml.meta.adapt import Params


class Query:
    """One text whose options are to be scored, and what comes of it, their log-probabilities `[options]`.

    Args:
        rows: one for each option; or one alone, where nothing but what the algorithm keeps is answered by.
        algorithm: answers.
        kept: the adapter's support, where the algorithm keeps hidden states; they are taken once.
        places: of the options among the classes of that support.
    """

    def __init__(
        self,
        rows: list[Row],
        adapter: Params | None,
        algorithm: Algorithm,
        kept: Kept | None = None,
        places: Sequence[int] = (),
    ):
        self.rows, self.adapter, self.algorithm, self.kept, self.places = rows, adapter, algorithm, kept, places
        self.answer: Future[Tensor] = Future()

    @property
    def options(self) -> int:
        return len(self.places) or len(self.rows)

    def support(self) -> Kept | None:
        """Return the support with the classes as numbers of the options that are asked for."""
        if self.kept is None:
            return None
        classes = [self.places.index(kind) if kind in self.places else -1 for kind in self.kept.classes]
        return Kept(self.kept.rows, classes, self.kept.states)


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
