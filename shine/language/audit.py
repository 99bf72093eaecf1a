"""What is wrong with a file of hard negatives, ours or anyone's, counted by one rule.

Rows pass by one at a time; what stays in memory is what training captions and test queries say, and
a sample of rows for the language models. This is the one place that reads test files.
"""

import hashlib
import heapq
import itertools
import operator
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lemminflect import getLemma

from shine.data.annotations import normalized, read_records
from shine.data.content import read_content
from shine.errors import InputError
from shine.language.alignment import changed_places
from shine.language.plausibility import (
    FOLDS,
    LEAST_CAPTIONS,
    Caption,
    CaptionModels,
    Scores,
    rank,
)
from shine.language.validation import overlap
from shine.language.words import Word

RULE: Final = (
    "Texts are put in lower case and split on white space; . , ! ? ; : \" ' ( ) are stripped from "
    "both ends of every token, empty tokens dropped; two texts are equal when their tokens are. "
    "Numbers of words are those between white space, compared with the masked template. Levels "
    "that a file marks invalid are left out."
)
PAIR_RULE: Final = (
    "A pair is the lemma of a verb and of the first noun behind it, if no other verb comes first, "
    "as the tagger reads them."
)
MOST_ROWS: Final = 10_000  # that the language models score; of more, a sample
EXAMPLES: Final = 5  # of each defect

_FORMAT: Final = "shine-audit-1"
_CHUNK: Final = 4096  # rows
_MASK: Final = re.compile(r"[<\[{(]\s*mask\s*[>\]})]", re.IGNORECASE)
_LETTERS: Final = re.compile(r"[^\W\d_]+")
_PERCENTILES: Final = (5, 25)  # of true captions, that a plausible sentence is above

Progress = Callable[[str], None]  # what is being done
Tagging = Callable[[Sequence[str]], list[tuple[Word, ...]]]  # a `Tagger`
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Defect:
    """Something that can be wrong, as it is counted."""

    key: str
    text: str
    of: str  # "negatives" or "rows"


DEFECTS: Final = tuple(
    Defect(key, text, of)
    for key, of, text in (
        ("length", "negatives", "number of words differs from the masked template"),
        ("slot_kept", "negatives", "a masked word is left (equal number of words)"),
        ("slot_kept_any", "negatives", "a masked word is left (any number of words)"),
        ("other_changed", "negatives", "an unmasked word changed (equal number of words)"),
        ("other_changed_any", "negatives", "an unmasked word changed (any number of words)"),
        ("article_changed", "negatives", "only a or an before a masked word changed"),
        ("mask_left", "negatives", "a mask is left in the sentence"),
        ("empty", "negatives", "no word at all"),
        ("odd_blank", "negatives", "a blank or invisible character outside ASCII"),
        ("equals_query", "negatives", "equal to the query itself"),
        ("true_of_video", "negatives", "equal to another training caption of the same video"),
        ("true_elsewhere", "negatives", "equal to a training caption of another video"),
        ("true_somewhere", "negatives", "equal to some training caption"),
        ("new_word", "negatives", "a word that no training caption has"),
        ("equal_levels", "rows", "two levels are equal"),
        ("nearer_level", "rows", "a level is nearer to the query than the one below (Jaccard)"),
        ("no_further_level", "rows", "a level is no further from the query than the one below"),
        ("template_differs", "negatives", "template and query have different numbers of words"),
        ("repeated_id", "rows", "the query id occurred before"),
    )
)
_OF_ROWS: Final = frozenset(defect.key for defect in DEFECTS if defect.of == "rows")
_NEED_TEMPLATE: Final = frozenset(
    ("length", "slot_kept", "slot_kept_any", "other_changed", "other_changed_any")
) | {"article_changed", "template_differs"}


