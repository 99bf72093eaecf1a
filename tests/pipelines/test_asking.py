"""The whole way to a language model, on a real cluster and a server on loopback."""

import json

import pyarrow.parquet as pq
import pytest
from chat_server import serving
from tagged import GRID, plain
from test_generate import annotation_file

from pipelines.negatives import estimate, generate
from shine.config import Config, LlmConfig, NegativesConfig
from shine.errors import InputError, Stopped
from shine.language.negatives import read_negatives

pytestmark = pytest.mark.ray
CAPTIONS = [plain(words) for words in GRID] * 2  # every one twice, of other videos
DISTINCT = len(GRID)


@pytest.fixture
def server():
    with serving(latency=0.01) as running:
        yield running


@pytest.fixture
def source(tmp_path):
    return annotation_file(tmp_path / "train.jsonl", CAPTIONS)


def config(tmp_path, server, **llm):
    values = {
        "base_url": server.base_url,
        "model": "m",
        "store": str(tmp_path / "answers"),
        "segment_seconds": 0.2,
        "prompt_price": 1.0,
        "completion_price": 2.0,
    }
    return Config(negatives=NegativesConfig(generator="llm", llm=LlmConfig(**{**values, **llm})))


def made(config, source, tmp_path, name="n.parquet", **more):
    summary = generate(config, source=source, out=tmp_path / name, num_workers=1, **more)
    return summary, pq.read_table(tmp_path / name).to_pylist()


def test_each_caption_is_asked_once_and_the_rows_add_up_to_the_bill(
    ray_cluster, server, source, tmp_path
):
    before = estimate(config(tmp_path, server), source=source)
    assert (before["rows"], before["requests"], before["answered"]) == (len(CAPTIONS), DISTINCT, 0)
    summary, rows = made(config(tmp_path, server), source, tmp_path)
    stats = server.stats()
    assert set(stats["received_by_key"].values()) == {1}
    assert summary["sources"]["llm"] > len(CAPTIONS)
    assert summary["rows"] == len(CAPTIONS)
    assert [sum(not row["valid"][level] for row in rows) for level in range(3)] == [0, 0, 0]
    assert summary["prompt_tokens"] + summary["completion_tokens"] == stats["tokens"]
    dollars = (summary["prompt_tokens"] + 2 * summary["completion_tokens"]) / 1e6
    assert summary["dollars"] == pytest.approx(dollars)
    assert sum(row["dollars"] for row in rows) == pytest.approx(dollars)
    twice = [row for row in rows if row["query"] == rows[0]["query"]]
    assert twice[0]["requests"] == twice[1]["requests"]
    assert [row["dollars"] > 0 for row in twice] == [True, False]

    again, same = made(config(tmp_path, server), source, tmp_path, "again.parquet")
    assert server.stats()["received"] == stats["received"]
    assert same == rows
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "n.parquet").read_bytes()
    after = estimate(config(tmp_path, server), source=source)
    assert (after["requests"], after["answered"]) == (0, len(stats["received_by_key"]))
    assert after["dollars_spent"] == pytest.approx(again["dollars"])


def test_what_the_model_gets_wrong_is_asked_again_and_then_taken_from_the_corpus(
    ray_cluster, source, tmp_path
):
    def answer(messages, number):
        del number
        return '{"levels": [["flies"], ["flies", "moon"]]}' if len(messages) == 2 else "{}"

    with serving(answer) as server:
        summary, rows = made(config(tmp_path, server), source, tmp_path)
        stats = server.stats()
    assert stats["received"] == 2 * DISTINCT
    assert summary["sources"] == {"corpus": 3 * len(CAPTIONS)}
    assert rows[0]["attempts"] == [3, 3, 3]
    assert rows[0]["refused"][0] == "a word outside the vocabulary; a slot is not filled"
    assert all(all(row["valid"]) for row in rows)


