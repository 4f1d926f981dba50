"""Reading fields out of a sentence as JSON.

Invariant: the JSON has exactly the asked fields in the asked order, numbers as numbers; the
sentence forms marked held and one value combination in ten are never trained on.
"""

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from .base import Example, Wordings, assistant, split_key, user, with_articles, words
from .lexicon import COLORS, DAYS, MONTHS, a_city, a_name

JOBS = words(
    """baker, teacher, doctor, farmer, pilot, painter, writer, cook, nurse, miller, tailor, driver,
    lawyer, singer, engineer"""
)
GOODS = words(
    """tea, coffee, bread, apples, milk, honey, rice, sugar, flour, cheese, soap, paper, pens,
    candles, shirts, chairs, lamps, books, cups, shoes"""
)
EVENTS = words(
    "concert, meeting, party, market, lecture, race, dinner, workshop, exhibition, wedding"
)
SIZES = words("small, medium, large")
THINGS = words("shirt, coat, hat, bag, chair, table, car, bike, dress, scarf, lamp, cup")
DOMAINS = words("mail.com, post.org, home.net, work.com")


def a_number(rng: Random, low: int, high: int) -> int:
    return rng.randint(low, high)


@dataclass(frozen=True)
class Form:
    """One kind of record: its fields, how values are drawn, the sentences that tell them."""

    fields: tuple[str, ...]
    sentences: Wordings


PERSON = Form(
    ("name", "age", "city"),
    Wordings(
        (
            "{name} is {age} years old and lives in {city}.", "{name}, {age}, lives in {city}.",
            "My name is {name}, I am {age} years old and I live in {city}.",
            "In {city} lives {name}, who is {age} years old.",
            "{name} from {city} is {age} years old.",
            "{name} is {age} and comes from {city}.", "I am {name} from {city} and I am {age}.",
            "At the age of {age}, {name} moved to {city}.",
        ),
        ("Hello, I am {name}, {age} years old, from {city}.",
         "{name} lives in {city} and is {age} years old."),
    ),
)  # fmt: skip
WORKER = Form(
    ("name", "job", "city"),
    Wordings(
        (
            "{name} works as a {job} in {city}.", "{name} is a {job} from {city}.",
            "The {job} {name} lives in {city}.", "In {city}, {name} has found work as a {job}.",
            "I am {name}, a {job} in {city}.",
        ),
        ("My name is {name} and I work as a {job} in {city}.", "{name} is a {job} in {city}."),
    ),
)  # fmt: skip
ORDER = Form(
    ("item", "quantity", "price"),
    Wordings(
        (
            "I would like {quantity} boxes of {item} for {price} euros.",
            "Please send {quantity} boxes of {item}, the price is {price} euros.",
            "We sold {quantity} packs of {item} for {price} dollars.",
            "{quantity} bags of {item} cost {price} dollars.",
            "For {price} euros you get {quantity} {item}.",
            "She bought {quantity} boxes of {item} and paid {price} euros.",
        ),
        ("He paid {price} euros for {quantity} boxes of {item}.",
         "{quantity} boxes of {item} cost {price} euros."),
    ),
)  # fmt: skip
EVENT = Form(
    ("event", "day", "city"),
    Wordings(
        (
            "The {event} is on {day} in {city}.", "On {day} there is a {event} in {city}.",
            "There will be a {event} in {city} on {day}.", "{city} hosts a {event} on {day}.",
            "Come to the {event} in {city} on {day}!",
            "We meet for the {event} on {day} in {city}.",
        ),
        ("The {event} in {city} is on {day}.", "In {city} there is a {event} on {day}."),
    ),
)  # fmt: skip
BIRTHDAY = Form(
    ("name", "month", "year"),
    Wordings(
        (
            "{name} was born in {month} {year}.", "In {month} {year}, {name} was born.",
            "{name} was born in {year}, in {month}.",
            "The birthday of {name} is in {month}, the year is {year}.",
        ),
        ("I am {name} and I was born in {month} {year}.",),
    ),
)  # fmt: skip
THING = Form(
    ("item", "color", "size"),
    Wordings(
        (
            "I want a {size} {color} {item}.", "The {item} is {color} and {size}.",
            "Do you have a {size} {item} in {color}?", "She has a {color} {item}, size {size}.",
            "A {size} {item} in {color}, please.",
        ),
        ("I am looking for a {size} {item} in {color}.", "He has a {size} {color} {item}."),
    ),
)  # fmt: skip
CONTACT = Form(
    ("name", "email"),
    Wordings(
        (
            "Write to {name} at {email}.", "The email of {name} is {email}.",
            "{name} has the email {email}.",
            "You can reach {name} at {email}.", "I am {name}, my email is {email}.",
        ),
        ("My name is {name} and my email is {email}.", "Please write to {name} at {email}."),
    ),
)  # fmt: skip
FORMS = (PERSON, PERSON, WORKER, ORDER, EVENT, BIRTHDAY, THING, CONTACT)

ASK = Wordings(
    (
        "Extract the {fields} as JSON: {text}", "Extract {fields} as JSON: {text}",
        "Return the {fields} as JSON: {text}", "Give me the {fields} as JSON.\n{text}",
        "{text}\nExtract the {fields} as JSON.", "Read the {fields} from this text as JSON: {text}",
        "Text: {text}\nReturn a JSON object with {fields}.",
        "Find the {fields} and answer in JSON: {text}",
    ),
    ("Please extract the {fields} as JSON: {text}", "Write the {fields} as JSON: {text}",
     "Get the {fields} from the text as JSON: {text}"),
)  # fmt: skip


def values(form: Form, rng: Random) -> dict[str, Any]:
    name = a_name(rng)
    draw: dict[str, Any] = {
        "name": name,
        "age": a_number(rng, 4, 99),
        "city": a_city(rng),
        "job": rng.choice(JOBS),
        "item": rng.choice(THINGS if form is THING else GOODS),
        "quantity": a_number(rng, 2, 60),
        "price": a_number(rng, 2, 99),
        "event": rng.choice(EVENTS),
        "day": rng.choice(DAYS),
        "month": rng.choice(MONTHS),
        "year": a_number(rng, 1900, 2024),
        "color": rng.choice(COLORS),
        "size": rng.choice(SIZES),
        "email": f"{name.lower()}@{rng.choice(DOMAINS)}",
    }
    return {field: draw[field] for field in form.fields}


def enumerate_fields(rng: Random, fields: list[str]) -> str:
    if len(fields) == 1:
        return fields[0]
    last = ", " if rng.random() < 0.2 else " and "
    return ", ".join(fields[:-1]) + last + fields[-1]


def extract(rng: Random, held: bool) -> Example:
    """Two or three of the fields (now and then one), mostly in the usual order."""
    form = rng.choice(FORMS)
    while True:
        record = values(form, rng)
        if split_key(json.dumps(record)) == held:
            break
    fields = list(form.fields)
    if rng.random() < 0.35:
        rng.shuffle(fields)
    if rng.random() < 0.3:
        fields = fields[: rng.randint(1, len(fields))]
    text = form.sentences.pick(rng, held).format(**record)
    text = with_articles(text)
    prompt = ASK.pick(rng, held).format(fields=enumerate_fields(rng, fields), text=text)
    want = {field: record[field] for field in fields}
    answer = json.dumps(want, ensure_ascii=False)
    return Example("extraction", [user(prompt), assistant(answer)], "json", want)
