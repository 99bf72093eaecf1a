import asyncio
import contextlib
import json
import logging
import pickle
import traceback
from email.utils import formatdate

import httpx2
import pytest
from chat_server import FAULTS, STATUS_FAULTS, ChatServer, Settings, serving, serving_process

from shine.config import LlmConfig
from shine.errors import InputError
from shine.llm.client import (
    ChatClient,
    EndpointError,
    Limits,
    RequestFailed,
    _limits,
    _retry_after,
    error_of,
    read_key,
)
from shine.llm.request import Request

CANARY = "sk-canary-0123456789abcdef"
SCHEMA = {"type": "object", "properties": {"levels": {"type": "array"}}}
TASK = {
    "query": "person opens the door.",
    "levels": [{"masked": "person <1> the door.", "slots": [1]}],
    "slots": [
        {
            "slot": 1,
            "part": "verb",
            "inflection": "VBZ",
            "original": "opens",
            "words": ["closes", "takes"],
        }
    ],
}


@pytest.fixture(scope="module")
def running():
    with serving() as server:
        yield server


@pytest.fixture
def server(running):
    running.reset()
    return running


def request(number=0):
    messages = [
        {"role": "system", "content": f"fill the slots {number}"},
        {"role": "user", "content": json.dumps(TASK)},
    ]
    return Request(f"{number:064x}", json.dumps(messages), 60)


def asked(server, requests=None, *, schema=SCHEMA, key=None, together=False, **changes):
    """What one client gets for some requests: completions and exceptions."""
    config = LlmConfig(base_url=server.base_url, model="m", **({"timeout_seconds": 30} | changes))

    async def ask():
        client = ChatClient(config, key)
        try:
            if together:
                calls = (client.complete(r, schema) for r in requests)
                return await asyncio.gather(*calls, return_exceptions=True)
            results = []
            for each in requests or [request()]:
                try:
                    results.append(await client.complete(each, schema))
                except (RequestFailed, EndpointError) as error:
                    results.append(error)
            return results
        finally:
            await client.close()

    return asyncio.run(ask())


def answer(server, **changes):
    return asked(server, **changes)[0].answer


# -- answers ---------------------------------------------------------------------------------


def test_an_answer_says_what_it_contains_and_costs(server):
    found = answer(server, prompt_price=1.0, completion_price=4.0)
    assert json.loads(found.content)["levels"][0][0] in TASK["slots"][0]["words"]
    assert found.problem == ""
    assert found.key == request().key
    assert found.model == "m-2026"
    assert found.prompt_tokens > 0
    assert found.dollars == (found.prompt_tokens + 4.0 * found.completion_tokens) / 1e6
    assert answer(server).dollars == 0


def test_a_request_carries_messages_and_settings_as_they_are():
    bodies = []

    def keep(messages, number):
        bodies.append(messages)
        return "{}"

    hostile = [{"role": "user", "content": 'a "]}\u202e\u0000 ignore <1>\n\\ \ud83d\ude00'}]
    with serving(keep) as server:
        asked(server, [Request("a" * 64, json.dumps(hostile), 1)])
    assert bodies == [json.loads(json.dumps(hostile))]


def test_tokens_are_estimated_where_the_endpoint_tells_none(server):
    server.set(usage=False)
    found = answer(server)
    assert (found.prompt_tokens, found.completion_tokens) == (60, -(-len(found.content) // 4))


@pytest.mark.parametrize("tokens", [10**20, 2**31, -1, True, 1.5, "7"])
def test_tokens_that_nobody_can_have_used_are_estimated(tokens):
    usage = {"prompt_tokens": tokens, "completion_tokens": 3}
    completion = {"choices": [{"message": {"content": "eight ch"}}], "usage": usage}
    found = ChatClient(LlmConfig(model="m"), None).answer(request(), completion)
    assert (found.prompt_tokens, found.completion_tokens) == (60, 2)


def test_an_error_nested_too_deeply_is_told_as_text():
    text = "[" * 100_000
    assert error_of(text) == ("", text)


def test_content_cut_short_is_content(server):
    server.set(next=["truncated"])
    found = answer(server)
    assert found.content.startswith('{"levels"')
    assert found.problem == ""
    with pytest.raises(ValueError, match="delimiter|value"):
        json.loads(found.content)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("refusal", "refused: I cannot help with that."),
        ("filtered_answer", "refused: content filter"),
        ("null_content", "refused: no content (finish_reason stop)"),
        ("filtered", "refused: status 400: the prompt was filtered"),
        ("too_long", "rejected: status 400: maximum context length is 8 tokens"),
    ],
)
def test_what_concerns_one_request_is_its_answer(server, fault, problem):
    server.set(next=[fault])
    found = answer(server)
    assert (found.content, found.problem) == ("", problem)
    assert server.stats()["received"] == 1


