import asyncio
import collections
import contextlib
import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from chat_server import key_of, serving

from shine.config import LlmConfig
from shine.errors import InputError
from shine.llm.batches import Unanswered, _Entry, _Ledger, _unless_gone, ask_in_batches
from shine.llm.client import ChatClient, EndpointError, Rejected
from shine.llm.request import Answer, Request

CANARY = "sk-canary-0123456789abcdef"
SCHEMA = {"type": "object"}


@pytest.fixture(scope="module")
def running():
    with serving(lambda messages, number: f"says {messages[0]['content']}") as server:
        yield server


@pytest.fixture
def server(running):
    running.reset()
    return running


def request(number):
    messages = json.dumps([{"role": "user", "content": f"number {number}"}])
    return Request(f"{number:064x}", messages, 5)


def collected(server, folder, numbers, *, stop_after=None, naps=None, key=CANARY, **changes):
    """What one call gives: {number: content}, and {number: reason} of the unanswered."""
    config = LlmConfig(base_url=server.base_url, model="m", timeout_seconds=10)
    schema = changes.pop("schema", SCHEMA)

    async def nap(seconds):
        if naps is not None:
            naps.append(seconds)
        await asyncio.sleep(0.01)

    async def ask():
        client = ChatClient(config, key)
        results = ask_in_batches(
            (request(number) for number in numbers),
            *(client, str(folder)),
            **({"schema": schema, "sleep": nap, "draw": lambda: 0.5} | changes),
        )
        answers, reasons = {}, {}
        try:
            async with contextlib.aclosing(results):
                async for result in results:
                    number = int(result.key, 16)
                    assert number not in answers
                    assert number not in reasons
                    if isinstance(result, Unanswered):
                        reasons[number] = result.reason
                    else:
                        assert result.problem or result.prompt_tokens
                        answers[number] = result.content or result.problem
                    if len(answers) == stop_after:
                        break
        finally:
            await client.close()
        return answers, reasons

    return asyncio.run(ask())


def contents(numbers):
    return {number: f"says number {number}" for number in numbers}


def paid_more_than_once(server, numbers):
    billed = server.stats()["billed_by_key"]
    keys = {key_of(request(number).messages): number for number in numbers}
    assert set(billed) <= set(keys)
    return {keys[key]: count for key, count in billed.items() if count > 1}


def test_every_request_is_answered_and_paid_once(server, tmp_path):
    server.set(batch_seconds=0.1)
    answers, reasons = collected(server, tmp_path, range(10), max_requests=4)
    assert (answers, reasons) == (contents(range(10)), {})
    assert paid_more_than_once(server, range(10)) == {}
    stats = server.stats()
    # The first is asked directly, the others in files of four, four and one.
    assert (stats["received"], stats["files"], stats["batches"]) == (1, 3, 3)


def test_polls_become_rarer(server, tmp_path):
    naps = []

    async def nap(seconds):
        naps.append(seconds)
        if len(naps) == 10:
            raise asyncio.CancelledError

    server.set(batch_seconds=3600)
    with pytest.raises(asyncio.CancelledError):
        collected(server, tmp_path, range(2), sleep=nap)
    assert naps == [min(5 * 1.5**number, 120) for number in range(10)]


def test_a_request_that_comes_twice_is_asked_once(server, tmp_path):
    answers, _ = collected(server, tmp_path, [0, 1, 1, 2, 0, 2])
    assert answers == contents(range(3))
    assert paid_more_than_once(server, range(3)) == {}


def test_files_stay_under_their_bytes(server, tmp_path):
    server.set(batch_bytes=1000)
    answers, _ = collected(server, tmp_path, range(12), max_bytes=1000)
    assert answers == contents(range(12))
    assert server.stats()["files"] > 2


def test_files_of_megabytes_are_uploaded_whole(server, tmp_path):
    answers, _ = collected(server, tmp_path, range(3), schema={"enum": ["x" * 1_000_000]})
    assert answers == contents(range(3))


def test_no_requests_ask_nothing(server, tmp_path):
    assert collected(server, tmp_path, []) == ({}, {})
    assert server.stats()["headers"] == {}


