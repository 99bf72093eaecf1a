"""One limiter for a whole job: requests and tokens per minute, requests in flight, dollars.

Workers call `Limiter.exchange` alone: it hears what a worker has seen since its last call and
grants permits, so one remote call serves many requests. A permit is for one attempt at one request;
a worker returns it by no longer holding it. The limiter is plain arithmetic on an injected clock.

A server that counts a sliding minute never sees more than its limits, as long as a request reaches
it within 0.9 s of being granted: see `_Bucket`. A limiter that is started anew begins with empty
buckets and learns from the workers' reports what is in flight and what was spent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from shine.config import LlmConfig
from shine.llm.request import Limits

_POLL_SECONDS: Final = 0.1  # until asking again where another worker has to return a permit
_LATE_SECONDS: Final = 0.25  # a worker that comes back so much later loses its turn
_FAILURES_TO_OPEN: Final = 10  # in a row
_FIRST_PAUSE_SECONDS: Final = 1.0
_LAST_PAUSE_SECONDS: Final = 60.0
_ENOUGH_OUTCOMES: Final = 8  # for a judgement of the share of 429
_MAX_LIMITED_SHARE: Final = 0.4  # of the requests of a second; above, fewer are allowed in flight
_SPENT_SHARE: Final = 0.9  # a budget of which as much is gone is called spent
_MEMORY_ANSWERS: Final = 1000  # over which the mean length of an answer is taken


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave for one attempt at a request."""

    tokens: float  # set aside, of prompt and answer
    dollars: float  # set aside: the most that the request can cost


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker holds and has seen.

    Counts are totals of the worker's life, so a report that arrives twice does no harm.
    """

    held: tuple[Permit, ...] = ()  # granted and not returned
    answered: int = 0
    failed: int = 0  # unavailable, timed out or broken; also the attempts that were given up
    limited: int = 0  # refused with 429
    set_aside: float = 0.0  # tokens of the permits returned
    prompt_tokens: int = 0  # expected, of the requests answered
    answered_tokens: int = 0  # of prompts and answers, of the requests answered
    tokens: float = 0.0  # used by the permits returned, as far as known
    dollars: float = (
        0.0  # spent; a request that was lost after it may have been billed counts whole
    )
    # Since the last exchange.
    retry_after_seconds: float | None = None  # the longest that a failure asked for
    limits: Limits | None = None  # the last that the endpoint told
    failure: str = ""  # the last, in words


@dataclass(frozen=True, slots=True)
class Grant:
    """What a worker may do now."""

    permits: tuple[Permit, ...]  # for the first of the requests it wants to send, in order
    wait_seconds: float  # until asking again makes sense, if nothing happens before
    stop: str | None = None  # why nothing will be granted any more, in a sentence


class _Bucket:
    """Units per minute, by a token bucket that starts empty.

    In any 60 s it lets `rate * 60 + burst` through at most (one `unit` less, where units are
    whole), which is 98.5 % of the limit: the rest is for requests that reach the server a little
    later than the ones before them.
    """

    def __init__(self, limit: float, unit: float, now: float):
        self._limit = limit
        self._unit = unit
        self._level = 0.0
        self._at = now
        self._largest = unit

    @property
    def _burst(self) -> float:
        return max(1.25 * self._largest, 0.01 * self._limit)

    @property
    def _rate(self) -> float:
        most = 0.985 * self._limit - self._burst + self._unit
        return max(min(most, 0.975 * self._limit), min(self._largest, 0.975 * self._limit)) / 60

    def refill(self, now: float) -> None:
        """The level is that of `now`."""
        self._level = min(self._burst, self._level + self._rate * (now - self._at))
        self._at = now

    def empty(self) -> None:
        """Nothing is left to be taken."""
        self._level = min(0.0, self._level)

    def delay(self, cost: float) -> float:
        """Seconds until `cost` can be taken."""
        self._largest = max(self._largest, min(cost, self._limit))
        return max(0.0, min(cost, self._burst) - self._level) / self._rate

    def take(self, cost: float) -> None:
        """`cost` is gone; a negative one comes back."""
        self._level = min(self._burst, self._level - cost)


@dataclass(slots=True)
class _Worker:
    heard: float
    report: Report = field(default_factory=Report)
    held: int = 0
    held_tokens: float = 0.0
    held_dollars: float = 0.0
    lost_dollars: float = 0.0  # set aside for permits that it held when it was last heard of
    waiting: int = 0
    served: float = 0.0
    due: float = 0.0  # told to ask again then


class Limiter:
    """Grants permits to the workers of one job.

    Args:
        config: the limits, prices and budget.
        clock: seconds, never running backwards.
        random: a number in [0, 1).
        spent: dollars of the budget that are gone before the first request.
        lease_seconds: a worker not heard of for so long is dead, and its permits are free. Workers
            call at least every third of it.
        max_down_seconds: with no answer for so long, in spite of attempts, the job stops.
    """

    def __init__(
        self,
        config: LlmConfig,
        *,
        clock: Callable[[], float],
        random: Callable[[], float],
        spent: float = 0.0,
        lease_seconds: float = 30.0,
        max_down_seconds: float = 600.0,
    ):
        now = clock()
        self._config = config
        self._clock = clock
        self._random = random
        self._spent = spent
        self._lease = lease_seconds
        self._max_down = max_down_seconds
        self._started = now
        self._stop: str | None = None
        self._workers: dict[str, _Worker] = {}
        self._requests = _bucket(config.requests_per_minute, 1.0, now)
        self._tokens = _bucket(config.tokens_per_minute, 0.0, now)
        # Tokens that a request uses beyond those expected of its prompt: at first the most.
        self._extra_total, self._extra_count = float(config.max_tokens), 1.0
        self._turn = 0.0  # how often the worker was served that got the last permit
        self._quiet_until = -math.inf  # a restarted limiter hears every worker first
        # Answer to 429.
        self._allowed = float(config.in_flight)
        self._blocked_until = -math.inf
        self._ramp_seconds = 0.0
        self._outcomes, self._outcomes_limited, self._judged = 0, 0, now
        # What the headers of the endpoint leave, and until when that holds.
        self._left_requests, self._left_requests_until = math.inf, -math.inf
        self._left_tokens, self._left_tokens_until = math.inf, -math.inf
        # Circuit breaker.
        self._in_a_row = 0  # failures without an answer between them
        # Failures and 429 since the last answer: how many, the first and the last.
        self._troubles, self._trouble_first, self._trouble_last = 0, now, now
        self._open_until: float | None = None  # None: closed
        self._pause = _FIRST_PAUSE_SECONDS
        self._probe: str | None = None  # the worker that tries whether the endpoint is back
        self._failure = ""

    @property
    def answered(self) -> int:
        """Requests answered to all workers heard of."""
        return sum(worker.report.answered for worker in self._workers.values())

    @property
    def dollars(self) -> float:
        """Spent before and by all workers heard of; permits lost with a worker count whole."""
        return self._spent + sum(
            worker.report.dollars + worker.lost_dollars for worker in self._workers.values()
        )

    def exchange(self, worker: str, report: Report, wanted: Sequence[int]) -> Grant:
        """Takes a report in and grants permits.

        Args:
            worker: a name that no other process of the job has had.
            report: the worker has one exchange at a time under way, so what it holds is known.
            wanted: the expected tokens of the prompts that wait, in the order of sending.
        """
        now = self._clock()
        for bucket in (self._requests, self._tokens):
            if bucket is not None:
                bucket.refill(now)
        self._bury(now)
        me = self._hear(worker, report, now)
        self._judge(now)
        me.waiting = len(wanted)
        me.served = max(me.served, self._turn - 1)  # what it did not ask for is not made up for
        permits: list[Permit] = []
        wait = self._lease / 3
        if wanted and self._stop is None:
            self._stop = self._down(now)
        share = self._share()
        for prompt_tokens in wanted if self._stop is None else ():
            permit = self._permit(prompt_tokens)
            delay = self._delay(worker, permit, share, now)
            if self._stop is not None:
                break
            if delay > 0:
                wait = min(wait, delay)
                break
            self._take(worker, permit)
            permits.append(permit)
        me.due = now + wait
        return Grant(tuple(permits), wait, self._stop)

    def _bury(self, now: float) -> None:
        """Workers not heard of hold nothing any more."""
        for worker in self._workers.values():
            if now - worker.heard > self._lease and (worker.held or worker.waiting):
                worker.lost_dollars = worker.held_dollars
                worker.held, worker.held_tokens, worker.held_dollars = 0, 0.0, 0.0
                worker.waiting = 0

    def _hear(self, name: str, report: Report, now: float) -> _Worker:
        worker = self._workers.get(name)
        if worker is None:
            worker = self._workers[name] = _Worker(now)
            if report.held or report.answered or report.failed or report.limited:
                self._quiet_until = self._started + self._lease / 3
                worker.report = report  # heard before by the limiter that this one replaces
        last, worker.report, worker.heard = worker.report, report, now
        worker.lost_dollars = 0.0
        worker.held = len(report.held)
        worker.held_tokens = sum(permit.tokens for permit in report.held)
        worker.held_dollars = sum(permit.dollars for permit in report.held)
        if self._tokens is not None:
            set_aside = report.set_aside - last.set_aside
            self._tokens.take(report.tokens - last.tokens - set_aside)
        answered = report.answered - last.answered
        failed = report.failed - last.failed
        limited = report.limited - last.limited
        if answered:
            used = report.answered_tokens - last.answered_tokens
            self._extra_total += used - (report.prompt_tokens - last.prompt_tokens)
            self._extra_count += answered
            if self._extra_count > 2 * _MEMORY_ANSWERS:
                self._extra_total, self._extra_count = self._extra_total / 2, self._extra_count / 2
        self._failure = report.failure or self._failure
        self._count_limited(limited, answered + failed, report.retry_after_seconds, now)
        self._count_failures(answered, failed, limited, now)
        self._read_limits(report, now)
        return worker

    def _count_limited(
        self, limited: int, others: int, retry_after: float | None, now: float
    ) -> None:
        self._outcomes += limited + others
        self._outcomes_limited += limited
        if retry_after is not None:
            until = now + retry_after * (1 + 0.1 * self._random())
            if until > self._blocked_until:
                self._blocked_until = until
                self._ramp_seconds = min(1.0, retry_after)
                for bucket in (self._requests, self._tokens):
                    if bucket is not None:
                        bucket.empty()

    def _count_failures(self, answered: int, failed: int, limited: int, now: float) -> None:
        if answered:
            self._in_a_row = self._troubles = 0
            self._open_until, self._pause, self._probe = None, _FIRST_PAUSE_SECONDS, None
            return
        if failed or limited:
            if not self._troubles or now - self._trouble_last > self._max_down:
                self._troubles, self._trouble_first = 0, now
            self._troubles += failed + limited
            self._trouble_last = now
        self._in_a_row += failed
        if not failed or self._in_a_row < _FAILURES_TO_OPEN:
            return
        if self._open_until is None or (self._probe is not None and now >= self._open_until):
            self._open_until = now + self._pause * (1 + self._random())
            self._pause = min(2 * self._pause, _LAST_PAUSE_SECONDS)
            self._probe = None

    def _read_limits(self, report: Report, now: float) -> None:
        """What is left by the headers; requests under way may or may not be counted in them."""
        limits = report.limits
        if limits is None:
            return
        if limits.remaining_requests is not None:
            self._left_requests = limits.remaining_requests - self._held
            self._left_requests_until = now + (limits.requests_reset_seconds or 0.0)
        if limits.remaining_tokens is not None:
            held = sum(worker.held_tokens for worker in self._workers.values())
            self._left_tokens = limits.remaining_tokens - held
            self._left_tokens_until = now + (limits.tokens_reset_seconds or 0.0)

    def _judge(self, now: float) -> None:
        """Once a second, more or fewer requests are allowed in flight, by the share of 429.

        A server that refuses some requests at random is best asked again; one that refuses most of
        them has too many to deal with.
        """
        if now - self._judged < 1 or self._outcomes < _ENOUGH_OUTCOMES:
            return
        limited = self._outcomes_limited / self._outcomes
        if limited > _MAX_LIMITED_SHARE:
            self._allowed = max(1.0, 0.7 * self._allowed)
        else:
            more = (1 - limited) * self._config.in_flight / 16
            self._allowed = min(float(self._config.in_flight), self._allowed + more)
        self._outcomes, self._outcomes_limited, self._judged = 0, 0, now

    def _down(self, now: float) -> str | None:
        """Why the endpoint is given up, if it is."""
        wait = max(
            self._blocked_until,
            self._left_requests_until if self._left_requests < 1 else now,
            self._left_tokens_until if self._left_tokens < 1 else now,
        )
        if wait - now > self._max_down:
            return (
                f"the endpoint asks to wait for {(wait - now) / 60:.0f} minutes: "
                f"{self._so_far} run the same command again after that"
            )
        if (
            self._troubles < _FAILURES_TO_OPEN
            or self._trouble_last - self._trouble_first <= self._max_down
        ):
            return None
        return (
            f"the endpoint has answered nothing for {self._max_down / 60:.0f} minutes "
            f"({self._failure or 'no reason given'}): {self._so_far} run the same command again "
            f"when it is back"
        )

    @property
    def _so_far(self) -> str:
        return f"{self.answered} requests were answered;"

    @property
    def _held(self) -> int:
        return sum(worker.held for worker in self._workers.values())

    @property
    def _in_flight(self) -> float:
        """Allowed in flight now; after a block the number rises from one."""
        since = self._clock() - self._blocked_until
        if since < self._ramp_seconds:
            return max(1.0, self._allowed * max(0.0, since) / self._ramp_seconds)
        return self._allowed

    def _share(self) -> float:
        """The most permits that a worker may hold, so that every one gets what it wants or as many.

        A worker that wants fewer leaves the rest to the others.
        """
        wants = sorted(worker.held + worker.waiting for worker in self._workers.values())
        rest = self._in_flight
        for position, want in enumerate(wants):
            share = rest / (len(wants) - position)
            if want > share:
                return share
            rest -= want
        return self._in_flight

    def _permit(self, prompt_tokens: int) -> Permit:
        config = self._config
        expected = max(0.0, prompt_tokens + self._extra_total / self._extra_count)
        dollars = (
            prompt_tokens * (config.prompt_price or 0.0)
            + config.max_tokens * (config.completion_price or 0.0)
        ) / 1e6
        return Permit(expected, dollars)

    def _delay(self, name: str, permit: Permit, share: float, now: float) -> float:
        """Seconds until asking for this permit makes sense; 0: it is granted."""
        me = self._workers[name]
        delays = [self._quiet_until - now, self._blocked_until - now]
        if me.held >= max(1, math.ceil(share)) or self._held >= max(1.0, self._in_flight):
            others = self._held > me.held or self._in_flight < self._allowed
            delays.append(_POLL_SECONDS if others else self._lease / 3)  # its own it returns itself
        if self._is_ahead(me, share, now):
            delays.append(_POLL_SECONDS / 2)
        if self._open_until is not None:
            delays.append(self._open_until - now)
            if self._is_probing():
                delays.append(_POLL_SECONDS)
        if self._left_requests < 1:
            delays.append(self._left_requests_until - now)
        if self._left_tokens < permit.tokens:
            delays.append(self._left_tokens_until - now)
        if self._requests is not None:
            delays.append(self._requests.delay(1.0))
        if self._tokens is not None:
            delays.append(self._tokens.delay(permit.tokens))
        delays.append(self._budget_delay(permit))
        return max(0.0, *delays)

    def _budget_delay(self, permit: Permit) -> float:
        budget = self._config.budget
        if budget is None:
            return 0.0
        spent = self.dollars
        reserved = sum(worker.held_dollars for worker in self._workers.values())
        if spent + reserved + permit.dollars <= budget:
            return 0.0
        if not self._held:
            state = f"the budget of ${budget:.2f} is spent (${spent:.2f})"
            if spent < _SPENT_SHARE * budget:
                state = (
                    f"what is left of the budget of ${budget:.4g} (${spent:.4g} is spent) is too "
                    f"little for another request, which may cost ${permit.dollars:.4g}"
                )
            self._stop = (
                f"{state}: {self._so_far} raise negatives.llm.budget and run the same command again"
            )
        return _POLL_SECONDS

    def _is_probing(self) -> bool:
        probe = self._workers.get(self._probe) if self._probe is not None else None
        return probe is not None and probe.held > 0

    def _is_ahead(self, me: _Worker, share: float, now: float) -> bool:
        """Whether another worker that is about to ask has had fewer permits than this one."""
        others = [
            worker.served
            for worker in self._workers.values()
            if worker is not me
            and worker.waiting
            and worker.held < max(1, math.floor(share))
            and worker.due + _LATE_SECONDS > now
        ]
        return bool(others) and me.served >= min(others) + 1

    def _take(self, name: str, permit: Permit) -> None:
        me = self._workers[name]
        me.held += 1
        me.held_tokens += permit.tokens
        me.held_dollars += permit.dollars
        self._turn = max(self._turn, me.served)
        me.served += 1
        me.waiting -= 1
        self._left_requests -= 1
        self._left_tokens -= permit.tokens
        if self._requests is not None:
            self._requests.take(1.0)
        if self._tokens is not None:
            self._tokens.take(permit.tokens)
        if self._open_until is not None:
            self._probe = name


def _bucket(limit: float | None, unit: float, now: float) -> _Bucket | None:
    return None if limit is None else _Bucket(limit, unit, now)
