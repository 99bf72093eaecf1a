"""Asking for a batch: permits first, answers durable before they count.

Killed at any moment, a job has paid for at most so many requests that it will ask again: those in
flight (`LlmConfig.in_flight` over all workers), and of each batch that was at work
`segment_answers - 1` answers. A request keeps its permit until its answer is durable, unless it
is one of these.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, runtime_checkable

from shine.errors import Stopped
from shine.llm.answers import SegmentWriter
from shine.llm.client import Completion, RequestFailed
from shine.llm.limiter import Grant, Permit, Report
from shine.llm.request import Answer, Request

Exchange = Callable[[str, Report, tuple[int, ...]], Awaitable[Grant]]

_FIRST_BACKOFF_SECONDS: Final = 0.5  # doubled with each attempt
_LAST_BACKOFF_SECONDS: Final = 30.0
_MAX_WANTED: Final = 1000  # told to the limiter at once


@runtime_checkable
class Client(Protocol):
    """Asks an endpoint once; `shine.llm.client.ChatClient` is one."""

    async def complete(self, request: Request, schema: Mapping[str, Any] | None) -> Completion:
        """The answer; raises `RequestFailed` or, for all requests of the job, `EndpointError`."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of the requests of a batch."""

    answers: tuple[Answer | None, ...]  # durable, in the order of the requests; None: unanswered
    attempts: int
    failures: Mapping[str, int]  # attempts without an answer, by `RequestFailed.kind`
    stop: str | None  # why the limiter grants no more, in a sentence


class Permits:
    """The permits of one worker process, shared by all that it asks at a time.

    One exchange with the limiter is under way at most. What happens meanwhile goes with the next,
    which follows at once; where nothing happens, the limiter says when to ask again.

    Args:
        worker: a name that no other process of the job has had.
        exchange: `Limiter.exchange`, wherever the limiter is.
    """

    def __init__(self, worker: str, exchange: Exchange):
        self._worker = worker
        self._exchange = exchange
        self._report = Report()
        self._held: list[Permit] = []
        self._waiting: deque[tuple[int, asyncio.Future[Permit]]] = deque()
        self._news = asyncio.Event()
        self._talk: asyncio.Task[None] | None = None
        self._stop: str | None = None

    async def acquire(self, prompt_tokens: int) -> Permit:
        """Leave for one attempt at a request, granted in the order of asking.

        Raises:
            Stopped: none is granted any more.
        """
        if self._stop is not None:
            raise Stopped(self._stop)
        granted: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt_tokens, granted))
        self._tell()
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._give_back(granted.result())
            raise

    def answered(self, permit: Permit, prompt_tokens: int, completion: Completion) -> None:
        """The request was answered; `prompt_tokens` were expected of its prompt."""
        answer, report = completion.answer, self._report
        used = float(answer.prompt_tokens + answer.completion_tokens) or permit.tokens
        self._report = replace(
            report,
            answered=report.answered + 1,
            prompt_tokens=report.prompt_tokens + prompt_tokens,
            answered_tokens=report.answered_tokens + round(used),
            tokens=report.tokens + used,
            dollars=report.dollars + answer.dollars,
            limits=completion.limits or report.limits,
        )
        self._give_back(permit)

    def failed(self, permit: Permit, failure: RequestFailed | None) -> None:
        """The attempt brought no answer; None: it was given up, and may have been billed."""
        report = self._report
        billed = failure is None or failure.billed
        report = replace(
            report,
            tokens=report.tokens + (permit.tokens if billed else 0.0),
            dollars=report.dollars + (permit.dollars if billed else 0.0),
        )
        if failure is not None:
            limited = failure.kind == "limited"
            longest = max(failure.retry_after or 0.0, report.retry_after_seconds or 0.0)
            report = replace(
                report,
                limited=report.limited + limited,
                failed=report.failed + (not limited),
                retry_after_seconds=longest or None,
                limits=failure.limits or report.limits,
                failure=failure.kind if failure.status is None else f"status {failure.status}",
            )
        self._report = report
        self._give_back(permit)

    def _give_back(self, permit: Permit) -> None:
        self._held.remove(permit)
        self._report = replace(self._report, set_aside=self._report.set_aside + permit.tokens)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        if self._talk is None:
            self._talk = asyncio.get_running_loop().create_task(self._talking())

    async def _talking(self) -> None:
        """Talks to the limiter until nothing is held, wanted or untold."""
        try:
            while self._held or self._waiting or self._news.is_set():
                await asyncio.sleep(0)  # what else happens at this moment goes with it
                grant = await self._tell_and_ask()
                if self._held or self._waiting:
                    try:
                        async with asyncio.timeout(grant.wait_seconds):
                            await self._news.wait()
                    except TimeoutError:
                        pass
        except Exception as error:
            self._refuse(error)
        finally:
            self._talk = None

    async def _tell_and_ask(self) -> Grant:
        self._news.clear()
        while self._waiting and self._waiting[0][1].done():  # cancelled
            self._waiting.popleft()
        report = replace(self._report, held=tuple(self._held))
        # Said once; what comes in meanwhile is kept.
        self._report = replace(self._report, retry_after_seconds=None, limits=None)
        wanted = tuple(tokens for tokens, _ in list(self._waiting)[:_MAX_WANTED])
        grant = await self._exchange(self._worker, report, wanted)
        if grant.stop is not None:
            self._stop = grant.stop
            self._refuse(Stopped(grant.stop))
        for permit in grant.permits:
            self._held.append(permit)
            while self._waiting and self._waiting[0][1].done():
                self._waiting.popleft()
            if self._waiting:
                self._waiting.popleft()[1].set_result(permit)
            else:
                self._give_back(permit)
        return grant

    def _refuse(self, error: Exception) -> None:
        for _, granted in self._waiting:
            if not granted.done():
                granted.set_exception(error)
        self._waiting.clear()


