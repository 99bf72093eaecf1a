from dataclasses import replace

import examples
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shine.data.batch import Batch, Inputs
from shine.engine import freeze_untrained, train_step
from shine.losses.criterion import Criterion
from shine.models.published import from_published, to_published

seeds = st.integers(0, 2**32 - 1)
every_backbone = pytest.mark.parametrize("variant", examples.VARIANTS, ids=examples.name_of)


def answers(outputs, inputs):
    """Everything a model says, saliency on real clips alone."""
    saliency = outputs.saliency.masked_fill(~inputs.clip_mask[inputs.video], 0)
    ends = [] if outputs.ends is None else [outputs.ends]
    slots = [] if outputs.alignment is None else [outputs.alignment.slots]
    return [outputs.logits, outputs.spans, saliency, *ends, *slots]


def assert_same(first, second, atol=1e-10):
    torch.testing.assert_close(first, second, atol=atol, rtol=0)


@every_backbone
@settings(max_examples=15)
@given(seed=seeds)
def test_padding_changes_nothing(variant, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator)
    model = examples.network(**variant)
    clips = torch.nn.functional.pad(inputs.clips, (0, 0, 0, 2), value=3.0)
    tokens = torch.nn.functional.pad(inputs.tokens, (0, 0, 0, 3), value=-2.0)
    padded = replace(
        inputs,
        clips=clips,
        clip_mask=torch.nn.functional.pad(inputs.clip_mask, (0, 2)),
        tokens=tokens,
        token_mask=torch.nn.functional.pad(inputs.token_mask, (0, 3)),
    )
    expected, outputs = model(inputs), model(padded)
    outputs = replace(outputs, saliency=outputs.saliency[..., :-2])
    assert_same(answers(outputs, inputs), answers(expected, inputs))


@every_backbone
@settings(max_examples=15)
@given(seed=seeds)
def test_what_padding_holds_changes_nothing(variant, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator)
    noisy = replace(
        inputs,
        clips=torch.where(inputs.clip_mask[..., None], inputs.clips, 100.0),
        tokens=torch.where(inputs.token_mask[..., None], inputs.tokens, -100.0),
    )
    model = examples.network(**variant)
    assert_same(answers(model(noisy), inputs), answers(model(inputs), inputs))


@every_backbone
@settings(max_examples=15)
@given(seed=seeds)
def test_order_of_rows_permutes_the_outputs(variant, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator, rows=4, videos=2)
    order = torch.randperm(4, generator=generator)
    permuted = replace(
        inputs,
        video=inputs.video[order],
        tokens=inputs.tokens[:, order],
        token_mask=inputs.token_mask[:, order],
    )
    model = examples.network(**variant)
    expected = [value[:, order] for value in answers(model(inputs), inputs)]
    assert_same(answers(model(permuted), permuted), expected)


@every_backbone
@settings(max_examples=3)
@given(seed=seeds)
def test_a_row_alone_and_unpadded_is_the_row_in_the_batch(variant, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator, rows=4, videos=2)
    model = examples.network(**variant)
    batch = model(inputs)
    for row in range(4):
        video = int(inputs.video[row])
        clips = int(inputs.clip_mask[video].sum())
        for text in range(5):
            real = inputs.token_mask[text, row]
            alone = model(
                Inputs(
                    clips=inputs.clips[video, None, :clips],
                    clip_mask=inputs.clip_mask[video, None, :clips],
                    video=torch.tensor([0]),
                    tokens=inputs.tokens[text, row, real][None, None],
                    token_mask=real[real][None, None],
                )
            )
            assert_same(alone.saliency[0, 0], batch.saliency[text, row, :clips])
            if text == 0:
                assert_same(alone.spans[:, 0], batch.spans[:, row])
                assert_same(alone.logits[:, 0], batch.logits[:, row])


@every_backbone
@settings(max_examples=15)
@given(seed=seeds)
def test_rows_of_one_video_are_those_of_the_video_repeated(variant, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator, rows=4, videos=1)
    repeated = replace(
        inputs,
        clips=inputs.clips.expand(4, -1, -1),
        clip_mask=inputs.clip_mask.expand(4, -1),
        video=torch.arange(4),
    )
    model = examples.network(**variant)
    assert_same(answers(model(inputs), inputs), answers(model(repeated), repeated))


def every_loss(variant):
    """All terms that an option allows."""
    return examples.SHINE_LOSS.model_copy(
        update={
            "hinge_weight": 1.0,
            "giou_weight": 0.0 if "span_clips" in variant else 1.0,
            "align_weight": 0.02 if "align_width" in variant else 0.0,  # as published
        }
    )


# Modules that no loss trains: a published head without use, and anchors that nothing reads.
FROZEN = {"align_clip": ("align_width",), "decoder.refine_head": ("backbone", "span_clips")}


@every_backbone
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_every_parameter_gets_a_gradient_or_stays_as_it_is(variant, layers, rows, rate):
    sizes = {"decoder_layers": layers, "encoder_layers": layers}
    model = examples.network(**variant, **sizes, dropout=rate, input_dropout=rate)
    generator = torch.Generator().manual_seed(0)
    inputs = examples.inputs(generator, rows=rows)
    targets = examples.targets(generator, inputs.clip_mask)
    batch, criterion = Batch(inputs, targets), Criterion(every_loss(variant))
    freeze_untrained(model, criterion, batch)
    outputs = model(inputs)
    assert outputs.spans.shape == (layers, rows, 4, 2)
    assert outputs.saliency.shape == (5, rows, 7)
    criterion(outputs, targets)[0].backward()
    frozen = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert rows > 0 or not parameter.grad.any(), name
        else:
            assert parameter.grad is None
            frozen.add(name.split(".layers")[0].removesuffix(".weight").removesuffix(".bias"))
    expected = {name for name, options in FROZEN.items() if all(o in variant for o in options)}
    if variant["backbone"] != "qd_detr" or layers == 1:
        expected.discard("decoder.refine_head")
    assert frozen == expected


