"""Ray around a language model: one limiter for the job, workers that ask, answers that last.

A request counts as answered when its answer is in a durable segment of the store. Killed at any
moment, a job can pay again for requests on their way (`in_flight`) and for answers that a worker
has not written down: `segment_answers - 1` of each of the tables it works on at a time.
"""

import asyncio
import hashlib
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa

from shine.config import LlmConfig
from shine.errors import InputError
from shine.llm.answers import AnswerStore
from shine.llm.batches import ask_in_batches
from shine.llm.client import ChatClient, read_key
from shine.llm.filling import SCHEMA
from shine.llm.limiter import Grant, Limiter, Report
from shine.llm.request import Answer, Request

REQUESTS: Final = pa.schema(
    [("key", pa.string()), ("messages", pa.string()), ("prompt_tokens", pa.int64())]
)
_CPUS: Final = 0.1  # of a worker, which mostly waits
_MAX_RESTARTS: Final = 3
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
        self._permits: Any = None

    async def __call__(self, requests: pa.Table) -> pa.Table:
        """One row: how many were answered, and whether the job should go on."""
        try:
            return await self._ask([Request(**row) for row in requests.to_pylist()])
        except InputError as error:
            return _outcome(0, str(error), fatal=True)

    async def _ask(self, requests: Sequence[Request]) -> pa.Table:
        from shine.llm.asking import Permits, ask

        if self._client is None or self._permits is None:
            self._client = ChatClient(self._config, read_key(self._config))
            self._permits = Permits(self._exchange)
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
        )
        return _outcome(result.answered, result.stop or "", fatal=False)

    async def _exchange(self, report: Report, wanted: Sequence[int]) -> Grant:
        """What the limiter grants; one that died comes back with empty buckets."""
        from ray.exceptions import ActorUnavailableError

        while True:
            try:
                return await self._limiter.exchange.remote(self._name, report, wanted)
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
        tables: of `REQUESTS`, without a key twice.
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
    outcomes = (
        _through_batches(tables, settings, url)
        if batch
        else _over_the_cluster(tables, settings, url, limiter, config.workers)
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


def _over_the_cluster(
    tables: Sequence[pa.Table], settings: dict[str, Any], url: str, limiter: Any, num_workers: int
) -> Iterator[pa.Table]:
    """What workers make of the tables, as they are done."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_arrow([*tables])
    dataset.context.enable_progress_bars = False
    asked = dataset.map_batches(
        AskModel,
        fn_constructor_args=(settings, url, limiter),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=_CPUS,
        max_restarts=_MAX_RESTARTS,
        max_task_retries=_MAX_RESTARTS,
    )
    yield from asked.iter_batches(batch_size=None, batch_format="pyarrow")


def _through_batches(
    tables: Sequence[pa.Table], settings: dict[str, Any], url: str
) -> Iterator[pa.Table]:
    """What comes of the provider's batches, in a process of the cluster, where the key is."""
    import ray

    collect: Any = ray.remote(_collect)
    references = [ray.put(table) for table in tables]
    outcomes = collect.options(num_cpus=0, num_returns="streaming")
    for outcome in outcomes.remote(references, settings, url):
        yield ray.get(outcome)


async def _collect(
    references: Sequence[Any], settings: dict[str, Any], url: str
) -> AsyncIterator[pa.Table]:
    """Answers of the provider's batches, stored; how many, now and then."""
    import ray

    config, store = LlmConfig.model_validate(settings), AnswerStore(url)
    tables: Iterator[pa.Table] = (ray.get(reference) for reference in references)
    requests = (Request(**row) for table in tables for row in table.to_pylist())
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


def _batch_name(requests: Sequence[Request]) -> str:
    """The same for the same requests, so that a worker finds what one before it has written."""
    return hashlib.sha256("".join(request.key for request in requests).encode()).hexdigest()[:16]


def _outcome(answered: int, stop: str, *, fatal: bool) -> pa.Table:
    return pa.Table.from_pylist(
        [{"answered": answered, "stop": stop, "fatal": fatal}], schema=_OUTCOME
    )
