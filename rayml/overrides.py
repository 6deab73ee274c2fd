"""`key=value` on the command line: each value is what its setting is, and where that is text, it is taken as typed."""

import re
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from rayml import yaml12
from rayml.errors import ConfigError


def once(overrides: Sequence[str]) -> Sequence[str]:
    """Return overrides of which no two are of one key.

    Raises:
        ConfigError: a key stands twice: one of its values would be lost.
    """
    keys = [override.partition("=")[0] for override in overrides]
    twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if twice:
        raise ConfigError(f"{', '.join(twice)}: given twice; leave one")
    return overrides


def parsed(override: str, section: type[BaseModel]) -> tuple[str, Any]:
    """Return an override's dotted key and its value.

    Text is as typed, but for quotes around all of it; so is a list of texts, but in brackets. All else is YAML.

    Raises:
        ConfigError: it is no key and value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected key=value, such as inner.lr=0.1")
    kind = kind_of(section, key)
    inner = bare(next(iter(get_args(kind)), None)) if get_origin(kind) in (tuple, list) else None
    is_list = inner is str and text.startswith("[") and text.endswith("]")
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if not text or (kind is str and text == "null" and is_optional(section, key)):
        return key, None
    if str in (kind, inner) and not is_list and not is_quoted:
        return key, text
    is_text = str in (kind, inner) or get_origin(kind) is dict
    try:
        return key, yaml12.load(text, yaml12.TextLoader if is_text else yaml12.Loader)
    except yaml.YAMLError as error:
        if is_quoted and str in (kind, inner):  # 'one' and 'other'
            return key, text
        reason = re.sub(r"\s+", " ", str(error))
        hint = "; quote its texts, as in ['*.jsonl', b]" if is_list else ""
        raise ConfigError(f"{override!r}: not a YAML value: {reason}{hint}") from error


def kind_of(section: Any, key: str) -> Any:
    """Return what the value of a dotted key is annotated as, in a section; None where nothing says it."""
    kind = bare(section)
    for part in key.split("."):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(part)
            kind = bare(field.annotation) if field else None
        else:
            kind = bare(get_args(kind)[1]) if get_origin(kind) is dict else None
    return kind


def is_optional(section: type[BaseModel], key: str) -> bool:
    *parents, last = key.split(".")
    owner = kind_of(section, ".".join(parents)) if parents else section
    fields = getattr(owner, "model_fields", {})
    return last in fields and type(None) in get_args(fields[last].annotation)


def bare(kind: Any) -> Any:
    """Return an annotation without what is only said of it, and without None."""
    if get_origin(kind) is Annotated:
        return bare(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        others = [one for one in get_args(kind) if one is not type(None)]
        return bare(others[0]) if len(others) == 1 else kind
    return kind
