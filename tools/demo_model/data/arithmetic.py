"""Arithmetic with numbers up to 99, and conversions between units.

The answer repeats the problem (`47 + 38 = 85`): a small model finds the operands again at fixed
places. Invariant: one problem in ten is reserved for evaluation by `split_key`.
"""

from random import Random

from .base import Example, Wordings, assistant, roughen, split_key, user

SYMBOLS = Wordings(
    (
        "What is {a} {op} {b}?", "{a} {op} {b}", "{a} {op} {b} = ?", "Calculate {a} {op} {b}.",
        "How much is {a} {op} {b}?", "Please compute {a} {op} {b}.", "What's {a} {op} {b}?",
        "{a}{op}{b}", "Solve {a} {op} {b}.", "Can you tell me what {a} {op} {b} is?",
    ),
    ("Work out {a} {op} {b}.", "Tell me the result of {a} {op} {b}.",
     "What does {a} {op} {b} make?"),
)  # fmt: skip
SPOKEN = {
    "+": Wordings(
        ("What is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"),
        ("How much is {a} plus {b}?",),
    ),
    "-": Wordings(
        ("What is {a} minus {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}."),
        ("How much is {a} minus {b}?",),
    ),
    "*": Wordings(
        ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
        ("How much is {a} times {b}?",),
    ),
}
RESULTS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def problem(rng: Random, held: bool) -> tuple[int, str, int]:
    """Operands and operator from the asked side of the split; results are never negative."""
    while True:
        op = rng.choices("+-*", (5, 4, 2))[0]
        if op == "*":
            a, b = rng.randint(0, 12), rng.randint(0, 12)
        else:
            a, b = rng.randint(0, 99), rng.randint(0, 99)
        if op == "-" and a < b:
            a, b = b, a
        # Products are learned by heart: all are trained on, only the wordings differ.
        if op == "*" or split_key(f"{a}{op}{b}") == held:
            return a, op, b


def sums(rng: Random, held: bool) -> Example:
    """One problem, or in training often several in a row, one per turn."""
    messages = []
    for _ in range(1 if held else rng.choice((1, 2, 3, 5))):
        a, op, b = problem(rng, held)
        wording = (SPOKEN[op] if rng.random() < 0.35 else SYMBOLS).pick(rng, held)
        prompt = wording.format(a=a, op=op, b=b)
        result = RESULTS[op](a, b)
        messages += [user(roughen(rng, prompt)), assistant(f"{a} {op} {b} = {result}")]
    return Example("arithmetic", messages, "words", [f"= {result}"])


def sum_text(rng: Random) -> str:
    """The same as plain text, for completion without a chat."""
    lines = []
    for _ in range(6):
        a, op, b = problem(rng, False)
        lines.append(f"{a} {op} {b} = {RESULTS[op](a, b)}")
    return "\n".join(lines)


# one large unit is `factor` small ones
UNITS = (
    ("kilometers", "meters", 1000), ("meters", "centimeters", 100),
    ("centimeters", "millimeters", 10),
    ("kilograms", "grams", 1000), ("tons", "kilograms", 1000), ("liters", "milliliters", 1000),
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12), ("feet", "inches", 12), ("yards", "feet", 3), ("dozens", "eggs", 12),
    ("meters", "millimeters", 1000), ("kilobytes", "bytes", 1000), ("euros", "cents", 100),
    ("dollars", "cents", 100), ("centuries", "years", 100), ("decades", "years", 10),
)  # fmt: skip
DOWN = Wordings(
    (
        "How many {small} are in {n} {large}?", "Convert {n} {large} to {small}.",
        "What is {n} {large} in {small}?", "{n} {large} in {small}",
        "How many {small} are {n} {large}?",
    ),
    ("How many {small} do {n} {large} have?", "Please convert {n} {large} into {small}."),
)  # fmt: skip


def units(rng: Random, held: bool) -> Example:
    """From a large unit to a small one, with up to 12 of the large one."""
    while True:
        large, small, factor = rng.choice(UNITS)
        n = rng.randint(1, 12)
        if split_key(f"{n} {large} {small}") == held:
            break
    if n == 1:
        large = {"feet": "foot", "centuries": "century"}.get(large, large.removesuffix("s"))
    prompt = DOWN.pick(rng, held).format(n=n, large=large, small=small)
    if n == 1:
        prompt = prompt.replace(" are 1 ", " are in 1 ").replace(" do 1 ", " does 1 ")
    result = n * factor
    verb = "is" if n == 1 else "are"
    answer = f"{n} {large} {verb} {result} {small}."
    return Example("units", [user(roughen(rng, prompt)), assistant(answer)], "words", [str(result)])
