"""What a sweep searches: `inner.lr=loguniform(1e-3,1)`, checked before anything starts."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from rayml.config import keys, parse_config, with_values
from rayml.errors import ConfigError

KINDS = {
    "uniform": "uniform(LOW, HIGH)",
    "loguniform": "loguniform(LOW, HIGH)",
    "randint": "randint(LOW, HIGH), both included",
    "choice": "choice(ONE, ANOTHER, ...)",
}
NOT_SEARCHED = {"outer.steps", "workers", "engine", "device", "mode", "seed", "data.path", "data.columns", "data.ways"}
NOT_SEARCHED |= {"data.shots", "data.queries", "data.drop_small_classes"}
NOT_SEARCHED_SECTIONS = "run.", "sweep.", "validation.", "data.splits."
"""Trials that differ in these could not be compared, or could not run side by side."""
DIGITS = 3
"""Significant digits of a drawn number: more mean nothing, and are hard to read."""


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a key may take."""

    key: str
    kind: str
    values: tuple[Any, ...]
    """Both ends, or every choice."""

    def spaced(self, points: int) -> list[Any]:
        """Return `points` values at equal distances or ratios, including both ends; or every choice."""
        if self.kind == "choice":
            return list(self.values)
        low, high = self.values
        if self.kind == "randint":
            return sorted({round(value) for value in np.linspace(low, high, points)})
        space = np.geomspace if self.kind == "loguniform" else np.linspace
        return [round_significant(value) for value in space(low, high, points)]


def round_point(point: Mapping[str, Any], space: Iterable[Range]) -> dict[str, Any]:
    """Return the point with drawn numbers rounded to a few significant digits, and choices as they were given."""
    drawn = {searched.key for searched in space if searched.kind in ("uniform", "loguniform")}
    return {key: round_significant(value) if key in drawn else value for key, value in point.items()}


def round_significant(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def parse_space(search: Mapping[str, str]) -> list[Range]:
    """Return the ranges of `{key: "loguniform(1e-3, 1)"}`.

    Raises:
        ConfigError: no key, an unknown key, or an invalid range; with all mistakes at once.
    """
    if not search:
        raise ConfigError("nothing to search: give --search inner.lr=loguniform(1e-3,1), or sweep.search in the YAML")
    space, mistakes = [], []
    for key, text in search.items():
        try:
            space.append(_parse_range(key, text))
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n  ".join([f"{len(mistakes)} mistake(s) in what to search", *mistakes]))
    return space


def _parse_range(key: str, text: str) -> Range:
    if key not in keys():
        raise ConfigError(f"{key}: no such key; `rayml config --keys` lists them")
    if key in NOT_SEARCHED or key.startswith(NOT_SEARCHED_SECTIONS):
        raise ConfigError(f"{key}: trials that differ in it could not be compared, or could not run side by side")
    match = re.fullmatch(r"\s*(\w+)\((.*)\)\s*", text)
    if not match or match[1] not in KINDS:
        raise ConfigError(f"{key}: expected one of {'; '.join(KINDS.values())}; got {text!r}")
    kind = match[1]
    try:
        values = [_number(value) for value in yaml.safe_load(f"[{match[2]}]")]
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r}: expected comma-separated values, quoted where YAML asks for it") from error
    if kind == "choice":
        if len(values) < 2:
            raise ConfigError(f"{key}: choice needs two values or more, got {text!r}")
        return Range(key, kind, tuple(values))
    is_integer = kind == "randint"
    if len(values) != 2 or not all(isinstance(value, int if is_integer else (int, float)) for value in values):
        raise ConfigError(f"{key}: expected {KINDS[kind]}, {'whole ' * is_integer}numbers; got {text!r}")
    low, high = values if is_integer else map(float, values)
    if not low < high or (kind == "loguniform" and low <= 0):
        raise ConfigError(f"{key}: expected {'0 < ' * (kind == 'loguniform')}LOW < HIGH, got {text!r}")
    return Range(key, kind, (low, high))


def _number(value: Any) -> Any:
    """Return as a number what YAML 1.1 takes for text, such as 1e-3."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_space(space: Iterable[Range], values: dict[str, Any], source: str) -> None:
    """Raise ConfigError if the config refuses an end, or a choice, of a range."""
    for searched in space:
        for value in searched.values:
            parse_config(with_values(values, {searched.key: value}), f"{source} with {searched.key}={value}")
