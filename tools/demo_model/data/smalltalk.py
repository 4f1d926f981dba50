"""Greetings, small talk, questions about the model itself, lists and other small orders.

Each topic maps prompts to a few fixed replies, so that an answer can be checked against the replies
of its topic. Invariant: the last fifth of a topic's prompts (at least one) is held out.
"""

import json
from dataclasses import dataclass
from random import Random

from .base import Example, assistant, roughen, split_key, user, words
from .lexicon import CITIES, COLORS, DAYS, FIRST_NAMES, MONTHS, made_up


@dataclass(frozen=True)
class Topic:
    prompts: tuple[str, ...]
    replies: tuple[str, ...]

    def side(self, held: bool) -> tuple[str, ...]:
        cut = len(self.prompts) - max(1, len(self.prompts) // 5)
        return self.prompts[cut:] if held else self.prompts[:cut]


GREETINGS = (
    Topic(
        ("Hi", "Hello", "Hey", "Hello!", "Hi there!", "Hey there", "Hello there!", "Hi, model!",
         "Howdy",
         "Greetings!", "Hello, who is there?", "Hey, are you there?", "Good day!", "Hi!", "Yo",
         "Hello, my friend!", "Hey you!", "Hello again!", "Hi friend!"),
        ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! Nice to meet you."),
    ),
    Topic(
        ("Good morning", "Good morning!", "A good morning to you!", "Morning!",
         "Good morning, model",
         "Good morning to you!", "Good morning, dear model!"),
        ("Good morning! How can I help you?", "Good morning! I hope you slept well."),
    ),
    Topic(
        ("Good evening", "Good evening!", "A good evening to you!", "Evening!",
         "Good evening, model",
         "Good evening to you!", "Good evening, dear model!"),
        ("Good evening! What can I do for you?", "Good evening! How was your day?"),
    ),
    Topic(
        ("Goodbye", "Bye", "Bye bye!", "See you later!", "See you", "Goodbye!", "I have to go now.",
         "See you tomorrow!", "That is all, bye.", "Good night!", "I must go, goodbye!",
         "Bye now!"),
        ("Goodbye! Come back soon.", "Bye! Have a nice day."),
    ),
    Topic(
        ("Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Thank you very much!",
         "Many thanks",
         "Great, thanks!", "Thanks, this was helpful.", "Thank you, that is a help.",
         "Thanks for your help!", "Thank you so much", "Thank you, my friend!",
         "Thanks, that helped."),
        ("You are welcome!", "You are welcome! Ask me anything else."),
    ),
)  # fmt: skip
SMALL_TALK = (
    Topic(
        ("How are you?", "How are you today?", "How do you do?", "How is it going?",
         "How are things?",
         "Are you well?", "How do you feel?", "What's up?", "How have you been?",
         "Are you doing well?",
         "How do you feel today?"),
        ("I am fine, thank you. How are you?", "I am well, thanks! And you?"),
    ),
    Topic(
        ("I am fine too.", "I am fine, thanks.", "I am good.", "I am very well!",
         "I feel great today!",
         "I am happy today.", "All is well here.", "I am doing great!", "I feel good today."),
        ("That is good to hear! What can I do for you?", "I am glad! How can I help you?"),
    ),
    Topic(
        ("I am sad.", "I feel sad today.", "I am not feeling well.", "I am tired.", "I feel bad.",
         "I had a bad day.", "Today was a hard day.", "I am very tired today.", "I feel so sad."),
        ("I am sorry to hear that. I hope you feel better soon.",
         "I am sorry. A walk and a cup of tea may help."),
    ),
    Topic(
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
         "Introduce yourself.", "Who am I talking to?", "What should I call you?",
         "Do you have a name?",
         "What kind of model are you?", "Please introduce yourself.", "So who are you?",
         "Tell me who you are."),
        ("I am the demo model of headrace, a very small language model.",
         "I am a tiny language model that comes with headrace."),
    ),
    Topic(
        ("What can you do?", "What do you know?", "How can you help me?", "Help",
         "Can you help me?",
         "What are you good at?", "What can I ask you?", "I need help.", "What are your skills?",
         "What things can you do?", "Help me please", "Which things can you do?",
         "What can you do for me?"),
        ("I can chat, do small sums, tell short stories, answer simple questions, "
         "read fields as JSON and call tools.",),
    ),
    Topic(
        ("Are you human?", "Are you a person?", "Are you a robot?", "Are you alive?",
         "Are you real?",
         "Are you a machine?", "Are you a computer?", "Do you have a body?",
         "Are you a real person?",
         "Are you a human being?"),
        ("No, I am not a person. I am a small language model.",),
    ),
    Topic(
        ("How big are you?", "How many parameters do you have?", "What is your size?",
         "Are you a large model?", "How large are you?", "How small are you?",
         "How big is this model?",
         "How many parameters are in you?"),
        ("I am very small: I have between three and four million parameters.",),
    ),
    Topic(
        ("Who made you?", "Who created you?", "Who trained you?", "Where do you come from?",
         "How were you made?", "How were you trained?", "Who built you?", "Who is your maker?",
         "How were you created?"),
        ("I was trained from nothing on text that a script of the headrace project generates.",),
    ),
    Topic(
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.",
         "I want to hear a joke.", "Another joke, please.", "Tell me something funny.",
         "Can you tell me a joke?", "Please tell me a joke.", "Got a joke for me?"),
        ("Why did the mill stop? The wheel needed a break.",
         "What do you call a sleeping river? A water bed.",
         "Why was the cache so calm? It had seen it all before."),
    ),
    Topic(
        ("What is your favorite color?", "Which color do you like best?", "Do you like a color?",
         "Tell me your favorite color.", "What color do you like?",
         "Which is your favorite color?"),
        ("I like blue, the color of water.",),
    ),
    Topic(
        ("Do you like music?", "Do you like stories?", "Do you like animals?", "Do you like books?",
         "Do you like tea?", "Do you like the sea?", "Do you like rain?", "Do you like cats?",
         "Do you like dogs?", "Do you like summer?"),
        ("I like it in my own way: I know words about it.",),
    ),
    Topic(
        ("You are great!", "You are very good.", "Well done!", "Good job!", "I like you.",
         "Nice work!",
         "That was great!", "You are clever.", "Very good!", "You are so smart!", "Good work!"),
        ("Thank you! You are very kind.", "Thank you, that is nice to hear."),
    ),
    Topic(
        ("Okay", "Ok", "I see.", "Alright", "Good", "Fine", "Interesting.", "Cool", "Nice", "Sure",
         "I understand."),
        ("Good! What else can I do for you?",),
    ),
    Topic(
        ("That is wrong.", "You are wrong.", "This is not right.", "No, that is false.",
         "Wrong answer.",
         "That is not correct.", "You made a mistake.", "No, you are wrong."),
        ("I am sorry. I am very small and I make mistakes.",),
    ),
    Topic(
        ("Write a poem about time.", "Who will win the election?", "Explain quantum physics.",
         "What is the meaning of life?", "Write a Python program.", "What will happen tomorrow?",
         "Who won the game last night?", "What did I eat yesterday?", "Explain the stock market.",
         "Write me an essay about history.", "How do I cook a duck?", "What is the best phone?",
         "Fix my code.", "What is the news today?", "Prove this theorem.", "Who is the president?",
         "How do I become rich?", "Write a song about love.", "What is the best movie?",
         "Explain general relativity.", "How do I fix my car?", "Write a letter to my boss.",
         "What should I wear today?", "Which team is the best?", "Write a program in C.",
         "What is on television tonight?", "Explain the economy.", "Who will win the match?",
         "Write an essay about love."),
        ("I do not know that. I am a very small model and can only do simple things.",),
    ),
)  # fmt: skip


