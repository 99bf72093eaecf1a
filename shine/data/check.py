"""Everything that is wrong with annotations and their features, and what is done about it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Float, Int

from shine.config import Config, FeaturesConfig
from shine.data.annotations import write_jsonl
from shine.data.formats import read_entries
from shine.data.inventory import ClipCounts, count_clips
from shine.data.scan import Example, Scan, beyond_seconds, check_rows, scan_file
from shine.data.strides import begins_in_reach, clip_strides, kept_clips, too_many_derived
from shine.errors import InputError

Severity = Literal["refused", "warning", "note"]
LONG_SECONDS: Final = 150  # the published code cuts videos there
BUCKETS: Final = (0, 10, 30, 150)  # seconds of moments
_FIX: Final = "refused by training: correct the row, or leave it out with `shine data convert`"
_MASKED: Final = (
    "kept: the level takes no part in a loss, unless `valid` in the file says that it is good"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of defect."""

    title: str
    severity: Severity
    action: str  # what is done about it


KINDS: Final[Mapping[str, Kind]] = {
    "unreadable": Kind("file that cannot be read", "refused", "refused: nothing of it is used"),
    "no_rows": Kind("file without rows", "refused", "refused by training"),
    "malformed": Kind("line or video that is no row", "refused", _FIX),
    "missing": Kind("row without a value that is needed", "refused", _FIX),
    "value": Kind("value of another form than the schema says", "refused", _FIX),
    "optional": Kind("negatives or labels of another form", "refused", _FIX),
    "moment": Kind("moment that is no [start, end] of finite numbers", "refused", _FIX),
    "empty": Kind("empty moment", "refused", _FIX),
    "reversed": Kind("reversed moment", "refused", _FIX),
    "before": Kind("moment that starts before its video", "refused", _FIX),
    "after": Kind("moment that starts after its video", "refused", _FIX),
    "qid": Kind("query id that an earlier row has", "refused", _FIX),
    "duration": Kind("row with another duration of its video", "refused", _FIX),
    "duration_near": Kind(
        "duration that differs by less than a clip", "note", "kept: each row has its own"
    ),
    "beyond": Kind(
        "moment that ends after its video",
        "note",
        "kept: labels are cut to the video, evaluation uses the moment as annotated",
    ),
    "fills": Kind(
        "moment that fills its video",
        "note",
        "kept: there is no clip outside, so terms that compare with one leave the row out",
    ),
    "same_row": Kind(
        "same video, query and moments again", "warning", "kept: the row counts twice"
    ),
    "same_query": Kind(
        "same video and query, other moments", "warning", "kept: as rows of their own"
    ),
    "negative_empty": Kind("empty hard negative", "warning", _MASKED),
    "negative_equal": Kind("hard negative equal to its query", "warning", _MASKED),
    "negative_true": Kind("hard negative that is a caption of the video", "warning", _MASKED),
    "negative_repeated": Kind("hard negative equal to a lower level", "warning", _MASKED),
    "negative_masked": Kind("placeholder left in a hard negative", "warning", _MASKED),
    "negative_levels": Kind(
        "row with another number of hard negatives",
        "warning",
        "kept: levels that are missing take no part in a loss",
    ),
    "features_missing": Kind(
        "video without features",
        "refused",
        "refused by training and evaluation: pack its features, or leave its rows out",
    ),
    "features_unreadable": Kind(
        "features that cannot be used", "refused", "refused: correct what the sentence says"
    ),
    "stride": Kind(
        "video with more or fewer clips than its duration needs",
        "note",
        "kept: its seconds per clip are derived, duration / clips",
    ),
    "stride_many": Kind(
        "video with more or fewer clips, as too many others",
        "refused",
        "refused: set features.clip_seconds to the true stride, or extract the features again",
    ),
    "stride_reference": Kind(
        "video with more or fewer clips than its duration needs",
        "warning",
        "kept as published: features.clip_seconds is taken for the stride (data.compat=reference)",
    ),
    "one_clip": Kind(
        "video of one clip, which data.compat=reference cuts",
        "refused",
        "refused by training: set data.max_clips or leave the video out",
    ),
    "out_of_reach": Kind(
        "training row without a moment in the clips of data.max_clips",
        "refused",
        "refused by training: raise data.max_clips or leave the row out",
    ),
}


