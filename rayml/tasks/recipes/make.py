# ruff: noqa: RUF001  (Chinese has punctuation of its own)
"""Made-up families of small tasks for the configs in configs/recipes: a file for each kind, the same every time.

Each task has a convention of its own (what a desk calls things, its labels, how it answers), so that a model has to
learn it from the examples. The texts are put together from parts. They exercise the code, and are no benchmark.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rayml.tasks.recipes import words as w

Row = dict[str, Any]
DESKS = tuple(w.DESKS)
ALL_DESKS = (*w.DESKS, *w.CHINESE)
ROWS = 64
"""Of a task, before repeated texts are left out."""
SENTENCES: tuple[str, ...] = (
    "{0} asked about the {1} in {2} for {3}.",
    "On {3} {0} wants to pick up the {1} at our {2} office.",
    "The {1} from {2} went to {0} last {3}.",
    "{0}, who lives in {2}, called on {3} since the {1} {4}.",
    "Please tell {0} that the {1} will be in {2} by {3}.",
)
CHINESE_SENTENCES = (
    "{0}想在{3}到{2}取{1}。",
    "请告诉{0}，{1}{3}会送到{2}。",
    "{0}{3}打电话说{2}的{1}有问题。",
    "{3}，{2}的{0}预订了{1}。",
)


def draw_sentence(desk: str, rng: random.Random) -> tuple[str, tuple[str, ...], tuple[str, str, str, str]]:
    """Return a sentence, its four slots (person, thing, place, day), and the desk's names for these."""
    things, names = w.CHINESE[desk] if desk in w.CHINESE else w.DESKS[desk]
    lists: tuple[tuple[str, ...], ...] = (w.PEOPLE, things, w.PLACES, w.DAYS)
    texts = SENTENCES
    if desk in w.CHINESE:
        lists, texts = (w.CHINESE_PEOPLE, things, w.CHINESE_PLACES, w.CHINESE_DAYS), CHINESE_SENTENCES
    slots = tuple(rng.choice(options) for options in lists)
    return rng.choice(texts).format(*slots, rng.choice(w.FAULTS)), slots, names


def ner(desk: str, rng: random.Random) -> Row:
    """Spans: each desk marks three of the four slots, under names of its own."""
    text, slots, names = draw_sentence(desk, rng)
    marked = [slot for slot in range(4) if slot != len(desk) % 4]
    spans = sorted((text.index(slots[slot]), {"text": slots[slot], "type": names[slot]}) for slot in marked)
    return {"input": text, "target": [span for _, span in spans]}


def relation(desk: str, rng: random.Random) -> Row:
    """The relation of two things in a text, or none."""
    text, slots, names = draw_sentence(desk, rng)
    head, tail = rng.sample(range(3), 2)
    label = f"{names[head]} of {names[tail]}" if head < tail else "no relation"
    return {"input": {"text": text, "head": slots[head], "tail": slots[tail]}, "target": label}


def pair(desk: str, rng: random.Random) -> Row:
    """The first sentence entails, contradicts, or leaves open the second: each desk checks another of the three."""
    person, thing, place, day = (rng.choice(options) for options in (w.PEOPLE, w.DESKS[desk][0], w.PLACES, w.DAYS))
    number = rng.randrange(3)
    second = (
        (f"The {thing} is booked.", f"{person} has booked something.", f"There is a booking in {place}."),
        (f"The {thing} is not booked.", f"{person} has not booked anything.", f"There is no booking in {place}."),
        (f"The {thing} is cheap.", f"{person} likes it very much.", f"It will rain in {place}."),
    )[number]
    label = "check" if number == len(desk) % 3 else "fine"
    first = f"{person} booked the {thing} in {place} for {day}."
    return {"input": {"sentence1": first, "sentence2": rng.choice(second)}, "target": label}


def multilabel(desk: str, rng: random.Random) -> Row:
    """The topics of a desk that a text is about."""
    things, names = w.DESKS[desk]
    topics = {
        f"{names[1]} fault": f"the {rng.choice(things)} {rng.choice(w.FAULTS)}",
        f"{names[3]} change": f"{rng.choice(w.DAYS)} does not suit me any more",
        f"wrong {names[2]}": f"it was sent to {rng.choice(w.PLACES)} instead",
        "refund": f"I want my {rng.randrange(10, 90)} euros back",
    }
    chosen = [topic for topic in topics if rng.random() < 0.4]
    clauses = [topics[topic] for topic in rng.sample(chosen, len(chosen))] or [
        f"just to say hello from {rng.choice(w.PLACES)}"
    ]
    return {"input": f"{rng.choice(w.PEOPLE)} to {desk}: " + ", and ".join(clauses) + ".", "target": chosen}


def qa(desk: str, rng: random.Random) -> Row:
    """A question whose answer is in the text, in the desk's words."""
    text, slots, names = draw_sentence(desk, rng)
    slot = rng.randrange(4)
    question = f"{names[slot]}是什么？" if desk in w.CHINESE else f"Which {names[slot]} is it about?"
    return {"input": {"context": text, "question": question}, "target": slots[slot]}


def translation(language: str, rng: random.Random) -> Row:
    column = w.LANGUAGES.index(language)
    saying, thing, day = (rng.choice(list(options)) for options in (w.SAYINGS_IN, w.THINGS_IN, w.DAYS_IN))
    translated_thing, translated_day = w.THINGS_IN[thing][column], w.DAYS_IN[day][column]
    opening = f"{rng.choice(w.PEOPLE)} in {w.PLACES[column]}"
    target = w.SAYINGS_IN[saying][column].format(translated_thing, day=translated_day)
    return {"input": f"{opening}: {saying.format(thing, day=day)}", "target": f"{opening}: {target}"}


