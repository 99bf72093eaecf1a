"""An event loop in which time passes at once."""

import asyncio
import selectors


class _Selector(selectors.DefaultSelector):
    passed = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("nothing will ever happen again")
        self.passed += timeout
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._simulated = _Selector()
        super().__init__(self._simulated)

    def time(self):
        return self._simulated.passed


def run(main):
    """What the coroutine `main` returns; every sleep takes no time."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


async def inline(function):
    """In place of a thread, which simulated time would not wait for."""
    function()
