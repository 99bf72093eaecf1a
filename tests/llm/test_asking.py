import asyncio
import hashlib
import random
from dataclasses import dataclass, field

import pytest
import simulated

from shine.config import LlmConfig
from shine.errors import InputError
from shine.llm.answers import AnswerStore
from shine.llm.asking import Client, Permits, ask
from shine.llm.client import Completion, EndpointError, RequestFailed
from shine.llm.limiter import Limiter
from shine.llm.request import Answer, Request


def requests(*numbers):
    return [Request(hashlib.sha256(str(n).encode()).hexdigest(), "[]", 100) for n in numbers]


@dataclass
class Endpoint:
    """Answers after 0.2 s what `fault` lets through."""

    fault: object = lambda request: None
    latency: float = 0.2
    asked: list = field(default_factory=list)
    times: list = field(default_factory=list)
    paid: set = field(default_factory=set)
    in_flight: int = 0
    most_in_flight: int = 0

    async def complete(self, request, schema):
        self.asked.append(request.key)
        self.times.append(asyncio.get_running_loop().time())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            failure = self.fault(request)
            if failure is None:
                self.paid.add(request.key)
            await asyncio.sleep(self.latency)
            if failure is not None:
                raise failure
            return Completion(Answer(request.key, "{}", "", 100, 50, 0.001, "m"), None)
        finally:
            self.in_flight -= 1


@dataclass
class Bench:
    """A limiter in this process and what asks through it."""

    folder: object
    config: LlmConfig = LlmConfig()  # noqa: RUF009
    seed: int = 0
    delay: float = 0.0  # of an exchange

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.store = AnswerStore(str(self.folder))
        clock = asyncio.get_running_loop().time
        self.limiter = Limiter(self.config, clock=clock, random=self.random.random)
        self.exchanges = 0
        self.permits = Permits("worker", self.exchange)

    async def exchange(self, worker, report, wanted):
        self.exchanges += 1
        grant = self.limiter.exchange(worker, report, wanted)
        if self.delay:
            await asyncio.sleep(self.delay)
        return grant

    async def ask(self, batch, asked, endpoint, *, offload=simulated.inline, permits=None):
        writer = self.store.writer(
            batch,
            segment_answers=self.config.segment_answers,
            segment_seconds=self.config.segment_seconds,
            offload=offload,
        )
        return await ask(
            asked,
            endpoint,
            permits or self.permits,
            writer,
            schema=None,
            attempts=self.config.attempts,
            random=self.random.random,
            finished=self.store.finished(batch),
        )


def test_every_request_is_answered_and_durable(tmp_path):
    async def main():
        bench, endpoint = Bench(tmp_path), Endpoint()
        assert isinstance(endpoint, Client)
        asked = requests(*range(100), 3, 4)
        result = await bench.ask("b", asked, endpoint)
        assert [answer.key for answer in result.answers] == [request.key for request in asked]
        assert len(endpoint.asked) == result.attempts == 100
        assert endpoint.most_in_flight == 32
        assert not bench.store.load().missing([request.key for request in asked]).any()
        assert bench.limiter.answered == 100
        assert bench.limiter.dollars == pytest.approx(0.1)
        again = await bench.ask("b", asked, endpoint)
        assert again.answers == result.answers
        assert again.attempts == 0

    simulated.run(main())


def test_the_exchanges_cost_less_than_a_twentieth(tmp_path):
    async def main():
        bench = Bench(tmp_path, delay=0.002)
        await asyncio.gather(
            *(
                bench.ask(f"b{n}", requests(*range(1000 * n, 1000 * n + 320)), Endpoint())
                for n in range(4)
            )
        )
        ideal = 4 * 320 / 32 * 0.2
        assert asyncio.get_running_loop().time() < 1.05 * ideal
        assert bench.exchanges < 4 * 320

    simulated.run(main())


def test_failed_attempts_are_repeated_after_ever_longer_pauses(tmp_path):
    async def main():
        bench = Bench(tmp_path, LlmConfig(attempts=5))
        endpoint = Endpoint(lambda request: RequestFailed("down", "unavailable", 503))
        bench.random.random = lambda: 0.999
        result = await bench.ask("b", requests(1), endpoint)
        assert result.answers == (None,)
        assert result.failures == {"unavailable": 5}
        pauses = [b - a - 0.2 for a, b in zip(endpoint.times, endpoint.times[1:], strict=False)]
        assert pauses == pytest.approx([0.5, 1, 2, 4], abs=0.02)
        assert bench.limiter.dollars == 0

    simulated.run(main())


def test_nothing_is_sent_before_the_endpoint_said(tmp_path):
    async def main():
        bench, endpoint = Bench(tmp_path), Endpoint()
        endpoint.fault = lambda request: (
            RequestFailed("slow down", "limited", 429, 20.0) if len(endpoint.times) <= 32 else None
        )
        result = await bench.ask("b", requests(*range(40)), endpoint)
        assert None not in result.answers
        assert min(endpoint.times[32:]) >= 20.2
        assert min(endpoint.times[32:]) <= 23

    simulated.run(main())


@pytest.mark.parametrize(("kind", "status"), [("limited", 429), ("unavailable", 503)])
def test_an_endpoint_that_asks_to_wait_for_a_day_ends_the_batch(tmp_path, kind, status):
    async def main():
        bench, endpoint = Bench(tmp_path), Endpoint()
        endpoint.fault = lambda request: (
            RequestFailed("later", kind, status, 80_000.0) if len(endpoint.asked) > 40 else None
        )
        result = await bench.ask("b", requests(*range(100)), endpoint)
        assert asyncio.get_running_loop().time() < 60
        assert len(endpoint.asked) <= 40 + 32
        assert sum(answer is not None for answer in result.answers) == 40
        assert result.stop is not None
        assert result.stop.startswith("the endpoint asks to wait for 1")
        assert len(bench.store.load()) == 40

    simulated.run(main())


