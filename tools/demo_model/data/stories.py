"""Short stories from a grammar: a hero, a wish, a trouble, a helper, an end.

Invariant: a story names the asked hero (and the asked thing) and ends with `The end.`; hero and
thing pairs are split between training and evaluation, and so are the wordings of the request.
"""

from random import Random

from .base import Example, Wordings, article, assistant, roughen, split_key, user, words
from .lexicon import FIRST_NAMES

HEROES = words(
    """fox, bear, cat, dog, mouse, rabbit, owl, wolf, lion, horse, frog, hedgehog, turtle, whale,
    robot, dragon, king, queen, princess, knight, pirate, sailor, miller, baker, farmer, wizard,
    witch, giant, fisherman, gardener, astronaut, teacher, painter, girl, boy, duck, goat, pig,
    sheep, squirrel, elephant, tiger, monkey, penguin, bee, snail, ghost, clown, doctor, tailor"""
)
THINGS = words(
    """lantern, key, boat, map, bell, ring, book, kite, drum, mirror, crown, cake, ladder, basket,
    clock, hat, violin, stone, feather, balloon"""
)
PLACES = (
    "in a small house by the river", "in an old mill", "at the edge of a dark forest",
    "on a high mountain", "near the sea", "in a quiet village", "on a little island",
    "in a green valley", "under a tall tree", "in a city of many bridges",
)  # fmt: skip
TRAITS = words("little, brave, clever, kind, lonely, curious, happy, old, young, shy")
WISHES = (
    ("see the sea", "saw the sea at last"), ("find a friend", "had found a friend at last"),
    ("learn to sing", "could sing at last"), ("fly over the hills", "flew over the hills at last"),
    ("bake the best bread", "baked the best bread of all"), ("find a treasure",
     "held the treasure at last"),
    ("build a boat", "had built a fine boat"), ("touch the snow", "touched the snow at last"),
    ("repair the water wheel", "saw the water wheel turn again"),
    ("read all the books", "had read all the books"),
)  # fmt: skip
TROUBLES = (
    ("a storm came and the bridge broke", "built a new bridge"),
    ("the river was too wide", "found a small boat"),
    ("the night was dark and cold", "made a warm fire"),
    ("a big stone lay on the road", "rolled the stone away"),
    ("the gate was closed", "found the hidden key"),
    ("the water stopped flowing", "cleared the channel"),
    ("the path was lost in the fog", "followed the sound of a bell"),
)  # fmt: skip
HELPERS = words("owl, fox, mouse, beaver, raven, deer, fish, child, miller, swan, goat, squirrel")
MORALS = (
    "From that day on, they were best friends.", "Everyone in the village was happy.",
    "They laughed and danced until the morning.", "And they never forgot that day.",
    "They shared bread and honey under the stars.",
)  # fmt: skip

ABOUT_ONE = Wordings(
    (
        "Tell me a story about {x}.", "Write a story about {x}.", "Tell a short story about {x}.",
        "I want a story about {x}.", "Please tell me a story about {x}.",
        "A story about {x}, please.",
        "Write a short story about {x}.", "Can you tell me a story about {x}?",
        "Make up a story about {x}.", "Tell me a short story about {x}.",
    ),
    ("Could you write a story about {x}?", "I would like a story about {x}."),
)  # fmt: skip
ABOUT_NONE = Wordings(
    ("Tell me a story.", "Write a story.", "Tell me a short story.", "I want to hear a story."),
    ("Please tell a story.",),
)


def story(rng: Random, hero: str, thing: str | None) -> str:
    """60 to 150 tokens of story."""
    name, trait, place = rng.choice(FIRST_NAMES), rng.choice(TRAITS), rng.choice(PLACES)
    wish, fulfilled = rng.choice(WISHES)
    trouble, solution = rng.choice(TROUBLES)
    helper = rng.choice([h for h in HELPERS if h != hero])
    lines = [
        f"{rng.choice(('Once upon a time', 'Long ago'))} there was {article(trait)} {hero} "
        f"named {name} who lived {place}."
    ]
    if thing:
        lines.append(f"{name} had {article(thing)} and took it everywhere.")
    lines.append(
        rng.choice((f"More than anything, {name} wanted to {wish}.", f"{name} wanted to {wish}."))
    )
    lines.append(f"One day {name} set out early in the morning, but {trouble}.")
    lines.append(f"Then {name} met {article(helper)}.")
    lines.append(
        rng.choice(
            ('"Do not worry, I will help you," said the ', '"Let us try it together," said the ')
        )
        + f"{helper}."
    )
    lines.append(f"With the {thing}, they {solution}." if thing else f"Together they {solution}.")
    lines.append(f"In the evening {name} {fulfilled}.")
    if rng.random() < 0.7:
        lines.append(rng.choice(MORALS))
    return " ".join([*lines, "The end."])


def stories(rng: Random, held: bool) -> Example:
    while True:
        hero = rng.choice(HEROES)
        thing = rng.choice(THINGS) if rng.random() < 0.4 else None
        if thing is None or split_key(f"{hero} {thing}") == held:
            break
    if thing is None and rng.random() < 0.08:
        prompt, want = ABOUT_NONE.pick(rng, held), []
    else:
        subject = article(hero) + (f" and {article(thing)}" if thing else "")
        if thing is None and rng.random() < 0.2:
            subject = f"{article(rng.choice(TRAITS))} {hero}"
        prompt, want = (
            ABOUT_ONE.pick(rng, held).format(x=subject),
            [hero] + ([thing] if thing else []),
        )
    return Example(
        "stories", [user(roughen(rng, prompt)), assistant(story(rng, hero, thing))], "story", want
    )


def story_text(rng: Random) -> str:
    return story(rng, rng.choice(HEROES), None)
