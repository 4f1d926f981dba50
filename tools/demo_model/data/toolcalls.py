"""Calls of one of the tools given in the prompt, and answers from a tool's response.

Tools vary in name, parameter names and description, so that a model must read them from the prompt.
Invariant: one (tool name, parameter names) signature in ten is reserved for evaluation, and so are
the wordings marked held; the response of a tool is always valid JSON.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from .base import Example, Message, Tool, Wordings, assistant, roughen, split_key, user, words
from .facts import fact
from .lexicon import DAYS, a_city, a_name, made_up
from .smalltalk import greeting, small_talk

Values = dict[str, Any]
SKIES = words("sunny, cloudy, rainy, windy, snowy, foggy, clear")
LANGUAGES = words("French, German, Spanish, Italian, Japanese, Polish, Greek, Turkish")
PHRASES = (
    "good morning", "thank you", "where is the station", "I like tea", "see you soon",
    "the cat sleeps",
    "good night", "how much is it", "the train is late", "I am hungry",
)  # fmt: skip
TEXTS = (
    "I will be late", "see you tomorrow", "dinner is ready", "the meeting is over", "call me back",
    "happy birthday", "the train is late", "I am on my way", "bring some bread",
)  # fmt: skip
TOPICS = words(
    """water mills, radix trees, black holes, whales, volcanoes, chess, old bridges, honey bees,
    trains, solar power, poetry, glaciers, owls, cheese, cactus plants, rivers"""
)
CURRENCIES = words("USD, EUR, JPY, GBP, CHF, CNY, INR, BRL, SEK, PLN")
ROOMS = words("kitchen, bedroom, bathroom, garage, garden, hall, office, attic, living room")
DISHES = words("pizza, soup, pancakes, curry, salad, lasagna, risotto, tacos, apple pie, ramen")
SONGS = (
    "Blue River", "Silver Moon", "Dancing Stars", "Old Mill", "Summer Rain", "Golden Road",
    "Night Train",
)  # fmt: skip
SYMBOLS = words("AAPL, MSFT, NVDA, AMZN, TSLA, INTC, AMD, IBM, ORCL, SAP")
EVENTS = words("dinner, meeting, concert, doctor, lunch, workout, party, call")


TOOL_ENDINGS = words("v2, tool, api, now, fast, service, for_user, online")
PARAM_ENDINGS = words("name, value, text, id, input, field")


@dataclass(frozen=True)
class Family:
    """Tools that do one thing under several names. names, abouts: function names and descriptions;
    params: for each argument its possible names and JSON type; draw gives argument values by the
    first name; ask are the requests; reply makes the tool's response and the answer that is read
    from it."""

    names: tuple[str, ...]
    abouts: tuple[str, ...]
    params: tuple[tuple[tuple[str, ...], str], ...]
    draw: Callable[[Random], Values]
    ask: Wordings
    reply: Callable[[Random, Values], tuple[Values, str]]


def clock(rng: Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"


def weather_reply(rng: Random, v: Values) -> tuple[Values, str]:
    degrees, sky = rng.randint(-9, 38), rng.choice(SKIES)
    data = {"temperature": degrees, "condition": sky}
    return data, f"It is {degrees} degrees and {sky} in {v['city']}."


def time_reply(rng: Random, v: Values) -> tuple[Values, str]:
    now = clock(rng)
    return {"time": now}, f"It is {now} in {v['city']}."


def convert_reply(rng: Random, v: Values) -> tuple[Values, str]:
    result = rng.randint(2, 999)
    return {"result": result}, f"{v['amount']} {v['source']} are {result} {v['target']}."


def result_reply(rng: Random, v: Values) -> tuple[Values, str]:
    result = rng.randint(2, 9999)
    return {"result": result}, f"The result is {result}."


def search_reply(rng: Random, v: Values) -> tuple[Values, str]:
    count = rng.randint(2, 99)
    return {"results": count}, f"I found {count} results about {v['query']}."


def message_reply(rng: Random, v: Values) -> tuple[Values, str]:
    if rng.random() < 0.25:
        return {"error": "not found"}, f"I could not find {v['to']}."
    return {"status": "sent"}, f"Your message to {v['to']} was sent."


def alarm_reply(rng: Random, v: Values) -> tuple[Values, str]:
    return {"status": "ok"}, f"Your alarm is set for {v['time']}."


def translate_reply(rng: Random, v: Values) -> tuple[Values, str]:
    text = " ".join(a_name(rng).lower() for _ in range(rng.randint(1, 3)))
    return {"translation": text}, f'In {v["language"]} that is "{text}".'


def light_reply(rng: Random, v: Values) -> tuple[Values, str]:
    return {"status": "on"}, f"The light in the {v['room']} is on."


def stock_reply(rng: Random, v: Values) -> tuple[Values, str]:
    price = rng.randint(10, 900)
    return {"price": price}, f"{v['symbol']} costs {price} dollars."


def recipe_reply(rng: Random, v: Values) -> tuple[Values, str]:
    minutes = rng.randint(5, 90)
    return {"minutes": minutes}, f"I found a recipe for {v['dish']}. It takes {minutes} minutes."


def table_reply(rng: Random, v: Values) -> tuple[Values, str]:
    return {"status": "booked"}, f"A table for {v['people']} on {v['day']} is booked."


def song_reply(rng: Random, v: Values) -> tuple[Values, str]:
    return {"status": "playing"}, f"Now playing {v['song']}."


def event_reply(rng: Random, v: Values) -> tuple[Values, str]:
    return {"status": "created"}, f"I added {v['title']} on {v['day']}."


FAMILIES = (
    Family(
        ("get_weather", "weather", "get_current_weather", "current_weather", "fetch_weather",
         "weather_now"),
        ("Get the weather in a city", "Current weather of a place", "Weather for a location"),
        ((("city", "location", "place"), "string"),),
        lambda rng: {"city": a_city(rng)},
        Wordings(
            ("What is the weather in {city}?", "How is the weather in {city}?",
             "Is it raining in {city}?",
             "Weather in {city}?", "Is it cold in {city} today?", "Tell me the weather in {city}.",
             "What's the weather like in {city}?", "How warm is it in {city}?",
             "Is it sunny in {city}?"),
            ("How is the weather today in {city}?",
             "What is the weather like in {city} right now?"),
        ),
        weather_reply,
    ),
    Family(
        ("get_time", "current_time", "local_time", "time_in_city", "clock"),
        ("Get the time in a city", "Local time of a place", "Current time"),
        ((("city", "location", "place"), "string"),),
        lambda rng: {"city": a_city(rng)},
        Wordings(
            ("What time is it in {city}?", "Tell me the time in {city}.", "Time in {city}?",
             "What is the local time in {city}?", "How late is it in {city}?"),
            ("What is the time now in {city}?", "Which time is it in {city}?"),
        ),
        time_reply,
    ),
    Family(
        ("convert_currency", "exchange", "currency", "convert_money"),
        ("Convert money between currencies", "Exchange money"),
        ((("amount", "value"), "number"), (("source", "from"), "string"),
         (("target", "to"), "string")),
        lambda rng: dict(zip(("source", "target"), rng.sample(CURRENCIES, 2), strict=True))
        | {"amount": rng.randint(1, 999)},
        Wordings(
            ("Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?",
             "Change {amount} {source} into {target}.", "What are {amount} {source} in {target}?"),
            ("Please exchange {amount} {source} to {target}.",
             "How many {target} are {amount} {source}?"),
        ),
        convert_reply,
    ),
    Family(
        ("calculate", "calculator", "compute", "evaluate"),
        ("Evaluate an expression", "Calculate a formula"),
        ((("expression", "formula"), "string"),),
        lambda rng: {
            "expression": f"{rng.randint(100, 999)} {rng.choice('+-*')} {rng.randint(10, 999)}"
        },
        Wordings(
            ("What is {expression}?", "Calculate {expression}.", "How much is {expression}?",
             "Compute {expression}."),
            ("Please calculate {expression}.", "Work out {expression}."),
        ),
        result_reply,
    ),
    Family(
        ("search", "web_search", "search_web", "find_pages"),
        ("Search the web", "Find web pages about a topic"),
        ((("query", "text", "topic"), "string"),),
        lambda rng: {"query": rng.choice(TOPICS)},
        Wordings(
            ("Search for {query}.", "Find pages about {query}.", "Look up {query} on the web.",
             "Search the web for {query}."),
            ("Please search the web for {query}.", "Find something about {query}."),
        ),
        search_reply,
    ),
    Family(
        ("send_message", "message", "send_text", "text_person"),
        ("Send a message to a person", "Send a text to someone"),
        ((("to", "person", "recipient"), "string"), (("text", "message", "body"), "string")),
        lambda rng: {"to": a_name(rng), "text": rng.choice(TEXTS)},
        Wordings(
            ('Send "{text}" to {to}.', "Write to {to}: {text}", "Tell {to}: {text}",
             'Send {to} the message "{text}".', "Message {to}: {text}"),
            ('Please send "{text}" to {to}.', "Send a message to {to}: {text}"),
        ),
        message_reply,
    ),
    Family(
        ("set_alarm", "alarm", "create_alarm", "wake_up"),
        ("Set an alarm", "Wake the user at a time"),
        ((("time", "at", "hour"), "string"),),
        lambda rng: {"time": clock(rng)},
        Wordings(
            ("Set an alarm for {time}.", "Wake me at {time}.", "Alarm at {time}.",
             "Wake me up at {time}."),
            ("Please set an alarm for {time}.", "Please wake me up at {time}."),
        ),
        alarm_reply,
    ),
    Family(
        ("translate", "translate_text", "translator"),
        ("Translate a text", "Translate text to a language"),
        ((("text", "phrase"), "string"), (("language", "target", "to"), "string")),
        lambda rng: {"text": rng.choice(PHRASES), "language": rng.choice(LANGUAGES)},
        Wordings(
            ('Translate "{text}" to {language}.', 'How do you say "{text}" in {language}?',
             'What is "{text}" in {language}?', 'Say "{text}" in {language}.'),
            ('Please translate "{text}" into {language}.', '"{text}" in {language}, please.'),
        ),
        translate_reply,
    ),
    Family(
        ("turn_on_light", "light_on", "lights", "switch_light"),
        ("Turn on the light in a room", "Switch a light on"),
        ((("room", "where", "place"), "string"),),
        lambda rng: {"room": rng.choice(ROOMS)},
        Wordings(
            ("Turn on the light in the {room}.", "Light in the {room}, please.",
             "Switch on the light in the {room}.", "It is dark in the {room}."),
            ("Please turn on the light in the {room}.", "Turn the {room} light on."),
        ),
        light_reply,
    ),
    Family(
        ("get_stock_price", "stock_price", "stocks", "quote"),
        ("Get the price of a stock", "Current price of a share"),
        ((("symbol", "ticker"), "string"),),
        lambda rng: {"symbol": rng.choice(SYMBOLS)},
        Wordings(
            ("What is the price of {symbol}?", "How much is {symbol}?", "Stock price of {symbol}?",
             "What does {symbol} cost?"),
            ("Tell me the price of {symbol}.", "What is the stock price of {symbol}?"),
        ),
        stock_reply,
    ),
    Family(
        ("find_recipe", "recipe", "search_recipe", "get_recipe"),
        ("Find a recipe for a dish", "Get a cooking recipe"),
        ((("dish", "name", "food"), "string"),),
        lambda rng: {"dish": rng.choice(DISHES)},
        Wordings(
            ("How do I cook {dish}?", "Find a recipe for {dish}.", "I want to cook {dish}.",
             "Recipe for {dish}?"),
            ("Please find a recipe for {dish}.", "I need a recipe for {dish}."),
        ),
        recipe_reply,
    ),
    Family(
        ("book_table", "reserve_table", "reservation", "book_restaurant"),
        ("Book a table in a restaurant", "Reserve a table"),
        ((("people", "guests", "count"), "integer"), (("day", "date"), "string")),
        lambda rng: {"people": rng.randint(2, 12), "day": rng.choice(DAYS)},
        Wordings(
            ("Book a table for {people} on {day}.", "Reserve a table for {people} people on {day}.",
             "A table for {people} on {day}, please.",
             "I need a table on {day} for {people} people."),
            ("Please book a table for {people} on {day}.",
             "Please reserve a table on {day} for {people}."),
        ),
        table_reply,
    ),
    Family(
        ("play_music", "play_song", "play", "music_player"),
        ("Play a song", "Play music"),
        ((("song", "title", "track"), "string"),),
        lambda rng: {"song": rng.choice(SONGS)},
        Wordings(
            ("Play {song}.", "Play the song {song}.", "I want to hear {song}.", "Put on {song}."),
            ("Please play {song}.", "Can you play {song}?"),
        ),
        song_reply,
    ),
    Family(
        ("create_event", "add_event", "calendar", "new_event"),
        ("Add an event to the calendar", "Create a calendar event"),
        ((("title", "name", "event"), "string"), (("day", "date"), "string")),
        lambda rng: {"title": rng.choice(EVENTS), "day": rng.choice(DAYS)},
        Wordings(
            ("Add {title} on {day} to my calendar.", "Put {title} in my calendar for {day}.",
             "I have {title} on {day}.", "Create an event on {day}: {title}"),
            ("Please add {title} on {day} to the calendar.", "Create an event {title} on {day}."),
        ),
        event_reply,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """One concrete tool: its name and the names that its family's arguments have here."""

    name: str
    params: tuple[str, ...]
    tool: Tool


