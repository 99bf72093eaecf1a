import json

import numpy as np
import pytest
from tiny import tiny_config, tiny_data

from shine.config import TextConfig, load_config
from shine.data.annotations import write_jsonl
from shine.data.text_files import (
    TextOrigin,
    as_tokens,
    file_state,
    needed_texts,
    read_tokens,
    text_files,
)
from shine.errors import InputError

PRECOMPUTED = TextConfig(encoder="precomputed", width=4, dtype="float32")
RAW = PRECOMPUTED.model_copy(update={"normalize": False})


def vectors(seed, length=5):
    return np.random.default_rng(seed).standard_normal((length, 4)).astype(np.float32)


def saved(path, array, **others):
    np.savez(path, last_hidden_state=array, pooler_output=np.zeros(4), **others)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("needed") / "data")


def records(root, split):
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]


def test_a_run_needs_the_queries_of_all_splits_and_the_negatives_that_it_reads(root):
    rows = {split: records(root, split) for split in ("train", "val", "test")}
    queries = {row["query"] for split in rows.values() for row in split}
    trained = {text for row in rows["train"] for text in row["recomposed_queries"]}
    tested = {text for row in rows["test"] for text in row["recomposed_queries"]}
    assert set(needed_texts(tiny_config(root))) == queries | trained | tested
    weights = ("loss.fine_weights=[]", "loss.fine_margins=[]")
    assert set(needed_texts(tiny_config(root, *weights))) == queries | tested
    alone = (*weights, "evaluate.negatives=null", "data.tests={}", "data.validation={}")
    assert set(needed_texts(tiny_config(root, *alone))) == {row["query"] for row in rows["train"]}


def test_only_the_levels_of_the_loss_and_valid_ones_are_needed(root, tmp_path):
    row = records(root, "train")[0]
    row |= {"query": "q", "recomposed_queries": ["a", "b", "c"], "valid": [True, False, True]}
    write_jsonl(tmp_path / "train.jsonl", [row])
    config = (f"data.root={tmp_path}", "loss.fine_weights=[1, 1, 1, 1]")
    needed = needed_texts(load_config(None, [*config, "loss.fine_margins=[1, 1, 1, 1]"]))
    assert needed == {
        "q": TextOrigin(row["qid"], None),
        "a": TextOrigin(row["qid"], 0),
        "c": TextOrigin(row["qid"], 2),
    }
    two = ["loss.fine_weights=[1, 1, 1]", "loss.fine_margins=[1, 1, 1]"]
    assert set(needed_texts(load_config(None, [config[0], *two]))) == {"q", "a"}


def test_an_equal_text_has_its_first_place_and_queries_come_before_negatives(root, tmp_path):
    first, second = records(root, "train")[:2]
    first |= {"query": "q", "recomposed_queries": ["r", "s", "t"]}
    second |= {"query": "r", "recomposed_queries": ["s", "q", "u"]}
    write_jsonl(tmp_path / "train.jsonl", [first, second])
    config = tiny_config(tmp_path, "data.validation={}", "data.tests={}", "evaluate.negatives=null")
    needed = needed_texts(config)
    assert needed["r"] == TextOrigin(second["qid"], None)
    assert needed["s"] == TextOrigin(first["qid"], 1)
    assert list(needed) == ["q", "r", "s", "t", "u"]


