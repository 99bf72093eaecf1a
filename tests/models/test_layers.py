import pytest
import recorded
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from shine.models.attention import Attend
from shine.models.layers import Dropout, PReLU, TokenPosition, xavier_linear
from shine.models.position import anchor_position, clip_position
from shine.models.spans import likeliest_span


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(rate):
    torch.manual_seed(0)
    x = torch.ones(401, 503)
    y = Dropout(rate).train()(x)
    assert (y == 0).double().mean().item() == pytest.approx(rate, abs=4e-3)
    assert y.double().mean().item() == pytest.approx(1, abs=5e-3)
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - rate)], rel=1e-4)


def test_dropout_is_decided_element_by_element():
    torch.manual_seed(0)
    dropped = (Dropout(0.5).train()(torch.ones(4000, 8)) == 0).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(8)  # eight neighbours share two draws
    assert correlation.abs().max() < 0.06


def test_dropout_repeats_with_the_seed_and_vanishes_in_evaluation():
    layer, x = Dropout(0.3), torch.randn(3, 5)
    torch.manual_seed(1)
    first = layer.train()(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    assert layer.eval()(x) is x


def test_dropout_of_nothing_is_nothing():
    assert Dropout(0.5).train()(torch.ones(0, 7)).shape == (0, 7)


def test_prelu_is_that_of_torch():
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    layer = PReLU().double()
    grad = torch.randn(50, 7, dtype=torch.float64)
    value = layer(x)
    ours = torch.autograd.grad(value, [x, layer.slope], grad)
    theirs = torch.autograd.grad(F.prelu(x, layer.slope), [x, layer.slope], grad)
    assert torch.equal(value, F.prelu(x, layer.slope))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_xavier_bound_follows_the_matrix_that_is_named():
    torch.manual_seed(0)
    layer = xavier_linear(64, 128, fan_out=192, zero_bias=True)
    bound = (6 / (64 + 192)) ** 0.5
    assert 0.99 * bound < layer.weight.abs().max().item() <= bound
    assert not layer.bias.any()


def attention_by_loop(query, key, value, mask, heads):
    """The mask is [row, head, query, key]."""
    rows, size = [], query.shape[-1] // heads
    width = value.shape[-1] // heads
    for row in range(len(query)):
        parts = []
        for head in range(heads):
            q = query[row][:, head * size : (head + 1) * size]
            k = key[row][:, head * size : (head + 1) * size]
            v = value[row][:, head * width : (head + 1) * width]
            answers = []
            for place, seen in zip(q, mask[row, head], strict=True):
                weights = (k[seen] @ place / size**0.5).softmax(dim=-1)
                answers.append(weights @ v[seen])
            parts.append(torch.stack(answers))
        rows.append(torch.cat(parts, dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_hands_back_the_gradient_of_what_it_kept(dtype):
    torch.manual_seed(0)
    x = torch.randn(301, 401).to(dtype).requires_grad_()
    y = Dropout(0.1).train()(x)
    grad = torch.randn(301, 401).to(dtype)
    y.backward(grad)
    growth = (y / x)[y != 0].float().mean().item()
    assert growth == pytest.approx(1 / 0.9, rel=2e-3)
    torch.testing.assert_close(x.grad, torch.where(y != 0, grad * growth, 0).to(dtype))
    assert (y == 0).double().mean().item() == pytest.approx(0.1, abs=3e-3)


@pytest.mark.parametrize("rate", [0.0, 1e-9])  # the second rate rounds to 0 on the written-out path
@pytest.mark.parametrize("shape", [(3, 1, 1, 4), (3, 2, 5, 4)])  # own padding; any rule
def test_both_paths_of_attention_are_the_loop(rate, shape):
    torch.manual_seed(0)
    query, key = torch.randn(3, 5, 8).double(), torch.randn(3, 4, 8).double()
    value, mask = torch.randn(3, 4, 6).double(), torch.rand(shape) < 0.6
    mask[..., 0] = True
    answer = Attend(2, rate).train()(query, key, value, mask)
    expected = attention_by_loop(query, key, value, mask.expand(3, 2, 5, 4), 2)
    torch.testing.assert_close(answer, expected, atol=1e-12, rtol=0)


def test_attention_weights_are_dropped_in_training_only():
    torch.manual_seed(0)
    layer, mask = Attend(1, 0.5), torch.ones(1, 1, 1, 400, dtype=torch.bool)
    same, value = torch.zeros(1, 1, 4), torch.eye(400)[None]
    dropped = (layer.train()(same, same.expand(1, 400, 4), value, mask) == 0).double().mean()
    assert dropped.item() == pytest.approx(0.5, abs=0.1)
    weights = layer.eval()(same, same.expand(1, 400, 4), value, mask)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 400))


@pytest.mark.parametrize(
    ("name", "width"),
    [
        (name, int(key.removeprefix("pos/sine_dim")))
        for name in recorded.UNITS
        for key in recorded.arrays(name)
        if key.startswith("pos/sine_dim")
    ],
)
def test_published_positions(name, width):
    units = recorded.arrays(name)
    mask, points = units["pos/mask"].bool(), units["anchor/points"]
    expected = units[f"pos/sine_dim{width}"]
    torch.testing.assert_close(clip_position(mask, width), expected, atol=2e-6, rtol=0)
    expected = units[f"anchor/sine_dim{width}"]
    torch.testing.assert_close(anchor_position(points, width), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", recorded.UNITS)
def test_published_token_positions(name):
    units = recorded.under(recorded.arrays(name), "txtpos/")
    layer = TokenPosition(*units["state/position_embeddings.weight"].shape, dropout=0.0)
    layer.table.data = units["state/position_embeddings.weight"]
    layer.norm.weight.data = units["state/LayerNorm.weight"]
    layer.norm.bias.data = units["state/LayerNorm.bias"]
    torch.testing.assert_close(layer(units["input"]), units["output"], atol=2e-6, rtol=0)


@given(st.integers(0, 2**32 - 1))
def test_the_likeliest_span_is_the_best_pair_in_order(seed):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randn(2, 3, 4, 2, 6, generator=generator)
    num_clips = torch.randint(1, 7, (3,), generator=generator)
    spans = likeliest_span(ends, num_clips)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        clips = int(num_clips[place[1]])
        first, last = ends[tuple(place)]
        pairs = [(i, j) for i in range(clips) for j in range(i, clips)]
        i, j = max(pairs, key=lambda pair: (first[pair[0]] + last[pair[1]]).item())
        center, width = spans[tuple(place)].tolist()
        assert center * clips == pytest.approx((i + j + 1) / 2, abs=1e-5)
        assert width * clips == pytest.approx(j + 1 - i, abs=1e-5)
