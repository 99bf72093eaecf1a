"""Ray Data around the making of hard negatives: many workers tag, ask, propose and judge at once.

Work travels as videos, because what is true of a video decides which sentences are false there.
Every choice is drawn from (seed, query id, level, slot), so the file is the same for any number of
workers and any order of arrival. What a language model is asked is found by proposing without
asking: whatever answer is missing is a request, asked once however many rows need it, and proposing
starts anew with the answers.
"""

import errno
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from cluster.connection import connect
from cluster.size import data_workers
from pipelines.stage import run_stage
from shine.config import Config, NegativesConfig
from shine.data.annotations import VideoIndex
from shine.errors import InputError, Stopped
from shine.files import sha256
from shine.language.masking import masked_query
from shine.language.negatives import (
    SCHEMA,
    NegativeRecord,
    read_negatives,
    write_field_jsonl,
    write_negatives,
)
from shine.language.neighbours import ContextCounts, Neighbours, count_contexts
from shine.language.proposal import build_generators, propose
from shine.language.validation import Judge
from shine.language.vocabulary import Vocabulary, WordCounts, count_words
from shine.language.wordnet import load_meanings
from shine.language.words import Word
from shine.llm.answers import Answers, AnswerStore
from shine.llm.filling import LlmGenerator, load_prompt

Progress = Callable[[int, int, str], None]  # done, total, what is being done
References = list[Any]  # to tables in Ray's object store
Tables = Iterator[pa.Table]

_VIDEOS_PER_BLOCK: Final = 128
# Of the same request: the first answer, one more with the reasons, and once for what failed.
_ROUNDS: Final = 3
_GUESSED_COMPLETION: Final = 60  # tokens of an answer, as long as there is none to learn from
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
_COUNTS: Final = pa.field("counts", pa.string())  # of all videos of a table, in its first row
_COSTS: Final = ("prompt_tokens", "completion_tokens", "dollars")
_COST: Final = pa.struct([SCHEMA.field(name) for name in _COSTS])
_RESULTS: Final = SCHEMA.append(pa.field("row", pa.int64())).append(
    pa.field("costs", pa.list_(_COST))  # of each of its requests
)
REQUESTS: Final = pa.schema(
    [("key", pa.string()), ("messages", pa.string()), ("prompt_tokens", pa.int64())]
)
_NEEDED: Final = REQUESTS.append(pa.field("dollars", pa.float64()))  # null: not answered


class TagVideos:
    """Adds the tagged words of every query and counts them; a worker of the first stage.

    Args:
        name: of the tagger.
    """

    def __init__(self, name: str):
        from shine.language.tagging import load_tagger  # loads spaCy, which only this stage needs

        self._tagger = load_tagger(name)

    def __call__(self, videos: pa.Table) -> pa.Table:
        """`videos` with columns `words` and `counts`; a query that occurs twice is tagged once."""
        queries = videos["queries"].to_pylist()
        distinct = sorted({query for video in queries for query in video})
        tagged = dict(zip(distinct, self._tagger(distinct), strict=True))
        captions = [tagged[query] for video in queries for query in video]
        told = {query: [asdict(word) for word in words] for query, words in tagged.items()}
        words = [[told[query] for query in video] for video in queries]
        counts = json.dumps(
            [
                [[*key, count] for key, count in counter.items()]
                for counter in (count_words(captions), count_contexts(captions))
            ]
        )
        first = pa.array([counts, *[None] * (len(videos) - 1)], _COUNTS.type)
        return videos.append_column(_WORDS, pa.array(words, _WORDS.type)).append_column(
            _COUNTS, first
        )