@every_backbone
@pytest.mark.parametrize(("clips", "tokens"), [(1, 1), (1, 4), (7, 1)])
def test_one_clip_and_one_token_are_enough(variant, clips, tokens):
    inputs = examples.inputs(torch.Generator().manual_seed(0), rows=1, clips=clips, tokens=tokens)
    model = examples.network(**variant)
    outputs = model(inputs)
    sum(value.sum() for value in answers(outputs, inputs)).backward()
    assert all(value.isfinite().all() for value in answers(outputs, inputs))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_backbone
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_video_without_clips_leaves_losses_and_gradients_finite(variant, rate):
    generator = torch.Generator().manual_seed(0)
    inputs = examples.inputs(generator)
    clip_mask = inputs.clip_mask.clone()
    clip_mask[1] = False
    inputs = replace(inputs, clip_mask=clip_mask)
    targets = examples.targets(generator, clip_mask)
    inside = targets.inside & clip_mask
    targets = replace(targets, inside=inside, relevance=targets.relevance * inside)
    model = examples.network(**variant, dropout=rate)
    total, parts = Criterion(every_loss(variant))(model(inputs), targets)
    total.backward()
    assert all(part.isfinite() for part in parts.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_backbone
@pytest.mark.parametrize("rows", [0, 1])
def test_a_worker_with_few_rows_computes_the_published_way_too(variant, rows):
    model = examples.network(**variant, compat="reference")
    generator = torch.Generator().manual_seed(0)
    inputs = examples.inputs(generator, rows=rows)
    targets = examples.targets(generator, inputs.clip_mask)
    loss = every_loss(variant).model_copy(update={"compat": "reference"})
    total, _ = Criterion(loss)(model(inputs), targets)
    total.backward()
    assert total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_backbone
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_in_either_precision_lower_the_loss(variant, precision):
    model = examples.network(**variant, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = examples.inputs(generator, dtype=torch.float32)
    targets = examples.targets(generator, inputs.clip_mask, dtype=torch.float32)
    batch, criterion = Batch(inputs, targets), Criterion(every_loss(variant))
    freeze_untrained(model, criterion, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    losses = [
        train_step(model, criterion, optimizer, batch, 0.1, precision)["loss/total"].item()
        for _ in range(20)
    ]
    assert losses[-1] < losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@every_backbone
def test_evaluation_of_one_text_says_the_same_as_training_of_five(variant):
    inputs = examples.inputs(torch.Generator().manual_seed(0))
    model = examples.network(**variant)
    alone = replace(inputs, tokens=inputs.tokens[:1], token_mask=inputs.token_mask[:1])
    outputs, expected = model(alone), model(inputs)
    assert_same(outputs.spans, expected.spans)
    assert_same(outputs.saliency, expected.saliency[:1])


@every_backbone
def test_clips_that_were_projected_before_are_grounded_as_always(variant):
    inputs = examples.inputs(torch.Generator().manual_seed(0))
    model = examples.network(**variant)
    again = model.ground(model.clip_projection(inputs.clips), inputs)
    assert_same(answers(again, inputs), answers(model(inputs), inputs))


@every_backbone
def test_published_names_lead_there_and_back(variant):
    model = examples.network(**variant)
    fit = from_published(model, to_published(model))
    assert [*fit.unused, *fit.missing, *fit.misshapen] == []
    assert fit.state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(fit.state[name], value), name


def test_what_does_not_fit_a_published_state_is_named():
    model = examples.network()
    state = to_published(model)
    state["extra.weight"] = torch.zeros(1)
    del state["saliency_proj1.bias"]
    key = "transformer.encoder.layers.0.self_attn.in_proj_weight"
    state[key] = state[key][:-1]
    fit = from_published(model, state)
    assert fit.unused == ["extra.weight"]
    assert fit.missing == ["saliency_proj1.bias"]
    assert fit.misshapen == [f"{key}: expected [24, 8], got [23, 8]"]
    whole = set(model.state_dict()) - set(fit.state)
    attention = "video_layers.0.attention"
    expected = {f"{attention}.query_key.weight", f"{attention}.value.weight"}
    assert whole == expected | {"saliency_clip.bias"}


@every_backbone
def test_short_numbers_change_a_loss_by_less_than_a_percent(variant):
    sizes = {"hidden": 64, "heads": 4, "feedforward": 128}
    model = examples.network(**(variant | sizes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = examples.inputs(generator, rows=8, dtype=torch.float32)
    targets = examples.targets(generator, inputs.clip_mask, dtype=torch.float32)
    criterion = Criterion(every_loss(variant))
    exact, _ = criterion(model(inputs), targets)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(inputs)
    assert outputs.saliency.dtype == torch.bfloat16
    short, _ = criterion(outputs.float(), targets)
    assert short.item() == pytest.approx(exact.item(), rel=0.01)
    assert short.item() != exact.item()