def test_a_storm_of_429_ends_with_every_answer(tmp_path):
    async def main():
        bench = Bench(tmp_path)
        storm = random.Random(3)
        endpoint = Endpoint(
            lambda request: RequestFailed("", "limited", 429) if storm.random() < 0.3 else None
        )
        result = await bench.ask("b", requests(*range(1000)), endpoint)
        assert sum(answer is None for answer in result.answers) <= 2
        assert asyncio.get_running_loop().time() < 1.6 * 1000 / 0.7 / 32 * 0.2 + 10

    simulated.run(main())


def test_an_endpoint_that_will_never_answer_ends_the_batch_and_keeps_what_is_there(tmp_path):
    async def main():
        bench, endpoint = Bench(tmp_path), Endpoint()
        endpoint.fault = lambda request: (
            EndpointError("the key is wrong") if len(endpoint.asked) > 64 else None
        )
        with pytest.raises(EndpointError, match="the key is wrong"):
            await bench.ask("b", requests(*range(1000)), endpoint)
        assert len(bench.store.load()) >= 32
        assert endpoint.in_flight == 0
        await asyncio.sleep(1)
        assert len(asyncio.all_tasks()) == 1

    simulated.run(main())


def test_a_spent_budget_leaves_requests_unanswered_and_says_so(tmp_path):
    async def main():
        config = LlmConfig(prompt_price=1.0, completion_price=18.0, budget=0.0505, max_tokens=50)
        bench, endpoint = Bench(tmp_path, config), Endpoint()
        result = await bench.ask("b", requests(*range(100)), endpoint)
        assert sum(answer is not None for answer in result.answers) == 50
        assert result.stop is not None
        assert result.stop.startswith("the budget of $0.05 is spent ($0.05): 50 requests")
        assert len(bench.store.load()) == 50
        other = await bench.ask("c", requests(*range(200, 210)), endpoint)
        assert other.stop == result.stop

    simulated.run(main())


def test_a_storage_that_fails_ends_the_batch(tmp_path):
    (tmp_path / "segments").write_text("")

    async def main():
        bench = Bench(tmp_path)
        with pytest.raises(
            InputError, match="cannot write .*/segments/.*; set negatives.llm.store"
        ):
            await bench.ask("b", requests(*range(100)), Endpoint())

    simulated.run(main())


def test_a_limiter_that_fails_ends_the_batch(tmp_path):
    async def main():
        bench = Bench(tmp_path)

        async def exchange(worker, report, wanted):
            raise RuntimeError("the limiter is gone")

        with pytest.raises(RuntimeError, match="the limiter is gone"):
            await bench.ask("b", requests(1, 2), Endpoint(), permits=Permits("w", exchange))

    simulated.run(main())


def test_a_request_on_its_way_keeps_the_worker_alive(tmp_path):
    async def main():
        bench = Bench(tmp_path, LlmConfig(in_flight=2))
        endpoint = Endpoint(latency=100.0)
        await bench.ask("b", requests(*range(4)), endpoint)
        assert endpoint.most_in_flight == 2
        assert bench.limiter.dollars == pytest.approx(0.004)
        assert 15 <= bench.exchanges <= 50
        await asyncio.sleep(1000)
        assert len(asyncio.all_tasks()) == 1

    simulated.run(main())


@dataclass
class Job:
    """Batches of one worker, some at a time, with a storage that takes its time."""

    folder: object
    chance: random.Random
    write_seconds: float
    config = LlmConfig(in_flight=8, segment_answers=4, segment_seconds=2.0)
    at_a_time = 3

    def __post_init__(self):
        self.endpoint = Endpoint(
            lambda request: (
                RequestFailed("", "limited", 429) if self.chance.random() < 0.1 else None
            )
        )

    async def offload(self, write):
        await asyncio.sleep(self.write_seconds * self.chance.random())
        write()

    async def run(self):
        bench = Bench(self.folder, self.config)
        free = asyncio.Semaphore(self.at_a_time)

        async def one(batch):
            async with free:
                asked = requests(*range(100 * batch, 100 * batch + 20))
                return await bench.ask(f"b{batch}", asked, self.endpoint, offload=self.offload)

        return await asyncio.gather(*(one(batch) for batch in range(6)))

    async def lost_if_killed(self, seconds):
        task = asyncio.ensure_future(self.run())
        await asyncio.sleep(seconds)
        durable = AnswerStore(str(self.folder)).load().table["key"].to_pylist()
        lost = len(self.endpoint.paid - {key.hex() for key in durable})
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return lost


@pytest.mark.parametrize("write_seconds", [0.0, 0.3, 5.0])
def test_a_kill_loses_no_more_than_the_bound(tmp_path, write_seconds):
    chance = random.Random(1)
    worst = 0
    for trial in range(6):
        job = Job(tmp_path / str(trial), chance, write_seconds)
        lost = simulated.run(job.lost_if_killed(chance.uniform(0, 4)))
        assert lost <= job.config.in_flight + job.at_a_time * (job.config.segment_answers - 1)
        worst = max(worst, lost)
        results = simulated.run(job.run())
        assert all(None not in result.answers for result in results)
    assert worst >= job.config.in_flight
