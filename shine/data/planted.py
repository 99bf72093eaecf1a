"""The planted world: a data set of the field with known truth.

`make_world` writes annotation files, features and word vectors exactly as real data sets have
them. What happens in each video is drawn first, as actions at moments; sentences and clips are made
from it. `docs/world.md` explains every choice and parameter.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy import ndarray
from pydantic import Field, model_validator

from shine.config import Count, Positive
from shine.data.annotations import Annotation, Moment, to_record, write_jsonl
from shine.data.grammar import (
    ADJECTIVES,
    ADVERBS,
    ARTICLES,
    FORMS,
    MAN_SUBJECTS,
    MODIFIERS,
    NEUTRAL_SUBJECTS,
    NOUNS,
    PLACES,
    PREPOSITIONS,
    VERBS,
    WOMAN_SUBJECTS,
    Action,
    Wording,
    afforded,
    function_words,
    lexicon,
    sentence,
)
from shine.data.mixture import (
    FEATURES,
    WORD_VECTORS,
    MixtureConfig,
    Stream,
    Views,
    begin_world,
    clip_coverage,
    concept_vector,
    finish_world,
    form_offset,
    function_vector,
    generator,
    make_views,
    mix_clips,
    text_key,
    write_word_vectors,
)
from shine.errors import InputError

NEGATIVES = "negatives_grammar.jsonl"
TRUTH = "truth.jsonl"
TRAIN = "train.jsonl"

T = TypeVar("T")
Pair = tuple[str, str]  # verb, noun
Share = Annotated[float, Field(ge=0, le=1)]
HeldOut = Annotated[float, Field(gt=0, lt=0.5)]


class WorldConfig(MixtureConfig):
    """Sizes and difficulty of a planted world."""

    # Rows of each split.
    train_rows: Count = 1500
    validation_rows: Count = 150  # of val_trivial and of val_composition, each
    test_rows: Count = 400  # of each of the three test splits
    # At most, in training. Elsewhere a video has one query, for the event it was made for: a second
    # one would be about a twin more often where few pairs are asked for, so splits would differ in
    # more than their pairs.
    train_queries_per_video: Count = 2

    # What goes with what, and what training never shows.
    nouns_per_verb: Annotated[int, Field(ge=2)] = 7
    verbs_per_noun: Annotated[int, Field(ge=2)] = 3  # at least
    novel_pair_share: HeldOut = 0.15  # of the pairs without novel words
    validation_pair_share: HeldOut = 0.12
    novel_verbs: Count = 4
    novel_nouns: Count = 5
    novel_adjectives: Count = 1

    # Videos and events.
    min_duration: Positive = 16.0  # seconds
    max_duration: Positive = 40.0
    min_events: Count = 3
    max_events: Count = 6
    min_moment: Positive = 2.0  # seconds
    max_moment: Positive = 10.0
    max_overlap: Share = 0.25  # of the shorter of two events

    # Distractors: chances that a video also shows ...
    same_verb: Share = 0.7  # the verb with another noun
    same_noun: Share = 0.7  # the noun with another verb
    twin: Share = 0.5  # both, with one modifier changed

    # Sentences.
    modifier_rate: Share = 0.5  # chance that an event has a modifier, each
    mention_rate: Share = 0.6  # chance that a query names one that is there

    @model_validator(mode="after")
    def _ranges_rise(self) -> "WorldConfig":
        for name in ("duration", "events", "moment"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name} must not exceed max_{name}; got {low} and {high}")
        if 2 * self.min_moment > self.min_duration:
            raise ValueError(
                f"min_moment must be at most half of min_duration; got {self.min_moment} "
                f"and {self.min_duration}"
            )
        if self.novel_pair_share + self.validation_pair_share > 0.5:
            raise ValueError(
                f"novel_pair_share and validation_pair_share must leave half of the pairs to "
                f"training; got {self.novel_pair_share} and {self.validation_pair_share}"
            )
        for role, words in (("verb", VERBS), ("noun", NOUNS), ("adjective", ADJECTIVES)):
            novel = getattr(self, f"novel_{role}s")
            if novel > len(words) // 2:
                raise ValueError(
                    f"novel_{role}s must be at most half of the {len(words)} {role}s; got {novel}"
                )
        return self


@dataclass(frozen=True, slots=True)
class Event:
    """An action at its moment."""

    action: Action
    moment: Moment

    def overlap(self, other: "Event") -> float:
        """Seconds that two events share."""
        (a, b), (c, d) = self.moment, other.moment
        return max(min(b, d) - max(a, c), 0.0)


@dataclass(frozen=True)
class Pairs:
    """Which verb goes with which noun, divided by where the pair may be seen."""

    seen: tuple[Pair, ...]  # in every split, and alone in training
    validation: tuple[Pair, ...]  # in val_composition alone
    novel: tuple[Pair, ...]  # in novel_composition alone
    novel_word: tuple[Pair, ...]  # in novel_word alone: one of the two words is novel
    adjectives: tuple[str, ...]  # the others
    novel_adjectives: tuple[str, ...]

    @property
    def novel_words(self) -> list[str]:
        """Every word that training never shows, sorted."""
        known = {word for pair in self.seen for word in pair}
        words = {word for pair in self.novel_word for word in pair} - known
        return sorted(words | set(self.novel_adjectives))


@dataclass(frozen=True)
class Split:
    """One annotation file: how its videos are named and what its queries are about."""

    file: str
    tag: str  # in video and query ids
    rows: int
    targets: tuple[Pair, ...]
    adjectives: tuple[str, ...]
    queries_per_video: int = 1  # at most

    @property
    def training(self) -> bool:
        """Whether a model is fitted to it; the others have negatives made by the grammar."""
        return self.file == TRAIN


@dataclass(frozen=True)
class Query:
    """What a row asks: `stated` is true of `event` and of no other event of its video."""

    event: Event
    stated: Action
    wording: Wording


@dataclass(frozen=True)
class Video:
    """What happens in one video, and what is asked of it."""

    vid: str
    duration_seconds: float
    events: tuple[Event, ...]
    queries: tuple[Query, ...]


def make_world(config: WorldConfig, out: Path) -> dict[str, Any]:
    """A planted world stands in `out`; returns its manifest, which is also `world.json`.

    Writes six annotation files, `features/{vid}.npy`, `word_vectors.parquet`,
    `negatives_grammar.jsonl` (for evaluation alone) and `truth.jsonl`. The splits are independent:
    asking for more rows of one leaves the others, and its own first rows, as they were.

    Raises:
        InputError: `out` holds other files, or `train_rows` is too small to name every word.
    """
    pairs = draw_pairs(config)
    splits = make_splits(config, pairs)
    worlds: dict[str, list[Video]] = {}
    for split in splits:
        worlds[split.file] = list(_videos(config, pairs, split))
        if split.training:
            _check_names_all_words(worlds[split.file], pairs)
    files = (*(split.file for split in splits), NEGATIVES, TRUTH)
    simulated = f"planted world, seed {config.seed}"
    begin_world(out, simulated, files)

    painter = Painter(config)
    truth, negatives = [], []
    for split in splits:
        records = []
        for video in worlds[split.file]:
            np.save(out / FEATURES / f"{video.vid}.npy", painter(video))
            truth.append(_truth(split, video))
            rows = [_annotation(split, video, n) for n in range(len(video.queries))]
            records += [to_record(row) for row in rows]
            if not split.training:
                negatives += [
                    _negatives(config, pairs, video, query, row)
                    for query, row in zip(video.queries, rows, strict=True)
                ]
        write_jsonl(out / split.file, records)
    write_jsonl(out / TRUTH, truth)
    write_jsonl(out / NEGATIVES, negatives)
    write_word_vectors(out / WORD_VECTORS, word_vectors(config))

    manifest = {
        "simulated": simulated,
        "config": config.model_dump(mode="json"),
        "rows": {split.file: split.rows for split in splits},
        "videos": {split.file: len(worlds[split.file]) for split in splits},
        "pairs": {
            "seen": pairs.seen,
            "val_composition": pairs.validation,
            "novel_composition": pairs.novel,
        },
        "novel_words": pairs.novel_words,
    }
    return finish_world(out, manifest, files)


def draw_pairs(config: WorldConfig) -> Pairs:
    """Pairs that make sense, thinned at random and divided so that each word stays in training."""
    rng = generator(config.seed, Stream.PAIRS)
    related = {
        (verb, noun) for verb in VERBS for noun in _take(rng, afforded(verb), config.nouns_per_verb)
    }
    for noun in NOUNS:
        have = {verb for verb, other in related if other == noun}
        more = [verb for verb in VERBS if verb not in have and noun in afforded(verb)]
        related |= {(v, noun) for v in _take(rng, more, config.verbs_per_noun - len(have))}

    novel_verbs = set(_take(rng, list(VERBS), config.novel_verbs))
    novel_nouns = set(_take(rng, list(NOUNS), config.novel_nouns))
    novel_adjectives = _take(rng, list(ADJECTIVES), config.novel_adjectives)
    novel_word = {(v, n) for v, n in related if v in novel_verbs or n in novel_nouns}
    known = sorted(related - novel_word)

    share = config.novel_pair_share + config.validation_pair_share
    held_out = _hold_out(rng, known, share)
    num_novel = round(len(held_out) * config.novel_pair_share / share)
    return Pairs(
        seen=tuple(pair for pair in known if pair not in set(held_out)),
        validation=tuple(sorted(held_out[num_novel:])),
        novel=tuple(sorted(held_out[:num_novel])),
        novel_word=tuple(sorted(novel_word)),
        adjectives=tuple(a for a in ADJECTIVES if a not in novel_adjectives),
        novel_adjectives=tuple(novel_adjectives),
    )


def _hold_out(rng: np.random.Generator, known: list[Pair], share: float) -> list[Pair]:
    """Pairs to hold out, in random order, such that each word keeps two others."""
    left: dict[str, int] = defaultdict(int)
    for verb, noun in known:
        left[verb] += 1
        left[noun] += 1
    held_out: list[Pair] = []
    for verb, noun in _take(rng, known, len(known)):
        if len(held_out) < round(share * len(known)) and min(left[verb], left[noun]) > 2:
            held_out.append((verb, noun))
            left[verb] -= 1
            left[noun] -= 1
    return held_out


def make_splits(config: WorldConfig, pairs: Pairs) -> tuple[Split, ...]:
    """The annotation files of a world; training first."""
    validation, test, known = config.validation_rows, config.test_rows, pairs.adjectives
    return (
        Split(TRAIN, "train", config.train_rows, pairs.seen, known, config.train_queries_per_video),
        Split("val_trivial.jsonl", "val", validation, pairs.seen, known),
        Split("val_composition.jsonl", "valcomposition", validation, pairs.validation, known),
        Split("test_trivial.jsonl", "test", test, pairs.seen, known),
        Split("novel_composition.jsonl", "composition", test, pairs.novel, known),
        Split("novel_word.jsonl", "word", test, pairs.novel_word, ADJECTIVES),
    )


def _videos(config: WorldConfig, pairs: Pairs, split: Split) -> Iterator[Video]:
    """Videos with `split.rows` queries in all."""
    if not split.targets:
        raise InputError(
            f"no verb-noun pair is left for {split.file}; raise nouns_per_verb or its share"
        )
    deck = _deck(generator(config.seed, Stream.DECK, *text_key(split.tag)), split.targets)
    rows = 0
    for index in count():
        vid = f"{split.tag}{index:05d}"
        rng = generator(config.seed, Stream.VIDEO, *text_key(vid))
        video = _video(config, rng, vid, pairs, split, next(deck))
        queries = video.queries[: split.rows - rows]
        rows += len(queries)
        if queries:
            yield replace(video, queries=queries)
        if rows == split.rows:
            return


def _deck(rng: np.random.Generator, cards: Sequence[Pair]) -> Iterator[Pair]:
    """`cards` in random order, again and again: each is met before any is met twice."""
    while True:
        yield from _take(rng, cards, len(cards))


def _video(
    config: WorldConfig,
    rng: np.random.Generator,
    vid: str,
    pairs: Pairs,
    split: Split,
    target: Pair,
) -> Video:
    """A video made for `target`: its first query asks for it, further ones for its distractors."""
    duration = round(float(rng.uniform(config.min_duration, config.max_duration)), 2)
    allowed = tuple(dict.fromkeys(pairs.seen + split.targets))
    first = _action(config, rng, target, split.adjectives)
    actions = [first, *_distractors(config, rng, first, allowed, split.adjectives)]
    wanted = int(rng.integers(config.min_events, config.max_events + 1))
    while len(actions) < wanted:
        actions.append(_action(config, rng, _pick(rng, pairs.seen), pairs.adjectives))
    events = _place(config, rng, duration, actions[:wanted])
    men = bool(rng.integers(2))

    queries = []
    for event in events[: split.queries_per_video]:
        others = [other.action for other in events if other is not event]
        stated = _statement(config, rng, event.action, others)
        if stated is not None:
            queries.append(Query(event, stated, _wording(rng, men)))
    return Video(vid, duration, tuple(sorted(events, key=lambda e: e.moment)), tuple(queries))


def _distractors(
    config: WorldConfig,
    rng: np.random.Generator,
    target: Action,
    allowed: Sequence[Pair],
    adjectives: Sequence[str],
) -> list[Action]:
    """Actions that share words with `target`, in random order; none is the same action."""
    found = []
    if rng.random() < config.same_verb:
        same = [(v, n) for v, n in allowed if v == target.verb and n != target.noun]
        found += [_action(config, rng, _pick(rng, same), adjectives)] if same else []
    if rng.random() < config.same_noun:
        same = [(v, n) for v, n in allowed if n == target.noun and v != target.verb]
        found += [_action(config, rng, _pick(rng, same), adjectives)] if same else []
    modifiers = target.modifiers()
    if rng.random() < config.twin and modifiers:
        role = _pick(rng, _pick(rng, modifiers))
        found.append(replace(target, **{role: _other(rng, role, target, adjectives)}))
    return _take(rng, found, len(found))


def _action(
    config: WorldConfig, rng: np.random.Generator, pair: Pair, adjectives: Sequence[str]
) -> Action:
    """An action of `pair` with random modifiers."""
    action = Action(
        *pair,
        adjective=_pick(rng, adjectives),
        preposition=_pick(rng, PREPOSITIONS),
        place=_pick(rng, PLACES),
        adverb=_pick(rng, ADVERBS),
    )
    return action.keep([group for group in MODIFIERS if rng.random() < config.modifier_rate])


def _place(
    config: WorldConfig, rng: np.random.Generator, duration: float, actions: Sequence[Action]
) -> list[Event]:
    """The actions at random moments, in the given order; those that find no room are left out."""
    events: list[Event] = []
    longest = min(config.max_moment, duration / 2)
    for action in actions:
        lengths = rng.uniform(config.min_moment, longest, size=20)
        starts = rng.random(20) * (duration - lengths)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            moment = (round(start, 2), min(round(start + length, 2), duration))
            event = Event(action, moment)
            if all(event.overlap(e) <= config.max_overlap * _shorter(event, e) for e in events):
                events.append(event)
                break
    return events


def _shorter(one: Event, other: Event) -> float:
    return min(event.moment[1] - event.moment[0] for event in (one, other))


def _statement(
    config: WorldConfig, rng: np.random.Generator, action: Action, others: Sequence[Action]
) -> Action | None:
    """What to say of `action` so that it is true of none of `others`; None where nothing is."""
    present = _take(rng, action.modifiers(), len(MODIFIERS))
    named = [group for group in present if rng.random() < config.mention_rate]
    for further in [None, *(group for group in present if group not in named)]:
        named += [further] if further else []
        stated = action.keep(named)
        if not any(stated.true_of(other) for other in others):
            return stated
    return None


def _wording(rng: np.random.Generator, men: bool) -> Wording:
    return Wording(
        subject=_pick(rng, NEUTRAL_SUBJECTS + (MAN_SUBJECTS if men else WOMAN_SUBJECTS)),
        form=_pick(rng, FORMS),
        articles=(_pick(rng, ARTICLES), _pick(rng, ARTICLES)),
        adverb_first=bool(rng.integers(3) == 0),
    )


def _check_names_all_words(videos: Sequence[Video], pairs: Pairs) -> None:
    named = {w for v in videos for q in v.queries for w in q.stated.concepts().values()}
    known = {word for pair in pairs.seen for word in pair}
    expected = known | {*pairs.adjectives, *PREPOSITIONS, *PLACES, *ADVERBS}
    if missing := sorted(expected - named):
        rows = sum(len(video.queries) for video in videos)
        raise InputError(
            f"train_rows: {rows} training queries are too few to name every word of the world, "
            f"{', '.join(missing[:5])} never occurs; ask for more rows"
        )


class Painter:
    """Makes the features of videos: what their events look like, mixed into clips."""

    def __init__(self, config: WorldConfig):
        self._config = config
        self._views = make_views(config)
        self._concepts = concepts(config)
        novel = draw_pairs(config).novel_words
        known = [key for key in sorted(self._concepts) if key[1] not in novel]
        self._strays = np.stack([self._concepts[key] for key in known]) @ self._views.video.T

    def __call__(self, video: Video) -> ndarray:
        """Float32 [clip, video_width]; clip i is second i * clip_seconds and what follows."""
        config = self._config
        rng = generator(config.seed, Stream.CLIPS, *text_key(video.vid))
        moments = np.array([event.moment for event in video.events])
        appearance = np.stack([self.appearance(event.action) for event in video.events])
        coverage = clip_coverage(moments, video.duration_seconds, config.clip_seconds)
        return mix_clips(config, rng, coverage, appearance, self._strays)

    def appearance(self, action: Action) -> ndarray:
        """What a clip shows of an action that fills it: [video_width]."""
        shown = action.concepts().items()
        total = sum(self._config.weight(role) * self._concepts[role, word] for role, word in shown)
        verb, noun = self._concepts["verb", action.verb], self._concepts["noun", action.noun]
        return self._views.video @ total + self._config.binding * self._views.bind(verb, noun)


def concepts(config: WorldConfig) -> dict[tuple[str, str], ndarray]:
    """(Role, concept) -> its vector: [concept_width]. Places are nouns in another role."""
    return {
        (role, concept): concept_vector(config, "noun" if role == "place" else role, concept)
        for role, words in lexicon().items()
        for concept, _ in words
    }


def word_vectors(config: WorldConfig) -> dict[str, ndarray]:
    """The text view of every word of the grammar, function words included: [text_width] each."""
    views: Views = make_views(config)
    vectors = concepts(config)
    table = {word: function_vector(config, word) for word in function_words()}
    for role, words in lexicon().items():
        for concept, surface in words:
            form = _form(role, concept, surface)
            table[surface] = views.text @ vectors[role, concept] + form_offset(config, form)
    return table


def _form(role: str, concept: str, surface: str) -> str:
    if role != "verb":
        return "noun" if role == "place" else role
    verb = VERBS[concept]
    return {verb.present: "VBZ", verb.participle: "VBG"}.get(surface, "VB")


def _truth(split: Split, video: Video) -> dict[str, Any]:
    return {
        "vid": video.vid,
        "split": split.file,
        "duration": video.duration_seconds,
        "events": [
            {**event.action.concepts(), "moment": list(event.moment)} for event in video.events
        ],
    }


def _annotation(split: Split, video: Video, number: int) -> Annotation:
    query = video.queries[number]
    return Annotation(
        qid=f"{video.vid}_{split.tag}_{number}",
        vid=video.vid,
        query=sentence(query.stated, query.wording),
        duration_seconds=video.duration_seconds,
        moments=(query.event.moment,),
    )


def _negatives(
    config: WorldConfig, pairs: Pairs, video: Video, query: Query, row: Annotation
) -> dict[str, Any]:
    """Hard negatives of a query in the field's keys: well formed, and true of no event."""
    rng = generator(config.seed, Stream.NEGATIVES, *text_key(row.qid))
    levels = _alterations(rng, pairs, video, query)
    modifiers = [role for group in query.stated.modifiers() for role in group]
    masked = (["verb"], ["verb", "noun"], ["verb", "noun", *modifiers])
    return {
        "qid": row.qid,
        "vid": row.vid,
        "query": row.query,
        "masked_queries": [sentence(query.stated, query.wording, roles) for roles in masked],
        "recomposed_queries": [sentence(action, query.wording) for action in levels],
        "source": "grammar",
    }


