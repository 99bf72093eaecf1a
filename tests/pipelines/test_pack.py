import json

import h5py
import numpy as np
import pytest
from tiny import WIDTH, tiny_config, tiny_data

from pipelines.features import annotated_videos, pack, simulated_note
from shine.config import FeaturesConfig, SourceConfig
from shine.data import packing
from shine.data.packing import pack_store, source_widths
from shine.data.planted import WorldConfig, make_world
from shine.data.store import FeatureStore
from shine.errors import InputError
from shine.storage import Storage

SMALL = WorldConfig(train_rows=300, validation_rows=4, test_rows=4)


@pytest.fixture
def root(tmp_path):
    return tiny_data(tmp_path / "data")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("planted") / "world"
    make_world(SMALL, out)
    return out


def marked(folder, note):
    (folder / "world.json").write_text(json.dumps({"simulated": note, "checksums": {}}))


@pytest.mark.ray
@pytest.mark.parametrize("content", [None, b"", b"not numpy"])
def test_a_first_video_without_a_usable_file_is_left_out_alone(ray_cluster, root, content):
    first = root / "features" / "v0.npy"
    first.unlink()
    if content is not None:
        first.write_bytes(content)
    manifest = pack(tiny_config(root))
    assert [refusal["vid"] for refusal in manifest["refused"]] == ["v0"]
    assert (manifest["num_videos"], manifest["width"]) == (11, WIDTH)
    assert FeatureStore.open(root / "store").num_clips("v1") > 0


@pytest.mark.ray
def test_workers_pack_the_store_that_one_process_packs(ray_cluster, root, monkeypatch):
    monkeypatch.setattr(packing, "VIDEOS_PER_UNIT", 3)
    with h5py.File(root / "sound.h5", "w") as file:
        for path in sorted((root / "features").glob("*.npy")):
            file[path.stem] = np.repeat(np.load(path)[:, :2], 2, axis=0)
    sound = "{path: sound.h5, clip_seconds: 0.5, pool: max}"
    configs = [
        tiny_config(root, f"features.audio={sound}", f"features.store={store}")
        for store in ("one", "many")
    ]
    vids = annotated_videos(configs[0])
    progress = []
    expected = pack_store(configs[0], vids)
    assert pack(configs[1], lambda *counts: progress.append(counts)) == expected
    assert progress == [(3, 12), (6, 12), (9, 12), (12, 12)]
    one, many = (
        {path.name: path.read_bytes() for path in (root / name).iterdir()}
        for name in ("one", "many")
    )
    assert one == many
    assert len(expected["shards"]) == 4


@pytest.mark.ray
def test_a_source_that_a_worker_cannot_read_ends_the_work_with_a_sentence(ray_cluster, root):
    path = root / "raw.h5"
    with h5py.File(path, "w") as file:
        for number in range(12):
            file[f"v{number}"] = np.ones((8, WIDTH))
    path.write_bytes(path.read_bytes()[:-100])
    config = tiny_config(root, "features.sources=[raw.h5]", f"features.width={WIDTH}")
    with pytest.raises(InputError, match=r"raw\.h5: cannot be read: it is damaged or not whole"):
        pack(config)


def test_memory_is_packed_by_the_process_that_has_it(root):
    url = f"memory://{root.parent.name}"
    expected = pack(tiny_config(root, f"features.store={url}/store"))
    for path in (root / "features").iterdir():
        Storage(f"{url}/raw", "").write(path.name, path)
    config = tiny_config(root, f"features.sources=['{url}/raw']", "features.store=again")
    assert pack(config)["shards"] == expected["shards"]
    assert Storage(f"{url}/store", "").exists(expected["shards"][0]["name"])
    FeatureStore.open(root / "again").verify()


def test_the_width_is_that_of_the_first_file_that_can_be_read(tmp_path):
    np.save(tmp_path / "b.npy", np.zeros(3))
    np.save(tmp_path / "c.npy", np.zeros((2, 5)))
    np.save(tmp_path / "d.npy", np.zeros((2, 7)))
    settings = FeaturesConfig(sources=(SourceConfig(path=str(tmp_path)),))
    assert source_widths(settings, ["a", "b", "c", "d"]) == (5,)
    with pytest.raises(
        InputError, match="no video could be packed; the first reason: .* video 'a'"
    ):
        source_widths(settings, ["a", "b"])


def test_features_of_a_world_are_marked_from_wherever_they_are_used(root, world, tmp_path):
    note = "planted world, seed 0"
    assert simulated_note(tiny_config(root)) is None
    assert simulated_note(tiny_config(world)) == note
    assert simulated_note(tiny_config(root, f"features.sources=[{world / 'features'}]")) == note
    assert simulated_note(tiny_config(root, "features.sources=[../linked]")) is None
    (tmp_path / "linked").symlink_to(world / "features")
    assert simulated_note(tiny_config(root, "features.sources=[../linked]")) == note


def test_annotations_and_features_of_two_worlds_bear_both_marks(root, world):
    marked(root, "dressed")
    config = tiny_config(root, f"features.sources=[{world / 'features'}]")
    assert simulated_note(config) == "dressed; planted world, seed 0"


@pytest.mark.ray
def test_a_packed_store_keeps_the_mark_of_the_world_that_its_features_come_from(ray_cluster, root):
    other = root.parent / "other"
    other.mkdir()
    (root / "features").rename(other / "features")
    marked(other, "dressed")
    pack(tiny_config(root, "features.sources=[../other/features]"))
    assert FeatureStore.open(root / "store").simulated == "dressed"


def test_an_unfinished_world_is_not_packed(root):
    mark = {"simulated": "dressed", "unfinished": True, "checksums": {}}
    (root / "world.json").write_text(json.dumps(mark))
    with pytest.raises(InputError, match="is unfinished: its making was stopped"):
        pack(tiny_config(root))
