# ruff: noqa: RUF001  (Chinese has punctuation of its own)
"""Small families of tasks for the configs in configs/recipes, made here: one file a kind, the same every time.

Each task is a convention of its own (what a desk calls things, which labels it has, how it answers), so that a model
has to learn it from the examples. The texts are put together from parts: they try the machinery, and are no benchmark.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rayml.tasks.recipes import words as w

Row = dict[str, Any]
DESKS, BOTH = tuple(w.DESKS), (*w.DESKS, *w.CHINESE)
ROWS = 64
"""Of a task, before texts that come twice are left out."""
SEEN: tuple[str, ...] = (
    "{0} asked about the {1} in {2} for {3}.",
    "On {3} {0} wants to pick up the {1} at our {2} office.",
    "The {1} from {2} went to {0} last {3}.",
    "{0}, who lives in {2}, called on {3} since the {1} {4}.",
    "Please tell {0} that the {1} will be in {2} by {3}.",
)
SEEN_CHINESE = (
    "{0}想在{3}到{2}取{1}。",
    "请告诉{0}，{1}{3}会送到{2}。",
    "{0}{3}打电话说{2}的{1}有问题。",
    "{3}，{2}的{0}预订了{1}。",
)


def drawn(desk: str, rng: random.Random) -> tuple[str, tuple[str, ...], tuple[str, str, str, str]]:
    """Return a text of a desk, what stands in it (person, thing, place, day), and what the desk calls them."""
    things, names = w.CHINESE[desk] if desk in w.CHINESE else w.DESKS[desk]
    lists: tuple[tuple[str, ...], ...] = (w.PEOPLE, things, w.PLACES, w.DAYS)
    texts = SEEN
    if desk in w.CHINESE:
        lists, texts = (w.CHINESE_PEOPLE, things, w.CHINESE_PLACES, w.CHINESE_DAYS), SEEN_CHINESE
    found = tuple(rng.choice(options) for options in lists)
    return rng.choice(texts).format(*found, rng.choice(w.FAULTS)), found, names


def ner(desk: str, rng: random.Random) -> Row:
    """Spans: each desk marks two or three of the four, under names of its own."""
    text, found, names = drawn(desk, rng)
    wanted = [place for place in range(4) if place != len(desk) % 4]
    spans = sorted((text.index(found[place]), {"text": found[place], "type": names[place]}) for place in wanted)
    return {"input": text, "target": [span for _, span in spans]}


def relation(desk: str, rng: random.Random) -> Row:
    """The relation of two things in a text, or none."""
    text, found, names = drawn(desk, rng)
    head, tail = rng.sample(range(3), 2)
    label = f"{names[head]} of {names[tail]}" if head < tail else "no relation"
    return {"input": {"text": text, "head": found[head], "tail": found[tail]}, "target": label}


def pair(desk: str, rng: random.Random) -> Row:
    """The first sentence says the second, denies it, or leaves it open: each desk looks into another of the three."""
    person, thing, place, day = (rng.choice(of) for of in (w.PEOPLE, w.DESKS[desk][0], w.PLACES, w.DAYS))
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
    """Which of a desk's topics does a text touch?"""
    things, names = w.DESKS[desk]
    topics = {
        f"{names[1]} fault": f"the {rng.choice(things)} {rng.choice(w.FAULTS)}",
        f"{names[3]} change": f"{rng.choice(w.DAYS)} does not suit me any more",
        f"wrong {names[2]}": f"it was sent to {rng.choice(w.PLACES)} instead",
        "refund": f"I want my {rng.randrange(10, 90)} euros back",
    }
    chosen = [topic for topic in topics if rng.random() < 0.4]
    said = [topics[topic] for topic in rng.sample(chosen, len(chosen))] or [
        f"just to say hello from {rng.choice(w.PLACES)}"
    ]
    return {"input": f"{rng.choice(w.PEOPLE)} to {desk}: " + ", and ".join(said) + ".", "target": chosen}


def qa(desk: str, rng: random.Random) -> Row:
    """A question whose answer stands in the text; desks name what they ask for."""
    text, found, names = drawn(desk, rng)
    asked = rng.randrange(4)
    question = f"{names[asked]}是什么？" if desk in w.CHINESE else f"Which {names[asked]} is it about?"
    return {"input": {"context": text, "question": question}, "target": found[asked]}


def translation(language: str, rng: random.Random) -> Row:
    place = w.LANGUAGES.index(language)
    saying, thing, day = (rng.choice(list(of)) for of in (w.SAYINGS_IN, w.THINGS_IN, w.DAYS_IN))
    here, there = w.THINGS_IN[thing][place], w.DAYS_IN[day][place]
    opening = f"{rng.choice(w.PEOPLE)} in {w.PLACES[place]}"
    target = w.SAYINGS_IN[saying][place].format(here, day=there)
    return {"input": f"{opening}: {saying.format(thing, day=day)}", "target": f"{opening}: {target}"}


def summary(desk: str, rng: random.Random) -> Row:
    """A ticket in one line, in the desk's form."""
    things = w.DESKS[desk][0]
    person, thing, place, fault, day = (rng.choice(of) for of in (w.PEOPLE, things, w.PLACES, w.FAULTS, w.DAYS))
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
    person, thing, place, fault = (rng.choice(of) for of in (w.PEOPLE, things, w.PLACES, w.FAULTS))
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
    """What does somebody want? The labels are the desk's own."""
    things, names = w.DESKS[desk]
    thing, place, day = rng.choice(things), rng.choice(w.PLACES), rng.choice(w.DAYS)
    asked = {
        f"{names[1]} broken": (f"the {thing} {rng.choice(w.FAULTS)}", f"my {thing} {rng.choice(w.FAULTS)} in {place}"),
        f"new {names[3]}": (f"can we move my {thing} to {day}", f"{day} is better for my {thing}"),
        f"find {names[2]}": (f"how do I get my {thing} in {place}", f"where in {place} do you have a {thing}"),
        "money back": (f"I want to be paid back for the {thing}", f"please pay back the {thing} to me in {place}"),
    }
    label = rng.choice(list(asked))
    return {"input": f"{rng.choice(asked[label])}, {rng.choice(w.PEOPLE).split()[0]}", "target": label}


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
    """What somebody takes next, after what they took: in each shop a thing leads to another one."""
    things = w.DESKS[desk][0]
    step = 1 + len(desk) % (len(things) - 1)
    history = [rng.choice(things) for _ in range(3)]
    following = things[(things.index(history[-1]) + step) % len(things)]
    text = f"{rng.choice(w.PEOPLE)} took: {', '.join(history)}. Next:"
    return {"input": text, "target": following, "options": list(things)}


FAMILIES: dict[str, tuple[Callable[[str, random.Random], Row], tuple[str, ...]]] = {
    "multilabel": (multilabel, DESKS),
    "pair": (pair, DESKS),
    "ner": (ner, BOTH),
    "relation": (relation, DESKS),
    "qa": (qa, BOTH),
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
    make, places = FAMILIES[name]
    kind = {"kind": name} if name in ("translation", "summary") else {}
    for place in places:
        rng = random.Random(f"{name}/{place}")
        for _ in range(ROWS):
            yield {"task": f"{name}-{place}", **make(place, rng), **kind}


def write_tasks(folder: Path) -> dict[str, int]:
    """Write every family into `folder`/NAME.jsonl; return the rows of each."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in FAMILIES:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in family(name)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        written[name] = len(lines)
    return written
