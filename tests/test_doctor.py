import json
import shutil

import fsspec
import h5py
import lmdb
import numpy as np
import pytest
from encoded import store_texts
from tiny import tiny_config, tiny_data

from shine import doctor
from shine.data.annotations import write_jsonl
from shine.data.loading import Source
from shine.data.text_files import needed_texts
from shine.doctor import could_train, examine
from shine.errors import InputError
from shine.storage import Storage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


def parts(findings, *statuses):
    return {one.part: one.status for one in findings if not statuses or one.status in statuses}


def only(findings, part):
    (finding,) = [one for one in findings if one.part == part]
    return finding


def test_all_is_well_where_training_begins(root):
    findings = examine(tiny_config(root))
    assert parts(findings) == {
        "train": "ok",
        "validation val": "ok",
        "test test_trivial": "ok",
        "hard negatives": "ok",
        "feature store": "ok",
        "text": "ok",
        "GPU": "not needed",
    }
    assert could_train(findings)
    assert "16 rows of 8 videos" in only(findings, "train").found
    assert "16 of 16 training queries, 3 levels" in only(findings, "hard negatives").found
    assert "12 videos" in only(findings, "feature store").found


def spoil_nothing(root):
    return ()


def drop_train(root):
    (root / "train.jsonl").unlink()
    return ()


def break_validation(root):
    (root / "val.jsonl").write_text("{")
    return ()


def drop_test(root):
    (root / "test.jsonl").unlink()
    return ("evaluate.negatives=null",)


def drop_store(root):
    (root / "store" / "manifest.json").unlink()
    return ()


def old_store(root):
    (root / "store" / "manifest.json").write_text('{"format": 1}')
    return ()


def other_width(root):
    return ("features.width=9",)


def other_stride(root):
    return ("features.clip_seconds=2",)


def other_type(root):
    return ("features.dtype=float32",)


def other_form(root):
    (root / "store" / "manifest.json").write_text('{"format": 2}')
    return ()


def new_video(root):
    records = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    write_jsonl(root / "train.jsonl", [*records, {**records[0], "qid": "new", "vid": "new"}])
    return ()


def long_videos(root):
    records = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    for record in records:
        record["duration"] *= 2
    write_jsonl(root / "train.jsonl", records)
    return ()


def no_negatives(root):
    return ("data.negatives=none.parquet",)


def few_negatives(root):
    return ("loss.fine_weights=[1, 1, 1, 1, 1]", "loss.fine_margins=[1, 1, 1, 1, 1]")


def no_words(root):
    return ("text.word_vectors=none.parquet",)


def no_texts(root):
    return ("text.encoder=hugging_face",)


@pytest.mark.parametrize(
    ("spoil", "part", "status"),
    [
        (spoil_nothing, "train", "ok"),
        (drop_train, "train", "missing"),
        (break_validation, "validation val", "mismatched"),
        (drop_test, "test test_trivial", "missing"),
        (drop_store, "feature store", "missing"),
        (old_store, "feature store", "mismatched"),
        (other_width, "feature store", "mismatched"),
        (other_stride, "feature store", "mismatched"),
        (other_type, "feature store", "mismatched"),
        (other_form, "feature store", "mismatched"),
        (new_video, "feature store", "mismatched"),
        (long_videos, "train", "mismatched"),
        (no_negatives, "hard negatives", "missing"),
        (few_negatives, "hard negatives", "mismatched"),
        (no_words, "word vectors", "missing"),
        (no_texts, "text store", "missing"),
    ],
)
def test_what_is_wrong_is_told_and_whether_training_could_start_is_true(root, spoil, part, status):
    config = tiny_config(root, *spoil(root))
    findings = examine(config)
    assert parts(findings)[part] == status
    try:
        source = Source.open(config)
        source.training()
        source.validation()
    except InputError:
        assert not could_train(findings)
    else:
        assert could_train(findings)
    for one in findings:
        if one.status in ("missing", "mismatched"):
            assert one.advice or ";" in one.found


def test_raw_features_are_counted_where_nothing_is_packed(root):
    drop_store(root)
    for number in (1, 2, 3):
        (root / "features" / f"v{number}.npy").unlink()
    findings = examine(tiny_config(root))
    assert only(findings, "features features").found.endswith(
        ": 9 of the 12 videos of the annotations"
    )
    findings = examine(tiny_config(root, "features.sources=[none]"))
    assert "no features in" in only(findings, "features none").found


@pytest.mark.parametrize("written", [True, False])
def test_a_signed_source_is_told_without_its_signature(root, tmp_path, written):
    drop_store(root)
    signed = f"memory://{tmp_path.name}/raw?X-Signature=secret"
    if written:
        Storage(signed, "").write("v1.npy", root / "features" / "v1.npy")
    found = only(examine(tiny_config(root, f"features.sources=['{signed}']")), "features raw").found
    assert ("1 of the 12 videos" in found) == written
    assert "/raw:" in found
    assert "secret" not in found


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("charades_cg", "zxccade/SHINE"),
        ("anet_cg", "YYJMJC/Compositional-Temporal-Grounding"),
        ("qvhighlights", "jayleicn/moment_detr"),
        ("tacos", "2D-TAN"),
        ("world", "shine world make"),
        ("own", "shine data check"),
    ],
)
def test_missing_files_come_with_where_they_are_normally_obtained(tmp_path, folder, says):
    findings = examine(tiny_config(tmp_path / folder))
    assert says in only(findings, "train").advice
    assert not could_train(findings)


