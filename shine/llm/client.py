"""A client of one OpenAI-compatible endpoint: one request, told apart by what came of it.

Nothing is retried here. An exception says whether another attempt can help (`RequestFailed`) or
the job must stop (`EndpointError`); what concerns one request alone is its answer.
"""

import asyncio
import dataclasses
import email.utils
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar

import aiohttp
import httpx2
import openai

from shine.config import LlmConfig
from shine.errors import InputError
from shine.llm.request import Answer, Limits, Request

Headers = Mapping[str, str]
Response = TypeVar("Response")
_ABOUT_DIALECT = (400, 404, 415, 422, 501)  # statuses that refuse a field among other things
_CONNECT_SECONDS = 10.0
_SHOWN = 200  # characters of what a server wrote
_LONGEST_WAIT_SECONDS = 86_400.0
# What reading an unknown value as a chat completion may raise.
MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
_SECRET_LENGTH = 8  # shorter keys are placeholders, and words that an answer may well contain


class EndpointError(InputError):
    """The endpoint will answer no request of this job."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer, and the limits told with it."""

    answer: Answer
    limits: Limits | None


class RequestFailed(Exception):  # noqa: N818
    """No answer came; another attempt may bring one.

    `kind`: "limited" (too fast, or too much), "unavailable" (an error of the server, or nobody
    listens), "timeout", or "broken" (an answer that came in part, or makes no sense).
    `retry_after`: seconds to wait, where the endpoint tells. `billed`: whether the endpoint may
    have done the work, and ask for its price.
    """

    def __init__(
        self,
        message: str,
        kind: Literal["limited", "unavailable", "timeout", "broken"],
        status: int | None = None,
        retry_after: float | None = None,
        billed: bool = False,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(message)
        self.kind: Literal["limited", "unavailable", "timeout", "broken"] = kind
        self.status = status
        self.retry_after = retry_after
        self.billed = billed
        self.limits = limits

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.kind, self.status, self.retry_after, self.billed, self.limits)
        return type(self), (str(self), *fields)


class Rejected(Exception):  # noqa: N818
    """The endpoint will never answer this request; others it may."""

    def __init__(self, status: int, code: str, message: str, limits: Limits | None = None) -> None:
        super().__init__(f"status {status}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.limits = limits

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.code, self.message, self.limits)


Failure = RequestFailed | Rejected | EndpointError


@dataclass(frozen=True, slots=True)
class Dialect:
    """Which of the fields that servers disagree on a request has."""

    form: Literal["json_schema", "json_object", "none"] = "json_schema"
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def alternative(self, rejection: Rejected, *, known_to_work: bool) -> "Dialect | None":
        """What to try after `rejection`: less, where it speaks of a field or nothing has worked."""
        text = f"{rejection.code} {rejection.message}"
        if is_about_content(rejection):
            return None
        plainer = _PLAINER.get(self.form)
        if re.search(r"response_format|json_schema|json_object|schema|guided|grammar", text):
            return dataclasses.replace(self, form=plainer) if plainer else None
        about_limit = re.search(r"max_(completion_)?tokens", text)
        if plainer and not about_limit and not known_to_work:
            return dataclasses.replace(self, form=plainer)
        if self.limit == "max_tokens" and (about_limit or not known_to_work):
            form = self.form if about_limit else "json_schema"
            return Dialect(form, "max_completion_tokens")
        return None


_PLAINER: dict[str, Literal["json_object", "none"]] = {
    "json_schema": "json_object",
    "json_object": "none",
}
_ABOUT_CONTENT = ("content_filter", "content_policy_violation", "context_length_exceeded")


