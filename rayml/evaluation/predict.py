"""Answer with one learned task's folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rayml.algorithms.registry import algorithm_of
from rayml.engine import local
from rayml.errors import ConfigError
from rayml.lm.ask import AskedTasks, Kept
from rayml.lm.decode import Decoder
from rayml.lm.generate import Generation, end_tokens
from rayml.lm.load import load_tokenizer, resolve_model
from rayml.lm.lora import side_by_side
from rayml.lm.model import TaskLM, hooks
from rayml.lm.peft_files import encoder_of, load_learned
from rayml.lm.precision import decide, has_sdpa, look_at, widest_linear
from rayml.lm.sampling import Sampling
from rayml.tasks.row import unanswered
from rayml.tasks.task import Example


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
        self.precision = decide(
            ("auto", "auto"), [look_at(self.device, widest_linear(base))], self.card.dtype, sdpa=has_sdpa(base)
        )
        self.module = local.load(base, self.precision.dtype, self.precision.attention, self.device)
        self.lm = TaskLM(self.module, hooks(self.module, self.card.lora, self.card.soft_tokens))
        self.encoder = encoder_of(self.card, load_tokenizer(base))
        self.weights = {name: weight.to(self.device) for name, weight in self.weights.items()}
        self.adapters = side_by_side([self.weights or None])
        self.shown = self.card.examples()
        self.algorithm = algorithm_of(self.card.algorithm, self.card.settings)

    def predict(self, given: Any, options: list[str] | None = None) -> Prediction:
        """Choose among the task's options, or those given; generate where there are none.

        Args:
            given: a text, fields by their names, or the (role, text) of a dialogue's turns.

        Raises:
            ConfigError: an option that the task does not have.
        """
        own = {option: label for label, option in self.card.labels.items()}
        unknown = [option for option in options or () if own and option not in own]
        if unknown:
            raise ConfigError(f"--options: {', '.join(unknown)} not among the task's labels: {', '.join(own)}")
        chosen, example = options or list(own), unanswered(given)
        if not chosen:
            return Prediction(self._generate(example), {})
        log_probs = self._log_probs(example, [own.get(option, option) for option in chosen])
        probabilities = dict(zip(chosen, log_probs.exp().tolist(), strict=True))
        return Prediction(max(probabilities, key=lambda option: probabilities[option]), probabilities)

    def _log_probs(self, example: Example, labels: list[str]) -> torch.Tensor:
        """Return the log-probability of each label, `[C]`."""
        shown = self.shown if self.algorithm.keeps == "prompt" else ()
        kept = []
        if self.algorithm.keeps == "states":
            classes = [labels.index(one.target) if one.target in labels else -1 for one in self.shown]
            kept = [Kept(self.encoder.rows(self.shown, is_label=True), classes)]
        asked = AskedTasks(self.lm, self.encoder, [self.encoder.questions([example], labels, shown)], kept)
        return self.algorithm.answer(asked, self.adapters)[0][0]

    def _generate(self, example: Example) -> str:
        prompt, sampling = self.encoder.asked(example, self.shown), Sampling(self.card.max_tokens)
        tokenizer = self.encoder.tokenizer
        ends = end_tokens(self.module, tokenizer)
        generation = Generation(tokenizer, prompt, self.weights or None, sampling, ends)
        decoder = Decoder(self.lm, most_rows=1, cache_tokens=0)
        decoder.join([generation])
        while not generation.finish_reason:
            decoder.step()
        return generation.piece().text.strip()
