from dataclasses import fields, replace

import examples
import pytest
import recorded
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from shine.config import LossConfig
from shine.data.batch import Inputs, Outputs, Targets
from shine.losses.criterion import Criterion
from shine.models import build_model
from shine.models.qd_detr import reference_state
from shine.spans import generalised_iou, to_moments

seeds = st.integers(0, 2**32 - 1)
FULL_SHINE = LossConfig(
    intra_weight=1, inter_weight=1, fine_weights=(1,) * 4, fine_margins=(0.25,) * 4
)


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
    answer = replace(answer, saliency=answer.saliency[:2])
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
    assert not {"loss/intra", "loss/inter", "loss/fine_1"} & parts.keys()
    nothing = {f"{name}_weight": 0.0 for name in ("span", "giou", "label")}
    total, parts = Criterion(LossConfig(**nothing))(answer, targets)
    assert parts.keys() == {"loss/rank", "loss/negative", "loss/total"}
    total.backward()
    assert not answer.spans.grad.any()


def test_a_span_that_only_fits_one_moment_is_not_shared():
    """Two moments, one slot on each: swapping the moments swaps the match, not the loss."""
    answer, targets = example(0, moments=2)
    targets = replace(targets, moment_mask=torch.ones_like(targets.moment_mask))
    criterion = Criterion(examples.SHINE_LOSS)
    swapped = replace(targets, spans=targets.spans.flip(1))
    torch.testing.assert_close(criterion(answer, targets)[0], criterion(answer, swapped)[0])


def hinge(saliency, target):
    """The published saliency hinge, which this project leaves out: two pairs per row."""
    above = saliency.gather(1, target["saliency_pos_labels"])
    below = saliency.gather(1, target["saliency_neg_labels"])
    return (0.2 + below - above).clamp(min=0).sum() * 2 / above.numel()


def against_clip_0(saliency, targets):
    """The published intra term of rows whose moment fills the video, over all rows."""
    total = saliency.new_zeros(())
    for row in (~targets.outside.any(dim=1)).nonzero().flatten().tolist():
        own = saliency[row][targets.inside[row]]
        best = own.topk(max(1, len(own) // 8)).values.mean()
        total = total + (1.0 + own[0] - best).clamp(min=0)
    return total / len(saliency)


@pytest.mark.parametrize(
    ("name", "scenario", "config"),
    [
        ("qd_detr_small", "default_corrected_mask", LossConfig()),
        ("shine_small", "full_red_nohinge_corrected_mask", FULL_SHINE),
    ],
)
def test_published_losses_and_gradients(name, scenario, config):
    values, facts = recorded.arrays(name), recorded.facts(name)
    expected = facts["train_mode"][scenario]
    options = facts["config"]
    model = build_model(
        recorded.model_config(facts),
        clip_width=options["v_feat_dim"],
        token_width=options["t_feat_dim"],
    )
    state = recorded.under(values, "state/")
    model.load_state_dict(reference_state(state))
    inputs = recorded.inputs(recorded.under(values, "input/"))
    target = recorded.under(values, "target/")
    targets = recorded.targets(target, inputs.clip_mask, len(inputs.tokens))
    outputs = model(inputs)
    # The published intra term is a mean over all rows; ours over those with an outside clip.
    as_published = replace(targets, num_outside=targets.num_rows)
    total, parts = Criterion(config)(outputs, as_published)
    found = {key.removeprefix("loss/"): value.item() for key, value in parts.items()}

    losses, saliency = expected["losses"], expected["saliency_parts"]
    for term in ("span", "giou", "label"):
        assert found[term] == pytest.approx(losses[f"loss_{term}"], abs=1e-5)
    weights = {"span": 10, "giou": 1, "label": 4}
    aux = sum(weight * losses[f"loss_{term}_0"] for term, weight in weights.items())
    assert found["aux"] == pytest.approx(aux, abs=2e-5)
    assert found["rank"] == pytest.approx(saliency["rank_contrastive"], abs=1e-5)
    assert found["negative"] == pytest.approx(saliency["neg_pair"], abs=1e-5)
    if config is FULL_SHINE:
        departure = against_clip_0(outputs.saliency[0], targets)
        assert departure > 0
        coarse = found["intra"] + found["inter"] + departure.item()
        assert coarse == pytest.approx(saliency["coarse"], abs=1e-5)
        fine = sum(found[f"fine_{term}"] for term in range(1, 5))
        assert fine == pytest.approx(saliency["fine"], abs=1e-5)
    else:
        departure = hinge(outputs.saliency[0], target)
        assert departure.item() == pytest.approx(saliency["hinge"], abs=1e-5)
    total = total + departure
    assert total.item() == pytest.approx(expected["total"], abs=2e-5)

    # With the departure added the gradients agree as well. A parameter of ours may hold several
    # published ones: number those, and see where each number goes.
    total.backward()
    norms = {key: norm for key, norm in expected["grad_norm_per_param"].items() if norm is not None}
    numbers = {key: torch.full_like(value, i) for i, (key, value) in enumerate(state.items())}
    places = reference_state(numbers)
    squares = torch.zeros(len(state))
    for key, parameter in model.named_parameters():
        squares.index_add_(0, places[key].flatten().int(), parameter.grad.flatten().square())
    for key, norm in zip(state, squares.sqrt().tolist(), strict=True):
        assert abs(norm - norms.get(key, 0.0)) <= 5e-4 * max(norms.get(key, 0.0), 1e-2), key


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
