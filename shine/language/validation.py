"""Whether a proposed sentence is a hard negative of its query, and if not, why.

Works on sentences, not on how they were made, so every generator is judged alike. Only training
captions play a part; test files are read by nobody here.
"""

import re
from collections.abc import Collection, Sequence
from typing import Final

from shine.data.annotations import MASK, normalized
from shine.language.lexicon import OWN, Meanings, content
from shine.language.vocabulary import Vocabulary
from shine.language.words import Word

TOO_SHORT: Final = "too few words to replace"
_PLAIN: Final = re.compile("[A-Za-z]+")  # what a word must be that no training caption has


class Judge:
    """Judges the levels of one caption after another.

    Args:
        vocabulary: the words a negative may have.
        open_vocabulary: whether it may have others too, in the right inflection.
        meanings: which words say the same.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        open_vocabulary: bool = False,
        meanings: Meanings = OWN,
    ):
        self._vocabulary = vocabulary
        self._meanings = meanings
        self._open = open_vocabulary

    def __call__(
        self,
        words: Sequence[Word],
        levels: Sequence[Sequence[int]],
        proposals: Sequence[str | None],
        truths: Collection[Sequence[Word]],
    ) -> tuple[tuple[str, ...], ...]:
        """Per level the reasons why it is no hard negative, none where it is one.

        Args:
            words: the tagged query.
            levels: the slots of each level.
            proposals: the sentence of each level, or None.
            truths: the tagged captions of the same video, with or without the query.
        """
        query = normalized(_text(words))
        told = {normalized(_text(truth)) for truth in truths}
        meanings = {content(truth) for truth in (*truths, words)}
        verdicts: list[tuple[str, ...]] = []
        below: list[str] = []  # valid sentences of the levels below, normalised
        replaced = 0  # words that the level below replaces
        for slots, proposal in zip(levels, proposals, strict=True):
            if len(slots) <= replaced:
                verdicts.append((TOO_SHORT,))
                continue
            replaced = len(slots)
            if proposal is None:
                verdicts.append(("no word fits a slot",))
                continue
            text = normalized(proposal)
            reasons = self._slots(words, slots, proposal, meanings)
            if text == query:
                reasons.append("equal to the query")
            elif text in told:
                reasons.append("a true caption of the video")
            if text in below:
                reasons.append("equal to a lower level")
            elif below and overlap(query, text) >= overlap(query, below[-1]):
                reasons.append("no further from the query than the level below")
            if not reasons:
                below.append(text)
            verdicts.append(tuple(reasons))
        return tuple(verdicts)

    def _slots(
        self,
        words: Sequence[Word],
        slots: Sequence[int],
        proposal: str,
        meanings: Collection[tuple[tuple[str, str], ...]],
    ) -> list[str]:
        if MASK in proposal:
            return ["a slot is not filled"]
        fills = read_fills(words, slots, proposal)
        if fills is None:
            same = len(proposal.split()) == len(_text(words).split())
            return ["a word outside the slots changed" if same else "the number of words changed"]
        reasons: dict[str, None] = {}
        said = list(words)
        for slot, fill in fills.items():
            word = words[slot]
            if fill.lower() == word.text.lower():
                reasons["a slot is unchanged"] = None
            elif fill not in self._vocabulary and not self._open:
                reasons["a word outside the vocabulary"] = None
            elif fill not in self._vocabulary and not _PLAIN.fullmatch(fill):
                reasons["a word with other characters than letters"] = None
            elif (lemma := self._lemma(fill, word)) is None:
                reasons["another inflection"] = None
            else:
                if self._meanings.covers(word.lemma, lemma, word.pos):
                    reasons["a near synonym"] = None
                said[slot] = Word(fill, word.space, word.pos, word.tag, lemma)
        meaning = content(said)
        if not reasons and any(self._meanings.says(truth, meaning) for truth in meanings):
            reasons["a paraphrase of a true caption of the video"] = None
        return list(reasons)

    def _lemma(self, fill: str, word: Word) -> str | None:
        """The lemma of a word in the inflection of the one it replaces; None in any other."""
        kinds = self._vocabulary.kinds(fill)
        if entry := kinds.get((word.pos, word.tag)):
            return entry.lemma
        if kinds:
            return None
        from shine.language.tagging import inflected_lemma  # loads spaCy

        return inflected_lemma(fill, word.pos, word.tag)


def read_fills(
    words: Sequence[Word], slots: Collection[int], sentence: str
) -> dict[int, str] | None:
    """The word that `sentence` has in each slot; None where it differs outside the slots.

    An indefinite article before a slot may follow the new word.
    """
    chosen = frozenset(slots)
    fills: dict[int, str] = {}
    at = 0
    for i, word in enumerate(words):
        if i in chosen:
            end = _end(words, i, sentence, at)
            fills[i] = sentence[at:end]
            if not fills[i] or any(map(str.isspace, fills[i])):
                return None
        else:
            end = at + len(word.text)
            if i + 1 in chosen and word.text.lower() in ("a", "an"):
                end = at + (2 if sentence[at : at + 2].lower() == "an" else 1)
                if sentence[at:end].lower() not in ("a", "an"):
                    return None
            elif sentence[at:end] != word.text:
                return None
        at = end + len(word.space)
        if sentence[end:at] != word.space:
            return None
    return fills if at == len(sentence) else None


def overlap(query: str, other: str) -> float:
    """Shared words over all words of two normalised sentences (Jaccard); 1 for equal sets."""
    mine, theirs = set(query.split()), set(other.split())
    return len(mine & theirs) / (len(mine | theirs) or 1)


def _end(words: Sequence[Word], slot: int, sentence: str, start: int) -> int:
    """Where the new word of a slot ends: before what follows the slot, else with the sentence."""
    after = words[slot].space or (words[slot + 1].text if slot + 1 < len(words) else "")
    found = sentence.find(after, start + 1) if after else -1
    return len(sentence) if found < 0 else found


def _text(words: Sequence[Word]) -> str:
    return "".join(word.text + word.space for word in words)