def varied(rng: Random, name: str, endings: Sequence[str]) -> str:
    """Now and then a longer name, so that names must be read and cannot be known by heart."""
    draw = rng.random()
    if draw < 0.2:
        return f"{name}_{rng.choice(endings)}"
    return f"{name}_{made_up(rng).lower()}" if draw < 0.3 else name


def signature(family: Family, rng: Random, held: bool) -> Signature:
    """A tool from the asked side of the split, where the family has one there."""
    for _ in range(200):
        name = varied(rng, rng.choice(family.names), TOOL_ENDINGS)
        params = tuple(varied(rng, rng.choice(names), PARAM_ENDINGS) for names, _ in family.params)
        if split_key(f"{name} {params}") == held:
            break
    properties: dict[str, Any] = {}
    for param, (names, json_type) in zip(params, family.params, strict=True):
        properties[param] = {"type": json_type}
        if rng.random() < 0.25:
            properties[param]["description"] = f"The {names[0]}"
    if "weather" in name and rng.random() < 0.3:  # an optional argument that no request needs
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    function = {
        "name": name,
        "description": rng.choice(family.abouts),
        "parameters": {"type": "object", "properties": properties, "required": list(params)},
    }
    if rng.random() < 0.15:
        del function["description"]
    return Signature(name, params, {"type": "function", "function": function})