@dataclass(frozen=True, slots=True)
class Row:
    """The negatives of one query as a file has them; lists have one item per level, or none."""

    qid: str
    vid: str
    query: str
    negatives: tuple[str, ...]
    masked: tuple[str, ...] = ()
    valid: tuple[bool, ...] = ()
    source: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def is_valid(self, level: int) -> bool:
        """Whether a level takes part in a training, as far as the file says."""
        return self.valid[level] if self.valid else True

    def source_of(self, level: int) -> str:
        """Who made a level, as far as the file says."""
        return self.source[level] if self.source else "file"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file of negatives, one after the other.

    Args:
        path: Parquet, a folder of Parquet files, or JSON Lines; with `qid`, `vid`, `query` and
            `recomposed_queries`, and as far as they are there `masked_queries`, `valid`, `source`
            and `reasons`.

    Raises:
        InputError: the file cannot be read, or a row lacks what is needed.
    """
    for where, record in _records(path):
        yield _row(record, where)


def find_row(path: Path, qid: str) -> Row:
    """The row of a query.

    Raises:
        InputError: the file has no such query; the sentence names the nearest ids.
    """
    import difflib

    ids: list[str] = []
    for row in read_rows(path):
        if row.qid == qid:
            return row
        ids.append(row.qid)
    near = difflib.get_close_matches(qid, ids, cutoff=0.5) or ids[:3]
    raise InputError(
        f"{path}: no query {qid!r} among {len(ids):,}; the nearest: {', '.join(near) or 'none'}"
    )


def row_defects(row: Row) -> list[set[str]]:
    """Per level, the keys of `DEFECTS` that the row alone shows, none of an invalid level."""
    query = normalized(row.query)
    found: list[set[str]] = []
    below: list[str] = []
    for level, text in enumerate(row.negatives):
        keys: set[str] = set()
        found.append(keys)
        if not row.is_valid(level):
            continue
        plain = normalized(text)
        if not plain:
            keys.add("empty")
        if _MASK.search(text):
            keys.add("mask_left")
        if not text.isascii() and any(map(_is_odd_blank, text)):
            keys.add("odd_blank")
        if plain == query:
            keys.add("equals_query")
        if row.masked:
            keys |= _template_defects(row.query, row.masked[level], text)
        if plain in below:
            keys.add("equal_levels")
        if below:
            mine, last = overlap(query, plain), overlap(query, below[-1])
            keys |= {key for key, bad in _distance(mine, last) if bad}
        below.append(plain)
    return found


@lru_cache(maxsize=1 << 14)
def _plain(word: str) -> str:
    return normalized(word)


def _is_odd_blank(character: str) -> bool:
    if character.isascii():
        return False
    return character.isspace() or unicodedata.category(character) == "Cf"


def _distance(mine: float, last: float) -> tuple[tuple[str, bool], ...]:
    return ("nearer_level", mine > last), ("no_further_level", mine >= last)


def _template_defects(query: str, masked: str, text: str) -> set[str]:
    """What a negative makes of its template; words are those between white space."""
    keys: set[str] = set()
    slots = [_MASK.search(word) is not None for word in masked.split()]
    template, said, told = ([_plain(word) for word in t.split()] for t in (masked, text, query))
    kept = [word for word, slot in zip(template, slots, strict=True) if not slot]
    if len(template) != len(told):
        keys.add("template_differs")
    if len(template) != len(said):
        keys.add("length")
        rest = iter(said)
        if not all(word in rest for word in kept):
            keys.add("other_changed_any")
        if len(template) == len(told):
            lost, _ = changed_places(told, said)
            if any(slot and not gone for slot, gone in zip(slots, lost, strict=True)):
                keys.add("slot_kept_any")
        return keys
    changed = [
        place for place, slot in enumerate(slots) if not slot and template[place] != said[place]
    ]
    if changed:
        keys.add("other_changed_any")
        if all(
            {template[place], said[place]} == {"a", "an"} and any(slots[place + 1 : place + 2])
            for place in changed
        ):
            keys.add("article_changed")
    if len(template) == len(told):
        if changed:
            keys.add("other_changed")
        if any(slot and said[place] == told[place] for place, slot in enumerate(slots)):
            keys |= {"slot_kept", "slot_kept_any"}
    return keys


class Captions:
    """What training captions say: their words, and what is true of which video.

    Args:
        captions: pairs of video id and query.
    """

    def __init__(self, captions: Iterable[tuple[str, str]]):
        self.num_captions = 0
        self.words: set[str] = set()
        self.texts: Counter[str] = Counter()  # number of videos of each
        self._told: defaultdict[str, list[str]] = defaultdict(list)
        known: dict[str, str] = {}
        for vid, query in captions:
            self.num_captions += 1
            text = normalized(query)
            text = known.setdefault(text, text)
            self.words.update(text.split())
            if text not in self._told[vid]:
                self._told[vid].append(text)
                self.texts[text] += 1

    def is_true(self, vid: str, text: str) -> bool:
        """Whether a normalised text is a caption of the video."""
        return text in self._told.get(vid, ())

    def is_true_elsewhere(self, vid: str, text: str) -> bool:
        """Whether a normalised text is a caption of another video."""
        return self.texts.get(text, 0) > self.is_true(vid, text)

    @cached_property
    def checksum(self) -> str:
        """Equal for the same captions of the same videos in any order."""
        lines = sorted(f"{one.vid}\0{' '.join(one.words)}\n" for one in self.by_video())
        return hashlib.sha256("".join(lines).encode(errors="surrogatepass")).hexdigest()

    def by_video(self) -> Iterator[Caption]:
        """Every caption of every video, once."""
        for vid, texts in self._told.items():
            for text in texts:
                yield Caption(vid, tuple(text.split()))


class Tests:
    """Test queries of one file, and what of them training lacks and negatives show.

    Args:
        name: of the file.
        queries: its queries.
        tagger: reads verbs and nouns; None leaves pairs of words uncounted.
    """

    def __init__(self, name: str, queries: Sequence[str], tagger: Tagging | None):
        self.name = name
        self.queries = [normalized(query) for query in queries]
        self.texts = frozenset(self.queries)
        self.pairs: list[frozenset[Pair]] | None = None  # of each query
        if tagger is not None:
            self.pairs = [frozenset(read_content(words).pairs) for words in tagger(queries)]

    @cached_property
    def all_pairs(self) -> frozenset[Pair]:
        """The pairs of all queries."""
        return frozenset().union(*(self.pairs or ()))


class PairFinder:
    """Finds which of some verb-noun pairs sentences have; tags only those that may have one.

    Args:
        pairs: lemmas of verb and noun.
        tagger: reads them.
    """

    def __init__(self, pairs: Iterable[Pair], tagger: Tagging):
        self.pairs = frozenset(pairs)
        self._nouns: defaultdict[str, set[str]] = defaultdict(set)
        for verb, noun in self.pairs:
            self._nouns[verb].add(noun)
        self._lemmas: dict[str, frozenset[str]] = {}
        self._tagger = tagger

    def __call__(self, texts: Iterable[str]) -> dict[str, frozenset[Pair]]:
        """The pairs of each text that has any."""
        likely = sorted({text for text in texts if self._may_have(text)})
        tagged = self._tagger(likely)
        pairs = (frozenset(read_content(words).pairs) & self.pairs for words in tagged)
        return {text: found for text, found in zip(likely, pairs, strict=True) if found}

    def _may_have(self, text: str) -> bool:
        lemmas = frozenset().union(*map(self._lemmas_of, _LETTERS.findall(text.lower())))
        return any(self._nouns[lemma] & lemmas for lemma in lemmas & self._nouns.keys())

    def _lemmas_of(self, form: str) -> frozenset[str]:
        if form not in self._lemmas:
            lemmas = (*getLemma(form, upos="VERB"), *getLemma(form, upos="NOUN"))
            self._lemmas[form] = frozenset((form, *(lemma.lower() for lemma in lemmas)))
        return self._lemmas[form]


class Models:
    """Language models of captions, trained once for all files with the same captions.

    Args:
        seed: of their training.
    """

    def __init__(self, seed: int = 0):
        self._seed = seed
        self._known: dict[str, CaptionModels] = {}

    def of(self, captions: "Captions") -> CaptionModels | None:
        """The models of some captions, None where there are too few."""
        if sum(1 for _ in captions.by_video()) < LEAST_CAPTIONS:
            return None
        key = captions.checksum
        if key not in self._known:
            self._known[key] = CaptionModels(captions.by_video(), seed=self._seed)
        return self._known[key]


@dataclass(slots=True)
class _Level:
    """What is counted of one level."""

    negatives: int = 0
    invalid: int = 0
    overlap: float = 0.0
    shares: Counter[float] = field(default_factory=Counter)  # of words changed
    defects: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Leak:
    """What negatives show of one test file."""

    equal: int = 0
    equal_texts: set[str] = field(default_factory=set)
    with_pair: int = 0


def audit(
    path: Path,
    *,
    train: Sequence[Path] = (),
    tests: Sequence[Path] = (),
    tagger: Tagging | None = None,
    models: "Models | None" = None,
    seed: int = 0,
    on_progress: Progress = lambda stage: None,
) -> dict[str, Any]:
    """Everything that is counted about one file of negatives, in values that JSON can hold.

    Args:
        path: a file that `read_rows` reads.
        train: files of training captions; without any, the queries of `path` are.
        tests: files of test queries, for what the negatives show of them.
        tagger: reads verbs and nouns for pairs of words; without it, pairs are not counted.
        models: keeps language models between files with equal captions; None leaves plausibility
            out.
        seed: of the sample that is scored and of the language models.
        on_progress: told what is being done.

    Raises:
        InputError: a file cannot be read or has nothing to count.
    """
    on_progress("reading")
    captions = Captions(itertools.chain(*map(read_captions, train or [path])))
    sets = [Tests(str(test), _queries(test), tagger) for test in tests]
    finder = None
    if tagger is not None and sets:
        asked = frozenset().union(*(test.all_pairs for test in sets))
        known = PairFinder(asked, tagger)
        trained: set[Pair] = set()
        told = itertools.chain(*map(read_captions, train or [path]))
        while chunk := [query for _, query in itertools.islice(told, _CHUNK)]:
            trained.update(*known(chunk).values())
        finder = PairFinder(asked - trained, tagger)
    counting = _Counting(captions, sets, finder, seed)
    rows = read_rows(path)
    while chunk := list(itertools.islice(rows, _CHUNK)):
        counting.add(chunk)
        on_progress(f"{counting.rows:,} rows counted")
    if not counting.rows:
        raise InputError(f"{path}: expected rows with negatives, found none")
    if not counting.levels:
        raise InputError(
            f"{path}: none of its {counting.rows:,} rows has recomposed_queries; name a file of "
            f"hard negatives"
        )
    return {
        "format": _FORMAT,
        "file": str(path),
        "train": [str(one) for one in train] or None,
        "rule": RULE,
        **counting.result(),
        **_plausibility(counting, models, seed, on_progress),
    }


class _Counting:
    """Counts rows while they pass."""

    def __init__(
        self,
        captions: Captions,
        tests: Sequence[Tests],
        finder: PairFinder | None,
        seed: int,
    ):
        self.captions = captions
        self.rows = 0
        self.levels: list[_Level] = []
        self.sample: list[tuple[int, int, Row]] = []  # a heap: lowest rank, number of row, row
        self._tests = tests
        self._finder = finder
        self._seed = seed
        self._leaks = [_Leak() for _ in tests]
        self._examples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._row_defects: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()  # rows by number of levels
        self._with_template = 0
        self._ids: set[str] = set()
        self._new_words: set[str] = set()
        self._shown: set[Pair] = set()
        self._sources: Counter[tuple[str, int]] = Counter()
        self._reasons: Counter[str] = Counter()
        self._judged = False

    def add(self, rows: Sequence[Row]) -> None:
        if self._finder is not None:
            texts = (
                text
                for row in rows
                for level, text in enumerate(row.negatives)
                if row.is_valid(level)
            )
            pairs = self._finder(texts)
        else:
            pairs = {}
        for row in rows:
            self._add(row, pairs)

    def _add(self, row: Row, pairs: Mapping[str, frozenset[Pair]]) -> None:
        self.rows += 1
        self._sizes[len(row.negatives)] += 1
        while len(self.levels) < len(row.negatives):
            self.levels.append(_Level())
        # Rows of lowest rank: the same ones of every file with these ids.
        item = (-rank(row.qid, self._seed), -self.rows, row)
        if len(self.sample) < MOST_ROWS:
            heapq.heappush(self.sample, item)
        else:
            heapq.heappushpop(self.sample, item)
        self._with_template += bool(row.masked)
        self._judged |= bool(row.valid)
        found = row_defects(row)
        of_row = {"repeated_id"} if row.qid in self._ids else set()
        self._ids.add(row.qid)
        query = normalized(row.query)
        for number, text in enumerate(row.negatives):
            level = self.levels[number]
            self._sources[row.source_of(number), number] += 1
            if not row.is_valid(number):
                level.invalid += 1
                self._reasons.update(filter(None, row.reasons[number : number + 1]))
                continue
            plain = normalized(text)
            keys = found[number] | self._against_training(row.vid, query, plain)
            level.negatives += 1
            level.overlap += overlap(query, plain)
            lost, _ = changed_places(query.split(), plain.split())
            level.shares[sum(lost) / (len(lost) or 1)] += 1
            level.defects.update(keys)
            of_row |= keys & _OF_ROWS
            for key in sorted(keys):
                self._example(key, row, number, text)
            self._against_tests(plain, pairs.get(text, frozenset()), row, number, text)
        self._row_defects.update(of_row)
        if "repeated_id" in of_row:
            self._example("repeated_id", row, 0, row.negatives[0] if row.negatives else "")

    def _against_training(self, vid: str, query: str, plain: str) -> set[str]:
        keys: set[str] = set()
        if new := [word for word in plain.split() if word not in self.captions.words]:
            keys.add("new_word")
            self._new_words.update(new)
        if plain in self.captions.texts:
            keys.add("true_somewhere")
            if plain != query and self.captions.is_true(vid, plain):
                keys.add("true_of_video")
            if self.captions.is_true_elsewhere(vid, plain):
                keys.add("true_elsewhere")
        return keys

    def _against_tests(
        self, plain: str, pairs: frozenset[Pair], row: Row, number: int, text: str
    ) -> None:
        for test, leak in zip(self._tests, self._leaks, strict=True):
            if plain in test.texts:
                leak.equal += 1
                leak.equal_texts.add(plain)
                self._example(f"equal to a query of {Path(test.name).name}", row, number, text)
            if pairs and not pairs.isdisjoint(test.all_pairs):
                leak.with_pair += 1
                self._example(f"new pair of {Path(test.name).name}", row, number, text)
        self._shown |= pairs

    def _example(self, key: str, row: Row, level: int, text: str) -> None:
        if len(self._examples[key]) < EXAMPLES:
            self._examples[key].append(
                {"qid": row.qid, "level": level + 1, "query": row.query, "negative": text}
            )

    def result(self) -> dict[str, Any]:
        negatives = sum(level.negatives for level in self.levels)
        return {
            "rows": self.rows,
            "rows_by_levels": {str(size): self._sizes[size] for size in sorted(self._sizes)},
            "rows_with_template": self._with_template,
            "negatives": negatives,
            "invalid": sum(level.invalid for level in self.levels) if self._judged else None,
            "training": {
                "captions": self.captions.num_captions,
                "distinct_captions": len(self.captions.texts),
                "words": len(self.captions.words),
            },
            "new_words": len(self._new_words),
            "defects": [self._defect(defect, negatives) for defect in DEFECTS],
            "levels": [_level(level) for level in self.levels],
            "tests": [self._test(*pair) for pair in zip(self._tests, self._leaks, strict=True)],
            "pair_rule": None if self._finder is None else PAIR_RULE,
            "sources": self._by_source(),
            "reasons": dict(self._reasons.most_common()),
            "examples": dict(self._examples),
        }

    def _defect(self, defect: Defect, negatives: int) -> dict[str, Any]:
        """The count of one defect; none where the file does not tell."""
        entry: dict[str, Any] = {"key": defect.key, "text": defect.text, "of": defect.of}
        if defect.key in _NEED_TEMPLATE and not self._with_template:
            return {**entry, "count": None, "share": None, "by_level": None}
        by_level = [level.defects[defect.key] for level in self.levels]
        in_rows = defect.of == "rows"
        count = self._row_defects[defect.key] if in_rows else sum(by_level)
        total = self.rows if in_rows else negatives
        return {
            **entry,
            "count": count,
            "share": count / (total or 1),
            "by_level": None if in_rows else by_level,
        }

    def _test(self, test: Tests, leak: _Leak) -> dict[str, Any]:
        unseen = {word for text in test.texts for word in text.split()} - self.captions.words
        shown = unseen & self._new_words
        entry: dict[str, Any] = {
            "file": test.name,
            "queries": len(test.queries),
            "distinct_queries": len(test.texts),
            "equal_negatives": leak.equal,
            "equal_queries": len(leak.equal_texts),
            "unseen_words": len(unseen),
            "shown_words": len(shown),
            "queries_with_shown_word": sum(
                not shown.isdisjoint(query.split()) for query in test.queries
            ),
        }
        if test.pairs is None or self._finder is None:
            return entry
        pairs = test.all_pairs & self._finder.pairs
        shown_pairs = pairs & self._shown
        return {
            **entry,
            "unseen_pairs": len(pairs),
            "shown_pairs": len(shown_pairs),
            "negatives_with_pair": leak.with_pair,
            "queries_with_unseen_pair": sum(not pairs.isdisjoint(one) for one in test.pairs),
            "queries_with_shown_pair": sum(not shown_pairs.isdisjoint(one) for one in test.pairs),
        }

    def _by_source(self) -> dict[str, list[int]]:
        names = sorted({name for name, _ in self._sources})
        return {
            name: [self._sources[name, level] for level in range(len(self.levels))]
            for name in names
        }


def _level(level: _Level) -> dict[str, Any]:
    shares = sorted(level.shares.elements())
    low, high = np.percentile(shares, (5, 95)).tolist() if shares else (None, None)
    return {
        "negatives": level.negatives,
        "invalid": level.invalid,
        "changed": {"mean": float(np.mean(shares)) if shares else None, "p5": low, "p95": high},
        "overlap": level.overlap / level.negatives if level.negatives else None,
    }


def _plausibility(
    counting: _Counting, models: Models | None, seed: int, on_progress: Progress
) -> dict[str, Any]:
    """What language models of other videos make of a sample of the rows."""
    if models is None:
        return {"plausibility": None, "plausibility_missing": "it was not asked for"}
    on_progress("training language models")
    judge = models.of(counting.captions)
    if judge is None:
        return {
            "plausibility": None,
            "plausibility_missing": (
                f"{counting.captions.num_captions} training captions are too few to judge "
                f"plausibility by; it takes {LEAST_CAPTIONS}"
            ),
        }
    rows = [row for _, _, row in sorted(counting.sample, key=lambda item: -item[1])]
    rows = [row for row in rows if normalized(row.query)]
    on_progress("judging plausibility")
    queries = [_caption(row.vid, row.query) for row in rows]
    true = judge(queries)
    shuffled = judge([_shuffled(row, seed) for row in rows])
    bars = np.percentile([score.mean for score in true], _PERCENTILES).tolist() if true else []
    groups: defaultdict[tuple[str, int], list[tuple[Scores, Caption, Scores, Caption]]]
    groups = defaultdict(list)
    for row, query, true_scores in zip(rows, queries, true, strict=True):
        said = [_caption(row.vid, text) for text in row.negatives]
        for level, (caption, scores) in enumerate(zip(said, judge(said), strict=True)):
            if row.is_valid(level) and caption.words:
                groups[row.source_of(level), level].append((scores, caption, true_scores, query))
    return {
        "plausibility": {
            "model": (
                f"Recurrent networks over words, one for each of {FOLDS} parts of the videos, "
                f"trained on {judge.num_captions:,} captions; each sentence is judged by the one "
                f"that saw no caption of its video. An unknown word (never seen, or once) gets its "
                f"share of the probability of all of them."
            ),
            "rows": len(rows),
            "of_rows": counting.rows,
            "bars": dict(zip((f"p{p}" for p in _PERCENTILES), bars, strict=bool(bars))),
            "true": _group(true, bars),
            "shuffled": _group(shuffled, bars),
            "negatives": [
                {
                    "source": source,
                    "level": level + 1,
                    **_group([scores for scores, *_ in found], bars),
                    **_changed(found),
                }
                for (source, level), found in sorted(groups.items())
            ],
        },
        "plausibility_missing": None,
    }


def _group(scores: Sequence[Scores], bars: Sequence[float]) -> dict[str, Any]:
    """Mean log-probability per word in nats, and the shares at or above each bar."""
    means = np.array([score.mean for score in scores])
    words = sum(len(score.words) for score in scores)
    return {
        "sentences": len(scores),
        "per_word": float(means.mean()) if scores else None,
        **{
            f"above_p{percentile}": float((means >= bar).mean()) if scores else None
            for percentile, bar in zip(_PERCENTILES, bars, strict=bool(bars))
        },
        "unknown_words": sum(score.unknown for score in scores) / (words or 1),
    }


def _changed(
    found: Sequence[tuple[Scores, Caption, Scores, Caption]],
) -> dict[str, float | None]:
    """Mean log-probability of the new words, and of the words of the queries that they replace."""
    new: list[float] = []
    known: list[float] = []
    old: list[float] = []
    for scores, caption, true, query in found:
        lost, added = changed_places(query.words, caption.words)
        new += itertools.compress(scores.words, added)
        known += itertools.compress(scores.words, map(operator.and_, added, scores.known))
        old += itertools.compress(true.words, lost)
    return {
        "changed_words": float(np.mean(new)) if new else None,
        "changed_known_words": float(np.mean(known)) if known else None,
        "words_replaced": float(np.mean(old)) if old else None,
    }


def _caption(vid: str, text: str) -> Caption:
    return Caption(vid, tuple(normalized(text).split()))


def _shuffled(row: Row, seed: int) -> Caption:
    words = normalized(row.query).split()
    random.Random(rank(row.qid, seed)).shuffle(words)
    return Caption(row.vid, tuple(words))


# Reading


def read_captions(path: Path) -> Iterator[tuple[str, str]]:
    """Video id and query of every row of a file of annotations or negatives.

    Raises:
        InputError: the file cannot be read, or a row lacks one of them.
    """
    for where, record in _records(path, ("vid", "query")):
        yield _text(record, "vid", where), _text(record, "query", where)


def _queries(path: Path) -> list[str]:
    queries = [_text(record, "query", where) for where, record in _records(path, ("query",))]
    if not queries:
        raise InputError(f"{path}: expected test queries, the file is empty")
    return queries


_NEEDED: Final = ("qid", "vid", "query", "recomposed_queries")
_OPTIONAL: Final = ("masked_queries", "valid", "source", "reasons")


def _records(
    path: Path, columns: Sequence[str] = (*_NEEDED, *_OPTIONAL)
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every row of JSON Lines or Parquet."""
    if not path.is_dir() and path.suffix != ".parquet":
        for number, record in read_records(path, "a file of queries"):
            yield f"{path}, line {number}", record
        return
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not parts:
        raise InputError(f"{path}: expected Parquet files in this folder, found none")
    for part in parts:
        try:
            with pq.ParquetFile(part) as file:
                names = set(file.schema_arrow.names)
                if missing := [c for c in columns if c in _NEEDED and c not in names]:
                    raise InputError(
                        f"{part}: expected the columns {', '.join(missing)}, got "
                        f"{', '.join(sorted(names)) or 'none'}"
                    )
                number = 0
                present = [column for column in columns if column in names]
                for batch in file.iter_batches(_CHUNK, columns=present):
                    for record in batch.to_pylist():
                        number += 1
                        yield f"{part}, row {number}", record
        except (OSError, pa.ArrowException) as error:
            said = getattr(error, "strerror", None) or "it is no Parquet file, or a damaged one"
            raise InputError(f"cannot read {part}: {said}") from None