def test_half_a_character_is_told(root, tmp_path):
    row = records(root, "train")[0] | {"recomposed_queries": ["a", "a \ud800 door", "c"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    alone = ("data.validation={}", "data.tests={}", "evaluate.negatives=null")
    with pytest.raises(InputError, match="half a character of UTF-16"):
        needed_texts(tiny_config(tmp_path, *alone))


def config(root, *overrides):
    return load_config(None, [f"data.root={root}", "text.encoder=precomputed", *overrides])


def test_files_are_found_by_query_and_level_and_may_lie_in_folders(tmp_path):
    names = ("text.query_file=test/qid{qid}.npz", "text.negative_file=test/{qid}/level{level}.npz")
    folder = tmp_path / "text_features" / "test"
    (folder / "7").mkdir(parents=True)
    expected = {"a": folder / "qid7.npz", "b": folder / "7" / "level1.npz"}
    for path in expected.values():
        path.touch()
    origins = {"a": TextOrigin("7", None), "b": TextOrigin("7", 1)}
    assert text_files(config(tmp_path, *names), origins) == expected


def test_missing_files_are_counted_and_the_first_is_named(tmp_path):
    (tmp_path / "text_features").mkdir()
    saved(tmp_path / "text_features" / "7.npz", vectors(0))
    origins = {text: TextOrigin(qid, None) for text, qid in zip("abc", "789", strict=True)}
    with pytest.raises(InputError, match=r"2 of 3 files .* missing, the first is \S*8\.npz;"):
        text_files(config(tmp_path), origins)
    with pytest.raises(InputError, match="no folder of text features"):
        text_files(config(tmp_path, "text.folder=none"), origins)


@pytest.mark.parametrize("qid", ["../7", "a/7", "a\\7", "..", "."])
def test_an_id_that_leaves_its_folder_is_told(tmp_path, qid):
    (tmp_path / "text_features").mkdir()
    with pytest.raises(InputError, match="cannot be part of a file name"):
        text_files(config(tmp_path), {"a": TextOrigin(qid, None)})


def test_tokens_are_normalised_and_rounded(tmp_path):
    path = saved(tmp_path / "7.npz", vectors(0))
    expected = vectors(0) / (np.linalg.norm(vectors(0), axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(read_tokens(path, PRECOMPUTED), expected, rtol=1e-6)
    np.testing.assert_array_equal(read_tokens(path, RAW), vectors(0))
    half = RAW.model_copy(update={"dtype": "float16"})
    np.testing.assert_array_equal(read_tokens(path, half), vectors(0).astype(np.float16))
    np.testing.assert_array_equal(as_tokens(vectors(0), half), vectors(0).astype(np.float16))


def test_a_leading_axis_is_taken_off_and_zeros_at_the_end_are_no_tokens(tmp_path):
    padded = np.concatenate([vectors(0, 2), np.zeros((1, 4)), vectors(1, 1), np.zeros((6, 4))])
    path = saved(tmp_path / "7.npz", padded[None].astype(np.float16))
    tokens = read_tokens(path, PRECOMPUTED)
    assert tokens.shape == (4, 4)
    assert not tokens[2].any()


@pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1)])
@pytest.mark.parametrize("kind", [bool, np.int64, np.float32])
def test_an_attention_mask_says_which_rows_are_tokens(tmp_path, shape, kind):
    mask = np.array([0, 1, 1, 0, 0], kind).reshape(shape)
    path = saved(tmp_path / "7.npz", vectors(0)[None], attention_mask=mask)
    np.testing.assert_array_equal(read_tokens(path, RAW), vectors(0)[1:3])


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.ones(4), r"expected an attention_mask of 5 numbers.* got float64 \(4,\)"),
        (np.zeros(5), "attention_mask has no token"),
        (np.array(list("abcde")), "expected an attention_mask of 5 numbers"),
        (np.ones(10**6), "cannot be read as 5 numbers"),
        (np.array([{}] * 5), "cannot be read as 5 numbers"),
    ],
)
def test_a_mask_that_cannot_be_used_is_told(tmp_path, mask, says):
    path = saved(tmp_path / "7.npz", vectors(0), attention_mask=mask)
    with pytest.raises(InputError, match=says) as error:
        read_tokens(path, RAW)
    assert "7.npz" in str(error.value)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.ones((3, 5)), r"tokens of 4 columns \(text.width\), got 5"),
        (np.full((3, 4), np.nan), "NaN or infinity in token 0"),
        (np.zeros((3, 4)), "every token is zero"),
        (np.zeros((0, 4)), r"shape \[token, width\]"),
        (np.ones((2, 3, 4)), r"shape \[token, width\]"),
        (np.array([[Bomb()]], dtype=object), "7.npz"),
        (np.full((3, 4), 1e5), "too large for float16; set text.dtype=float32"),
    ],
)
def test_a_text_file_that_cannot_be_used_is_told_by_name(tmp_path, content, says):
    path = saved(tmp_path / "7.npz", content)
    with pytest.raises(InputError, match=says) as error:
        read_tokens(path, RAW.model_copy(update={"dtype": "float16"}))
    assert "7.npz" in str(error.value)


def test_tokens_whose_length_is_no_number_are_refused_and_not_made_zeros(tmp_path):
    path = saved(tmp_path / "7.npz", vectors(0) * np.float32(1e30))
    with pytest.raises(InputError, match=r"7\.npz: .*e\+30 is too large to be normalised"):
        read_tokens(path, PRECOMPUTED)


def test_a_file_that_was_written_again_is_another(tmp_path):
    path = saved(tmp_path / "7.npz", vectors(0))
    before = file_state(path)
    assert file_state(path) == before
    saved(path, vectors(0, 6))
    assert file_state(path) != before
