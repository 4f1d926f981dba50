"""Word lists that several kinds share: people, places, animals, things.

Invariant: `a_name` gives listed names and, for a third of the draws, made-up ones, so that a model
must copy a name from the prompt instead of knowing it.
"""

from random import Random

from .base import words

FIRST_NAMES = words(
    """Anna, Ben, Clara, David, Emma, Felix, Grace, Hugo, Iris, Jack, Kate, Leo, Maria, Noah, Olga,
    Paul, Rosa, Sam, Tara, Victor, Wendy, Yusuf, Zoe, Alice, Bob, Carlos, Diana, Elena, Frank,
    Greta, Henry, Ines, Jonas, Karen, Lucas, Mina, Nina, Oscar, Priya, Quinn, Ravi, Sofia, Tom,
    Uma, Vera, Walter, Amir, Bella, Chen, Dora, Erik, Fatima, George, Hana, Ivan, Julia, Kofi,
    Lena, Marco, Naomi, Omar, Petra, Ruth, Sven, Tina, John, Mary, Peter, Laura, Max"""
)
CITIES = words(
    """Paris, London, Berlin, Rome, Madrid, Lisbon, Vienna, Prague, Dublin, Oslo, Stockholm,
    Helsinki, Warsaw, Athens, Cairo, Nairobi, Lagos, Tokyo, Kyoto, Seoul, Beijing, Delhi, Mumbai,
    Sydney, Melbourne, Toronto, Montreal, Chicago, Boston, Seattle, Denver, Austin, Lima, Bogota,
    Santiago, Hamburg, Munich, Zurich, Geneva, Milan, Naples, Porto, Seville, Lyon, Bristol, Leeds,
    Glasgow, Ghent, Krakow, Riga, New York, Mexico City, Hong Kong, San Francisco, Buenos Aires"""
)
COLORS = words(
    """red, blue, green, yellow, orange, purple, pink, white, black, brown, gray, silver, gold,
    turquoise"""
)
DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = words(
    """January, February, March, April, May, June, July, August, September, October, November,
    December"""
)
ONSETS = words("b, br, d, dr, f, g, gr, h, k, kr, l, m, n, p, r, s, st, t, tr, v, z, th, sh")
VOWELS = words("a, e, i, o, u, ai, ia, eo")
CODAS = words("n, r, l, s, m, k, nd, rt, x, t")


def made_up(rng: Random) -> str:
    """A pronounceable word that is in no list, such as Trevan or Zoshil."""
    syllables = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2)))
    return (syllables + rng.choice(CODAS)).capitalize()


def a_name(rng: Random) -> str:
    return made_up(rng) if rng.random() < 0.35 else rng.choice(FIRST_NAMES)


def a_city(rng: Random) -> str:
    return made_up(rng) if rng.random() < 0.2 else rng.choice(CITIES)
