"""A causal language model under the weights that its tasks have learned: T adapters side by side, or all of its own."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import get_layer_types_and_kwargs

from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import Pooling, Read, label_log_probs
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.frozen import FrozenLayers, KnownStates
from rayml.lm.label_losses import MOST_LOGITS, Choices, token_losses
from rayml.lm.label_trie import IGNORE
from rayml.lm.lora import TaskLoRA, layer_number
from rayml.lm.pooling import pool
from rayml.lm.rows import TokenRow
from rayml.lm.sentence import MARK, Sentences
from rayml.lm.soft_prompt import TaskPrompt
from rayml.lm.zero import is_sharded


class TaskLM:
    """Scores target tokens under per-task weights.

    Args:
        module: the causal LM, or the sentence encoder, to call; may be the module of a DeepSpeed engine.
        adapter: the hooks that were put on that model: weights are then adapters of T tasks. None (mode full): they are
            parameters of the model itself, by its own names, of one task at a time.
    """

    def __init__(self, module: Any, adapter: TaskLoRA | TaskPrompt | None):
        self.module, self.adapter = module, adapter
        self.device = next(module.parameters()).device
        config = getattr(module, "module", module).config
        # Attention to both sides would see padding, too.
        is_masked = type(getattr(module, "module", module)).__name__.endswith("ForMaskedLM")
        self.pad: int | None = config.pad_token_id if is_masked else None
        self._positions: Tensor | None = None
        self._hidden: list[Tensor] | None = None
        self._frozen = frozen_layers(module, adapter)
        self.known: KnownStates | None = None
        """What the layers below the adapted ones make of examples that come back; None, and nothing is kept."""
        self.sentences: Sentences | None = getattr(getattr(module, "module", module), MARK, None)
        """How the vectors of a sentence encoder are pooled; None for a language model."""
        if self.sentences is None:
            module.get_output_embeddings().register_forward_pre_hook(self._at_targets)

    def try_out(self) -> None:
        """Try now what the model can do, and not when that is first asked: all workers are here, whose shards it takes,
        and no other thread runs the model."""
        _ = self.packs, self.forks, self.narrow_head

    @cached_property
    def packs(self) -> bool:
        """Whether examples may share a row, seeing nothing of each other: tried with a few tokens.

        Where attention is told the position ids they do not; recurrent layers have no such thing.
        """
        if (
            self.adapter is None
            or self.pad is not None
            or self.sentences
            or limits(self.module) & {"chunked_attention"}
        ):
            return False  # mode full deals a task's rows to the workers; a masked model looks to both sides
        rows = torch.tensor([[1, 2, 1, 5, 3, 4], [4, 4, 2, 5, 3, 4]], device=self.device)
        position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=self.device)
        return self._reads_as_alone([5, 3, 4], rows, position_ids=position_ids)

    @cached_property
    def forks(self) -> bool:
        """Whether branches of a row may see their prompt and themselves alone, by a mask of their own: tried, too.

        A window or chunks of attention would be switched off by it, beyond what a few tokens show.
        """
        if self.pad is not None or self.sentences or limits(self.module):
            return False
        rows = torch.tensor([[5, 3, 2, 1, 4], [5, 3, 1, 2, 4]], device=self.device)
        branch = torch.tensor([0, 0, 1, 1, 2], device=self.device)
        seen = ((branch == 0) | (branch == branch.unsqueeze(1))).tril()
        position_ids = torch.tensor([[0, 1, 2, 3, 2]] * 2, device=self.device)
        return self._reads_as_alone(
            [5, 3, 4],
            rows,
            position_ids=position_ids,
            attention_mask=additive(seen, self.module.dtype).expand(2, 1, 5, 5),
        )

    @cached_property
    @torch.no_grad()
    def plain_head(self) -> bool:
        """Whether logits are what the output layer makes of hidden states, and nothing is done to them: tried, too."""
        if self.sentences or self.adapter is None or is_sharded(next(self.module.parameters())):
            return False  # mode full calls the model under other weights than its own
        hidden: list[Tensor] = []
        rows = torch.tensor([[5, 3, 4]], device=self.device)
        wanted = self.logits_at(torch.arange(3, device=self.device), None, rows, hidden=hidden)
        return torch.equal(self._head(hidden[0].flatten(0, 1)), wanted)

    @cached_property
    def narrow_head(self) -> nn.Linear | None:
        """The output layer, if some of its rows alone make the logits of some tokens."""
        head = getattr(self.module, "module", self.module).get_output_embeddings() if self.plain_head else None
        return head if type(head) is nn.Linear else None

    def _head(self, hidden: Tensor) -> Tensor:
        return getattr(self.module, "module", self.module).get_output_embeddings()(hidden)

    @torch.no_grad()
    def _reads_as_alone(self, tokens: list[int], rows: Tensor, **inputs: Any) -> bool:
        """Return whether the last token of two rows has the logits that it has behind these tokens alone."""
        ends = torch.arange(1, 3, device=self.device) * rows.shape[1] - 1
        try:
            wanted = self.logits_at(ends[:1] * 0 + len(tokens) - 1, None, torch.tensor([tokens], device=self.device))
            found = self.logits_at(ends, None, rows, **inputs)
        except (TypeError, ValueError, RuntimeError):  # it takes no such thing
            return False
        return bool((found.float() - wanted.float()).norm() < 0.02 * wanted.float().norm())

    def _at_targets(self, _head: nn.Module, inputs: tuple[Tensor, ...]):
        """Hand the output layer only the hidden states that predict a target: `[N, L, D]` to `[M, D]`.

        With a vocabulary of 50k to 150k, logits everywhere would be most of the memory and much of the time.
        """
        if self._positions is None:
            return inputs
        (hidden,) = inputs
        if self._hidden is not None:
            self._hidden.append(hidden)
        return (hidden.flatten(0, 1)[self._positions],)

    def logits_at(
        self,
        positions: Tensor,
        weights: Params | None,
        tokens: Tensor,
        frozen: list[Tensor] | None = None,
        hidden: list[Tensor] | None = None,
        only: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Return the logits at some positions of the flattened `tokens` `[N, L]`, `[M]` to `[M, V]`.

        Until the next call the model keeps its adapters, since a checkpointed backward runs parts of the forward anew.

        Args:
            frozen: where the output of the layers below the first adapted one is kept for the next call with the
                same tokens; None forgets it.
            hidden: is given what the output layer would see everywhere, `[N, L, D]`.
            only: tokens `[U]` whose logits are wanted, `[M, U]`: of a label's few, a small part of the vocabulary's
                work. For models with a `narrow_head`.
            inputs: what else the model takes, such as a cache of keys and values.
        """
        if only is not None:
            head, states = self.narrow_head, [] if hidden is None else hidden
            assert head is not None
            self.logits_at(positions[:1], weights, tokens, frozen, states, **inputs)
            return narrow_logits(head, states[0].flatten(0, 1)[positions], only)
        self._positions, self._hidden = positions, hidden
        seen = {"use_cache": False} if self.pad is None else {"attention_mask": (tokens != self.pad).long()}
        try:
            return self._forward(weights, frozen, {"input_ids": tokens} | seen | inputs).logits
        finally:
            self._positions = self._hidden = None

    def _forward(self, weights: Params | None, frozen: list[Tensor] | None, inputs: dict[str, Any]) -> Any:
        if self.adapter is None and weights is not None:
            own = {name: weight.squeeze(0).to(self.module.dtype) for name, weight in weights.items()}
            return torch.func.functional_call(self.module, own, kwargs=inputs)
        if self.adapter is not None:
            self.adapter.begin(weights)
        with self._frozen.known(frozen) if self._frozen else nullcontext():
            return self.module(**inputs)

    def _embed(self, weights: Params | None, batch: TaskBatch, frozen: list[Tensor]) -> Tensor:
        """Return a sentence encoder's last hidden states, `[T * K, L, D]`."""
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.seen.long()}
        return self._forward(weights, frozen, inputs).last_hidden_state

    @property
    def has_frozen_layers(self) -> bool:
        """Whether there are layers below the adapted ones, whose output can be kept."""
        return self._frozen is not None

    @torch.no_grad()
    def frozen_states(self, block: Sequence[TokenRow], pad: int) -> Tensor:
        """Return what the layers below the adapted ones make of rows, one behind the other: `[tokens, D]`."""
        assert self._frozen is not None
        lengths = [len(row.tokens) for row in block]
        batch = collate([[TokenRow(row.tokens, len(row.tokens)) for row in block]], pad).to(self.device)
        slot: list[Tensor] = []
        with self._frozen.alone():
            if self.sentences:
                self._embed(None, batch, slot)
            else:
                self.logits_at(batch.tokens.new_zeros(1), None, batch.tokens, slot)
        return torch.cat([of[:length] for of, length in zip(slot[0], lengths, strict=True)])

    def slot(self, batch: TaskBatch) -> list[Tensor]:
        """Return where the output of a batch's frozen layers is kept: filled, where all of its examples are known."""
        if self.known and not batch.frozen:
            states = self.known.of(batch)
            batch.frozen.extend([] if states is None else [states])
        return batch.frozen

    def target_logits(self, weights: Params | None, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Return the logits that predict the target tokens, `[M, V]`, and their positions in `batch`, `[M]`.

        `weights` are the tasks' `[T, ...]`; None for those of the bare model.
        """
        positions = batch.scored.positions
        return self.logits_at(positions, weights, batch.tokens, self.slot(batch), **position_inputs(batch)), positions

    def states(self, weights: Params | None, batch: TaskBatch, pooling: Pooling = "last") -> Tensor:
        """Return what the model makes of each prompt, `[T, K, D]` in fp32: hidden states as `pooled` has them.

        Of a sentence encoder they are the texts' vectors, of unit length.
        """
        if self.sentences:
            return nn.functional.normalize(self.vectors(weights, batch), dim=-1)
        assert batch.prompts is not None
        hidden: list[Tensor] = []
        ends = batch.prompts[..., 1].flatten()
        self.logits_at(ends, weights, batch.tokens, self.slot(batch), hidden, **position_inputs(batch))
        return pooled(hidden[0], batch, pooling)

    def vectors(self, weights: Params | None, batch: TaskBatch) -> Tensor:
        """Return what a sentence encoder makes of each text, `[T, K, D]` in fp32."""
        assert self.sentences is not None
        hidden = self._embed(weights, batch, self.slot(batch))
        return pool(self.sentences, hidden, batch.seen).unflatten(0, (batch.tasks, -1))

    def read(
        self,
        weights: Params | None,
        batch: TaskBatch,
        pooling: Pooling = "last",
        label_tokens: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> Read:
        """Return losses and states by one forward, and, of `label_tokens` `[T, C]`, the log-probabilities."""
        if self.sentences:
            states = self.states(weights, batch)
            return Read(states.new_zeros(batch.tasks), states, None)
        scored, hidden = batch.scored, list[Tensor]()
        read = weights, batch.tokens, self.slot(batch), hidden
        labels = label_tokens if label_tokens is None else label_tokens.clamp(min=0)
        at_labels = None
        if self.narrow_head:
            chosen = scored.choices
            logits = self.logits_at(scored.positions, *read, chosen.tokens, **position_inputs(batch))
            losses = token_losses(logits, chosen.targets, chosen.allowed, smoothing, known=scored.among)
            if labels is not None:
                assert batch.prompts is not None
                at_labels = narrow_logits(self.narrow_head, hidden[0].flatten(0, 1)[batch.prompts[..., 1]], labels)
        else:
            at = batch.read_at
            logits = self.logits_at(at.positions, *read, **position_inputs(batch))
            losses = token_losses(logits, scored.targets, batch.allowed, smoothing, at.of_targets, scored.among)
            if labels is not None:
                at_labels = logits[at.of_ends.unsqueeze(2), labels.unsqueeze(1)]
        by_label = None if at_labels is None or label_tokens is None else label_log_probs(at_labels, label_tokens)
        return Read(mean_by_task(losses, batch), pooled(hidden[0], batch, pooling), by_label)

    def target_positions(self, batch: TaskBatch) -> Tensor:
        """Return where the flattened tokens of a batch are targets, `[M]`; of sentences, all tokens."""
        where = batch.seen if self.sentences else batch.targets != IGNORE
        return where.flatten().nonzero().squeeze(1)

    @torch.no_grad()
    def target_inputs(self, batch: TaskBatch) -> Params:
        """Return what each adapted linear of the bare base sees at the target positions, `[M, in]` in fp32.

        Linears that read the same have the same tensor.
        """
        positions = self.target_positions(batch)
        seen: Params = {}
        last: list[Tensor] = []

        def keep(name: str):
            def hook(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if not last or inputs[0] is not last[0]:  # queries, keys and values see the same
                    last[:] = inputs[0], inputs[0].flatten(0, 1)[positions].float()
                seen[name] = last[1]

            return hook

        assert self.adapter is not None
        hooks = [linear.register_forward_pre_hook(keep(name)) for name, linear in self.adapter.linears.items()]
        try:
            if self.sentences:
                self._embed(None, batch, self.slot(batch))
            else:
                self.logits_at(positions, None, batch.tokens, self.slot(batch), **position_inputs(batch))
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def losses(self, weights: Params | None, batch: TaskBatch, smoothing: float = 0.0) -> Tensor:
        """Return each task's mean loss, `[T]` in fp32: over its labels, or over the target tokens of free text.

        Args:
            smoothing: share of the target's weight that is spread evenly over the choices.
        """
        scored = batch.scored
        at_a_time = max(1, MOST_LOGITS // self.module.config.get_text_config().vocab_size)
        if not self.sentences and len(scored.among.all) > at_a_time and self.plain_head:
            return mean_by_task(self._losses_in_parts(weights, batch, smoothing, at_a_time), batch)
        chosen = scored.choices
        if chosen.tokens is not None and not self.narrow_head:
            chosen = Choices(None, scored.targets, batch.allowed)
        read = batch.tokens, self.slot(batch), None, chosen.tokens
        logits = self.logits_at(scored.positions, weights, *read, **position_inputs(batch))
        losses = token_losses(logits, chosen.targets, chosen.allowed, smoothing, known=scored.among)
        return mean_by_task(losses, batch)

    def _losses_in_parts(self, weights: Params | None, batch: TaskBatch, smoothing: float, at_a_time: int) -> Tensor:
        """Return the target tokens' losses `[M]`, of the logits of so many at a time."""
        scored, hidden = batch.scored, list[Tensor]()
        self.logits_at(scored.positions[:1], weights, batch.tokens, self.slot(batch), hidden, **position_inputs(batch))
        states = hidden[0].flatten(0, 1)

        def part(first: int) -> Tensor:
            some = slice(first, first + at_a_time)
            allowed = None if batch.allowed is None else batch.allowed[some]
            return token_losses(self._head(states[scored.positions[some]]), scored.targets[some], allowed, smoothing)

        parts = range(0, len(scored.positions), at_a_time)
        return torch.cat([checkpoint(part, first, use_reentrant=False) for first in parts])


def narrow_logits(head: nn.Linear, states: Tensor, tokens: Tensor) -> Tensor:
    """Return the logits of some tokens alone: of states `[M, D]` and tokens `[U]`, `[M, U]`; or of T tasks' `[T, K, D]`
    and each one's own `[T, C]`, `[T, K, C]`."""
    logits = states @ head.weight[tokens].mT
    return logits if head.bias is None else logits + head.bias[tokens].unsqueeze(-2)


def mean_by_task(losses: Tensor, batch: TaskBatch) -> Tensor:
    """Return each task's mean, `[T]`, of the target tokens' losses `[M]`."""
    total = torch.zeros(batch.tasks, device=losses.device).index_add(0, batch.scored.task, losses)
    return total / batch.scored.counts


def pooled(hidden: Tensor, batch: TaskBatch, pooling: Pooling) -> Tensor:
    """Return a vector of unit length, in fp32, for each prompt, `[T, K, D]`: of its last token, or its tokens' mean.

    Args:
        hidden: `[N, L, D]`.
    """
    assert batch.prompts is not None
    flat, (begin, end) = hidden.flatten(0, 1), batch.prompts.unbind(-1)
    if pooling == "last":
        return nn.functional.normalize(flat[end].float(), dim=-1)
    position_ids = begin.unsqueeze(-1) + torch.arange(batch.read_at.longest_prompt, device=begin.device)
    inside = position_ids <= end.unsqueeze(-1)
    total = (flat[position_ids.where(inside, begin.unsqueeze(-1))] * inside.unsqueeze(-1)).float().sum(2)
    return nn.functional.normalize(total, dim=-1)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of what is seen as what is added to attention's scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def limits(module: Any) -> set[str]:
    """Return what keeps a model's layers from seeing all tokens before one: their kinds, or windows in its config."""
    config = getattr(module, "module", module).config.get_text_config()  # a sharded engine's own is another
    kinds = set(get_layer_types_and_kwargs(config)[0]) - {"full_attention"}
    sizes = {name for name, value in config.to_dict().items() if type(value) is int and value > 0}
    return kinds | {name for name in sizes if "window" in name and "layers" not in name}


def position_inputs(batch: TaskBatch) -> dict[str, Any]:
    """Return what tells the model where the examples of a row begin."""
    return {} if batch.position_ids is None else {"position_ids": batch.position_ids}


def hooks(module: Any, lora: dict[str, Any], soft_tokens: int) -> TaskLoRA | TaskPrompt | None:
    """Return the hooks of soft prompts, or of LoRA of a shape, put on a model; None where there is neither."""
    if soft_tokens:
        return TaskPrompt(module, soft_tokens)
    return TaskLoRA(module, **lora) if lora else None


def frozen_layers(module: Any, adapter: TaskLoRA | TaskPrompt | None) -> FrozenLayers | None:
    """Return the layers that no adapter changes, where there are any; ZeRO-3 wants every layer in every forward."""
    first = min(map(layer_number, adapter.linears)) if adapter and adapter.linears else 0
    whole = not any(map(is_sharded, module.parameters()))
    return FrozenLayers(module, first) if first and whole else None
