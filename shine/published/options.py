"""Options of the published programs as sections of a run configuration, and back.

Sizes come from the tensors, which cannot be wrong about them; options tell what tensors do not
show, such as the number of heads.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import Tensor

from shine.config import Config, MomentDetrConfig
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
    *("lw_saliency", "use_saliency_loss", "hn_num", "ranking_type"),
    *("coarse_coef", "coarse_margin", "fine_coef", "fine_margin"),
}
# Options that are heeded by having this value; the published code computes with 8 whatever `q` is.
_ONLY = {"position_embedding": "sine", "aux_loss": True, "q": 8}
# What options that are computed with must be.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("position_embedding", "ctx_mode", "dset_name", "ranking_type"), (str,)),
    **dict.fromkeys(("lw_saliency", "coarse_coef", "fine_coef"), (int, float)),
    **dict.fromkeys(("coarse_margin", "fine_margin"), (list,)),
}
_ORDERS = {"red": "relative", "abd": "absolute"}
_CUT_SECONDS = {"hl": 150.0, "charades": 150.0}  # where published predictions end
_TABLE = "txt_position_embed.position_embeddings.weight"
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
        **told,
        "data.max_clips": seen["model.span_clips"],
        **_data(options),
        **_losses(options, seen),
        **seen,
        "model.text_positions": seen["text.max_tokens"] if with_positions else None,
        "model.compat": "reference",
        "text.encoder": "precomputed",
        "features.width": clip_width - ends_of_clips,
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
    heeded = {*_SAME, *_JOINT, *(key for key, value in _ONLY.items() if options.get(key) == value)}
    if options.get("a_feat_dim"):
        notes.append("the clips have audio; set features.audio to its folder")
    if seen["model.backbone"] == "qd_detr" and options.get("contrastive_align_loss"):
        notes.append("QD-DETR has no contrastive heads here; their training loss is left out")
    return Translation(
        values, clip_width, seen["text.width"], sorted(options.keys() - heeded), notes
    )


def published_options(config: Config, clip_width: int, token_width: int) -> dict[str, Any]:
    """The options under which published code builds the model of `config`; plain data."""
    model, loss = config.model, config.loss
    align = model.align_width if isinstance(model, MomentDetrConfig) else None
    options = {theirs: reduce(getattr, ours.split("."), config) for theirs, ours in _SAME.items()}
    costs = loss.matching_weights or (loss.span_weight, loss.giou_weight, loss.label_weight)
    options |= dict(zip(_COSTS, costs, strict=True))
    options |= {"position_embedding": "sine", "aux_loss": True}
    options |= {
        "t_feat_dim": token_width,
        "v_feat_dim": clip_width,
        "use_txt_pos": model.text_positions is not None,
        "max_q_l": model.text_positions or config.text.max_tokens,
        "max_v_l": config.data.max_clips or -1,
        "pre_norm": model.norm == "pre",
        "span_loss_type": "l1" if model.span_clips is None else "ce",
        "contrastive_align_loss": align is not None,
        "contrastive_align_loss_coef": loss.align_weight,
        "contrastive_hdim": align or 64,
        "lw_saliency": loss.rank_weight or loss.hinge_weight,
    }
    if loss.fine_margins:
        options |= {
            "use_saliency_loss": loss.hinge_weight > 0,
            "hn_num": len(loss.fine_margins) - 1,
            "ranking_type": {ours: theirs for theirs, ours in _ORDERS.items()}[loss.fine_order],
            "coarse_coef": loss.intra_weight,
            "coarse_margin": [loss.intra_margin, loss.inter_margin],
            "fine_coef": max(loss.fine_weights),
            "fine_margin": list(loss.fine_margins),
            "q": loss.top_divisor,
        }
    return options


def _check(options: Mapping[str, Any], where: str) -> None:
    """The options can be read, and ask for nothing that no model here does."""
    for key, types in _TYPES.items():
        if key in options and not isinstance(options[key], types):
            names = " or ".join(kind.__name__ for kind in types)
            raise InputError(f"{where}: expected option {key} as {names}, got {options[key]!r:.80}")
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


def _data(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the published programs did to videos and answers."""
    values: dict[str, Any] = {}
    longest = options.get("max_v_l")
    if longest is not None:  # -1 is meant as "all", and cuts the last clip of each video
        values |= {"data.max_clips": longest if longest != -1 else None, "data.compat": "reference"}
    name = options.get("dset_name")
    if name is not None:
        values |= {"evaluate.limit_seconds": _CUT_SECONDS.get(name), "evaluate.compat": "reference"}
    if name in _CUT_SECONDS and "clip_length" in options:
        values["evaluate.round_seconds"] = options["clip_length"]
    return values


def _losses(options: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """The training loss; saliency terms by the system that the options and entries are of."""
    weight = options.get("lw_saliency", 1.0)
    with_partner = weight if seen["model.backbone"] == "qd_detr" else 0.0
    values: dict[str, Any] = {
        "loss.hinge_weight": weight,
        "loss.rank_weight": with_partner,
        "loss.negative_weight": with_partner,
        # Terms of other systems, which a given configuration may have on.
        **dict.fromkeys(("loss.align_weight", "loss.intra_weight", "loss.inter_weight"), 0.0),
        **dict.fromkeys(("loss.fine_weights", "loss.fine_margins"), ()),
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
