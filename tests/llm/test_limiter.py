import heapq
import pickle
import random
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shine.config import LlmConfig
from shine.llm.limiter import Grant, Limiter, Permit, Report
from shine.llm.request import Limits


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self):
        return self.now


@dataclass
class Worker:
    """What `Permits` reports, without asyncio."""

    name: str
    todo: int
    held: list = field(default_factory=list)
    report: Report = Report()  # noqa: RUF009
    version: int = 0  # of its next call
    max_waiting: int = 16


@dataclass
class Window:
    """A server's sliding minute."""

    limit: float = float("inf")
    events: deque = field(default_factory=deque)
    total: float = 0.0
    highest: float = 0.0

    def add(self, now, cost):
        while self.events and self.events[0][0] <= now - 60:
            self.total -= self.events.popleft()[1]
        self.events.append((now, cost))
        self.total += cost
        self.highest = max(self.highest, self.total)


class World:
    """Workers, a limiter and a server in simulated time."""

    def __init__(self, config, todo, *, seed=0, latency=(0.15, 0.25), outcome=None, **limiter):
        self.clock, self.config, self.random = Clock(), config, random.Random(seed)
        self.options = limiter
        self.limiter = self.new_limiter()
        self.workers = {f"w{n}": Worker(f"w{n}", count) for n, count in enumerate(todo)}
        self.latency = latency
        self.outcome = outcome or (lambda now: "answered")
        self.requests, self.tokens = Window(), Window()
        self.in_flight = self.most_in_flight = self.answered = self.limited = self.sent = 0
        self.dollars = self.last_answer = 0.0
        self.retry_after = self.limits = None
        self.prompt, self.completion = 100, (20, 80)
        self.stops = set()
        self.events, self.order = [], 0
        for name in self.workers:
            self.at(0.0, "call", name, 0)

    def new_limiter(self):
        return Limiter(self.config, clock=self.clock, random=self.random.random, **self.options)

    def at(self, when, *event):
        self.order += 1
        heapq.heappush(self.events, (when, self.order, event))

    def call(self, worker):
        wanted = (self.prompt,) * min(worker.todo, worker.max_waiting)
        worker.report = replace(worker.report, held=tuple(worker.held))
        grant = pickle.loads(  # what a remote call does with it
            pickle.dumps(self.limiter.exchange(worker.name, worker.report, wanted))
        )
        worker.report = replace(worker.report, retry_after_seconds=None, limits=None)
        if grant.stop:
            self.stops.add(grant.stop)
        for permit in grant.permits:
            worker.held.append(permit)
            worker.todo -= 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.at(self.clock() + self.random.uniform(0, 0.05), "arrive", worker.name, permit)
        worker.version += 1
        if worker.todo or worker.held:
            wait = grant.wait_seconds + self.random.uniform(0, 0.01)
            self.at(self.clock() + wait, "call", worker.name, worker.version)

    def arrive(self, worker, permit):
        now = self.clock()
        self.sent += 1
        outcome = self.outcome(now)
        completion = self.random.randint(*self.completion)
        self.requests.add(now, 1)
        if outcome == "answered":
            self.tokens.add(now, self.prompt + completion)
            self.dollars += self.price(completion)
        latency = self.random.uniform(*self.latency)
        self.at(now + latency, "finish", worker.name, permit, outcome, completion)

    def price(self, completion):
        prices = self.config.prompt_price or 0, self.config.completion_price or 0
        return (self.prompt * prices[0] + completion * prices[1]) / 1e6

    def finish(self, worker, permit, outcome, completion):
        worker.held.remove(permit)
        self.in_flight -= 1
        report = replace(
            worker.report,
            **{outcome: getattr(worker.report, outcome) + 1},
            set_aside=worker.report.set_aside + permit.tokens,
            limits=self.limits(self) if self.limits else None,
        )
        if outcome == "answered":
            self.answered += 1
            self.last_answer = self.clock()
            used = self.prompt + completion
            report = replace(
                report,
                prompt_tokens=report.prompt_tokens + self.prompt,
                answered_tokens=report.answered_tokens + used,
                tokens=report.tokens + used,
                dollars=report.dollars + self.price(completion),
            )
        elif outcome == "limited":
            self.limited += 1
            report = replace(report, retry_after_seconds=self.retry_after)
            worker.todo += 1
        else:
            report = replace(report, failure="HTTP 503")
            worker.todo += 1
        worker.report = report
        self.call(worker)

    def run(self, seconds=float("inf"), until=lambda world: False):
        end = self.clock() + seconds
        while self.events and self.events[0][0] <= end and not until(self):
            self.clock.now, _, (kind, name, *details) = heapq.heappop(self.events)
            worker = self.workers.get(name)
            if worker is None:
                continue
            if kind == "call":
                if details[0] == worker.version and not self.stops:
                    self.call(worker)
            else:
                getattr(self, kind)(worker, *details)
        return self


