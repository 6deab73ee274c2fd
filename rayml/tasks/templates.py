"""Prompt templates: the part of Jinja that puts texts together (`{{ input }}`, `{% if context is defined %}`).

A template may come with a stranger's adapter. So it is parsed first, and may only have variables, `if`, one `for` over
the input's parts, and a few filters. It takes no longer to render than its text is long.
"""

from collections.abc import Iterable
from functools import lru_cache

from jinja2 import StrictUndefined, Template, TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rayml.errors import ConfigError, DataError
from rayml.tasks.task import Example

FILTERS = {"trim", "lower", "upper", "capitalize", "title", "truncate", "first", "last", "default"}
ALLOWED = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Name,
    nodes.Const,
    nodes.If,
    nodes.For,
    nodes.Tuple,
    nodes.Filter,
    nodes.Test,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
)
ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@lru_cache(maxsize=4096)
def compile_template(template: str) -> Template:
    """Return a template, ready to render; `{input}` is short for `{{ input }}`.

    Raises:
        ConfigError: it is not a template, or uses other parts of Jinja.
    """
    if "{{" not in template and "{%" not in template:
        template = template.replace("{input}", "{{ input }}")
    try:
        _check_nodes(ENVIRONMENT.parse(template))
        return ENVIRONMENT.from_string(template)
    except TemplateError as error:
        raise ConfigError(f"template {template[:80]!r}: {error}") from None


def _check_nodes(tree: nodes.Template) -> None:
    uses_input = False
    for node in tree.find_all(nodes.Node):
        uses_input |= isinstance(node, nodes.Name) and node.ctx == "load"
        if not isinstance(node, ALLOWED):
            raise TemplateError(f"{type(node).__name__} is not for prompts: variables, if, for and filters are")
        if isinstance(node, nodes.Filter) and node.name not in FILTERS:
            raise TemplateError(f"no filter {node.name!r} here; there are {', '.join(sorted(FILTERS))}")
        if isinstance(node, nodes.For):
            iterated = node.iter
            if not isinstance(iterated, nodes.Name) or iterated.name != "parts" or any(node.find_all(nodes.For)):
                raise TemplateError("`for` goes over `parts` alone, and once")
    if not uses_input:
        raise TemplateError("shows nothing of the input; `{{ input }}` does")


@lru_cache(maxsize=4096)
def template_variables(template: str) -> frozenset[str]:
    """Return the names of the variables in a template."""
    return frozenset(meta.find_undeclared_variables(ENVIRONMENT.parse(template.replace("{input}", "{{ input }}"))))


def unused_fields(template: str, fields: Iterable[str]) -> list[str]:
    """Return those of an input's fields that a template never shows."""
    shown = template_variables(template)
    return [] if shown & {"input", "parts"} else [field for field in fields if field not in shown]


def render(template: str, example: Example, mask: str = "") -> str:
    """Return the prompt of an example: the text before its target.

    Args:
        mask: the value of `{{ mask }}`, where a masked model's target may be within the prompt.

    Raises:
        DataError: the template has a variable that the example lacks, or a filter that fails on it.
    """
    fields = dict(example.parts)
    try:
        values = {"input": example.input, "parts": example.parts, "mask": mask, **fields}
        return compile_template(template).render(values)
    except (TemplateError, TypeError, ValueError) as error:
        known = ", ".join(["input", "parts", *fields])
        raise DataError(f"template {template[:80]!r}: {error}; there are {known}") from None
