from dataclasses import fields, replace

import examples
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from shine.config import LossConfig
from shine.data.batch import Inputs, Outputs, Targets
from shine.losses.alignment import align_loss
from shine.losses.criterion import Criterion
from shine.spans import generalised_iou, to_moments

seeds = st.integers(0, 2**32 - 1)


def outputs(generator, rows, texts=5):
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Outputs(
        logits=normal(3, rows, 4, 2).requires_grad_(),
        spans=normal(3, rows, 4, 2).sigmoid().requires_grad_(),
        saliency=normal(texts, rows, 7).requires_grad_(),
    )


def example(seed, rows=4, **changes):
    generator = torch.Generator().manual_seed(seed)
    clip_mask = examples.mask(rows, 7, generator)
    return outputs(generator, rows), examples.targets(generator, clip_mask, **changes)


def decoder_terms_by_loop(outputs, targets, layer, config):
    """Span, GIoU and label loss of one layer, matched by SciPy."""
    logits, spans = outputs.logits[layer].detach(), outputs.spans[layer].detach()
    span = giou = label = 0.0
    for row, real in enumerate(targets.moment_mask):
        goal = targets.spans[row][real]
        distance = torch.cdist(spans[row], goal, p=1)
        overlap = generalised_iou(to_moments(spans[row]), to_moments(goal))
        share = logits[row].softmax(dim=-1)
        cost = config.span_weight * distance - config.giou_weight * overlap
        matched, moments = linear_sum_assignment(cost - config.label_weight * share[:, :1])
        span += distance[matched, moments].sum().item() / 2
        giou += (1 - overlap[matched, moments]).sum().item()
        for slot, (foreground, background) in enumerate(share.log().tolist()):
            own = foreground if slot in matched else config.background_weight * background
            label -= own / len(logits[row])
    count = targets.moment_mask.sum().item()
    return span / count, giou / count, label / len(logits)


@pytest.mark.parametrize("moments", [1, 2, 3])
@given(seed=seeds)
def test_decoder_terms_are_the_loop_in_every_layer(moments, seed):
    answer, targets = example(seed, moments=moments)
    config = LossConfig(background_weight=0.3, rank_weight=0, negative_weight=0)
    answer = replace(answer, saliency=answer.saliency[:1])
    total, parts = Criterion(config)(answer, targets)
    layers = [decoder_terms_by_loop(answer, targets, layer, config) for layer in range(3)]
    last = [parts[f"loss/{name}"].item() for name in ("span", "giou", "label")]
    assert last == pytest.approx(layers[-1], abs=1e-9)
    weighted = [10 * span + giou + 4 * label for span, giou, label in layers]
    assert parts["loss/aux"].item() == pytest.approx(sum(weighted[:-1]), abs=1e-9)
    assert total.item() == pytest.approx(sum(weighted), abs=1e-9)


def test_total_is_the_weighted_sum_of_the_named_parts():
    answer, targets = example(3)
    config = examples.SHINE_LOSS
    total, parts = Criterion(config)(answer, targets)
    weights = {"aux": 1.0} | {f"fine_{i}": w for i, w in enumerate(config.fine_weights, 1)}
    for name in ("span", "giou", "label", "rank", "negative", "intra", "inter"):
        weights[name] = getattr(config, f"{name}_weight")
    assert parts.keys() == {f"loss/{name}" for name in [*weights, "total"]}
    expected = sum(weight * parts[f"loss/{name}"] for name, weight in weights.items())
    torch.testing.assert_close(total, expected)
    assert not any(part.requires_grad for part in parts.values())
    assert torch.equal(parts["loss/total"], total)


def test_a_term_of_weight_zero_is_not_computed():
    answer, targets = example(0)
    answer = replace(answer, saliency=answer.saliency[:2])
    _, parts = Criterion(LossConfig())(answer, targets)
    assert not {"loss/intra", "loss/inter", "loss/fine_1", "loss/hinge"} & parts.keys()
    nothing = {f"{name}_weight": 0.0 for name in ("span", "giou", "label")}
    total, parts = Criterion(LossConfig(**nothing))(answer, targets)
    assert parts.keys() == {"loss/rank", "loss/negative", "loss/total"}
    total.backward()
    assert answer.spans.grad is None


