"""Synonyms of a wordnet beside those of our own lexicon, through the optional package `wn`."""

from functools import lru_cache
from typing import Final

from shine.errors import InputError
from shine.language.lexicon import OWN, Meanings

_PARTS: Final = {"VERB": "v", "NOUN": "n", "PROPN": "n", "ADJ": "as", "ADV": "r"}
# One step up or down for things; what an act entails or causes, and what entails or causes it.
_RELATIONS: Final = {
    "n": ("hypernym", "hyponym"),
    "v": ("entails", "is_entailed_by", "causes", "is_caused_by"),
}


class WordNet:
    """Looks words up in all their senses: with more than one meaning, each counts.

    Args:
        name: a lexicon that the package `wn` has, such as "oewn:2024".

    Raises:
        InputError: the package or the lexicon is missing.
    """

    def __init__(self, name: str):
        try:
            import wn
        except ImportError:
            raise InputError(
                f"negatives.wordnet={name} needs the package wn, which is not installed; run "
                f"`pip install 'shine-grounding[wordnet]'`"
            ) from None
        try:
            self._lexicon = wn.Wordnet(name, expand="")
        except wn.Error:
            raise InputError(
                f"negatives.wordnet={name} is no lexicon that the package wn has here; run "
                f"`python -m wn download {name}`"
            ) from None
        self._known: dict[tuple[str, str], frozenset[str]] = {}

    def __call__(self, lemma: str, pos: str) -> frozenset[str]:
        """The other lemmas that share a meaning with this one or are one step from it.

        Args:
            lemma: dictionary form in lower case.
            pos: universal part of speech; prepositions have none.
        """
        if (lemma, pos) not in self._known:
            found: set[str] = set()
            for part in _PARTS.get(pos, ""):
                for synset in self._lexicon.synsets(lemma, part):
                    related = synset.get_related(*_RELATIONS.get(part, ("similar",)))
                    for near in (synset, *related):
                        found.update(other.lower() for other in near.lemmas())
            self._known[lemma, pos] = frozenset(found - {lemma})
        return self._known[lemma, pos]


@lru_cache(maxsize=4)
def load_meanings(wordnet: str | None) -> Meanings:
    """The project's own lexicon, with the named wordnet beside it if there is a name.

    Args:
        wordnet: see `WordNet`.

    Raises:
        InputError: the package or the lexicon is missing.
    """
    return OWN if wordnet is None else Meanings((WordNet(wordnet),))
