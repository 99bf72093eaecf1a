"""Simulated features for the videos of real annotations, consistent with their captions.

Every caption of a video, in whichever file, is an event at its moment: two captions overlap where
their moments do. Borrowed captions are distractors. So every command can be tried on real
annotations before real features are at hand; the result says that it is simulated.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy import ndarray
from pydantic import Field

from shine.data.annotations import Annotation, Moment, read_annotations
from shine.data.content import Content, read_content
from shine.data.mixture import (
    FEATURES,
    MANIFEST,
    WORD_VECTORS,
    MixtureConfig,
    Stream,
    begin_world,
    clip_coverage,
    finish_world,
    form_offset,
    function_vector,
    generator,
    hashed_unit,
    make_views,
    mix_clips,
    text_key,
    write_word_vectors,
)
from shine.errors import InputError
from shine.language.tagging import load_tagger
from shine.language.words import Word


class DressConfig(MixtureConfig):
    """How annotations are given simulated features."""

    distractors: Annotated[int, Field(ge=0)] = 2  # unrelated events of each video
    dtype: Literal["float16", "float32"] = "float32"  # of the feature files
    tagger: str = "auto"


@dataclass(frozen=True)
class _Scene:
    """What is known of one video."""

    vid: str
    duration_seconds: float
    captions: tuple[tuple[str, Moment], ...]
    file: int  # the first that names the video: its distractors are captions of that file


def dress(files: Sequence[Path], out: Path, config: DressConfig) -> dict[str, Any]:
    """A simulated world for `files` stands in `out`; returns its manifest, also `world.json`.

    Writes unchanged copies of the files, `features/{vid}.npy` for each of their videos and
    `word_vectors.parquet` for each word of their captions and hard negatives. Distractors and
    stray concepts of a video come from the first file that names it, so training videos show
    nothing that only test captions say.

    Raises:
        InputError: a file is malformed, two have one name, or `out` holds other files.
    """
    _check_names(files, out)
    annotations = [read_annotations(path) for path in files]
    scenes = _scenes(annotations)
    tagger = load_tagger(config.tagger)
    texts = sorted(
        {text for rows in annotations for row in rows for text in (row.query, *row.negatives)}
    )
    tagged = dict(zip(texts, tagger(texts), strict=True))
    content = {text: read_content(words) for text, words in tagged.items()}

    names = [path.name for path in files]
    simulated = f"features simulated from the captions, seed {config.seed}"
    begin_world(out, simulated, names)
    for path in files:
        shutil.copyfile(path, out / path.name)
    wardrobe = Wardrobe(config, content)
    pools = [sorted({row.query for row in rows}) for rows in annotations]
    lengths = {
        row.query: row.moments[0][1] - row.moments[0][0] for rows in annotations for row in rows
    }
    strays = [wardrobe.strays(pool) for pool in pools]
    for scene in scenes:
        rng = generator(config.seed, Stream.VIDEO, *text_key(scene.vid))
        borrowed = _borrow(config, rng, scene, pools[scene.file], lengths, content)
        events = (*scene.captions, *borrowed)
        coverage = clip_coverage(
            np.array([moment for _, moment in events]), scene.duration_seconds, config.clip_seconds
        )
        appearance = np.stack([wardrobe[text] for text, _ in events])
        clips = mix_clips(config, rng, coverage, appearance, strays[scene.file])
        np.save(out / FEATURES / f"{scene.vid}.npy", clips.astype(config.dtype))
    write_word_vectors(out / WORD_VECTORS, word_vectors(config, tagged))

    rows = [row for part in annotations for row in part]
    manifest = {
        "simulated": simulated,
        "config": config.model_dump(mode="json"),
        "tagger": {"name": tagger.name, "version": tagger.version},
        "rows": {path.name: len(part) for path, part in zip(files, annotations, strict=True)},
        "videos": len(scenes),
        "moments_past_the_end": sum(
            end > row.duration_seconds for row in rows for _, end in row.moments
        ),
    }
    return finish_world(out, manifest, names)


def _check_names(files: Sequence[Path], out: Path) -> None:
    if not files:
        raise InputError("expected at least one annotation file to dress, got none")
    doubled = [name for name, n in Counter(path.name for path in files).items() if n > 1]
    if doubled:
        raise InputError(f"expected annotation files with different names, got {doubled[0]} twice")
    for path in files:
        if path.name in (MANIFEST, WORD_VECTORS):
            raise InputError(f"{path}: a world has a file of that name itself; rename yours")
        if path.parent.resolve() == out.resolve():
            raise InputError(f"{path} lies in {out}, which will be replaced; name another folder")


def _scenes(annotations: Sequence[Sequence[Annotation]]) -> list[_Scene]:
    """One scene per video, in order of appearance; equal captions at one moment count once."""
    first: dict[str, int] = {}
    durations: dict[str, float] = defaultdict(float)
    captions: dict[str, dict[tuple[str, Moment], None]] = defaultdict(dict)
    for number, rows in enumerate(annotations):
        for row in rows:
            first.setdefault(row.vid, number)
            durations[row.vid] = max(durations[row.vid], row.duration_seconds)
            captions[row.vid] |= dict.fromkeys((row.query, moment) for moment in row.moments)
    return [
        _Scene(vid, durations[vid], tuple(captions[vid]), number) for vid, number in first.items()
    ]


def _borrow(
    config: DressConfig,
    rng: np.random.Generator,
    scene: _Scene,
    pool: Sequence[str],
    lengths: Mapping[str, float],
    content: Mapping[str, Content],
) -> list[tuple[str, Moment]]:
    """Captions of other videos that share no content word with this one, at random moments.

    Up to `config.distractors`; each keeps the length of its own moment, cut to half of the video.
    """
    own = frozenset().union(*(content[text].lemmas for text, _ in scene.captions))
    tried: list[int] = rng.integers(len(pool), size=10 * config.distractors).tolist()
    texts = dict.fromkeys(pool[i] for i in tried)
    unrelated = [text for text in texts if not own & content[text].lemmas]
    events = []
    for text in unrelated[: config.distractors]:
        length = min(lengths[text], scene.duration_seconds / 2)
        start = float(rng.random()) * (scene.duration_seconds - length)
        events.append((text, (start, start + length)))
    return events


class Wardrobe:
    """Caption -> what a clip shows that is filled by it: [video_width].

    The sum of its weighted concepts, and of each bound pair of verb and noun.
    """

    def __init__(self, config: DressConfig, content: Mapping[str, Content]):
        lemmas = sorted(frozenset().union(*(item.lemmas for item in content.values())))
        views = make_views(config)
        self._config = config
        self._content = content
        self._index = {lemma: i for i, lemma in enumerate(lemmas)}
        self._concepts = _concepts(config, lemmas)
        self._seen = self._concepts @ views.video.T
        self._views = views
        self._known: dict[str, ndarray] = {}

    def __getitem__(self, text: str) -> ndarray:
        if text not in self._known:
            self._known[text] = self._appearance(self._content[text])
        return self._known[text]

    def strays(self, texts: Sequence[str]) -> ndarray:
        """The video views of all concepts of `texts`: [concept, video_width]."""
        lemmas = frozenset().union(*(self._content[text].lemmas for text in texts))
        if not lemmas:
            return np.zeros((1, self._config.video_width))
        return self._seen[[self._index[lemma] for lemma in sorted(lemmas)]]

    def _appearance(self, content: Content) -> ndarray:
        total = np.zeros(self._config.video_width)
        for role, lemma in content.concepts:
            total += self._config.weight(role) * self._seen[self._index[lemma]]
        for verb, noun in content.pairs:
            bound = self._views.bind(
                self._concepts[self._index[verb]], self._concepts[self._index[noun]]
            )
            total += self._config.binding * bound
        return total


def word_vectors(config: DressConfig, tagged: Mapping[str, Sequence[Word]]) -> dict[str, ndarray]:
    """The text view of every word of the captions in `tagged`, in lower case: [text_width] each.

    A word form that occurs with several lemmas or tags takes the most frequent. A word of several
    tokens ("t-shirt") is in the table as a whole too, with the meaning of its last content word.
    """
    readings: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for words in tagged.values():
        for surface, lemma, tag in _surfaces(words):
            readings[surface][lemma, tag] += 1
    views = make_views(config)
    table = {}
    for surface, counts in readings.items():
        lemma, tag = max(counts, key=lambda reading: (counts[reading], reading))
        table[surface] = (
            views.text @ _concepts(config, [lemma])[0] + form_offset(config, tag)
            if lemma
            else function_vector(config, surface)
        )
    return table


def _surfaces(words: Sequence[Word]) -> list[tuple[str, str, str]]:
    """Surface, lemma and tag of each token and of each run of tokens without a space.

    The lemma of a word without content is empty.
    """
    content = {lemma for _, lemma in read_content(words).concepts}
    found: list[tuple[str, str, str]] = []
    run: list[tuple[str, str, str]] = []
    for word in words:
        lemma = word.lemma if word.lemma in content else ""
        run.append((word.text.lower(), lemma, word.tag))
        if word.space or word is words[-1]:
            found += run
            whole = "".join(surface for surface, _, _ in run).strip(".,!?;:\"'()")
            _, lemma, tag = next((token for token in reversed(run) if token[1]), ("", "", ""))
            if whole != run[0][0]:
                found.append((whole, lemma, tag))
            run = []
    return [item for item in found if any(map(str.isalnum, item[0]))]


def _concepts(config: DressConfig, lemmas: Sequence[str]) -> ndarray:
    """The unit vectors of `lemmas`, of (seed, lemma) alone: [lemma, concept_width]."""
    vectors = [
        hashed_unit(config.seed, Stream.CONCEPT, lemma, config.concept_width) for lemma in lemmas
    ]
    return np.array(vectors).reshape(len(lemmas), config.concept_width)
