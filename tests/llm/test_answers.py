import asyncio
import hashlib
import json
import os
import random

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import simulated
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from s3_server import serving_s3

from shine.errors import InputError
from shine.llm.answers import SCHEMA, Answers, AnswerStore
from shine.llm.request import Answer


def answer(number, content="good", problem=""):
    key = hashlib.sha256(str(number).encode()).hexdigest()
    return Answer(key, content, problem, 10, number, number / 1000, "a-model")


@pytest.fixture(scope="module")
def bucket():
    with serving_s3() as url:
        yield url


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path, bucket):
    if request.param == "local":
        return str(tmp_path / "an [odd] name")
    if request.param == "s3":
        return f"{bucket}/{tmp_path.name}/answers"
    MemoryFileSystem.store.clear()
    return "memory://answers"


def contents(answers):
    return {row["key"].hex(): row["content"] for row in answers.table.to_pylist()}


def test_what_is_written_is_loaded(url):
    store = AnswerStore(url)
    assert len(store.load()) == 0
    store.write_segment("b1", [answer(1), answer(2)])
    store.write_segment("b2", [answer(3, content='näïve "\n☃')])
    answers = store.load()
    assert len(answers) == 3
    assert answers.get(answer(3).key) == answer(3, content='näïve "\n☃')
    assert answer(1).key in answers
    assert answer(4).key not in answers
    assert answers.get(answer(4).key) is None
    assert list(answers.missing([answer(n).key for n in (4, 1, 5, 3)])) == [
        True,
        False,
        True,
        False,
    ]
    assert Answers(answers.table).get(answer(2).key) == answer(2)


def test_a_batch_finds_what_it_wrote(url):
    store = AnswerStore(url)
    store.write_segment("b1", [answer(1), answer(2, "", "refused: no")])
    store.write_segment("b1", [answer(2)])
    store.write_segment("b10", [answer(3)])
    assert store.finished("b1") == {answer(1).key: answer(1), answer(2).key: answer(2)}
    assert store.finished("b2") == {}


def test_compaction_keeps_every_answer_in_one_file(url, tmp_path):
    store = AnswerStore(url)
    for batch in range(5):
        store.write_segment(f"b{batch}", [answer(10 * batch + n) for n in range(10)])
        if batch % 2:
            store.compact()
    before = contents(store.load())
    store.compact()
    store.compact()
    assert contents(store.load()) == before
    assert len(before) == 50
    fs, root = fsspec.core.url_to_fs(url)
    files = [name for name in fs.find(root) if not name.endswith("/")]
    assert len(files) == 1
    assert hashlib.sha256(fs.cat_file(files[0])).hexdigest() in files[0]


def test_of_two_answers_the_one_with_content_is_taken_then_the_first(url):
    store = AnswerStore(url)
    store.write_segment("a", [answer(1, "", "refused: no"), answer(2, "first")])
    store.write_segment("b", [answer(1, "content"), answer(2, "second")])
    expected = {answer(1).key: "content", answer(2).key: "first"}
    assert contents(store.load()) == expected
    store.compact()
    store.write_segment("a", [answer(1, "", "refused: again"), answer(2, "third")])
    assert contents(store.load()) == expected
    store.compact()
    assert contents(store.load()) == expected


def test_torn_and_foreign_files_are_left_alone(url, caplog):
    store = AnswerStore(url)
    for number in range(4):
        store.write_segment("b", [answer(number)])
    fs, root = fsspec.core.url_to_fs(url)
    torn = sorted(fs.find(f"{root}/segments"))[:2]
    lost = [json.loads(fs.cat_file(name))["key"] for name in torn]
    for name in torn:
        fs.pipe_file(name, fs.cat_file(name)[:-20])
    fs.pipe_file(f"{root}/segments/notes.txt", b"mine")
    fs.pipe_file(f"{root}/answers.parquet", b"mine")
    answers = store.load()
    assert store.torn == 2
    assert len(caplog.records) == 1
    store.compact()
    assert contents(store.load()) == contents(answers)
    assert len(answers) == 2
    assert all(key not in answers for key in lost)
    left = {name.rsplit("/", 1)[1] for name in fs.find(root)}
    assert {"notes.txt", "answers.parquet"} | {name.rsplit("/", 1)[1] for name in torn} < left


def test_what_is_no_text_is_stored_as_far_as_it_goes(url):
    store = AnswerStore(url)
    store.write_segment("b", [answer(1, "half \ud83d of it")])
    store.compact()
    assert store.load().get(answer(1).key).content == "half ? of it"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60), st.integers(0, 45))
def test_lookup_is_that_of_a_dictionary(pairs, probe):
    keys = {
        (first.to_bytes(8, "big") + bytes(22) + last.to_bytes(2, "big")).hex()
        for first, last in pairs
    }
    rows = [
        {**dict.fromkeys(SCHEMA.names, ""), "key": bytes.fromhex(key), "prompt_tokens": 1}
        | {"completion_tokens": 1, "dollars": 0.0}
        for key in sorted(keys)
    ]
    answers = Answers(pa.Table.from_pylist(rows, SCHEMA))
    probes = [
        (first.to_bytes(8, "big") + bytes(22) + probe.to_bytes(2, "big")).hex()
        for first in range(5)
    ]
    assert list(answers.missing(probes)) == [key not in keys for key in probes]
    assert [answers.get(key) is None for key in probes] == [key not in keys for key in probes]
    sliced = Answers(answers.table.slice(1))
    assert list(sliced.missing(probes)) == [key not in sorted(keys)[1:] for key in probes]


class Killed(BaseException):
    """The process is gone."""


