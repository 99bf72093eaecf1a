import json
import shutil

import numpy as np
import pytest
from encoded import store_texts, tiny_clip
from hypothesis import given
from hypothesis import strategies as st
from s3_server import serving_s3
from stores import write_store
from tiny import tiny_config, tiny_data

from shine.config import load_config
from shine.data.loading import Source, check_files
from shine.data.text import LexicalEncoder, TextTable
from shine.data.text_files import file_identity, needed_texts
from shine.data.text_models import ModelEncoder
from shine.data.text_store import MANIFEST, TextStore, TextWriter, text_storage
from shine.errors import InputError

CONFIG = load_config(None, ["text.encoder=precomputed", "text.width=4"])
IDENTITY = file_identity(CONFIG.text)


def vectors(text, width=4, dtype="float16"):
    """Some tokens of a text, which depend on it alone."""
    random = np.random.default_rng(list(text.encode()))
    shape = (int(random.integers(1, 9)), width)
    return random.standard_normal(shape).astype(dtype)


def at(url, *overrides):
    names = ("text.encoder=precomputed", "text.width=4", f"text.store={url}")
    return load_config(None, [*names, *overrides])


def written(config, texts, identity=IDENTITY, source=""):
    writer = TextWriter(text_storage(config), identity)
    for text in writer.missing(dict.fromkeys(texts, source)):
        writer.add(text, vectors(text), source=source)
    return writer.finish()


def make_shards_small(patch):
    """Shards of ten tokens or a few more, so that a store has many."""
    patch.setattr("shine.data.text_store._SHARD_BYTES", 10 * 4 * 2)


@pytest.fixture
def small_shards(monkeypatch):
    make_shards_small(monkeypatch)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(config, texts, tmp_path, max_tokens=32):
    """A table over the store gathers the tokens that were written."""
    table = TextTable(TextStore.open(config, tmp_path / "cache"), max_tokens)
    numbers = table.add(texts)
    tokens, mask = table.gather(numbers)
    for row, text in enumerate(texts):
        expected = vectors(text)[:max_tokens]
        assert mask[row].sum() == len(expected)
        np.testing.assert_array_equal(tokens[row, mask[row]], expected.astype(np.float32))
        assert not tokens[row, ~mask[row]].any()
        assert table.text(int(numbers[row])) == text
    return table


@given(texts=st.lists(st.text(max_size=8), min_size=1, max_size=30), most=st.integers(1, 9))
def test_a_table_gathers_from_many_shards_what_was_written(texts, most, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    config = at(folder / "texts")
    with pytest.MonkeyPatch.context() as patch:
        make_shards_small(patch)
        manifest = written(config, texts)
    assert manifest["num_texts"] == len(set(texts))
    check(config, texts, folder, most)


def test_texts_of_any_shape_are_gathered(tmp_path, small_shards):
    texts = [f"text {number}" for number in range(20)]
    config = at(tmp_path / "texts")
    assert len(written(config, texts)["shards"]) > 5
    table = check(config, texts, tmp_path)
    tokens, mask = table.gather(np.arange(20).reshape(5, 4).T)
    flat, flat_mask = table.gather(np.arange(20))
    assert tokens.shape == (4, 5, flat.shape[1], 4)
    np.testing.assert_array_equal(tokens.swapaxes(0, 1).reshape(flat.shape), flat)
    np.testing.assert_array_equal(mask.swapaxes(0, 1).reshape(flat_mask.shape), flat_mask)


def test_a_table_reads_the_mapped_file_and_copies_no_part_of_it(tmp_path):
    texts = [f"text {number}" for number in range(50)]
    config = at(tmp_path / "texts")
    written(config, texts)
    store = TextStore.open(config, tmp_path)
    table = TextTable(store, 32)
    table.add(texts)
    assert table._matrices is store.matrices
    (matrix,) = store.matrices
    assert not matrix.flags.owndata
    assert not matrix.flags.writeable
    assert matrix.dtype == np.float16


def test_new_texts_are_added_and_what_is_there_stays(tmp_path, small_shards):
    first, second = [f"a {n}" for n in range(20)], [f"b {n}" for n in range(20)]
    config = at(tmp_path / "texts")
    written(config, first)
    before = files(tmp_path / "texts")
    opened = TextTable(TextStore.open(config, tmp_path), 32)
    opened.add(first[:1])
    manifest = written(config, [*first, *second])
    assert manifest["num_texts"] == 40
    check(config, [*second, *first], tmp_path)
    after = files(tmp_path / "texts")
    shards = [name for name in before if name.startswith("shard")]
    assert shards
    assert all(after[name] == before[name] for name in shards)
    # A run that opened the store before goes on.
    tokens, mask = opened.gather(opened.add(first))
    np.testing.assert_array_equal(tokens[3, mask[3]], vectors(first[3]).astype(np.float32))


def test_nothing_is_written_where_nothing_is_new(tmp_path):
    config = at(tmp_path / "texts")
    written(config, ["a", "b"])
    states = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()}
    assert written(config, ["b"])["num_texts"] == 2
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()}
    assert after[MANIFEST] == states[MANIFEST]
    assert after.keys() == states.keys()


