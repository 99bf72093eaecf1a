"""Options of the published programs as sections of a run configuration, and back.

Sizes come from the tensors, which cannot be wrong about them; options tell what tensors do not
show, such as the number of heads.
"""

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import Tensor

from shine.config import Config, LossConfig, MomentDetrConfig
from shine.errors import InputError

# Options that are one key of ours.
_SAME = {
    "hidden_dim": "model.hidden",
    "nheads": "model.heads",
    "dim_feedforward": "model.feedforward",
    "n_input_proj": "model.input_projections",
    "enc_layers": "model.encoder_layers",
    "dec_layers": "model.decoder_layers",
    "num_queries": "model.slots",
    "dropout": "model.dropout",
    "input_dropout": "model.input_dropout",
    "max_q_l": "text.max_tokens",
    "t_feat_dim": "text.width",
    "clip_length": "features.clip_seconds",
    "max_windows": "data.max_moments",
    "span_loss_coef": "loss.span_weight",
    "giou_loss_coef": "loss.giou_weight",
    "label_loss_coef": "loss.label_weight",
    "eos_coef": "loss.background_weight",
    "saliency_margin": "loss.hinge_margin",
    "temperature": "loss.align_temperature",
    "lr": "train.learning_rate",
    "wd": "train.weight_decay",
    "bsz": "train.batch_size",
    "n_epoch": "train.epochs",
    "lr_drop": "train.drop_epoch",
    "seed": "train.seed",
}
_COSTS = ("set_cost_span", "set_cost_giou", "set_cost_class")
_ALIGN = ("contrastive_align_loss", "contrastive_align_loss_coef", "contrastive_hdim")
# Options that several keys of ours tell together.
_JOINT = {
    *_COSTS,
    *_ALIGN,
    *(
        "v_feat_dim",
        "a_feat_dim",
        "use_txt_pos",
        "pre_norm",
        "span_loss_type",
        "max_v_l",
        "dset_name",
    ),
    *("aux_loss", "lw_saliency", "use_saliency_loss", "hn_num", "ranking_type"),
    *("coarse_coef", "coarse_margin", "fine_coef", "fine_margin"),
}
# Options that are heeded by having this value; the published code computes with 8 whatever `q` is.
_ONLY = {"position_embedding": "sine", "q": 8}
# What options that are computed with must be.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("position_embedding", "ctx_mode", "dset_name", "ranking_type"), (str,)),
    **dict.fromkeys(("lw_saliency", "coarse_coef", "fine_coef"), (int, float)),
    **dict.fromkeys(("coarse_margin", "fine_margin"), (list,)),
    "max_v_l": (int,),
}
_ORDERS = {"red": "relative", "abd": "absolute"}
_CUT_SECONDS = {"hl": 150.0, "charades": 150.0}  # where published predictions end
_TABLE = "txt_position_embed.position_embeddings.weight"
# What the tensors have, and a configuration may leave to the files.
_WIDTHS = ("features.width", "text.width")
_MOST_VALUES, _MOST_LEVELS = 100_000, 20


@dataclass(frozen=True)
class Translation:
    """A published checkpoint in our words."""

    values: dict[str, Any]  # `section.key` -> value
    clip_width: int  # columns of a clip vector, temporal end points included
    token_width: int
    untranslated: list[str]  # options without a meaning here
    notes: list[str]  # sentences about what was assumed or contradicts itself


def plain_options(options: Any, where: str) -> dict[str, Any]:
    """An option namespace as data that JSON can hold.

    Args:
        options: as `open_torch_file` reads it; None where there is none.
        where: the file, for messages.

    Raises:
        InputError: an option is more than numbers, text, lists and dictionaries of them.
    """
    values = _plain({} if options is None else options, where, [0], 0)
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected `opt` to hold named options, got {values!r:.80}")
    return values


