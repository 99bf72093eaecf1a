import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from encoded import store_texts
from tiny import tiny_config, tiny_data

from shine.data.annotations import read_annotations, write_jsonl
from shine.data.dataset import Dataset, collate
from shine.data.loading import Source
from shine.data.packing import pack_store
from shine.data.sampler import GlobalBatch
from shine.data.store import FeatureStore
from shine.errors import InputError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def dataset(root):
    return Source.open(tiny_config(root)).training()


def batch_of(rows, partners=None):
    rows = np.array(rows)
    draws = np.random.default_rng(0).random((len(rows), 4))
    return GlobalBatch(rows, np.array(partners) if partners else np.roll(rows, -1), draws)


def rewritten(root, tmp_path, change):
    """The training split with one change to its first line."""
    lines = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    change(lines[0])
    path = tmp_path / "train.jsonl"
    write_jsonl(path, lines)
    return tiny_config(root, f"data.train={path}")


def test_each_row_has_its_video_and_its_texts(root, dataset):
    rows = [3, 0, 7]
    batch = collate(dataset, batch_of(rows, [0, 7, 3]), rank=0, world_size=1)
    for i, (row, partner) in enumerate(zip(rows, [0, 7, 3], strict=True)):
        annotation = dataset.annotations[row]
        expected = np.load(root / "features" / f"{annotation.vid}.npy")
        expected /= np.linalg.norm(expected, axis=1, keepdims=True) + 1e-5
        length = len(expected)
        video = batch.inputs.video[i]
        assert batch.inputs.clip_mask[video].sum() == length
        clips = batch.inputs.clips[video].numpy()
        np.testing.assert_allclose(clips[:length, :-2], expected, atol=1e-3)
        start = np.arange(length) / length
        np.testing.assert_allclose(clips[:length, -2:], np.c_[start, start + 1 / length], atol=1e-6)
        assert not clips[length:].any()
        texts = [annotation.query, dataset.annotations[partner].query, *annotation.negatives]
        for level, text in enumerate(texts):
            tokens = batch.inputs.tokens[level, i][batch.inputs.token_mask[level, i]]
            number = dataset.texts.add([text])
            np.testing.assert_array_equal(tokens, dataset.texts.gather(number)[0][0])


