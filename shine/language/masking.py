"""Which words of a caption each level of hard negatives replaces, and the sentence that results.

A *slot* is the position of a replaced word. Slots nest: a level replaces every word that the level
below replaces, and more. They are taken in the order verb, noun, adjective, preposition, adverb,
and within one part of speech from left to right: what happens changes first, details last. A verb
that only leads to another ("starts eating") comes after the other verbs.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, Literal, get_args

from shine.config import PartOfSpeech
from shine.data.annotations import MASK, normalized
from shine.language.lexicon import is_person, leads
from shine.language.words import Word

PARTS: Final[tuple[PartOfSpeech, ...]] = get_args(PartOfSpeech)  # the order of masking
# A particle ("turn on") has the tag RP and counts as a preposition.
PART: Final[dict[str, PartOfSpeech]] = {
    "VERB": "verb",
    "NOUN": "noun",
    "PROPN": "noun",
    "ADJ": "adjective",
    "ADP": "preposition",
    "ADV": "adverb",
}
# Tagged as content but say little on their own: another word in their place breaks the sentence
# ("out of", "as well") or changes nothing that a video shows ("other", "then").
_FUNCTION_WORDS: Final = """
as of than be other another same such own then also too so again just very there here
"""
_FUNCTION: Final = frozenset(_FUNCTION_WORDS.split())
# Verbs that can help another one, and how that one is inflected then.
_REPORTS: Final = dict.fromkeys(("see", "show", "watch", "hear"), ("VB", "VBG"))
_HELPERS: Final = {"have": ("VBN",), "do": ("VB",), "get": ("VBN",), **_REPORTS}
_DENIALS: Final = ("n't", "n\u2019t", "not")
_REACH: Final = 4  # words between a verb and the one it helps
# Letters that do not sound as they are written, where "a" or "an" depends on it.
_CONSONANT_SOUND: Final = re.compile(r"(?:uni(?!n|m)|use|usu|uti|eu|one\b|once\b|ukulele)")
_VOWEL_SOUND: Final = re.compile(r"(?:hour|honest|honou?r|heir)")


def is_content(pos: str, tag: str, form: str, lemma: str) -> bool:
    """Whether such a word tells what happens: it may be replaced, and replace another."""
    return (
        pos in PART
        and tag != "WRB"
        and any(map(str.isalpha, form))
        and _FUNCTION.isdisjoint((form, lemma))
        and (pos, lemma) != ("VERB", "be")
    )


def is_auxiliary(words: Sequence[Word], index: int) -> bool:
    """Whether a verb only helps the next one, whatever its tag: "has opened", "is seen opening"."""
    word = words[index]
    if word.pos != "VERB" or word.lemma not in _HELPERS:
        return False
    after = _next_verb(words, index)
    if word.lemma in _REPORTS:
        return after is not None and word.tag == "VBN" and words[after].tag in _REPORTS[word.lemma]
    between = words[index + 1 : after]
    if word.lemma == "do" and any(other.lemma in _DENIALS for other in between[:1]):
        return True
    return (
        after is not None
        and words[after].tag in _HELPERS[word.lemma]
        and all(other.tag != "TO" for other in between)
    )


def _next_verb(words: Sequence[Word], index: int) -> int | None:
    """The verb that follows with nothing but adverbs, auxiliaries and "to" between."""
    for i in range(index + 1, min(index + 1 + _REACH, len(words))):
        if words[i].pos == "VERB":
            return i
        if words[i].pos not in ("ADV", "AUX", "PART") and words[i].tag != "RP":
            break
    return None


def maskable(
    words: Sequence[Word],
    least: int = 0,
    replaceable: Callable[[Word], bool] = lambda word: True,
    parts: Collection[PartOfSpeech] = PARTS,
) -> tuple[int, ...]:
    """Positions of the words that can be replaced, in the order of masking.

    Words written together with others ("book/laptop", "half-eaten") stay, and so do auxiliaries,
    determiners, pronouns, numbers, signs and function words. In a caption that holds `<mask>`
    itself nothing can be masked. Persons ("person", "man") are added at the end, from left to
    right, as long as fewer than `least` words were found: who acts rarely tells moments apart.

    Args:
        words: a tagged caption.
        least: words to find, where persons can help.
        replaceable: False for words that nothing is known to replace.
        parts: which parts of speech may be masked.
    """
    if MASK in "".join(word.text + word.space for word in words):
        return ()
    content = [
        i
        for i in apart(words)
        if is_content(words[i].pos, words[i].tag, words[i].text.lower(), words[i].lemma)
        and PART[words[i].pos] in parts
        and not is_auxiliary(words, i)
        and replaceable(words[i])
    ]
    num_others = sum(not is_person(words[i].lemma) for i in content)
    return _in_order(words, content)[: max(num_others, least)]


def _in_order(words: Sequence[Word], slots: Iterable[int]) -> tuple[int, ...]:
    """Slots in the order of masking, persons last."""

    def rank(slot: int) -> tuple[bool, int, bool]:
        word = words[slot]
        part = PARTS.index(PART.get(word.pos, PARTS[-1]))
        leading = word.pos == "VERB" and leads(word.lemma) and _next_verb(words, slot) is not None
        return is_person(word.lemma), part, leading

    return tuple(sorted(slots, key=rank))


def apart(words: Sequence[Word]) -> list[int]:
    """Positions of words with nothing but blanks and punctuation right beside them."""
    found: list[int] = []
    start = 0
    for end in range(1, len(words) + 1):
        if end == len(words) or words[end - 1].space:
            told = [i for i in range(start, end) if normalized(words[i].text)]
            found += told if len(told) == 1 else []
            start = end
    return found


def level_sizes(num_words: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """How many of `num_words` words each level replaces.

    Level k replaces a share r_k, rounded half up, but always more than the level below:

        n_k = min(max(floor(r_k * num_words + 1/2), n_{k-1} + 1), num_words),  n_{-1} = 0

    With too few words the upper levels repeat `num_words`; a level that is no larger than the one
    below has nothing to say of its own and is recorded as invalid.
    """
    sizes: list[int] = []
    for ratio in ratios:
        least = sizes[-1] + 1 if sizes else 1
        sizes.append(min(max(int(ratio * num_words + 0.5), least), num_words))
    return tuple(sizes)


def released_sizes(num_words: int) -> tuple[int, ...]:
    """The same as counted in the published negatives of Charades-CG, all rows of which fit.

        n_0 = max(floor(num_words / 3), 1),  n_1 = max(round(2 num_words / 3), 1),  n_2 = num_words

    One or two words leave a level that is no larger than the one below, see `level_sizes`.
    """
    least = min(num_words, 1)
    return max(num_words // 3, least), max(round(2 * num_words / 3), least), num_words


def mask_levels(
    words: Sequence[Word],
    ratios: Sequence[float] | Literal["released"],
    replaceable: Callable[[Word], bool] = lambda word: True,
    parts: Collection[PartOfSpeech] = PARTS,
) -> tuple[tuple[int, ...], ...]:
    """The slots of each level, in the order of masking; a level starts with those of the one below.

    Args:
        words: a tagged caption.
        ratios: rising shares of the maskable words, one per level, least altered first; or
            "released" for `released_sizes`.
        replaceable: see `maskable`.
        parts: see `maskable`.
    """
    num_levels = 3 if ratios == "released" else len(ratios)
    order = maskable(words, num_levels, replaceable, parts)
    sizes = released_sizes(len(order)) if ratios == "released" else level_sizes(len(order), ratios)
    return tuple(order[:size] for size in sizes)


def masked_query(words: Sequence[Word], slots: Sequence[int]) -> str:
    """The caption with `<mask>` in every slot; everything else stands as written."""
    chosen = frozenset(slots)
    return "".join((MASK if i in chosen else w.text) + w.space for i, w in enumerate(words))


def masked_slots(words: Sequence[Word], masked: str) -> tuple[int, ...] | None:
    """The slots that turn the caption into `masked`, in the order of masking.

    None where no slots do: something else differs, or what is masked is no single word.
    """
    slots: list[int] = []
    at = 0
    for i, word in enumerate(words):
        if masked.startswith(word.text, at):
            at += len(word.text)
        elif masked.startswith(MASK, at):
            slots.append(i)
            at += len(MASK)
        else:
            return None
        if not masked.startswith(word.space, at):
            return None
        at += len(word.space)
    return _in_order(words, slots) if at == len(masked) else None


def recompose(words: Sequence[Word], fills: Mapping[int, str], *, agree: bool = True) -> str:
    """The caption with other words in its slots; a word takes the capitals of the one it replaces.

    Args:
        words: a tagged caption.
        fills: the new word of each slot.
        agree: whether "a" or "an" right before a slot follows the new word.
    """
    texts = [word.text for word in words]
    for i, fill in fills.items():
        texts[i] = _cased(fill, words[i].text)
        if agree and i and texts[i - 1].lower() in ("a", "an"):
            texts[i - 1] = _cased(article(fill), words[i - 1].text)
    return "".join(text + word.space for text, word in zip(texts, words, strict=True))


def article(word: str) -> str:
    """The indefinite article that goes before `word`."""
    word = word.lower()
    vowel = word[:1] in tuple("aeiou") and not _CONSONANT_SOUND.match(word)
    return "an" if vowel or _VOWEL_SOUND.match(word) else "a"


def _cased(fill: str, original: str) -> str:
    if len(original) > 1 and original.isupper():
        return fill.upper()
    return fill[:1].upper() + fill[1:] if original[:1].isupper() else fill
