"""Text states without a network: every word has a fixed random vector. For demonstrations without internet."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from haste.data import order

_WORD = re.compile(r"\w+|[^\w\s]")


class Words:
    """A text's words, one a token, as random vectors that depend on the word alone, plus sines of its place.

    It knows nothing of language: similar words have unrelated vectors. A network can learn what each word means from
    data with few words.

    Attributes:
        identities: none, since there are no files.
    """

    def __init__(self, *, tokens: int, width: int):
        """
        Args:
            tokens: L; longer texts are cut, shorter ones end in zeros and their places.
            width: W.
        """
        self.tokens, self.width, self.identities = tokens, width, dict[str, str]()
        angles = np.arange(tokens)[:, None] / 100.0 ** (np.arange(width) // 2 * 2 / width)
        self._places = np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles))  # (L, W)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(N, L, W) float16."""
        states = np.tile(self._places, (len(texts), 1, 1))
        for row, text in enumerate(texts):
            for place, word in enumerate(_WORD.findall(text.lower())[: self.tokens]):
                states[row, place] += _vector(word, self.width)
        return states.astype(np.float16)


@functools.lru_cache(maxsize=1 << 14)
def _vector(word: str, width: int) -> np.ndarray:
    return order.normals(0, f"word {word}", 0, [0], (width,))[0]
