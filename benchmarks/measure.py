"""Time, parts of time, memory, arithmetic, and what the machine could do."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

MEBIBYTE = 2**20


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """How long `work` takes; on a GPU by its own clock, with no wait inside."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products of `work`, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product: the median of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / median(seconds(device, lambda: torch.mm(a, b)) for _ in range(5))


class Stopwatch:
    """Time by name; time inside a nested name counts for that one alone."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._names: list[str] = []
        self._since = 0.0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Time from here to the end of the block is that of `name`."""
        self._mark()
        self._names.append(name)
        try:
            yield
        finally:
            self._mark()
            self._names.pop()

    def around(self, stack: ExitStack, owner: Any, attribute: str, name: str) -> None:
        """Until `stack` closes, calls of `owner.attribute` are time of `name`."""
        function = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.of(name):
                return function(*arguments, **options)

        stack.enter_context(mock.patch.object(owner, attribute, timed))

    def _mark(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] += now - self._since
        self._since = now


def peak_memory(device: torch.device, work: Callable[[], Any]) -> float | None:
    """MiB that `work` needs on top of what was held; on a CPU call it once per process.

    On a CPU the highest resident size against that before, which Linux alone tells; else None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / MEBIBYTE
    if not Path("/proc/self/status").exists():
        return None
    before = _resident("VmRSS")
    work()
    return (_resident("VmHWM") - before) / 1024


def _resident(name: str) -> int:
    """KiB of an entry of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
