import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shine.config import TextConfig
from shine.data.annotations import Annotation
from shine.data.text import LexicalEncoder, PrecomputedEncoder, TextTable, read_word_vectors
from shine.errors import InputError
from shine.language.negatives import HardNegatives


def test_a_word_has_one_vector_whatever_its_case_and_neighbours():
    encoder = LexicalEncoder(16)
    first, second = encoder("Person opens the door."), encoder("the PERSON")
    np.testing.assert_array_equal(first[0], second[1])
    np.testing.assert_array_equal(first[2], second[0])
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-6)


def test_vectors_do_not_depend_on_the_process_or_the_order_of_queries():
    a, b = LexicalEncoder(16), LexicalEncoder(16)
    b("window box")
    np.testing.assert_array_equal(a("door"), b("door"))
    assert not np.allclose(a("door"), a("window"))


def test_a_table_comes_before_the_hash():
    vector = np.arange(4, dtype=np.float32)
    encoder = LexicalEncoder(4, {"door": vector})
    np.testing.assert_array_equal(encoder("a door!")[1], vector)


@given(st.lists(st.text(max_size=30), max_size=8))
def test_gathered_texts_equal_the_encoder_alone_and_padding_is_zero(texts):
    encoder = LexicalEncoder(6)
    table = TextTable(encoder, max_tokens=4)
    numbers = table.add(texts)
    tokens, mask = table.gather(numbers)
    for row, text in enumerate(texts):
        alone = encoder(text)[:4]
        assert mask[row].sum() == len(alone) >= 1
        np.testing.assert_array_equal(tokens[row][: len(alone)], alone)
        assert not tokens[row][len(alone) :].any()
        assert table.text(int(numbers[row])) == text


def test_equal_texts_are_stored_once_also_when_added_later():
    table = TextTable(LexicalEncoder(6), max_tokens=4)
    first = table.add(["a b", "c"])
    assert table.add(["c", "d", "a b"]).tolist() == [first[1], 2, first[0]]


def test_a_table_of_word_vectors_reads_back(tmp_path):
    column = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"word": ["a", "b"], "vector": column}), tmp_path / "w.parquet")
    table = read_word_vectors(tmp_path / "w.parquet")
    np.testing.assert_array_equal(table["b"], [3, 4])


def test_a_missing_table_is_told(tmp_path):
    with pytest.raises(InputError, match="cannot read word vectors"):
        read_word_vectors(tmp_path / "none.parquet")


PRECOMPUTED = TextConfig(encoder="precomputed", width=4, max_tokens=3)
QUERY, NEGATIVES = "a person", ("a dog", "two dogs")


def row(qid="7", query=QUERY):
    return Annotation(qid, "v", query, 9.0, ((0.0, 1.0),))


def vectors(seed, length=5):
    return np.random.default_rng(seed).standard_normal((length, 4)).astype(np.float32)


def written(folder, **texts):
    for name, array in texts.items():
        np.savez(folder / f"{name}.npz", last_hidden_state=array, pooler_output=np.zeros(4))


