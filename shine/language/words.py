"""A word of a caption, apart from who tags it: spaCy takes seconds to import."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Word:
    """One word as it stands in its caption, and what it is there.

    White space at the start of a caption follows no word; it belongs to one with an empty text.
    """

    text: str  # as written
    space: str  # white space after it, mostly "" or " "
    pos: str  # universal part of speech: VERB, NOUN, ADJ, ADP, ADV, AUX, DET, PRON, PUNCT, ...
    tag: str  # Penn tag, which tells the inflection: VBZ, VBG, NNS, NN, JJ, IN, RP, RB, ...
    lemma: str  # dictionary form in lower case
