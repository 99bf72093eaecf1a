"""The training loss: selects, weighs and names the terms."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shine.config import LossConfig
from shine.data.batch import Outputs, Targets
from shine.losses.alignment import align_loss
from shine.losses.label import label_loss
from shine.losses.matching import assign
from shine.losses.ranking import (
    fine_ranking,
    inter_ranking,
    intra_ranking,
    published_outside,
)
from shine.losses.saliency import hinge_loss, negative_loss, rank_loss
from shine.losses.span import giou_loss, span_loss
from shine.spans import generalised_iou, to_moments


@dataclass(frozen=True)
class Criterion:
    """The loss of a training step: a weighted sum of terms, each a local sum over a global count.

    A term of weight 0 is not computed. The decoder terms (span, GIoU, label, align) are taken after
    every decoder layer, each with its own matching.
    """

    config: LossConfig

    def __call__(
        self, outputs: Outputs, targets: Targets
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The total, and its parts by name without gradient.

        Parts are unweighted. `loss/span`, `loss/giou`, `loss/label` and `loss/align` are of the
        last decoder layer; `loss/aux` is the weighted sum of these over the layers before it.
        """
        config = self.config
        texts = 1 + config.with_partner + config.num_hard_negatives
        assert len(outputs.saliency) == texts, "texts of a training step"
        decoded = self._decoder_terms(outputs, targets)  # [layer] each
        terms = {name: (weight, loss[-1]) for name, (weight, loss) in decoded.items()}
        if decoded and config.aux_weight and len(outputs.spans) > 1:
            before = [weight * loss[:-1] for weight, loss in decoded.values()]
            terms["aux"] = (config.aux_weight, torch.stack(before).sum())
        terms |= self._saliency_terms(outputs.saliency, targets)
        total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
        parts = {f"loss/{name}": loss.detach() for name, (_, loss) in terms.items()}
        return total, parts | {"loss/total": total.detach()}

    @torch.no_grad()
    def match(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "layer row slot moment"]:
        """Which slot answers for which moment, after every decoder layer on its own."""
        config = self.config
        weights = (config.span_weight, config.giou_weight, config.label_weight)
        span, giou, label = config.matching_weights or weights
        distance = _distance(outputs, targets)
        if outputs.ends is None:
            cost = span * distance.sum(dim=-1) - giou * _overlap(outputs, targets)
        else:  # as published, the shares of the two clips and no overlap
            cost = -span * (-distance).exp().sum(dim=-1)
        cost = cost - label * outputs.logits.softmax(dim=-1)[..., :1]
        mask = targets.moment_mask.expand(len(cost), -1, -1)
        return assign(cost.flatten(0, 1), mask.flatten(0, 1)).view(cost.shape)

    def _decoder_terms(
        self, outputs: Outputs, targets: Targets
    ) -> dict[str, tuple[float, Float[Tensor, " layer"]]]:
        config = self.config
        if not config.with_spans:
            return {}
        match = self.match(outputs, targets)
        terms = {}
        if config.span_weight:
            distance = _distance(outputs, targets).sum(dim=-1)
            loss = span_loss(distance, match, targets.num_moments)
            terms["span"] = (config.span_weight, loss)
        if config.giou_weight:
            loss = giou_loss(_overlap(outputs, targets), match, targets.num_moments)
            terms["giou"] = (config.giou_weight, loss)
        if config.label_weight:
            loss = label_loss(
                outputs.logits,
                match.any(dim=-1),
                targets.num_rows,
                background_weight=config.background_weight,
            )
            terms["label"] = (config.label_weight, loss)
        if config.align_weight:
            alignment = outputs.alignment
            assert alignment is not None, "loss.align_weight needs model.align_width"
            published = config.compat == "reference"
            token_mask = alignment.token_mask
            loss = align_loss(
                alignment.slots,
                alignment.tokens,
                torch.ones_like(token_mask) if published else token_mask,
                match.any(dim=-1),
                targets.num_rows,
                temperature=config.align_temperature,
            )
            terms["align"] = (config.align_weight, loss)
        return terms

    def _saliency_terms(
        self, saliency: Float[Tensor, "text row clip"], targets: Targets
    ) -> dict[str, tuple[float, Float[Tensor, ""]]]:
        config = self.config
        own, clip_mask = saliency[0], targets.inside | targets.outside
        terms = {}
        if config.hinge_weight:
            loss = hinge_loss(
                own,
                targets.pairs,
                targets.has_pairs,
                targets.num_pairs,
                margin=config.hinge_margin,
            )
            terms["hinge"] = (config.hinge_weight, loss)
        if config.intra_weight:
            outside, num_outside = targets.outside, targets.num_outside
            if config.compat == "reference":
                outside, num_outside = published_outside(outside), targets.num_rows
            loss = intra_ranking(
                own,
                targets.inside,
                outside,
                num_outside,
                margin=config.intra_margin,
                top_divisor=config.top_divisor,
            )
            terms["intra"] = (config.intra_weight, loss)
        if not config.with_partner:
            return terms
        partner, has_partner = saliency[1], targets.text_valid[1]
        num_partners = targets.num_both[1, 1]
        if config.rank_weight:
            loss = rank_loss(
                own, partner, targets.relevance, clip_mask, has_partner, targets.num_rows
            )
            terms["rank"] = (config.rank_weight, loss)
        if config.negative_weight:
            loss = negative_loss(partner, clip_mask, has_partner, num_partners)
            terms["negative"] = (config.negative_weight, loss)
        if config.inter_weight:
            loss = inter_ranking(
                own,
                partner,
                targets.inside,
                has_partner,
                num_partners,
                margin=config.inter_margin,
                top_divisor=config.top_divisor,
            )
            terms["inter"] = (config.inter_weight, loss)
        if any(config.fine_weights):
            fine = fine_ranking(
                saliency,
                targets.inside,
                clip_mask,
                targets.text_valid,
                targets.num_both,
                margins=config.fine_margins,
                order=config.fine_order,
                divergence=config.fine_divergence,
            )
            for number, (weight, loss) in enumerate(zip(config.fine_weights, fine, strict=True), 1):
                terms[f"fine_{number}"] = (weight, loss)
        return terms


def _distance(outputs: Outputs, targets: Targets) -> Float[Tensor, "layer row slot moment 2"]:
    """Of every slot from every moment, for the two numbers of a span or the two ends of it."""
    if outputs.ends is None:
        return (outputs.spans[..., None, :] - targets.spans[:, None]).abs()
    surprise = -outputs.ends.log_softmax(dim=-1)  # [layer, row, slot, 2, choice]
    clips = targets.span_clips.transpose(1, 2)[:, None]  # [row, 1, 2, moment]
    clips = clips.expand(*surprise.shape[:-1], -1)
    return surprise.gather(-1, clips).transpose(-1, -2)


def _overlap(outputs: Outputs, targets: Targets) -> Float[Tensor, "layer row slot moment"]:
    return generalised_iou(to_moments(outputs.spans), to_moments(targets.spans))
