import io
import json
import os
import struct
import tracemalloc
import uuid
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import fsspec
import h5py
import lmdb
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from s3_server import serving_s3
from safetensors.numpy import save_file

from shine.config import Config, SourceConfig, load_config
from shine.data import arrays
from shine.data.pooling import num_pooled, pool_clips
from shine.data.sources import VideoRefused, open_source, remove_copies
from shine.errors import InputError

VIDEOS = {
    f"v{i}": np.random.default_rng(i).standard_normal((3 + i, 4)).astype(np.float32)
    for i in range(4)
}


def npy(values, **options):
    content = io.BytesIO()
    np.save(content, values, **options)
    return content.getvalue()


def npz(**arrays_):
    content = io.BytesIO()
    np.savez_compressed(content, **arrays_)
    return content.getvalue()


def in_folder(write):
    def made(root):
        folder = root / "raw"
        folder.mkdir()
        for vid, values in VIDEOS.items():
            write(folder, vid, values)
        return {"path": str(folder)}

    return made


def old_pt(folder, vid, values):
    torch.save(
        {"features": torch.from_numpy(values), "fps": 2.0},
        folder / f"{vid}.pth",
        _use_new_zipfile_serialization=False,
    )


def subfolders(root):
    for vid, values in VIDEOS.items():
        (root / "raw" / vid).mkdir(parents=True)
        np.save(root / "raw" / vid / "rgb.npy", values)
    return {"path": str(root / "raw"), "file": "{vid}/rgb.npy"}


def hdf5(root):
    with h5py.File(root / "raw.hdf5", "w") as file:
        for vid, values in VIDEOS.items():
            file[vid] = values
    return {"path": str(root / "raw.hdf5")}