@pytest.mark.parametrize(("limit", "seconds"), [(10, 600), (60, 600), (300, 180), (2000, 70)])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_requests_per_minute_are_never_exceeded_and_nearly_reached(limit, seconds, num_workers):
    config = LlmConfig(requests_per_minute=limit)
    world = World(config, [10**6] * num_workers).run(seconds)
    assert world.requests.highest <= limit
    assert world.answered >= 0.95 * limit * seconds / 60 - 2


@pytest.mark.parametrize(("limit", "seconds"), [(15_000, 600), (60_000, 180), (300_000, 70)])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_tokens_per_minute_are_never_exceeded_and_nearly_reached(limit, seconds, num_workers):
    config = LlmConfig(tokens_per_minute=limit)
    world = World(config, [10**6] * num_workers).run(seconds)
    assert world.tokens.highest <= limit
    last_minute = world.tokens.total
    assert last_minute >= 0.95 * limit


def test_requests_in_flight_are_never_exceeded_and_reached():
    world = World(LlmConfig(in_flight=7), [200, 200, 200]).run()
    assert world.most_in_flight == 7
    assert world.answered == 600
    assert world.last_answer < 1.1 * 600 * 0.225 / 7


def test_a_storm_of_429_does_not_strangle_the_job():
    storm = random.Random(1)
    world = World(
        LlmConfig(), [1000], outcome=lambda now: "limited" if storm.random() < 0.3 else "answered"
    ).run()
    assert world.answered == 1000
    assert world.last_answer < 1.1 * 1000 / 0.7 * 0.225 / 32


def test_a_server_that_refuses_most_gets_fewer_at_once():
    world = World(LlmConfig(), [10**6])
    world.outcome = lambda now: "limited" if world.in_flight > 4 else "answered"
    world.run(20)
    before = world.limited, world.sent
    world.run(10)
    assert (world.limited - before[0]) / (world.sent - before[1]) < 0.7
    world.outcome = lambda now: "answered"
    world.most_in_flight = 0
    world.run(20)
    assert world.most_in_flight == 32


def test_retry_after_holds_for_every_worker():
    world = World(LlmConfig(), [10**6, 10**6])
    world.run(5)
    world.outcome, world.retry_after = lambda now: "limited", 20.0
    world.run(until=lambda world: world.limited > 0)
    world.run(1)  # what was under way
    sent, heard = world.sent, world.clock()
    world.outcome = lambda now: "answered"
    world.run(until=lambda world: world.sent > sent)
    assert 19 - 1 <= world.clock() - heard <= 22
    world.most_in_flight = 0
    world.run(0.1)
    assert world.most_in_flight < 16  # not all at once
    world.run(5)
    assert world.most_in_flight == 32


