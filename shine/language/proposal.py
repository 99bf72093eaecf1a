"""From a tagged caption to its hard negatives: propose, judge, ask again, fall back."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shine.config import NegativesConfig
from shine.language.generators import (
    CorpusGenerator,
    FileGenerator,
    Generator,
    Levels,
    Nothing,
    RandomGenerator,
    Refusal,
)
from shine.language.negatives import HardNegatives
from shine.language.neighbours import Neighbours
from shine.language.validation import TOO_SHORT, Judge
from shine.language.vocabulary import Vocabulary
from shine.language.words import Word
from shine.llm.filling import KnownAnswers, LlmGenerator

MAX_ATTEMPTS: Final = 8  # proposals of one generator for a level


@dataclass(frozen=True, slots=True)
class Proposal:
    """What became of one level."""

    sentence: str  # "" where no generator had one
    reasons: tuple[str, ...]  # why it is no hard negative; none where it is one
    source: str  # the generator
    attempts: int  # sentences proposed, by all generators
    # The reasons of each sentence before this one, and of each generator that had none.
    refused: tuple[str, ...]


def build_generators(
    config: NegativesConfig,
    vocabulary: Vocabulary,
    neighbours: Neighbours,
    *,
    tagger: str,
    answers: KnownAnswers | None = None,
    rows: Mapping[str, HardNegatives] | None = None,
) -> tuple[Generator, ...]:
    """The generator that the configuration names, and the one that its failures are left to.

    Args:
        config: how negatives are made.
        vocabulary: words of the training captions.
        neighbours: their contexts.
        tagger: name and version of the tagger.
        answers: of the language model, for `llm`.
        rows: of the file, for `file`.
    """
    if config.generator == "random":
        return (RandomGenerator(vocabulary, config),)
    corpus = CorpusGenerator(vocabulary, neighbours, config)
    if config.generator == "llm":
        assert answers is not None
        return LlmGenerator(vocabulary, config, tagger, answers), corpus
    if config.generator == "file":
        assert rows is not None
        return FileGenerator(rows, corpus), corpus
    return (corpus,)


def propose(
    generators: Sequence[Generator],
    judge: Judge,
    words: Sequence[Word],
    levels: Levels,
    *,
    qid: str,
    truths: Collection[Sequence[Word]],
) -> tuple[Proposal, ...]:
    """The hard negative of each level, and how it came about.

    A refused level is proposed again with the reasons, by the same generator as long as it has
    another proposal, at most `MAX_ATTEMPTS` times; then by the next one.

    Args:
        generators: the one to use, and those to fall back on.
        judge: refuses.
        words: the tagged query.
        levels: the slots of each level.
        qid: the id of the query.
        truths: the tagged captions of the same video.
    """
    current = [0] * len(levels)  # which generator each level is left to
    history: list[list[dict[int, Refusal]]] = [[] for _ in generators]  # of each, by round
    empty: list[dict[int, str]] = [{} for _ in generators]  # why each had no sentence
    while True:
        offers = {
            number: generators[number].propose(
                words, levels, qid=qid, refused=tuple(history[number])
            )
            for number in range(len(generators))
            if number in current
        }
        if _pass_on(current, offers, empty):
            continue
        offered = [offers[number][level] for level, number in enumerate(current)]
        sentences = [offer if isinstance(offer, str) else None for offer in offered]
        verdicts = judge(words, levels, sentences, truths)
        again: list[dict[int, Refusal]] = [{} for _ in generators]
        for level, (sentence, reasons) in enumerate(zip(sentences, verdicts, strict=True)):
            number = current[level]
            attempts = sum(level in refused for refused in history[number]) + 1
            last = attempts == MAX_ATTEMPTS and number + 1 == len(generators)
            if reasons and reasons != (TOO_SHORT,) and sentence is not None and not last:
                again[number][level] = Refusal(sentence, reasons)
                current[level] += attempts == MAX_ATTEMPTS
        if not any(again):
            break
        for refused, round_ in zip(history, again, strict=True):
            if round_:
                refused.append(round_)
    before = [_refused(history, empty, level) for level in range(len(levels))]
    tried = [sum(level in r for rounds in history for r in rounds) for level in range(len(levels))]
    return tuple(
        Proposal(
            sentence=sentence or "",
            reasons=reasons,
            source=generators[number].name,
            attempts=attempts + (sentence is not None),
            refused=refused,
        )
        for sentence, reasons, number, attempts, refused in zip(
            sentences, verdicts, current, tried, before, strict=True
        )
    )


def _pass_on(
    current: list[int],
    offers: Mapping[int, tuple[str | Nothing | None, ...]],
    empty: Sequence[dict[int, str]],
) -> bool:
    """Leaves levels whose generator has nothing more to the next one; whether there were any."""
    moved = False
    for level, number in enumerate(current):
        offer = offers[number][level]
        if isinstance(offer, Nothing):
            empty[number][level] = offer.reason
        if not isinstance(offer, str) and number + 1 < len(empty):
            current[level] += 1
            moved = True
    return moved


def _refused(
    history: Sequence[Sequence[dict[int, Refusal]]], empty: Sequence[dict[int, str]], level: int
) -> tuple[str, ...]:
    reasons: list[str] = []
    for rounds, nothing in zip(history, empty, strict=True):
        reasons += (", ".join(round_[level].reasons) for round_ in rounds if level in round_)
        reasons += (nothing[level],) if level in nothing else ()
    return tuple(reasons)
