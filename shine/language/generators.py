"""Who chooses the slots of a caption and proposes the words that fill them.

A generator sees one caption and the slots of all its levels and answers with one sentence per
level. It judges nothing: `shine.language.validation` does, and `shine.language.proposal` asks again
with what was refused.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from shine.config import NegativesConfig
from shine.data.annotations import normalized
from shine.language.lexicon import OWN, Meanings, is_person, takes
from shine.language.masking import is_content, mask_levels, masked_slots, recompose
from shine.language.negatives import HardNegatives
from shine.language.neighbours import Context, Neighbours, contexts
from shine.language.vocabulary import Entry, Kind, Vocabulary
from shine.language.wordnet import load_meanings
from shine.language.words import Word

Scores = Float[np.ndarray, " candidate"]

# A form is a candidate where it is mostly used so, not where the tagger erred once.
_MIN_SHARE: Final = 0.3
_MIN_COUNT: Final = 3
_ENOUGH: Final = 8  # candidates; a kind with fewer usual ones takes the others in
_MAX_CACHED: Final = 20_000  # contexts
_MAX_RANK: Final = 64  # more attempts than a level gets


@dataclass(frozen=True, slots=True)
class Refusal:
    """A proposal that was not good enough."""

    sentence: str
    reasons: tuple[str, ...]


Levels = Sequence[Sequence[int]]  # the slots of each level
Refusals = Sequence[Mapping[int, Refusal]]  # round after round, by level


@dataclass(frozen=True, slots=True)
class Nothing:
    """A generator has no sentence for a level, and can say why."""

    reason: str


@runtime_checkable
class Generator(Protocol):
    """Proposes hard negatives, one caption at a time."""

    name: str

    def levels(self, words: Sequence[Word], *, qid: str) -> Levels:
        """The slots of each level, those of a level among those of the one above.

        Args:
            words: a tagged caption.
            qid: the id of its query.
        """
        ...

    def propose(
        self, words: Sequence[Word], levels: Levels, *, qid: str, refused: Refusals
    ) -> tuple[str | Nothing | None, ...]:
        """One sentence per level; `Nothing` or None where it has none, or no further one.

        The answer depends on the arguments and on what the generator was made of alone.

        Args:
            words: a tagged caption.
            levels: the slots of each level.
            qid: the id of its query; equal captions under different ids may get different words.
            refused: what it proposed before and was not good enough; a refused sentence is not
                made again as long as there are others.
        """
        ...


class Candidates:
    """The words that may fill a slot of one kind.

    Args:
        vocabulary: the words of the training captions.
        kind: part of speech and Penn tag of the slot.
        meanings: which words do not make a caption false.
    """

    def __init__(self, vocabulary: Vocabulary, kind: Kind, meanings: Meanings = OWN):
        known = tuple(
            entry
            for entry in vocabulary.entries(kind)
            if is_content(*kind, entry.form, entry.lemma) and normalized(entry.form) == entry.form
        )
        usual = [entry for entry in known if _is_usual(vocabulary, kind, entry)]
        self.entries: tuple[Entry, ...] = tuple(usual) if len(usual) >= _ENOUGH else known
        self.kind = kind
        self._meanings = meanings
        self.log_count: Scores = np.log([float(entry.count) for entry in self.entries])
        self._persons = np.array([is_person(entry.lemma) for entry in self.entries], bool)
        self._excluded: dict[str, np.ndarray] = {}

    @cached_property
    def numbers(self) -> dict[str, list[int]]:
        """Where each lemma stands among the entries; spellings of one form share a lemma."""
        found = defaultdict(list)
        for number, entry in enumerate(self.entries):
            found[entry.lemma].append(number)
        return dict(found)

    def suits(self, original: str) -> np.ndarray:
        """True for candidates that make a caption false in place of the lemma `original`.

        Persons are replaced by persons where there are others, and only persons are.
        """
        if original not in self._excluded:
            other = np.array(
                [not self._meanings.covers(original, e.lemma, self.kind[0]) for e in self.entries],
                bool,
            )
            if not is_person(original):
                other &= ~self._persons
            elif (other & self._persons).any():
                other &= self._persons
            self._excluded[original] = other
        return self._excluded[original]


class Choices:
    """The candidates for the place of any word.

    Args:
        vocabulary: the words of the training captions.
        meanings: which words do not make a caption false.
    """

    def __init__(self, vocabulary: Vocabulary, meanings: Meanings = OWN):
        self._vocabulary = vocabulary
        self._meanings = meanings
        self._kinds: dict[Kind, Candidates] = {}

    def of(self, word: Word) -> Candidates:
        """The words of the same part of speech and inflection."""
        kind = word.pos, word.tag
        if kind not in self._kinds:
            self._kinds[kind] = Candidates(self._vocabulary, kind, self._meanings)
        return self._kinds[kind]

    def exist(self, word: Word) -> bool:
        """Whether some word can take the place of this one and make a caption false."""
        return bool(self.of(word).suits(word.lemma).any())


class VocabularyGenerator(ABC):
    """Fills slots one after the other with vocabulary words of the same kind.

    Levels build on each other: a level keeps the words that the level below put in, so it differs
    from the query in more places than that one, and from that one only in its own slots. A word is
    never replaced by itself in another form, by a near synonym, or by a word of the caption.

    Args:
        vocabulary: words of the training captions; nothing else enters a negative.
        config: masks and seed of the choice among words that fit.
    """

    name: str

    def __init__(self, vocabulary: Vocabulary, config: NegativesConfig):
        self._choices = Choices(vocabulary, load_meanings(config.wordnet))
        self._config = config
        self._agree = "a" in vocabulary and "an" in vocabulary

    def levels(self, words: Sequence[Word], *, qid: str) -> Levels:
        """See `Generator`."""
        return mask_levels(words, self._config.ratios, self._choices.exist, self._config.parts)

    def propose(
        self, words: Sequence[Word], levels: Levels, *, qid: str, refused: Refusals
    ) -> tuple[str | None, ...]:
        """See `Generator`."""
        current = list(words)
        used = {word.lemma for word in words}
        fills: dict[int, str] = {}
        sentences: list[str | None] = []
        for level, slots in enumerate(levels):
            attempt = sum(level in round_ for round_ in refused)
            fresh = [slot for slot in slots if slot not in fills]
            for number, slot in enumerate(fresh):
                unknown = frozenset(fresh[number + 1 :])
                ranking = self._ranking(
                    current, slot, unknown, used, f"{self._config.seed}\0{qid}\0{level}\0{slot}"
                )
                if not ranking:
                    return (*sentences, *[None] * (len(levels) - level))
                # A refused level changes its last word alone.
                entry = ranking[attempt % len(ranking) if not unknown else 0]
                fills[slot] = entry.form
                used.add(entry.lemma)
                current[slot] = replace(words[slot], text=entry.form, lemma=entry.lemma)
            sentences.append(recompose(words, fills, agree=self._agree))
        return tuple(sentences)

    @abstractmethod
    def _scores(
        self,
        candidates: Candidates,
        words: Sequence[Word],
        slot: int,
        unknown: frozenset[int],
    ) -> Scores:
        """How well each candidate fits: log weights of the draw."""

    def _ranking(
        self, words: Sequence[Word], slot: int, unknown: frozenset[int], used: set[str], key: str
    ) -> list[Entry]:
        """The candidates of a slot in an order drawn from `key`, likelier ones mostly first.

        Sorting log weights after adding Gumbel noise draws without replacement. So one order serves
        every attempt, and no word is tried twice.
        """
        candidates = self._choices.of(words[slot])
        possible = candidates.suits(words[slot].lemma).copy()
        numbers = candidates.numbers
        possible[[i for lemma in used & numbers.keys() for i in numbers[lemma]]] = False
        chosen = np.flatnonzero(possible)
        if not len(chosen):
            return []
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        noise = np.random.default_rng(int.from_bytes(digest, "big")).gumbel(size=len(possible))
        drawn = (self._scores(candidates, words, slot, unknown) + noise)[chosen]
        best = chosen[np.argsort(-drawn, kind="stable")[:_MAX_RANK]]
        return [candidates.entries[i] for i in best]


class RandomGenerator(VocabularyGenerator):
    """Fills slots by any word of the same kind, each equally likely: the ablation."""

    name = "random"

    def _scores(
        self,
        candidates: Candidates,
        words: Sequence[Word],
        slot: int,
        unknown: frozenset[int],
    ) -> Scores:
        return np.zeros(len(candidates.entries))


class CorpusGenerator(VocabularyGenerator):
    """Fills slots by words that stand in such company in the training captions.

    With n(c) the count of a candidate, n(c, v) how often it stood in context v, p(v) the share of v
    among the contexts of its name, and a, h, b the weights of that name, its log weight is

        PRIOR log n(c) + sum_v ( a n(c, v) / (n(c, v) + h)
                                 + b log( (n(c, v) + BACK_OFF p(v)) / (n(c) + BACK_OFF) ) )

    The first term of the sum asks whether the company was ever seen, half sure after h times; where
    no candidate has been seen in a context, it decides nothing. The second prefers words that keep
    this company to words that keep any. Contexts overlap, so both are far weaker than independent
    evidence would be. Verbs that grammar rules out ("sneezes a box") come last.

    Args:
        vocabulary: words of the training captions; nothing else enters a negative.
        neighbours: contexts of those words in the same captions.
        config: masks and seed of the choice among words that fit.
    """

    name = "corpus"

    PRIOR: Final = 0.4
    BACK_OFF: Final = 0.5
    UNFIT: Final = 20.0  # taken from verbs that grammar rules out
    WEIGHTS: Final = {  # a, h, b
        "before": (4.0, 3.0, 0.2),
        "determiner": (16.0, 3.0, 0.8),
        "after": (4.0, 3.0, 0.2),
        "left": (2.0, 3.0, 0.1),
        "right": (2.0, 3.0, 0.1),
        "frame": (16.0, 3.0, 0.8),
        "object": (16.0, 1.0, 0.6),
        "second": (8.0, 1.0, 0.2),
        "verb": (16.0, 1.0, 0.6),
        "particle": (16.0, 1.0, 0.8),
        "phrase": (12.0, 1.0, 0.4),
        "of": (16.0, 1.0, 0.6),
        "whole": (16.0, 1.0, 0.6),
        "modifier": (16.0, 1.0, 0.6),
        "head": (16.0, 1.0, 0.6),
    }

    def __init__(self, vocabulary: Vocabulary, neighbours: Neighbours, config: NegativesConfig):
        super().__init__(vocabulary, config)
        self._neighbours = neighbours
        self._unfits: dict[tuple[Kind, str], Int[np.ndarray, " unfit"]] = {}
        self._absences: dict[tuple[Kind, str], Scores] = {}
        self._presences: dict[tuple[Kind, Context], tuple[Int[np.ndarray, " hit"], Scores]] = {}

    def _scores(
        self,
        candidates: Candidates,
        words: Sequence[Word],
        slot: int,
        unknown: frozenset[int],
    ) -> Scores:
        scores = self.PRIOR * candidates.log_count
        for context in contexts(words, slot, unknown):
            numbers, gains = self._presence(candidates, context)
            scores += self._absence(candidates, context[0])
            scores[numbers] += gains
            if context[0] == "frame":
                scores[self._unfit(candidates, context[1])] -= self.UNFIT
        return scores

    def _unfit(self, candidates: Candidates, frame: str) -> Int[np.ndarray, " unfit"]:
        """The verbs that grammar keeps from standing before such words."""
        key = candidates.kind, frame
        if key not in self._unfits:
            self._unfits[key] = np.array(
                [i for i, e in enumerate(candidates.entries) if not takes(e.lemma, frame)], np.int64
            )
        return self._unfits[key]

    def _absence(self, candidates: Candidates, name: str) -> Scores:
        """The factor of a context in which a candidate never stood, as a log."""
        key = candidates.kind, name
        if key not in self._absences:
            pos = candidates.kind[0]
            counts = np.array(
                [self._neighbours.occurrences(pos, name, e.lemma) for e in candidates.entries]
            )
            *_, fit = self.WEIGHTS[name]
            self._absences[key] = fit * np.log(self.BACK_OFF / (counts + self.BACK_OFF))
        return self._absences[key]

    def _presence(
        self, candidates: Candidates, context: Context
    ) -> tuple[Int[np.ndarray, " hit"], Scores]:
        """The candidates that stood in `context`, and what that adds to their absence."""
        key = candidates.kind, context
        if key not in self._presences:
            pos = candidates.kind[0]
            back_off = self.BACK_OFF * self._neighbours.share(pos, context)
            hits = [
                (number, count)
                for lemma, count in self._neighbours.held(pos, context).items()
                for number in candidates.numbers.get(lemma, ())
            ]
            numbers = np.array([number for number, _ in hits], np.int64)
            held = np.array([count for _, count in hits], float)
            seen, half, fit = self.WEIGHTS[context[0]]
            gains = seen * held / (held + half) + fit * np.log1p(held / (back_off or 1.0))
            if len(self._presences) >= _MAX_CACHED:
                self._presences.clear()
            self._presences[key] = numbers, gains
        return self._presences[key]


class FileGenerator:
    """Proposes what a file holds, with the masks of the file.

    A caption without masks that fit it gets those of `masks`, and then most likely a verdict.

    Args:
        rows: by query id.
        masks: chooses slots where the file has none.
    """

    name = "file"

    def __init__(self, rows: Mapping[str, HardNegatives], masks: Generator):
        self._rows = rows
        self._masks = masks

    def levels(self, words: Sequence[Word], *, qid: str) -> Levels:
        """See `Generator`."""
        own = self._masks.levels(words, qid=qid)
        if (row := self._rows.get(qid)) is None or len(row.masked) != len(own):
            return own
        slots = [masked_slots(words, masked) for masked in row.masked]
        return own if None in slots else [level for level in slots if level is not None]

    def propose(
        self, words: Sequence[Word], levels: Levels, *, qid: str, refused: Refusals
    ) -> tuple[str | None, ...]:
        """See `Generator`."""
        row = self._rows.get(qid)
        offered = () if row is None else row.queries
        said = {level for round_ in refused for level in round_}
        return tuple(
            offered[level] if level < len(offered) and level not in said else None
            for level in range(len(levels))
        )


def _is_usual(vocabulary: Vocabulary, kind: Kind, entry: Entry) -> bool:
    total = sum(other.count for other in vocabulary.kinds(entry.form).values())
    return entry.count >= max(_MIN_COUNT, _MIN_SHARE * total)
