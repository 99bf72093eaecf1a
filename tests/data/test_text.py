import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shine.config import load_config
from shine.data.text import LexicalEncoder, TextTable, build_encoder, read_word_vectors
from shine.errors import InputError


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


def test_precomputed_text_encodes_nothing_new():
    with pytest.raises(InputError, match="text.encoder=lexical or text.encoder=hugging_face"):
        build_encoder(load_config(None, ["text.encoder=precomputed"]))
