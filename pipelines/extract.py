"""Ray Data around extraction: videos become clips in many workers at once.

The folder `extract.out` holds `{vid}.npy` of every video that could be read, `extract.jsonl` with
what is known of every video, and `extract.json` with the settings, which are those of all files in
it. A worker writes a record of its own right after a file, so that a video is read again after a
stop only if its record or its file is missing; the records become lines at the end.
"""

import importlib.util
import io
import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from cluster.connection import connect
from cluster.size import data_workers
from pipelines.stage import run_stage
from shine.config import Config, ExtractConfig
from shine.errors import InputError
from shine.pretrained import folder_digest
from shine.storage import Storage, is_url

LINES: Final = "extract.jsonl"
SETTINGS: Final = "extract.json"
_RECORDS: Final = "extract.records"  # folder of those that are no lines yet
_MIN_SECONDS: Final = 0.01  # of a part of a clip; the times of frames are not finer
_MAX_NAME_BYTES: Final = 200
_INSTALL: Final = 'pip install "shine-grounding[models]"'

Record = dict[str, Any]
Progress = Callable[[int, int, str], None]  # done, total, note


class ExtractVideos:
    """Extracts the videos that tables name; what a worker runs.

    Args:
        settings: a section `extract` as JSON, with absolute places.
        clip_seconds: of a clip.
    """

    def __init__(self, settings: str, clip_seconds: float):
        import torch

        from shine.video.extractor import Extractor

        self._config = config = ExtractConfig.model_validate_json(settings)
        self._clip_seconds = clip_seconds
        self._videos, self._out = _storages(config)
        torch.set_num_threads(config.threads)
        self._extractor = Extractor.load(
            config.model,
            config.revision,
            batch_size=config.batch_size,
            device="cuda" if config.gpu else "cpu",
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        """The record of each video, as JSON; the files of those that could be read are whole."""
        return pa.table({"record": [json.dumps(self._extract(row)) for row in table.to_pylist()]})

    def _extract(self, row: Mapping[str, Any]) -> Record:
        vid = row["vid"]
        record = {**row}
        try:
            facts, clips = self._read(row["file"])
        except InputError as error:
            self._out.remove(f"{vid}.npy")  # of a file of this name that was another one
            record["refused"] = str(error)
        else:
            content = io.BytesIO()
            np.save(content, clips, allow_pickle=False)
            self._out.write(f"{vid}.npy", content.getvalue())
            record |= {**facts, "columns": clips.shape[1]}
        self._out.write(f"{_RECORDS}/{vid}.json", json.dumps(record).encode())
        return record

    def _read(self, file: str) -> tuple[Record, Float[np.ndarray, "clip width"]]:
        """What is known of a video, and its clips as they are stored.

        Raises:
            InputError: it cannot be read, or its clips do not fit.
        """
        from shine.video.decoding import open_video

        config, name = self._config, f"{self._videos.shown}/{file}"
        with (
            self._videos.open(file) as content,
            open_video(content, name, threads=config.threads) as video,
        ):
            frames = video.frames(self._clip_seconds, config.frames_per_clip)
            clips = self._extractor.clips(frames, config.frames_per_clip, name)
            facts = asdict(video.facts)
        if not np.abs(clips).max() <= np.finfo(config.dtype).max:  # nor is NaN
            raise InputError(
                f"{name}: the model gives {np.abs(clips).max():.3g}, which does not fit "
                f"{config.dtype}; set extract.dtype=float32 or another extract.model"
            )
        return facts, clips.astype(config.dtype)


def extract(config: Config, on_progress: Progress = lambda done, total, note: None) -> Record:
    """The clips of every video in `extract.videos` stand in `extract.out`.

    A video that cannot be read is left out with its reason. One whose file and record are there is
    not read again unless its size has changed.

    Args:
        config: whose sections `extract` and `features` count.
        on_progress: told the number of videos done and in all.

    Returns:
        How many videos, clips and seconds are there; `refused` and `damaged`: `vid` and `reason` of
        the videos that were left out, and of those that were read though something is wrong.

    Raises:
        InputError: a library is missing, there are no videos, the model cannot be loaded, or `out`
            holds features by other settings.
    """
    settings = _located(config)
    videos, out = _storages(settings)
    _check_libraries()
    digest = folder_digest(Path(settings.model)) if Path(settings.model).is_dir() else None
    rows, misnamed = found_videos(videos)
    there = set(out.names())
    _check_settings(out, config, digest, there)
    known, apart = _records(out)
    todo = [row for row in rows if f"{row['vid']}.npy" not in there or not _holds(known, row)]
    known |= {record["vid"]: record for record in misnamed}
    try:
        for record in _extracted(settings, config.features.clip_seconds, todo, on_progress):
            known[record["vid"]] = record
            apart.add(record["vid"])
    finally:
        lines = [json.dumps(known[vid], ensure_ascii=False) + "\n" for vid in sorted(known)]
        out.write(LINES, "".join(lines).encode())
        for vid in apart:
            out.remove(f"{_RECORDS}/{vid}.json")
    asked = [known[row["vid"]] for row in (*rows, *misnamed)]
    held = [record for record in asked if "refused" not in record]
    return {
        "out": out.shown,
        "num_videos": len(held),
        "num_read": len(todo),  # by this command; the others were there
        "num_clips": sum(record["num_clips"] for record in held),
        "duration_seconds": sum(record["duration_seconds"] for record in held),
        "width": max((record["columns"] for record in held), default=None),
        "refused": [{"vid": r["vid"], "reason": r["refused"]} for r in asked if "refused" in r],
        "damaged": [{"vid": r["vid"], "reason": r["note"]} for r in held if r["note"]],
    }


def _extracted(
    settings: ExtractConfig,
    clip_seconds: float,
    rows: Sequence[Record],
    on_progress: Progress,
) -> Iterator[Record]:
    """The records of videos, each as it is ready."""
    if not rows:
        return
    with connect(min_cpus=settings.threads):
        import ray

        tables = [ray.put(pa.Table.from_pylist([row])) for row in rows]
        arguments = (settings.model_dump_json(), clip_seconds)
        started = time.monotonic()
        seconds = 0.0
        stage = run_stage(
            tables,
            ExtractVideos,
            arguments,
            _num_workers(settings),
            num_cpus=settings.threads,
            gpu=settings.gpu,
        )
        for done, table in enumerate(stage, 1):
            record = json.loads(table["record"][0].as_py())
            seconds += record.get("duration_seconds", 0.0)
            rate = seconds / (time.monotonic() - started)
            on_progress(done, len(rows), f"{rate:.1f} s of video per second")
            yield record


def _num_workers(settings: ExtractConfig) -> int:
    """Workers that were asked for, as many as the connected cluster has room for.

    Raises:
        InputError: they need GPUs and there are none.
    """
    room = max(1, data_workers() // settings.threads)
    if settings.gpu:
        room = min(room, data_workers(gpu=True))
    return min(room, settings.workers or room)


def _located(config: Config) -> ExtractConfig:
    """The section `extract` with places that are found from any working directory."""
    section = config.extract
    places = {
        key: name if is_url(name) else str(config.path(name).resolve())
        for key, name in (("videos", section.videos), ("out", section.out))
    }
    if (at_hand := config.path(section.model)).is_dir():
        places["model"] = str(at_hand.resolve())
    return section.model_copy(update=places)


def _storages(settings: ExtractConfig) -> tuple[Storage, Storage]:
    """Where the videos are, and where their clips go."""
    return (
        Storage(settings.videos, "set extract.videos to a folder or URL of videos"),
        Storage(settings.out, "set extract.out to a folder or URL that can be written"),
    )


def _check_libraries() -> None:
    for module in ("av", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"features extract needs {module}, which is not installed: {_INSTALL}")


def _check_settings(
    out: Storage, config: Config, digest: str | None, there: Collection[str]
) -> None:
    """The features in `out`, if there are any, are by the settings of `config`, which it records.

    Args:
        out: the folder.
        config: the settings.
        digest: of the model's folder; None: it is on the hub.
        there: names of the files in it.

    Raises:
        InputError: they are not, or settings make no sense.
    """
    section, clip_seconds = config.extract, config.features.clip_seconds
    if clip_seconds < _MIN_SECONDS * section.frames_per_clip:
        raise InputError(
            f"features.clip_seconds={clip_seconds:g} has no room for "
            f"extract.frames_per_clip={section.frames_per_clip}; a frame needs {_MIN_SECONDS} s"
        )
    asked = {
        "model": section.model,
        "weights": digest,
        "revision": section.revision,
        "clip_seconds": clip_seconds,
        "frames_per_clip": section.frames_per_clip,
        "dtype": section.dtype,
    }
    features = [name for name in there if name.endswith(".npy")]
    if not features:
        out.write(SETTINGS, (json.dumps(asked, indent=2) + "\n").encode())
        return
    if SETTINGS not in there:
        raise InputError(
            f"{out.shown} holds {len(features)} npy files that this command did not write; set "
            f"extract.out to a folder of its own"
        )
    recorded = _parsed(out.read(SETTINGS), out, SETTINGS)
    if changed := [key for key, value in asked.items() if recorded.get(key) != value]:
        differences = ", ".join(f"{key} {recorded.get(key)}, not {asked[key]}" for key in changed)
        raise InputError(
            f"the features in {out.shown} are of {differences}; set extract.out to another folder, "
            f"or the settings to what they were"
        )


def _records(out: Storage) -> tuple[dict[str, Record], set[str]]:
    """What is known of videos, and those whose record is no line yet."""
    known: dict[str, Record] = {}
    if out.exists(LINES):
        for line in out.read(LINES).splitlines():
            record = _parsed(line, out, LINES)
            known[record["vid"]] = record
    names = [f"{_RECORDS}/{name}" for name in out.names(_RECORDS) if name.endswith(".json")]
    apart = [_parsed(out.read(name), out, name) for name in names]
    return known | {record["vid"]: record for record in apart}, {r["vid"] for r in apart}


def _parsed(text: bytes, out: Storage, name: str) -> Record:
    try:
        return json.loads(text)
    except ValueError:
        raise InputError(
            f"{out.shown}/{name} is not as this command wrote it; set extract.out to a new folder"
        ) from None


def _holds(known: Mapping[str, Record], row: Record) -> bool:
    """Whether the video of `row`, as it is now, has been read."""
    record = known.get(row["vid"])
    return record is not None and "refused" not in record and row.items() <= record.items()


def found_videos(videos: Storage) -> tuple[list[Record], list[Record]]:
    """The videos of a folder by `vid`, `file` and `bytes`, and those refused by their name.

    Raises:
        InputError: there are none.
    """
    from shine.video.decoding import EXTENSIONS

    if videos.exists(""):
        raise InputError(
            f"{videos.shown} is a file; set extract.videos to the folder that holds it"
        )
    files: dict[str, list[str]] = {}
    for name in videos.names():
        path = PurePosixPath(name)
        if path.suffix.lower() in EXTENSIONS:
            files.setdefault(path.stem, []).append(name)
    if not files:
        raise InputError(
            f"no video in {videos.shown}: set extract.videos to a folder of files that end in "
            f"{', '.join(EXTENSIONS)}"
        )
    rows, refused = [], []
    for vid, (name, *others) in sorted(files.items()):
        fault = _fault(vid)
        if others:
            fault = f"the name of {1 + len(others)} files ({', '.join([name, *others])})"
        if fault:
            reason = f"{videos.shown}/{name}: {vid!r} is {fault}; rename the file"
            refused.append({"vid": vid, "file": name, "refused": reason})
        else:
            rows.append({"vid": vid, "file": name, "bytes": videos.size(name)})
    return rows, refused


def _fault(vid: str) -> str:
    """Why a name cannot be that of a file of features; empty where it can."""
    if vid.startswith(".") or re.search(r"[/\\]", vid) or not vid.isprintable():
        return "no name for a file of features"
    return "too long a name" if len(vid.encode()) > _MAX_NAME_BYTES else ""
