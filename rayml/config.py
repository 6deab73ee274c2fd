"""The config: one YAML per run, with dotted overrides such as `inner.lr=0.1`. An unknown key is an error that names
the nearest known key.

The sections are in `rayml.sections`.
"""

import copy
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, SerializeAsAny, ValidationError, model_validator

from rayml import yaml12
from rayml.algorithms.base import Algorithm
from rayml.algorithms.registry import DEFAULT, MOVED, REGISTERED, algorithm_class, default_algorithm, parse_algorithm
from rayml.errors import ConfigError
from rayml.overrides import parse_override, refuse_duplicates
from rayml.sections import (
    Data,
    Full,
    Inner,
    Lora,
    Model,
    NotNegativeInt,
    Outer,
    Regularize,
    Run,
    Section,
    SoftPrompt,
    Sweep,
    Validation,
    Zero,
)

if TYPE_CHECKING:
    from rayml.lm.encode import Encoder
    from rayml.runs.files import AnyPath

S = TypeVar("S", bound=BaseModel)
Overrides = Mapping[str, Any] | Sequence[str]
"""Changes to a config: values by dotted or nested keys, or `key=value` texts as on the command line."""
ALGORITHM = "algorithm.name"
"""The section's other keys belong to the named algorithm. So the name is set first, and a new name resets them."""