def test_batches_ask_in_the_dialect_of_the_server(server, tmp_path):
    server.set(refused_fields=["response_format", "max_tokens"])
    answers, _ = collected(server, tmp_path, range(5))
    assert answers == contents(range(5))
    stats = server.stats()
    assert (stats["received"], stats["batches"]) == (4, 1)


def test_missing_lines_are_found_and_asked_again(server, tmp_path):
    server.set(batch_missing=3)
    answers, reasons = collected(server, tmp_path, range(10))
    assert len(answers) == 7
    assert set(reasons.values()) == {"batch batch_0 was completed without it"}
    server.set(batch_missing=0)
    again, none = collected(server, tmp_path, sorted(reasons))
    assert (answers | again, none) == (contents(range(10)), {})
    assert server.stats()["batches"] == 2


def test_repeated_lines_count_once_and_unknown_ones_are_ignored(server, tmp_path, caplog):
    server.set(batch_duplicates=4, batch_unknown=2)
    with caplog.at_level(logging.WARNING):
        answers, reasons = collected(server, tmp_path, range(10))
    assert (answers, reasons) == (contents(range(10)), {})
    assert "ignored 2 lines that belong to no request and 4 repeated ones" in caplog.text


def test_lines_of_the_error_file_are_asked_again(server, tmp_path):
    server.set(batch_errors=4)
    answers, reasons = collected(server, tmp_path, range(10))
    assert len(answers) == 6
    assert list(reasons.values()) == ["server_error: not done"] * 4


@pytest.mark.parametrize(
    ("outcome", "answered", "reason"),
    [
        ("failed", 1, "batch batch_0 has failed: invalid: out of order"),
        ("expired", 5, "batch_expired: not done"),
        ("cancelled", 5, "batch_cancelled: not done"),
    ],
)
def test_a_batch_that_ends_badly_is_explained(server, tmp_path, outcome, answered, reason):
    server.set(batch_outcome=outcome)
    answers, reasons = collected(server, tmp_path, range(10))
    assert len(answers) == answered
    assert set(reasons.values()) == {reason}
    server.set(batch_outcome="completed")
    again, none = collected(server, tmp_path, sorted(reasons))
    assert (answers | again, none) == (contents(range(10)), {})
    assert paid_more_than_once(server, range(10)) == {}


def test_each_line_is_judged_as_a_response_is(server, tmp_path):
    server.set(next=["", "400", "503", "refusal", "too_long", "no_choices", "429"])
    answers, reasons = collected(server, tmp_path, range(8))
    assert answers == contents([0, 7]) | {
        1: "rejected: status 400: something else is wrong",
        3: "refused: I cannot help with that.",
        4: "rejected: status 400: maximum context length is 8 tokens",
    }
    assert reasons == {
        2: "status 503: overloaded",
        5: "its line holds no chat completion",
        6: "status 429: too fast",
    }


def test_answers_that_were_not_stored_are_collected_again_without_pay(server, tmp_path):
    first, _ = collected(server, tmp_path, range(10), stop_after=4)
    assert len(first) == 4
    rest = [number for number in range(10) if number not in first]
    second, reasons = collected(server, tmp_path, rest)
    assert (first | second, reasons) == (contents(range(10)), {})
    stats = server.stats()
    assert (stats["billed"], stats["received"], stats["batches"]) == (10, 1, 1)


def test_batches_of_other_requests_are_neither_waited_for_nor_forgotten(server, tmp_path):
    server.set(batch_seconds=3600)
    with pytest.raises(asyncio.CancelledError):
        collected(server, tmp_path, range(3), sleep=_cancelled)
    server.set(batch_seconds=0)
    assert collected(server, tmp_path, range(3, 6))[0] == contents(range(3, 6))
    with pytest.raises(asyncio.CancelledError):
        collected(server, tmp_path, [1, 2], sleep=_cancelled)
    assert server.stats()["batches"] == 2


async def _cancelled(seconds):
    raise asyncio.CancelledError