def test_without_auxiliary_losses_the_last_layer_alone_is_trained():
    answer, targets = example(0)
    plain, parts = Criterion(examples.SHINE_LOSS)(answer, targets)
    config = examples.SHINE_LOSS.model_copy(update={"aux_weight": 0.0})
    total, fewer = Criterion(config)(answer, targets)
    assert parts.keys() - fewer.keys() == {"loss/aux"}
    torch.testing.assert_close(total + parts["loss/aux"], plain)
    total.backward()
    assert not answer.spans.grad[:-1].any()
    assert answer.spans.grad[-1].any()


def test_without_a_partner_there_is_one_text():
    answer, targets = example(0)
    answer = replace(answer, saliency=answer.saliency[:1])
    config = LossConfig(rank_weight=0, negative_weight=0, hinge_weight=1, intra_weight=1)
    _, parts = Criterion(config)(answer, targets)
    assert {"loss/hinge", "loss/intra"} < parts.keys()


@given(seeds)
def test_hinge_is_the_loop(seed):
    answer, targets = example(seed)
    config = LossConfig(rank_weight=0, negative_weight=0, hinge_weight=1, hinge_margin=0.7)
    answer = replace(answer, saliency=answer.saliency[:1])
    losses = [
        2 * max(0, 0.7 + (answer.saliency[0, row, below] - answer.saliency[0, row, above]).item())
        for row, pairs in enumerate(targets.pairs.tolist())
        for above, below in pairs
        if targets.has_pairs[row]
    ]
    _, parts = Criterion(config)(answer, targets)
    expected = sum(losses) / max(len(losses), 1)
    assert parts["loss/hinge"].item() == pytest.approx(expected, abs=1e-9)


@given(seeds)
def test_chosen_ends_are_matched_and_trained_as_the_loop_says(seed):
    answer, targets = example(seed, moments=3)
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randn(3, 4, 4, 2, 7, generator=generator, dtype=torch.float64)
    answer = replace(answer, saliency=answer.saliency[:1], ends=ends)
    config = LossConfig(
        giou_weight=0,
        rank_weight=0,
        negative_weight=0,
        hinge_weight=1,
        matching_weights=(10, 1, 4),  # as published: GIoU has a weight, and no part in the cost
    )
    _, parts = Criterion(config)(answer, targets)
    surprise = 0.0
    for row, real in enumerate(targets.moment_mask):
        share = ends[-1, row].softmax(dim=-1)
        first, last = targets.span_clips[row][real].T
        likely = share[:, 0, first] + share[:, 1, last]  # [slot, moment]
        foreground = answer.logits[-1, row].detach().softmax(dim=-1)[:, :1]
        matched, moments = linear_sum_assignment(-10 * likely - 4 * foreground)
        for slot, moment in zip(matched, moments, strict=True):
            both = share[slot, 0, first[moment]] * share[slot, 1, last[moment]]
            surprise -= both.log().item() / 2
    expected = surprise / targets.moment_mask.sum().item()
    assert parts["loss/span"].item() == pytest.approx(expected, abs=1e-9)


@given(seeds)
def test_alignment_is_the_loop_and_padding_tokens_do_not_count(seed):
    generator = torch.Generator().manual_seed(seed)
    slots, tokens = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 4, 5), (3, 6, 5))
    )
    token_mask = examples.mask(3, 6, generator)
    matched = torch.rand(2, 3, 4, generator=generator) < 0.5
    matched[..., 0] = True
    found = align_loss(
        slots, tokens, token_mask, matched, torch.tensor(3.0).double(), temperature=0.3
    )
    for layer in range(2):
        losses = []
        for row in range(3):
            near = slots[layer, row] @ tokens[row][token_mask[row]].T / 0.3  # [slot, token]
            logits = near.sum(dim=1)
            own = logits[matched[layer, row]].mean()
            losses.append((logits.exp().sum().log() - own).item())
        assert found[layer].item() == pytest.approx(sum(losses) / 3, abs=1e-9)


def test_a_span_that_only_fits_one_moment_is_not_shared():
    """Two moments, one slot on each: swapping the moments swaps the match, not the loss."""
    answer, targets = example(0, moments=2)
    targets = replace(targets, moment_mask=torch.ones_like(targets.moment_mask))
    criterion = Criterion(examples.SHINE_LOSS)
    swapped = replace(targets, spans=targets.spans.flip(1))
    torch.testing.assert_close(criterion(answer, targets)[0], criterion(answer, swapped)[0])