def config_files(config: Config) -> list[tuple[str, Path]]:
    """The annotation files of a run with their roles."""
    data = config.data
    return [
        ("train", config.path(data.train)),
        *((f"validation {name}", config.path(file)) for name, file in data.validation.items()),
        *((f"test {name}", config.path(file)) for name, file in data.tests.items()),
    ]


def with_roles(files: Sequence[Path], config: Config | None) -> list[tuple[str, Path]]:
    """The files to check with their roles.

    Args:
        files: their roles are those in the configuration; without one, the first is for training
            and the others are tests. None at all: those of the configuration.
        config: of a run.
    """
    known = [] if config is None else config_files(config)
    if not files:
        return known
    roles = {path.resolve(): role for role, path in reversed(known)}
    first = "train" if config is None else "test"
    others = ["test"] * (len(files) - 1)
    return [
        (roles.get(path.resolve(), role), path)
        for path, role in zip(files, [first, *others], strict=True)
    ]


def check(
    files: Sequence[tuple[str, Path]],
    config: Config | None = None,
    count: Callable[[Config, Iterable[str]], ClipCounts] | None = count_clips,
) -> dict[str, Any]:
    """What annotation files hold and everything that is wrong with them, as JSON can say it.

    Args:
        files: each with its role: "train", "validation ..." or "test ..."; a role is not unique.
        config: the run that they are for; without one, its defaults.
        count: finds the clips of the videos of a run. None: features are not looked at.

    Returns:
        `files`, `defects`, `overlaps`, `features`, and `refused`: how many defects make training
        or evaluation refuse a file.
    """
    features = config.features if config else FeaturesConfig()
    reference = config is not None and config.data.compat == "reference"
    videos: dict[str, int] = {}
    scans = [scan_file(path, role, videos) for role, path in files]
    for scan in scans:
        check_rows(scan, features.clip_seconds, reference=reference)
    found = None
    if config is not None and count is not None:
        try:
            clips = count(config, videos)
            found = _check_clips(scans, list(videos), config, clips)
        except InputError as error:
            example = Example(config.features.store, "", None, str(error))
            scans[0].findings.add("features_unreadable", example)
    defects = _defects(scans)
    return {
        "clip_seconds": features.clip_seconds,
        "files": [_summary(scan) for scan in scans],
        "defects": defects,
        "overlaps": [overlap for a, b in combinations(scans, 2) if (overlap := _overlap(a, b))],
        "features": found,
        "refused": sum(entry["count"] for entry in defects if entry["severity"] == "refused"),
    }


def _defects(scans: Sequence[Scan]) -> list[dict[str, Any]]:
    """The kinds of defects that occur, in the order of `KINDS`."""
    return [
        {
            "kind": key,
            **asdict(kind),
            "count": sum(counts.values()),
            "files": counts,
            "examples": [
                asdict(one) for scan in scans for one in scan.findings.examples.get(key, ())
            ],
        }
        for key, kind in KINDS.items()
        if (
            counts := {
                str(scan.path): count for scan in scans if (count := scan.findings.counts[key])
            }
        )
    ]


def _summary(scan: Scan) -> dict[str, Any]:
    """A file in numbers."""
    length = scan.end - scan.start
    duration = scan.duration[scan.moment_row]
    beyond = beyond_seconds(scan)
    long = scan.duration > LONG_SECONDS
    outside = np.zeros(len(scan))
    np.maximum.at(
        outside, scan.moment_row, 1 - (np.minimum(scan.end, duration) - scan.start) / length
    )
    late = np.zeros(len(scan), bool)
    late[scan.moment_row[scan.end > LONG_SECONDS]] = True
    cover = np.zeros(len(scan))
    covered = np.minimum(scan.end, duration) - np.maximum(scan.start, 0)
    np.maximum.at(cover, scan.moment_row, covered / duration)
    text = np.isin(scan.negative_text, scan.text)
    return {
        "file": str(scan.path),
        "role": scan.role,
        "layout": None if scan.layout is None else str(scan.layout),
        "rows": len(scan),
        "unusable": len(scan.unusable),
        "videos": len(np.unique(scan.video)),
        "queries": len(np.unique(scan.query)),
        "normalized_queries": len(np.unique(scan.text)),
        "moments": len(length),
        "duration_seconds": _spread(scan.duration),
        "moment_seconds": _spread(length),
        "mean_share": float(np.mean(length / duration)) if len(length) else None,
        "words": _spread(scan.words.astype(np.float64)),
        "moments_by_seconds": np.histogram(-length, bins=-np.array([*BUCKETS, np.inf])[::-1])[0][
            ::-1
        ].tolist(),
        "rows_beyond": {
            "any": int((beyond > 0).sum()),
            "over_half_second": int((beyond > 0.5).sum()),
            "over_one_second": int((beyond > 1).sum()),
            "over_a_tenth_of_the_moment": int((outside >= 0.1).sum()),
            "most_seconds": float(beyond.max(initial=0)),
        },
        "rows_nearly_filled": int((cover >= 0.99).sum()),
        "rows_up_to_one_second": len(np.unique(scan.moment_row[length <= 1])),
        "long": {
            "seconds": LONG_SECONDS,
            "videos": len(np.unique(scan.video[long])),
            "rows": int(long.sum()),
            "rows_with_later_moment": int((late & long).sum()),
        },
        "negatives": {
            "sentences": len(scan.negative_row),
            "rows_by_levels": {
                str(levels): int(count)
                for levels, count in enumerate(np.bincount(scan.num_negatives))
                if count
            },
            "rows_with_a_query_of_the_file": len(np.unique(scan.negative_row[text])),
        },
    }


