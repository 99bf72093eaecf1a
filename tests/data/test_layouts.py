"""The real Charades-CG annotations with dressed features, in three layouts on disk."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from shine.config import load_config
from shine.data.annotations import read_annotations
from shine.data.dress import DressConfig, dress
from shine.data.packing import pack_store
from shine.data.store import FeatureStore

CHARADES = Path(os.environ.get("SHINE_SHARED", "../shared")) / "data" / "charades_cg"
CONFIG = Path(__file__).parents[2] / "configs" / "charades_cg_dressed.yaml"
TRAIN, *TESTS = (
    "charades_cg_gpt_train.jsonl",
    "charades_cg_test.jsonl",
    "charades_cg_novel_composition.jsonl",
    "charades_cg_novel_word.jsonl",
)
ROWS = 60  # of each file


@pytest.mark.skipif(
    not CHARADES.is_dir(), reason="needs the annotations; set SHINE_SHARED to their folder"
)
def test_real_annotations_give_one_store_from_three_layouts(tmp_path):
    part, root = tmp_path / "part", tmp_path / "world"
    part.mkdir()
    for name in (TRAIN, *TESTS):
        lines = (CHARADES / name).read_text().splitlines(keepends=True)
        (part / name).write_text("".join(lines[:ROWS]))
    dress([part / name for name in (TRAIN, *TESTS)], root, DressConfig(tagger="shine"))
    rows = [row for name in (TRAIN, *TESTS) for row in read_annotations(root / name)]
    vids = {row.vid for row in rows}

    (root / "npz").mkdir()
    with h5py.File(root / "all.hdf5", "w") as file:
        for path in (root / "features").iterdir():
            clips = np.load(path)
            np.savez_compressed(root / "npz" / f"{path.stem}.npz", features=clips)
            file[path.stem] = clips
    stores = {}
    for source in ("features", "npz", "all.hdf5"):
        overrides = [
            f"data.root={root}",
            f"data.train={TRAIN}",
            "data.validation={}",
            f"features.sources=[{source}]",
            f"features.store=store_{source}",
        ]
        manifest = pack_store(load_config(CONFIG, overrides), vids, "dressed")
        assert (manifest["num_videos"], manifest["refused"]) == (len(vids), [])
        folder = root / f"store_{source}"
        stores[source] = {
            path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"
        }
        assert {**manifest, "sources": []} == stores.setdefault("", {**manifest, "sources": []})
    assert stores["features"] == stores["npz"] == stores["all.hdf5"]
    assert len(stores["npz"]) > 2

    opened = FeatureStore.open(root / "store_all.hdf5")
    for row in rows:
        expected = np.load(root / "features" / f"{row.vid}.npy")
        expected /= np.linalg.norm(expected, axis=1, keepdims=True) + 1e-5
        np.testing.assert_array_equal(opened.clips(row.vid), expected.astype(np.float16))
        assert abs(len(expected) - row.duration_seconds) <= 1