def test_precomputed_text_is_normalised_cut_and_found_by_query_and_level(tmp_path):
    levels = {f"7_recomposed_gpt_{level}": vectors(1 + level) for level in range(2)}
    written(tmp_path, **{"7": vectors(0)}, **levels)
    encoder = PrecomputedEncoder(tmp_path, PRECOMPUTED)
    negatives = {"7": HardNegatives(NEGATIVES, (True, True), ("file", "file"))}
    encoder.locate([row()], negatives, 2)
    table = TextTable(encoder, PRECOMPUTED.max_tokens)
    tokens, mask = table.gather(table.add([QUERY, *NEGATIVES]))
    assert mask.all()
    for text in range(3):
        raw = vectors(text)[:3]
        expected = raw / (np.linalg.norm(raw, axis=1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(tokens[text], expected, rtol=1e-6)


def test_published_query_files_are_found_by_a_name_with_a_prefix(tmp_path):
    written(tmp_path, qid7=vectors(0))
    config = PRECOMPUTED.model_copy(update={"query_file": "qid{qid}.npz", "normalize": False})
    encoder = PrecomputedEncoder(tmp_path, config)
    encoder.locate([row()])
    np.testing.assert_array_equal(encoder(QUERY), vectors(0))


def test_a_leading_axis_is_taken_off_and_zeros_at_the_end_are_no_tokens(tmp_path):
    padded = np.concatenate([vectors(0, 2), np.zeros((1, 4)), vectors(1, 1), np.zeros((6, 4))])
    written(tmp_path, **{"7": padded[None].astype(np.float16)})
    encoder = PrecomputedEncoder(tmp_path, PRECOMPUTED)
    encoder.locate([row()])
    assert encoder(QUERY).shape == (4, 4)
    assert not encoder(QUERY)[2].any()


def test_equal_texts_share_one_file_and_invalid_negatives_need_none(tmp_path):
    written(tmp_path, **{"7": vectors(0)})
    encoder = PrecomputedEncoder(tmp_path, PRECOMPUTED)
    negatives = {"8": HardNegatives(("never encoded",), (False,), ("file",))}
    encoder.locate([row(), row("8")], negatives, 1)
    assert len(encoder(QUERY)) == 5
    with pytest.raises(InputError, match="precomputed text alone .* no file for 'never encoded'"):
        encoder("never encoded")


def test_missing_files_are_counted_and_the_first_is_named(tmp_path):
    written(tmp_path, **{"7": vectors(0)})
    encoder = PrecomputedEncoder(tmp_path, PRECOMPUTED)
    rows = [row(), row("8", "b"), row("9", "c")]
    with pytest.raises(InputError, match=r"2 of 3 files .* missing, the first is \S*8\.npz;"):
        encoder.locate(rows)


@pytest.mark.parametrize("qid", ["../7", "a/7", "a\\7", "..", "."])
def test_an_id_that_leaves_its_folder_is_told(tmp_path, qid):
    with pytest.raises(InputError, match="cannot be part of a file name"):
        PrecomputedEncoder(tmp_path, PRECOMPUTED).locate([row(qid)])


def test_text_files_may_lie_in_folders_of_the_pattern(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "7").mkdir()
    written(tmp_path / "test", **{"7": vectors(0)})
    written(tmp_path / "test" / "7", level0=vectors(1))
    names = {"query_file": "test/{qid}.npz", "negative_file": "test/{qid}/level{level}.npz"}
    config = PRECOMPUTED.model_copy(update={"normalize": False, **names})
    encoder = PrecomputedEncoder(tmp_path, config)
    encoder.locate([row()], {"7": HardNegatives(NEGATIVES[:1], (True,), ("file",))}, 1)
    np.testing.assert_array_equal(encoder(QUERY), vectors(0))
    np.testing.assert_array_equal(encoder(NEGATIVES[0]), vectors(1))
    with pytest.raises(InputError, match=r"test/8\.npz"):
        encoder.locate([row("8", "b")])


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
        (np.array([[Bomb()]], dtype=object), "cannot be read as a numeric array"),
    ],
)
def test_a_text_file_that_cannot_be_used_is_told_by_name(tmp_path, content, says):
    np.savez(tmp_path / "7.npz", last_hidden_state=content, pooler_output=np.zeros(4))
    encoder = PrecomputedEncoder(tmp_path, PRECOMPUTED)
    encoder.locate([row()])
    with pytest.raises(InputError, match=says) as error:
        encoder(QUERY)
    assert "7.npz" in str(error.value)


def test_a_text_that_cannot_be_encoded_leaves_the_table_whole(tmp_path):
    written(tmp_path, **{"7": vectors(0)})
    encoder = PrecomputedEncoder(tmp_path, PRECOMPUTED)
    encoder.locate([row()])
    table = TextTable(encoder, 9)
    for _ in range(2):
        with pytest.raises(InputError):
            table.add([QUERY, "unknown"])
    tokens, mask = table.gather(table.add([QUERY]))
    assert mask.sum() == 5
    np.testing.assert_array_equal(tokens[0], encoder(QUERY))