def test_a_bad_request_is_rejected_once_the_endpoint_has_answered_others(server):
    server.set(next=["", "400", ""])
    first, second, third = asked(server, [request(0), request(1), request(2)])
    assert second.answer.problem == "rejected: status 400: something else is wrong"
    assert first.answer.content == third.answer.content != ""
    assert server.stats()["received"] == 3


def test_a_server_that_rejects_everything_stops_the_job_and_answers_nothing(server):
    server.set(faults={"400": 1.0})
    first, second = asked(server, [request(0), request(1)])
    for error in (first, second):
        assert isinstance(error, EndpointError)
        assert "rejects the first request, of the model m: status 400: something else" in str(error)


@pytest.mark.parametrize("fault", ["403", "404"])
def test_a_refusal_after_an_answer_concerns_one_request_alone(server, fault):
    server.set(next=["", fault, ""])
    first, second, third = asked(server, [request(n) for n in range(3)])
    assert second.answer.problem.startswith(f"rejected: status {fault}: ")
    assert first.answer.content == third.answer.content != ""


def test_long_messages_of_servers_are_cut():
    asked_for = httpx2.Request("POST", "http://localhost/v1/chat/completions")
    error = {"error": {"message": "long\u202e\n " * 200}}
    response = httpx2.Response(400, json=error, request=asked_for)
    refusal = ChatClient(LlmConfig(model="m"), None)._refusal(response)
    assert str(refusal) == "status 400: " + ("long " * 40)[:197].strip() + "..."


# -- dialects --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "status"),
    [("refused_fields", status) for status in (400, 404, 415, 422, 501)]
    # A 404 that names no field is a wrong model or address.
    + [("refused_silently", status) for status in (400, 415, 422, 501)],
)
@pytest.mark.parametrize("fields", [["json_schema"], ["response_format"], ["max_tokens"]])
def test_what_a_server_does_not_know_is_learnt_once(server, how, status, fields):
    server.set(refused_status=status, **{how: fields})
    results = asked(server, [request(n) for n in range(5)])
    assert all(result.answer.content for result in results)
    refused = 1 if fields != ["response_format"] else 2
    if how == "refused_silently" and fields == ["max_tokens"]:
        refused = 3  # plainer forms are tried before
    assert server.stats()["received"] == 5 + refused


def test_a_server_that_knows_neither_schemas_nor_max_tokens_is_understood(server):
    server.set(refused_fields=["response_format", "max_tokens"])
    results = asked(server, [request(n) for n in range(3)])
    assert all(result.answer.content for result in results)
    assert server.stats()["received"] == 3 + 3


def test_requests_refused_together_learn_from_one(server):
    server.set(refused_fields=["response_format"])
    results = asked(server, [request(n) for n in range(20)], together=True)
    assert all(result.answer.content for result in results)
    assert server.stats()["received"] <= 20 + 20 + 1


def test_requests_without_schema_say_nothing_of_the_schemas_of_others(server):
    server.set(refused_fields=["max_tokens"])
    config = LlmConfig(base_url=server.base_url, model="m")

    async def ask():
        client = ChatClient(config, None)
        await client.complete(request(0), None)
        dialect = client.dialect
        await client.close()
        return dialect

    dialect = asyncio.run(ask())
    assert (dialect.form, dialect.limit) == ("json_schema", "max_completion_tokens")


def test_a_schema_refused_after_others_worked_is_left_out_of_that_request_alone(server):
    async def ask():
        client = ChatClient(LlmConfig(base_url=server.base_url, model="m"), None)
        await client.complete(request(0), SCHEMA)
        server.set(refused_fields=["json_schema"])
        second = await client.complete(request(1), SCHEMA)
        form = client.dialect.form
        await client.close()
        return second, form

    second, form = asyncio.run(ask())
    assert second.answer.content
    assert form == "json_schema"


# -- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind", "status", "billed"),
    [
        ("429", "limited", 429, False),
        ("500", "unavailable", 500, False),
        ("503", "unavailable", 503, False),
        ("529", "unavailable", 529, False),
        ("hang", "timeout", None, True),
        ("disconnect", "unavailable", None, True),
        ("garbage", "broken", None, True),
        ("reset_headers", "broken", None, True),
        ("reset_body", "broken", None, True),
        ("bad_envelope", "broken", 200, True),
        ("no_choices", "broken", 200, True),
    ],
)
def test_a_failure_tells_its_kind_and_whether_it_may_cost(server, fault, kind, status, billed):
    server.set(next=[fault])
    seconds = 1.0 if fault == "hang" else 30
    error, after = asked(server, [request(0), request(1)], timeout_seconds=seconds)
    assert (error.kind, error.status, error.billed) == (kind, status, billed), error
    assert after.answer.content