def _alterations(
    rng: np.random.Generator, pairs: Pairs, video: Video, query: Query
) -> tuple[Action, Action, Action]:
    """What a query states with the verb replaced; verb and noun; verb, noun and every modifier.

    New words are words of the training queries, and none of an event at the same time: they are
    wrong in the moment itself. A query without modifiers gets two different pairs.
    """
    stated = query.stated
    actions = [event.action for event in video.events]
    at_once = [e.action for e in video.events if e.overlap(query.event) > 0]
    busy = {word for action in at_once for word in action.pair}
    seen_verbs = sorted({verb for verb, _ in pairs.seen})
    related = pairs.seen + pairs.validation + pairs.novel + pairs.novel_word
    fitting = sorted({verb for verb, noun in related if noun == stated.noun} & set(seen_verbs))
    verbs = _take(rng, fitting, len(fitting)) + _take(rng, seen_verbs, len(seen_verbs))
    free = (replace(stated, verb=verb) for verb in verbs if verb not in busy)
    first = next(action for action in free if not any(map(action.true_of, actions)))
    shown = {action.pair for action in actions}
    others = (
        replace(stated, verb=verb, noun=noun)
        for verb, noun in _take(rng, pairs.seen, len(pairs.seen))
        if (verb, noun) not in shown and not busy & {verb, noun}
    )
    second, third = islice(others, 2)
    changes = {
        role: _other(rng, role, stated, pairs.adjectives)
        for group in stated.modifiers()
        for role in group
    }
    return first, second, replace(third, **changes)


def _other(rng: np.random.Generator, role: str, action: Action, adjectives: Sequence[str]) -> str:
    """A word for a modifier of `action` that it does not have."""
    words = {
        "adjective": adjectives,
        "preposition": PREPOSITIONS,
        "place": PLACES,
        "adverb": ADVERBS,
    }[role]
    return _pick(rng, [word for word in words if word != getattr(action, role)])


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _take(rng: np.random.Generator, items: Sequence[T], number: int) -> list[T]:
    """`number` different items in random order, or all where there are fewer."""
    return [items[i] for i in rng.permutation(len(items))[: max(number, 0)].tolist()]
