"""An algorithm is one object in one file: no other module knows any by name."""

import ast
from pathlib import Path

import rayml
from rayml.algorithms.registry import REGISTERED

SOURCE = Path(rayml.__path__[0])
NAMES = {*REGISTERED, "anil"}
# A format of data sets has the name of the paper that brought it.
FORMATS = {("tasks/read.py", "metaicl"), ("tasks/formats/records.py", "metaicl")}


def words(path: Path):
    """Yield every word of a module's code: of its names, and of its strings, but for docstrings."""
    tree = ast.parse(path.read_text())
    texts = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield from split(node.value)
        for field in ("id", "attr", "name", "module", "arg"):
            if isinstance(getattr(node, field, None), str):
                yield from split(getattr(node, field))


def split(text: str):
    return "".join(character if character.isalnum() or character == "_" else " " for character in text).split()


def test_no_module_outside_the_algorithms_folder_names_an_algorithm():
    naming = {
        (str(path.relative_to(SOURCE)), word)
        for path in SOURCE.rglob("*.py")
        if path.parent.name != "algorithms"
        for word in words(path)
        if word.lower() in NAMES
    }
    assert naming == FORMATS
