import examples
import pytest
import torch
from hypothesis import strategies as st

from shine.config import QdDetrConfig
from shine.models import build_model
from shine.models.qd_detr import QdDetr

seeds = st.integers(0, 2**32 - 1)


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


def test_an_anchor_without_width_keeps_answers_and_gradients_finite():
    model = examples.network(dtype=torch.float32)
    model.decoder.anchors.data[:, 1] = -200.0  # its sigmoid is 0 in float32
    outputs = model(examples.inputs(torch.Generator().manual_seed(0), dtype=torch.float32))
    (outputs.spans.sum() + outputs.logits[..., 0].sum() + outputs.saliency.sum()).backward()
    assert outputs.spans.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
