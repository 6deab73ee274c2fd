"""A language model called with the weights of its tasks: T adapters side by side, or parameters of its own."""

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
from rayml.lm.pooling import add_similarity, pool_prompts, pool_sentences
from rayml.lm.rows import TokenRow
from rayml.lm.sentence import SENTENCES_KEY, Sentences
from rayml.lm.soft_prompt import TaskPrompt
from rayml.lm.zero import is_sharded


class TaskLM:
    """Scores target tokens under per-task weights.

    Args:
        module: the language model, or sentence encoder, to call; a DeepSpeed engine, or its module, works too.
        adapter: the hooks on that model; weights are then adapters of T tasks. None (mode full): weights are parameters
            of the model by its own names, for one task at a time.
    """

    def __init__(self, module: Any, adapter: TaskLoRA | TaskPrompt | None):
        self.module, self.adapter = module, adapter
        self.device = next(module.parameters()).device
        self._model = getattr(module, "module", module)  # inside of an engine
        is_masked = type(self._model).__name__.endswith("ForMaskedLM")
        self.pad: int | None = self._model.config.pad_token_id if is_masked else None
        """The token that a masked model's attention, which goes both ways, must not see; None for other models."""
        self._positions: Tensor | None = None
        self._hidden: list[Tensor] | None = None
        self._frozen = frozen_layers(module, adapter)
        self.known: KnownStates | None = None
        """The frozen layers' output for examples that come back; None keeps nothing across batches."""
        self.sentences: Sentences | None = getattr(self._model, SENTENCES_KEY, None)
        """How the vectors of a sentence encoder are pooled; None for a language model."""
        if self.sentences is None:
            module.get_output_embeddings().register_forward_pre_hook(self._select_positions)

    def probe(self) -> None:
        """Find out now what the model can do, rather than at first use.

        Later, other workers, whose shards a forward needs, may be elsewhere, or another thread may run the model.
        """
        _ = self.packs, self.forks, self.narrow_head

    @cached_property
    def packs(self) -> bool:
        """Whether several examples may share a row without seeing each other: tried with a few tokens.

        It works where attention takes position ids into account. Recurrent layers do not.
        """
        if self.adapter is None:
            return False  # mode full deals a task's rows to the workers
        if self.pad is not None or self.sentences or "chunked_attention" in attention_limits(self._model):
            return False
        rows = torch.tensor([[1, 2, 1, 5, 3, 4], [4, 4, 2, 5, 3, 4]], device=self.device)
        position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=self.device)
        return self._matches_alone([5, 3, 4], rows, position_ids=position_ids)

    @cached_property
    def forks(self) -> bool:
        """Whether a mask can make branches of a row see only their prompt and themselves: tried with a few tokens.

        The mask would switch off windows or chunks of attention, which a few tokens would not show.
        """
        if self.pad is not None or self.sentences or attention_limits(self._model):
            return False
        rows = torch.tensor([[5, 3, 2, 1, 4], [5, 3, 1, 2, 4]], device=self.device)
        branch = torch.tensor([0, 0, 1, 1, 2], device=self.device)
        visible = ((branch == 0) | (branch == branch.unsqueeze(1))).tril()
        position_ids = torch.tensor([[0, 1, 2, 3, 2]] * 2, device=self.device)
        mask = additive_mask(visible, self.module.dtype).expand(2, 1, 5, 5)
        return self._matches_alone([5, 3, 4], rows, position_ids=position_ids, attention_mask=mask)

    @cached_property
    @torch.no_grad()
    def plain_head(self) -> bool:
        """Whether logits are the plain output of the output layer, without a cap or scale: tried with a few tokens."""
        if self.sentences or self.adapter is None or is_sharded(next(self.module.parameters())):
            return False  # mode full calls the model with other weights than the output layer holds
        hidden: list[Tensor] = []
        rows = torch.tensor([[5, 3, 4]], device=self.device)
        logits = self.logits_at(torch.arange(3, device=self.device), None, rows, hidden=hidden)
        return torch.equal(self._model.get_output_embeddings()(hidden[0].flatten(0, 1)), logits)

    @cached_property
    def narrow_head(self) -> nn.Linear | None:
        """The output layer, if the logits of some tokens can be computed from its rows for those tokens alone."""
        head = self._model.get_output_embeddings() if self.plain_head else None
        return head if type(head) is nn.Linear else None

    @torch.no_grad()
    def _matches_alone(self, tokens: list[int], rows: Tensor, **inputs: Any) -> bool:
        """Return whether the last tokens of two rows get the logits that `tokens` alone lead to."""
        ends = torch.arange(1, 3, device=self.device) * rows.shape[1] - 1
        try:
            expected = self.logits_at(ends[:1] * 0 + len(tokens) - 1, None, torch.tensor([tokens], device=self.device))
            logits = self.logits_at(ends, None, rows, **inputs)
        except (TypeError, ValueError, RuntimeError):  # the model does not take these inputs
            return False
        return bool((logits.float() - expected.float()).norm() < 0.02 * expected.float().norm())

    def _select_positions(self, _head: nn.Module, inputs: tuple[Tensor, ...]):
        """Pass only the hidden states at `_positions` to the output layer: `[N, L, D]` to `[M, D]`.

        With a vocabulary of 50k to 150k, logits of all positions would take most of the memory and much of the time.
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
        """Return the logits `[M, V]` at `positions` `[M]` of the flattened `tokens` `[N, L]`.

        The model keeps its adapters until the next call, since a checkpointed backward repeats parts of the forward.

        Args:
            frozen: holds the output of the layers below the first adapted one for the next call with the same tokens;
                None does not keep it.
            hidden: a list that receives the last hidden states of all positions, `[N, L, D]`.
            only: tokens `[U]`: compute their logits alone, `[M, U]`. Labels use few tokens of a large vocabulary.
                The model needs a `narrow_head`.
            inputs: further arguments of the model, such as a cache of keys and values.
        """
        if only is not None:
            head, states = self.narrow_head, [] if hidden is None else hidden
            assert head is not None
            self.logits_at(positions[:1], weights, tokens, frozen, states, **inputs)
            return narrow_logits(head, states[0].flatten(0, 1)[positions], only)
        self._positions, self._hidden = positions, hidden
        defaults = {"use_cache": False} if self.pad is None else {"attention_mask": (tokens != self.pad).long()}
        try:
            return self._forward(weights, frozen, {"input_ids": tokens} | defaults | inputs).logits
        finally:
            self._positions = self._hidden = None

    def _forward(self, weights: Params | None, frozen: list[Tensor] | None, inputs: dict[str, Any]) -> Any:
        if self.adapter is None and weights is not None:
            parameters = {name: weight.squeeze(0).to(self.module.dtype) for name, weight in weights.items()}
            return torch.func.functional_call(self.module, parameters, kwargs=inputs)
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
        """Whether there are layers below the adapted ones, so that their output can be kept."""
        return self._frozen is not None

    @torch.no_grad()
    def frozen_states(self, block: Sequence[TokenRow], pad: int) -> Tensor:
        """Return the output of the layers below the adapted ones for all tokens of some rows: `[tokens, D]`."""
        assert self._frozen is not None
        lengths = [len(row.tokens) for row in block]
        batch = collate([[TokenRow(row.tokens, len(row.tokens)) for row in block]], pad).to(self.device)
        slot: list[Tensor] = []
        with self._frozen.alone():
            if self.sentences:
                self._embed(None, batch, slot)
            else:
                self.logits_at(batch.tokens.new_zeros(1), None, batch.tokens, slot)
        return torch.cat([states[:length] for states, length in zip(slot[0], lengths, strict=True)])

    def slot(self, batch: TaskBatch) -> list[Tensor]:
        """Return the list that keeps a batch's frozen output; it is filled already if all examples are known."""
        if self.known and not batch.frozen:
            states = self.known.of(batch)
            batch.frozen.extend([] if states is None else [states])
        return batch.frozen

    def _batch_logits(
        self,
        positions: Tensor,
        weights: Params | None,
        batch: TaskBatch,
        hidden: list[Tensor] | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Return what `logits_at` does, for the tokens of a batch."""
        inputs = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        return self.logits_at(positions, weights, batch.tokens, self.slot(batch), hidden, only, **inputs)

    def target_logits(self, weights: Params | None, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Return the logits that predict the target tokens, `[M, V]`, and their positions in `batch`, `[M]`.

        `weights` are the tasks' `[T, ...]`; None for those of the bare model.
        """
        positions = batch.scored.positions
        return self._batch_logits(positions, weights, batch), positions

    def states(self, weights: Params | None, batch: TaskBatch, pooling: Pooling = "last") -> Tensor:
        """Return a vector of unit length for each prompt, `[T, K, D]` in fp32.

        It is a pooled hidden state (`pool_prompts`), or a sentence encoder's vector of the text, followed by how
        similar the texts of a pair are, `[T, K, D + 1]` (`add_similarity`).
        """
        if self.sentences:
            vectors = nn.functional.normalize(self.vectors(weights, batch), dim=-1)
            return add_similarity(vectors, self._pair_vectors(batch), batch.is_pair)
        assert batch.prompts is not None
        hidden: list[Tensor] = []
        ends = batch.prompts[..., 1].flatten()
        self._batch_logits(ends, weights, batch, hidden)
        return pool_prompts(hidden[0], batch, pooling)

    @torch.no_grad()
    def _pair_vectors(self, batch: TaskBatch) -> Tensor | None:
        """Return the bare encoder's vectors of the texts of pairs: adapted ones diverge, and rank pairs no better."""
        return None if batch.pairs is None else self.vectors(None, batch.pairs)

    def vectors(self, weights: Params | None, batch: TaskBatch) -> Tensor:
        """Return a sentence encoder's vector of each text, `[T, K, D]` in fp32."""
        assert self.sentences is not None
        hidden = self._embed(weights, batch, self.slot(batch))
        return pool_sentences(self.sentences, hidden, batch.seen).unflatten(0, (batch.tasks, -1))

    def read(
        self,
        weights: Params | None,
        batch: TaskBatch,
        pooling: Pooling = "last",
        label_tokens: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> Read:
        """Return losses and states from one forward, and the log-probabilities of `label_tokens` `[T, C]`, if given."""
        if self.sentences:
            states = self.states(weights, batch)
            return Read(states.new_zeros(batch.tasks), states, None)
        scored, hidden = batch.scored, list[Tensor]()
        labels = label_tokens if label_tokens is None else label_tokens.clamp(min=0)
        label_logits = None
        if self.narrow_head:
            choices = scored.choices
            logits = self._batch_logits(scored.positions, weights, batch, hidden, choices.tokens)
            losses = token_losses(logits, choices.targets, choices.allowed, smoothing, known=scored.among)
            if labels is not None:
                assert batch.prompts is not None
                label_logits = narrow_logits(self.narrow_head, hidden[0].flatten(0, 1)[batch.prompts[..., 1]], labels)
        else:
            read_at = batch.read_at
            logits = self._batch_logits(read_at.positions, weights, batch, hidden)
            losses = token_losses(logits, scored.targets, batch.allowed, smoothing, read_at.of_targets, scored.among)
            if labels is not None:
                label_logits = logits[read_at.of_ends.unsqueeze(2), labels.unsqueeze(1)]
        by_label = None if label_logits is None or label_tokens is None else label_log_probs(label_logits, label_tokens)
        return Read(mean_by_task(losses, batch), pool_prompts(hidden[0], batch, pooling), by_label)

    def target_positions(self, batch: TaskBatch) -> Tensor:
        """Return the positions of targets in a batch's flattened tokens, `[M]`; of all tokens of sentences."""
        is_target = batch.seen if self.sentences else batch.targets != IGNORE
        return is_target.flatten().nonzero().squeeze(1)

    @torch.no_grad()
    def target_inputs(self, batch: TaskBatch) -> Params:
        """Return the inputs of each adapted linear of the bare base at the target positions, `[M, in]` in fp32.

        Linears with the same input, such as queries, keys and values, share one tensor.
        """
        positions = self.target_positions(batch)
        by_linear: Params = {}
        last: list[Tensor] = []

        def record(name: str):
            def hook(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if not last or inputs[0] is not last[0]:
                    last[:] = inputs[0], inputs[0].flatten(0, 1)[positions].float()
                by_linear[name] = last[1]

            return hook

        assert self.adapter is not None
        handles = [linear.register_forward_pre_hook(record(name)) for name, linear in self.adapter.linears.items()]
        try:
            if self.sentences:
                self._embed(None, batch, self.slot(batch))
            else:
                self._batch_logits(positions, None, batch)
        finally:
            for handle in handles:
                handle.remove()
        return by_linear

    def losses(self, weights: Params | None, batch: TaskBatch, smoothing: float = 0.0) -> Tensor:
        """Return each task's mean loss, `[T]` in fp32: over its labels, or over the target tokens of free text.

        Args:
            smoothing: share of the target's weight that is spread evenly over the choices.
        """
        scored = batch.scored
        chunk = max(1, MOST_LOGITS // self._model.config.get_text_config().vocab_size)
        if not self.sentences and len(scored.among.all) > chunk and self.plain_head:
            return mean_by_task(self._losses_in_chunks(weights, batch, smoothing, chunk), batch)
        choices = scored.choices
        if choices.tokens is not None and not self.narrow_head:
            choices = Choices(None, scored.targets, batch.allowed)
        logits = self._batch_logits(scored.positions, weights, batch, only=choices.tokens)
        losses = token_losses(logits, choices.targets, choices.allowed, smoothing, known=scored.among)
        return mean_by_task(losses, batch)

    def _losses_in_chunks(self, weights: Params | None, batch: TaskBatch, smoothing: float, chunk: int) -> Tensor:
        """Return the target tokens' losses `[M]`; only the logits of one chunk of targets are in memory at a time."""
        scored, hidden = batch.scored, list[Tensor]()
        self._batch_logits(scored.positions[:1], weights, batch, hidden)
        states, head = hidden[0].flatten(0, 1), self._model.get_output_embeddings()

        def chunk_losses(first: int) -> Tensor:
            targets = slice(first, first + chunk)
            allowed = None if batch.allowed is None else batch.allowed[targets]
            return token_losses(head(states[scored.positions[targets]]), scored.targets[targets], allowed, smoothing)

        firsts = range(0, len(scored.positions), chunk)
        return torch.cat([checkpoint(chunk_losses, first, use_reentrant=False) for first in firsts])


def narrow_logits(head: nn.Linear, states: Tensor, tokens: Tensor) -> Tensor:
    """Return the logits of some tokens alone.

    States `[M, D]` and tokens `[U]` give `[M, U]`; for T tasks, `[T, K, D]` and `[T, C]` give `[T, K, C]`.
    """
    logits = states @ head.weight[tokens].mT
    return logits if head.bias is None else logits + head.bias[tokens].unsqueeze(-2)


def mean_by_task(losses: Tensor, batch: TaskBatch) -> Tensor:
    """Return each task's mean loss, `[T]`, of the target tokens' losses `[M]`."""
    total = torch.zeros(batch.tasks, device=losses.device).index_add(0, batch.scored.task, losses)
    return total / batch.scored.counts


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to be added to attention scores, from a boolean mask of what is visible."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def attention_limits(model: Any) -> set[str]:
    """Return what stops layers from attending to all earlier tokens: their kinds, or windows in the config."""
    config = model.config.get_text_config()
    kinds = set(get_layer_types_and_kwargs(config)[0]) - {"full_attention"}
    sizes = {name for name, value in config.to_dict().items() if type(value) is int and value > 0}
    return kinds | {name for name in sizes if "window" in name and "layers" not in name}


def hooks(module: Any, lora: dict[str, Any], soft_tokens: int) -> TaskLoRA | TaskPrompt | None:
    """Put hooks for a soft prompt, or for LoRA of a shape, on a model, and return them; None if it has neither."""
    if soft_tokens:
        return TaskPrompt(module, soft_tokens)
    return TaskLoRA(module, **lora) if lora else None


def frozen_layers(module: Any, adapter: TaskLoRA | TaskPrompt | None) -> FrozenLayers | None:
    """Return the layers below the first adapted one; None if there are none, or under ZeRO-3.

    ZeRO-3 needs every layer in every forward.
    """
    first = min(map(layer_number, adapter.linears)) if adapter and adapter.linears else 0
    whole = not any(map(is_sharded, module.parameters()))
    return FrozenLayers(module, first) if first and whole else None
