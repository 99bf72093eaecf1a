"""Run configurations: frozen sections, one YAML file, dotted overrides.

Imports neither torch nor ray, so a bad file fails in a second. A file states what a run changes;
the defaults live here, once. `base: [world.yaml, shine.yaml]` in a file starts from others, merged
in that order.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from shine.errors import InputError

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=0.99)]
Share = Annotated[float, Field(gt=0, le=1)]
# `reference` reproduces the published code where sense departs from it; docs/parity.md lists each
# departure.
Compat = Literal["corrected", "reference"]
_UNSHOWN = "unshown"  # the type of an error whose value may hold a secret


def _without_password(place: str) -> str:
    if re.search(r"//[^/]*:[^/]*@", place):
        raise PydanticCustomError(
            _UNSHOWN, "needs a path or URL without a password; the storage's own settings have it"
        )
    return place


Place = Annotated[str, AfterValidator(_without_password)]  # a path or any fsspec URL


class Section(BaseModel):
    """A section of a run configuration: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


AnySection = TypeVar("AnySection", bound=Section)


class DataConfig(Section):
    """Annotations and negatives. Relative names start from `root`."""

    root: str = "."
    train: str = "train.jsonl"
    # Splits that choose the checkpoint, carved from training videos. None: the published protocol
    # (train on every row, keep the last epoch).
    validation: dict[str, str] = {}
    tests: dict[str, str] = {}  # never used for fitting or selection
    negatives: str | None = None  # hard negatives of the training queries; None: those in `train`
    # Moments of a row in a training step; of a row that has more, so many are drawn each time.
    max_moments: Annotated[int, Field(ge=1, le=5)] = 5
    max_clips: Count | None = None  # further clips of a video are cut; None: all are kept
    # Labels, saliency pairs and partners; as published, a video without max_clips loses a clip.
    compat: Compat = "corrected"