def grouped(root):
    options = {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": (2, 3)}
    with h5py.File(root / "raw.h5", "w") as file:
        for vid, values in VIDEOS.items():
            file.create_dataset(f"all/{vid}/c3d_features", data=values, **options)
            file[f"all/{vid}/fps"] = 2.0
    return {"path": str(root / "raw.h5"), "file": "all/{vid}/c3d_features"}


def only_of_group(root):
    with h5py.File(root / "raw", "w") as file:
        for vid, values in VIDEOS.items():
            file[f"{vid}/c3d_features"] = values
    return {"path": str(root / "raw")}


def in_lmdb(place, subdir, values):
    with (
        lmdb.open(str(place), subdir=subdir, map_size=2**24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in values.items():
            transaction.put(key.encode(), value)


def lmdb_folder(root):
    in_lmdb(root / "raw", True, {vid: npy(values) for vid, values in VIDEOS.items()})
    return {"path": str(root / "raw")}


def lmdb_file(root):
    content = {f"{vid}/clip": npz(a=values, b=values[:1]) for vid, values in VIDEOS.items()}
    in_lmdb(root / "raw.mdb", False, content)
    return {"path": str(root / "raw.mdb"), "file": "{vid}/clip", "key": "a"}


LAYOUTS = {
    "npy": in_folder(lambda f, v, x: np.save(f / f"{v}.npy", x)),
    "npy by columns": in_folder(lambda f, v, x: np.save(f / f"{v}.npy", np.asfortranarray(x))),
    "npy of doubles, other byte order": in_folder(
        lambda f, v, x: np.save(f / f"{v}.npy", x[None].astype(">f8"))
    ),
    "npz": in_folder(lambda f, v, x: np.savez(f / f"{v}.npz", features=x, other=x[:1])),
    "npz, compressed": in_folder(lambda f, v, x: np.savez_compressed(f / f"{v}.npz", any=x)),
    "pt of a tensor": in_folder(lambda f, v, x: torch.save(torch.from_numpy(x), f / f"{v}.pt")),
    "pt of several": in_folder(
        lambda f, v, x: torch.save({"features": torch.from_numpy(x), "n": 3}, f / f"{v}.pt")
    ),
    "pt, older": in_folder(old_pt),
    "safetensors": in_folder(lambda f, v, x: save_file({"a": x}, f / f"{v}.safetensors")),
    "npy in folders": subfolders,
    "hdf5": hdf5,
    "hdf5 of groups, compressed": grouped,
    "hdf5 of groups of one": only_of_group,
    "lmdb": lmdb_folder,
    "lmdb in a file": lmdb_file,
}


def check(source):
    for vid, expected in VIDEOS.items():
        found = source.read(vid, 4)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        assert source.version(vid) == source.version(vid)
    with pytest.raises(VideoRefused, match="no features of video 'gone'"):
        source.read("gone")
    with pytest.raises(VideoRefused, match="expected 5 columns, got 4"):
        source.read("v0", 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_video_is_read_from_any_layout(tmp_path, layout):
    check(open_source(SourceConfig(**LAYOUTS[layout](tmp_path))))


def moved(settings, target):
    """The same source below a URL."""
    path = Path(settings["path"])
    fs, root = fsspec.core.url_to_fs(target)
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        name = f"{root}/raw/{file.relative_to(path)}".removesuffix("/.")
        fs.makedirs(name.rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(name, file.read_bytes())
    return SourceConfig(**{**settings, "path": f"{target}/raw"})


@pytest.mark.parametrize(
    "layout", ["npy", "npz", "pt of several", "npy in folders", "hdf5", "lmdb"]
)
def test_a_source_elsewhere_is_read(tmp_path, monkeypatch, layout):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = open_source(moved(LAYOUTS[layout](tmp_path), f"memory://{uuid.uuid4()}"))
    check(source)


@pytest.fixture(scope="module")
def bucket():
    with serving_s3() as url:
        yield url


@pytest.mark.parametrize("layout", ["npz", "hdf5", "lmdb", "lmdb in a file"])
def test_a_source_in_an_object_store_is_read(tmp_path, monkeypatch, bucket, layout):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    check(open_source(moved(LAYOUTS[layout](tmp_path), f"{bucket}/{uuid.uuid4()}")))


def test_a_file_elsewhere_is_copied_once_and_until_nobody_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = moved(hdf5(tmp_path), f"memory://{uuid.uuid4()}")
    first = open_source(config)
    first.read("v0")
    (copy,) = (p for p in tmp_path.glob("shine-features-*/*") if not p.suffix)
    inode = copy.stat().st_ino
    second = open_source(config)
    second.read("v1")
    assert copy.stat().st_ino == inode
    remove_copies()
    assert copy.exists()
    del first, second
    remove_copies()
    assert not copy.exists()


def test_a_path_stands_for_a_source_and_comes_back_as_one():
    sources = ["rgb", {"path": "raw.h5", "file": "{vid}/c3d"}, {"path": "x", "clip_seconds": 0.5}]
    config = load_config(None, [f"features.sources={json.dumps(sources)}", "features.audio=pann"])
    assert config.features.model_dump(mode="json")["sources"] == sources
    assert config.features.parts[0] == SourceConfig(path="rgb")
    assert [part.path for part in config.features.parts] == ["rgb", "raw.h5", "x", "pann"]
    again = load_config(None, [f"features.sources={json.dumps(sources)}", "features.audio=pann"])
    assert Config.model_validate(yaml.safe_load(again.to_yaml())) == config


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ("[{pth: a}]", "unknown key 'features.sources.0.pth'; .*'features.sources.0.path'"),
        ("[{path: a, file: x.npy}]", r"features.sources.0.file: needs \{vid\} in it"),
        ("[{path: a, pool: sum}]", "features.sources.0.pool"),
        ("[a, a]", "needs one or more sources, none twice"),
        ("[]", "needs one or more sources"),
        ("['ftp://me:secret@host/raw']", "a path or URL without a password"),
    ],
)
def test_a_source_that_is_misspelt_is_told(sources, says):
    with pytest.raises(InputError, match=says) as told:
        load_config(None, [f"features.sources={sources}"])
    assert "secret" not in str(told.value)


def test_a_source_that_is_none_is_told(tmp_path):
    (tmp_path / "text").write_text("text")
    for path in (tmp_path / "text", tmp_path / "none", "memory://none"):
        with pytest.raises(InputError, match="no features in .*expected a folder of one file per"):
            open_source(SourceConfig(path=str(path)))


def test_a_link_is_read_where_it_leads(tmp_path):
    np.save(tmp_path / "there.npy", VIDEOS["v0"])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "v.npy").symlink_to(tmp_path / "there.npy")
    source = open_source(SourceConfig(path=str(tmp_path / "raw")))
    before = source.version("v")
    np.testing.assert_array_equal(source.read("v"), VIDEOS["v0"])
    np.save(tmp_path / "there.npy", VIDEOS["v1"])
    assert source.version("v") != before


@pytest.mark.parametrize("vid", ["../v0", "a/b", "a\\b", "", ".", "..", "v\0"])
@pytest.mark.parametrize("layout", ["npy", "hdf5", "lmdb"])
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path, layout, vid):
    np.save(tmp_path / "v0.npy", VIDEOS["v0"])
    source = open_source(SourceConfig(**LAYOUTS[layout](tmp_path)))
    with pytest.raises(VideoRefused, match="could lead to another place"):
        source.read(vid)
    assert source.version(vid)


# What somebody made to do harm, or what was cut


class Gadget:
    """Loading its pickle would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def npy_claiming(shape, content=b"", dtype="<f4"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content


def npy_describing(version, num_bytes):
    """An npy file whose description of the array is long."""
    size = struct.pack("<H" if version == 1 else "<I", num_bytes)
    return b"\x93NUMPY" + bytes([version, 0]) + size + b" " * num_bytes


def zipped(content, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("features.npy", content)
    return file.getvalue()


def lying(content, claimed):
    """The same archive, whose member claims another size."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = struct.pack("<I", archive.infolist()[0].file_size)
    assert content.count(size) >= 2
    return content.replace(size, struct.pack("<I", claimed))


def objects():
    values = np.empty((1, 1), object)
    values[0, 0] = Gadget("unused")
    return npy(values, allow_pickle=True)


GIB = 2**30
HOSTILE = {
    "many rows": npy_claiming((2**40, 4)),
    "many columns": npy_claiming((1, 2**40)),
    "a row too many for memory": npy_claiming((2**28 + 1, 1)),
    "small numbers that grow": npy_claiming((2**28 + 1, 1), dtype="|u1"),
    "claimed rows that are not there": npy_claiming((2**20, 4), bytes(64)),
    "negative rows": npy_claiming((-4, 4), bytes(64)),
    "records": npy_claiming((4, 4), bytes(64), dtype="V4"),
    "a long header": npy_describing(1, 2**16 - 1),
    "a header that an archive makes long": zipped(npy_describing(2, 2**27)),
    "a header of version 3 that an archive makes long": zipped(npy_describing(3, 2**27)),
    "objects": objects(),
    "objects in an archive": zipped(objects()),
    "an archive of zeros": zipped(npy_claiming((2**33, 4), bytes(2**20))),
    "an archive that claims more": lying(zipped(npy_claiming((2**20, 4), bytes(99))), 2**24 + 128),
    "an archive that holds more": zipped(npy_claiming((4, 4), bytes(2**20))),
    "an archive of another compression": zipped(npy(VIDEOS["v0"]), zipfile.ZIP_BZIP2),
    "an archive with a wrong checksum": zipped(npy(VIDEOS["v0"]), zipfile.ZIP_STORED).replace(
        VIDEOS["v0"].tobytes(), VIDEOS["v1"].tobytes()[:48]
    ),
    "a pickle": b"\x80\x04\x95\x0c\0\0\0\0\0\0\0\x8c\2os\x94\x8c\6system\x94\x93.",
    "nothing": b"",
    "text": b"no array",
    "cut": npy(VIDEOS["v0"])[:-1],
    "cut archive": npz(features=VIDEOS["v0"])[:-1],
    "infinite": npy(np.full((2, 4), np.inf)),
    "no clips": npy(np.zeros((0, 4), np.float32)),
}


@pytest.mark.parametrize("place", ["file", "file elsewhere", "lmdb"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_array_is_refused_within_small_memory(tmp_path, name, place):
    if place == "lmdb":
        in_lmdb(tmp_path / "raw", True, {"v": HOSTILE[name], "good": npy(VIDEOS["v0"])})
        path = str(tmp_path / "raw")
    elif place == "file":
        path = str(tmp_path)
        (tmp_path / "v.npy").write_bytes(HOSTILE[name])
    else:
        path = f"memory://{uuid.uuid4()}"
        fsspec.filesystem("memory").pipe_file(
            f"{path.removeprefix('memory:/')}/v.npy", HOSTILE[name]
        )
    source = open_source(SourceConfig(path=path))
    tracemalloc.start()
    try:
        with pytest.raises(VideoRefused) as told:
            source.read("v")
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(told.value)
    assert "allow_pickle" not in str(told.value)


@pytest.mark.parametrize("ending", ["pt", "npy", "npz", "pth"])
@pytest.mark.parametrize("zipped_", [True, False])
def test_nothing_in_a_file_of_torch_is_executed(tmp_path, ending, zipped_):
    made = tmp_path / "made"
    content = {"features": torch.ones(2, 4), "x": Gadget(made)}
    torch.save(content, tmp_path / f"v.{ending}", _use_new_zipfile_serialization=zipped_)
    source = open_source(SourceConfig(path=str(tmp_path)))
    with pytest.raises(VideoRefused, match="nothing in the file was run"):
        source.read("v")
    assert not made.exists()


def safetensors_claiming(shape, numbers=b""):
    end = len(numbers)
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header + numbers


@pytest.mark.parametrize(
    "content",
    [
        safetensors_claiming([2**40, 4]),
        safetensors_claiming([4, 4], bytes(60)),
        safetensors_claiming([4, 4], bytes(64))[:-1],
        struct.pack("<Q", 2**60) + b"{" + bytes(100),
    ],
)
def test_a_damaged_file_of_tensors_is_refused(tmp_path, content):
    (tmp_path / "v.safetensors").write_bytes(content)
    with pytest.raises(VideoRefused, match=r"v\.safetensors"):
        open_source(SourceConfig(path=str(tmp_path))).read("v")


def test_a_key_that_is_not_there_is_told_with_those_that_are(tmp_path):
    np.savez(tmp_path / "v.npz", **{f"part{i}": VIDEOS["v0"] for i in range(9)})
    with pytest.raises(VideoRefused, match=r"one named x: \['part0', .* and 4 more; set `key`"):
        open_source(SourceConfig(path=str(tmp_path), key="x")).read("v")
    source = open_source(SourceConfig(path=str(tmp_path), key="part8"))
    np.testing.assert_array_equal(source.read("v"), VIDEOS["v0"])


def inflating(dataset_bytes):
    """A chunk that inflates to more than it should."""
    return zlib.compress(bytes(dataset_bytes))


def hostile_hdf5(path):
    """An hdf5 file of one video in order and of others that reach out of it, or lie."""
    secret = path.with_name("secret")
    secret.write_bytes(bytes(4096))
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other["v"] = VIDEOS["v0"]
    with h5py.File(path, "w") as file:
        file["good"] = VIDEOS["v0"]
        file["external_link"] = h5py.ExternalLink("other.h5", "v")
        file["soft_link"] = h5py.SoftLink("/good")
        file["group/inner"] = h5py.SoftLink("/external_link")
        file.create_dataset("external_data", (4, 4), "f4", external=[(str(secret), 0, 64)])
        layout = h5py.VirtualLayout((3, 4), "f4")
        layout[:] = h5py.VirtualSource(str(path.with_name("other.h5")), "v", (3, 4))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("no_numbers", (2**16, 4), "f4")
        file.create_dataset("no_chunks", (2**16, 4), "f4", chunks=(2**10, 4))
        file.create_dataset("huge", (2**40, 4), "f4", chunks=(2**10, 4), compression="gzip")
        bomb = file.create_dataset("bomb", (4, 4), "f4", chunks=(4, 4), compression="gzip")
        bomb.id.write_direct_chunk((0, 0), inflating(2**26))
        short = file.create_dataset("short", (4, 4), "f4", chunks=(4, 4), compression="gzip")
        short.id.write_direct_chunk((0, 0), inflating(60))
        wrong = file.create_dataset("torn", (4, 4), "f4", chunks=(4, 4), compression="gzip")
        wrong.id.write_direct_chunk((0, 0), b"not deflated")
        file.create_dataset("lzf", data=VIDEOS["v0"], compression="lzf")
        file.create_dataset("text", data=np.array([[b"a", b"b"]], dtype=h5py.string_dtype()))
        file.create_dataset("scalar", data=1.0)
        file.create_dataset("nothing", data=h5py.Empty("f4"))
        file["nan"] = np.full((2, 4), np.nan)
        file.create_group("empty")


HOSTILE_HDF5 = {
    "external_link": "a link to another place",
    "soft_link": "a link to another place",
    "group/inner": "a link to another place",
    "group": "a link to another place",
    "external_data": "lie in another file",
    "virtual": "lie in another file",
    "no_numbers": "damaged or not whole",
    "no_chunks": "damaged or not whole",
    "huge": "takes more than",
    "bomb": "damaged or not whole",
    "short": "damaged or not whole",
    "torn": "damaged or not whole",
    "lzf": "with something else than gzip",
    "text": "expected numbers of shape",
    "scalar": "expected numbers of shape",
    "nothing": "expected numbers of shape",
    "nan": "NaN or infinity in clip 0",
    "empty": "expected one array",
}


@pytest.mark.parametrize("name", HOSTILE_HDF5)
def test_nothing_but_plain_data_of_an_hdf5_file_is_read(tmp_path, name):
    path = tmp_path / "raw.h5"
    hostile_hdf5(path)
    template = f"{name.rpartition('/')[0]}/{{vid}}"
    source = open_source(SourceConfig(path=str(path), file=template))
    tracemalloc.start()
    try:
        with pytest.raises(VideoRefused, match=HOSTILE_HDF5[name]):
            source.read(name.rpartition("/")[2])
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
    good = open_source(SourceConfig(path=str(path))).read("good")
    np.testing.assert_array_equal(good, VIDEOS["v0"])


@pytest.mark.parametrize("layout", ["hdf5", "lmdb", "lmdb in a file"])
def test_a_cut_file_of_many_videos_ends_the_work_with_a_sentence(tmp_path, layout):
    settings = LAYOUTS[layout](tmp_path)
    path = Path(settings["path"])
    path = path / "data.mdb" if path.is_dir() else path
    content = path.read_bytes()
    for length in (len(content) - 4096, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="cannot be read: it is damaged or not whole"):
            open_source(SourceConfig(**settings)).read("v0")


@given(st.integers(0, 20), st.integers(0, 2**16), st.sampled_from(["npz", "npy"]))
def test_whatever_a_bit_becomes_a_value_is_read_or_refused(offset, bit, kind):
    content = bytearray(npz(features=VIDEOS["v1"]) if kind == "npz" else npy(VIDEOS["v1"]))
    bit = (bit + 8 * offset) % (8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    with suppress(InputError):
        found = arrays.parse_matrix(bytes(content), "features", "clip, feature", "here")
        assert found.ndim == 2
        assert np.isfinite(found).all()


# Clips of another length


def slowly_pooled(clips, old, new, pool):
    """Each new clip from all old ones, by their overlap in hundredths of a second."""
    old, new = round(100 * old), round(100 * new)
    ticks = np.repeat(np.arange(len(clips)), old)
    rows = []
    for start in range(0, len(ticks), new):
        here = ticks[start : start + new]
        if pool == "mean":
            rows.append(clips[here].astype(np.float64).mean(axis=0))
        elif pool == "max":
            rows.append(clips[here].max(axis=0))
        else:
            center = start + (min(start + new, len(ticks)) - start) / 2
            distance = [abs((i + 0.5) * old - center) for i in range(len(clips))]
            rows.append(clips[int(np.argmin(distance))])
    return np.array(rows)


SECONDS = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.64, 1.0, 1.07, 2.0, 3.0])


@given(st.integers(1, 12), SECONDS, SECONDS, st.sampled_from(["mean", "max", "nearest"]))
def test_clips_of_another_length_are_those_of_a_slow_loop(num_clips, old, new, pool):
    clips = np.random.default_rng(num_clips).standard_normal((num_clips, 3)).astype(np.float32)
    found = pool_clips(clips, old, new, pool)
    expected = slowly_pooled(clips, old, new, pool)
    assert len(found) == len(expected) == num_pooled(num_clips, old, new)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@given(st.integers(1, 9), SECONDS, st.sampled_from(["mean", "max", "nearest"]))
def test_twice_as_many_clips_and_back_are_the_same_numbers(num_clips, seconds, pool):
    clips = np.random.default_rng(num_clips).standard_normal((num_clips, 3)).astype(np.float32)
    finer = pool_clips(clips, seconds, seconds / 2, pool)
    np.testing.assert_array_equal(finer, np.repeat(clips, 2, axis=0))
    np.testing.assert_array_equal(pool_clips(finer, seconds / 2, seconds, pool), clips)