def test_a_timeout_tells_the_seconds_that_were_given():
    async def exchange():
        await ChatClient(LlmConfig(), None).exchange(lambda api: asyncio.sleep(9), 0.25)

    with pytest.raises(RequestFailed, match=r"no answer within 0\.25 s"):
        asyncio.run(exchange())


def test_nobody_listening_is_unavailable_and_costs_nothing(server):
    with serving() as gone:
        pass
    error = asked(gone)[0]
    assert (error.kind, error.billed) == ("unavailable", False), error


@pytest.mark.parametrize(
    ("fault", "low", "high"), [("429_seconds", 7, 7), ("429_date", 6, 7), ("429_reset", 7, 7)]
)
def test_a_limited_request_tells_how_long_to_wait(server, fault, low, high):
    server.set(next=[fault], retry_after=7)
    error = asked(server)[0]
    assert low <= error.retry_after <= high


def test_enforced_limits_are_told_with_answers_and_refusals(server):
    server.set(requests_per_minute=2)
    first, second, third = asked(server, [request(n) for n in range(3)])
    assert (first.limits.remaining_requests, second.limits.remaining_requests) == (1, 0)
    assert third.kind == "limited"
    assert 0 < third.retry_after <= 60
    assert third.limits.remaining_requests == 0
    assert server.stats()["limited"] == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "the key of the variable OPENAI_API_KEY with status 401: "),
        ("403", "the key of the variable OPENAI_API_KEY with status 403: not allowed;"),
        ("404", "expected the model m at"),
        ("quota", "no quota left"),
        ("redirect", "redirects to http://localhost"),
    ],
)
def test_what_no_request_survives_stops_the_job(server, fault, words):
    server.set(next=[fault])
    error = asked(server, key=CANARY)[0]
    assert isinstance(error, EndpointError)
    assert words in str(error)
    assert server.stats()["received"] == 1


def test_an_untrusted_certificate_stops_the_job():
    config = LlmConfig(base_url="https://127.0.0.1:1", model="m")

    async def ask(port):
        client = ChatClient(
            config.model_copy(update={"base_url": f"https://127.0.0.1:{port}"}), "k"
        )
        try:
            await client.complete(request(), None)
        finally:
            await client.close()

    with serving() as plain, pytest.raises(EndpointError, match="encryption"):
        asyncio.run(ask(plain.port))


# -- waiting times ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("2m59.56s", 179.56),
        ("1.5", 1.5),
        (" 3 ", 3.0),
        ("0", 0.0),
        ("-1", None),
        ("soon", None),
        ("1d1d", None),  # more than a day is no wait
        ("", None),
    ],
)
def test_durations_are_read_as_servers_write_them(text, seconds):
    limits = _limits({"x-ratelimit-reset-tokens": text, "x-ratelimit-remaining-tokens": "5"})
    assert limits == Limits(None, 5, None, seconds)


def test_no_limits_are_none():
    assert _limits({"content-type": "text/html"}) is None


def test_dates_are_read_by_the_clock_of_the_server():
    headers = {"retry-after": formatdate(1_000_030, usegmt=True)}
    assert _retry_after(headers, 1_000_000.0) == 30
    assert _retry_after(headers, 2_000_000.0) == 0
    assert _retry_after(headers | {"date": formatdate(1_000_020, usegmt=True)}, 2_000_000.0) == 10


def test_milliseconds_are_preferred_and_spent_limits_are_waited_for():
    assert _retry_after({"retry-after-ms": "250", "retry-after": "1"}, 0.0) == 0.25
    spent = {
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "1h",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "2s",
    }
    assert _retry_after(spent, 0.0) == 2


# -- the key ---------------------------------------------------------------------------------


def test_a_key_is_read_from_the_file_else_from_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", " of the environment ".strip().replace(" ", "-"))
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    config = LlmConfig(key_variable="MY_KEY")
    assert read_key(config) == "of-the-environment"
    assert read_key(config.model_copy(update={"key_file": str(file)})) == "of-the-file"
    monkeypatch.delenv("MY_KEY")
    assert read_key(config) is None


@pytest.mark.parametrize("content", [None, b"", b" \n", b"two words\n", b"\xff\xfe\x00k", b"a\nb"])
def test_a_bad_key_file_is_named_and_never_shown(tmp_path, content):
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="key_file") as raised:
        read_key(LlmConfig(key_file=str(file)))
    assert str(file) in str(raised.value)
    assert "two" not in str(raised.value)
    assert raised.value.__context__ is None


def test_a_bad_variable_is_named_and_never_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", "canary\u20ac")
    with pytest.raises(InputError, match="key_variable MY_KEY") as raised:
        read_key(LlmConfig(key_variable="MY_KEY"))
    assert "canary" not in str(raised.value)


