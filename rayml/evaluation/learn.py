"""Learn one new task from a handful of examples, and use it."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rayml.engine import local
from rayml.errors import ConfigError, DataError
from rayml.evaluation.session import Session
from rayml.lm.batch import TaskBatch, collate
from rayml.lm.encode import Encoder
from rayml.lm.load import load_tokenizer, resolve_model
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.peft_files import AdapterCard, load_learned
from rayml.lm.score import OptionBatch
from rayml.meta.adapt import Params, adapt
from rayml.meta.protonet import prototype_logits
from rayml.tasks.episodes import LETTERS, relabel, shown_labels
from rayml.tasks.task import Example, Task


@dataclass(frozen=True)
class Learned:
    """A new task's adapter, or, in mode full, its own copy of what was trained."""

    weights: Params
    card: AdapterCard
    losses: list[float]
    """Support loss before each inner step, and after the last."""
    seconds: float


def learn(session: Session, task: Task, name: str, steps: int | None = None) -> Learned:
    """Take in every example of `task` from the run's learned start, just as training did.

    With `metaicl` and `protonet` the examples themselves are kept, for the prompt or the prototypes.

    Raises:
        DataError: more classes than letters, no classes for protonet, or a target that cannot be learned.
    """
    config, algorithm = session.config, session.config.algorithm.name
    if config.data.labels == "letters" and len(task.options) > len(LETTERS):
        raise DataError(f"task {task.name!r} has {len(task.options)} classes; a run with data.labels=letters knows 26")
    if algorithm == "protonet" and not task.options:
        raise DataError(f"task {task.name!r} is free text; a protonet run tells classes apart")
    session.encoder.check([task])
    shown = shown_labels(task, task.options, config.data.labels)
    examples = [relabel(example, shown.get(example.target)) for example in task.examples]
    at_once = algorithm in ("metaicl", "protonet")
    began = time.perf_counter()
    rows = session.encoder.rows(examples, bool(task.options))
    choices = [session.encoder.choices(shown.values())]
    support = collate([rows], session.encoder.tokenizer.eos_token_id, choices).to(session.device)

    def support_losses(fast: Params) -> torch.Tensor:
        return session.lm.losses(fast, support)

    taken = 0 if at_once else config.inner.steps if steps is None else steps
    adaptation = list(adapt(support_losses, session.start, session.rates, taken, tasks=1))
    seconds = time.perf_counter() - began
    with torch.no_grad():
        last = support_losses(adaptation[-1].fast)
    card = AdapterCard(
        name=name,
        model=config.model.name,
        dtype=config.model.dtype,
        prompt=config.data.prompt,
        max_tokens=config.data.max_tokens,
        labels={label: option for option, label in shown.items()},
        lora=config.lora.shape() if session.lm.lora else {},
        algorithm=algorithm,
        shown=[(example.input, example.target) for example in examples] if at_once else [],
    )
    losses = [float(step.support_losses) for step in adaptation[1:] if step.support_losses is not None]
    weights = {key: weight[0] for key, weight in adaptation[-1].fast.items()}
    return Learned(weights, card, [*losses, float(last)], seconds)


@dataclass(frozen=True)
class Prediction:
    """An answer in the user's own words."""

    text: str
    probabilities: dict[str, float]
    """Of every option, by the user's own label; empty for generated text."""


class Predictor:
    """One learned task's folder on its base, ready to answer."""

    def __init__(self, folder: Path):
        self.weights, self.card, own_model = load_learned(folder)
        base = own_model or resolve_model(self.card.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = local.load(base, self.card.dtype, "sdpa", self.device)
        self.lm = TaskLM(self.module, TaskLoRA(self.module, **self.card.lora) if self.card.lora else None)
        self.encoder = Encoder(load_tokenizer(base), self.card.prompt, self.card.max_tokens)
        adapters = {name: weight.to(self.device).unsqueeze(0) for name, weight in self.weights.items()}
        self.adapters = adapters or None
        self.shown = [Example(text, target) for text, target in self.card.shown]

    def predict(self, text: str, options: list[str] | None = None) -> Prediction:
        """Choose among the task's options, or those given; generate where there are none.

        Raises:
            ConfigError: an option that the task does not have.
        """
        own = {option: label for label, option in self.card.labels.items()}
        unknown = [option for option in options or () if own and option not in own]
        if unknown:
            raise ConfigError(f"--options: {', '.join(unknown)} not among the task's labels: {', '.join(own)}")
        chosen = options or list(own)
        if not chosen:
            return Prediction(self._generate(text), {})
        log_probs = self._log_probs(text, [own.get(option, option) for option in chosen])
        probabilities = dict(zip(chosen, log_probs.exp().tolist(), strict=True))
        return Prediction(max(probabilities, key=lambda option: probabilities[option]), probabilities)

    @torch.no_grad()
    def _log_probs(self, text: str, labels: list[str]) -> torch.Tensor:
        """Return the log-probability of each label, `[C]`."""
        if self.card.algorithm == "protonet":
            return self._by_prototypes(text, labels)
        shown = self.shown if self.card.algorithm == "metaicl" else ()
        batch = OptionBatch(self.encoder, [([text], labels, shown)]).to(self.device)
        return batch.log_probs(self.lm, self.adapters)[0][0]

    def _by_prototypes(self, text: str, labels: list[str]) -> torch.Tensor:
        support = [example for example in self.shown if example.target in labels]
        classes = torch.tensor([[labels.index(example.target) for example in support]], device=self.device)
        sides = [self.lm.states(self.adapters, self._batch(rows)) for rows in (support, [Example(text, labels[0])])]
        return prototype_logits(sides[0], classes, sides[1], len(labels))[0, 0].log_softmax(-1)

    def _batch(self, examples: list[Example]) -> TaskBatch:
        rows = self.encoder.rows(examples, is_label=True)
        return collate([rows], self.encoder.tokenizer.eos_token_id).to(self.device)

    @torch.no_grad()
    def _generate(self, text: str) -> str:
        tokenizer = self.encoder.tokenizer
        row = self.encoder.row(Example(text, "."), is_label=False, shown=self.shown)
        prompt = torch.tensor([row.tokens[: row.start]], device=self.device)
        if self.lm.lora:
            self.lm.lora.adapters = self.adapters
        tokens = self.module.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.card.max_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        return tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True).strip()