def part_of(batch, rows):
    """The rows of a batch that one worker holds, with the videos that they need."""
    inputs, targets = batch
    own = Inputs(
        clips=inputs.clips[inputs.video[rows]],
        clip_mask=inputs.clip_mask[inputs.video[rows]],
        video=torch.arange(len(rows)),
        tokens=inputs.tokens[:, rows],
        token_mask=inputs.token_mask[:, rows],
    )
    names = {field.name for field in fields(Targets) if not field.name.startswith("num_")}
    kept = {name: getattr(targets, name)[rows] for name in names - {"text_valid"}}
    return own, replace(targets, **kept, text_valid=targets.text_valid[:, rows])


@pytest.mark.parametrize(
    "shares", [([0, 2, 4], [1, 3]), ([3, 1], [], [0, 2, 4]), ([], [4, 3, 2, 1, 0])]
)
@pytest.mark.parametrize("seed", range(3))
def test_workers_that_share_a_batch_compute_its_loss_and_gradient(shares, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator, rows=5, videos=3)
    targets = examples.targets(generator, inputs.clip_mask[inputs.video], graded=True)
    model, criterion = examples.network(seed=seed), Criterion(examples.SHINE_LOSS)
    total, parts = criterion(model(inputs), targets)
    total.backward()
    expected = examples.gradients(model)

    world = len(shares)
    scaled = {f.name: getattr(targets, f.name) / world for f in fields(Targets) if "num_" in f.name}
    model.zero_grad()
    sums = dict.fromkeys(parts, 0.0)
    for rows in shares:
        own, local = part_of((inputs, replace(targets, **scaled)), torch.tensor(rows).long())
        loss, local_parts = criterion(model(own), local)
        (loss / world).backward()
        assert local_parts.keys() == parts.keys()
        assert rows or loss.item() == 0
        sums = {name: value + local_parts[name] / world for name, value in sums.items()}
    torch.testing.assert_close(sums, parts, atol=1e-9, rtol=0)
    torch.testing.assert_close(examples.gradients(model), expected, atol=1e-9, rtol=0)


@given(seeds)
def test_a_row_that_lacks_everything_else_trains_on_its_own_query(seed):
    answer, targets = example(seed)
    lacking = torch.zeros_like(targets.text_valid)
    lacking[0] = True
    counts = examples.counts(targets.moment_mask, targets.outside, lacking)
    targets = replace(targets, text_valid=lacking, **counts)
    total, parts = Criterion(examples.SHINE_LOSS)(answer, targets)
    total.backward()
    for name in ("negative", "inter", "fine_1", "fine_2", "fine_3", "fine_4"):
        assert parts[f"loss/{name}"].item() == 0
    assert not answer.saliency.grad[1:].any()
    assert answer.saliency.grad[0].any()


@pytest.mark.parametrize("width", [1e-7, 1.0])
@pytest.mark.parametrize("clips", [1, 6])
def test_gradients_stay_finite_at_the_edges(width, clips):
    """A moment of almost no width, one that fills its video, a video of one clip."""
    generator = torch.Generator().manual_seed(0)
    inputs = examples.inputs(generator, clips=clips, tokens=1, dtype=torch.float32)
    real = inputs.clip_mask
    targets = examples.targets(generator, real, moments=1, dtype=torch.float32)
    targets = replace(
        targets,
        spans=torch.tensor([0.5, width]).expand(3, 1, 2),
        inside=real,
        relevance=real.float(),
        outside=torch.zeros_like(real),
        num_outside=torch.tensor(0.0),
    )
    model = examples.network(dtype=torch.float32)
    total, parts = Criterion(examples.SHINE_LOSS)(model(inputs), targets)
    total.backward()
    assert parts["loss/intra"].item() == 0
    assert all(part.isfinite() for part in parts.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("moments", [1, 3])
def test_a_step_never_waits_for_the_device(moments):
    """On the meta device there are no values, so reading one would raise."""
    generator = torch.Generator().manual_seed(0)
    inputs = examples.inputs(generator)
    targets = examples.targets(generator, inputs.clip_mask, moments=moments)
    model = examples.network(dropout=0.1, input_dropout=0.5).to("meta")
    outputs = model(inputs.to("meta"))
    total, _ = Criterion(examples.SHINE_LOSS)(outputs, targets.to("meta"))
    total.backward()
    assert total.is_meta