def test_headers_are_honoured():
    def limits(world):
        left = max(
            0, 100 - len([1 for at, _ in world.requests.events if at > world.clock() // 60 * 60])
        )
        return Limits(left, None, 60 - world.clock() % 60, None)

    world = World(LlmConfig(), [10**6])
    world.limits = limits
    world.run(59)
    assert 100 - 40 <= world.sent <= 100
    world.run(600)
    assert world.requests.highest <= 200  # a fixed minute of theirs
    assert world.sent >= 60 * 10


def test_permits_of_a_dead_worker_return():
    world = World(LlmConfig(in_flight=4), [10**6, 10**6]).run(2)
    dead = world.workers.pop("w0")
    held = len(dead.held)
    assert held == 2
    world.most_in_flight = world.in_flight = world.in_flight - held
    world.run(29)
    assert world.most_in_flight == 2
    world.run(5)
    assert world.most_in_flight == 4


def test_a_restarted_limiter_learns_what_is_in_flight():
    config = LlmConfig(in_flight=8, requests_per_minute=600, tokens_per_minute=90_000)
    world = World(config, [10**6, 10**6], latency=(1, 3)).run(50)
    world.limiter = world.new_limiter()
    world.run(40)
    world.limiter = world.new_limiter()
    world.run(40)
    assert world.most_in_flight <= 8
    assert world.requests.highest <= 600
    assert world.tokens.highest <= 90_000
    assert world.limiter.answered == world.answered or world.in_flight


@pytest.mark.parametrize(
    ("config", "seconds"),
    [
        (LlmConfig(), 10),
        (LlmConfig(requests_per_minute=120), 200),
        (LlmConfig(tokens_per_minute=30_000), 200),
    ],
)
def test_a_worker_that_asks_for_much_does_not_starve_others(config, seconds):
    world = World(config, [10**6, 10**6, 10**6])
    world.workers["w1"].max_waiting = world.workers["w2"].max_waiting = 2
    world.workers["w0"].max_waiting = 60
    world.run(seconds)
    answered = [worker.report.answered for worker in world.workers.values()]
    assert min(answered) > 0.5 * max(answered) or config.requests_per_minute is None
    assert min(answered) > 60


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    budget=st.floats(0.001, 0.05),
    failing=st.floats(0, 0.3),
    num_workers=st.integers(1, 4),
)
def test_the_budget_is_never_exceeded(seed, budget, failing, num_workers):
    config = LlmConfig(
        prompt_price=1.0, completion_price=4.0, budget=budget, max_tokens=80, in_flight=8
    )
    chance = random.Random(seed)
    world = World(
        config,
        [40] * num_workers,
        seed=seed,
        outcome=lambda now: "limited" if chance.random() < failing else "answered",
    ).run()
    assert world.dollars <= budget
    most = (100 * 1.0 + 80 * 4.0) / 1e6
    if world.stops:
        (stop,) = world.stops
        assert "the budget of $" in stop
        assert f"{world.answered} requests were answered" in stop
        assert world.dollars > budget - most
    else:
        assert world.answered == 40 * num_workers


def test_what_a_dead_worker_may_have_spent_counts():
    config = LlmConfig(prompt_price=1.0, completion_price=4.0, budget=1.0, max_tokens=80)
    clock = Clock()
    limiter = Limiter(config, clock=clock, random=lambda: 0.0)
    grant = limiter.exchange("a", Report(), (100, 100))
    clock.now = 31.0
    limiter.exchange("b", Report(), ())
    assert limiter.dollars == pytest.approx(sum(permit.dollars for permit in grant.permits))
    assert limiter.dollars == pytest.approx(2 * 420e-6)
    limiter.exchange("a", Report(answered=2, dollars=1e-4), ())  # it was only slow
    assert limiter.dollars == pytest.approx(1e-4)


def test_what_was_spent_before_counts():
    config = LlmConfig(prompt_price=1.0, completion_price=4.0, budget=1.0, max_tokens=80)
    limiter = Limiter(config, clock=Clock(), random=lambda: 0.0, spent=0.9999)
    grant = limiter.exchange("a", Report(), (100, 100))
    assert not grant.permits
    assert grant.stop is not None
    assert grant.stop.startswith("the budget of $1.00 is spent ($1.00): 0 requests were answered")


def test_a_budget_too_small_for_one_request_is_not_called_spent():
    config = LlmConfig(budget=0.02, prompt_price=0.0, completion_price=100.0, max_tokens=500)
    limiter = Limiter(config, clock=Clock(), random=lambda: 0.0)
    assert limiter.exchange("a", Report(), (10,)).stop == (
        "what is left of the budget of $0.02 ($0 is spent) is too little for another request, "
        "which may cost $0.05: 0 requests were answered; raise negatives.llm.budget and run the "
        "same command again"
    )


def test_the_breaker_opens_probes_and_closes():
    world = World(LlmConfig(), [10**6])
    world.outcome = lambda now: "answered" if now < 2 or now > 30 else "failed"
    world.run(3)
    assert world.in_flight == 0
    sent = world.sent
    world.run(27)
    assert 2 <= world.sent - sent <= 6  # one by one, ever more rarely
    world.run(40)
    assert world.most_in_flight == 32
    assert not world.stops
    assert world.answered > 1000


def test_an_endpoint_that_stays_down_stops_the_job():
    world = World(LlmConfig(), [10**6], max_down_seconds=600.0)
    world.outcome = lambda now: "answered" if now < 2 else "failed"
    world.run(1000)
    (stop,) = world.stops
    assert stop.startswith("the endpoint has answered nothing for 10 minutes (HTTP 503): ")
    assert f"{world.answered} requests were answered" in stop
    assert 600 < world.clock() < 800


def test_an_idle_time_is_no_trouble():
    clock = Clock()
    limiter = Limiter(LlmConfig(), clock=clock, random=lambda: 0.0)
    limiter.exchange("a", Report(), (10,))
    limiter.exchange("a", Report(limited=20), ())
    clock.now = 10_000.0
    assert len(limiter.exchange("a", Report(limited=21), (10,)).permits) == 1


def test_a_very_long_retry_after_stops_the_job():
    clock = Clock()
    limiter = Limiter(LlmConfig(), clock=clock, random=lambda: 0.0)
    limiter.exchange("a", Report(), (10,))
    grant = limiter.exchange("a", Report(limited=1, retry_after_seconds=7200.0), (10,))
    assert grant.stop == (
        "the endpoint asks to wait for 120 minutes: 0 requests were answered; "
        "run the same command again after that"
    )


def test_without_limits_all_permits_are_granted_at_once():
    limiter = Limiter(LlmConfig(in_flight=3), clock=Clock(), random=lambda: 0.0)
    grant = limiter.exchange("a", Report(), (10, 20, 30, 40))
    permits = (Permit(410.0, 0.0), Permit(420.0, 0.0), Permit(430.0, 0.0))
    assert grant == Grant(permits, 10.0, None)