def _spread(values: Float[np.ndarray, " value"]) -> dict[str, float] | None:
    if not len(values):
        return None
    parts = {"min": np.min, "median": np.median, "mean": np.mean, "max": np.max}
    return {name: float(part(values)) for name, part in parts.items()}


def _overlap(one: Scan, other: Scan) -> dict[str, Any] | None:
    """Videos and (video, query) pairs that two files share; None where they share none."""
    videos, mine, theirs = np.intersect1d(one.video, other.video, return_indices=True)
    other_durations = int((one.duration[mine] != other.duration[theirs]).sum())
    pairs, mine, theirs = np.intersect1d(one.pair, other.pair, return_indices=True)
    if not len(videos):
        return None
    roles = one.role.split()[0], other.role.split()[0]
    severity: Severity = "note" if roles[0] == roles[1] else "warning"
    order = np.argsort(mine)[:5]
    mine, theirs = mine[order].tolist(), theirs[order].tolist()
    here, there = one.places(mine), other.places(theirs)
    return {
        "files": [str(one.path), str(other.path)],
        "roles": [one.role, other.role],
        "severity": severity,
        "action": _shared(roles),
        "videos": len(videos),
        "pairs": len(pairs),
        "other_durations": other_durations,
        "examples": [
            asdict(
                Example(str(other.path), *there[b], f"also {', query '.join(here[a])} of the other")
            )
            for a, b in zip(mine, theirs, strict=True)
        ],
    }


def _shared(roles: tuple[str, str]) -> str:
    if roles[0] == roles[1]:
        return "kept: splits of one role may share videos"
    if "train" in roles:
        return "kept, but results on videos that were trained on say nothing about others: remove"
    return "kept, but the test videos would choose the checkpoint: remove"


def _check_clips(
    scans: Sequence[Scan], names: Sequence[str], config: Config, clips: ClipCounts
) -> dict[str, Any]:
    """The findings of each scan have what training finds wrong with its features."""
    reference = config.data.compat == "reference"
    nominal = config.features.clip_seconds
    stored = np.array([clips.num_clips.get(name, 0) for name in names], np.int64)
    durations = np.zeros(len(names))
    for scan in scans:
        _, first = np.unique(scan.video, return_index=True)
        durations[scan.video[first]] = scan.duration[first]
        _missing(scan, names, stored, clips)
        rows = np.flatnonzero(stored[scan.video] > 0)
        if not len(rows):
            continue
        num_clips = stored[scan.video[rows]]
        kept = kept_clips(num_clips, config.data.max_clips, reference=reference)
        strides, derived = clip_strides(scan.duration[rows], num_clips, nominal)
        _strides(scan, rows, derived, num_clips, nominal, reference=reference)
        _add_videos(scan, "one_clip", rows[kept == 0], lambda _: "one clip")
        if scan.role == "train" and not reference:
            reached = np.zeros(len(scan), bool)
            place = np.full(len(scan), -1)
            place[rows] = np.arange(len(rows))
            of = place[scan.moment_row]
            inside = (of >= 0) & begins_in_reach(scan.start[:, None], strides[of], kept[of])[:, 0]
            reached[scan.moment_row[inside]] = True
            lost = rows[~reached[rows]]
            scan.findings.add_rows("out_of_reach", scan, lost, lambda _: "all moments are cut")
    return _stride_summary(names, durations, stored, nominal, clips.place)


