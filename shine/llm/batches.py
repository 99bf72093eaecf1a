"""Asking through the provider's Batch API: cheaper, within a day, and safe to stop at any moment.

A batch is planned in a file of the folder before it is bought, under an id that the provider stores
with it (metadata). A job that starts again finds it there, or in the provider's list, and collects
it; so requests are bought twice only if the provider does not list a batch that it accepted, up to
`max_requests` for each kill or lost response. The first new request of each start is asked
directly, so that a wrong key, model or schema shows before a batch is bought; a kill can make this
one request paid twice.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import openai
from openai.types import Batch

from shine.errors import InputError
from shine.llm.answers import ADVICE
from shine.llm.client import (
    MALFORMED,
    ChatClient,
    EndpointError,
    Rejected,
    RequestFailed,
    error_of,
    is_about_content,
    rejected,
    request_body,
    speaks_of_dialect,
)
from shine.llm.request import Answer, Request
from shine.storage import Storage

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_ENDPOINT = "/v1/chat/completions"
_LABEL = "shine_batch"  # the metadata that a batch is found by
_ENDED = ("completed", "failed", "expired", "cancelled")
_END_SECONDS = 48 * 3600.0  # of waiting in one call; the provider promises half of it
_POLL_SECONDS = (5.0, 120.0)  # shortest and longest
_BACKOFF_SECONDS = (1.0, 60.0)
_UPLOAD_RATE = 100_000  # bytes per second that an upload is given time for
_DOWNLOAD_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A request that its batch left without answer; it can be asked again."""

    key: str  # of the request
    reason: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """A batch as the folder knows it."""

    id: str  # also in the metadata of the batch
    number: int  # in order of planning
    keys: list[str]
    prompt_tokens: list[int]  # of each request, about
    batch: str | None = None  # as the provider names it; None: planned
    ended: bool = False


async def ask_in_batches(
    requests: Iterable[Request],
    client: ChatClient,
    folder: str,
    *,
    schema: Mapping[str, Any] | None,
    max_requests: int = 50_000,
    max_bytes: int = 200_000_000,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    draw: Callable[[], float] = random.random,
) -> AsyncIterator[Answer | Unanswered]:
    """For each of the distinct `requests` an answer or why there is none, as batches end.

    `folder`, a path or any fsspec URL, remembers what was bought. Called with it again, for
    requests whose answers were not stored before a kill or that were left unanswered, this collects
    what the provider has and buys the rest. It may be deleted once all answers are stored.
    A file that is uploaded has up to `max_requests` requests and `max_bytes` bytes. `draw` gives
    uniform numbers from 0 to 1.

    Raises:
        EndpointError: the endpoint takes no batches, or cannot be reached for long; called again,
            this goes on where it stopped.
        InputError: the folder holds a file that is none of ours.
    """
    job = _Job(client, _Ledger(folder), schema, max_requests, max_bytes, sleep, draw)
    seen: set[str] = set()
    wanted: dict[str, dict[str, Request]] = {}  # by entry; its requests if it has ended
    with job:
        entries = {entry.id: entry for entry in await job.resumed()}
        # The latest entry that has a request answers for it.
        owner = {key: entry.id for entry in entries.values() for key in entry.keys}
        for request in requests:
            if request.key in seen:
                continue
            seen.add(request.key)
            bought = owner.get(request.key)
            if bought is not None:
                of_entry = wanted.setdefault(bought, {})
                if entries[bought].ended:
                    of_entry[request.key] = request
            elif answer := await job.add(request):
                yield answer
        del owner
        for entry in [entries[id_] for id_ in wanted if entries[id_].ended]:
            again = wanted.pop(entry.id)
            async for result in job.results(entry):
                request = again.get(result.key)
                if request is not None and isinstance(result, Answer):
                    yield result
                elif request is not None and (answer := await job.add(request)):
                    yield answer
        await job.submit()
        running = [entries[id_] for id_ in wanted] + job.submitted
        async for entry in job.ends(running):
            async for result in job.results(entry):
                if result.key in seen:
                    yield result


class _Ledger:
    """One JSON file per batch, whole or absent."""

    def __init__(self, folder: str) -> None:
        self._storage = Storage(folder, ADVICE)

    def entries(self) -> list[_Entry]:
        """In order of planning."""
        names = filter(_is_entry, self._storage.names())
        return sorted((self._read(name) for name in names), key=lambda entry: entry.number)

    def _read(self, name: str) -> _Entry:
        try:
            return _Entry(**json.loads(self._storage.read(name)))
        except (ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{name}: expected a file that records a batch, as this command writes them; "
                f"move it elsewhere"
            ) from None

    def write(self, entry: _Entry) -> None:
        content = json.dumps(dataclasses.asdict(entry)).encode()
        self._storage.write(f"batch-{entry.id}.json", content)


