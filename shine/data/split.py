"""Validation carved from training annotations, for choosing checkpoints without test files."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from shine.data.annotations import Annotation
from shine.data.content import Content, read_content
from shine.errors import InputError
from shine.language.tagging import Tagger

Pair = tuple[str, str]  # lemmas of a verb and its noun


class Carved(NamedTuple):
    """Training annotations in three parts that share no video, each in the order of the file."""

    train: list[Annotation]
    val_trivial: list[Annotation]  # every verb-noun pair is in a training query
    val_composition: list[Annotation]  # a pair is in no training query, all words are


def carve_validation(
    annotations: Sequence[Annotation], tagger: Tagger, *, rows: int, seed: int = 0
) -> Carved:
    """Training annotations without some verb-noun pairs and some videos, and two validation splits.

    Pairs are held out at random until about `rows` queries have one. The videos of these queries
    leave training whole, and their other queries go to val-trivial, which may therefore be larger;
    where it is smaller, further videos follow. A query of such a video that fits neither split (a
    word or a pair that training no longer has) is left out.

    Args:
        annotations: of training alone; test files play no part.
        tagger: reads verbs and nouns.
        rows: wanted queries of each validation split; the result is near it, as pairs and videos
            go whole.
        seed: of the choice.

    Raises:
        InputError: there are too few annotations, or too few pairs whose words occur elsewhere.
    """
    if len(annotations) < 6:
        raise InputError(
            f"expected 6 training annotations at least to carve validation from, got "
            f"{len(annotations)}"
        )
    if not 1 <= rows <= len(annotations) // 6:
        raise InputError(
            f"expected 1 to {len(annotations) // 6} validation rows of each kind, a sixth of the "
            f"{len(annotations)} training annotations; got {rows}"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    content = _contents(annotations, tagger)
    held_out = _hold_out(rng, [content[row.query] for row in annotations], rows)

    taken = {row.vid for row in annotations if held_out & set(content[row.query].pairs)}
    per_video = Counter(row.vid for row in annotations)
    others = sorted(per_video.keys() - taken)
    room = rows - sum(
        row.vid in taken and not held_out & set(content[row.query].pairs) for row in annotations
    )
    for i in rng.permutation(len(others)).tolist():
        if room <= 0:
            break
        taken.add(others[i])
        room -= per_video[others[i]]

    train = [row for row in annotations if row.vid not in taken]
    known = [content[row.query] for row in train]
    words = frozenset().union(*(item.lemmas for item in known))
    pairs = {pair for item in known for pair in item.pairs}
    candidates = [
        (row, content[row.query])
        for row in annotations
        if row.vid in taken and content[row.query].lemmas <= words
    ]
    trivial = [row for row, item in candidates if pairs.issuperset(item.pairs)]
    composition = [row for row, item in candidates if held_out & set(item.pairs)]
    if not trivial or not composition:
        raise InputError(
            f"no validation split of about {rows} rows can be carved from {len(annotations)} "
            f"annotations: their verbs and nouns occur in too few combinations"
        )
    return Carved(train, trivial, composition)


def _contents(annotations: Iterable[Annotation], tagger: Tagger) -> Mapping[str, Content]:
    texts = sorted({row.query for row in annotations})
    return dict(zip(texts, map(read_content, tagger(texts)), strict=True))


def _hold_out(rng: np.random.Generator, contents: Sequence[Content], rows: int) -> set[Pair]:
    """Pairs that about `rows` of `contents` have, of words that keep at least two other pairs.

    No pair has more than a quarter of the rows, so that several are held out.
    """
    counts = Counter(pair for content in contents for pair in content.pairs)
    partners: dict[str, int] = defaultdict(int)
    for verb, noun in counts:
        partners[f"verb {verb}"] += 1
        partners[f"noun {noun}"] += 1
    candidates = sorted(counts)
    held_out: set[Pair] = set()
    room = rows
    for i in rng.permutation(len(candidates)).tolist():
        verb, noun = pair = candidates[i]
        ends = f"verb {verb}", f"noun {noun}"
        if counts[pair] <= min(room, max(rows // 4, 1)) and min(partners[end] for end in ends) > 2:
            held_out.add(pair)
            room -= counts[pair]
            for end in ends:
                partners[end] -= 1
    return held_out
