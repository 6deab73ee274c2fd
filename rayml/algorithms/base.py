"""What an algorithm is: it defines how a shared start is learned, and how a new task is learned and answered.

It is also its own section of the config: its fields are its settings, beside `name`. `config.algorithm` is the object.

The least that an algorithm defines is `minibatches`: their schedule. Two engines can run it: plain torch for T
tasks at once, and DeepSpeed one minibatch after the other. An algorithm that is not such a schedule overrides
`meta_gradient`, and then runs in plain torch only.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from rayml.errors import DataError
from rayml.sections import NotNegativeInt, Section

if TYPE_CHECKING:
    from torch import Tensor

    from rayml.algorithms.inner_loop import InnerLoop, Params, TaskLosses
    from rayml.algorithms.meta_gradient import MetaGradient
    from rayml.algorithms.prototypes import Pooling, Read, Readout
    from rayml.config import Config
    from rayml.tasks.task import Task


class Minibatch(NamedTuple):
    """One minibatch of an episode. Its gradient is taken at the weights that those before it have led to."""

    side: Literal["support", "query"]
    share: float = 0.0
    """The factor on its gradient in the meta-gradient; 0 leaves it out."""
    descends: bool = False
    """Whether an inner step on the same gradient follows. Then only what the inner loop changes has a gradient."""


class LabelledStates(Protocol):
    """K rows of each of T tasks, with their classes. Weights are fast weights, `[T, ...]`; None: the bare base."""

    @property
    def classes(self) -> "Tensor":
        """`[T, K]`: each row's class, from 0; -1 for rows of padding, and for free text."""

    def states(self, weights: "Params | None", pooling: "Pooling" = "last") -> "Tensor":
        """Return a hidden state of unit length for each prompt, `[T, K, D]`: the last one before the target, or the
        mean over the prompt."""


class Side(LabelledStates, Protocol):
    """The supports, or the queries, of T episodes in training."""

    @property
    def ways(self) -> int:
        """C: the largest number of classes of a task; at least 1."""

    @property
    def is_name(self) -> "Tensor":
        """`[T, K]` bool: the rows of labels' own texts (`Algorithm.label_names`). Classes are not asked of them."""

    @property
    def is_pair(self) -> "Tensor | None":
        """`[T, K]` bool: rows of two texts, whose states end with how similar these are; None if there are none."""

    @property
    def label_tokens(self) -> "Tensor":
        """`[T, C]`: the first token of each class's label; -1 where a task has no such class."""

    smoothing: float
    """Label smoothing: the share of a target's weight that is spread over its choices."""

    def losses(self, weights: "Params") -> "Tensor":
        """Return each task's loss, `[T]`: the mean over its labels, or over the target tokens of free text."""

    def read(
        self, weights: "Params | None", pooling: "Pooling" = "last", label_tokens: "Tensor | None" = None
    ) -> "Read":
        """Return losses, states, and the log-probabilities of `label_tokens` `[T, C]`, from one forward."""


class QueryBatch(Protocol):
    """The queries of T learned tasks: Q each, to be answered with one of C labels. Weights of None: the bare base."""

    @property
    def shape(self) -> Sequence[tuple[int, int]]:
        """(Q, C) of each task."""

    @property
    def support(self) -> LabelledStates:
        """The support that was kept (`Algorithm.keeps`)."""

    def label_log_probs(self, weights: "Params | None") -> "list[Tensor]":
        """Return the labels' log-probabilities by all of their tokens, `[Q, C]` for each task."""

    def states(self, weights: "Params | None", pooling: "Pooling" = "last") -> "Tensor":
        """Return the hidden state of each query's prompt, `[T, Q, D]`, as `LabelledStates.states`."""

    def read(self, weights: "Params | None", pooling: "Pooling" = "last", labels: bool = False) -> "Read":
        """Return the states and, with `labels`, the labels' log-probabilities by their first tokens."""