def read_key(config: LlmConfig) -> str | None:
    """The key of the endpoint: of `key_file` if there is one, else of the environment, or None."""
    if config.key_file is not None:
        where = f"key_file {config.key_file}"
        try:
            key = Path(config.key_file).read_text().strip()
        except (OSError, UnicodeError):
            key = None
        if not key:
            # Raised outside of the handler: a UnicodeError holds the content.
            raise InputError(
                f"negatives.llm.{where}: expected a text file that holds the key, found "
                f"{'none that can be read' if key is None else 'nothing in it'}; "
                f"write the key into it, or use negatives.llm.key_variable"
            )
    else:
        where = f"key_variable {config.key_variable}"
        key = os.environ.get(config.key_variable, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(
            f"negatives.llm.{where}: expected one word of ASCII characters, the key, and got "
            f"{len(key)} characters that are something else; write the key alone into it"
        )
    return key or None


class ChatClient:
    """Asks one endpoint; made in the process and used on the event loop that asks.

    `key` goes to the host of `config.base_url` alone (redirects are errors, and only https runs
    through the proxies of the environment), and into no message. What a server does not know
    (schemas, `max_tokens`) is learnt from its refusals and left out from then on. Servers that tell
    no usage get estimated tokens: those of the request, and one per four characters of content.
    """

    def __init__(self, config: LlmConfig, key: str | None) -> None:
        self.config = config
        self.dialect = Dialect()
        self._key = key
        self._openai: openai.AsyncOpenAI | None = None
        self._worked: set[Dialect] = set()
        self._learning = asyncio.Lock()

    async def complete(self, request: Request, schema: Mapping[str, Any] | None) -> Completion:
        """What the endpoint answers; with `schema`, in JSON of that form where it is able to.

        Raises:
            RequestFailed: no answer, and another attempt may bring one.
            EndpointError: no answer to this or any other request.
        """
        dialect = _as_sent(self.dialect, schema)
        try:
            return await self._ask(request, schema, dialect)
        except Rejected as error:
            rejection = error
        if rejection.status in _ABOUT_DIALECT:
            # One request learns; those refused meanwhile profit.
            async with self._learning:
                completion = await self._learn(request, schema, dialect, rejection)
            if completion is not None:
                return completion
        if not (self.has_answered or is_about_content(rejection)):
            raise EndpointError(
                f"{self.config.base_url} rejects the first request, of the model "
                f"{self.config.model}: {rejection}; check negatives.llm.model and the server"
            )
        return Completion(rejected(self.config, request.key, rejection), rejection.limits)

    @property
    def has_answered(self) -> bool:
        """Whether a request was answered, so that a rejection concerns one request alone."""
        return bool(self._worked)

    async def _learn(
        self,
        request: Request,
        schema: Mapping[str, Any] | None,
        dialect: Dialect,
        rejection: Rejected,
    ) -> Completion | None:
        """What comes of asking in other dialects; one that works is kept if `dialect` never did."""
        known = _as_sent(self.dialect, schema)  # what another request has learnt meanwhile
        attempt = known if known != dialect else None
        refused = dialect
        while True:
            if attempt is None:
                attempt = refused.alternative(rejection, known_to_work=refused in self._worked)
            if attempt is None:
                return None
            attempt = _as_sent(attempt, schema)
            try:
                completion = await self._ask(request, schema, attempt)
            except Rejected as error:
                refused, rejection, attempt = attempt, error, None
                continue
            if dialect not in self._worked:
                form = self.dialect.form if schema is None else attempt.form
                self.dialect = dataclasses.replace(attempt, form=form)
            return completion

    async def _ask(
        self, request: Request, schema: Mapping[str, Any] | None, dialect: Dialect
    ) -> Completion:
        body = request_body(self.config, request, schema, dialect)
        response = await self.exchange(
            lambda client: client.post("/chat/completions", body=body, cast_to=httpx2.Response)
        )
        limits = _limits(response.headers)
        try:
            answer = self.answer(request, json.loads(response.content))
        except MALFORMED:
            answer = None
        if answer is None:
            raise RequestFailed(
                "the endpoint sent something that is no chat completion",
                "broken",
                response.status_code,
                billed=True,
                limits=limits,
            )
        self._worked.add(dialect)
        return Completion(answer, limits)

    async def exchange(
        self,
        send: Callable[[openai.AsyncOpenAI], Awaitable[Response]],
        timeout_seconds: float | None = None,
    ) -> Response:
        """What `send` returns within `timeout_seconds`, or within those of the configuration.

        Raises:
            RequestFailed: another attempt may help.
            Rejected: it cannot; other requests may be answered.
            EndpointError: none will.
        """
        # Raised outside of the handlers: as context, the original would hold the key.
        failure: Failure
        try:
            async with asyncio.timeout(timeout_seconds or self.config.timeout_seconds):
                return await send(self._connected())
        except TimeoutError:
            failure = _timeout(timeout_seconds or self.config.timeout_seconds)
        except openai.APIStatusError as error:
            failure = self._refusal(error.response)
        except (
            openai.OpenAIError,
            aiohttp.ClientError,
            httpx2.HTTPError,
            OSError,
            ValueError,
        ) as e:
            failure = self._lost(e, timeout_seconds or self.config.timeout_seconds)
        raise failure

    def __reduce__(self) -> Any:
        raise TypeError("a ChatClient holds a key, which stays in its process")

    async def close(self) -> None:
        """Connections are closed; a further request opens them again."""
        client, self._openai = self._openai, None
        if client is not None:
            await client.close()

    def _connected(self) -> openai.AsyncOpenAI:
        if self._openai is None:
            seconds = self.config.timeout_seconds
            self._openai = openai.AsyncOpenAI(
                base_url=self.config.base_url,
                # None would take the key of OPENAI_API_KEY, wherever `base_url` leads.
                api_key=self._key or "none",
                default_headers={"Authorization": f"Bearer {self._key}"},
                max_retries=0,
                timeout=openai.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
                http_client=openai.DefaultAioHttpClient(
                    follow_redirects=False,
                    event_hooks={"request": [] if self._key else [_remove_authorization]},
                    trust_env=self.config.base_url.startswith("https://"),
                    limits=httpx2.Limits(
                        max_connections=max(self.config.in_flight, 100),
                        keepalive_expiry=4.0,  # servers commonly hang up after 5
                    ),
                ),
            )
        return self._openai

    def _refusal(self, response: httpx2.Response) -> Failure:
        """What a status other than 2xx means."""
        status, headers = response.status_code, response.headers
        code, message = error_of(response.text)
        message, limits = self.shown(message), _limits(headers)
        if status == 401 or (status == 403 and not self.has_answered):
            return EndpointError(
                f"{self.config.base_url} refused {self._key_source()} with status {status}: "
                f"{message}; give a key that it accepts"
            )
        if status == 402 or (
            status == 429 and code in ("insufficient_quota", "billing_hard_limit")
        ):
            return EndpointError(
                f"{self.config.base_url} has no quota left for {self._key_source()} "
                f"(status {status}: {message}); add to it, and run the command again"
            )
        if 300 <= status < 400:
            goal = self.shown(headers.get("location", "").split("?")[0])
            return EndpointError(
                f"{self.config.base_url} redirects to {goal or 'nowhere'} (status {status}), where "
                f"the key is not sent; set negatives.llm.base_url to the address that answers"
            )
        rejection = Rejected(status, code, message, limits)
        of_chat = response.request.url.path.endswith("/chat/completions")
        found = status == 404 and self.has_answered  # so the request is what it does not like
        if status in (404, 405) and of_chat and not (found or speaks_of_dialect(rejection)):
            return EndpointError(
                f"expected the model {self.config.model} at {self.config.base_url}, got status "
                f"{status}: {message}; check negatives.llm.model and negatives.llm.base_url"
            )
        if status == 429:
            wait = _retry_after(headers, time.time())
            return RequestFailed(f"status 429: {message}", "limited", status, wait, False, limits)
        if status == 408:
            return RequestFailed(f"status 408: {message}", "timeout", status, None, True, limits)
        if status in (409, 425) or (status >= 500 and status != 501):
            wait = _retry_after(headers, time.time())
            text = f"status {status}: {message}"
            return RequestFailed(text, "unavailable", status, wait, False, limits)
        return rejection

    def _lost(self, error: BaseException, seconds: float) -> Failure:
        """What an exchange without a whole response means."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, aiohttp.ClientError):
            cause = cause.__cause__
        name = type(cause or error).__name__
        match cause:
            case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientConnectorSSLError():
                return EndpointError(
                    f"{self.config.base_url}: no trusted encryption could be agreed on ({name}); "
                    f"check negatives.llm.base_url and the certificates of this machine"
                )
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return RequestFailed(f"no connection ({name})", "unavailable")
            case aiohttp.ServerTimeoutError():
                return _timeout(seconds)
            case aiohttp.ClientConnectionError():
                return RequestFailed(
                    f"the connection was lost ({name})", "unavailable", billed=True
                )
            case _:
                return RequestFailed(f"the response was lost ({name})", "broken", billed=True)

    def _key_source(self) -> str:
        if self.config.key_file is not None:
            return f"the key of the file {self.config.key_file}"
        if self._key is None:
            return f"a request without key (the variable {self.config.key_variable} is not set)"
        return f"the key of the variable {self.config.key_variable}"

    def shown(self, text: str) -> str:
        """Text of a server as one short line without the key, whole or in the usual masked form."""
        if self._key:
            text = text.replace(self._key, "[key]")
        text = re.sub(r"\bsk-[\w*.-]+", "[key]", text)
        return _short(text)

    def answer(self, request: Request, completion: Any) -> Answer:
        """The answer in a chat completion, without the key should it be in it.

        Content cut short by max_tokens is content as it is.

        Raises:
            One of `MALFORMED`: it is none.
        """
        answer = _answer_of(self.config, request, completion)
        if not self._key or len(self._key) < _SECRET_LENGTH:
            return answer
        texts = {name: getattr(answer, name) for name in ("content", "problem", "model")}
        clean = {name: text.replace(self._key, "[key]") for name, text in texts.items()}
        return dataclasses.replace(answer, **clean) if clean != texts else answer


def _timeout(seconds: float) -> RequestFailed:
    return RequestFailed(f"no answer within {seconds:g} s", "timeout", billed=True)


def is_about_content(rejection: Rejected) -> bool:
    """Whether the content of a request was rejected, and not how the endpoint is used."""
    return rejection.code in _ABOUT_CONTENT or "maximum context length" in rejection.message


def speaks_of_dialect(rejection: Rejected) -> bool:
    """Whether the same request, put in another dialect, may well be answered."""
    alternative = Dialect().alternative(rejection, known_to_work=True)
    return rejection.status in _ABOUT_DIALECT and alternative is not None


async def _remove_authorization(request: httpx2.Request) -> None:
    request.headers.pop("Authorization", None)


def request_body(
    config: LlmConfig, request: Request, schema: Mapping[str, Any] | None, dialect: Dialect
) -> dict[str, Any]:
    """The body of a chat-completions request."""
    body: dict[str, Any] = {
        "model": config.model,
        "messages": json.loads(request.messages),
        "temperature": config.temperature,
        dialect.limit: config.max_tokens,
    }
    match _as_sent(dialect, schema).form:
        case "json_schema":
            described = {"name": "answer", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        case "json_object":
            body["response_format"] = {"type": "json_object"}
    return body


def _answer_of(config: LlmConfig, request: Request, completion: Any) -> Answer:
    choice = completion["choices"][0]
    message, reason = choice["message"], choice.get("finish_reason")
    content, refusal = message.get("content") or "", message.get("refusal")
    if not isinstance(content, str):
        raise TypeError("expected content as text")
    problem = ""
    if refusal:
        problem = f"refused: {_short(str(refusal))}"
    elif reason == "content_filter":
        problem = "refused: content filter"
    elif not content:
        problem = f"refused: no content (finish_reason {_short(str(reason))})"
    usage = completion.get("usage") or {}
    prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (_is_count(prompt_tokens) and _is_count(completion_tokens)):
        prompt_tokens, completion_tokens = request.prompt_tokens, -(-len(content) // 4)
    return Answer(
        key=request.key,
        content="" if problem else content,
        problem=problem,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        dollars=(
            prompt_tokens * (config.prompt_price or 0.0)
            + completion_tokens * (config.completion_price or 0.0)
        )
        / 1e6,
        model=str(completion.get("model") or config.model),
    )


def _is_count(tokens: Any) -> TypeGuard[int]:
    return type(tokens) is int and 0 <= tokens < 2**31


def rejected(config: LlmConfig, key: str, rejection: Rejected) -> Answer:
    """The answer to the request `key` that the endpoint never answers."""
    about_filter = rejection.code in ("content_filter", "content_policy_violation")
    verb = "refused" if about_filter else "rejected"
    return Answer(key, "", f"{verb}: {rejection}", 0, 0, 0.0, str(config.model))


def _as_sent(dialect: Dialect, schema: Mapping[str, Any] | None) -> Dialect:
    return dialect if schema is not None else dataclasses.replace(dialect, form="none")


def error_of(text: str) -> tuple[str, str]:
    """Code and message of an error, in the ways that servers write them into a body."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return "", text
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return "", str(error)
    parameter = f" ({error['param']})" if error.get("param") else ""
    message = error.get("message") or error.get("detail") or text
    return str(error.get("code") or error.get("type") or ""), f"{message}{parameter}"


def _short(text: str) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."


def _limits(headers: Headers) -> Limits | None:
    limits = Limits(
        _count(headers.get("x-ratelimit-remaining-requests")),
        _count(headers.get("x-ratelimit-remaining-tokens")),
        _seconds(headers.get("x-ratelimit-reset-requests")),
        _seconds(headers.get("x-ratelimit-reset-tokens")),
    )
    return limits if limits != Limits(None, None, None, None) else None


def _count(text: str | None) -> int | None:
    return max(int(text), 0) if text and re.fullmatch(r"-?\d{1,15}", text) else None


def _seconds(text: str | None) -> float | None:
    """A duration such as 1s, 6m0s, 20ms or, in plain seconds, 1.5."""
    if not text:
        return None
    text = text.strip()
    number = r"\d{1,12}(?:\.\d{1,12})?"
    if re.fullmatch(number, text):
        seconds = float(text)
    elif re.fullmatch(rf"(?:{number}(?:ms|[dhms]))+", text):
        units = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
        parts = re.findall(rf"({number})(ms|[dhms])", text)
        seconds = sum(float(count) * units[unit] for count, unit in parts)
    else:
        return None
    return seconds if seconds <= _LONGEST_WAIT_SECONDS else None


def _retry_after(headers: Headers, now: float) -> float | None:
    """Seconds that an endpoint asks to wait, by its own clock where it shows one."""
    milliseconds = _seconds(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _seconds(text)
    if seconds is not None:
        return seconds
    when, sent = _instant(text), _instant(headers.get("date"))
    if when is not None:
        return max(when - (now if sent is None else sent), 0.0)
    limits = _limits(headers)
    if limits is None:
        return None
    pairs = (
        (limits.remaining_requests, limits.requests_reset_seconds),
        (limits.remaining_tokens, limits.tokens_reset_seconds),
    )
    waits = [wait for remaining, wait in pairs if wait is not None and not remaining]
    return max(waits, default=None)


def _instant(text: str | None) -> float | None:
    """The time of an HTTP date, in seconds since 1970."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() if text else None
    except ValueError:
        return None