class ProposeNegatives:
    """Makes the negatives of every query of tagged videos; a worker of the last stage.

    Args:
        vocabulary: words of all queries.
        neighbours: contexts of all queries.
        settings: the values of a `NegativesConfig`.
        tagger: name and version of the tagger, for the record.
        answers: of the language model, a table of `Answers`; for `llm`.
        rows: of the file by query id; for `file`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        neighbours: Neighbours,
        settings: dict[str, Any],
        tagger: str,
        answers: pa.Table | None = None,
        rows: dict[str, Any] | None = None,
    ):
        self._config = NegativesConfig.model_validate(settings)
        self._generators = build_generators(
            self._config,
            vocabulary,
            neighbours,
            tagger=tagger,
            answers=None if answers is None else Answers(answers),
            rows=rows,
        )
        self._judge = Judge(
            vocabulary,
            open_vocabulary=self._config.open_vocabulary,
            meanings=load_meanings(self._config.wordnet),
        )
        self._tagger = tagger

    def __call__(self, videos: pa.Table) -> pa.Table:
        """One row per query: a `NegativeRecord`, the number of the query, and what it cost."""
        results: list[dict[str, Any]] = []
        for video in videos.to_pylist():
            captions = _captions(video)
            for number, row in enumerate(video["rows"]):
                record, costs = self._record(video, captions, number)
                results.append({**asdict(record), "row": row, "costs": costs})
        return pa.Table.from_pylist(results, schema=_RESULTS)

    def _record(
        self, video: dict[str, Any], captions: Sequence[Sequence[Word]], number: int
    ) -> tuple[NegativeRecord, list[dict[str, Any]]]:
        qid, words = video["qids"][number], captions[number]
        first = self._generators[0]
        levels = first.levels(words, qid=qid)
        proposals = propose(self._generators, self._judge, words, levels, qid=qid, truths=captions)
        used = first.take_used() if isinstance(first, LlmGenerator) else {}
        costs = [{name: getattr(answer, name) for name in _COSTS} for answer in used.values()]
        return NegativeRecord(
            qid=qid,
            vid=video["vid"],
            query=video["queries"][number],
            masked_queries=[masked_query(words, slots) for slots in levels],
            recomposed_queries=[level.sentence for level in proposals],
            valid=[not level.reasons for level in proposals],
            source=[level.source for level in proposals],
            attempts=[level.attempts for level in proposals],
            reasons=["; ".join(level.reasons) for level in proposals],
            refused=["; ".join(level.refused) for level in proposals],
            tagger=self._tagger,
            seed=self._config.seed,
            requests=[*used],
            prompt_tokens=0,
            completion_tokens=0,
            dollars=0.0,
        ), costs


class FindRequests(ProposeNegatives):
    """What a language model has to be asked for the queries of tagged videos, and what it was."""

    def __call__(self, videos: pa.Table) -> pa.Table:
        """One row per request; its `dollars` are null as long as it has no answer."""
        llm = self._generators[0]
        assert isinstance(llm, LlmGenerator)
        for video in videos.to_pylist():
            captions = _captions(video)
            for qid, words in zip(video["qids"], captions, strict=True):
                levels = llm.levels(words, qid=qid)
                propose((llm,), self._judge, words, levels, qid=qid, truths=captions)
        missing = [{**asdict(r), "dollars": None} for r in llm.take_missing().values()]
        paid = [
            {"key": key, "messages": "", "prompt_tokens": 0, "dollars": answer.dollars}
            for key, answer in llm.take_used().items()
        ]
        return pa.Table.from_pylist([*missing, *paid], schema=_NEEDED)


class Stored:
    """A worker of `kind` with what was counted in Ray's object store.

    Args:
        kind: `ProposeNegatives` or `FindRequests`.
        counted: Ray's reference to (vocabulary, neighbours).
        known: Ray's reference to (answers, rows), each or None.
        settings: see `ProposeNegatives`.
        tagger: see `ProposeNegatives`.
    """

    def __init__(
        self,
        kind: type[ProposeNegatives],
        counted: Any,
        known: Any,
        settings: dict[str, Any],
        tagger: str,
    ):
        import ray

        vocabulary, neighbours = ray.get(counted)
        answers, rows = ray.get(known)
        self._worker = kind(vocabulary, neighbours, settings, tagger, answers, rows)

    def __call__(self, videos: pa.Table) -> pa.Table:
        """What the worker makes of `videos`."""
        return self._worker(videos)


def generate(
    config: Config,
    *,
    source: Path,
    out: Path,
    num_workers: int | None = None,
    batch: bool = False,
    on_progress: Progress = lambda done, total, stage: None,
) -> dict[str, Any]:
    """Hard negatives of every query of `source` stand in `out`, its vocabulary beside it.

    Vocabulary and statistics come from `source` alone. Both files are the same, byte for byte, for
    any number of workers and, with `llm`, for the same answers.

    Args:
        config: its section `negatives` tells how.
        source: an annotation file.
        out: a Parquet file, or a `.jsonl` of the field; the vocabulary goes to the same name with
            `.vocabulary.json`.
        num_workers: processes at a time; None: as many as the cluster has CPUs.
        batch: whether a language model is asked through its provider's Batch API.
        on_progress: told (done, in all, what).

    Returns:
        Counts: `rows`, `levels`, `invalid` per level, `sources` and `reasons` with their counts,
        tokens and dollars, and the checksums of `source` and of the vocabulary.

    Raises:
        InputError: `source` is wrong, `out` cannot be written, there is no tagger, or the endpoint
            refuses the key or the model.
        Stopped: the budget is spent or the endpoint is down; answers so far are kept.
    """
    if out.suffix not in (".parquet", ".jsonl"):
        raise InputError(
            f"{out}: hard negatives are written as Parquet or JSON Lines; name a file .parquet or "
            f".jsonl"
        )
    _check_out(out, source, config)
    if batch and config.negatives.generator != "llm":
        raise InputError(
            f"--batch asks a language model; negatives.generator is {config.negatives.generator}, "
            f"so leave it out or set negatives.generator=llm"
        )
    with _tagged(config, source, num_workers, on_progress) as captions:
        known = captions.known(batch=batch)
        metadata = {
            "generator": config.negatives.generator,
            "ratios": config.negatives.ratios,
            "parts": config.negatives.parts,
            "seed": config.negatives.seed,
            "tagger": captions.tagger,
            "source_sha256": sha256(source),
            "vocabulary_sha256": captions.vocabulary.checksum,
        }
        summary = _Summary(config.negatives.num_levels)
        records = summary.counting(
            captions.records(known), lambda done: on_progress(done, len(captions), "proposing")
        )
        captions.vocabulary.save(out.with_suffix(".vocabulary.json"))
        if out.suffix == ".jsonl":
            write_field_jsonl(out, records, source)
        else:
            write_negatives(out, records, metadata)
    return {**summary.counts(), **metadata}


def _check_out(out: Path, source: Path, config: Config) -> None:
    """`out` can be written, and is none of the files that are read."""
    file = config.negatives.file
    for read in (source, *([] if file is None else [config.path(file)])):
        if out.resolve() == read.resolve():
            raise InputError(
                f"{out} is read to make negatives and would be overwritten by them; name another "
                f"file as data.negatives"
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write negatives {out}: {error.strerror}") from None


def estimate(
    config: Config,
    *,
    source: Path,
    num_workers: int | None = None,
    on_progress: Progress = lambda done, total, stage: None,
) -> dict[str, Any]:
    """What asking a language model for the negatives of `source` will take; nothing is asked.

    Args:
        config: `negatives.generator` must be llm.
        source: an annotation file.
        num_workers: processes at a time; None: as many as the cluster has CPUs.
        on_progress: told (done, in all, what).

    Returns:
        `rows`, `requests` (still to be asked; refused answers are asked once more), `answered`,
        `prompt_tokens` and `completion_tokens` (about), `dollars` (about; None without prices),
        `dollars_spent`, and `minutes` that the limits leave at least (None without limits).

    Raises:
        InputError: as `generate`.
    """
    llm = config.negatives.llm
    if config.negatives.generator != "llm":
        raise InputError(
            f"negatives.generator is {config.negatives.generator}, which costs nothing; set "
            f"negatives.generator=llm to estimate"
        )
    with _tagged(config, source, num_workers, on_progress) as captions:
        import ray

        answers = AnswerStore(captions.store_url).load()
        needed = captions.needed(ray.put((answers.table, None)))
        lengths = answers.table["completion_tokens"].to_numpy()
        num_requests, prompt = needed.num_requests, needed.prompt_tokens
        mean = lengths.mean() if len(lengths) else _GUESSED_COMPLETION
        completion = round(num_requests * mean)
        dollars = (
            None
            if llm.prompt_price is None or llm.completion_price is None
            else (prompt * llm.prompt_price + completion * llm.completion_price) / 1e6
        )
        rates = [
            amount / rate
            for amount, rate in (
                (num_requests, llm.requests_per_minute),
                (prompt + completion, llm.tokens_per_minute),
            )
            if rate is not None
        ]
        return {
            "rows": len(captions),
            "requests": num_requests,
            "answered": needed.num_answered,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "dollars": dollars,
            "dollars_spent": needed.dollars,
            "minutes": max(rates, default=None),
        }


@dataclass(frozen=True, slots=True)
class _Needed:
    """What a language model has to be asked for a file, and what it was."""

    tables: References  # of `REQUESTS`, no key twice
    num_requests: int
    prompt_tokens: int  # of all of them, about
    num_answered: int  # requests that have an answer
    dollars: float  # that those have cost


@contextmanager
def _tagged(
    config: Config, source: Path, num_workers: int | None, on_progress: Progress
) -> Iterator["_Captions"]:
    """The tagged queries of `source` on a connected cluster."""
    from shine.language.tagging import load_tagger

    index = VideoIndex(source)
    tagger = load_tagger(config.negatives.tagger)
    # What is missing is told before a cluster starts.
    load_meanings(config.negatives.wordnet)
    if config.negatives.generator == "llm":
        load_prompt(config.negatives.llm.prompt)
    with connect():
        yield _Captions(config, index, f"{tagger.name} {tagger.version}", num_workers, on_progress)


class _Captions:
    """Tagged queries in Ray's object store, and what is made of them.

    Args:
        config: its section `negatives` tells how.
        index: of the annotation file.
        tagger: name and version.
        num_workers: processes at a time; None: as many as the cluster has CPUs.
        on_progress: told (done, in all, what).
    """

    def __init__(
        self,
        config: Config,
        index: VideoIndex,
        tagger: str,
        num_workers: int | None,
        on_progress: Progress,
    ):
        import ray

        self._config = config
        self._index = index
        self._num_workers = num_workers
        self._on_progress = on_progress
        self.tagger = tagger
        self._tagged: References = []
        words: WordCounts = Counter()
        contexts: ContextCounts = Counter()
        done = 0
        tables = [ray.put(table) for table in video_tables(index)]
        for table in self._stage(tables, TagVideos, (config.negatives.tagger,)):
            for counter, rows in zip(
                (words, contexts), json.loads(table["counts"][0].as_py()), strict=True
            ):
                for *key, count in rows:
                    counter[*key] += count
            self._tagged.append(ray.put(table.drop_columns(["counts"])))
            done += sum(map(len, table["rows"].to_pylist()))
            on_progress(done, len(index), "tagging")
        self.vocabulary = Vocabulary.from_counts(words)
        self._counted = ray.put((self.vocabulary, Neighbours(contexts)))

    def __len__(self) -> int:
        """How many queries there are."""
        return len(self._index)

    @property
    def store_url(self) -> str:
        """Where answers of the language model are kept."""
        name = self._config.negatives.llm.store
        return name if "://" in name else str(self._config.path(name))

    def known(self, *, batch: bool) -> Any:
        """Ray's reference to what the generator was told, after asking what it needs."""
        import ray

        settings = self._config.negatives
        if settings.generator == "file":
            assert settings.file is not None
            return ray.put((None, read_negatives(self._config.path(settings.file))))
        if settings.generator != "llm":
            return ray.put((None, None))
        from pipelines.asking import ask_requests  # loads openai

        store = AnswerStore(self.store_url)
        for _ in range(_ROUNDS):
            known = ray.put((store.load().table, None))
            needed = self.needed(known)
            if not needed.tables:
                return known
            try:
                stop = ask_requests(
                    needed.tables,
                    settings.llm,
                    self.store_url,
                    num_requests=needed.num_requests,
                    prompt_tokens=needed.prompt_tokens,
                    spent=needed.dollars,
                    batch=batch,
                    on_progress=lambda done, total: self._on_progress(done, total, "asking"),
                )
            finally:
                store.compact()
            if stop:
                raise Stopped(stop)
        return ray.put((store.load().table, None))

    def needed(self, known: Any) -> _Needed:
        """The requests that lack an answer, each once, and what there is.

        Args:
            known: Ray's reference to (answers, None).
        """
        import ray

        from pipelines.asking import REQUESTS_PER_TABLE  # loads openai

        seen: set[bytes] = set()
        references: References = []
        num_requests, prompt_tokens, num_answered, dollars, done = 0, 0, 0, 0.0, 0

        def fresh() -> Tables:
            nonlocal num_answered, dollars, done
            for table in self._run(FindRequests, known):
                keep = []
                for key, paid in zip(*map(_values, (table["key"], table["dollars"])), strict=True):
                    new = (digest := bytes.fromhex(key)) not in seen
                    seen.add(digest)
                    num_answered += new and paid is not None
                    dollars += paid if new and paid is not None else 0.0
                    keep.append(new and paid is None)
                done += 1
                self._on_progress(done, len(self._tagged), "finding what to ask, in parts")
                yield table.filter(pa.array(keep, pa.bool_())).select(REQUESTS.names)

        for block in _rows_in_blocks(fresh(), REQUESTS_PER_TABLE):
            num_requests += len(block)
            prompt_tokens += int(block["prompt_tokens"].to_numpy().sum())
            references.append(ray.put(block))
        return _Needed(references, num_requests, prompt_tokens, num_answered, dollars)

    def records(self, known: Any) -> Iterator[NegativeRecord]:
        """The negatives of every query, in the order of the annotation file."""
        # Rows of a video come together. Where the file scatters them, Arrow tables wait.
        waiting: dict[int, tuple[pa.Table, int]] = {}
        charged: set[str] = set()
        following = 0
        for table in self._run(ProposeNegatives, known):
            waiting.update((row, (table, place)) for place, row in enumerate(_values(table["row"])))
            while following in waiting:
                found, place = waiting.pop(following)
                (result,) = found.slice(place, 1).drop_columns(["row"]).to_pylist()
                costs = result.pop("costs")
                record = NegativeRecord(**result)
                mine = [c for k, c in zip(record.requests, costs, strict=True) if k not in charged]
                charged.update(record.requests)
                yield replace(
                    record,
                    prompt_tokens=sum(cost["prompt_tokens"] for cost in mine),
                    completion_tokens=sum(cost["completion_tokens"] for cost in mine),
                    dollars=math.fsum(cost["dollars"] for cost in mine),
                )
                following += 1
        assert not waiting, "a query was lost on the way"

    def _run(self, kind: type[ProposeNegatives], known: Any) -> Tables:
        arguments = (
            kind,
            self._counted,
            known,
            self._config.negatives.model_dump(mode="json"),
            self.tagger,
        )
        return self._stage(self._tagged, Stored, arguments)

    def _stage(self, tables: References, worker: type, arguments: tuple[Any, ...]) -> Tables:
        return run_stage(tables, worker, arguments, self._num_workers or data_workers())