def from_topics(kind: str, topics: tuple[Topic, ...], rng: Random, held: bool) -> Example:
    topic = rng.choice(topics)
    prompt = rng.choice(topic.side(held))
    messages = [user(roughen(rng, prompt)), assistant(rng.choice(topic.replies))]
    return Example(kind, messages, "reply", list(topic.replies))


def greeting(rng: Random, held: bool) -> Example:
    return from_topics("greeting", GREETINGS, rng, held)


def small_talk(rng: Random, held: bool) -> Example:
    return from_topics("small talk", SMALL_TALK, rng, held)


GROUPS = {
    "colors": ("red", "blue", "green", "yellow", "white"),
    "animals": ("cat", "dog", "horse", "bear", "fox"),
    "fruits": ("apple", "pear", "banana", "cherry", "plum"),
    "vegetables": ("carrot", "onion", "potato", "tomato", "leek"),
    "planets": ("Mercury", "Venus", "Earth", "Mars", "Jupiter"),
    "countries": ("France", "Japan", "Brazil", "Egypt", "Canada"),
    "cities": ("Paris", "London", "Tokyo", "Cairo", "Lima"),
    "rivers": ("Nile", "Amazon", "Danube", "Rhine", "Ganges"),
    "metals": ("iron", "gold", "silver", "copper", "tin"),
    "trees": ("oak", "pine", "birch", "maple", "willow"),
    "birds": ("owl", "eagle", "robin", "swan", "raven"),
    "flowers": ("rose", "tulip", "daisy", "lily", "violet"),
    "months": tuple(MONTHS[:5]),
    "days": tuple(DAYS[:5]),
    "tools": ("hammer", "saw", "drill", "file", "axe"),
    "drinks": ("water", "tea", "milk", "coffee", "juice"),
}
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
PLAIN_WORDS = words(
    """mill, river, stone, apple, cloud, window, garden, lamp, forest, bread, music, wheel, water,
    house, bird, horse, train, tea, cake, book, moon, star, winter, summer, door, table, chair,
    boat, bridge, road, mountain, sea, island, sugar, salt, pepper, paper, pencil, clock, mirror,
    hat, coat, shoe, ring, king, queen, friend, child, teacher, doctor, baker, farmer, fox, bear,
    cat, dog, owl, wolf, lion, mouse, frog, happy, sad, big, small, fast, slow, old, young, hot,
    cold, run, walk, sing, read, write, open, close, good, bad, hello, yes, no, one, two, three,
    four, five, six, seven"""
)


