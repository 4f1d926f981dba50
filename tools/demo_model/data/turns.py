"""Several turns: what the user said earlier, and follow-up questions.

Invariant: what is asked at the end can be answered only with an earlier turn.
"""

from random import Random

from .arithmetic import problem
from .base import Example, Message, Wordings, assistant, roughen, upper_first, user, words
from .facts import RELATIONS, ask, fact
from .lexicon import COLORS, a_city, a_name
from .smalltalk import greeting, small_talk

TELL_NAME = Wordings(
    ("My name is {x}.", "I am {x}.", "Hi, I am {x}.", "Hello, my name is {x}.", "Call me {x}.",
     "I'm {x}.",
     "Hello! I am {x}.", "Hi, my name is {x}."),
    ("Hello, I am {x}.", "Good day, my name is {x}."),
)  # fmt: skip
ASK_NAME = Wordings(
    ("What is my name?", "Do you remember my name?", "Who am I?", "Do you know my name?",
     "What was my name?", "Tell me my name.", "Can you say my name?"),
    ("What's my name?", "Do you still know my name?"),
)  # fmt: skip
PETS = words("dog, cat, horse, rabbit, hamster, parrot, turtle, goldfish")

# statement, reply, question, its held wording, answer; {x} is the value
MEMORIES = (
    ("I live in {x}.", "{x} sounds like a nice place!", "Where do I live?",
     "In which city do I live?",
     "You live in {x}.", a_city),
    ("My favorite color is {x}.", "{x} is a nice color!", "What is my favorite color?",
     "Which color do I like best?", "Your favorite color is {x}.", lambda rng: rng.choice(COLORS)),
    ("I have a {x}.", "A {x}, how nice!", "Which animal do I have?", "What animal do I have?",
     "You have a {x}.", lambda rng: rng.choice(PETS)),
    ("I am {x} years old.", "{x} is a good age!", "How old am I?", "What is my age?",
     "You are {x} years old.", lambda rng: str(rng.randint(6, 99))),
    ("My friend is called {x}.", "{x} is a nice name!", "What is my friend called?",
     "What is the name of my friend?", "Your friend is called {x}.", a_name),
)  # fmt: skip


def between(rng: Random, held: bool) -> list[Message]:
    """Zero to two other exchanges."""
    messages: list[Message] = []
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        messages += rng.choice((small_talk, fact))(rng, held).messages
    return messages


def remember_name(rng: Random, held: bool) -> Example:
    name = a_name(rng)
    messages = [
        user(TELL_NAME.pick(rng, held).format(x=name)),
        assistant(f"Nice to meet you, {name}! How can I help you?"),
        *between(rng, held),
        user(roughen(rng, ASK_NAME.pick(rng, held))),
        assistant(f"Your name is {name}."),
    ]
    return Example("several turns", messages, "words", [name])


def remember_thing(rng: Random, held: bool) -> Example:
    tell, reply, question, held_question, answer, draw = rng.choice(MEMORIES)
    value = draw(rng)
    opening = greeting(rng, held).messages if rng.random() < 0.3 else []
    messages = [
        *opening,
        user(tell.format(x=value)),
        assistant(upper_first(reply.format(x=value))),
        *between(rng, held),
        user(
            held_question
            if held
            else roughen(rng, rng.choice((question, question, tell_back(question))))
        ),
        assistant(answer.format(x=value)),
    ]
    return Example("several turns", messages, "words", [value])


def tell_back(question: str) -> str:
    return f"Do you remember? {question}"


def follow_up(rng: Random, held: bool) -> Example:
    """The capital of France; and of Italy?"""
    kind = rng.choice(RELATIONS[:4])
    (x, y), (x2, y2) = rng.sample(kind.rows, 2)
    first = ask(kind, x, y, rng, held).messages
    forms = ("And of {x}?", "And {x}?", "What about {x}?", "And for {x}?")
    form = "How about {x}?" if held else rng.choice(forms)
    answer = upper_first(kind.answer.format(x=x2, y=y2))
    messages = [*first, user(form.format(x=x2)), assistant(answer)]
    return Example("several turns", messages, "words", [y2])


def go_on_counting(rng: Random, held: bool) -> Example:
    """A sum, then `Now add 5.`"""
    a, op, b = problem(rng, held)
    while op != "+" or a + b > 89:
        a, op, b = problem(rng, held)
    more = rng.randint(1, 9)
    forms = ("Now add {n}.", "Add {n} to that.", "Plus {n}?")
    form = "And now add {n}." if held else rng.choice(forms)
    messages = [
        user(f"What is {a} + {b}?"), assistant(f"{a} + {b} = {a + b}"),
        user(form.format(n=more)), assistant(f"{a + b} + {more} = {a + b + more}"),
    ]  # fmt: skip
    return Example("several turns", messages, "words", [f"= {a + b + more}"])


def several_turns(rng: Random, held: bool) -> Example:
    makers = (
        remember_name,
        remember_name,
        remember_thing,
        remember_thing,
        follow_up,
        go_on_counting,
    )
    return rng.choice(makers)(rng, held)
