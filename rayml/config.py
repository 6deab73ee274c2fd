"""One YAML a run, with dotted overrides `inner.lr=0.1`. Few keys; an unknown one is an error that names the nearest.

The sections lie in `rayml.sections`.
"""

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, SerializeAsAny, ValidationError
from pydantic import model_validator as whole

from rayml import yaml12
from rayml.algorithms.base import Algorithm
from rayml.algorithms.registry import DEFAULT, MOVED, REGISTERED, algorithm_class, chosen, default
from rayml.errors import ConfigError
from rayml.overrides import once, parsed
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
"""What is changed of a config: values by dotted or nested keys, or `key=value` texts as on the command line."""
ALGORITHM = "algorithm.name"
"""What is set beside it are settings of that algorithm: so it is set first, and a change of it forgets them."""


class Config(Section):
    """A run's settings, checked; one YAML a run. `rayml config --keys` prints every key, its default and meaning."""

    model: Model
    data: Data
    run: Run
    mode: Literal["adapters", "full"] = "adapters"
    """What is learned. `adapters`: LoRA, or soft prompts, on a frozen base. `full`: every parameter of the model."""
    adapter: Literal["lora", "soft_prompt"] = "lora"
    """What kind of adapters."""
    algorithm: Annotated[SerializeAsAny[Algorithm], BeforeValidator(chosen)] = Field(default_factory=default)
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
    """Episodes in an outer step, over all workers."""
    workers: PositiveInt | Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] = 1
    """Ray Train workers. Each adapts tasks_per_step / workers tasks. `[2, 8]`: as many as there is room for, from two
    to eight, also when nodes are lost or come back."""
    tasks_at_once: PositiveInt | None = None
    """Tasks that a worker adapts side by side, in one forward; null: all of its own. Fewer take less memory and more
    time, and come to the same meta-gradient. `rayml plan` says how many fit."""
    engine: Literal["local", "zero"] = "local"
    """`local`: the whole model on every worker. `zero`: DeepSpeed ZeRO, the model sharded over the workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: one GPU a worker where the cluster has them, else CPU."""
    seed: NotNegativeInt = 0

    @whole(mode="after")
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
        from rayml.lm.encode import Encoder  # torch and all: reading a config needs none of it
        from rayml.lm.sentence import INPUT, sentences_of

        data, in_context = self.data, self.algorithm.keeps == "prompt"
        is_usual = data.prompt == Data.model_fields["prompt"].default
        return Encoder(
            tokenizer,
            INPUT if is_usual and sentences_of(tokenizer) else data.prompt,
            data.max_tokens,
            data.label_loss,
            in_context,
            self.regularize.token_dropout,
            scoring=data.scoring,
            templates=tuple(data.templates.items()),
            labels=data.labels,
            soft_tokens=self.soft_tokens,
        )

    @whole(mode="after")
    def _choices_go_together(self) -> "Config":
        reasons = impossible(self)
        if reasons:
            raise ValueError("; ".join(reasons))
        return self

    @property
    def learns_inner_lrs(self) -> bool:
        """Whether inner rates are learned."""
        return self.mode == "adapters" and self.algorithm.learned_rates != "none"

    @property
    def soft_tokens(self) -> int:
        """Soft tokens in front of every row."""
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
        """The most that one worker adapts in an outer step."""
        return -(-self.tasks_per_step // self.fewest_workers)

    @property
    def tasks_together(self) -> int:
        """The most that one worker adapts side by side; mode full takes them one by one."""
        if self.mode == "full":
            return 1
        return min(self.tasks_at_once or self.tasks_per_worker, self.tasks_per_worker)


def impossible(config: Config) -> list[str]:
    """Return why choices that are each fine do not go together."""
    full = config.mode == "full"
    rules = {
        f"workers: the first of [fewest, most] is larger than the second: {config.workers}": config.fewest_workers
        > config.most_workers,
        "workers: shards of mode=full with engine=zero are for one number of workers; give one": config.is_sharded
        and config.fewest_workers < config.most_workers,
        "regularize.adversarial: the inner loop of mode=full with engine=zero knows none": config.is_sharded
        and config.regularize.adversarial > 0,
        "inner.unfreeze_every: mode=full with engine=zero unfreezes nothing gradually": config.is_sharded
        and config.inner.unfreeze_every > 0,
        "inner.layer_decay: mode=full with engine=zero has one rate": config.inner.layer_decay < 1
        and config.is_sharded,
        "regularize.lora_dropout: it is for adapter=lora, and mode=adapters": (full or config.adapter != "lora")
        and config.regularize.lora_dropout > 0,
        "adapter: mode=full has none": full and config.adapter != "lora",
        "zero.stage: adapters leave the base frozen, so only stage 3 saves anything; use zero.stage=3": not full
        and config.engine == "zero"
        and config.zero.stage != 3,
        "zero.offload: it is for mode=full with engine=zero": config.zero.offload != "none" and not config.is_sharded,
        "zero.offload: all needs zero.stage=3": config.zero.offload == "all" and config.zero.stage != 3,
        "validation.patience: without validations (validation.every=0) it never stops": config.validation.patience > 0
        and not config.validation.every,
    }
    return [reason for reason, holds in rules.items() if holds] + list(config.algorithm.refuses(config))


def load_config(config: "Config | Mapping[str, Any] | str | AnyPath", overrides: Overrides | None = None) -> Config:
    """Return the checked config of a YAML file, or of nested values, after the overrides.

    Args:
        config: the path or URI of a YAML file, a `Config`, or nested values.
        overrides: `{"inner.lr": 0.1}`, `{"inner": {"lr": 0.1}}`, or `["inner.lr=0.1"]`.

    Raises:
        ConfigError: the file cannot be read, or with every mistake in it.
    """
    return parse_config(*values_of(config, overrides))


def read_values(path: "str | AnyPath") -> dict[str, Any]:
    """Return the nested values of a YAML file, or URI, not checked yet.

    Raises:
        ConfigError: the file cannot be read, or is no YAML of keys and values.
    """
    from rayml.runs.files import as_path  # pyarrow is slow to import

    try:
        values = yaml12.load(as_path(path).read_text(encoding="utf-8")) or {}
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
    """Return the config that nested `values` give after the overrides; `source` names them in the errors."""
    return parse_section(Config, values, source, overrides)


def parse_section(kind: type[S], values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> S:
    """Return settings of any kind, as `parse_config` does."""
    values = copy.deepcopy(values)
    _override_all(values, overrides, kind)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(mistake, kind) for mistake in error.errors()]
        raise ConfigError("\n  ".join([f"{source}: {len(lines)} mistake(s)", *lines])) from None


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads."""
    return yaml12.dump(config.model_dump(mode="json"))


def keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Return every dotted key with its default (`...` where it is required) and what it means."""
    found: dict[str, tuple[Any, str]] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= keys(kind, f"{prefix}{name}.")
            if kind is Algorithm:
                found |= settings_of_algorithms(f"{prefix}{name}.")
        else:
            found[prefix + name] = (... if field.is_required() else field.default, field.description or "")
    return found


def settings_of_algorithms(prefix: str) -> dict[str, tuple[Any, str]]:
    """Return what `keys` does of the registered algorithms' own settings, with the names of those that have each."""
    found: dict[str, tuple[Any, str]] = {prefix + "name": (DEFAULT, Algorithm.model_fields["name"].description or "")}
    having: dict[str, list[str]] = {}
    for name in REGISTERED:
        for setting, field in algorithm_class(name).model_fields.items():
            having.setdefault(prefix + setting, []).append(f"{name} (default {field.default!r})")
            found.setdefault(prefix + setting, (field.default, field.description or ""))
    own = {key: f"{', '.join(having[key])}: " for key in found if key != prefix + "name"}
    return {key: (default, own.get(key, "") + meaning) for key, (default, meaning) in found.items()}


def with_values(values: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with dotted keys set to what `settings` gives, the algorithm before its settings."""
    values = copy.deepcopy(values)
    for key in sorted(settings, key=lambda key: key != ALGORITHM):
        _set(values, key, settings[key])
    return values


def values_of(
    config: "Config | Mapping[str, Any] | str | AnyPath", overrides: Overrides | None = None, **more: Any
) -> tuple[dict[str, Any], str]:
    """Return the nested values of a config in any form after all overrides, not checked yet, and what to call it.

    Args:
        config: the path or URI of a YAML file, a `Config`, or nested values.
        overrides: `{"inner.lr": 0.1}`, `{"inner": {"lr": 0.1}}`, or `["inner.lr=0.1"]`.
        more: the same as keywords: `workers=2`, `inner={"lr": 0.1}`, `**{"inner.lr": 0.1}`.

    Raises:
        ConfigError: the file cannot be read, or an override is none.
    """
    source = "the config"
    if isinstance(config, Config):
        values = config.model_dump(mode="json")
    elif isinstance(config, Mapping):
        values = with_values({}, dotted(config))
    else:
        values, source = read_values(config), str(config)
    if isinstance(overrides, Mapping):
        values = with_values(values, dotted(overrides))
    else:
        _override_all(values, once(overrides or ()), Config)
    return with_values(values, dotted(more)), source


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted keys: `{"inner": {"lr": 0.1}}` and `{"inner.lr": 0.1}` are the same."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = prefix + name
        if isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in keys()):
            found |= dotted(value, f"{key}.")
        else:
            found[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return found


def _override_all(values: dict[str, Any], overrides: Sequence[str], kind: type[BaseModel]) -> None:
    """Override values in place, the algorithm before its settings."""
    for override in sorted(overrides, key=lambda override: not override.startswith(f"{ALGORITHM}=")):
        _set(values, *parsed(override, kind))


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    if key == ALGORITHM and (values.get("algorithm") or {}).get("name", DEFAULT) != value:
        values["algorithm"] = {}
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {parent} is a value, not a section")
    values[last] = value


def _explain(mistake: Any, kind: type[BaseModel]) -> str:
    """Say in one line what is wrong with which key."""
    key = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        known = list(keys(kind)) + list(kind.model_fields)
        if key in MOVED or key in known:
            return f"{key}: {MOVED.get(key, 'no setting of this algorithm')}"
        last_parts = {name.rsplit(".", 1)[-1]: name for name in known}
        close = difflib.get_close_matches(key, known, n=1) or [
            last_parts[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last_parts, n=1)
        ]
        return f"{key}: no such key" + (f"; did you mean {close[0]}?" if close else "")
    if mistake["type"] == "missing":
        return f"{key}: required, and not there"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "string_type" and isinstance(mistake["input"], bool | int | float):
        message += ": quote it in YAML"
    return f"{key}: {message}, got {mistake['input']!r}" if key and mistake["type"] != "value_error" else message