def _row(record: Mapping[str, Any], where: str) -> Row:
    if record.get("qid") is None:
        raise InputError(f"{where}: expected a qid, got none")
    negatives = _texts(record, "recomposed_queries", where)
    row = Row(
        qid=str(record["qid"]),
        vid=_text(record, "vid", where),
        query=_text(record, "query", where),
        negatives=negatives,
        masked=_texts(record, "masked_queries", where),
        valid=_flags(record, where),
        source=_sources(record, len(negatives), where),
        reasons=_reasons(record, len(negatives), where),
    )
    for name, values in (("masked_queries", row.masked), ("valid", row.valid)):
        if values and len(values) != len(negatives):
            raise InputError(
                f"{where}: expected as many {name} as recomposed_queries, got {len(values)} and "
                f"{len(negatives)}"
            )
    return row


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(value := record.get(name), str):
        raise InputError(f"{where}: expected a text as {name}, got {value!r}")
    return value


def _texts(record: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = record.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str | None) for text in value):
        raise InputError(f"{where}: expected a list of sentences as {name}")
    return tuple(text or "" for text in value)


def _flags(record: Mapping[str, Any], where: str) -> tuple[bool, ...]:
    value = record.get("valid")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(flag, bool) for flag in value):
        raise InputError(f"{where}: expected a list of true and false as valid, got {value!r}")
    return tuple(value)


def _sources(record: Mapping[str, Any], levels: int, where: str) -> tuple[str, ...]:
    value = record.get("source")
    if value is None or isinstance(value, str):
        return (value,) * levels if value else ()
    if not isinstance(value, list) or len(value) != levels:
        raise InputError(f"{where}: expected a source for each of {levels} levels, got {value!r}")
    return tuple(map(str, value))


def _reasons(record: Mapping[str, Any], levels: int, where: str) -> tuple[str, ...]:
    value = record.get("reasons")
    if value is None:
        return ()
    if (
        not isinstance(value, list)
        or len(value) not in (0, levels)
        or not all(map(_is_reason, value))
    ):
        raise InputError(
            f"{where}: expected as reasons a text or a list of texts for each of {levels} levels, "
            f"got {value!r}"
        )
    return tuple("; ".join(one) if isinstance(one, list) else one or "" for one in value)


def _is_reason(value: Any) -> bool:
    texts = value if isinstance(value, list) else ["" if value is None else value]
    return all(isinstance(text, str) for text in texts)