def test_a_text_whose_file_was_written_again_is_read_again(tmp_path):
    config = at(tmp_path / "texts")
    written(config, ["a", "b"], source="old")
    storage = text_storage(config)
    writer = TextWriter(storage, IDENTITY)
    assert writer.missing({"a": "old", "b": "new", "c": "new"}) == ["b", "c"]
    writer.add("b", np.ones((2, 4), np.float16), source="new")
    assert writer.finish()["num_texts"] == 2
    table = TextTable(TextStore.open(config, tmp_path), 32)
    tokens, _ = table.gather(table.add(["b"]))
    np.testing.assert_array_equal(tokens[0], np.ones((2, 4)))


def test_a_job_that_was_stopped_goes_on_where_its_shards_end(tmp_path, small_shards):
    texts = [f"text {number}" for number in range(30)]
    config = at(tmp_path / "texts")
    writer = TextWriter(text_storage(config), IDENTITY)
    for text in texts[:20]:
        writer.add(text, vectors(text))
    del writer  # what is in no shard is lost
    with pytest.raises(InputError, match="no text store"):
        TextStore.open(config, tmp_path)
    again = TextWriter(text_storage(config), IDENTITY)
    missing = again.missing(dict.fromkeys(texts, ""))
    assert 10 <= len(missing) < 20
    for text in missing:
        again.add(text, vectors(text))
    again.finish()
    check(config, texts, tmp_path)
    calm = at(tmp_path / "calm")
    written(calm, texts)
    assert files(tmp_path / "calm") == files(tmp_path / "texts")


@pytest.mark.parametrize("torn", ["shard", "part"])
def test_what_a_stopped_job_left_torn_does_not_count(tmp_path, small_shards, torn):
    texts = [f"text {number}" for number in range(30)]
    config = at(tmp_path / "texts")
    writer = TextWriter(text_storage(config), IDENTITY)
    for text in texts:
        writer.add(text, vectors(text))
    left = TextWriter(text_storage(config), IDENTITY).missing(dict.fromkeys(texts, ""))
    path = min((tmp_path / "texts").glob(f"{torn}-*"))
    path.write_bytes(path.read_bytes()[:-1])
    more = TextWriter(text_storage(config), IDENTITY).missing(dict.fromkeys(texts, ""))
    assert len(left) < len(more) < len(texts)
    written(config, texts)
    check(config, texts, tmp_path)


def test_what_a_job_of_another_encoder_left_does_not_count(tmp_path, small_shards):
    config = at(tmp_path / "texts")
    writer = TextWriter(text_storage(config), {**IDENTITY, "normalize": False})
    for number in range(30):
        writer.add(f"text {number}", np.zeros((3, 4), np.float16))
    texts = [f"text {number}" for number in range(30)]
    written(config, texts)
    check(config, texts, tmp_path)
    assert not list((tmp_path / "texts").glob("part-*"))


def test_the_store_of_another_encoder_is_refused(tmp_path):
    config = at(tmp_path / "texts")
    written(config, ["a"])
    with pytest.raises(InputError, match=r"another encoder's \(dtype 'float16', not 'float32'\)"):
        TextWriter(text_storage(config), {**IDENTITY, "dtype": "float32"})
    for override in ("text.dtype=float32", "text.normalize=false", "text.width=5"):
        with pytest.raises(InputError, match=f"expected {override[:9]}"):
            TextStore.open(at(tmp_path / "texts", override), tmp_path)
    with pytest.raises(InputError, match=r"expected text.encoder=hugging_face, got precomputed"):
        TextStore.open(at(tmp_path / "texts", "text.encoder=hugging_face"), tmp_path)
    # Where the files lay says nothing of the tokens.
    TextWriter(text_storage(config), {**IDENTITY, "folder": "elsewhere"})


