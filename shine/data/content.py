"""What a caption says: its concepts by role, and which verb goes with which noun."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shine.language.masking import maskable
from shine.language.words import Word

_ROLES: Final = {
    "VERB": "verb",
    "NOUN": "noun",
    "PROPN": "noun",
    "ADJ": "adjective",
    "ADP": "preposition",
    "ADV": "adverb",
}


@dataclass(frozen=True, slots=True)
class Content:
    """The content words of a caption, persons and function words left out."""

    concepts: tuple[tuple[str, str], ...]  # role and lemma, in order; no role twice with one lemma
    pairs: tuple[tuple[str, str], ...]  # lemmas of verb and noun

    @property
    def lemmas(self) -> frozenset[str]:
        """Every lemma of the caption, in whatever role."""
        return frozenset(lemma for _, lemma in self.concepts)


def read_content(words: Sequence[Word]) -> Content:
    """The content of a tagged caption.

    A noun next after a preposition has the role of a place ("in a bag"); after a particle it has
    not ("turns on the light"). A verb is paired with the first noun behind it, if no other verb
    comes first.
    """
    concepts: list[tuple[str, str]] = []
    pairs: list[tuple[str, str]] = []
    verb: str | None = None
    after_preposition = False
    for position in sorted(maskable(words)):
        word = words[position]
        role = _ROLES[word.pos]
        if role == "verb":
            verb = word.lemma
        if role == "noun" and verb is not None:
            pairs.append((verb, word.lemma))
            verb = None
        if role == "noun" and after_preposition:
            role = "place"
        if role != "adjective":
            after_preposition = role == "preposition" and word.tag != "RP"
        concepts.append((role, word.lemma))
    return Content(tuple(dict.fromkeys(concepts)), tuple(dict.fromkeys(pairs)))
