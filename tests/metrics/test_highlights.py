import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shine.metrics.highlights import (
    LEVELS,
    Highlights,
    highlight_ap,
    highlight_figures,
    highlight_hit,
)

saliency = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0])  # ties, also with the filling 0
curve = st.lists(saliency, min_size=1, max_size=9)
scores = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=7)
queries = st.lists(st.tuples(curve, scores), min_size=1, max_size=4)


def highlights(rows):
    curves = np.full((len(rows), max(len(curve) for curve, _ in rows)), np.nan)
    relevance = np.zeros((len(rows), max(len(scores) for _, scores in rows), 3), dtype=int)
    for row, (curve_, scores_) in enumerate(rows):
        curves[row, : len(curve_)] = curve_
        relevance[row, : len(scores_)] = scores_
    return Highlights(curves, relevance, np.array([len(scores) for _, scores in rows]))


def slow_ap(curve, labels):
    """Mean, over the distinct recalls, of the best precision at that recall or a higher one."""
    curve = (curve + [0.0] * len(labels))[: len(labels)]
    points = []  # (recall, precision) from the lowest threshold to the highest
    for threshold in sorted(set(curve)):
        taken = [label for value, label in zip(curve, labels, strict=True) if value >= threshold]
        points.append((sum(taken), sum(taken) / len(taken)))
    points.append((0, 1.0))
    best, kept = 0.0, []
    for (recall, precision), (after, _) in zip(points, points[1:], strict=False):
        best = max(best, precision)
        if recall != after:
            kept.append(best)
    return float(np.mean(kept)) if kept else 0.0


def slow_hit(curve, labels):
    top = curve.index(max(curve))
    return float(top < len(labels) and any(labels[top]))


@given(queries)
def test_figures_are_their_spelt_out_form(rows):
    figures = highlight_figures(highlights(rows))
    for name, least in LEVELS.items():
        labels = [[[s >= least for s in clip] for clip in own] for _, own in rows]
        precision = [
            np.mean([slow_ap(curve, [clip[i] for clip in own]) for i in range(3)])
            for (curve, _), own in zip(rows, labels, strict=True)
        ]
        hits = [slow_hit(curve, own) for (curve, _), own in zip(rows, labels, strict=True)]
        np.testing.assert_allclose(figures[f"HL-min-{name}-mAP"], precision, atol=1e-12)
        np.testing.assert_array_equal(figures[f"HL-min-{name}-Hit1"], hits)


@given(queries)
def test_a_stricter_level_never_gains_and_all_lies_in_0_to_1(rows):
    figures = highlight_figures(highlights(rows))
    hits = [figures[f"HL-min-{name}-Hit1"] for name in LEVELS]
    assert (np.diff(hits, axis=0) <= 0).all()
    assert all(((values >= 0) & (values <= 1)).all() for values in figures.values())


@given(scores)
def test_saliency_that_ranks_as_the_annotator_is_perfect_where_there_is_a_highlight(own):
    labels = np.array(own)[None, :, :1] >= 2
    value = highlight_ap(labels[..., 0].astype(float), labels, np.array([len(own)]))
    assert value == [float(labels.any())]


def test_queries_without_labels_do_not_count():
    rows = highlights([([1.0, 2.0], [(4, 4, 4), (0, 0, 0)]), ([1.0], [(0, 0, 0)])])
    unlabelled = Highlights(rows.saliency, rows.relevance, np.array([2, 0]))
    for name, values in highlight_figures(unlabelled).items():
        assert np.isnan(values).tolist() == [False, True], name


def test_the_top_clip_is_the_first_of_equals_even_after_the_labels():
    positive = np.array([[[True], [False]]])
    assert highlight_hit(np.array([[1.0, 1.0, 0.5]]), positive) == [1.0]
    assert highlight_hit(np.array([[1.0, 1.0, 1.5]]), positive) == [0.0]
