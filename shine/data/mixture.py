"""Simulated features: concept vectors seen through fixed maps, mixed into clips.

Each concept is one unit vector c. The text view of a word is T c plus a small offset for its
grammatical form; a clip shows V (sum of the weighted concepts) + beta B (verb bound to noun) of
every event in it, plus scene, clutter and noise. T, V and B are drawn once per seed, so a word
that no training query contains can still be grounded, and a pair that none contains cannot be
recognised by its binding alone.

The planted world and the dressing of real annotations share this module. All arithmetic is in
float64 and rounded before it is stored, so a world has the same bytes on every machine.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field, model_validator

from shine.config import Count, Positive, Section, Weight
from shine.errors import InputError
from shine.files import sha256, write_whole

DECIMALS = 4  # of stored features and word vectors
MANIFEST = "world.json"
FEATURES = "features"
WORD_VECTORS = "word_vectors.parquet"


class Stream(IntEnum):
    """What random numbers are for: each has its own, so one count never moves another's."""

    MAPS = 0
    CONCEPT = 1
    FORM = 2
    PAIRS = 3
    DECK = 4
    VIDEO = 5
    CLIPS = 6
    NEGATIVES = 7


class MixtureConfig(Section):
    """What clips and words of a simulated world are made of. Lengths are Euclidean norms."""

    seed: Annotated[int, Field(ge=0)] = 0
    clip_seconds: Positive = 1.0
    concept_width: Count = 32
    text_width: Count = 64
    video_width: Count = 64
    class_pull: Weight = 0.3  # how much concepts of one part of speech resemble each other
    inflection: Weight = 0.25  # length of the offset of a grammatical form, in the text view
    verb_weight: Weight = 0.95
    noun_weight: Weight = 0.95
    adjective_weight: Weight = 0.8
    preposition_weight: Weight = 0.5
    place_weight: Weight = 0.8
    adverb_weight: Weight = 0.8
    binding: Weight = 1.15  # length of the term that verb and noun make together
    scene: Weight = 1.0  # length of the constant vector of a video
    clutter: Weight = 0.6  # greatest weight of the stray concept in each clip
    noise: Weight = 1.5  # expected length of the noise of a clip

    @model_validator(mode="after")
    def _maps_keep_concepts_apart(self) -> "MixtureConfig":
        if self.concept_width > min(self.text_width, self.video_width):
            raise ValueError(
                f"concept_width must not exceed text_width and video_width; got "
                f"{self.concept_width}, {self.text_width} and {self.video_width}"
            )
        return self

    def weight(self, role: str) -> float:
        """The weight of a role of an action in a clip."""
        return getattr(self, f"{role}_weight")


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """Random numbers that depend on (seed, stream, key) alone."""
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream, *key)))
    )


def text_key(text: str) -> tuple[int, ...]:
    """Four 32-bit numbers that stand for `text` in the key of `generator`."""
    digest = hashlib.sha256(text.encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))