def test_faults_delay_and_lose_nothing(ray_cluster, source, tmp_path):
    faults = {"429": 0.1, "500": 0.1, "reset_body": 0.05, "fenced": 0.1, "truncated": 0.05}
    with serving(latency=0.01, faults=faults) as server:
        summary, rows = made(config(tmp_path, server), source, tmp_path)
    assert summary["rows"] == len(CAPTIONS)
    assert summary["sources"]["llm"] > 2 * len(CAPTIONS)
    assert [row["qid"] for row in rows] == [f"q{i}" for i in range(len(CAPTIONS))]
    assert all(all(row["valid"]) for row in rows)


def test_a_budget_stops_the_job_and_a_larger_one_goes_on(ray_cluster, server, source, tmp_path):
    small = config(tmp_path, server, budget=0.05, in_flight=4)
    with pytest.raises(Stopped, match=r"the budget of \$0\.05 is spent"):
        generate(small, source=source, out=tmp_path / "n.parquet", num_workers=1)
    assert not (tmp_path / "n.parquet").exists()
    paid = server.stats()["received"]
    assert 0 < paid < DISTINCT
    with pytest.raises(Stopped, match="0 requests were answered"):
        generate(small, source=source, out=tmp_path / "n.parquet", num_workers=1)
    assert server.stats()["received"] == paid
    with pytest.raises(Stopped, match="requests can cost .* without --batch"):
        generate(small, source=source, out=tmp_path / "n.parquet", num_workers=1, batch=True)
    made(config(tmp_path, server, budget=100.0), source, tmp_path)
    assert set(server.stats()["billed_by_key"].values()) == {1}


def test_a_wrong_key_is_one_sentence_and_shows_nowhere(ray_cluster, source, tmp_path, caplog):
    secret = "sk-canary-4b1d5f9a"
    (tmp_path / "key").write_text(secret)
    with serving(key="another") as server:
        wrong = config(tmp_path, server, key_file=str(tmp_path / "key"))
        with pytest.raises(
            InputError, match="refused the key of the file .*/key with status 401"
        ) as error:
            generate(wrong, source=source, out=tmp_path / "n.parquet", num_workers=1)
    assert secret not in str(error.value) + caplog.text
    with serving(key=secret) as server:
        right = config(tmp_path, server, key_file=str(tmp_path / "key"))
        generate(right, source=source, out=tmp_path / "n.parquet", num_workers=1)
        assert server.stats()["headers"]["Authorization"] == f"Bearer {secret}"
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "key":
            assert secret.encode() not in path.read_bytes(), path


def test_the_providers_batches_give_the_same_file(ray_cluster, server, source, tmp_path):
    summary, rows = made(config(tmp_path, server), source, tmp_path)
    asked = server.stats()["received"]
    server.reset()
    server.set(batch_missing=1, batch_duplicates=1, batch_seconds=0.1)
    other = config(tmp_path, server, store=str(tmp_path / "other"))
    batched, same = made(other, source, tmp_path, "batched.parquet", batch=True)
    assert server.stats()["batches"] >= 1
    assert server.stats()["received"] < asked / 4
    strip = ("prompt_tokens", "completion_tokens", "dollars")
    assert [{k: v for k, v in row.items() if k not in strip} for row in same] == [
        {k: v for k, v in row.items() if k not in strip} for row in rows
    ]
    assert batched["sources"] == summary["sources"]


def test_an_estimate_is_for_language_models(tmp_path, source):
    with pytest.raises(InputError, match="negatives.generator is corpus, which costs nothing"):
        estimate(Config(), source=source)


def test_the_file_reads_back(ray_cluster, server, source, tmp_path):
    generate(config(tmp_path, server), source=source, out=tmp_path / "n.jsonl")
    found = read_negatives(tmp_path / "n.jsonl")
    assert json.loads((tmp_path / "n.jsonl").read_text().splitlines()[0])["masked_queries"]
    assert len(found) == len(CAPTIONS)