def _missing(
    scan: Scan, names: Sequence[str], stored: Int[np.ndarray, " video"], clips: ClipCounts
) -> None:
    absent = np.flatnonzero(stored[scan.video] == 0)
    _add_videos(
        scan,
        "features_missing",
        absent,
        lambda row: clips.reasons.get(
            name := names[int(scan.video[row])], f"video {name} is not in {clips.place}"
        ),
    )


def _strides(
    scan: Scan,
    rows: Int[np.ndarray, " row"],
    derived: np.ndarray,
    num_clips: Int[np.ndarray, " row"],
    nominal: float,
    *,
    reference: bool,
) -> None:
    """Videos of a scan whose clips do not tile their seconds, as training counts them."""
    _, first = np.unique(scan.video[rows], return_index=True)
    many = too_many_derived(int(derived[first].sum()), len(first))
    kind = "stride_reference" if reference else "stride_many" if many else "stride"
    clips = dict(zip(rows.tolist(), num_clips.tolist(), strict=True))
    _add_videos(
        scan,
        kind,
        rows[derived],
        lambda row: (
            f"{clips[row]} clips x {nominal:g} s = {clips[row] * nominal:g} s, lasts "
            f"{scan.duration[row]:g} s: {scan.duration[row] / clips[row]:.4g} s per clip"
        ),
    )


def _add_videos(
    scan: Scan, kind: str, rows: Int[np.ndarray, " row"], detail: Callable[[int], str]
) -> None:
    """The videos of some rows show a kind, each at its first row; `detail` says it of a row."""
    _, first = np.unique(scan.video[rows], return_index=True)
    found = rows[np.sort(first)]
    scan.findings.add_rows(kind, scan, found, lambda index: detail(int(found[index])))


def _stride_summary(
    names: Sequence[str],
    durations: Float[np.ndarray, " video"],
    stored: Int[np.ndarray, " video"],
    nominal: float,
    place: str,
) -> dict[str, Any]:
    """The true seconds per clip of the videos, and which ones depart from the stated."""
    known = np.flatnonzero(stored > 0)
    strides = durations[known] / stored[known]
    _, derived = clip_strides(durations[known], stored[known], nominal)
    return {
        "place": place,
        "videos": len(names),
        "missing": len(names) - len(known),
        "stated_clip_seconds": nominal,
        "clip_seconds": _spread(strides),
        "deviating": [
            {
                "vid": names[known[index]],
                "num_clips": int(stored[known[index]]),
                "duration_seconds": float(durations[known[index]]),
                "clip_seconds": float(strides[index]),
            }
            for index in np.flatnonzero(derived).tolist()
        ],
    }


def convert(
    path: Path,
    out: Path,
    durations: Mapping[str, float] | None = None,
    clip_seconds: float = FeaturesConfig().clip_seconds,
) -> dict[str, Any]:
    """`out` has the rows of an annotation file in our schema, but for those that training refuses.

    Values are not changed; those that the schema does not name stay.

    Args:
        path: a file of any layout.
        out: JSON Lines to write.
        durations: seconds of each video, for a layout that does not say them.
        clip_seconds: of the features that training will use; where two rows give a video durations
            that differ by more, training refuses the second.

    Returns:
        `layout`, `rows` written, `num_left_out`, and `left_out`: every defect of a row that was
        left out, with its place and reason.

    Raises:
        InputError: the file cannot be read, no row is left, or `out` is the file itself or cannot
            be written.
    """
    if path.resolve() == out.resolve():
        raise InputError(f"{path} would be overwritten; name another --out")
    scan = scan_file(path, "train", {}, durations=durations, most=None)
    for example in scan.findings.examples.get("unreadable", ()):
        raise InputError(example.detail)
    refused = check_rows(scan, clip_seconds)
    left_out = {*scan.unusable, *scan.entry[refused].tolist()}
    rows = len(scan) - len(refused)
    if not rows:
        raise InputError(
            f"{path}: training would refuse every row; `shine data check {path}` says why"
        )
    entries = enumerate(read_entries(path, durations))
    kept = (e.record for n, e in entries if n not in left_out and e.record is not None)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(out, kept)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; name another --out") from None
    return {
        "layout": str(scan.layout),
        "rows": rows,
        "num_left_out": len(left_out),
        "left_out": [
            {"kind": kind, **asdict(example)}
            for kind, examples in scan.findings.examples.items()
            if KINDS[kind].severity == "refused"
            for example in examples
        ],
    }
