"""What is done to texts: words swapped for ``AAA``, deleted, or misspelt.

A word is what stands between white space. Of all the words of a text, a given part is chosen at random, rounded to
whole words; white space and the ends of lines stay.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence

import numpy as np

SWAPPED_WORD = "AAA"


def swap_words(lines: Sequence[str], fraction: float, seed: int = 0) -> list[str]:
    """Replace randomly chosen words by ``AAA``, the word-swap attack of Abdullaev et al. (arXiv 2506.10371).

    The number of words does not change. Perplexity on the result includes the swapped words themselves.

    Args:
        lines: the text.
        fraction: part of the words that is replaced.
        seed: of the choice.
    """
    return _change(lines, fraction, np.random.default_rng(seed), lambda word: SWAPPED_WORD)


def delete_words(lines: Sequence[str], fraction: float, seed: int = 0) -> list[str]:
    """Delete randomly chosen words, each with the white space before it in its line.

    Perplexity a word is that of the words that are left.

    Args:
        lines: the text.
        fraction: part of the words that is deleted.
        seed: of the choice.
    """
    return _change(lines, fraction, np.random.default_rng(seed), lambda word: "", r"[^\S\r\n]*(\S+)")


def misspell_words(lines: Sequence[str], fraction: float, seed: int = 0) -> list[str]:
    """Make one typing error in each of randomly chosen words: a letter swapped, dropped, put in or changed.

    The four errors of Damerau 1964, at a random place and with a random small letter, as in the synthetic noise of
    Belinkov and Bisk 2018 (arXiv 1711.02173). A chosen word is always another one afterwards, and never gone.

    Args:
        lines: the text.
        fraction: part of the words that is misspelt.
        seed: of the choice and of the errors.
    """
    rng = np.random.default_rng(seed)
    return _change(lines, fraction, rng, lambda word: _misspelt(word, rng))


CHANGES: dict[str, Callable[[Sequence[str], float, int], list[str]]] = {
    "word_swap": swap_words,
    "deletion": delete_words,
    "typo": misspell_words,
}
"""Name of a change, as in :data:`.settings.TEXT_CHANGES` -> what makes it."""


def _change(
    lines: Sequence[str],
    fraction: float,
    rng: np.random.Generator,
    change: Callable[[str], str],
    pattern: str = r"(\S+)",
) -> list[str]:
    total = sum(len(line.split()) for line in lines)
    chosen = np.zeros(total, dtype=bool)
    chosen[rng.permutation(total)[: round(fraction * total)]] = True
    flags: Iterator[bool] = iter(chosen.tolist())
    return [re.sub(pattern, lambda found: change(found[1]) if next(flags) else found[0], line) for line in lines]


def _misspelt(word: str, rng: np.random.Generator) -> str:
    swappable = [place for place in range(len(word) - 1) if word[place] != word[place + 1]]
    kinds = ["insert", "replace", *(["drop"] if len(word) > 1 else []), *(["swap"] if swappable else [])]
    kind = kinds[rng.integers(len(kinds))]
    if kind == "swap":
        place = swappable[rng.integers(len(swappable))]
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    place = int(rng.integers(len(word) + (kind == "insert")))
    letters = [letter for letter in string.ascii_lowercase if kind == "insert" or letter != word[place]]
    letter = "" if kind == "drop" else letters[rng.integers(len(letters))]
    return word[:place] + letter + word[place + (kind != "insert") :]