def _is_entry(name: str) -> bool:
    return name.startswith("batch-") and name.endswith(".json")


class _Job:
    """The steps of a call; the requests of the next batch wait in a temporary file."""

    def __init__(
        self,
        client: ChatClient,
        ledger: _Ledger,
        schema: Mapping[str, Any] | None,
        max_requests: int,
        max_bytes: int,
        sleep: Callable[[float], Awaitable[None]],
        draw: Callable[[], float],
    ) -> None:
        self.submitted: list[_Entry] = []
        self._client = client
        self._ledger = ledger
        self._schema = schema
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._sleep = sleep
        self._draw = draw
        self._number = 0  # of the next entry
        self._tried = False  # whether a request has been answered directly
        self._keys: list[str] = []
        self._prompt_tokens: list[int] = []
        self._lines = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> "_Job":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    async def resumed(self) -> list[_Entry]:
        """What earlier calls bought. A plan that the provider does not know was not carried out.

        It stays: another job may be carrying it out at this moment.
        """
        bought = []
        for entry in self._ledger.entries():
            self._number = entry.number + 1
            if entry.batch is None:
                name = await self._find(entry.id)
                if name is None:
                    continue
                entry = dataclasses.replace(entry, batch=name)
                self._ledger.write(entry)
            bought.append(entry)
        return bought

    async def add(self, request: Request) -> Answer | None:
        """`request` is in the next batch, submitted when full; asked directly until one works."""
        if not self._tried:
            completion = await self._retry(lambda: self._client.complete(request, self._schema))
            self._tried = self._client.has_answered
            return completion.answer
        body = request_body(self._client.config, request, self._schema, self._client.dialect)
        task = {"custom_id": request.key, "method": "POST", "url": _ENDPOINT, "body": body}
        line = json.dumps(task, separators=(",", ":")).encode() + b"\n"
        full = len(self._keys) == self._max_requests
        if full or self._lines.tell() + len(line) > self._max_bytes:
            await self.submit()
        self._lines.write(line)
        self._keys.append(request.key)
        self._prompt_tokens.append(request.prompt_tokens)
        return None

    async def submit(self) -> None:
        """The requests that wait are a batch of the provider's."""
        if not self._keys:
            return
        digest = hashlib.sha256("\n".join([str(self._number), *self._keys]).encode()).hexdigest()
        entry = _Entry(digest, self._number, self._keys, self._prompt_tokens)
        self._ledger.write(entry)
        file = await self._upload(entry)
        entry = dataclasses.replace(entry, batch=await self._create(entry, file))
        self._ledger.write(entry)
        self.submitted.append(entry)
        self._number += 1
        self._keys, self._prompt_tokens = [], []
        self._lines.seek(0)
        self._lines.truncate()

    async def _upload(self, entry: _Entry) -> str:
        seconds = self._client.config.timeout_seconds + self._lines.tell() / _UPLOAD_RATE

        async def send(api: openai.AsyncOpenAI) -> str:
            self._lines.seek(0)
            name = f"shine-{entry.number:06d}.jsonl"
            content = (name, self._lines, "application/jsonl")
            uploaded = await api.files.create(file=content, purpose="batch", timeout=seconds)
            return uploaded.id

        return await self._retry(lambda: self._client.exchange(send, seconds))

    async def _create(self, entry: _Entry, file: str) -> str:
        """The provider's name of the batch; after a failure it may exist, so it is looked for."""

        async def send(api: openai.AsyncOpenAI) -> str:
            batch = await api.batches.create(
                input_file_id=file,
                endpoint=_ENDPOINT,
                completion_window="24h",
                metadata={_LABEL: entry.id},
            )
            return batch.id

        attempted = False

        async def attempt() -> str:
            nonlocal attempted
            name = await self._client.exchange(self._finding(entry.id)) if attempted else None
            attempted = True
            return name or await self._client.exchange(send)

        return await self._retry(attempt)

    async def _find(self, id_: str) -> str | None:
        return await self._retry(lambda: self._client.exchange(self._finding(id_)))

    def _finding(self, id_: str) -> Callable[[openai.AsyncOpenAI], Awaitable[str | None]]:
        async def send(api: openai.AsyncOpenAI) -> str | None:
            async for batch in api.batches.list(limit=100):
                if (batch.metadata or {}).get(_LABEL) == id_:
                    return batch.id
            return None

        return send

    async def ends(self, entries: list[_Entry]) -> AsyncIterator[_Entry]:
        """Each of `entries` as it ends."""
        shortest, longest = _POLL_SECONDS
        seconds = shortest
        slept = 0.0
        while entries:
            for entry in list(entries):
                batch = await self._state(entry)
                if batch is None or batch.status in _ENDED:
                    entries.remove(entry)
                    ended = dataclasses.replace(entry, ended=True)
                    self._ledger.write(ended)
                    seconds = shortest
                    yield ended
            if entries:
                if slept > _END_SECONDS:
                    raise EndpointError(
                        f"{self._client.config.base_url} has not ended {len(entries)} batches, "
                        f"such as {entries[0].batch}, within {_END_SECONDS / 3600:.0f} hours; "
                        f"run the command again to wait on, or cancel them at the provider"
                    )
                logger.info("%d batches are being worked on", len(entries))
                pause = seconds * (0.5 + self._draw())
                await self._sleep(pause)
                slept += pause
                seconds = min(1.5 * seconds, longest)

    async def _state(self, entry: _Entry) -> Batch | None:
        """The batch as it is now; None: the provider has it no more."""
        assert entry.batch is not None
        name = entry.batch
        retrieve = self._client.exchange
        return await self._retry(
            lambda: _unless_gone(retrieve(lambda api: api.batches.retrieve(name)))
        )

    async def results(self, entry: _Entry) -> AsyncIterator[Answer | Unanswered]:
        """One for each request of a batch that has ended."""
        batch, keys = await self._state(entry), set(entry.keys)
        left = dict(zip(entry.keys, entry.prompt_tokens, strict=True))
        reasons: dict[str, str] = {}
        unknown = repeated = 0
        files = (batch.output_file_id, batch.error_file_id) if batch else ()
        for file in files:
            for line in (await self._content(file)).splitlines() if file else ():
                try:
                    told = json.loads(line)
                    key = told["custom_id"]
                except MALFORMED:
                    unknown += 1
                    continue
                if key not in left:
                    repeated += key in keys
                    unknown += key not in keys
                    continue
                result = self._result(Request(key, "", left[key]), told)
                if isinstance(result, Answer):
                    del left[key]
                    yield result
                else:
                    reasons[key] = result.reason
        if unknown or repeated:
            logger.warning(
                "batch %s: ignored %d lines that belong to no request and %d repeated ones",
                *(entry.batch, unknown, repeated),
            )
        why = f"batch {entry.batch} {self._why(batch) if batch else 'is gone'}"
        if left:
            logger.warning("%d of %d requests without answer: %s", len(left), len(entry.keys), why)
        for key in left:
            yield Unanswered(key, reasons.get(key, why))

    def _why(self, batch: Batch) -> str:
        """Why a request has no line in what a batch gave."""
        told = (batch.errors.data if batch.errors else None) or []
        messages = "; ".join(self._client.shown(f"{each.code}: {each.message}") for each in told)
        if batch.status == "completed":
            return "was completed without it"
        return f"has {batch.status}{': ' if messages else ''}{messages}"

    def _result(self, request: Request, line: dict[str, Any]) -> Answer | Unanswered:
        """What a line of an output or error file tells."""
        response, error = line.get("response") or {}, line.get("error")
        status, body = response.get("status_code"), response.get("body")
        if status == 200 and not error:
            try:
                return self._client.answer(request, body)
            except MALFORMED:
                return Unanswered(request.key, "its line holds no chat completion")
        code, message = error_of(json.dumps({"error": error} if error else body))
        message = self._client.shown(f"{code}: {message}" if error else message)
        if error or not isinstance(status, int):
            return Unanswered(request.key, message)
        rejection = Rejected(status, code, message)
        final = is_about_content(rejection) or self._client.has_answered
        if status in (400, 413, 422) and final and not speaks_of_dialect(rejection):
            return rejected(self._client.config, request.key, rejection)
        return Unanswered(request.key, str(rejection))

    async def _content(self, file: str) -> bytes:
        """What a file of the provider's holds; nothing if it is gone."""

        async def send(api: openai.AsyncOpenAI) -> bytes:
            return (await api.files.content(file)).content

        download = self._client.exchange
        content = await self._retry(lambda: _unless_gone(download(send, _DOWNLOAD_SECONDS)))
        return b"" if content is None else content

    async def _retry(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """What `attempt` returns, the first time that it does not fail."""
        shortest, longest = _BACKOFF_SECONDS
        failure = None
        for number in range(self._client.config.attempts):
            try:
                return await attempt()
            except RequestFailed as error:
                failure = error
            except Rejected as error:
                raise EndpointError(
                    f"{self._client.config.base_url} takes no batch of these requests: {error}; "
                    f"change the configuration, or ask without batches"
                ) from None
            backoff = min(shortest * 2**number, longest) * (0.5 + self._draw())
            await self._sleep(max(backoff, failure.retry_after or 0.0))
        raise EndpointError(
            f"{self._client.config.base_url} failed {self._client.config.attempts} times in a row, "
            f"the last time with: {failure}; run the command again to go on from here"
        )


async def _unless_gone(attempt: Awaitable[Result]) -> Result | None:
    try:
        return await attempt
    except Rejected as error:
        if error.status not in (404, 410):
            raise
        return None