def test_texts_that_the_store_lacks_are_counted_and_the_table_stays_whole(tmp_path):
    config = at(tmp_path / "texts")
    written(config, ["a", "b"])
    table = TextTable(TextStore.open(config, tmp_path), 32)
    table.add(["a"])
    for _ in range(2):
        with pytest.raises(InputError, match=r"2 of 3 texts are not .*first is 'new'; run `shine"):
            table.add(["a", "b", "new", "new", "other"])
    tokens, mask = table.gather(table.add(["b", "a"]))
    np.testing.assert_array_equal(tokens[0, mask[0]], vectors("b").astype(np.float32))


@pytest.mark.parametrize("name", ["shard", "texts"])
def test_a_store_with_a_file_cut_or_gone_is_refused(tmp_path, name):
    config = at(tmp_path / "texts")
    written(config, ["a", "b"])
    path = next((tmp_path / "texts").glob(f"{name}-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="is not as its manifest says"):
        TextStore.open(config, tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="is not as its manifest says"):
        TextStore.open(config, tmp_path)


def test_a_store_with_a_changed_file_is_refused(tmp_path):
    config = at(tmp_path / "texts")
    written(config, ["a", "b"])
    shard = next((tmp_path / "texts").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[content.index(vectors("a").tobytes())] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=rf"{shard.name} is not as its manifest says"):
        TextStore.open(config, tmp_path).verify()
    table = next((tmp_path / "texts").glob("texts-*"))
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    with pytest.raises(InputError, match=rf"{table.name} is not as its manifest says"):
        TextStore.open(config, tmp_path)


def test_a_run_does_not_begin_on_a_changed_store(tmp_path):
    root = tiny_data(tmp_path / "data")
    folder = tiny_clip(tmp_path / "clip")
    config = tiny_config(
        root, "text.encoder=hugging_face", f"text.model={folder}", f"features.cache={tmp_path}"
    )
    store_texts(config)
    check_files(config)
    shard = next((root / "texts").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="is not as its manifest says"):
        check_files(config)


def test_a_password_in_a_url_is_refused_unseen(tmp_path):
    with pytest.raises(InputError, match=r"text.store: needs .* without a password") as error:
        at("ftp://user:hidden@host/texts")
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize(
    ("features", "text"),
    [
        ("store", "store"),
        ("store", "./store/"),
        ("a/../store", "store"),
        ("{root}/store", "store"),
        ("file://{root}/store", "store"),
        ("s3://bucket/store", "s3://bucket/store/"),
    ],
)
def test_clips_and_texts_do_not_share_a_place(tmp_path, features, text):
    features = features.replace("{root}", str(tmp_path))
    with pytest.raises(InputError, match="features.store and text.store need two places"):
        at(text, f"features.store={features}", f"data.root={tmp_path}")


def test_clips_and_texts_may_lie_side_by_side():
    assert at("s3://bucket/texts", "features.store=s3://bucket/store").text.store
    assert at("shared/texts", "features.store=shared/texts/clips").text.store


def test_a_manifest_of_another_format_is_refused(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for content, says in (
        ('{"format": 2}', "expected a text store of format"),
        ("[1]", "is not the manifest of a text store"),
        ("{", "is not the manifest of a text store"),
    ):
        (folder / MANIFEST).write_text(content)
        with pytest.raises(InputError, match=says):
            TextStore.open(at(folder), tmp_path)
        with pytest.raises(InputError, match=says):
            TextWriter(text_storage(at(folder)), IDENTITY)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"encoder": None},
            r"is not as encoding writes it \(encoder: Input should be an object",
        ),
        ({"shards": 3}, r"is not as encoding writes it \(shards: Input should be a valid"),
        (
            {"texts": {"name": "a"}},
            r"is not as encoding writes it \(texts.sha256: Field required\)",
        ),
        ({"texts": {"name": "../a", "sha256": "", "bytes": 1}}, "names files outside its folder"),
    ],
)
def test_a_manifest_of_another_form_is_one_sentence(tmp_path, change, says):
    config = at(tmp_path / "texts")
    manifest = written(config, ["a"]) | change
    (tmp_path / "texts" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=says):
        TextStore.open(config, tmp_path)
    with pytest.raises(InputError, match=says):
        TextWriter(text_storage(config), IDENTITY)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    foreign = {
        "notes.txt": b"mine",
        "shard-00000-0123456789ab.arrow": b"of another store",
        "texts-0123456789ab.parquet": b"",
        "part-one.parquet": b"",
        f"part-{'0' * 12}-{'1' * 12}.parquet": b"",
    }
    for name, content in foreign.items():
        (folder / name).write_bytes(content)
    written(at(folder), ["a"])
    manifest = written(at(folder), ["b"])
    shards = {shard["name"] for shard in manifest["shards"]}
    found = files(folder)
    assert found.keys() == foreign.keys() | shards | {MANIFEST, manifest["texts"]["name"]}
    assert foreign.items() <= found.items()