def test_what_the_provider_has_deleted_is_asked_again(tmp_path):
    def say(messages, number):
        return f"says {messages[0]['content']}"

    with serving(say) as server:
        first, _ = collected(server, tmp_path, range(5), stop_after=2)
        server.reset()
        second, reasons = collected(server, tmp_path, [n for n in range(5) if n not in first])
        assert (first | second, reasons) == (contents(range(5)), {})


def test_a_provider_that_is_down_is_waited_for_and_then_told(server, tmp_path):
    naps = []
    server.set(down=True)
    with pytest.raises(
        EndpointError, match="failed 8 times in a row, .*503.*run the command again"
    ):
        collected(server, tmp_path, range(5), naps=naps)
    assert naps == [1, 2, 4, 8, 16, 32, 60, 60]
    server.set(down=False)
    assert collected(server, tmp_path, range(5)) == (contents(range(5)), {})


def test_an_upload_that_fails_is_made_whole_again(server, tmp_path):
    naps = []

    def numbers():
        yield from range(9)
        server.set(down=True)

    async def nap(seconds):
        naps.append(seconds)
        server.set(down=len(naps) < 3)

    assert collected(server, tmp_path, numbers(), sleep=nap) == (contents(range(9)), {})
    assert naps == [1, 2, 4]
    assert server.stats()["batches"] == 1


def test_an_endpoint_without_batches_is_told(server, tmp_path):
    server.set(batch_bytes=10)
    with pytest.raises(EndpointError, match="takes no batch of these requests: status 413"):
        collected(server, tmp_path, range(5))


def test_a_wrong_key_shows_before_a_batch_is_bought(server, tmp_path):
    server.set(key="another")
    with pytest.raises(EndpointError, match="refused the key"):
        collected(server, tmp_path, range(5))
    assert server.stats()["files"] == 0


def test_a_server_that_rejects_everything_shows_before_a_batch_is_bought(server, tmp_path):
    server.set(faults={"400": 1.0})
    with pytest.raises(EndpointError, match="something else is wrong"):
        collected(server, tmp_path, range(5))
    assert server.stats()["files"] == 0


def test_a_first_request_of_bad_content_proves_nothing(server, tmp_path):
    server.set(next=["too_long", "", ""])
    answers, _ = collected(server, tmp_path, range(5))
    assert answers[0].startswith("rejected: status 400: maximum context")
    assert server.stats()["received"] == 2


def test_only_what_is_gone_counts_as_gone():
    async def refused(status):
        raise Rejected(status, "", "no")

    assert asyncio.run(_unless_gone(refused(404))) is None
    assert asyncio.run(_unless_gone(refused(410))) is None
    with pytest.raises(Rejected):
        asyncio.run(_unless_gone(refused(400)))


def test_a_batch_that_never_ends_is_given_up_after_two_days(server, tmp_path):
    naps = []

    async def nap(seconds):
        naps.append(seconds)

    server.set(batch_seconds=10**6)
    with pytest.raises(EndpointError, match="not ended 1 batches, such as batch_0, within 48 h"):
        collected(server, tmp_path, range(2), sleep=nap)
    assert 48 * 3600 < sum(naps) < 48 * 3600 + 200


def test_two_jobs_on_one_folder_keep_the_plans_of_each_other(server, tmp_path):
    plan = _Entry("f" * 64, 0, [request(99).key], [5])  # that another job is carrying out
    _Ledger(str(tmp_path)).write(plan)
    assert collected(server, tmp_path, range(4)) == (contents(range(4)), {})
    assert plan in _Ledger(str(tmp_path)).entries()


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*/file/batches/.*set negatives.llm.store"):
        collected(server, tmp_path / "file" / "batches", range(2))


def test_a_foreign_file_in_the_folder_is_named(server, tmp_path):
    (tmp_path / "batch-000000.json").write_text('{"what": 1}')
    with pytest.raises(InputError, match=r"batch-000000\.json: expected a file that records"):
        collected(server, tmp_path, range(5))


def test_folders_may_be_any_fsspec_url(server):
    answers, _ = collected(server, "memory://batches-of-test", range(5), stop_after=2)
    rest = [number for number in range(5) if number not in answers]
    assert collected(server, "memory://batches-of-test", rest)[0] == contents(rest)
    assert server.stats()["billed"] == 5