def _values(column: pa.ChunkedArray) -> list[Any]:
    return column.to_pylist()


def _rows_in_blocks(tables: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """The rows of tables of `REQUESTS` in tables of `num_rows`, the last one shorter."""
    rest = REQUESTS.empty_table()
    for table in tables:
        rest = pa.concat_tables([rest, table])
        while len(rest) >= num_rows:
            yield rest.slice(0, num_rows).combine_chunks()
            rest = rest.slice(num_rows)
    if len(rest):
        yield rest.combine_chunks()


def video_tables(index: VideoIndex) -> Iterator[pa.Table]:
    """Every video with its queries, in the order of their first queries, some videos a table."""
    for start in range(0, index.num_videos, _VIDEOS_PER_BLOCK):
        rows = [
            {
                "vid": queries[0][1].vid,
                "rows": [row for row, _ in queries],
                "qids": [annotation.qid for _, annotation in queries],
                "queries": [annotation.query for _, annotation in queries],
            }
            for queries in index.videos(start, start + _VIDEOS_PER_BLOCK)
        ]
        yield pa.Table.from_pylist(rows, schema=_VIDEOS)


def _captions(video: dict[str, Any]) -> list[tuple[Word, ...]]:
    return [tuple(Word(**word) for word in caption) for caption in video["words"]]


class _Summary:
    """Counts records while they pass."""

    def __init__(self, num_levels: int):
        self._rows = 0
        self._invalid = [0] * num_levels
        self._reasons: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()
        self._costs: Counter[str] = Counter()

    def counting(
        self, records: Iterable[NegativeRecord], on_progress: Callable[[int], None]
    ) -> Iterator[NegativeRecord]:
        for record in records:
            self._rows += 1
            for level, valid in enumerate(record.valid):
                self._invalid[level] += not valid
            self._reasons.update(reason for reason in record.reasons if reason)
            self._sources.update(record.source)
            self._costs.update({name: getattr(record, name) for name in _COSTS})
            on_progress(self._rows)
            yield record

    def counts(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "levels": len(self._invalid),
            "invalid": self._invalid,
            "reasons": dict(sorted(self._reasons.items())),
            "sources": dict(sorted(self._sources.items())),
            **self._costs,
        }