def any_word(rng: Random) -> str:
    """A word from any list, a name, a number or a made-up word."""
    lists = (PLAIN_WORDS, PLAIN_WORDS, COLORS, FIRST_NAMES, CITIES, DAYS)
    draw = rng.random()
    if draw < 0.25:
        return made_up(rng).lower() if draw < 0.15 else made_up(rng)
    return str(rng.randint(0, 99)) if draw < 0.32 else rng.choice(rng.choice(lists))


def name_some(rng: Random, held: bool) -> tuple[str, str]:
    group, n = rng.choice([*GROUPS]), rng.randint(2, 5)
    forms = ["Name {n} {g}.", "List {n} {g}.", "Give me {n} {g}.", "Tell me {n} {g}."]
    if held:
        forms = ["Please name {n} {g}.", "Can you list {n} {g}?"]
    return rng.choice(forms).format(n=COUNTS[n], g=group), ", ".join(GROUPS[group][:n]) + "."


def count(rng: Random, held: bool) -> tuple[str, str]:
    while True:
        low, high = rng.randint(1, 12), rng.randint(2, 20)
        if low < high and split_key(f"count {low} {high}") == held:
            break
    form = rng.choice(("Count from {a} to {b}.", "Please count from {a} to {b}."))
    return form.format(a=low, b=high), ", ".join(map(str, range(low, high + 1)))


def echo(rng: Random, held: bool) -> tuple[str, str]:
    text = " ".join(any_word(rng) for _ in range(rng.randint(1, 4 if held else 10)))
    forms = ("Repeat after me: {t}", "Say: {t}", "Repeat: {t}", 'Say "{t}".', "Copy this: {t}")
    form = "Please say: {t}" if held else rng.choice(forms)
    return form.format(t=text), text


def as_list(rng: Random, held: bool) -> tuple[str, str]:
    items = [any_word(rng) for _ in range(rng.randint(2, 5))]
    forms = ("Write as a JSON list: {t}", "Make a JSON list of {t}.", "Give me a JSON list: {t}")
    form = "Put this in a JSON list: {t}" if held else rng.choice(forms)
    return form.format(t=", ".join(items)), json.dumps(items)


def at_end(rng: Random, held: bool) -> tuple[str, str]:
    items = [any_word(rng) for _ in range(rng.randint(2, 5))]
    which = rng.choice(("first", "last"))
    forms = ("What is the {w} word of: {t}", "Which word is {w}? {t}", "The {w} word of: {t}")
    form = "Tell me the {w} word of: {t}" if held else rng.choice(forms)
    return form.format(w=which, t=" ".join(items)), items[0 if which == "first" else -1]


def neighbor(rng: Random, held: bool) -> tuple[str, str]:
    unit, ring = rng.choice((("day", DAYS), ("month", MONTHS)))
    at = rng.randrange(len(ring))
    after = rng.random() < 0.5
    forms = ["Which {u} comes {w} {x}?", "What {u} comes {w} {x}?", "What is the {u} {w} {x}?"]
    form = "Tell me the {u} that comes {w} {x}." if held else rng.choice(forms)
    answer = ring[(at + (1 if after else -1)) % len(ring)]
    where = "after" if after else "before"
    return form.format(u=unit, w=where, x=ring[at]), f"{answer} comes {where} {ring[at]}."


def orders(rng: Random, held: bool) -> Example:
    """Small orders with one right answer; copying weighs more, since much else is built on it."""
    makers = (name_some, count, neighbor, as_list, at_end, echo)
    prompt, answer = rng.choices(makers, (2, 2, 2, 2, 1, 1 if held else 3))[0](rng, held)
    return Example("orders", [user(prompt), assistant(answer)], "reply", [answer])