def test_the_key_is_in_no_file(server, tmp_path, caplog):
    server.set(echo_key=True, key=CANARY, next=["", "400", "503"], batch_duplicates=1)
    with caplog.at_level(logging.DEBUG):
        answers, reasons = collected(server, tmp_path, range(5))
    files = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    shown = [*files, caplog.text, *answers.values(), *reasons.values()]
    assert not [text for text in shown if CANARY in text]


def test_a_batch_whose_creation_was_not_confirmed_is_found_again(server, tmp_path):
    server.set(batch_lost=1)
    assert collected(server, tmp_path, range(10), max_requests=4) == (contents(range(10)), {})
    assert server.stats()["batches"] == 3
    assert paid_more_than_once(server, range(10)) == {}


# -- kills -----------------------------------------------------------------------------------

NUMBERS = range(14)


def _work(base_url, folder, fatal, moment):
    """Asks for what is not in the file of answers; killed at a step of the job, the `fatal`th."""
    steps = 0

    def reached(when):
        if steps == fatal and when == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    class Client(ChatClient):
        async def exchange(self, send, timeout_seconds=None):
            nonlocal steps
            steps += 1
            reached("before")
            if steps == fatal and moment == "during":
                call = asyncio.create_task(super().exchange(send, timeout_seconds))
                await asyncio.wait([call], timeout=0.15)
                os.kill(os.getpid(), signal.SIGKILL)
            result = await super().exchange(send, timeout_seconds)
            reached("after")
            return result

    async def nap(seconds):
        await asyncio.sleep(0.02)

    async def ask():
        client = Client(LlmConfig(base_url=base_url, model="m"), CANARY)
        with Path(folder, "answers.txt").open("a+") as store:
            store.seek(0)
            have = {line.split()[0] for line in store if line.endswith("\n")}
            wanted = (each for each in map(request, NUMBERS) if each.key not in have)
            results = ask_in_batches(
                *(wanted, client, f"{folder}/batches"),
                **{"schema": SCHEMA, "max_requests": 6, "sleep": nap},
            )
            async for result in results:
                assert isinstance(result, Answer), result
                store.write(f"{result.key} {result.content}\n")
                store.flush()
        await client.close()

    asyncio.run(ask())


@pytest.fixture(scope="module")
def processes():
    """Starts processes that need not import everything anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shine.llm.batches", "test_batches"])
    return context


def exit_code(processes, *arguments):
    process = processes.Process(target=_work, args=arguments)
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode


def killed_and_resumed(processes, server, folder, kills):
    for kill in kills:
        assert exit_code(processes, server.base_url, folder, *kill) == -signal.SIGKILL
    assert exit_code(processes, server.base_url, folder, 0, "") == 0
    lines = (folder / "answers.txt").read_text().splitlines()
    count = collections.Counter(int(line.split()[0], 16) for line in lines)
    assert count == dict.fromkeys(NUMBERS, 1)
    return paid_more_than_once(server, NUMBERS)


# The steps of a job of 14: 1 asks directly; 2, 4 and 6 upload, 3, 5 and 7 create, from 8 on it
# polls and downloads.
@pytest.mark.parametrize(
    ("step", "moment"), [(2, "after"), (3, "during"), (3, "after"), (5, "before"), (9, "after")]
)
def test_a_job_killed_at_a_step_loses_nothing_and_pays_no_batch_twice(
    processes, server, tmp_path, step, moment
):
    server.set(file_pause=0.3 if moment == "during" else 0.0)
    assert killed_and_resumed(processes, server, tmp_path, [(step, moment)]) == {}


def test_a_direct_answer_that_a_kill_loses_is_all_that_is_paid_twice(processes, server, tmp_path):
    assert killed_and_resumed(processes, server, tmp_path, [(1, "after")]) == {0: 2}


@pytest.mark.full
@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_job_killed_at_any_step_pays_no_batch_twice(processes, server, tmp_path, moment):
    server.set(file_pause=0.3 if moment == "during" else 0.0)
    for step in range(2, 17):
        server.reset()
        folder = tmp_path / str(step)
        folder.mkdir()
        assert killed_and_resumed(processes, server, folder, [(step, moment)]) == {}