class Algorithm(Section):
    """How a start is learned across tasks, and how a new task is learned from it."""

    name: str
    """How the start is learned: a registered name (configs/README.md compares them), or `package.module:Class` of your
    own. The settings of that algorithm stand beside it."""
    readout: Literal["labels", "prototypes", "both"] = "labels"
    """How classes are learned and answered: by the tokens of their labels, by prototypes (how near the hidden state
    before the label is to the mean of each class's examples), or by both. Free text is always learned by its tokens."""
    pooling: Literal["last", "mean"] = "last"
    """The hidden state that prototypes are made of: that of the prompt's last token, or the mean over its tokens."""
    label_names: NotNegativeInt = 0
    """How many examples a label's own text counts as, at most, in the prototype of its class: fewer, the fewer examples
    are nearest to their own label's text, and no more than the class has. It helps sentence encoders where shots are
    few. Labels that are codes or letters are not read, nor are those of inputs in parts."""
    prototype_steps: NotNegativeInt = 80
    """By how many steps the prototypes of a learned task leave the means of the classes' examples, to tell these apart.
    It helps where classes are many. 0: they stay the means."""

    texts_in_context: bool = False
    """Free text is learned and answered with the task's examples in the prompt: each example is predicted from those
    before it, in training and in inner steps, and a query from all (in-context tuning, Chen et al. 2022, arXiv
    2110.07814). Small models hardly write lists, spans or answers otherwise. Labels are learned as ever."""

    takes_steps: ClassVar[bool] = True
    """Whether a new task is learned by the inner loop. If not, all that is learned of it is what `keeps` says."""
    keeps: ClassVar[Literal["nothing", "prompt", "states"]] = "nothing"
    """What answers need of a task's support, beside its weights: its examples in the prompt, or their hidden states."""
    labels_only: ClassVar[bool] = False
    """Whether it only classifies, and cannot learn free text."""
    by_tokens: ClassVar[bool] = True
    """Whether its losses are of label tokens. If not, they are of hidden states, and training computes no logits."""
    second_order: ClassVar[bool] = False
    """Whether it differentiates through the inner loop, and so keeps the graph of every inner step."""

    @property
    def prototypes(self) -> "Readout | None":
        """How classes are read; None if it is by label tokens alone."""
        from rayml.algorithms.prototypes import Readout

        if self.readout == "labels":
            return None
        return Readout(self.readout == "both", self.pooling, self.label_names, self.prototype_steps)

    @property
    def keeps_states(self) -> bool:
        """Whether answers need hidden states of the support: all of them, or the mean of each class."""
        return self.keeps == "states" or self.readout != "labels"

    def keeps_examples(self, is_label: bool) -> bool:
        """Return whether answers need the examples of such a task themselves."""
        return self.keeps != "nothing" or self.shows_examples(is_label)

    def shows_examples(self, is_label: bool) -> bool:
        """Return whether the examples of such a task stand in the prompt of its queries."""
        return self.keeps == "prompt" or (self.texts_in_context and not is_label)

    @property
    def scores_options(self) -> bool:
        """Whether answers need all tokens of every label, and not just the prompt."""
        return self.by_tokens and self.readout == "labels"

    @property
    def learned_rates(self) -> Literal["none", "tensor", "weight"]:
        """What has a learned inner rate of its own: nothing, each tensor, or each weight."""
        return "none"

    def conflicts(self, config: "Config") -> Iterator[str]:
        """Yield why it cannot be combined with other choices of the config, each as `key: reason`."""
        if config.mode == "full" and not self.runs_sharded:
            yield (
                "algorithm.name: mode=full can learn label tokens only, to first order, with one inner rate for all "
                f"(fomaml, fomaml_plus, reptile, multitask; readout=labels), not {self.name}"
            )
        if self.readout != "labels" and self.keeps != "nothing":
            yield f"algorithm.readout: {self.name} answers in its own way; leave it at labels"
        if self.readout == "both" and config.data.scoring != "learned":
            yield "data.scoring: readout=both reads labels in the way they are learned; use scoring=learned"
        if config.regularize.adversarial and not self.takes_steps:
            yield f"regularize.adversarial: {self.name} has no inner loop, and so no use for it"

    def check(self, tasks: "Iterable[Task]") -> None:
        """Raise DataError for a task that the algorithm cannot learn or answer."""
        texts = [task.name for task in tasks if not task.options]
        if self.labels_only and texts:
            raise DataError(
                f"task {texts[0]!r} is free text; {self.name} tells classes apart: leave the task out, or use another "
                "algorithm"
            )

    @property
    def runs_sharded(self) -> bool:
        """Whether `minibatches` of plain losses define all that is learned: that is all that a sharded engine runs."""
        methods = "meta_gradient", "support_losses", "query_losses"
        is_plain = all(getattr(type(self), method) is getattr(Algorithm, method) for method in methods)
        is_plain &= not self.texts_in_context and self.keeps == "nothing"
        return is_plain and not self.keeps_states and self.learned_rates != "weight"

    def minibatches(self, steps: int) -> list[Minibatch]:
        """Return the minibatches of an episode, in order. `steps` is the config's `inner.steps`."""
        raise NotImplementedError

    def support_losses(self, support: Side) -> "TaskLosses":
        """Return the losses that an inner step descends, in training and afterwards; fast weights to `[T]`."""
        return self.prototypes.support_losses(support) if self.prototypes else support.losses

    def query_losses(self, support: Side, query: Side) -> "TaskLosses":
        """Return the losses that the meta-gradient is of; fast weights to `[T]`."""
        return self.prototypes.query_losses(support, query) if self.prototypes else query.losses

    def meta_gradient(
        self, support: Side, query: Side, start: "Params", inner: "InnerLoop", weights: "Tensor"
    ) -> "MetaGradient":
        """Return the meta-gradient of T episodes, to first order, over the minibatches.

        Args:
            start: the shared start, `[...]` each.
            weights: `[T]`, of the tasks in the sum.
        """
        from rayml.algorithms.meta_gradient import first_order

        losses = {"support": self.support_losses(support), "query": self.query_losses(support, query)}
        return first_order(self.minibatches(inner.steps), losses, start, inner, weights)

    def answer(self, queries: QueryBatch, weights: "Params | None") -> "list[Tensor]":
        """Return the log-probabilities of each query's labels, `[Q, C]` for each task, without gradients."""
        return self.prototypes.answer(queries, weights) if self.prototypes else queries.label_log_probs(weights)

    def kept(self, support: Side, weights: "Params | None") -> "list[Params]":
        """Return what answers need of each learned task's support, beside its weights, without gradients."""
        return self.prototypes.kept(support, weights) if self.prototypes else [{} for _ in support.classes]

    def can_share_batch(self, other: "Algorithm") -> bool:
        """Return whether one batch may hold queries of both algorithms."""
        is_plain = [
            type(algorithm).answer is Algorithm.answer and algorithm.readout == "labels" for algorithm in (self, other)
        ]
        return self == other or all(is_plain)

    def settings(self) -> dict[str, Any]:
        """Return the settings without the name."""
        return self.model_dump(mode="json", exclude={"name"})

    def inner_steps(self, steps: int) -> int:
        """Return how many inner steps an episode takes in training."""
        return sum(minibatch.descends for minibatch in self.minibatches(steps))

    def passes(self, steps: int) -> tuple[int, int]:
        """Return how often training runs forward and backward over an episode's support, and over its query."""
        sides = [minibatch.side for minibatch in self.minibatches(steps)]
        query = sides.count("query")
        return sides.count("support") + query * self.keeps_states, query


def group_minibatches(minibatches: Sequence[Minibatch]) -> list[list[Minibatch]]:
    """Return the minibatches in groups that can share a batch: no inner step is taken between them."""
    groups: list[list[Minibatch]] = []
    for minibatch in minibatches:
        if groups and not minibatch.descends and not groups[-1][-1].descends:
            groups[-1].append(minibatch)
        else:
            groups.append([minibatch])
    return groups
