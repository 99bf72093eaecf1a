"""What a configuration needs, what of it is here, and where the rest is normally obtained."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal

from shine.config import Config
from shine.data.annotations import read_annotations
from shine.data.check import check, config_files
from shine.data.inventory import count_clips, has_store, open_listed
from shine.data.loading import cache_folder
from shine.data.sources import located, open_source
from shine.data.text import read_word_vectors
from shine.data.text_files import TextOrigin, needed_texts, text_files
from shine.data.text_store import TextStore, read_manifest, text_storage
from shine.errors import InputError
from shine.language.negatives import read_negatives
from shine.storage import shown

Status = Literal["ok", "missing", "mismatched", "unknown", "not needed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What there is of one need of a configuration."""

    part: str
    status: Status
    found: str
    advice: str = ""  # what to do, and where it is normally obtained
    needed: bool = True  # to begin a training


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the published pieces of a data set come from."""

    annotations: str
    features: str


_CG: Final = (
    "annotation files come with the repository zxccade/SHINE as JSON Lines, and the original "
    "splits with YYJMJC/Compositional-Temporal-Grounding as one object per video, for `shine data "
    "convert`"
)
_ORIGINS: Final = {  # by what the names of a configuration have in them
    "quickstart": Origin("`shine quickstart` makes it", "`shine quickstart` makes them"),
    "dressed": Origin(
        "`shine world dress` copies annotation files and simulates features for them",
        "`shine world dress` simulates them",
    ),
    "world": Origin("`shine world make --out FOLDER` makes it", "`shine world make` makes them"),
    "charades": Origin(
        _CG, "features do not come with the code: I3D ones are those of the VSLNet release"
    ),
    "activitynet": Origin(
        _CG, "features do not come with the code: C3D ones are those of the MS-2D-TAN release"
    ),
    "qvhighlights": Origin(
        "annotation files come with the repository jayleicn/moment_detr",
        "features do not come with the code: SlowFast and CLIP ones are those of the Moment-DETR "
        "release, PANN ones of the UMT release",
    ),
    "tacos": Origin(
        "annotations and C3D features in the form of 2D-TAN are usual; `shine data convert` reads "
        "their frames",
        "C3D features are those of the 2D-TAN release",
    ),
}
_OTHER: Final = Origin(
    "any file that `shine data check` can read",
    "`shine features extract` makes some of videos",
)


def examine(config: Config) -> list[Finding]:
    """Every need of a configuration, with what there is of it; Ray is not started.

    A training could start where all that are `needed` are ok.
    """
    here = [(role, path) for role, path in config_files(config) if path.is_file()]
    report = check(here, config, count_clips if here and _is_packed(config) else None)
    return [
        *_annotations(config, report),
        *_negatives(config),
        *_features(config, report),
        *_texts(config),
        *_machine(config),
    ]


def could_train(findings: list[Finding]) -> bool:
    """Whether a training could start."""
    return all(one.status in ("ok", "not needed") for one in findings if one.needed)


def _origin(config: Config) -> Origin:
    names = f"{config.data.root} {config.data.train}".lower().replace("anet_cg", "activitynet")
    return next((origin for name, origin in _ORIGINS.items() if name in names), _OTHER)


def _annotations(config: Config, report: Mapping[str, Any]) -> Iterator[Finding]:
    summaries = {summary["role"]: summary for summary in report["files"]}
    for role, path in config_files(config):
        needed = not role.startswith("test")
        if role not in summaries:
            advice = _origin(config).annotations
            if role.startswith("validation"):
                advice += "; `shine data split` carves validation splits from training videos"
            yield Finding(role, "missing", str(path), advice, needed)
            continue
        wrong = {
            defect["title"]: defect["files"][str(path)]
            for defect in report["defects"]
            if defect["severity"] == "refused"
            and str(path) in defect["files"]
            and defect["kind"] != "features_unreadable"  # told of the store
        }
        summary = summaries[role]
        found = f"{path}: {summary['rows']} rows of {summary['videos']} videos"
        if wrong:
            kinds = ", ".join(f"{count} x {title}" for title, count in wrong.items())
            advice = "`shine data check --config ...` names each one and what to do"
            yield Finding(role, "mismatched", f"{found}; refused: {kinds}", advice, needed)
        else:
            yield Finding(role, "ok", found, needed=needed)


def _negatives(config: Config) -> Iterator[Finding]:
    levels = config.loss.num_hard_negatives
    if not levels:
        yield Finding("hard negatives", "not needed", "no term of the loss uses them", needed=False)
        return
    path = config.path(config.data.negatives or config.data.train)
    make = "`shine negatives generate --config ...` makes them"
    if not path.exists():
        yield Finding("hard negatives", "missing", str(path), make)
        yield from _generation(config)
        return
    try:
        negatives = read_negatives(path)
        qids = [row.qid for row in read_annotations(config.path(config.data.train))]
    except InputError as error:
        yield Finding("hard negatives", "mismatched", str(error), make)
        return
    rows = [negatives[qid] for qid in qids if qid in negatives]
    most = max((len(row.queries) for row in rows), default=0)
    valid = sum(sum(row.valid[:levels]) for row in rows)
    found = (
        f"{path}: {len(rows)} of {len(qids)} training queries, {most} levels, {valid} of "
        f"{len(qids) * levels} sentences valid"
    )
    if most < levels:
        yield Finding("hard negatives", "mismatched", f"{found}; the loss uses {levels}", make)
    else:
        yield Finding("hard negatives", "ok", found)


def _generation(config: Config) -> Iterator[Finding]:
    """What `shine negatives generate` needs, where it has to be run."""
    from shine.language.tagging import load_tagger  # heavy, and seldom asked for
    from shine.llm.client import read_key

    settings = config.negatives
    try:
        tagger = load_tagger(settings.tagger)
        yield Finding("tagger", "ok", f"{tagger.name} {tagger.version}", needed=False)
    except InputError as error:
        yield Finding("tagger", "missing", str(error), needed=False)
    if settings.wordnet is not None:
        yield _package("wn", "negatives.wordnet", "wordnet")
    if settings.generator != "llm":
        return
    name = "the variable " + settings.llm.key_variable
    if settings.llm.key_file is not None:
        name = f"the file {settings.llm.key_file}"
    try:
        key = read_key(settings.llm)
    except InputError as error:
        yield Finding("key of the endpoint", "mismatched", str(error), needed=False)
        return
    if key:
        yield Finding("key of the endpoint", "ok", f"{name} has one", needed=False)
    else:
        advice = "set it, unless the endpoint needs no key"
        yield Finding("key of the endpoint", "missing", f"{name} has none", advice, needed=False)


def _is_packed(config: Config) -> bool:
    try:
        return has_store(config)
    except InputError:
        return False


def _features(config: Config, report: Mapping[str, Any]) -> Iterator[Finding]:
    store = shown(located(config).store)
    pack = "`shine features pack --config ...` makes it"
    try:
        if not has_store(config):
            yield Finding("feature store", "missing", store, pack)
            yield from _sources(config)
            return
        manifest = open_listed(config).manifest
    except (InputError, ImportError) as error:
        yield Finding("feature store", "mismatched", str(error), pack)
        return
    found = f"{store}: {manifest['num_videos']} videos, {manifest['num_clips']} clips"
    lacking = next((d for d in report["defects"] if d["kind"] == "features_missing"), None)
    if lacking is None:
        yield Finding("feature store", "ok", found)
        return
    found += f"; {report['features']['missing']} videos of the annotations are not in it"
    roles = {str(path): role for role, path in config_files(config)}
    needed = any(not roles[file].startswith("test") for file in lacking["files"])
    yield Finding("feature store", "mismatched", found, pack, needed)


def _videos(config: Config) -> list[str]:
    """The videos of the annotation files that can be read."""
    vids: set[str] = set()
    for _, path in config_files(config):
        with contextlib.suppress(InputError):
            vids.update(row.vid for row in read_annotations(path))
    return sorted(vids)


def _sources(config: Config) -> Iterator[Finding]:
    """Raw features of a store that is still to be packed."""
    vids = _videos(config)
    for part in located(config).parts:
        place = shown(part.path)
        name = f"features {place.rstrip('/').rsplit('/', 1)[-1]}"
        advice = _origin(config).features
        try:
            source = open_source(part)
        except (InputError, ImportError) as error:
            yield Finding(name, "missing", str(error), advice, needed=False)
            continue
        try:
            held = [source.holds(vid) for vid in vids]
        except (InputError, ImportError) as error:
            yield Finding(name, "mismatched", str(error), advice, needed=False)
            continue
        if None in held:
            found = f"{place}: not looked at, packing copies it and tells what it lacks"
            yield Finding(name, "unknown", found, needed=False)
            continue
        found = f"{place}: {held.count(True)} of the {len(vids)} videos of the annotations"
        if all(held):
            yield Finding(name, "ok", found, needed=False)
        else:
            yield Finding(name, "missing", found, advice, needed=False)


def _texts(config: Config) -> Iterator[Finding]:
    text = config.text
    if text.encoder == "lexical":
        if text.word_vectors is None:
            yield Finding("text", "ok", f"lexical: vectors of {text.width} columns, built in")
            return
        path = config.path(text.word_vectors)
        try:
            words = read_word_vectors(path)
        except InputError as error:
            advice = _origin(config).annotations
            status = "mismatched" if path.is_file() else "missing"
            yield Finding("word vectors", status, str(error), advice)
            return
        yield Finding("word vectors", "ok", f"{path}: {len(words)} words")
        return
    training = config.model_copy(
        update={
            "data": config.data.model_copy(update={"tests": {}}),
            "evaluate": config.evaluate.model_copy(update={"negatives": None}),
        }
    )
    needed, unread = None, ""
    try:
        needed = needed_texts(training)
    except InputError as error:  # of annotations or negatives, which have findings of their own
        unread = str(error)
    encode = "`shine text encode --config ...` makes it"
    try:
        storage = text_storage(config)
        if read_manifest(storage) is None:
            yield Finding("text store", "missing", storage.shown, encode)
            yield from _encoding(config, needed)
            return
        store = TextStore.open(config, cache_folder(config))
        store.find(list(needed or ()))
    except (InputError, ImportError) as error:
        yield Finding("text store", "mismatched", str(error), encode)
        yield from _encoding(config, needed)
        return
    if needed is None:
        found = f"{storage.shown}: not compared with the texts of training ({unread})"
        yield Finding("text store", "unknown", found, "correct the annotations first")
        return
    yield Finding("text store", "ok", f"{storage.shown}: all {len(needed)} texts of training")
    with contextlib.suppress(InputError):  # of annotations, told above
        texts = list(needed_texts(config))
        try:
            store.find(texts)
        except InputError as error:
            yield Finding("text of tests", "missing", str(error), encode, needed=False)


def _encoding(config: Config, needed: Mapping[str, TextOrigin] | None) -> Iterator[Finding]:
    """What `shine text encode` needs, where it has to be run."""
    if config.text.encoder == "precomputed":
        if needed is None:
            found = "not looked at, as the annotations do not tell which are needed"
            yield Finding("text files", "unknown", found, needed=False)
            return
        try:
            files = text_files(config, needed)
        except InputError as error:
            advice = (
                "files of text features do not come with the code of the field; "
                "text.encoder=hugging_face encodes the texts with the same CLIP"
            )
            yield Finding("text files", "missing", str(error), advice, needed=False)
            return
        yield Finding("text files", "ok", f"all {len(files)}", needed=False)
        return
    yield _package("transformers", "text.encoder=hugging_face", "models")
    model = config.text.model
    folder = config.path(model)
    if folder.is_dir():
        yield Finding("text model", "ok", f"{folder}, a folder", needed=False)
        return
    found = f"not looked at: {model} is fetched from the Hugging Face hub when texts are encoded"
    yield Finding("text model", "unknown", found, needed=False)


def _package(name: str, why: str, extra: str) -> Finding:
    """Whether an optional package is installed that a step before training needs."""
    part = f"package {name}"
    if find_spec(name) is not None:
        return Finding(part, "ok", f"installed, for {why}", needed=False)
    advice = f"install shine-grounding[{extra}]"
    return Finding(part, "missing", f"not installed, {why} needs it", advice, needed=False)


def _machine(config: Config) -> Iterator[Finding]:
    import torch

    if not config.train.gpu:
        yield Finding("GPU", "not needed", "train.gpu=false", needed=False)
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        name = torch.cuda.get_device_name(0)
        yield Finding("GPU", "ok", f"{count} here, {name}; train.num_workers may be on others")
    else:
        found = "train.gpu=true, but PyTorch finds no GPU here"
        yield Finding("GPU", "missing", found, "set train.gpu=false, or run on a machine with one")
