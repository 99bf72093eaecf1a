import numpy as np
import pytest
import recorded
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shine.config import EvaluateConfig
from shine.postprocess import corrected, finish, published, suppressed

ACTIVE = {"clip_ts", "round_multiple"}  # the published steps that are switched on
moments = arrays(float, (3, 5, 2), elements=st.floats(-40, 240, width=32))
scores = arrays(float, (3, 5), elements=st.floats(0, 1, width=32)).map(lambda s: -np.sort(-s))


@pytest.mark.parametrize("name", recorded.UNITS)
def test_published_postprocessing_is_reproduced(name):
    cases = [c for c in recorded.facts(name)["postprocess"] if set(c.get("steps", ())) <= ACTIVE]
    assert cases
    for case in cases:
        rows = np.array(case["input"], dtype=float)[None]
        found = published(
            rows[..., :2],
            rows[..., 2],
            limit_seconds=float(case["max_ts"]),
            round_seconds=float(case["clip_length"]),
        )
        expected = np.array(case["output"])[None]
        np.testing.assert_array_equal(found.moments, expected[..., :2])
        np.testing.assert_array_equal(found.scores, expected[..., 2])


@pytest.mark.parametrize("name", recorded.UNITS)
def test_published_suppression_is_reproduced_with_its_order(name):
    cases = recorded.facts(name)["nms"]
    assert cases
    for case in cases:
        rows = np.array(case["predictions"], dtype=float)[None]
        found = suppressed(rows[..., :2], rows[..., 2], case["nms_thd"])
        left = ~np.isnan(found.scores[0])
        kept = np.concatenate([found.moments, found.scores[..., None]], axis=-1)[0, left]
        np.testing.assert_array_equal(kept[: case["max_after_nms"]], case["result"])


def test_ten_moments_enter_suppression():
    rows = np.stack([np.arange(12.0), np.arange(12.0) + 1], axis=-1)[None]
    found = suppressed(rows, np.linspace(0.1, 0.9, 12)[None], 0.5)
    assert found.moments[0, :, 0].tolist() == list(range(9, -1, -1))


@given(moments, scores, st.sampled_from([None, 0.5, 2.0]))
def test_corrected_moments_have_a_length_inside_their_video(moments, scores, step):
    durations = np.array([30.2, 150.0, 7.0])
    found = corrected(moments, scores, durations, round_seconds=step)
    left = ~np.isnan(found.scores)
    assert (np.isnan(found.moments).all(axis=-1) == ~left).all()
    assert (np.diff(left.astype(int), axis=1) <= 0).all()  # NaN comes last
    for row, end in enumerate(durations):
        start, stop = found.moments[row, left[row]].T
        assert ((start >= 0) & (start < stop) & (stop <= end)).all()
        assert (np.diff(found.scores[row, left[row]]) <= 0).all()
        if step is not None:
            assert ((start % step == 0) & ((stop % step == 0) | (stop == end))).all()
        ahead = np.clip(moments[row] if step is None else np.round(moments[row] / step) * step,
                        0, end)  # fmt: skip
        lasting = [pair for pair in ahead.tolist() if pair[0] < pair[1]]
        assert found.moments[row, left[row]].tolist() == lasting


@given(moments, scores)
def test_published_moments_keep_their_places_and_leave_their_video_without_a_limit(moments, scores):
    found = published(moments, scores, limit_seconds=None, round_seconds=None)
    expected = [[[float(f"{x:.4f}") for x in pair] for pair in row] for row in moments]
    assert found.moments.tolist() == expected
    np.testing.assert_allclose(found.scores, scores, atol=5.1e-5)


def test_settings_choose_what_is_done():
    moments, scores = (
        np.array([[[-1.0, 9.26], [8.0, 9.0], [0.4, 1.3]]]),
        np.array([[0.9, 0.5, 0.2]]),
    )
    durations = np.array([8.0])

    def found(**settings):
        return finish(moments, scores, durations, EvaluateConfig(**settings)).moments[0].tolist()

    nothing = [pytest.approx([np.nan, np.nan], nan_ok=True)]
    assert found() == [[0.0, 8.0], [0.4, 1.3], *nothing]
    assert found(round_seconds=2.0) == [[0.0, 8.0], [0.0, 2.0], *nothing]
    assert found(nms_threshold=0.1) == [[0.0, 8.0], *nothing, *nothing]
    assert found(compat="reference") == [[-1.0, 9.26], [8.0, 9.0], [0.4, 1.3]]
    reference = found(compat="reference", limit_seconds=150, round_seconds=2.0)
    assert reference == [[0.0, 10.0], [8.0, 8.0], [0.0, 2.0]]