def test_a_video_with_several_queries_is_stored_once(dataset):
    batch = collate(dataset, batch_of([0, 1, 2]), rank=0, world_size=1)
    assert len(batch.inputs.clips) == 2
    assert batch.inputs.video[0] == batch.inputs.video[1] != batch.inputs.video[2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_shares_of_the_workers_are_the_batch(dataset, world_size):
    batch = batch_of([0, 3, 7, 5, 9])
    whole = collate(dataset, batch, rank=0, world_size=1)
    shares = [collate(dataset, batch, rank=r, world_size=world_size) for r in range(world_size)]
    assert sum(len(share.inputs.video) for share in shares) == 5
    spans = torch.cat([share.targets.spans for share in shares])
    dealt = [i for rank in range(world_size) for i in range(rank, 5, world_size)]
    torch.testing.assert_close(spans, whole.targets.spans[dealt])
    for share in shares:
        torch.testing.assert_close(share.targets.num_rows * world_size, whole.targets.num_rows)
        torch.testing.assert_close(share.targets.num_both * world_size, whole.targets.num_both)


def test_rows_without_partner_or_negatives_are_marked_and_not_counted(root, tmp_path):
    def drop(record):
        record["recomposed_queries"] = record["recomposed_queries"][:1]

    dataset = Source.open(rewritten(root, tmp_path, drop)).training()
    batch = collate(dataset, batch_of([0, 2, 4], [2, -1, 0]), rank=0, world_size=1)
    valid = batch.targets.text_valid
    assert valid.T.tolist() == [
        [True, True, True, False, False],
        [True, False, True, True, True],
        [True, True, True, True, True],
    ]
    expected = valid.float() @ valid.float().T
    torch.testing.assert_close(batch.targets.num_both, expected)
    assert batch.inputs.token_mask.any(dim=-1).all()


def test_a_span_and_its_clips_agree_with_the_moment(dataset):
    batch = collate(dataset, batch_of([0, 1, 2, 3]), rank=0, world_size=1)
    for i in range(4):
        annotation = dataset.annotations[i]
        ((start, end),) = annotation.moments
        center, width = batch.targets.spans[i, 0].tolist()
        seconds = annotation.duration_seconds
        np.testing.assert_allclose([center - width / 2, center + width / 2],
                                   [start / seconds, end / seconds], atol=1e-6)  # fmt: skip
        assert batch.targets.inside[i].nonzero()[:, 0].tolist() == list(range(int(start), int(end)))
        real = batch.inputs.clip_mask[batch.inputs.video[i]]
        torch.testing.assert_close(batch.targets.outside[i], real & ~batch.targets.inside[i])


@pytest.mark.parametrize(
    ("moment", "clips"),
    [
        ([2.0, 4.0], [2, 3]),
        ([2.5, 3.5], [2, 3]),
        ([2.1, 2.2], [2]),
        ([0.0, 8.4], list(range(9))),
        ([8.2, 8.3], [8]),
        ([7.9, 30.0], [7, 8]),
    ],
)
def test_clips_that_overlap_a_moment_are_inside(root, tmp_path, moment, clips):
    def place(record):
        record.update(vid="short", duration=8.4, relevant_windows=[moment])

    features = tmp_path / "raw"
    features.mkdir()
    np.save(features / "short.npy", np.ones((9, 8), np.float32))
    config = rewritten(root, tmp_path, place)
    store = tmp_path / "short"
    short = tiny_config(root, f"features.sources=[{features}]", f"features.store={store}")
    pack_store(short, ["short"])
    source = Source.open(config)
    annotation = read_annotations(config.path(config.data.train))[:1]
    dataset = Dataset.build(annotation, FeatureStore.open(store), source.texts, max_moments=5)
    assert dataset.inside[0].nonzero()[0].tolist() == clips
    assert dataset.num_clamped == (moment[1] > 8.4)
    assert dataset.annotated[0, 0].tolist() == moment
    assert dataset.has_outside[0] == (len(clips) < 9)


def with_durations(root, tmp_path, factors):
    """The training split with the durations of its first videos multiplied."""
    lines = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    for line in lines:
        line["duration"] *= factors.get(line["vid"], 1)
    path = tmp_path / "train.jsonl"
    write_jsonl(path, lines)
    return tiny_config(root, f"data.train={path}")


def test_the_stride_of_a_video_is_derived_where_it_is_not_as_stated(root, tmp_path):
    dataset = Source.open(with_durations(root, tmp_path, {"v0": 2})).training()
    assert (dataset.clip_seconds[:2] == 2).all()
    assert (dataset.clip_seconds[2:] == 1).all()
    assert dataset.num_derived == 1
    assert Source.open(tiny_config(root)).training().num_derived == 0


def test_a_stride_that_fits_few_videos_is_refused_with_the_arithmetic(root, tmp_path):
    config = with_durations(root, tmp_path, {f"v{number}": 2 for number in range(6)})
    clips = len(np.load(root / "features" / "v0.npy"))
    says = (
        f"6 of 8 videos .* v0 has {clips} clips x 1 s \\(features.clip_seconds\\) = {clips} s, but "
        f"lasts {2 * clips} s; the median of these videos is 2 s per clip"
    )
    with pytest.raises(InputError, match=says):
        Source.open(config).training()
    published = config.model_copy(
        update={"data": config.data.model_copy(update={"compat": "reference"})}
    )
    assert (Source.open(published).training().clip_seconds == 1).all()


def test_two_durations_of_one_video_are_refused(root, tmp_path):
    config = rewritten(root, tmp_path, lambda record: record.update(duration=99.0))
    with pytest.raises(InputError, match="video v0 has a duration of .* in one row and of .* in"):
        Source.open(config).training()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("features.width=9", r"clips of 9 columns \(features.width\), got 8"),
        ("features.clip_seconds=0.5", r"features.clip_seconds=0.5, got 1.0"),
        ("features.normalize=false", "features.normalize=False, got True"),
        ("features.dtype=float32", "features.dtype=float32, got float16"),
        ("features.audio=pann", "features.audio=pann, got 0 columns of audio"),
    ],
)
def test_a_store_packed_with_other_settings_is_refused(root, override, says):
    with pytest.raises(InputError, match=says):
        Source.open(tiny_config(root, override))


