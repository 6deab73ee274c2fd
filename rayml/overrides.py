"""`key=value` on the command line: a value is read as the type of its setting; text is taken as typed."""

import re
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from rayml import yaml12
from rayml.errors import ConfigError


def refuse_duplicates(overrides: Sequence[str]) -> Sequence[str]:
    """Return the overrides if each has another key.

    Raises:
        ConfigError: a key is given twice, so one of its values would be lost.
    """
    keys = [override.partition("=")[0] for override in overrides]
    duplicates = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if duplicates:
        raise ConfigError(f"{', '.join(duplicates)}: given twice; leave one")
    return overrides


def parse_override(override: str, section: type[BaseModel]) -> tuple[str, Any]:
    """Return the dotted key and the value of an override.

    A text is taken as typed, unless it is all in quotes; so is a list of texts, unless it is in brackets. All other
    values are YAML.

    Raises:
        ConfigError: the override is not `key=value`, or its value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected key=value, such as inner.lr=0.1")
    annotation = annotation_of(section, key)
    kind, is_optional = bare_type(annotation), type(None) in get_args(annotation)
    item_kind = bare_type(next(iter(get_args(kind)), None)) if get_origin(kind) in (tuple, list) else None
    is_list = item_kind is str and text.startswith("[") and text.endswith("]")
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if not text or (kind is str and text == "null" and is_optional):
        return key, None
    if str in (kind, item_kind) and not is_list and not is_quoted:
        return key, text
    is_text = str in (kind, item_kind) or get_origin(kind) is dict
    try:
        return key, yaml12.load(text, yaml12.TextLoader if is_text else yaml12.Loader)
    except yaml.YAMLError as error:
        if is_quoted and str in (kind, item_kind):  # such as 'a' and 'b'
            return key, text
        reason = re.sub(r"\s+", " ", str(error))
        hint = "; quote its texts, as in ['*.jsonl', b]" if is_list else ""
        raise ConfigError(f"{override!r}: not a YAML value: {reason}{hint}") from error


def annotation_of(section: Any, key: str) -> Any:
    """Return the annotation of a dotted key in a section; None if there is none."""
    annotation = section
    for part in key.split("."):
        kind = bare_type(annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(part)
            annotation = field.annotation if field else None
        else:
            annotation = get_args(kind)[1] if get_origin(kind) is dict else None
    return annotation


def bare_type(annotation: Any) -> Any:
    """Return the type in an annotation, without metadata and without None."""
    if get_origin(annotation) is Annotated:
        return bare_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        others = [kind for kind in get_args(annotation) if kind is not type(None)]
        return bare_type(others[0]) if len(others) == 1 else annotation
    return annotation