def unit(vectors: Float[ndarray, "*axes width"]) -> Float[ndarray, "*axes width"]:
    """Each vector at length 1."""
    return vectors / np.sqrt((vectors**2).sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class Views:
    """The fixed maps of one world: orthonormal columns, so that no concept is favoured."""

    text: Float[ndarray, "text_width concept_width"]
    video: Float[ndarray, "video_width concept_width"]
    binding: Float[ndarray, "video_width concept_width"]
    verb_order: ndarray  # permutation of the concept axis
    noun_order: ndarray

    def bind(
        self,
        verb: Float[ndarray, "*axes concept_width"],
        noun: Float[ndarray, "*axes concept_width"],
    ) -> Float[ndarray, "*axes video_width"]:
        """What verb and noun show together beyond their sum: B (P verb * Q noun), length 1.

        P and Q are permutations. The product is as far from the vectors of its factors as from
        those of any other word: knowing the words is not enough to know it.
        """
        return unit(verb[..., self.verb_order] * noun[..., self.noun_order]) @ self.binding.T


def make_views(config: MixtureConfig) -> Views:
    """The maps that belong to the seed of `config`."""
    rng = generator(config.seed, Stream.MAPS)
    width = config.concept_width
    text = _orthonormal(rng, config.text_width, width)
    video = _orthonormal(rng, config.video_width, width)
    binding = _orthonormal(rng, config.video_width, width)
    return Views(text, video, binding, rng.permutation(width), rng.permutation(width))


def _orthonormal(rng: np.random.Generator, height: int, width: int) -> ndarray:
    q, r = np.linalg.qr(rng.standard_normal((height, width)))
    return q * np.sign(
        np.diag(r)
    )  # the one decomposition with a positive diagonal: no LAPACK's own


def concept_vector(config: MixtureConfig, part: str, concept: str) -> Float[ndarray, " width"]:
    """The unit vector of `concept`: it depends on the seed, the part of speech and the word alone.

    g + class_pull * h at length 1, with g of the word and h of the part of speech unit vectors.
    """
    own = hashed_unit(config.seed, Stream.CONCEPT, f"{part} {concept}", config.concept_width)
    shared = hashed_unit(config.seed, Stream.CONCEPT, part, config.concept_width)
    return unit(own + config.class_pull * shared)


def function_vector(config: MixtureConfig, word: str) -> Float[ndarray, " width"]:
    """The text view of a word without a concept: a unit vector of its own, unseen in any video."""
    return hashed_unit(config.seed, Stream.FORM, word, config.text_width)


def form_offset(config: MixtureConfig, form: str) -> Float[ndarray, " width"]:
    """What every word in this grammatical form has in common in the text view."""
    return config.inflection * hashed_unit(
        config.seed, Stream.FORM, f"{form} form", config.text_width
    )


def hashed_unit(seed: int, stream: Stream, text: str, width: int) -> Float[ndarray, " width"]:
    """The unit vector that belongs to (seed, stream, text)."""
    return unit(generator(seed, stream, *text_key(text)).standard_normal(width))


def num_clips(duration_seconds: float, clip_seconds: float) -> int:
    """Clips of a video; the last may be partial."""
    return max(math.ceil(round(duration_seconds / clip_seconds, 6)), 1)


def clip_coverage(
    moments: Float[ndarray, "event 2"], duration_seconds: float, clip_seconds: float
) -> Float[ndarray, "event clip"]:
    """The share of each clip that each moment fills, in [0, 1].

    Clip i is the video from i to i + 1 times `clip_seconds`, cut at the end of the video.
    """
    left = np.arange(num_clips(duration_seconds, clip_seconds)) * clip_seconds
    right = np.minimum(left + clip_seconds, duration_seconds)
    overlap = np.minimum(moments[:, 1:], right) - np.maximum(moments[:, :1], left)
    return np.clip(overlap, 0.0, None) / np.maximum(right - left, 1e-6)


def mix_clips(
    config: MixtureConfig,
    rng: np.random.Generator,
    coverage: Float[ndarray, "event clip"],
    appearance: Float[ndarray, "event video_width"],
    strays: Float[ndarray, "concept video_width"],
) -> Float[ndarray, "clip video_width"]:
    """Features of one video, float32: its events, and over them scene, clutter and noise.

    Args:
        config: lengths of the terms.
        rng: random numbers of this video.
        coverage: share of each clip that each event fills.
        appearance: what each event adds to a clip that it fills.
        strays: video views of concepts; each clip shows one at random, weakly, whatever happens.
    """
    clips, width = coverage.shape[1], config.video_width
    scene = config.scene * unit(rng.standard_normal(width))
    stray = strays[rng.integers(len(strays), size=clips)]
    weights = config.clutter * rng.random((clips, 1))
    noise = config.noise / math.sqrt(width) * rng.standard_normal((clips, width))
    return stored(coverage.T @ appearance + scene + weights * stray + noise)


def stored(values: ndarray) -> ndarray:
    """`values` as a file holds them: float32 on a grid far coarser than rounding errors."""
    return np.round(values, DECIMALS).astype(np.float32)


def on_grid(values: ndarray) -> bytes:
    """Bytes for a checksum: the same on every machine, and after float32."""
    return np.rint(values.astype(np.float64) * 10**DECIMALS).astype("<i4").tobytes()


def write_word_vectors(path: Path, vectors: Mapping[str, ndarray]) -> None:
    """The table of text views stands in `path`: columns `word` and `vector`, in word order."""
    words = sorted(vectors)
    table = stored(np.stack([vectors[word] for word in words]))
    column = pa.FixedSizeListArray.from_arrays(pa.array(table.ravel()), table.shape[1])
    pq.write_table(pa.table({"word": pa.array(words), "vector": column}), path)


def begin_world(out: Path, simulated: str, files: Sequence[str]) -> None:
    """`out` is ready for a new world: `features` is empty, no file of an earlier world is left.

    From the first change on, `world.json` marks the world as unfinished and names the files of the
    new and of the earlier one, so a folder left by a stopped process is one to begin again. What
    other commands put beside the world stays.

    Args:
        out: folder to write; made where it is missing.
        simulated: what will be simulated, in words.
        files: names of the files that will be checksummed.

    Raises:
        InputError: the folder holds something else, which is left as it is.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"expected a folder to write a world to, {out} is a file; name another")
    earlier = _files_of_world(out) if out.is_dir() and any(out.iterdir()) else []
    out.mkdir(parents=True, exist_ok=True)
    names = sorted({*files, *earlier})
    mark = {"simulated": simulated, "unfinished": True, "checksums": dict.fromkeys(names, "")}
    write_whole(out / MANIFEST, json.dumps(mark, indent=1) + "\n")
    for name in (*earlier, WORD_VECTORS):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / FEATURES, ignore_errors=True)
    (out / FEATURES).mkdir()


def _files_of_world(folder: Path) -> list[str]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = [str(name) for name in manifest["checksums"]]
        if "simulated" in manifest and all(Path(name).name == name for name in names):
            return names
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"expected an empty folder or an earlier world to replace, {folder} holds other files; "
        f"empty it or name another"
    )


def finish_world(out: Path, manifest: dict[str, Any], files: Iterable[str]) -> dict[str, Any]:
    """`world.json` stands in `out`, with the checksums of `files`; returns it as it reads back."""
    sums = {name: sha256(out / name) for name in files}
    text = json.dumps({**manifest, "checksums": sums}, indent=1)
    write_whole(out / MANIFEST, text + "\n")
    return json.loads(text)


def read_world(folder: Path) -> dict[str, Any]:
    """The manifest of the finished world in `folder`.

    Raises:
        InputError: there is none, or its making was stopped.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the manifest of a world {path}: {error.strerror}") from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"simulated", "checksums"} <= manifest.keys():
        raise InputError(
            f"{path}: expected what `shine world make` or `shine world dress` writes, got "
            f"something else; make the world again or remove the file"
        )
    if manifest.get("unfinished"):
        raise InputError(
            f"the world in {folder} is unfinished: its making was stopped; make it again with "
            f"`shine world make` or `shine world dress`"
        )
    return manifest


def world_checksum(folder: Path) -> str:
    """One checksum of a world's annotation files, word vectors and features.

    Two worlds have the same one exactly where a training run cannot tell them apart.

    Raises:
        InputError: there is no finished world in `folder`.
    """
    files = read_world(folder)["checksums"]
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {sha256(folder / name)}\n".encode())
    table = pq.read_table(folder / WORD_VECTORS)
    digest.update("\n".join(table["word"].to_pylist()).encode())
    digest.update(on_grid(table["vector"].combine_chunks().flatten().to_numpy()))
    for path in sorted((folder / FEATURES).glob("*.npy")):
        digest.update(path.name.encode() + on_grid(np.load(path)))
    return digest.hexdigest()