async def ask(
    requests: Sequence[Request],
    client: Client,
    permits: Permits,
    writer: SegmentWriter,
    *,
    schema: Mapping[str, Any] | None,
    attempts: int,
    random: Callable[[], float],
    finished: Mapping[str, Answer],
) -> Asked:
    """Asks for a batch, all at once as far as there are permits; equal keys are asked once.

    A failed attempt is repeated after a pause of random length up to 0.5 s, doubled each time up
    to 30 s, and, by the limiter, not before the endpoint said. A request that failed `attempts`
    times, or that the limiter stops, is left unanswered.

    Args:
        requests: the batch.
        client: asks once.
        permits: of this process.
        writer: of this batch.
        schema: of the answers, in JSON schema.
        attempts: at one request.
        random: a number in [0, 1).
        finished: answers that an earlier attempt at the batch has made durable (`AnswerStore`).

    Raises:
        EndpointError: the endpoint will answer nothing.
        InputError: the answers cannot be stored.
    """
    batch = _Batch(client, permits, writer, schema, attempts, random)
    unasked = {r.key: r for r in requests if r.key not in finished}
    batch.unanswered = len(unasked)
    tasks = [asyncio.ensure_future(batch.ask(request)) for request in unasked.values()]
    try:
        answers = dict(zip(unasked, await asyncio.gather(*tasks), strict=True))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await writer.flush()
    return Asked(
        tuple(finished.get(r.key) or answers.get(r.key) for r in requests),
        batch.attempted,
        dict(batch.failures),
        batch.stop,
    )


class _Batch:
    """The requests of one batch on their way."""

    def __init__(
        self,
        client: Client,
        permits: Permits,
        writer: SegmentWriter,
        schema: Mapping[str, Any] | None,
        attempts: int,
        random: Callable[[], float],
    ):
        self._client = client
        self._permits = permits
        self._writer = writer
        self._schema = schema
        self._attempts = attempts
        self._random = random
        self.unanswered = 0
        self.attempted = 0
        self.failures: Counter[str] = Counter()
        self.stop: str | None = None

    async def ask(self, request: Request) -> Answer | None:
        """The answer, durable; None where there is none."""
        for attempt in range(self._attempts):
            try:
                permit = await self._permits.acquire(request.prompt_tokens)
            except Stopped as error:
                self.stop = str(error)
                break
            self.attempted += 1
            try:
                completion = await self._client.complete(request, self._schema)
            except RequestFailed as failure:
                self._permits.failed(permit, failure)
                self.failures[failure.kind] += 1
                if attempt + 1 < self._attempts:
                    await asyncio.sleep(self._pause(attempt))
                continue
            except BaseException:
                self._permits.failed(permit, None)
                raise
            await self._keep(request, permit, completion)
            return completion.answer
        self._one_less()
        return None

    async def _keep(self, request: Request, permit: Permit, completion: Completion) -> None:
        """The answer is durable, and the permit returned as soon as the bound allows it."""
        at_once = self._writer.has_room
        if at_once:
            self._permits.answered(permit, request.prompt_tokens, completion)
        try:
            durable = self._writer.add(completion.answer)
            self._one_less()
            await durable
        finally:
            if not at_once:
                self._permits.answered(permit, request.prompt_tokens, completion)

    def _one_less(self) -> None:
        """The last answer of a batch does not wait for others."""
        self.unanswered -= 1
        if not self.unanswered:
            self._writer.seal()

    def _pause(self, attempt: int) -> float:
        most = min(_LAST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2**attempt)
        return self._random() * most
