"""Ray Data around the making of hard negatives: many workers tag, propose and judge at once.

Work travels as videos, because what is true of a video decides which sentences are false there.
Every choice is drawn from (seed, query id, level, slot), so the file is the same for any number of
workers and any order of arrival.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from cluster.connection import connect
from cluster.size import data_workers
from shine.config import Config, NegativesConfig
from shine.data.annotations import Annotation, read_annotations
from shine.errors import InputError
from shine.files import sha256
from shine.language.masking import masked_query
from shine.language.negatives import SCHEMA, NegativeRecord, write_negatives
from shine.language.neighbours import ContextCounts, Neighbours, count_contexts
from shine.language.proposal import build_generators, propose
from shine.language.tagging import Word, load_tagger
from shine.language.validation import Judge
from shine.language.vocabulary import Vocabulary, WordCounts, count_words

Progress = Callable[[int, int], None]  # done, total
References = list[Any]  # to tables in Ray's object store

_VIDEOS_PER_BLOCK: Final = 128
_MAX_RESTARTS: Final = 3  # of a worker that died
_WORD: Final = pa.struct([(name, pa.string()) for name in ("text", "space", "pos", "tag", "lemma")])
_VIDEOS: Final = pa.schema(
    [
        ("vid", pa.string()),
        ("rows", pa.list_(pa.int64())),  # numbers of its queries in the annotation file
        ("qids", pa.list_(pa.string())),
        ("queries", pa.list_(pa.string())),
    ]
)
_WORDS: Final = pa.field("words", pa.list_(pa.list_(_WORD)))
_RESULTS: Final = SCHEMA.append(pa.field("row", pa.int64()))


class TagVideos:
    """Adds the tagged words of every query; what a worker of the first stage runs.

    Args:
        name: of the tagger.
    """

    def __init__(self, name: str):
        self._tagger = load_tagger(name)

    def __call__(self, videos: pa.Table) -> pa.Table:
        """`videos` with a column `words`; a query that occurs twice is tagged once."""
        queries = videos["queries"].to_pylist()
        distinct = sorted({query for video in queries for query in video})
        tagged = [[asdict(word) for word in words] for words in self._tagger(distinct)]
        known = dict(zip(distinct, tagged, strict=True))
        words = [[known[query] for query in video] for video in queries]
        return videos.append_column(_WORDS, pa.array(words, _WORDS.type))


class ProposeNegatives:
    """Makes the negatives of every query of tagged videos.

    Args:
        vocabulary: words of all queries.
        neighbours: contexts of all queries.
        settings: the values of a `NegativesConfig`.
        tagger: name and version of the tagger, for the record.
    """

    def __init__(
        self, vocabulary: Vocabulary, neighbours: Neighbours, settings: dict[str, Any], tagger: str
    ):
        self._config = NegativesConfig.model_validate(settings)
        self._generators = build_generators(self._config, vocabulary, neighbours, tagger=tagger)
        self._judge = Judge(vocabulary, open_vocabulary=self._config.open_vocabulary)
        self._tagger = tagger

    def __call__(self, videos: pa.Table) -> pa.Table:
        """One row per query: a `NegativeRecord` and the number of the query, `row`."""
        results: list[dict[str, Any]] = []
        for video in videos.to_pylist():
            captions = _captions(video)
            for number, row in enumerate(video["rows"]):
                record = self._record(video, captions, number)
                results.append({**asdict(record), "row": row})
        return pa.Table.from_pylist(results, schema=_RESULTS)

    def _record(
        self, video: dict[str, Any], captions: Sequence[Sequence[Word]], number: int
    ) -> NegativeRecord:
        qid, words = video["qids"][number], captions[number]
        levels = self._generators[0].levels(words, qid=qid)
        proposals = propose(self._generators, self._judge, words, levels, qid=qid, truths=captions)
        return NegativeRecord(
            qid=qid,
            vid=video["vid"],
            query=video["queries"][number],
            masked_queries=[masked_query(words, slots) for slots in levels],
            recomposed_queries=[level.sentence for level in proposals],
            valid=[not level.reasons for level in proposals],
            source=[level.source for level in proposals],
            reasons=["; ".join(level.reasons) for level in proposals],
            tagger=self._tagger,
            seed=self._config.seed,
        )


class StoredProposeNegatives(ProposeNegatives):
    """The same with what was counted in Ray's object store: a worker of the second stage.

    Args:
        counted: Ray's reference to (vocabulary, neighbours).
        settings: see `ProposeNegatives`.
        tagger: see `ProposeNegatives`.
    """

    def __init__(self, counted: Any, settings: dict[str, Any], tagger: str):
        import ray

        vocabulary, neighbours = ray.get(counted)
        super().__init__(vocabulary, neighbours, settings, tagger)


def generate(
    config: Config,
    *,
    source: Path,
    out: Path,
    num_workers: int | None = None,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Hard negatives of every query of `source` stand in `out`, its vocabulary beside it.

    Vocabulary and statistics come from `source` alone. Both files are the same, byte for byte, for
    any number of workers.

    Args:
        config: its section `negatives` tells how.
        source: an annotation file.
        out: a Parquet file; the vocabulary goes to the same name with `.vocabulary.json`.
        num_workers: processes at a time; None: as many as the cluster has CPUs.
        on_progress: told (queries done, queries in all).

    Returns:
        Counts: `rows`, `levels`, `invalid` per level, `reasons` with their counts, and the
        checksums of `source` and of the vocabulary.

    Raises:
        InputError: `source` is wrong, `out` cannot be written, or there is no tagger.
    """
    if out.suffix != ".parquet":
        raise InputError(f"{out}: hard negatives are written as Parquet; name a file .parquet")
    annotations = read_annotations(source)
    tagger = load_tagger(config.negatives.tagger)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write negatives {out}: {error.strerror}") from None
    total = len(annotations)
    with connect():
        # Each of the two stages is half of the work on a query.
        tagged, vocabulary, neighbours = _tag(
            annotations, tagger.name, num_workers, lambda done: on_progress(done // 2, total)
        )
        metadata = {
            "generator": config.negatives.generator,
            "ratios": config.negatives.ratios,
            "seed": config.negatives.seed,
            "tagger": f"{tagger.name} {tagger.version}",
            "source_sha256": sha256(source),
            "vocabulary_sha256": vocabulary.checksum,
        }
        summary = _Summary(config.negatives.num_levels)
        records = _propose(
            tagged, vocabulary, neighbours, config.negatives, metadata["tagger"], num_workers
        )
        vocabulary.save(out.with_suffix(".vocabulary.json"))
        write_negatives(
            out,
            summary.counting(records, lambda done: on_progress((total + done) // 2, total)),
            metadata,
        )
    return {**summary.counts(), **metadata}


def _tag(
    annotations: Sequence[Annotation],
    tagger: str,
    num_workers: int | None,
    on_progress: Callable[[int], None],
) -> tuple[References, Vocabulary, Neighbours]:
    """References to tables of tagged videos, and what was counted on the way."""
    import ray

    words: WordCounts = Counter()
    contexts: ContextCounts = Counter()
    tagged, done = [], 0
    tables = [ray.put(table) for table in video_tables(annotations)]
    for table in _stage(tables, TagVideos, (tagger,), num_workers):
        captions = [caption for video in table.to_pylist() for caption in _captions(video)]
        words += count_words(captions)
        contexts += count_contexts(captions)
        tagged.append(ray.put(table))
        done += len(captions)
        on_progress(done)
    return tagged, Vocabulary.from_counts(words), Neighbours(contexts)


def _propose(
    tagged: References,
    vocabulary: Vocabulary,
    neighbours: Neighbours,
    config: NegativesConfig,
    tagger: str,
    num_workers: int | None,
) -> Iterator[NegativeRecord]:
    """The negatives of every query, in the order of the annotation file."""
    import ray

    counted = ray.put((vocabulary, neighbours))
    arguments = (counted, config.model_dump(mode="json"), tagger)
    waiting: dict[int, dict[str, Any]] = {}
    following = 0
    for table in _stage(tagged, StoredProposeNegatives, arguments, num_workers):
        for result in table.to_pylist():
            waiting[result.pop("row")] = result
        while following in waiting:
            yield NegativeRecord(**waiting.pop(following))
            following += 1
    assert not waiting, "a query was lost on the way"


def _stage(
    tables: References,
    worker: type,
    arguments: tuple[Any, ...],
    num_workers: int | None,
) -> Iterator[pa.Table]:
    """What workers make of the tables, in their order and as they are ready."""
    import ray.data
    from ray.exceptions import ActorDiedError
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_arrow_refs([*tables])
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    most = min(len(tables), num_workers or data_workers())
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to bound restarts; unbounded, a crashing worker would never end.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        made = dataset.map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
            num_cpus=1,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=_MAX_RESTARTS,
        )
    try:
        yield from made.iter_batches(batch_size=None, batch_format="pyarrow")
    except ActorDiedError:
        raise RuntimeError(
            f"a worker that makes hard negatives died {_MAX_RESTARTS + 1} times, most often for "
            f"want of memory; free some, or run on a larger machine"
        ) from None


def video_tables(annotations: Iterable[Annotation]) -> Iterator[pa.Table]:
    """Every video with its queries, in the order of their first queries, some videos a table."""
    videos: dict[str, dict[str, Any]] = {}
    for row, annotation in enumerate(annotations):
        video = videos.setdefault(
            annotation.vid, {"vid": annotation.vid, "rows": [], "qids": [], "queries": []}
        )
        video["rows"].append(row)
        video["qids"].append(annotation.qid)
        video["queries"].append(annotation.query)
    rows = list(videos.values())
    for start in range(0, len(rows), _VIDEOS_PER_BLOCK):
        yield pa.Table.from_pylist(rows[start : start + _VIDEOS_PER_BLOCK], schema=_VIDEOS)


def _captions(video: dict[str, Any]) -> list[tuple[Word, ...]]:
    return [tuple(Word(**word) for word in caption) for caption in video["words"]]


class _Summary:
    """Counts records while they pass."""

    def __init__(self, num_levels: int):
        self._rows = 0
        self._invalid = [0] * num_levels
        self._reasons: Counter[str] = Counter()

    def counting(
        self, records: Iterable[NegativeRecord], on_progress: Callable[[int], None]
    ) -> Iterator[NegativeRecord]:
        for record in records:
            self._rows += 1
            for level, valid in enumerate(record.valid):
                self._invalid[level] += not valid
            self._reasons.update(reason for reason in record.reasons if reason)
            on_progress(self._rows)
            yield record

    def counts(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "levels": len(self._invalid),
            "invalid": self._invalid,
            "reasons": dict(sorted(self._reasons.items())),
        }
