"""Captions tagged by hand, as compact as they can be written."""

from shine.language.neighbours import Neighbours, count_contexts
from shine.language.vocabulary import Vocabulary, count_words
from shine.language.words import Word

KINDS = {
    "DT": "DET",
    "NN": "NOUN",
    "NNS": "NOUN",
    "VBZ": "VERB",
    "VBG": "VERB",
    "JJ": "ADJ",
    "IN": "ADP",
    "RP": "ADP",
    "RB": "ADV",
    "PRP$": "PRON",
    "TO": "PART",
    ".": "PUNCT",
    "CC": "CCONJ",
    "AUX": "AUX",
}


def tagged(text):
    """Words of "the/DT person/NN opens/VBZ=open ./."; no space before punctuation."""
    parts = []
    for token in text.split():
        form, _, rest = token.rpartition("/")
        tag, _, lemma = rest.partition("=")
        parts.append((form, tag, lemma or form.lower()))
    words = []
    for number, (form, tag, lemma) in enumerate(parts):
        last = number + 1 == len(parts) or parts[number + 1][1] == "."
        pos = KINDS[tag]
        tag = "VBZ" if tag == "AUX" else tag
        words.append(Word(form, "" if last else " ", pos, tag, lemma))
    return tuple(words)


def plain(words):
    return "".join(word.text + word.space for word in words)


def counted(captions):
    """The vocabulary and the neighbours of some captions."""
    return (
        Vocabulary.from_counts(count_words(captions)),
        Neighbours(count_contexts(captions)),
    )


OPENS = tagged("a/DT person/NN opens/VBZ=open the/DT door/NN ./.")

_VERBS = ("opens=open", "closes=close", "fixes=fix", "washes=wash", "paints=paint")
_THINGS = ("door", "window", "apple", "laptop", "towel")
_PLACES = ("on/IN the/DT table/NN", "under/IN the/DT lamp/NN", "near/IN the/DT box/NN")

# Every verb with every thing in every place, by a person or a dog.
GRID = tuple(
    tagged(
        f"{who} {verb.partition('=')[0]}/VBZ={verb.partition('=')[2]} "
        f"{'an' if thing == 'apple' else 'a'}/DT {thing}/NN {place} ./."
    )
    for who in ("the/DT person/NN", "the/DT man/NN")
    for verb in _VERBS
    for thing in _THINGS
    for place in _PLACES
)
