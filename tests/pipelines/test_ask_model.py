"""The whole way to a language model, on a real cluster and a server on loopback."""

import pyarrow.parquet as pq
import pytest
from chat_server import serving
from tagged import GRID, plain
from test_generate import annotation_file

from benchmarks.negatives import kills
from pipelines.asking import ask_requests
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


SECRET = "sk-canary-4b1d5f9a"


def test_each_caption_is_asked_once_and_the_rows_add_up_to_the_bill(
    ray_cluster, source, tmp_path, caplog
):
    (tmp_path / "key").write_text(SECRET)
    with serving(latency=0.01, key=SECRET) as server:
        settings = config(tmp_path, server, key_file=str(tmp_path / "key"))
        summary, rows = made(settings, source, tmp_path)
        stats = server.stats()
        assert stats["headers"]["Authorization"] == f"Bearer {SECRET}"
        assert set(stats["billed_by_key"].values()) == {1}
        assert len(stats["billed_by_key"]) >= DISTINCT
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

        again = generate(settings, source=source, out=tmp_path / "again.jsonl", num_workers=1)
        assert server.stats()["received"] == stats["received"]
    assert again["dollars"] == pytest.approx(dollars)
    assert read_negatives(tmp_path / "again.jsonl") == read_negatives(tmp_path / "n.parquet")
    assert SECRET not in caplog.text
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "key":
            assert SECRET.encode() not in path.read_bytes(), path


def test_a_wrong_key_is_one_sentence_without_it(ray_cluster, source, tmp_path, caplog):
    (tmp_path / "key").write_text(SECRET)
    with serving(key="another", echo_key=True) as server:
        wrong = config(tmp_path, server, key_file=str(tmp_path / "key"))
        with pytest.raises(InputError, match="refused the key of the file .*/key with") as error:
            generate(wrong, source=source, out=tmp_path / "n.parquet", num_workers=1)
    assert SECRET not in str(error.value) + caplog.text
    assert not (tmp_path / "n.parquet").exists()


def test_faults_and_wrong_answers_lose_nothing(ray_cluster, source, tmp_path):
    faults = {"429": 0.1, "500": 0.1, "reset_body": 0.05, "fenced": 0.1, "truncated": 0.05}
    with serving(latency=0.01, faults=faults) as server:
        summary, rows = made(config(tmp_path, server), source, tmp_path)
    assert summary["rows"] == len(CAPTIONS)
    assert summary["sources"]["llm"] > 2 * len(CAPTIONS)
    assert [row["qid"] for row in rows] == [f"q{i}" for i in range(len(CAPTIONS))]
    assert all(all(row["valid"]) for row in rows)
    assert any("a slot is not filled" in row["refused"][0] for row in rows)  # cut off


def test_a_budget_stops_the_job_and_batches_go_on(ray_cluster, server, source, tmp_path):
    small = config(tmp_path, server, budget=0.05, in_flight=4)
    out = tmp_path / "n.parquet"
    with pytest.raises(Stopped, match=r"the budget of \$0\.05 is spent"):
        generate(small, source=source, out=out, num_workers=1)
    assert not out.exists()
    paid = server.stats()["received"]
    assert 0 < paid < DISTINCT
    before = estimate(small, source=source, num_workers=1)
    assert (before["rows"], before["requests"]) == (len(CAPTIONS), DISTINCT - paid)
    assert before["answered"] == paid
    assert before["dollars_spent"] == pytest.approx(0.05, abs=0.002)
    assert before["dollars"] > 0
    with pytest.raises(Stopped, match="requests can cost .* without --batch"):
        generate(small, source=source, out=out, num_workers=1, batch=True)
    server.set(batch_missing=1, batch_duplicates=1, batch_seconds=0.1)
    large = config(tmp_path, server, budget=100.0)
    summary, rows = made(large, source, tmp_path, batch=True)
    stats = server.stats()
    assert stats["batches"] >= 1
    assert stats["received"] <= paid + 3  # the first request of each round is asked directly
    assert set(stats["billed_by_key"].values()) <= {1, 2}  # 2: its line was missing
    assert summary["sources"]["llm"] > len(CAPTIONS)
    assert all(all(row["valid"]) for row in rows)


def test_killed_jobs_lose_nothing_and_pay_twice_within_the_bound():
    outcome = kills(num=300, times=1)
    assert outcome.rows == 300
    assert outcome.from_model > 300
    assert outcome.paid_again <= outcome.bound


def test_an_estimate_is_for_language_models(tmp_path, source):
    with pytest.raises(InputError, match="negatives.generator is corpus, which costs nothing"):
        estimate(Config(), source=source)


def test_more_requests_on_their_way_than_workers_can_have_are_refused():
    settings = LlmConfig(model="m", in_flight=300)
    with pytest.raises(
        InputError, match=r"in_flight is 300, .* 256 .*set negatives.llm.workers=2 "
    ):
        ask_requests(
            [],
            settings,
            "answers",
            num_requests=0,
            prompt_tokens=0,
            spent=0.0,
            batch=False,
            on_progress=lambda done, total: None,
        )