class Config(Section):
    """The checked settings of a run. `rayml config --keys` prints every key with its default and meaning."""

    model: Model
    data: Data
    run: Run
    mode: Literal["adapters", "full"] = "adapters"
    """What is learned. `adapters`: LoRA, or soft prompts, on a frozen base. `full`: every parameter of the model."""
    adapter: Literal["lora", "soft_prompt"] = "lora"
    """Which kind of adapters."""
    algorithm: Annotated[SerializeAsAny[Algorithm], BeforeValidator(parse_algorithm)] = Field(
        default_factory=default_algorithm
    )
    lora: Lora = Lora()
    soft_prompt: SoftPrompt = SoftPrompt()
    full: Full = Full()
    inner: Inner = Inner()
    outer: Outer = Outer()
    regularize: Regularize = Regularize()
    validation: Validation = Validation()
    zero: Zero = Zero()
    sweep: Sweep = Sweep()
    tasks_per_step: PositiveInt = 4
    """Episodes per outer step, over all workers."""
    workers: PositiveInt | Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] = 1
    """Ray Train workers. Each adapts tasks_per_step / workers tasks. `[2, 8]`: as many as there is room for, from two
    to eight, even while nodes come and go."""
    tasks_at_once: PositiveInt | None = None
    """Tasks that a worker adapts side by side, in one forward; null: all of its tasks. Fewer take less memory and more
    time, with the same meta-gradient. `rayml plan` says how many fit."""
    engine: Literal["local", "zero"] = "local"
    """`local`: the whole model on every worker. `zero`: DeepSpeed ZeRO, which shards the model over the workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: one GPU per worker if the cluster has them, else CPU."""
    seed: NotNegativeInt = 0
    """Of the episodes, of the start's random weights, and of dropout."""

    @model_validator(mode="after")
    def _tasks_divide(self) -> "Config":
        workers = self.most_workers
        if self.tasks_per_step % workers:
            nearest = max(1, round(self.tasks_per_step / workers)) * workers
            raise ValueError(
                f"tasks_per_step: {self.tasks_per_step} is not a multiple of workers={workers}; "
                f"use {nearest}, say, so that every worker has the same number of tasks"
            )
        return self

    def encoder(self, tokenizer: Any) -> "Encoder":
        from rayml.lm.encode import Encoder  # these import torch, which reading a config does not need
        from rayml.lm.sentence import INPUT, sentences_of

        data, in_context = self.data, self.algorithm.keeps == "prompt"
        is_default_prompt = data.prompt == Data.model_fields["prompt"].default
        return Encoder(
            tokenizer,
            INPUT if is_default_prompt and sentences_of(tokenizer) else data.prompt,
            data.max_tokens,
            data.label_loss,
            in_context,
            self.regularize.token_dropout,
            scoring=data.scoring,
            templates=tuple(data.templates.items()),
            labels=data.labels,
            soft_tokens=self.soft_tokens,
            label_names=self.algorithm.label_names > 0 and self.algorithm.readout != "labels",
            texts_in_context=self.algorithm.texts_in_context,
        )

    @model_validator(mode="after")
    def _choices_go_together(self) -> "Config":
        if reasons := list(conflicts(self)):
            raise ValueError("; ".join(reasons))
        return self

    @property
    def learns_inner_lrs(self) -> bool:
        """Whether the inner rates are learned."""
        return self.mode == "adapters" and self.algorithm.learned_rates != "none"

    @property
    def soft_tokens(self) -> int:
        """Number of soft tokens in front of every row."""
        return self.soft_prompt.tokens if self.mode == "adapters" and self.adapter == "soft_prompt" else 0

    @property
    def lora_shape(self) -> dict[str, Any]:
        """What fixes the tensors of LoRA adapters and how they act; empty where there are none."""
        return self.lora.shape() if self.mode == "adapters" and self.adapter == "lora" else {}

    @property
    def is_sharded(self) -> bool:
        """Whether the trained parameters are themselves sharded over the workers."""
        return self.mode == "full" and self.engine == "zero"

    @property
    def fewest_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def tasks_per_worker(self) -> int:
        """Most tasks that one worker adapts in an outer step."""
        return -(-self.tasks_per_step // self.fewest_workers)

    @property
    def tasks_together(self) -> int:
        """Most tasks that one worker adapts side by side; in mode full one at a time."""
        if self.mode == "full":
            return 1
        return min(self.tasks_at_once or self.tasks_per_worker, self.tasks_per_worker)


def conflicts(config: Config) -> Iterator[str]:
    """Yield why settings that are each valid cannot be combined."""
    is_full, sharded, zero = config.mode == "full", config.is_sharded, config.zero
    if config.fewest_workers > config.most_workers:
        yield f"workers: the first of [fewest, most] is larger than the second: {config.workers}"
    if sharded and config.fewest_workers < config.most_workers:
        yield "workers: shards of mode=full with engine=zero are for one number of workers; give one"
    if sharded and config.regularize.adversarial > 0:
        yield "regularize.adversarial: the inner loop of mode=full with engine=zero does not support it"
    if sharded and config.inner.unfreeze_every > 0:
        yield "inner.unfreeze_every: mode=full with engine=zero does not support gradual unfreezing"
    if sharded and config.inner.layer_decay < 1:
        yield "inner.layer_decay: mode=full with engine=zero has the same rate for all layers"
    if config.regularize.lora_dropout > 0 and (is_full or config.adapter != "lora"):
        yield "regularize.lora_dropout: it is for adapter=lora, and mode=adapters"
    if is_full and config.adapter != "lora":
        yield "adapter: mode=full has none"
    if not is_full and config.engine == "zero" and zero.stage != 3:
        yield "zero.stage: adapters leave the base frozen, so only stage 3 saves anything; use zero.stage=3"
    if zero.offload != "none" and not sharded:
        yield "zero.offload: it is for mode=full with engine=zero"
    if zero.offload == "all" and zero.stage != 3:
        yield "zero.offload: all needs zero.stage=3"
    if config.validation.patience > 0 and not config.validation.every:
        yield "validation.patience: without validations (validation.every=0) it never stops"
    yield from config.algorithm.conflicts(config)


def load_config(config: "Config | Mapping[str, Any] | str | AnyPath", overrides: Overrides | None = None) -> Config:
    """Return the checked config of a YAML file, or of nested values, after the overrides.

    Args:
        config: the path or URI of a YAML file, a `Config`, or nested values.
        overrides: `{"inner.lr": 0.1}`, `{"inner": {"lr": 0.1}}`, or `["inner.lr=0.1"]`.

    Raises:
        ConfigError: the file cannot be read, or it has mistakes; the message lists all of them.
    """
    return parse_config(*merged_values(config, overrides))


def read_values(path: "str | AnyPath") -> dict[str, Any]:
    """Return the nested values of a YAML file, or URI, without checking them.

    Raises:
        ConfigError: the file cannot be read, or is not a YAML mapping.
    """
    from rayml.runs.files import parse_path  # pyarrow is slow to import

    try:
        values = yaml12.load(parse_path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8: {error.reason}; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values


def parse_config(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Return the config of nested `values` after the overrides; `source` names it in errors."""
    return parse_section(Config, values, source, overrides)


def parse_section(kind: type[S], values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> S:
    """Return settings of any kind as `parse_config` returns a config."""
    changes = dict(parse_override(override, kind) for override in overrides)
    try:
        return kind.model_validate(with_values(values, changes))
    except ValidationError as error:
        lines = [_explain(details, kind) for details in error.errors()]
        raise ConfigError("\n  ".join([f"{source}: {len(lines)} mistake(s)", *lines])) from None


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads."""
    return yaml12.dump(config.model_dump(mode="json"))


def keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Return every dotted key with its default (`...` if it is required) and its meaning."""
    defaults: dict[str, tuple[Any, str]] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            defaults |= keys(kind, f"{prefix}{name}.")
            if kind is Algorithm:
                defaults |= algorithm_keys(f"{prefix}{name}.")
        else:
            defaults[prefix + name] = (... if field.is_required() else field.default, field.description or "")
    return defaults


def algorithm_keys(prefix: str) -> dict[str, tuple[Any, str]]:
    """Return `keys` for the settings of all registered algorithms; each meaning begins with the algorithms' names."""
    defaults = {prefix + "name": (DEFAULT, Algorithm.model_fields["name"].description or "")}
    owners: dict[str, list[str]] = {}
    for name in REGISTERED:
        for setting, field in algorithm_class(name).model_fields.items():
            owners.setdefault(prefix + setting, []).append(f"{name} (default {field.default!r})")
            defaults.setdefault(prefix + setting, (field.default, field.description or ""))
    del owners[prefix + "name"]  # all have it
    return defaults | {
        key: (defaults[key][0], f"{', '.join(names)}: {defaults[key][1]}") for key, names in owners.items()
    }


def with_values(values: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with the dotted keys of `settings` set, the algorithm before its settings."""
    values = copy.deepcopy(values)
    for key, value in sorted(settings.items(), key=lambda item: item[0] != ALGORITHM):
        algorithm = values.get("algorithm") or {}
        if key == ALGORITHM and isinstance(algorithm, dict) and algorithm.get("name", DEFAULT) != value:
            values["algorithm"] = {}
        section = values
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key}: {parent} is a value, not a section")
        section[last] = value
    return values


def merged_values(
    config: "Config | Mapping[str, Any] | str | AnyPath", overrides: Overrides | None = None, **more: Any
) -> tuple[dict[str, Any], str]:
    """Return the unchecked nested values of a config in any form after all overrides, and its name for errors.

    Args:
        config: the path or URI of a YAML file, a `Config`, or nested values.
        overrides: `{"inner.lr": 0.1}`, `{"inner": {"lr": 0.1}}`, or `["inner.lr=0.1"]`.
        more: overrides as keywords: `workers=2`, `inner={"lr": 0.1}`, `**{"inner.lr": 0.1}`.

    Raises:
        ConfigError: the file cannot be read, or an override is malformed.
    """
    source = "the config"
    if isinstance(config, Config):
        values = config.model_dump(mode="json")
    elif isinstance(config, Mapping):
        values = with_values({}, flatten(config))
    else:
        values, source = read_values(config), str(config)
    if isinstance(overrides, Mapping):
        changes = flatten(overrides)
    else:
        changes = dict(parse_override(override, Config) for override in refuse_duplicates(overrides or ()))
    return with_values(with_values(values, changes), flatten(more)), source


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted keys: `{"inner": {"lr": 0.1}}` and `{"inner.lr": 0.1}` give the same."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in keys()):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return flat


def _explain(error: Any, kind: type[BaseModel]) -> str:
    """Return one line that says what is wrong with which key."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = list(keys(kind)) + list(kind.model_fields)
        if key in MOVED or key in known:
            return f"{key}: {MOVED.get(key, 'no setting of this algorithm')}"
        by_last_part = {name.rsplit(".", 1)[-1]: name for name in known}
        close = difflib.get_close_matches(key, known, n=1)
        if not close:
            close_last_parts = difflib.get_close_matches(key.rsplit(".", 1)[-1], by_last_part, n=1)
            close = [by_last_part[last_part] for last_part in close_last_parts]
        return f"{key}: no such key" + (f"; did you mean {close[0]}?" if close else "")
    if error["type"] == "missing":
        return f"{key}: required, but missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type" and isinstance(error["input"], bool | int | float):
        message += ": quote it in YAML"
    return f"{key}: {message}, got {error['input']!r}" if key and error["type"] != "value_error" else message