def toolbox(rng: Random, held: bool) -> tuple[Family, Signature, tuple[Tool, ...]]:
    """One to three tools of different families, and which of them is to be called."""
    families = rng.sample(FAMILIES, rng.choice((1, 1, 2, 2, 3)))
    signs = [signature(family, rng, held) for family in families]
    at = rng.randrange(len(families))
    return families[at], signs[at], tuple(sign.tool for sign in signs)


def call_message(name: str, arguments: Values) -> Message:
    """The assistant turn that calls one tool (the chat template writes the markup)."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def request(
    rng: Random, held: bool
) -> tuple[list[Message], Family, Values, tuple[Tool, ...], Values]:
    family, sign, tools = toolbox(rng, held)
    drawn = family.draw(rng)
    arguments = {
        param: drawn[names[0]] for param, (names, _) in zip(sign.params, family.params, strict=True)
    }
    prompt = roughen(rng, family.ask.pick(rng, held).format(**drawn))
    messages = [user(prompt), call_message(sign.name, arguments)]
    return messages, family, drawn, tools, {"name": sign.name, "arguments": arguments}


def tool_call(rng: Random, held: bool) -> Example:
    """A request that needs a tool; in training a few go on with the response and the answer."""
    messages, family, drawn, tools, want = request(rng, held)
    if not held and rng.random() < 0.4:
        messages = answered(rng, messages, family, drawn)
    return Example("tool call", messages, "call", want, tools)


def answered(rng: Random, messages: list[Message], family: Family, drawn: Values) -> list[Message]:
    response, answer = family.reply(rng, drawn)
    reply = {"role": "tool", "content": json.dumps(response)}
    return [*messages, reply, assistant(answer)]


def tool_answer(rng: Random, held: bool) -> Example:
    """The turn after the tool's response."""
    messages, family, drawn, tools, _ = request(rng, held)
    messages = answered(rng, messages, family, drawn)
    return Example("tool answer", messages, "reply", [messages[-1]["content"]], tools)


def tool_free(rng: Random, held: bool) -> Example:
    """Tools are there, but the prompt needs none."""
    plain = rng.choice((greeting, small_talk, fact))(rng, held)
    return Example("no tool", plain.messages, plain.check, plain.want, toolbox(rng, held)[2])
