"""Ray around a language model: one limiter for the job, workers that ask, answers that last.

A request counts as answered when its answer is in a durable segment of the store. Killed at any
moment, a job can pay again for requests on their way (`in_flight`) and for answers that a worker
has not written down: `segment_answers - 1` of each of the tables it works on at a time.
"""

import asyncio
import hashlib
import logging
import math
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

logger = logging.getLogger(__name__)

REQUESTS_PER_TABLE: Final = 64
_TABLES: Final = 4  # that a worker works on at a time
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
        self._free = asyncio.Semaphore(_TABLES)

    async def __call__(self, requests: pa.Table) -> pa.Table:
        """One row: how many were answered, and whether the job should go on."""
        async with self._free:
            return await self._ask([Request(**row) for row in requests.to_pylist()])

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
            # It lists the store, while other tables go on.
            finished=await asyncio.to_thread(self._store.finished, batch),
            attempts=self._config.attempts,
            random=random.random,
        )
        answered = sum(answer is not None for answer in result.answers)
        return _outcome(answered, result.stop or "", fatal=False)

    async def _exchange(self, worker: str, report: Report, wanted: Sequence[int]) -> Grant:
        """What the limiter grants; Ray asks again where it has to be started anew."""
        return await self._limiter.exchange.remote(worker, report, wanted)


def ask_requests(
    tables: Sequence[Any],
    config: LlmConfig,
    url: str,
    *,
    num_requests: int,
    prompt_tokens: int,
    spent: float,
    batch: bool,
    on_progress: Callable[[int, int], None],
) -> str | None:
    """Answers to the requests are in the store, as far as they came.

    Args:
        tables: Ray's references to tables of the columns of `Request`, without a key twice.
        config: of the endpoint.
        url: of the store, which has no answer to any of them.
        num_requests: of all tables.
        prompt_tokens: of all requests, about.
        spent: dollars that earlier requests of the same job cost.
        batch: whether they go through the provider's Batch API.
        on_progress: told (answered, in all).

    Returns:
        Why the rest was not asked, in a sentence; None where all of them were.

    Raises:
        InputError: the endpoint refuses the key or the model, the store cannot be written, or the
            workers are too few for `in_flight`.
    """
    most = config.workers * _TABLES * REQUESTS_PER_TABLE
    if not batch and config.in_flight > most:
        raise InputError(
            f"negatives.llm.in_flight is {config.in_flight}, but the workers can have {most} "
            f"requests on their way; set negatives.llm.workers="
            f"{math.ceil(config.in_flight * config.workers / most)} or a lower in_flight"
        )
    if batch and (stop := _beyond_budget(num_requests, prompt_tokens, config, spent)):
        return stop
    settings = config.model_dump(mode="json")
    outcomes = (
        _through_batches(tables, settings, url)
        if batch
        else _over_the_cluster(tables, config, settings, url, spent)
    )
    answered, stop = 0, None
    for outcome in outcomes:
        for row in outcome.to_pylist():
            if row["fatal"]:
                raise InputError(row["stop"])
            answered += row["answered"]
            stop = row["stop"] or stop
        on_progress(answered, num_requests)
    if stop is None and answered < num_requests:
        logger.warning(
            "%d of %d requests have no answer yet; they are asked again",
            num_requests - answered,
            num_requests,
        )
    return stop


def _over_the_cluster(
    references: Sequence[Any], config: LlmConfig, settings: dict[str, Any], url: str, spent: float
) -> Iterator[pa.Table]:
    """What comes of workers that ask at once, under one limiter."""
    import ray

    limiter = (
        ray.remote(Limiter)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        .remote(config, clock=time.monotonic, random=random.random, spent=spent)
    )
    arguments = (settings, url, limiter)
    yield from run_stage(
        references, AskModel, arguments, config.workers, num_cpus=_CPUS, at_a_time=_TABLES
    )


def _through_batches(
    references: Sequence[Any], settings: dict[str, Any], url: str
) -> Iterator[pa.Table]:
    """What comes of the provider's batches, in a process of the cluster, where the key is."""
    import ray

    collect: Any = ray.remote(_collect)
    outcomes = collect.options(num_cpus=0, num_returns="streaming")
    for outcome in outcomes.remote(references, settings, url):
        yield ray.get(outcome)


def _collect(references: Sequence[Any], settings: dict[str, Any], url: str) -> Iterator[pa.Table]:
    """Stores the answers of the provider's batches; how many, now and then."""
    config = LlmConfig.model_validate(settings)
    store = AnswerStore(url)
    requests = (Request(**row) for reference in references for row in _rows(reference))

    async def answers(client: ChatClient) -> AsyncIterator[list[Answer]]:
        found: list[Answer] = []
        folder = f"{url.rstrip('/')}/batches"
        failure: Exception | None = None
        try:
            async for result in ask_in_batches(requests, client, folder, schema=SCHEMA):
                if isinstance(result, Answer):
                    found.append(result)
                if len(found) == _COLLECTED:
                    yield found
                    found = []
        except Exception as error:  # told after what was paid for is stored
            failure = error
        yield found
        if failure is not None:
            raise failure

    async def following(source: AsyncIterator[list[Answer]]) -> list[Answer] | None:
        return await anext(source, None)

    with asyncio.Runner() as runner:  # a task of Ray cannot be an asynchronous generator
        try:
            client = ChatClient(config, read_key(config))
            source = answers(client)
            while (found := runner.run(following(source))) is not None:
                if found:
                    store.write_segment("provider", found)
                yield _outcome(len(found), "", fatal=False)
            runner.run(client.close())
        except InputError as error:
            yield _outcome(0, str(error), fatal=True)
        except Exception as error:  # of a storage's own library, whose words may hold a secret
            says = (
                f"the provider's batches could not be collected ({type(error).__name__}); try again"
            )
            yield _outcome(0, says, fatal=True)


def _beyond_budget(
    num_requests: int, prompt_tokens: int, config: LlmConfig, spent: float
) -> str | None:
    """Why these requests are not sent together, in a sentence, if they can cost too much."""
    if config.budget is None or config.prompt_price is None or config.completion_price is None:
        return None
    completion = num_requests * config.max_tokens
    most = (prompt_tokens * config.prompt_price + completion * config.completion_price) / 1e6
    if spent + most <= config.budget:
        return None
    return (
        f"{num_requests} requests can cost ${most:.2f}, which with the ${spent:.2f} spent is more "
        f"than the budget of ${config.budget:.2f}; raise negatives.llm.budget, or ask without "
        f"--batch, which stops where the money does"
    )


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