class LlmConfig(Section):
    """An OpenAI-compatible endpoint that fills slots (`negatives.generator=llm`)."""

    base_url: str = "https://api.openai.com/v1"
    model: str | None = None  # as the endpoint names it
    # Each worker reads the key from its environment, or from a file that it sees; it is not stored.
    key_variable: str = "OPENAI_API_KEY"  # an unset one means an endpoint without keys
    key_file: str | None = None
    prompt: str = "fill-1"  # the name of one that ships, or a file
    candidates: Count = 40  # words of the training captions offered for each slot
    temperature: Weight = 1.0
    max_tokens: Count = 400  # of an answer
    timeout_seconds: Positive = 60.0
    # Of the whole job, however many workers ask. None: as fast as the endpoint lets us.
    in_flight: Count = 32
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    attempts: Count = 8  # at one request before it counts as failed
    # Dollars per million tokens; with a budget, the job stops before it would spend more.
    prompt_price: Weight | None = None
    completion_price: Weight | None = None
    budget: Positive | None = None  # dollars of one job
    # Answers are kept here, a folder or any fsspec URL, and never paid for again. A stopped job can
    # lose the answers on their way and those that a worker has not yet written down.
    store: str = "answers"
    segment_answers: Count = 16  # a worker writes after so many answers,
    segment_seconds: Positive = 5.0  # or so long after the first of them
    workers: Count = 1  # processes that ask; one manages some 300 requests per second

    @field_validator("base_url")
    @classmethod
    def _without_secret(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", url):
            raise PydanticCustomError(
                _UNSHOWN, "needs http(s)://host/path without user, password, parameters or fragment"
            )
        return url.rstrip("/")

    @field_validator("key_variable")
    @classmethod
    def _names_a_variable(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise PydanticCustomError(
                _UNSHOWN, "needs the name of an environment variable, not the key itself"
            )
        return name

    @model_validator(mode="after")
    def _budget_needs_prices(self) -> "LlmConfig":
        if self.budget is not None and None in (self.prompt_price, self.completion_price):
            raise ValueError(
                f"budget={self.budget} needs prompt_price and completion_price, in dollars per "
                f"million tokens"
            )
        return self


PartOfSpeech = Literal["verb", "noun", "adjective", "preposition", "adverb"]


class NegativesConfig(Section):
    """How hard negatives are made (`shine negatives generate`)."""

    generator: Literal["corpus", "random", "llm", "file"] = "corpus"
    # Share of the maskable words that each level masks, least altered first; these are for
    # Charades-CG in the paper. "released": the counts that its published negatives show.
    ratios: tuple[Share, ...] | Literal["released"] = (0.25, 0.5, 0.75)
    # What may be masked, in this order.
    parts: tuple[PartOfSpeech, ...] = get_args(PartOfSpeech)
    # Whether `llm` and `file` may use words that no training caption has.
    open_vocabulary: bool = False
    file: str | None = None  # negatives that `file` judges: jsonl of the field, or Parquet
    # A lexicon of the `wn` package, such as oewn:2024, whose synonyms are refused too.
    wordnet: str | None = None
    tagger: str = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    llm: LlmConfig = LlmConfig()

    @property
    def num_levels(self) -> int:
        """How many hard negatives a query gets."""
        return 3 if self.ratios == "released" else len(self.ratios)

    @field_validator("ratios")
    @classmethod
    def _rising(cls, ratios: tuple[float, ...] | str) -> tuple[float, ...] | str:
        if isinstance(ratios, tuple) and (not ratios or list(ratios) != sorted(set(ratios))):
            raise ValueError("needs one or more rising shares")
        return ratios

    @field_validator("parts")
    @classmethod
    def _in_order(cls, parts: tuple[PartOfSpeech, ...]) -> tuple[PartOfSpeech, ...]:
        ordered = tuple(part for part in get_args(PartOfSpeech) if part in parts)
        if not parts or parts != ordered:
            raise ValueError(
                f"needs one or more of {', '.join(get_args(PartOfSpeech))}, in this order"
            )
        return parts

    @model_validator(mode="after")
    def _complete(self) -> "NegativesConfig":
        if self.generator == "file" and self.file is None:
            raise ValueError("generator=file needs file, the negatives to judge")
        if self.generator == "llm" and self.llm.model is None:
            raise ValueError("generator=llm needs llm.model, as the endpoint names it")
        return self


class SourceConfig(Section):
    """Raw features by one extractor; in a file, its path alone may stand for it."""

    # A folder of one file per video (npy, npz, pt, safetensors), an hdf5 file or an lmdb of many
    # videos; a path or any fsspec URL, relative to data.root.
    path: Place
    # The file of a video in the folder, such as "{vid}_rgb.npy", or its dataset or key in the hdf5
    # file or lmdb, such as "{vid}/c3d_features". None: {vid}, in a folder with any known ending.
    file: str | None = None
    key: str = "features"  # of the array in a file of several; the only array needs none
    clip_seconds: Positive | None = None  # between its clips; None: that of the store
    pool: Literal["mean", "max", "nearest"] = "mean"  # how they become clips of the store

    @model_validator(mode="before")
    @classmethod
    def _of_path(cls, values: Any) -> Any:
        return {"path": values} if isinstance(values, str) else values

    @model_serializer(mode="wrap")
    def _brief(self, handler: Callable[[Any], dict[str, Any]]) -> Any:
        values = {
            name: value
            for name, value in handler(self).items()
            if value != type(self).model_fields[name].default
        }
        return values["path"] if len(values) == 1 else values

    @field_validator("file")
    @classmethod
    def _names_the_video(cls, file: str | None) -> str | None:
        if file is not None and "{vid}" not in file:
            raise ValueError("needs {vid} in it, such as {vid}_rgb.npy")
        return file


class FeaturesConfig(Section):
    """Clip features: raw ones and the packed store made from them."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(path="features"),)  # joined side by side
    audio: SourceConfig | None = None  # a further one, whose temporal end points are its own
    store: Place = "store"  # written by `shine features pack`: a folder or any fsspec URL
    # How training reads it: mapped into memory, a store elsewhere from one copy on each node; one
    # copy in the memory of each GPU; or streamed by ranges, with no copy of the whole.
    feed: Literal["mapped", "resident", "streamed"] = "mapped"
    cache: str | None = None  # the folder of such copies; None: in the user's folder of caches
    width: Count | None = None  # columns of all sources and audio; None: those of the first files
    clip_seconds: Positive = 1.0
    normalize: bool = True  # each clip of each source to unit length, x / (|x| + 1e-5)
    dtype: Literal["float16", "float32"] = "float16"

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        if not sources or len(set(sources)) != len(sources):
            raise ValueError("needs one or more sources, none twice")
        return sources

    @property
    def parts(self) -> tuple[SourceConfig, ...]:
        """Every source, that of audio last."""
        return self.sources if self.audio is None else (*self.sources, self.audio)


class ExtractConfig(Section):
    """How `shine features extract` makes clips of `features.clip_seconds` out of videos.

    Relative folders start from `data.root`; each may be any fsspec URL.
    """

    videos: Place = "videos"  # one file per video; its name without the ending is the video's
    out: Place = "features"  # one {vid}.npy per video, and what is known of each
    # Of the CLIP or SigLIP family: a name on the Hugging Face hub, or a folder.
    model: str = "openai/clip-vit-base-patch32"
    revision: str = "main"  # branch, tag or commit on the hub
    frames_per_clip: Count = 2  # at the middles of equal parts; their embeddings are averaged
    dtype: Literal["float16", "float32"] = "float32"
    batch_size: Count = 32  # frames at a time
    gpu: bool = False  # one GPU per worker
    threads: Count = 1  # of each worker, that decode and, without a GPU, compute
    workers: Count | None = None  # None: as many as the cluster has room for


class TextConfig(Section):
    """Who turns a query into token vectors."""

    encoder: Literal["lexical", "precomputed", "hugging_face"] = "lexical"
    width: Count = 64  # of a hashed or precomputed token; a word table or a model brings its own
    word_vectors: str | None = None  # table of a simulated world; relative to data.root
    # Texts that `shine text encode` has encoded, each once: a folder or any fsspec URL. What
    # precomputed and hugging_face train on; relative to data.root.
    store: Place = "texts"
    # Hugging Face: a folder, or a name on the hub; CLIP, or an encoder such as BERT or T5.
    model: str = "openai/clip-vit-base-patch32"
    gpu: bool = False  # one GPU per worker that encodes
    # Precomputed: one npz per query, with the key `last_hidden_state`; relative to data.root.
    folder: str = "text_features"
    query_file: str = "{qid}.npz"
    negative_file: str = "{qid}_recomposed_gpt_{level}.npz"  # level from 0, least altered first
    # Both: each token to unit length, x / (|x| + 1e-5), and the type that is stored.
    normalize: bool = True
    dtype: Literal["float16", "float32"] = "float16"
    max_tokens: Count = 32  # further tokens of a query are cut

    @model_validator(mode="after")
    def _files_are_told_apart(self) -> "TextConfig":
        if "{qid}" not in self.query_file:
            raise ValueError(f"query_file needs {{qid}} in it, got {self.query_file!r}")
        if "{qid}" not in self.negative_file or "{level}" not in self.negative_file:
            raise ValueError(
                f"negative_file needs {{qid}} and {{level}} in it, got {self.negative_file!r}"
            )
        return self


class DetrConfig(Section):
    """Sizes and options that Moment-DETR and QD-DETR share. Defaults: their QVHighlights recipe."""

    hidden: Count = 256
    heads: Count = 8
    feedforward: Count = 1024
    input_projections: Annotated[int, Field(ge=1, le=3)] = 2
    encoder_layers: Count = 2
    decoder_layers: Count = 2
    slots: Count = 10
    dropout: Fraction = 0.1
    input_dropout: Fraction = 0.5
    norm: Literal["post", "pre"] = "post"  # after each residual sum, or before each branch
    text_positions: Count | None = None  # places of a learned table for tokens; None: no table
    # None: a slot proposes (center, width). A number: it chooses a first and a last clip of so many
    # (the published span loss `ce`).
    span_clips: Count | None = None
    compat: Compat = "corrected"

    @model_validator(mode="after")
    def _divisible(self) -> "DetrConfig":
        if self.hidden % (2 * self.heads) or self.hidden % 4:
            raise ValueError(
                f"hidden must be a multiple of 4 and of twice heads; "
                f"got hidden {self.hidden}, heads {self.heads}"
            )
        return self


class QdDetrConfig(DetrConfig):
    """QD-DETR (CVPR 2023). `encoder_layers` of the text-to-video and of the video stack, each."""

    backbone: Literal["qd_detr"] = "qd_detr"


class MomentDetrConfig(DetrConfig):
    """Moment-DETR (NeurIPS 2021)."""

    backbone: Literal["moment_detr"] = "moment_detr"
    align_width: Count | None = None  # of the space where slots meet tokens; None: no such head


def _backbone(values: Any) -> str:
    """The tag of a section `model`; QD-DETR where it names none."""
    if isinstance(values, dict):
        return values.get("backbone", "qd_detr")
    return getattr(values, "backbone", "")


ModelConfig = Annotated[
    Annotated[QdDetrConfig, Tag("qd_detr")] | Annotated[MomentDetrConfig, Tag("moment_detr")],
    Discriminator(
        _backbone,
        custom_error_type="backbone",
        custom_error_message="expected backbone to be one of qd_detr, moment_detr",
    ),
]


class LossConfig(Section):
    """Weights and margins of the training loss.

    Defaults are the QD-DETR baseline that SHINE starts from; QD-DETR's own adds `hinge_weight`,
    Moment-DETR has the hinge alone. SHINE adds `intra_weight`, `inter_weight` (coarse ranking) and
    `fine_weights` (fine ranking): one per hard-negative level, and one for the unrelated query.
    """

    span_weight: Weight = 10.0
    giou_weight: Weight = 1.0
    label_weight: Weight = 4.0
    aux_weight: Weight = 1.0  # of the same terms after the decoder layers before the last one
    # Weights of span, GIoU and label in the cost of a match; None: those of the loss.
    matching_weights: tuple[Weight, Weight, Weight] | None = None
    background_weight: Positive = 0.1  # class weight of unmatched slots
    rank_weight: Weight = 1.0  # saliency inside above outside and above the negative query
    negative_weight: Weight = 1.0  # saliency of the negative query towards zero
    hinge_weight: Weight = 0.0  # sampled relevant clips above sampled others
    hinge_margin: Positive = 0.2  # logits
    align_weight: Weight = 0.0  # matched slots near the tokens; needs model.align_width
    align_temperature: Positive = 0.07
    intra_weight: Weight = 0.0
    inter_weight: Weight = 0.0
    intra_margin: Positive = 1.0  # logits
    inter_margin: Positive = 2.0  # logits
    top_divisor: Count = 8  # 1/8 of the inside clips are averaged
    fine_weights: tuple[Weight, ...] = ()
    fine_margins: tuple[Weight, ...] = ()
    fine_order: Literal["relative", "absolute"] = "relative"
    # How far two saliency curves lie apart: the published one-sided likelihood, or binary KL.
    fine_divergence: Literal["likelihood", "kl"] = "likelihood"
    compat: Compat = "corrected"

    @model_validator(mode="after")
    def _one_margin_per_term(self) -> "LossConfig":
        if len(self.fine_weights) != len(self.fine_margins):
            raise ValueError(
                f"fine_weights and fine_margins need one value per term; "
                f"got {len(self.fine_weights)} weights and {len(self.fine_margins)} margins"
            )
        if not (self.with_spans or self.with_partner or self.hinge_weight or self.intra_weight):
            raise ValueError("needs at least one weight above 0; all are 0")
        if len(self.fine_weights) == 1:
            raise ValueError(
                "fine_weights needs one value per hard-negative level and one for the unrelated "
                "query, so at least two; got one"
            )
        return self

    @property
    def num_hard_negatives(self) -> int:
        """Levels of hard negatives that a training step encodes: 0 where no term uses them."""
        return len(self.fine_weights) - 1 if any(self.fine_weights) else 0

    @property
    def with_partner(self) -> bool:
        """Whether a training step encodes the query of another video."""
        return any((self.rank_weight, self.negative_weight, self.inter_weight, *self.fine_weights))

    @property
    def with_spans(self) -> bool:
        """Whether the decoder is trained."""
        return any((self.span_weight, self.giou_weight, self.label_weight, self.align_weight))


class TrainConfig(Section):
    """The optimisation and the workers that share it.

    Results do not depend on `num_workers`, but for those of a model or a loss with
    `compat: reference`.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    epochs: Count = 200
    batch_size: Count = 32  # of the whole run, not of a worker
    learning_rate: Positive = 1e-4
    weight_decay: Weight = 1e-4
    clip_norm: Positive = 0.1
    drop_epoch: Count | None = None  # epochs after which the rate falls to a tenth, again and again
    precision: Literal["float32", "bfloat16"] = "float32"  # of the matrix products
    bucket_batches: Count = 16  # rows are sorted by length within so many batches
    num_workers: Annotated[int, Field(ge=0)] = 2  # 0: in this process, without Ray
    gpu: bool = False  # one GPU per worker
    threads: Count = 1  # of each worker, on a CPU
    evaluate_every: Count = 1  # epochs
    # The best checkpoint: by the mean of R1@0.5, R1@0.7 and mIoU, or of average precision, over the
    # validation splits.
    select_by: Literal["recall", "mAP"] = "recall"
    max_failures: Annotated[int, Field(ge=0)] = 1  # lost workers a run survives


class EvaluateConfig(Section):
    """What `shine evaluate` measures and how predictions are finished."""

    batch_size: Count = 100
    nms_threshold: Annotated[float, Field(gt=0, le=1)] | None = None  # IoU; None: off
    round_seconds: Positive | None = None  # predicted moments snap to multiples; None: off
    # Predicted moments are cut to their video; under `reference` to `limit_seconds`, or not at all.
    limit_seconds: Positive | None = None
    compat: Compat = "corrected"

    @model_validator(mode="after")
    def _limit_is_read(self) -> "EvaluateConfig":
        if self.limit_seconds is not None and self.compat != "reference":
            raise ValueError(
                f"limit_seconds={self.limit_seconds} is read with compat=reference alone, and the "
                f"default cuts moments to their video; set limit_seconds=null"
            )
        return self

    negatives: str | None = None  # of test queries, for saliency sanity; relative to data.root
    bootstrap: Annotated[int, Field(ge=0)] = 1000  # resamples of an interval; 0: none


class TrackingConfig(Section):
    """Where the curves of `metrics.jsonl` are shown besides.

    Servers and keys are named by the environment of the workers (`MLFLOW_TRACKING_URI`,
    `WANDB_API_KEY`, `WANDB_MODE` and their like), not here.
    """

    tensorboard: bool = True  # event files in the folder `tensorboard` of the run
    mlflow: str | None = None  # an experiment; needs the package mlflow
    wandb: str | None = None  # a project; needs the package wandb

    @field_validator("mlflow", "wandb")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and ("://" in name or not name.strip()):
            raise PydanticCustomError(
                _UNSHOWN,
                "needs a name; the environment says where its server is and with which key",
            )
        return name


class Config(Section):
    """A run configuration."""

    data: DataConfig = DataConfig()
    negatives: NegativesConfig = NegativesConfig()
    features: FeaturesConfig = FeaturesConfig()
    extract: ExtractConfig = ExtractConfig()
    text: TextConfig = TextConfig()
    model: ModelConfig = QdDetrConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self._normal(self.features.store) == self._normal(self.text.store):
            raise ValueError(
                f"features.store and text.store need two places, got {self.text.store!r} for both"
            )
        model, loss = self.model, self.loss
        align_width = model.align_width if isinstance(model, MomentDetrConfig) else None
        if loss.align_weight and align_width is None:
            raise ValueError(
                f"loss.align_weight={loss.align_weight} needs model.backbone=moment_detr with "
                f"model.align_width"
            )
        if model.span_clips is not None and loss.giou_weight:
            raise ValueError(
                f"model.span_clips={model.span_clips} chooses clips, which have no GIoU to train; "
                f"set loss.giou_weight=0, got {loss.giou_weight}"
            )
        longest = self.data.max_clips
        if model.span_clips is not None and (longest is None or longest > model.span_clips):
            raise ValueError(
                f"model.span_clips={model.span_clips} needs data.max_clips of at most as many, "
                f"got {longest}"
            )
        if model.text_positions is not None and model.text_positions < self.text.max_tokens:
            raise ValueError(
                f"model.text_positions must be at least text.max_tokens={self.text.max_tokens}, "
                f"got {model.text_positions}"
            )
        return self

    def _normal(self, place: str) -> str:
        """A place in one way of writing it, to be compared."""
        return os.path.abspath(self.path(place.removeprefix("file://")))

    def path(self, name: str) -> Path:
        """The file that a relative name of this configuration means."""
        return Path(self.data.root) / name

    def rooted(self, root: Path) -> "Config":
        """The same configuration with its files in `root`, found from any working directory."""
        data = self.data.model_copy(update={"root": str(root.resolve())})
        return self.model_copy(update={"data": data})

    def to_yaml(self) -> str:
        """Every value, defaults included, as a file that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The validated configuration of a YAML file with dotted overrides on top.

    Args:
        path: the file; None starts from the defaults.
        overrides: `section.key=value`; the value is read as YAML.

    Raises:
        InputError: the file cannot be read, or a key or a value is wrong.
    """
    values = _read(Path(path), ()) if path is not None else {}
    for override in overrides:
        values = _merge(values, _override(override, "section.key=value, such as train.epochs=3", 2))
    return _validated(Config, values, str(path) if path is not None else "the configuration")


def load_section(section: type[AnySection], overrides: Iterable[str] = ()) -> AnySection:
    """A section of its own, such as that of a simulated world, from `key=value` alone.

    Raises:
        InputError: a key or a value is wrong.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        values = _merge(values, _override(override, "key=value, such as seed=3", 1))
    return _validated(section, values, "the command line")


def _override(text: str, form: str, depth: int) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    keys = key.split(".")
    if not equals or len(keys) < depth or not all(keys):
        raise InputError(f"expected an override of the form {form}; got {text!r}")
    return _nest(keys, _parse(value, f"override {text!r}"))


def _validated(section: type[AnySection], values: dict[str, Any], where: str) -> AnySection:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        sentences = [_sentence(section, item, where) for item in error.errors()]
        raise InputError("; ".join(sentences)) from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"{path}: `base` leads back to this file; remove one of the links")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read configuration {path}: {reason}") from None
    values = _parse(text, str(path)) or {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected sections with keys, got a {type(values).__name__}")
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"{path}: `base` must name configuration files, got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(path.parent / base, (*seen, path.resolve())))
    return _merge(merged, values)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`; maps merge, but an empty one and everything else replaces what was."""
    merged = dict(low)
    for key, value in high.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value:
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _sentence(section: type[Section], item: Any, where: str) -> str:
    """One pydantic error in our words."""
    inner, keys = _place(section, [str(part) for part in item["loc"]])
    name = ".".join(keys)
    if item["type"] == "extra_forbidden":
        known = list(inner.model_fields)
        near = difflib.get_close_matches(keys[-1], known, 1, 0.0)
        hint = f"the nearest is {'.'.join([*keys[:-1], near[0]])!r}" if near else f"known: {known}"
        return f"{where}: unknown key {name!r}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    place = f"{where}: {name}" if name else where
    if item["type"] == _UNSHOWN or isinstance(item["input"], Section | dict):
        return f"{place}: {message}"
    got = re.sub(r"//[^/]*@", "//...@", repr(item["input"]))  # no password of a URL,
    got = re.sub(r"(://[^?']*)\?[^']*", r"\1", got)  # and no signature
    return f"{place}: {message}, got {got}"


def _place(section: type[Section], loc: list[str]) -> tuple[type[Section], list[str]]:
    """The innermost section that an error lies in, and its keys without the tags of unions."""
    keys = []
    options: list[type[Section]] = []  # sections that the key before could hold
    for key in loc:
        tagged = [o for o in options if o.model_fields["backbone"].default == key]
        if tagged:
            section, options = tagged[0], []
            continue
        keys.append(key)
        field = section.model_fields.get(key)
        options = [] if field is None else _sections(field.annotation)
        if len(options) == 1:
            section, options = options[0], []
    return section, keys


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]
