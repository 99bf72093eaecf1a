"""Small feature stores of several shards, written at any URL as the format says."""

import json
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shine.data.shards import write_matrices
from shine.storage import Storage

SHARDS = (("a", "b", "c"), ("d", "e"))
LENGTHS = {"a": 3, "b": 1, "c": 7, "d": 2, "e": 5}
WIDTH = 6


def write_store(url, *, dtype="float16", audio_width=0, lengths=LENGTHS, shards=SHARDS,
                width=WIDTH, **changes):  # fmt: skip
    """Returns the clips of the videos; `changes` are made in the manifest."""
    storage = Storage(url, "")
    random = np.random.default_rng(0)
    clips = {vid: random.standard_normal((n, width)).astype(dtype) for vid, n in lengths.items()}
    places, files = {"vid": [], "shard": [], "offset": [], "num_clips": []}, []
    for number, vids in enumerate(shards):
        shard = write_matrices(storage, f"shard-{number:05d}", [clips[vid] for vid in vids])
        files.append({"name": shard.name, "sha256": shard.sha256, "bytes": shard.bytes})
        offset = 0
        for vid in vids:
            for name, value in zip(places, (vid, shard.name, offset, lengths[vid]), strict=True):
                places[name].append(value)
            offset += lengths[vid]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(places), sink)
    content = sink.getvalue().to_pybytes()
    digest = sha256(content).hexdigest()
    name = f"videos-{digest[:12]}.parquet"
    storage.write(name, content)
    manifest = {
        "format": 2, "width": width, "audio_width": audio_width, "clip_seconds": 1.0,
        "normalize": True, "dtype": dtype, "num_videos": len(lengths),
        "num_clips": sum(lengths.values()), "simulated": None, "sources": [],
        "videos": {"name": name, "sha256": digest, "bytes": len(content)}, "shards": files,
    }  # fmt: skip
    storage.write("manifest.json", json.dumps(manifest | changes).encode())
    return clips


def copied(store, url):
    """The files of a store on this machine are at `url` too."""
    storage = Storage(url, "")
    for path in sorted(store.iterdir()):
        storage.write(path.name, path)
    return url