def test_missing_things_are_told_before_training(root, tmp_path):
    with pytest.raises(InputError, match="does not hold video other"):
        Source.open(rewritten(root, tmp_path, lambda r: r.update(vid="other"))).training()
    path = tmp_path / "plain.jsonl"
    lines = read_annotations(root / "train.jsonl")
    write_jsonl(path, [{"qid": "x", "query": "a", "vid": lines[0].vid, "duration": 9,
                        "relevant_windows": [[0, 1]]}])  # fmt: skip
    with pytest.raises(InputError, match="negatives"):
        Source.open(tiny_config(root, f"data.train={path}")).training()


def test_clips_of_moments_beyond_the_most_are_no_outside_clips(root, tmp_path):
    def six(record):
        record.update(relevant_windows=[[float(i), i + 0.5] for i in range(6)])

    dataset = Source.open(rewritten(root, tmp_path, six)).training()
    batch = collate(dataset, batch_of([0, 2]), rank=0, world_size=1)
    assert batch.targets.moment_mask.sum(dim=1).tolist() == [5, 1]
    assert batch.targets.num_moments == 6
    assert dataset.inside[0].sum() == 6


NO_EVALUATION = ("data.validation={}", "data.tests={}", "evaluate.negatives=null")


def test_a_run_on_precomputed_text_reads_the_files_of_its_queries_and_negatives(root, tmp_path):
    rows = read_annotations(root / "train.jsonl")
    random = np.random.default_rng(0)
    for row in rows:
        names = [f"qid{row.qid}", *(f"{row.qid}_recomposed_gpt_{level}" for level in range(3))]
        for name in names:
            vectors = random.standard_normal((2, 5)).astype(np.float16)
            np.savez(tmp_path / f"{name}.npz", last_hidden_state=vectors)
    overrides = (
        "text.encoder=precomputed",
        f"text.folder={tmp_path}",
        "text.query_file=qid{qid}.npz",
        "text.width=5",
    )
    config = tiny_config(root, *overrides, f"text.store={tmp_path}/texts")
    with pytest.raises(InputError, match="no text store in .*`shine text encode --config"):
        Source.open(config)
    store_texts(tiny_config(root, *overrides, f"text.store={tmp_path}/texts", *NO_EVALUATION))
    dataset = Source.open(config).training()
    assert collate(dataset, batch_of([0, 3, 7]), rank=0, world_size=1).inputs.tokens.shape[3] == 5
    rows = [replace(row, query=f"unheard {row.query}") for row in dataset.annotations]
    with pytest.raises(InputError, match=r"texts are not in the text store .*shine text encode"):
        Source.open(config).dataset(rows)


def test_a_loss_without_partner_gets_batches_without_partner_text(root):
    alone = [f"loss.{name}_weight=0" for name in ("rank", "negative", "inter")]
    config = tiny_config(root, *alone, "loss.fine_weights=[]", "loss.fine_margins=[]")
    batch = collate(Source.open(config).training(), batch_of([0, 3]), rank=0, world_size=1)
    assert len(batch.inputs.tokens) == len(batch.targets.text_valid) == 1


def test_rows_that_a_cut_leaves_without_a_moment_are_refused(root):
    config = tiny_config(root, "data.max_clips=1")
    with pytest.raises(InputError, match=r"\d+ of 16 rows have no moment .* data\.max_clips keeps"):
        Source.open(config).training()
    assert Source.open(config).evaluation("test.jsonl").num_clips.max() == 1


def test_the_query_stands_in_for_a_negative_that_is_missing_or_invalid(root, tmp_path):
    def repeat(record):
        record["recomposed_queries"] = [record["query"], "person waits."]

    dataset = Source.open(rewritten(root, tmp_path, repeat)).training()
    assert dataset.text_valid[0].tolist() == [True, False, True, False]
    number = dataset.text[0]
    assert number[1] == number[3] == number[0] != number[2]
