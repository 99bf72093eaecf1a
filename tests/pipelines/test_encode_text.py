import json

import numpy as np
import pyarrow as pa
import pytest
from encoded import LIMIT, store_texts, tiny_clip
from tiny import tiny_config, tiny_data

from pipelines.text import FileWorker, ModelWorker, encode
from pipelines.train import train_run
from shine.config import load_config
from shine.data.annotations import read_annotations
from shine.data.loading import Source
from shine.data.text import LexicalEncoder
from shine.data.text_files import needed_texts
from shine.data.text_models import ModelEncoder
from shine.data.text_store import encoder_digest
from shine.errors import InputError
from shine.evaluation import evaluate_run
from shine.retrieval import Grounder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def root(tmp_path):
    return tiny_data(tmp_path / "data")


def on_model(root, clip, *overrides):
    return tiny_config(
        root, "text.encoder=hugging_face", f"text.model={clip}", "train.epochs=1", *overrides
    )


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.ray
def test_every_text_is_encoded_once_and_later_only_what_is_new(
    ray_cluster, root, clip, monkeypatch
):
    monkeypatch.setattr("pipelines.text._TABLE_TEXTS", 5)
    monkeypatch.setattr("pipelines.text.data_workers", lambda gpu: 2)
    config = on_model(root, clip)
    seen = []
    found = encode(config, lambda done, total: seen.append((done, total)))
    needed = needed_texts(config)
    assert found["needed"] == found["encoded"] == found["texts"] == len(needed)
    assert seen[-1] == (len(needed), len(needed))
    assert seen == sorted(seen)
    assert len(seen) == -(-len(needed) // 5)

    # One worker writes the same store.
    monkeypatch.setattr("pipelines.text.data_workers", lambda gpu: 1)
    encode(on_model(root, clip, "text.store=other"))
    assert files(root / "other") == files(root / "texts")

    # The rows of a test split with a new query; nothing else is encoded.
    line = json.loads((root / "test.jsonl").read_text().splitlines()[0])
    line |= {"qid": "new", "query": "the " * LIMIT, "recomposed_queries": ["a", "b", "c"]}
    with (root / "test.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    again = encode(config)
    assert (again["needed"], again["encoded"]) == (len(needed) + 4, 4)
    assert again["truncated"] == found["truncated"] + 1
    before = files(root / "texts")
    assert encode(config)["encoded"] == 0
    assert files(root / "texts") == before

    # Tokens are those of the model, wherever they were encoded.
    encoder = ModelEncoder.of(config)
    dataset = Source.open(config).evaluation("test.jsonl")
    tokens, mask = dataset.texts.gather(dataset.text[:, 0])
    for row, annotation in enumerate(dataset.annotations):
        np.testing.assert_allclose(tokens[row, mask[row]], encoder(annotation.query), atol=2**-11)


def precomputed(root):
    """The configuration of a run on files, each written with its padding."""
    text = root / "text_features"
    text.mkdir()
    encoder = LexicalEncoder(8)
    for split in ("train", "val", "test"):
        for record in map(json.loads, (root / f"{split}.jsonl").read_text().splitlines()):
            for level, words in enumerate([record["query"], *record["recomposed_queries"]]):
                suffix = f"_recomposed_gpt_{level - 1}" if level else ""
                tokens = np.concatenate([3 * encoder(words), np.zeros((2, 8), np.float32)])
                np.savez(text / f"{record['qid']}{suffix}.npz", last_hidden_state=tokens)
    return tiny_config(root, "text.encoder=precomputed")


@pytest.mark.ray
def test_files_of_the_field_are_packed_and_one_that_is_written_again_is_read_again(
    ray_cluster, root
):
    config = precomputed(root)
    found = encode(config)
    assert found["encoded"] == found["texts"] == len(needed_texts(config))
    dataset = Source.open(config).training()
    tokens, mask = dataset.texts.gather(dataset.text[:, 0])
    for row, annotation in enumerate(dataset.annotations):
        expected = LexicalEncoder(8)(annotation.query)  # unit vectors again
        np.testing.assert_allclose(tokens[row, mask[row]], expected, atol=1e-3)
    query = dataset.annotations[0]
    path = root / "text_features" / f"{query.qid}.npz"
    np.savez(path, last_hidden_state=np.ones((2, 8), np.float32))
    assert encode(config)["encoded"] == 1
    table = Source.open(config).texts
    tokens, _ = table.gather(table.add([query.query]))
    np.testing.assert_allclose(tokens[0], np.full((2, 8), 8**-0.5), atol=1e-3)
    # A file that cannot be read is one sentence, from a worker too.
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=path.name):
        encode(config)


def test_a_run_on_a_model_is_trained_evaluated_and_asked_sentences(root, clip, tmp_path):
    config = on_model(root, clip)
    store_texts(config)
    folder = tmp_path / "run"
    train_run(config, folder)
    evaluate_run(folder)
    grounder = Grounder.load(folder)
    video = grounder.encode(root / "features" / "v0.npy")
    (row, *_) = read_annotations(root / "train.jsonl")
    known = grounder.ask(video, row.query)
    table = Source.open(config).texts
    tokens, mask = table.gather(table.add([row.query]))
    same = grounder.ask(video, tokens[0, mask[0]])
    np.testing.assert_allclose(known.saliency, same.saliency, atol=1e-3)
    assert np.isfinite(grounder.ask(video, "a sentence that no file has").saliency).all()

    tiny_clip(clip.parent / "other", seed=1).rename(tmp_path / "other")
    text = (folder / "config.yaml").read_text().replace(str(clip), str(tmp_path / "other"))
    (folder / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="is not the one that the run .* was trained with"):
        Grounder.load(folder)


def test_a_node_with_other_weights_is_told(clip, root):
    config = on_model(root, clip)
    digest = encoder_digest(ModelEncoder.of(config).identity)
    settings = config.text.model_dump()
    found = ModelWorker(str(clip), settings, digest)(pa.table({"text": ["the door", "a"]}))
    assert found["truncated"].to_pylist() == [False, False]
    with pytest.raises(InputError, match="nodes of the cluster have different weights"):
        ModelWorker(str(clip), settings, "0" * 64)


def test_a_worker_reads_the_files_of_its_table(tmp_path):
    np.savez(tmp_path / "a.npz", last_hidden_state=np.ones((2, 4)))
    settings = load_config(None, ["text.width=4", "text.normalize=false"]).text.model_dump()
    found = FileWorker(settings)(pa.table({"file": [str(tmp_path / "a.npz")]}))
    assert found["tokens"][0].as_py() == np.ones((2, 4), np.float16).tobytes()


def test_lexical_text_needs_no_store(root):
    with pytest.raises(InputError, match="encodes in memory and needs no store"):
        encode(tiny_config(root))


@pytest.mark.ray
def test_the_command_tells_what_it_did(ray_cluster, shine, root, clip):
    config = on_model(root, clip)
    (root / "run.yaml").write_text(config.to_yaml())
    status, out, err = shine("text", "encode", "--config", root / "run.yaml")
    assert status == 0, err
    number = len(needed_texts(config))
    assert f"{number} of {number} texts of this configuration were new" in " ".join(out.split())
    status, out, _ = shine("text", "encode", "--config", root / "run.yaml", "--json")
    assert json.loads(out) | {"tokens": 0} == {
        "store": str(root / "texts"),
        "needed": number,
        "encoded": 0,
        "cut": 0,
        "texts": number,
        "tokens": 0,
        "truncated": json.loads(out)["truncated"],
        "width": 8,
    }
    command = ("text", "encode", "--config", root / "run.yaml")
    status, _, err = shine(*command, "text.dtype=float32")
    assert status == 2
    assert "another encoder's (dtype 'float16', not 'float32')" in err


@pytest.mark.ray
def test_a_gpu_that_is_not_there_is_told(ray_cluster, root, clip):
    with pytest.raises(InputError, match="this machine has none; set gpu=false"):
        encode(on_model(root, clip, "text.gpu=true"))
