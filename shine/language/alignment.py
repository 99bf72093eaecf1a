"""Which words of a sentence depart from those of another."""

from collections.abc import Sequence
from difflib import SequenceMatcher


def changed_places(query: Sequence[str], text: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """Of each word of `query` and of `text`, whether it has no counterpart in the other.

    Sentences of equal length are compared place by place, others by their longest common runs.
    """
    if len(query) == len(text):
        differs = [one != other for one, other in zip(query, text, strict=True)]
        return differs, list(differs)
    lost, new = [True] * len(query), [True] * len(text)
    for block in SequenceMatcher(None, query, text, autojunk=False).get_matching_blocks():
        lost[block.a : block.a + block.size] = [False] * block.size
        new[block.b : block.b + block.size] = [False] * block.size
    return lost, new