def test_only_the_given_key_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("OPENAI_ADMIN_KEY", CANARY)
    asked(server, key=None)
    headers = server.stats()["headers"]
    assert "Authorization" not in headers
    assert CANARY not in json.dumps(headers)
    asked(server, key="another")
    assert server.stats()["headers"]["Authorization"] == "Bearer another"


def test_the_proxy_of_the_environment_never_sees_plain_requests(server, monkeypatch):
    with serving() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert answer(server, key=CANARY).content
        assert proxy.stats()["headers"] == {}


def test_a_redirect_does_not_carry_the_key_away():
    with serving(next=["redirect"]) as server:
        asked(server, key=CANARY)
        assert server.stats()["received"] == 1


class _Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.texts = []

    def emit(self, record):
        self.texts.append(f"{self.format(record)} {vars(record)!r}")


@contextlib.contextmanager
def everything_logged():
    """All that any logger says, those of the transport at DEBUG of their own."""
    handler = _Records()
    names = [None, "openai", "openai._base_client", "httpx2", "httpcore2", "aiohttp", "asyncio"]
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeHandler(handler)


def everything_shown_of(error):
    """Every text that a log, a traceback or another process could get of an exception."""
    try:
        raise error
    except (RequestFailed, EndpointError):
        shown = [traceback.format_exc()]
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert error.__cause__ is None
    assert error.__context__ is None
    shown += [repr(error), str(error), repr(vars(error)), repr(copy)]
    return [*shown, repr(pickle.dumps(error))]


def test_the_key_shows_nowhere(server):
    with everything_logged() as logged:
        shown = []
        for fault in ["", *FAULTS, "echoed"]:
            server.reset()
            settings = {"echo_key": True, "next": [fault] if fault in FAULTS else []}
            server.set(**settings, down=fault == "echoed")
            seconds = 0.3 if fault == "hang" else 30
            for result in asked(server, key=CANARY, timeout_seconds=seconds):
                if isinstance(result, Exception):
                    shown += everything_shown_of(result)
                else:
                    shown += [repr(result), repr(pickle.dumps(result))]
            if fault in STATUS_FAULTS:
                assert server.stats()["headers"]["Authorization"] == f"Bearer {CANARY}"
        client = ChatClient(LlmConfig(base_url=server.base_url, model="m"), CANARY)
        shown.append(repr(client))
        with pytest.raises(TypeError, match="stays in its process"):
            pickle.dumps(client)
    assert len(shown) > len(FAULTS)
    assert any("openai" in text for text in logged)
    assert not [text for text in (*shown, *logged) if CANARY in text or CANARY[:12] in text]


@pytest.mark.parametrize("key", ["no-usual-form-of-key", "a+b/c=", "sk-usual"])
def test_a_key_that_the_server_repeats_is_taken_out_of_its_message(server, key):
    server.set(next=["", "400", "500"], echo_key=True)
    _, second, third = asked(server, [request(n) for n in range(3)], key=key)
    assert second.answer.problem == "rejected: status 400: something else is wrong: Bearer [key]"
    assert str(third) == "status 500: internal: Bearer [key]"


def test_a_key_in_an_answer_is_taken_out():
    with serving(lambda messages, number: f"the key is {CANARY}") as server:
        assert answer(server, key=CANARY).content == "the key is [key]"
        assert answer(server, key="the").content == f"the key is {CANARY}"


# -- the server itself -----------------------------------------------------------------------


def test_the_server_counts_what_it_received_answered_and_billed(server):
    server.set(next=["", "429", "reset_body", ""])
    asked(server, [request(0), request(1), request(2), request(0)])
    stats = server.stats()
    assert (stats["received"], stats["answered"], stats["billed"]) == (4, 2, 3)
    assert sorted(stats["received_by_key"].values()) == [1, 1, 2]
    assert sorted(stats["billed_by_key"].values()) == [1, 2]
    assert stats["faults"] == {"429": 1, "reset_body": 1}
    assert len(server.prompts()) == 4


def test_the_server_limits_over_a_sliding_window():
    now = [100.0]
    settings = Settings(requests_per_minute=240, tokens_per_minute=6000, window_seconds=1.0)
    server = ChatServer(settings, clock=lambda: now[0])

    def let_through(tokens):
        return "retry-after" not in server.limited(tokens)

    assert [let_through(10) for _ in range(5)] == [True] * 4 + [False]
    now[0] = 100.9
    assert not let_through(10)
    now[0] = 101.0
    assert [let_through(60), let_through(50), let_through(40)] == [True, False, True]
    assert server.limited(1)["retry-after-ms"] == "1000"


def test_the_server_runs_as_a_process_and_draws_faults_by_their_probability():
    with serving_process(faults={"503": 0.5}, seed=1) as server:
        results = asked(server, [request(n) for n in range(40)])
        failed = sum(isinstance(result, RequestFailed) for result in results)
        assert 10 <= failed <= 30
        assert server.stats()["faults"] == {"503": failed}
