"""YAML 1.2, where PyYAML has 1.1: `yes`, `no`, `on` and dates are text, `010` is ten, and `1e-3` a number.

No key may stand twice: the first would be lost.
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
"""What plain scalars are, by their text, and the characters that it begins with."""


class TextLoader(yaml.SafeLoader):
    """Takes all scalars for text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


TextLoader.yaml_implicit_resolvers = {}


class Loader(TextLoader):
    """Takes scalars for what YAML 1.2 says that they are."""

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


class Dumper(yaml.SafeDumper):
    """Quotes what either version would take for other than text."""


Loader.add_constructor(f"{PREFIX}int", Loader.construct_int)
for name, pattern, first in RESOLVERS:
    for kind in (Loader, Dumper):
        kind.add_implicit_resolver(PREFIX + name, re.compile(rf"(?:{pattern})\Z"), first)


def load(text: str, loader: type[TextLoader] = Loader) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: it is none.
    """
    try:
        return yaml.load(text, loader)
    except RecursionError:
        raise yaml.YAMLError("too many lists or mappings within each other") from None
    except ValueError as error:  # a number that Python does not take
        raise yaml.YAMLError(str(error)) from None


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=Dumper, sort_keys=False)