def test_a_text_store_needs_files_or_a_package_and_is_told_so(root, monkeypatch):
    precomputed = examine(tiny_config(root, "text.encoder=precomputed"))
    assert only(precomputed, "text store").status == "missing"
    assert "no folder of text features" in only(precomputed, "text files").found
    assert not only(precomputed, "text files").needed
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    findings = examine(tiny_config(root, "text.encoder=hugging_face"))
    package = only(findings, "package transformers")
    assert (package.status, package.advice) == ("missing", "install shine-grounding[models]")


def renamed(root, split):
    """Another sentence in the first row of a split."""
    records = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
    records[0]["query"] = f"a new sentence of {split}"
    write_jsonl(root / f"{split}.jsonl", records)


def test_texts_that_a_store_lacks_are_told(root):
    (root / "text_features").mkdir()
    config = tiny_config(root, "text.encoder=precomputed")
    for origin in needed_texts(config).values():
        name = config.text.query_file if origin.level is None else config.text.negative_file
        path = root / "text_features" / name.format(qid=origin.qid, level=origin.level)
        np.savez(path, last_hidden_state=np.ones((3, 8), np.float32))
    findings = examine(config)
    assert parts(findings)["text files"] == "ok"
    assert not could_train(findings)
    store_texts(config)
    findings = examine(config)
    assert parts(findings)["text store"] == "ok"
    assert could_train(findings)
    (root / "train.jsonl").rename(root / "away")
    findings = examine(config)
    assert parts(findings)["text store"] == "unknown"
    assert "not compared with the texts" in only(findings, "text store").found
    assert not could_train(findings)
    (root / "away").rename(root / "train.jsonl")
    renamed(root, "test")
    findings = examine(config)
    assert parts(findings, "missing") == {"text of tests": "missing"}
    assert could_train(findings)
    Source.open(config).training()
    renamed(root, "val")
    findings = examine(config)
    assert only(findings, "text store").status == "mismatched"
    assert not could_train(findings)
    with pytest.raises(InputError, match="not in the text store"):
        Source.open(config).validation()


def test_a_key_is_told_by_its_name_and_never_shown(root, monkeypatch):
    config = tiny_config(
        root,
        "data.negatives=none.parquet",
        "negatives.generator=llm",
        "negatives.llm.model=m",
        "negatives.llm.key_variable=SHINE_TEST_KEY",
    )
    monkeypatch.delenv("SHINE_TEST_KEY", raising=False)
    assert only(examine(config), "key of the endpoint").status == "missing"
    monkeypatch.setenv("SHINE_TEST_KEY", "sesame-opens-it")
    findings = examine(config)
    assert only(findings, "key of the endpoint").status == "ok"
    assert "sesame" not in str(findings)
    assert only(findings, "tagger").status == "ok"


def test_a_gpu_is_looked_for_where_training_uses_one(root):
    import torch

    finding = only(examine(tiny_config(root, "train.gpu=true")), "GPU")
    assert (finding.status == "ok") == torch.cuda.is_available()


def test_without_hard_negatives_none_are_looked_for(root):
    config = tiny_config(
        root, "loss.fine_weights=[]", "loss.fine_margins=[]", "data.negatives=none.parquet"
    )
    findings = examine(config)
    assert only(findings, "hard negatives").status == "not needed"
    assert could_train(findings)


def in_hdf5(root, vids):
    with h5py.File(root / "all.hdf5", "w") as file:
        for vid in vids:
            file[f"{vid}/rgb"] = np.load(root / "features" / f"{vid}.npy")
        file["v0/linked"] = h5py.SoftLink("/v0/rgb")
    return "all.hdf5"


def in_lmdb(root, vids):
    with (
        lmdb.open(str(root / "all.lmdb"), map_size=2**24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for vid in vids:
            transaction.put(f"{vid}/rgb".encode(), (root / "features" / f"{vid}.npy").read_bytes())
    return "all.lmdb"


@pytest.mark.parametrize("pack", [in_hdf5, in_lmdb])
def test_the_videos_in_one_file_of_many_are_counted(root, pack):
    drop_store(root)
    vids = [f"v{number}" for number in range(12)]
    name = pack(root, vids[:9])

    def told(file):
        sources = json.dumps([{"path": name, "file": file}])
        return only(examine(tiny_config(root, f"features.sources={sources}")), f"features {name}")

    finding = told("{vid}/rgb")
    assert (finding.status, finding.needed) == ("missing", False)
    assert finding.found.endswith(": 9 of the 12 videos of the annotations")
    for file in ("{vid}/linked", "{vid}/" + "x" * 600):
        assert told(file).found.endswith(": 0 of the 12 videos of the annotations")
    pack(root, vids)
    assert told("{vid}/rgb").status == "ok"


def test_a_file_of_many_videos_that_is_cut_or_elsewhere_is_told(root):
    drop_store(root)
    path = root / in_hdf5(root, [f"v{number}" for number in range(12)])
    fsspec.filesystem("memory").pipe_file("/doctor/all.hdf5", path.read_bytes())
    there = "features.sources=['memory://doctor/all.hdf5']"
    finding = only(examine(tiny_config(root, there)), "features all.hdf5")
    assert (finding.status, "packing copies it" in finding.found) == ("unknown", True)
    path.write_bytes(path.read_bytes()[:-4096])
    cut = only(examine(tiny_config(root, "features.sources=[all.hdf5]")), "features all.hdf5")
    assert (cut.status, "damaged or not whole" in cut.found) == ("mismatched", True)


def test_a_model_that_is_not_here_is_told_as_not_looked_at(root):
    finding = only(examine(tiny_config(root, "text.encoder=hugging_face")), "text model")
    assert finding.status == "unknown"
    assert "is fetched from the Hugging Face hub when texts are encoded" in finding.found
    (root / "clip").mkdir()
    here = tiny_config(root, "text.encoder=hugging_face", "text.model=clip")
    assert only(examine(here), "text model").status == "ok"