def test_the_folder_of_a_feature_store_is_refused(tmp_path):
    write_store(tmp_path)
    before = files(tmp_path)
    with pytest.raises(InputError, match="expected a text store of format .*, got 2; set text"):
        written(at(tmp_path), ["a"])
    assert files(tmp_path) == before


def test_two_jobs_at_a_time_are_told(tmp_path, small_shards):
    storage = text_storage(at(tmp_path / "texts"))
    slow, fast = TextWriter(storage, IDENTITY), TextWriter(storage, IDENTITY)
    slow.add("a", np.zeros((10, 4), np.float16))
    fast.add("b", np.zeros((9, 4), np.float16))
    fast.finish()  # which knows nothing of the other's shard
    with pytest.raises(InputError, match="removed by another job that wrote the same text store"):
        slow.finish()


def test_a_store_elsewhere_is_copied_once_and_grows(tmp_path, small_shards):
    texts = [f"text {number}" for number in range(20)]
    with serving_s3() as bucket:
        config = at(f"{bucket}/texts")
        written(config, texts[:10])
        check(config, texts[:10], tmp_path)
        copies = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("shard-*")}
        assert copies
        written(config, texts)
        check(config, texts, tmp_path)
        assert all(path.stat().st_mtime_ns == time for path, time in copies.items())
        assert len(list((tmp_path / "cache").rglob("shard-*"))) > len(copies)


def test_a_store_in_memory_reads_back(tmp_path):
    config = at("memory://texts-of-a-test")
    written(config, ["a", "b"])
    check(config, ["b", "a"], tmp_path)


def test_training_on_a_model_gets_the_tokens_that_the_model_gives(tmp_path):
    root = tiny_data(tmp_path / "data")
    folder = tiny_clip(tmp_path / "clip")
    config = tiny_config(root, "text.encoder=hugging_face", f"text.model={folder}")
    with pytest.raises(InputError, match="no text store in .*: make it with `shine text"):
        Source.open(config)
    manifest = store_texts(config)
    assert manifest["encoder"]["model"] == str(folder)
    assert manifest["num_texts"] == len(needed_texts(config))
    dataset = Source.open(config).training()
    texts = [row.query for row in dataset.annotations]
    tokens, mask = dataset.texts.gather(dataset.text[:, 0])
    # Alone, a text differs by the rounding of the store at most; in the same batches, by nothing.
    encoder = ModelEncoder.of(config)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(tokens[row, mask[row]], encoder(text), atol=2**-11)
    stored = encoder.encode(list(needed_texts(config)))
    everything = dataset.texts.add(needed_texts(config))
    tokens, mask = dataset.texts.gather(everything)
    for row, text in enumerate(stored):
        np.testing.assert_array_equal(tokens[row, mask[row]], text.tokens.astype(np.float32))


def test_a_model_of_another_name_is_refused_before_it_is_loaded(tmp_path):
    root = tiny_data(tmp_path / "data")
    folder = tiny_clip(tmp_path / "clip")
    config = tiny_config(root, "text.encoder=hugging_face", f"text.model={folder}")
    store_texts(config)
    other = tiny_config(root, "text.encoder=hugging_face", "text.model=openai/other")
    with pytest.raises(InputError, match="expected text.model=openai/other, got .*clip"):
        Source.open(other)
    # Copied elsewhere, the model is the same: nothing is encoded again, and the name is that one.
    shutil.move(folder, tmp_path / "moved")
    moved = tiny_config(root, "text.encoder=hugging_face", f"text.model={tmp_path / 'moved'}")
    before = {path for path in (root / "texts").iterdir() if path.name != MANIFEST}
    store_texts(moved)
    assert {path for path in (root / "texts").iterdir() if path.name != MANIFEST} == before
    Source.open(moved)


def test_a_lexical_table_and_a_store_give_the_same_batch(tmp_path):
    """Of the same tokens, whoever holds them."""
    texts = [f"person sees door {number}" for number in range(12)]
    lexical = LexicalEncoder(4)
    config = at(tmp_path / "texts", "text.dtype=float32")
    writer = TextWriter(text_storage(config), {**IDENTITY, "dtype": "float32"})
    for text in texts:
        writer.add(text, lexical(text))
    writer.finish()
    tables = TextTable(lexical, 3), TextTable(TextStore.open(config, tmp_path), 3)
    (one, mask), (other, other_mask) = (table.gather(table.add(texts)) for table in tables)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(mask, other_mask)
