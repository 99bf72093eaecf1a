import asyncio
import os
import sys

import pyarrow as pa
import pytest

from pipelines.stage import run_stage
from shine.errors import InputError

pytestmark = pytest.mark.ray


class Doubles:
    def __init__(self, wrong="", bug=""):
        if wrong:
            raise InputError(wrong)
        if bug:
            raise KeyError(bug)

    def __call__(self, table):
        (number,) = table["number"].to_pylist()
        if number == 13:
            raise InputError("13 brings bad luck; leave it out")
        if number == 0:
            os._exit(1)
        return pa.table({"number": [2 * number]})


class AsyncDoubles(Doubles):
    async def __call__(self, table):
        return super().__call__(table)


class Meets:
    """Waits until as many tables are at work as it was told."""

    def __init__(self, together):
        self._all = asyncio.Barrier(together)

    async def __call__(self, table):
        async with asyncio.timeout(60), self._all:
            return table


def doubled(numbers, *arguments, worker=Doubles, at_a_time=1):
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    tables = [ray.put(pa.table({"number": [number]})) for number in numbers]
    made = run_stage(tables, worker, arguments, 1, num_cpus=0.1, at_a_time=at_a_time)
    return [table["number"][0].as_py() for table in made]


@pytest.mark.parametrize("worker", [Doubles, AsyncDoubles])
def test_wrong_input_that_a_worker_finds_is_its_own_sentence(ray_cluster, worker):
    assert doubled([1, 2, 3], worker=worker) == [2, 4, 6]
    with pytest.raises(InputError, match="^no prompt of this name$"):
        doubled([1, 2], "no prompt of this name", worker=worker)
    with pytest.raises(InputError, match="^13 brings bad luck; leave it out$"):
        doubled([1, 13], worker=worker)


def test_an_error_of_creation_is_no_want_of_memory(ray_cluster):
    with pytest.raises(Exception, match="a bug of ours") as error:
        doubled([1], "", "a bug of ours")
    assert "memory;" not in str(error.value)


def test_a_worker_that_dies_again_and_again_is_named(ray_cluster):
    with pytest.raises(RuntimeError, match=r"a worker \(Doubles\) died 4 times"):
        doubled([0])


def test_an_async_worker_has_several_tables_at_a_time(ray_cluster):
    assert doubled(range(6), 3, worker=Meets, at_a_time=3) == [*range(6)]