def _plain(value: Any, where: str, count: list[int], level: int) -> Any:
    count[0] += 1
    if count[0] > _MOST_VALUES or level > _MOST_LEVELS:
        raise InputError(f"{where}: refused, since `opt` is larger or deeper than options are")
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if value is None or isinstance(value, str | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, where, count, level + 1) for item in value]
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): _plain(item, where, count, level + 1) for key, item in value.items()}
    raise InputError(
        f"{where}: refused, since an option holds a {type(value).__name__}; expected "
        f"numbers, text, lists and dictionaries"
    )


def translate(options: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> Translation:
    """The configuration that a checkpoint was trained with, as far as its file tells.

    Args:
        options: plain data.
        state: under published names.
        where: the file, for messages.

    Raises:
        InputError: the entries are those of none of the published systems, or the options ask for
            what no model here does.
    """
    _check(options, where)
    seen, clip_width = _sizes(state, where)
    told = {ours: options[theirs] for theirs, ours in _SAME.items() if theirs in options}
    with_positions = options.get("use_txt_pos", False)
    ends_of_clips = 4 if options.get("a_feat_dim") else 2  # audio has temporal end points too
    values = {
        **{f"loss.{key}": value for key, value in LossConfig().model_dump().items()},
        **told,
        **_data(options, seen),
        **_losses(options, seen),
        **seen,
        "model.text_positions": seen["text.max_tokens"] if with_positions else None,
        "model.compat": "reference",
        "text.encoder": "precomputed",
        "features.width": clip_width - ends_of_clips,
        "train.precision": "float32",
        "train.select_by": "recall" if "fine_margin" in options else "mAP",  # SHINE: of its tests
    }
    notes = [
        f"option {theirs} is {options[theirs]!r}, but the tensors have {seen[ours]}, which counts"
        for theirs, ours in _SAME.items()
        if theirs in options and ours in seen and options[theirs] != seen[ours]
    ]
    if "nheads" not in options:
        notes.append(f"no option tells nheads; {MomentDetrConfig().heads} heads are assumed")
    if "use_txt_pos" not in options:
        notes.append("no option tells use_txt_pos; positions of tokens are assumed to be off")
    if options.get("max_v_l") == -1 and seen["model.span_clips"] is None:
        notes.append(
            "option max_v_l is -1, which leaves out the last clip of each npy or npz file, though "
            "not of C3D files; where data.max_clips is set, it counts instead"
        )
    heeded = {*_SAME, *_JOINT, *(key for key, value in _ONLY.items() if options.get(key) == value)}
    if options.get("a_feat_dim"):
        notes.append("the clips have audio; set features.audio to its folder")
    if seen["model.backbone"] == "qd_detr" and options.get("contrastive_align_loss"):
        notes.append("QD-DETR has no contrastive heads here; their training loss is left out")
    return Translation(
        values, clip_width, seen["text.width"], sorted(options.keys() - heeded), notes
    )


def published_options(
    config: Config, clip_width: int, token_width: int, audio_width: int | None
) -> dict[str, Any]:
    """The options under which published code builds the model of `config`; plain data.

    Args:
        config: of the run.
        clip_width: columns of a clip vector, temporal end points included.
        token_width: columns of a token vector.
        audio_width: those of them that are audio; None where the clips have no audio.
    """
    model, loss = config.model, config.loss
    align = model.align_width if isinstance(model, MomentDetrConfig) else None
    options = {theirs: reduce(getattr, ours.split("."), config) for theirs, ours in _SAME.items()}
    options |= dict(zip(_COSTS, _costs(loss), strict=True))
    options |= {"position_embedding": "sine", "aux_loss": loss.aux_weight > 0}
    audio = 0 if audio_width is None else audio_width + 2  # with temporal end points of its own
    options |= {
        "t_feat_dim": token_width,
        "v_feat_dim": clip_width - audio,
        "use_txt_pos": model.text_positions is not None,
        "max_q_l": model.text_positions or config.text.max_tokens,
        "max_v_l": config.data.max_clips or -1,
        "pre_norm": model.norm == "pre",
        "span_loss_type": "l1" if model.span_clips is None else "ce",
        "contrastive_align_loss": align is not None,
        "contrastive_align_loss_coef": loss.align_weight,
        "contrastive_hdim": align or 64,
    }
    if audio:
        options["a_feat_dim"] = audio
    return options | _saliency_options(loss, model.backbone)


def _costs(loss: LossConfig) -> tuple[float, ...]:
    """The weights of `_COSTS`, which published options always tell."""
    return loss.matching_weights or (loss.span_weight, loss.giou_weight, loss.label_weight)


def _saliency_options(loss: LossConfig, backbone: str) -> dict[str, Any]:
    """`lw_saliency` multiplies every saliency term, so the other weights are shares of it."""
    weight = loss.hinge_weight
    if backbone == "qd_detr":
        weight = loss.rank_weight or loss.negative_weight or weight
    if not (loss.fine_margins or loss.intra_weight or loss.inter_weight):
        return {"lw_saliency": weight}
    weight = weight or 1.0
    return {
        "lw_saliency": weight,
        "use_saliency_loss": loss.hinge_weight > 0,
        "hn_num": max(len(loss.fine_margins) - 1, 0),
        "ranking_type": {ours: theirs for theirs, ours in _ORDERS.items()}[loss.fine_order],
        "coarse_coef": max(loss.intra_weight, loss.inter_weight) / weight,
        "coarse_margin": [loss.intra_margin, loss.inter_margin],
        "fine_coef": max(loss.fine_weights, default=0.0) / weight,
        "fine_margin": list(loss.fine_margins),
        "q": loss.top_divisor,
    }


def differences(config: Config, values: Mapping[str, Any]) -> list[str]:
    """A sentence for each value that options translate to and that is another one in `config`.

    Args:
        config: of the run that is exported.
        values: `section.key` -> value, as `translate` reads the exported options.
    """
    own = config.model_dump(mode="json")
    own["loss"]["matching_weights"] = _costs(config.loss)
    pairs = {
        key: (own[key.split(".")[0]][key.split(".")[1]], value)
        for key, value in values.items()
        if key not in _WIDTHS
    }
    return [
        f"{key} is {ours!r} in the run; the options of the file stand for {theirs!r}"
        for key, (ours, theirs) in pairs.items()
        if not _alike(ours, theirs)
    ]


def _alike(one: Any, other: Any) -> bool:
    """Equal but for the last digit, which a division and a multiplication may change."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other)
    return one == other


def _check(options: Mapping[str, Any], where: str) -> None:
    """The options can be read, and ask for nothing that no model here does."""
    for key, types in _TYPES.items():
        if key in options and not isinstance(options[key], types):
            names = " or ".join(kind.__name__ for kind in types)
            raise InputError(f"{where}: expected option {key} as {names}, got {options[key]!r:.80}")
    longest = options.get("max_v_l", -1)
    if longest < 1 and longest != -1:
        raise InputError(f"{where}: expected max_v_l as -1 or at least 1, got {longest}")
    position = options.get("position_embedding", "sine")
    if position != "sine":
        raise InputError(f"{where}: expected position_embedding 'sine', got {position!r}")
    if "tef" not in options.get("ctx_mode", "tef"):
        raise InputError(
            f"{where}: trained without temporal end points (ctx_mode {options['ctx_mode']!r}), "
            f"which every model here has"
        )
    if options.get("ranking_type", "red") not in _ORDERS:
        raise InputError(
            f"{where}: expected ranking_type red or abd, got {options['ranking_type']!r}"
        )
    if len(options.get("coarse_margin", (1, 2))) != 2:
        raise InputError(
            f"{where}: expected two values in coarse_margin, got {options['coarse_margin']!r:.80}"
        )


def _sizes(state: Mapping[str, Tensor], where: str) -> tuple[dict[str, Any], int]:
    """What the shapes show, and the columns of a clip vector."""

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        if key not in state or state[key].dim() != dimensions or not state[key].numel():
            raise InputError(
                f"{where}: expected a checkpoint of Moment-DETR, QD-DETR or SHINE; its model "
                f"has no entry {key} with {dimensions} dimensions"
            )
        return tuple(state[key].shape)

    def layers(prefix: str) -> int:
        return len({k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)})

    head = "span_embed.layers.2.bias"
    ends = shape(head, 1)[0]
    align = state.get("contrastive_align_projection_query.bias")
    backbone = "qd_detr" if "global_rep_token" in state else "moment_detr"
    seen = {
        "model.backbone": backbone,
        "model.hidden": shape("class_embed.weight", 2)[1],
        "model.feedforward": shape("transformer.encoder.layers.0.linear1.weight", 2)[0],
        "model.input_projections": layers("input_vid_proj."),
        "model.encoder_layers": layers("transformer.encoder.layers."),
        "model.decoder_layers": layers("transformer.decoder.layers."),
        "model.slots": shape("query_embed.weight", 2)[0],
        "model.norm": "pre" if "transformer.encoder.norm.weight" in state else "post",
        "model.span_clips": None if ends == 2 else ends // 2,
        "text.max_tokens": shape(_TABLE, 2)[0],
        "text.width": shape("input_txt_proj.0.LayerNorm.weight", 1)[0],
    }
    if backbone == "moment_detr":
        seen["model.align_width"] = None if align is None else align.shape.numel()
    return seen, shape("input_vid_proj.0.LayerNorm.weight", 1)[0]


def _data(options: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """What the published programs did to videos and answers."""
    values: dict[str, Any] = {}
    longest, choices = options.get("max_v_l", -1), seen["model.span_clips"]
    # -1 is no limit, so that of a given configuration stays; but no span is beyond the choices.
    if longest != -1 or choices is not None:
        values["data.max_clips"] = min(n for n in (longest, choices) if n not in (-1, None))
    if "max_v_l" in options:
        values["data.compat"] = "reference"
    name = options.get("dset_name")
    if name is not None:
        values |= {"evaluate.limit_seconds": _CUT_SECONDS.get(name), "evaluate.compat": "reference"}
    if name in _CUT_SECONDS and "clip_length" in options:
        values["evaluate.round_seconds"] = options["clip_length"]
    elif name is not None and name not in _CUT_SECONDS:
        values["evaluate.round_seconds"] = None
    return values


def _losses(options: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """The training loss; saliency terms by the system that the options and entries are of."""
    weight = options.get("lw_saliency", 1.0)
    with_partner = weight if seen["model.backbone"] == "qd_detr" else 0.0
    values: dict[str, Any] = {
        "loss.hinge_weight": weight,
        "loss.rank_weight": with_partner,
        "loss.negative_weight": with_partner,
        "loss.aux_weight": float(bool(options.get("aux_loss", True))),
        "loss.compat": "reference",
    }
    if all(key in options for key in _COSTS):
        values["loss.matching_weights"] = [options[key] for key in _COSTS]
    if seen.get("model.align_width") is not None:
        values["loss.align_weight"] = options.get("contrastive_align_loss_coef", 0.0)
    if seen["model.span_clips"] is not None:
        values["loss.giou_weight"] = 0.0
    if "fine_margin" in options:  # SHINE
        margins, (intra, inter) = options["fine_margin"], options.get("coarse_margin", (1.0, 2.0))
        coarse = weight * options.get("coarse_coef", 1.0)
        values |= {
            "loss.hinge_weight": weight if options.get("use_saliency_loss") else 0.0,
            "loss.intra_weight": coarse,
            "loss.inter_weight": coarse,
            "loss.intra_margin": intra,
            "loss.inter_margin": inter,
            "loss.fine_weights": [weight * options.get("fine_coef", 1.0)] * len(margins),
            "loss.fine_margins": margins,
            "loss.fine_order": _ORDERS[options.get("ranking_type", "red")],
        }
    return values