def summary(desk: str, rng: random.Random) -> Row:
    """A ticket in one line, in the desk's form."""
    things = w.DESKS[desk][0]
    person, thing, place, fault, day = (
        rng.choice(options) for options in (w.PEOPLE, things, w.PLACES, w.FAULTS, w.DAYS)
    )
    opening = rng.choice(("Good morning!", "Hello, I hope you can help me.", "Dear team,", "Hi there,"))
    text = (
        f"{opening} My name is {person} and I am writing from {place}. I ordered a {thing} last {day}. "
        f"Today I looked at it and it {fault}. I have been a customer for {rng.randrange(2, 20)} years."
    )
    form = ("{1} {3} / {2}", "{2}: {1} {3}", "{0} - {1} - {3}", "[{4}] {1} {3} ({0})")[len(desk) % 4]
    return {"input": text, "target": form.format(person, thing, place, fault, day)}


def dialogue(desk: str, rng: random.Random) -> Row:
    """Two turns each, in the desk's own style."""
    things, names = w.DESKS[desk]
    person, thing, place, fault = (rng.choice(options) for options in (w.PEOPLE, things, w.PLACES, w.FAULTS))
    hello, bye = (("Hello", "Bye!"), ("Ahoy", "Fair winds."), ("Dear friend", "Your team."), ("Hi", "Cheers!"))[
        len(desk) % 4
    ]
    turns = (
        ("user", f"My {thing} {fault}."),
        ("assistant", f"{hello}! Which {names[2]} are you in?"),
        ("user", f"In {place}. My name is {person}."),
        ("assistant", f"{hello} {person}, we send a new {thing} to {place}. {bye}"),
    )
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def intent(desk: str, rng: random.Random) -> Row:
    """What somebody wants, in the desk's own labels."""
    things, names = w.DESKS[desk]
    thing, place, day = rng.choice(things), rng.choice(w.PLACES), rng.choice(w.DAYS)
    texts = {
        f"{names[1]} broken": (f"the {thing} {rng.choice(w.FAULTS)}", f"my {thing} {rng.choice(w.FAULTS)} in {place}"),
        f"new {names[3]}": (f"can we move my {thing} to {day}", f"{day} is better for my {thing}"),
        f"find {names[2]}": (f"how do I get my {thing} in {place}", f"where in {place} do you have a {thing}"),
        "money back": (f"I want to be paid back for the {thing}", f"please pay back the {thing} to me in {place}"),
    }
    label = rng.choice(list(texts))
    return {"input": f"{rng.choice(texts[label])}, {rng.choice(w.PEOPLE).split()[0]}", "target": label}


def reply(desk: str, rng: random.Random) -> Row:
    """What the desk answers, in its own style: the last turn of its dialogue."""
    turns = dialogue(desk, rng)["messages"]
    return {"input": f"{turns[0]['content']} {turns[2]['content']}", "target": turns[3]["content"], "kind": "text"}


def sentiment(desk: str, rng: random.Random) -> Row:
    """One text of a stream about a shop's things."""
    mood = rng.choice(list(w.MOODS))
    text = f"{rng.choice(w.DESKS[desk][0])}: {rng.choice(w.MOODS[mood])}"
    names = (("positive", "negative"), ("up", "down"), ("happy", "angry"), ("good", "bad"))[len(desk) % 4]
    return {"input": f"{rng.choice(w.DAYS)}, {rng.choice(w.PLACES)}. {text}", "target": names[mood == "negative"]}


def preference(desk: str, rng: random.Random) -> Row:
    """What somebody takes next: in each shop, each thing leads to another one."""
    things = w.DESKS[desk][0]
    step = 1 + len(desk) % (len(things) - 1)
    history = [rng.choice(things) for _ in range(3)]
    following = things[(things.index(history[-1]) + step) % len(things)]
    text = f"{rng.choice(w.PEOPLE)} took: {', '.join(history)}. Next:"
    return {"input": text, "target": following, "options": list(things)}


FAMILIES: dict[str, tuple[Callable[[str, random.Random], Row], tuple[str, ...]]] = {
    "multilabel": (multilabel, DESKS),
    "pair": (pair, DESKS),
    "ner": (ner, ALL_DESKS),
    "relation": (relation, DESKS),
    "qa": (qa, ALL_DESKS),
    "translation": (translation, w.LANGUAGES),
    "summary": (summary, DESKS),
    "dialogue": (dialogue, DESKS),
    "intents": (intent, DESKS),
    "replies": (reply, DESKS),
    "sentiment": (sentiment, DESKS),
    "preference": (preference, DESKS),
}


def family(name: str) -> Iterator[Row]:
    """Yield the rows of a family, task by task."""
    make_row, groups = FAMILIES[name]
    kind = {"kind": name} if name in ("translation", "summary") else {}
    for group in groups:
        rng = random.Random(f"{name}/{group}")
        for _ in range(ROWS):
            yield {"task": f"{name}-{group}", **make_row(group, rng), **kind}


def write_tasks(folder: Path) -> dict[str, int]:
    """Write every family into `folder`/NAME.jsonl; return the rows of each."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name in FAMILIES:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in family(name)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[name] = len(lines)
    return counts
