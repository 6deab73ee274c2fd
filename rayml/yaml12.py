"""YAML 1.2, unlike PyYAML's 1.1: `yes`, `no`, `on` and dates are text, `010` is ten, and `1e-3` is a number.

A repeated key is an error, since its first value would be lost.
"""

import re
from typing import Any

import yaml

PREFIX = "tag:yaml.org,2002:"
RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
)
"""For each type of plain scalar its pattern, and its possible first characters."""


class TextLoader(yaml.SafeLoader):
    """Reads every scalar as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


TextLoader.yaml_implicit_resolvers = {}


class Loader(TextLoader):
    """Reads scalars as YAML 1.2 does."""

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type."""


Loader.add_constructor(f"{PREFIX}int", Loader.construct_int)
for name, pattern, first in RESOLVERS:
    for kind in (Loader, Dumper):
        kind.add_implicit_resolver(PREFIX + name, re.compile(rf"(?:{pattern})\Z"), first)


def load(text: str, loader: type[TextLoader] = Loader) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    try:
        return yaml.load(text, loader)
    except RecursionError:
        raise yaml.YAMLError("too many lists or mappings within each other") from None
    except ValueError as error:  # a number that Python cannot parse
        raise yaml.YAMLError(str(error)) from None


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=Dumper, sort_keys=False)
