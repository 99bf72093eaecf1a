"""In which company each word stands in the training captions.

A *context* of a position is a named fact about the words around it, such as "the next word is the"
or "the verb before is open". Counting the contexts of every content word tells which words
go where.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from shine.language.words import Word

Context = tuple[str, str]  # what is told, and its value
ContextCounts = Counter[tuple[str, str, str, str]]  # part of speech, lemma, what is told, its value

_CONTENT: Final = frozenset(("VERB", "NOUN", "PROPN", "ADJ", "ADP", "ADV"))
_NOUNS: Final = frozenset(("NOUN", "PROPN"))
_EDGE: Final = "|"  # before the first word, after the last, and at punctuation
_REACH: Final = 32  # words on either side that play a part


def count_contexts(captions: Iterable[Sequence[Word]]) -> ContextCounts:
    """How often each content word of tagged captions stands in each context."""
    return Counter(
        (word.pos, word.lemma, *context)
        for caption in captions
        for i, word in enumerate(caption)
        if word.pos in _CONTENT
        for context in contexts(caption, i)
    )


class Neighbours:
    """Who stands where, looked up by word and by context.

    Args:
        counts: of `count_contexts`; those of parts of a corpus may be added up before.
    """

    def __init__(self, counts: ContextCounts):
        self._words: Counter[tuple[str, str, str]] = Counter()
        self._totals: Counter[tuple[str, str]] = Counter()
        self._held: dict[tuple[str, Context], dict[str, int]] = {}
        for (pos, lemma, name, value), count in counts.items():
            self._words[pos, name, lemma] += count
            self._totals[pos, name] += count
            self._held.setdefault((pos, (name, value)), {})[lemma] = count

    def occurrences(self, pos: str, name: str, lemma: str) -> int:
        """How often a word occurred with some context of this name."""
        return self._words[pos, name, lemma]

    def held(self, pos: str, context: Context) -> Mapping[str, int]:
        """How often each lemma of one part of speech occurred in this very context."""
        return self._held.get((pos, context), {})

    def share(self, pos: str, context: Context) -> float:
        """The share of this context among those of its name, over all words of `pos`."""
        total = self._totals[pos, context[0]]
        return sum(self.held(pos, context).values()) / total if total else 0.0


def contexts(
    words: Sequence[Word], index: int, unknown: frozenset[int] = frozenset()
) -> Iterator[Context]:
    """What the words around `index` are, as far as none of them is unknown.

    | name | told of | value |
    |---|---|---|
    | before | every word but nouns | form of the word before; possessives are one |
    | determiner | a noun | the same; "bare": no article |
    | after | every word | what comes after: a preposition or particle itself, else its kind |
    | left, right | every word | lemma of the next verb, noun or preposition on that side |
    | frame | a verb | all that follows it in its clause, nouns without their words |
    | object, second | a verb | preposition and head of its first and its second noun phrase |
    | verb | a noun, preposition or adverb | the verb it belongs to, the preposition between |
    | particle | a particle | the verb it belongs to, and whether a noun phrase follows |
    | phrase | a preposition | the head of its noun phrase |
    | of, whole | a noun before or after "of" | the noun on the other side |
    | modifier | a noun after a noun | the noun before |
    | head | an adjective, a noun before a noun | the noun it describes |

    Args:
        words: a tagged caption.
        index: the position that is told of; the word there plays no part but for its kind.
        unknown: positions whose words are still open.
    """
    low, high = max(0, index - _REACH), index + _REACH + 1
    if low or high < len(words):
        unknown = frozenset(i - low for i in range(low, high) if i in unknown)
        words, index = words[low:high], index - low
    pos = words[index].pos
    found: list[tuple[str, str, tuple[int, ...]]] = [
        ("determiner" if pos in _NOUNS else "before", _before(words, index), (index - 1,)),
        ("after", *_after(words, index)),
    ]
    for name, i in (("left", _left(words, index)), ("right", _right(words, index))):
        found.append((name, _EDGE if i is None else words[i].lemma, () if i is None else (i,)))
    if pos == "VERB":
        found.append(("frame", *_frame(words, index)))
        found += [
            (name, f"{_lemma(words, between)}/{words[head].lemma}", _known(head, between))
            for name, (between, head) in zip(
                ("object", "second"), _phrases(words, index), strict=False
            )
        ]
    if pos in _NOUNS and index and words[index - 1].pos in _NOUNS:
        found.append(("modifier", words[index - 1].lemma, (index - 1,)))
    if pos in _NOUNS and _head(words, index) != index:
        head = _head(words, index)
        found.append(("head", words[head].lemma, (head,)))
    elif pos == "ADJ" and (head := _right(words, index)) is not None:
        found.append(("head", words[head].lemma, (head,)))
    elif words[index].tag == "RP":
        if (verb := _governor(words, index)) is not None:
            follows = "noun" if _frame(words, index)[0].startswith("noun") else ""
            found.append(("particle", f"{words[verb].lemma}/{follows}", (verb,)))
    elif pos != "VERB" and (verb := _governor(words, index)) is not None:
        between = _preposition(words, verb, index) if pos in _NOUNS else None
        found.append(
            ("verb", f"{words[verb].lemma}/{_lemma(words, between)}", _known(verb, between))
        )
    if pos == "ADP" and words[index].tag != "RP" and (head := _noun(words, index)) is not None:
        found.append(("phrase", words[head].lemma, (head,)))
    if pos in _NOUNS:
        found += _partners(words, index)
    for name, value, depends in found:
        if unknown.isdisjoint(depends):
            yield name, value


def _before(words: Sequence[Word], index: int) -> str:
    if index == 0 or words[index - 1].pos in ("PUNCT", "SPACE"):
        return _EDGE
    word = words[index - 1]
    if word.tag == "PRP$":
        return "poss"
    if words[index].pos in _NOUNS and word.pos not in ("DET", "NUM", "ADJ", *_NOUNS):
        return "bare"
    return "a" if word.text.lower() == "an" else word.text.lower()


def _after(words: Sequence[Word], index: int) -> tuple[str, tuple[int, ...]]:
    if index + 1 == len(words) or words[index + 1].pos in ("PUNCT", "SPACE"):
        return _EDGE, ()
    word = words[index + 1]
    if word.pos in ("ADP", "PART", "CCONJ", "SCONJ"):
        return _marked(word, word.text.lower()), (index + 1,)
    # To a verb every noun phrase is the same, however it starts.
    if words[index].pos == "VERB" and word.pos in ("DET", "PRON", "NUM", "ADJ", *_NOUNS):
        return "phrase", ()
    return (word.tag if word.pos == "VERB" else word.pos), ()


def _frame(words: Sequence[Word], verb: int) -> tuple[str, tuple[int, ...]]:
    """The pattern after a verb, such as "noun in noun", up to the next verb or clause."""
    pattern: list[str] = []
    depends: list[int] = []
    for i in range(verb + 1, len(words)):
        word = words[i]
        if word.pos in ("PUNCT", "SCONJ", "CCONJ"):
            break
        if word.pos == "VERB":
            pattern.append(word.tag)
            break
        if word.pos in ("ADP", "PART"):
            pattern.append(_marked(word, word.lemma))
            depends.append(i)
        elif word.pos in ("PRON", *_NOUNS) and word.tag != "PRP$" and pattern[-1:] != ["noun"]:
            pattern.append("noun")
    return " ".join(pattern), tuple(depends)


def _marked(word: Word, name: str) -> str:
    """The name of a preposition, or of the particle that looks the same ("on" of "turn on")."""
    return f"{name}!" if word.tag == "RP" else name


def _partners(words: Sequence[Word], noun: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The nouns that "of" binds a noun to: "glass" and "water" of "a glass of water"."""
    if _head(words, noun) != noun:
        return
    after = _noun(words, noun + 1) if noun + 1 < len(words) else None
    if after is not None and words[noun + 1].lemma == "of":
        yield "whole", words[after].lemma, (after,)
    of = next((i for i in range(noun - 1, -1, -1) if words[i].pos in ("VERB", "ADP")), None)
    if of and words[of].lemma == "of" and words[of - 1].pos in _NOUNS:
        yield "of", words[of - 1].lemma, (of - 1,)


