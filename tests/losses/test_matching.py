from dataclasses import replace

import examples
import pytest
import recorded
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from shine.config import LossConfig
from shine.data.batch import Outputs
from shine.losses.criterion import Criterion
from shine.losses.matching import assign

sizes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 5))


@given(sizes, st.booleans(), st.integers(0, 2**32 - 1))
def test_assignment_costs_what_scipy_pays(size, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, slots, moments = size
    cost = torch.randn(rows, slots, moments, generator=generator, dtype=torch.float64)
    cost = cost.round() if ties else cost
    mask = torch.rand(rows, moments, generator=generator) < 0.7
    cost = cost.masked_fill(~mask[:, None], torch.nan)  # padding may hold anything
    match = assign(cost, mask)
    assert not (match & ~mask[:, None]).any()
    assert (match.sum(dim=1) <= 1).all()
    assert (match.sum(dim=2) <= 1).all()
    for row in range(rows):
        judged = cost[row][:, mask[row]]
        best = judged[linear_sum_assignment(judged)]
        assert match[row].sum() == len(best)
        assert cost[row][match[row]].sum().item() == pytest.approx(best.sum().item(), abs=1e-9)


def test_cost_that_is_not_finite_still_gives_a_match():
    cost = torch.full((2, 3, 2), torch.nan)
    assert assign(cost, torch.ones(2, 2, dtype=torch.bool)).shape == (2, 3, 2)
    assert assign(cost[..., :1], torch.ones(2, 1, dtype=torch.bool)).sum() == 2


@pytest.mark.parametrize("moments", [1, 3])
def test_no_rows_match_nothing(moments):
    mask = torch.ones(0, moments, dtype=torch.bool)
    assert assign(torch.ones(0, 4, moments), mask).shape == (0, 4, moments)


CASES = [
    (name, key.removeprefix("matcher_"))
    for name in recorded.UNITS
    for key in recorded.facts(name)
    if key.startswith("matcher_")
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_published_assignment(name, case):
    units = recorded.under(recorded.arrays(name), f"matcher/{case}/")
    said = recorded.facts(name)[f"matcher_{case}"]
    goals = [units[f"targets/{row}"] for row in range(len(said["sizes"]))]
    spans = torch.nn.utils.rnn.pad_sequence(goals, batch_first=True)
    clip_mask = torch.ones(len(goals), 1, dtype=torch.bool)
    targets = examples.targets(
        torch.Generator().manual_seed(0), clip_mask, moments=spans.shape[1], dtype=torch.float32
    )
    mask = torch.arange(spans.shape[1]) < torch.tensor(said["sizes"])[:, None]
    targets = replace(targets, spans=spans, moment_mask=mask)
    outputs = Outputs(
        logits=units["pred_logits"][None],
        spans=units["pred_spans"][None],
        saliency=torch.zeros(1, len(goals), 1),
    )
    weights = (said["cost_span"], said["cost_giou"], said["cost_class"])
    match = Criterion(LossConfig(matching_weights=weights)).match(outputs, targets)[0]
    first = 0
    for row, goal in enumerate(goals):
        slots, moments = match[row].nonzero().unbind(dim=1)
        assert slots.tolist() == units[f"match_pred/{row}"].tolist()
        assert moments.tolist() == units[f"match_target/{row}"].tolist()
        cost = units["cost"][row, :, first : first + len(goal)]
        again = assign(cost[None], torch.ones(1, len(goal), dtype=torch.bool))[0]
        assert torch.equal(again, match[row, :, : len(goal)])
        first += len(goal)
