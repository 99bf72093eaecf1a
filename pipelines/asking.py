"""Ray around a language model: one limiter for the job, workers that ask, answers that last.

A request counts as answered when its answer is in a durable segment of the store. Killed at any
moment, a job can pay again for requests on their way (`in_flight`) and for answers that a worker
has not written down: `segment_answers - 1` of each of the tables it works on at a time.
"""

import asyncio
import hashlib
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa

from pipelines.stage import run_stage
from shine.config import LlmConfig
from shine.errors import InputError
from shine.llm.answers import AnswerStore
from shine.llm.asking import Permits, ask
from shine.llm.batches import ask_in_batches
from shine.llm.client import ChatClient, read_key
from shine.llm.filling import SCHEMA
from shine.llm.limiter import Grant, Limiter, Report
from shine.llm.request import Answer, Request

_CPUS: Final = 0.1  # of a worker, which mostly waits
_COLLECTED: Final = 500  # answers of a provider's batch between two reports
_OUTCOME: Final = pa.schema(
    [
        ("answered", pa.int64()),
        ("stop", pa.string()),  # why the rest of the job is not asked, "" where it is
        ("fatal", pa.bool_()),  # whether that is for the user to put right
    ]
)


class AskModel:
    """Asks the requests of a table, many at once; a worker of Ray Data, on its event loop.

    Args:
        settings: the values of an `LlmConfig`.
        url: of the store of answers.
        limiter: Ray's handle of the job's limiter.
    """

    def __init__(self, settings: dict[str, Any], url: str, limiter: Any):
        self._config = LlmConfig.model_validate(settings)
        self._store = AnswerStore(url)
        self._limiter = limiter
        self._name = uuid.uuid4().hex
        self._client: ChatClient | None = None
        self._permits: Permits | None = None

    async def __call__(self, requests: pa.Table) -> pa.Table:
        """One row: how many were answered, and whether the job should go on."""
        try:
            return await self._ask([Request(**row) for row in requests.to_pylist()])
        except InputError as error:
            return _outcome(0, str(error), fatal=True)

    async def _ask(self, requests: Sequence[Request]) -> pa.Table:
        if self._client is None or self._permits is None:
            self._client = ChatClient(self._config, read_key(self._config))
            self._permits = Permits(self._name, self._exchange)
        batch = _batch_name(requests)
        writer = self._store.writer(
            batch,
            segment_answers=self._config.segment_answers,
            segment_seconds=self._config.segment_seconds,
        )
        result = await ask(
            requests,
            self._client,
            self._permits,
            writer,
            schema=SCHEMA,
            finished=self._store.finished(batch),
            attempts=self._config.attempts,
            random=random.random,
        )
        answered = sum(answer is not None for answer in result.answers)
        return _outcome(answered, result.stop or "", fatal=False)

    async def _exchange(self, worker: str, report: Report, wanted: Sequence[int]) -> Grant:
        """What the limiter grants; one that died comes back with empty buckets."""
        from ray.exceptions import ActorUnavailableError

        while True:
            try:
                return await self._limiter.exchange.remote(worker, report, wanted)
            except ActorUnavailableError:
                await asyncio.sleep(0.5)


def ask_requests(
    tables: Sequence[pa.Table],
    config: LlmConfig,
    url: str,
    *,
    spent: float,
    batch: bool,
    on_progress: Callable[[int, int], None],
) -> str | None:
    """Answers to the requests are in the store, as far as they came.

    Args:
        tables: of the columns of `Request`, without a key twice.
        config: of the endpoint.
        url: of the store, which has no answer to any of them.
        spent: dollars that earlier requests of the same job cost.
        batch: whether they go through the provider's Batch API.
        on_progress: told (answered, in all).

    Returns:
        Why the rest was not asked, in a sentence; None where all of them were.

    Raises:
        InputError: the endpoint refuses the key or the model, or the store cannot be written.
    """
    import ray

    total = sum(map(len, tables))
    limiter = (
        ray.remote(Limiter)
        .options(num_cpus=0, max_restarts=-1)
        .remote(config, clock=time.monotonic, random=random.random, spent=spent)
    )
    settings = config.model_dump(mode="json")
    references = [ray.put(table) for table in tables]
    outcomes = (
        _through_batches(references, settings, url)
        if batch
        else run_stage(
            references, AskModel, (settings, url, limiter), config.workers, num_cpus=_CPUS
        )
    )
    answered, stop = 0, None
    for outcome in outcomes:
        for row in outcome.to_pylist():
            if row["fatal"]:
                raise InputError(row["stop"])
            answered += row["answered"]
            stop = row["stop"] or stop
        on_progress(answered, total)
    return stop


def _through_batches(
    references: Sequence[Any], settings: dict[str, Any], url: str
) -> Iterator[pa.Table]:
    """What comes of the provider's batches, in a process of the cluster, where the key is."""
    import ray

    collect: Any = ray.remote(_collect)
    outcomes = collect.options(num_cpus=0, num_returns="streaming")
    for outcome in outcomes.remote(references, settings, url):
        yield ray.get(outcome)


async def _collect(
    references: Sequence[Any], settings: dict[str, Any], url: str
) -> AsyncIterator[pa.Table]:
    """Answers of the provider's batches, stored; how many, now and then."""
    config, store = LlmConfig.model_validate(settings), AnswerStore(url)
    requests = (Request(**row) for reference in references for row in _rows(reference))
    answers: list[Answer] = []
    unanswered = 0
    try:
        client = ChatClient(config, read_key(config))
        async for result in ask_in_batches(
            requests, client, f"{url.rstrip('/')}/batches", schema=SCHEMA
        ):
            if isinstance(result, Answer):
                answers.append(result)
            else:
                unanswered += 1
            if len(answers) == _COLLECTED:
                store.write_segment("provider", answers)
                yield _outcome(len(answers), "", fatal=False)
                answers = []
        if answers:
            store.write_segment("provider", answers)
        yield _outcome(len(answers), "", fatal=False)
    except InputError as error:
        if answers:
            store.write_segment("provider", answers)
        yield _outcome(len(answers), str(error), fatal=True)


def _rows(reference: Any) -> list[dict[str, Any]]:
    import ray

    table: Any = ray.get(reference)
    return table.to_pylist()


def _batch_name(requests: Sequence[Request]) -> str:
    """The same for the same requests, so that a worker finds what one before it has written."""
    return hashlib.sha256("".join(request.key for request in requests).encode()).hexdigest()[:16]


def _outcome(answered: int, stop: str, *, fatal: bool) -> pa.Table:
    return pa.Table.from_pylist(
        [{"answered": answered, "stop": stop, "fatal": fatal}], schema=_OUTCOME
    )