def _left(words: Sequence[Word], index: int) -> int | None:
    near = range(index - 1, -1, -1)
    return next((i for i in near if words[i].pos in ("VERB", "ADP", *_NOUNS)), None)


def _right(words: Sequence[Word], index: int) -> int | None:
    near = range(index + 1, len(words))
    i = next((i for i in near if words[i].pos in ("VERB", "ADP", *_NOUNS)), None)
    return i if i is None or words[i].pos not in _NOUNS else _head(words, i)


def _noun(words: Sequence[Word], index: int) -> int | None:
    """The head of the noun phrase that a preposition leads to."""
    found = _right(words, index)
    return None if found is None or words[found].pos not in _NOUNS else found


def _head(words: Sequence[Word], index: int) -> int:
    """The last of a run of nouns: "door" of "closet door"."""
    while index + 1 < len(words) and words[index + 1].pos in _NOUNS and words[index].space:
        index += 1
    return index


def _phrases(words: Sequence[Word], verb: int) -> Iterator[tuple[int | None, int]]:
    """(preposition, head) of the noun phrases after a verb, up to the next verb or clause."""
    preposition, i = None, verb + 1
    while i < len(words) and words[i].pos not in ("VERB", "PUNCT", "SCONJ", "CCONJ"):
        if words[i].pos == "ADP":
            preposition = i
        elif words[i].pos in _NOUNS:
            i = _head(words, i)
            yield preposition, i
            preposition = None
        i += 1


def _governor(words: Sequence[Word], index: int) -> int | None:
    """The verb whose clause holds `index`: the last one before it, for want of it the next one."""
    for i in range(index - 1, -1, -1):
        if words[i].pos == "VERB":
            return i
        if words[i].pos in ("PUNCT", "SCONJ", "CCONJ"):
            break
    if words[index].pos == "ADV":
        return next((i for i in range(index + 1, len(words)) if words[i].pos == "VERB"), None)
    return None


def _preposition(words: Sequence[Word], verb: int, noun: int) -> int | None:
    """The preposition of the phrase that ends in `noun`, if it has one."""
    for i in range(noun - 1, verb, -1):
        if words[i].pos == "ADP":
            return i
        if words[i].pos in _NOUNS and _head(words, i) != noun:
            return None
    return None


def _lemma(words: Sequence[Word], index: int | None) -> str:
    return "" if index is None else words[index].lemma


def _known(*positions: int | None) -> tuple[int, ...]:
    return tuple(i for i in positions if i is not None)