class Mortal(LocalFileSystem):
    """Dies at an operation; one that writes dies half-way."""

    protocol = "mortal"
    cachable = False
    left = 10**9

    @classmethod
    def step(cls):
        cls.left -= 1
        if cls.left < 0:
            raise Killed

    def ls(self, path, detail=False, **kwargs):
        self.step()
        return super().ls(path, detail=detail, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        super().pipe_file(path, value[: len(value) // 2])
        self.step()
        super().pipe_file(path, value)
        self.step()

    def put_file(self, lpath, rpath, **kwargs):
        super().put_file(lpath, rpath)
        os.truncate(rpath, os.path.getsize(rpath) // 2)
        self.step()
        super().put_file(lpath, rpath)
        self.step()

    def rm_file(self, path):
        self.step()
        super().rm_file(path)
        self.step()


fsspec.register_implementation("mortal", Mortal, clobber=True)


def test_killed_at_any_operation_nothing_is_lost(tmp_path, monkeypatch):
    for kill_at in range(200):
        folder = tmp_path / str(kill_at)
        store = AnswerStore(f"mortal://{folder}")
        monkeypatch.setattr(Mortal, "left", kill_at)
        durable = set()
        try:
            for batch in range(3):
                store.write_segment(f"b{batch}", [answer(2 * batch), answer(2 * batch + 1)])
                durable |= {answer(2 * batch).key, answer(2 * batch + 1).key}
                if batch:
                    store.compact()
            survived = True
        except Killed:
            survived = False
        monkeypatch.setattr(Mortal, "left", 10**9)
        after = AnswerStore(str(folder))
        assert durable <= set(contents(after.load()))
        after.compact()
        assert durable <= set(contents(after.load()))
        assert after.torn == 0
        if survived:
            break
    assert survived
    assert kill_at > 20


class Busy(LocalFileSystem):
    """Another job compacts while this one reads."""

    protocol = "busy"
    cachable = False
    interruptions = 0
    folder = ""

    def cat_file(self, path, **kwargs):
        if Busy.interruptions:
            Busy.interruptions -= 1
            AnswerStore(Busy.folder).compact()
        return super().cat_file(path, **kwargs)


fsspec.register_implementation("busy", Busy, clobber=True)


@pytest.mark.parametrize("action", ["load", "compact"])
def test_files_may_vanish_while_they_are_read(tmp_path, monkeypatch, action):
    plain = AnswerStore(str(tmp_path))
    for number in range(4):
        plain.write_segment("b", [answer(number)])
    monkeypatch.setattr(Busy, "folder", str(tmp_path))
    monkeypatch.setattr(Busy, "interruptions", 1)
    getattr(AnswerStore(f"busy://{tmp_path}"), action)()
    assert Busy.interruptions == 0
    assert len(plain.load()) == 4


class Flaky(MemoryFileSystem):
    """A remote storage that fails at times."""

    protocol = "flaky"
    cachable = False
    failures = 0

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if Flaky.failures:
            Flaky.failures -= 1
            raise OSError("s3://user:secret@host is busy")
        super().pipe_file(path, value, mode, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


def test_a_failing_storage_is_one_sentence_without_a_secret(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*/file/segments/.*; set negatives\.llm"):
        AnswerStore(str(tmp_path / "file")).write_segment("b", [answer(1)])
    with pytest.raises(InputError, match=r"cannot open nowhere://\.\.\.@host/x"):
        AnswerStore("nowhere://user:secret@host/x")
    monkeypatch.setattr(Flaky, "failures", 1)
    with pytest.raises(InputError) as raised:
        AnswerStore("flaky://x").write_segment("b", [answer(1)])
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_segments_are_written_when_full_or_old(tmp_path):
    async def main():
        loop = asyncio.get_running_loop()
        written = []
        store = AnswerStore(str(tmp_path))
        writer = store.writer("b", segment_answers=3, segment_seconds=5.0, offload=simulated.inline)

        async def add(number, after):
            await asyncio.sleep(after)
            assert writer.has_room == (number != 3)
            await writer.add(answer(number))
            assert answer(number).key in store.load()
            written.append((number, loop.time()))

        await asyncio.gather(add(1, 0), add(2, 1), add(3, 2), add(4, 4), add(5, 5))
        return written

    times = simulated.run(main())
    assert [number for number, _ in times] == [1, 2, 3, 4, 5]
    assert [when for _, when in times] == pytest.approx([2, 2, 2, 9, 9])
    assert len(list((tmp_path / "segments").iterdir())) == 2


def test_an_answer_that_cannot_be_written_raises(tmp_path):
    (tmp_path / "segments").write_text("")

    async def main():
        writer = AnswerStore(str(tmp_path)).writer("b", segment_answers=2, segment_seconds=1.0)
        results = await asyncio.gather(
            writer.add(answer(1)), writer.add(answer(2)), return_exceptions=True
        )
        await writer.flush()
        return results

    assert [type(result) for result in asyncio.run(main())] == [InputError, InputError]


def test_compaction_merges_many_sorted_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("shine.llm.answers._RUN_ANSWERS", 50)
    monkeypatch.setattr("shine.llm.answers._GROUP_ANSWERS", 7)
    store = AnswerStore(str(tmp_path))
    chance = random.Random(0)
    numbers = [chance.randrange(300) for _ in range(600)]
    for start in range(0, 600, 10):
        store.write_segment(
            f"b{start}", [answer(n, f"{start}") for n in numbers[start : start + 10]]
        )
        if start in (200, 400):
            store.compact()
    expected = contents(store.load())
    store.compact()
    answers = store.load()
    assert contents(answers) == expected
    assert len(expected) == len(set(numbers))
    keys = answers.table["key"].to_pylist()
    assert keys == sorted(keys)
    assert np.count_nonzero(answers.missing([answer(n).key for n in range(300)])) == 300 - len(keys)
