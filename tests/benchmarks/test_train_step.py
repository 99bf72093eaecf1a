import json
import time
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import plain, train_step
from benchmarks.examples import BATCH_SIZE, CLIP_WIDTH, CLIPS, TOKENS, bucketed, examples, shuffled
from benchmarks.measure import Stopwatch, flops
from shine.config import LossConfig
from shine.data.dataset import collate


def test_both_sides_get_the_same_rows():
    loss = LossConfig(fine_weights=(1,) * 4, fine_margins=(1,) * 4)
    given = examples("equal", None, loss)
    (batch,) = bucketed(given.dataset)
    ours = collate(given.dataset, batch, rank=0, world_size=1)
    rows = [given.rows[row] for row in batch.rows]
    inputs, targets = plain.collate(rows, np.random.default_rng(0))
    assert inputs["src_vid"].shape == (BATCH_SIZE, CLIPS, CLIP_WIDTH + 2)
    assert inputs["src_txt"].shape[1] == TOKENS
    clips = ours.inputs.clips[ours.inputs.video]
    torch.testing.assert_close(clips, inputs["src_vid"], atol=1e-6, rtol=0)
    texts = torch.cat([inputs["src_txt"][None], inputs["src_hn_txt"]])
    assert torch.equal(ours.inputs.tokens[[0, 2, 3, 4]], texts)
    spans = torch.stack(list(targets["span_labels"]))
    torch.testing.assert_close(ours.targets.spans, spans, atol=1e-5, rtol=0)


def test_a_window_of_real_lengths_pads_less_in_our_batches():
    given = examples("real", None, LossConfig())
    lengths = given.dataset.num_clips
    ours = [batch.rows for batch in bucketed(given.dataset)]
    published = shuffled(len(given.rows))
    padded = [sum(lengths[rows].max() * len(rows) for rows in order) for order in (ours, published)]
    assert len(ours) == len(published)
    assert all(len(rows) == BATCH_SIZE for rows in ours)
    assert sorted(np.concatenate(ours)) == sorted(np.concatenate(published))
    assert [len(row.clips) for row in given.rows] == lengths.tolist()
    assert lengths.sum() < padded[0] < 0.9 * padded[1]


def test_time_of_a_nested_part_is_its_own():
    watch, inner = Stopwatch(torch.device("cpu")), SimpleNamespace(work=lambda: time.sleep(0.05))
    with ExitStack() as stack, watch.of("outer"):
        watch.around(stack, inner, "work", "inner")
        inner.work()
    assert watch.seconds["inner"] >= 0.05
    assert watch.seconds["outer"] < 0.04


def test_operations_of_a_product_and_its_gradient_are_counted():
    a, b = torch.randn(8, 4, requires_grad=True), torch.randn(4, 2)
    assert flops(lambda: (a @ b).sum().backward()) == 2 * (2 * 8 * 4 * 2)


@pytest.mark.full
def test_the_command_measures_both_sides(tmp_path, capsys):
    file = tmp_path / "figures.json"
    one = "--backbones qd_detr --methods shine --precisions float32 --lengths equal"
    train_step.main(f"{one} --repeats 1 --threads 1 --device cpu --json {file}".split())
    assert "qd_detr" in capsys.readouterr().out
    (found,) = json.loads(file.read_text())["cases"]
    assert found["ratio"] > 0
    for side in train_step.SIDES:
        figures = found[side]
        assert figures["peak_mebibytes"] > 0
        assert 6.5e9 < figures["flops_per_sample"] < 7.5e9 or side == "ours"
        assert {part for part, spent in figures["parts"].items() if spent > 0} == {
            *train_step.PARTS
        }
