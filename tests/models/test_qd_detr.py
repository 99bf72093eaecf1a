from dataclasses import replace

import examples
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shine.config import QdDetrConfig
from shine.data.batch import Inputs
from shine.models import build_model
from shine.models.qd_detr import QdDetr

seeds = st.integers(0, 2**32 - 1)


def answers(outputs, inputs):
    """Everything a model says, saliency on real clips alone."""
    saliency = outputs.saliency.masked_fill(~inputs.clip_mask[inputs.video], 0)
    return [outputs.logits, outputs.spans, saliency]


def assert_same(first, second, atol=1e-10):
    torch.testing.assert_close(first, second, atol=atol, rtol=0)


@pytest.mark.parametrize("clip_width", [2818, 1026])
def test_parameters_are_the_published_number_less_the_text_positions(clip_width):
    published_number = {2818: 7_585_573, 1026: 7_123_237}[clip_width]
    model = build_model(QdDetrConfig(), clip_width=clip_width, token_width=512)
    assert sum(p.numel() for p in model.parameters()) == published_number - 32 * 256 - 2 * 256


def test_initial_weights_follow_the_published_rule():
    torch.manual_seed(0)
    model = build_model(QdDetrConfig(), clip_width=34, token_width=32)
    assert isinstance(model, QdDetr)
    packed, square = (6 / (4 * 256)) ** 0.5, (6 / (2 * 256)) ** 0.5
    layer, slots = model.video_layers[0].attention, model.decoder.layers[0]
    for weight, bound in (
        (layer.query_key.weight, packed),
        (layer.value.weight, packed),
        (layer.out.weight, square),
        (slots.slot_content.weight, square),
        (slots.clip_content.weight, square),
        (model.decoder.refine_head.layers[2].weight, (6 / 258) ** 0.5),
        (model.saliency_clip.weight, 256**-0.5),
        (model.span_head.layers[2].weight, 256**-0.5),
    ):
        assert 0.95 * bound < weight.abs().max().item() <= bound
    for module in (layer.query_key, layer.value, layer.out, slots.slot_out, slots.clip_out):
        assert not module.bias.any()
    assert not model.decoder.refine_head.layers[2].bias.any()
    assert slots.slot_content.bias.any()


@given(seeds)
def test_padding_changes_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator)
    model = examples.network()
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


@given(seeds)
def test_what_padding_holds_changes_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator)
    noisy = replace(
        inputs,
        clips=torch.where(inputs.clip_mask[..., None], inputs.clips, 100.0),
        tokens=torch.where(inputs.token_mask[..., None], inputs.tokens, -100.0),
    )
    model = examples.network()
    assert_same(answers(model(noisy), inputs), answers(model(inputs), inputs))


@given(seeds)
def test_order_of_rows_permutes_the_outputs(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator, rows=4, videos=2)
    order = torch.randperm(4, generator=generator)
    permuted = replace(
        inputs,
        video=inputs.video[order],
        tokens=inputs.tokens[:, order],
        token_mask=inputs.token_mask[:, order],
    )
    model = examples.network()
    expected = [value[:, order] for value in answers(model(inputs), inputs)]
    assert_same(answers(model(permuted), permuted), expected)


@settings(max_examples=8)
@given(seeds)
def test_a_row_alone_and_unpadded_is_the_row_in_the_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator, rows=4, videos=2)
    model = examples.network()
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


@given(seeds)
def test_rows_of_one_video_are_those_of_the_video_repeated(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = examples.inputs(generator, rows=4, videos=1)
    repeated = replace(
        inputs,
        clips=inputs.clips.expand(4, -1, -1),
        clip_mask=inputs.clip_mask.expand(4, -1),
        video=torch.arange(4),
    )
    model = examples.network()
    assert_same(answers(model(inputs), inputs), answers(model(repeated), repeated))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_every_parameter_gets_a_gradient(layers, rows, rate):
    model = examples.network(
        decoder_layers=layers, encoder_layers=layers, dropout=rate, input_dropout=rate
    )
    inputs = examples.inputs(torch.Generator().manual_seed(0), rows=rows)
    outputs = model(inputs)
    assert outputs.spans.shape == (layers, rows, 4, 2)
    assert outputs.saliency.shape == (5, rows, 7)
    weights = torch.linspace(1, 2, outputs.spans.numel()).view_as(outputs.spans)
    total = (outputs.spans * weights).sum() + outputs.logits[..., 0].sum()
    (total + outputs.saliency.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert rows > 0 or not parameter.grad.any(), name


@pytest.mark.parametrize(("clips", "tokens"), [(1, 1), (1, 4), (7, 1)])
def test_one_clip_and_one_token_are_enough(clips, tokens):
    inputs = examples.inputs(torch.Generator().manual_seed(0), rows=1, clips=clips, tokens=tokens)
    model = examples.network()
    outputs = model(inputs)
    (outputs.spans.sum() + outputs.logits.sum() + outputs.saliency.sum()).backward()
    assert all(value.isfinite().all() for value in answers(outputs, inputs))
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_an_anchor_without_width_keeps_answers_and_gradients_finite():
    model = examples.network(dtype=torch.float32)
    model.decoder.anchors.data[:, 1] = -200.0  # its sigmoid is 0 in float32
    outputs = model(examples.inputs(torch.Generator().manual_seed(0), dtype=torch.float32))
    (outputs.spans.sum() + outputs.logits[..., 0].sum() + outputs.saliency.sum()).backward()
    assert outputs.spans.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_evaluation_of_one_text_says_the_same_as_training_of_five():
    inputs = examples.inputs(torch.Generator().manual_seed(0))
    model = examples.network()
    alone = replace(inputs, tokens=inputs.tokens[:1], token_mask=inputs.token_mask[:1])
    outputs, expected = model(alone), model(inputs)
    assert_same(outputs.spans, expected.spans)
    assert_same(outputs.saliency, expected.saliency[:1])
