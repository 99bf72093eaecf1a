"""The training loss: selects, weighs and names the terms."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from shine.config import LossConfig
from shine.data.batch import Outputs, Targets
from shine.losses.label import label_loss
from shine.losses.matching import assign
from shine.losses.ranking import coarse_ranking, fine_ranking
from shine.losses.saliency import negative_loss, rank_loss
from shine.losses.span import giou_loss, span_loss
from shine.spans import generalised_iou, to_moments


@dataclass(frozen=True)
class Criterion:
    """The loss of a training step: a weighted sum of terms, each a local sum over a global count.

    A term of weight 0 is not computed. The decoder terms (span, GIoU, label) are taken after every
    decoder layer, each with its own matching.
    """

    config: LossConfig

    def __call__(
        self, outputs: Outputs, targets: Targets
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The total, and its parts by name without gradient.

        Parts are unweighted. `loss/span`, `loss/giou` and `loss/label` are of the last decoder
        layer; `loss/aux` is the weighted sum of these three over the layers before it.
        """
        config = self.config
        assert len(outputs.saliency) == 2 + config.num_hard_negatives, "texts of a training step"
        decoded = self._decoder_terms(outputs, targets)  # [layer] each
        terms = {name: (weight, loss[-1]) for name, (weight, loss) in decoded.items()}
        if decoded and len(outputs.spans) > 1:
            before = [weight * loss[:-1] for weight, loss in decoded.values()]
            terms["aux"] = (1.0, torch.stack(before).sum())
        terms |= self._saliency_terms(outputs.saliency, targets)
        total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
        # Every output takes part, so that DDP meets every parameter whatever the weights are.
        total = total + 0.0 * (outputs.logits.sum() + outputs.spans.sum() + outputs.saliency.sum())
        parts = {f"loss/{name}": loss.detach() for name, (_, loss) in terms.items()}
        return total, parts | {"loss/total": total.detach()}

    def _decoder_terms(
        self, outputs: Outputs, targets: Targets
    ) -> dict[str, tuple[float, Float[Tensor, " layer"]]]:
        config = self.config
        if not (config.span_weight or config.giou_weight or config.label_weight):
            return {}
        layers, rows, slots, _ = outputs.spans.shape
        distance = (outputs.spans[..., None, :] - targets.spans[:, None]).abs().sum(dim=-1)
        overlap = generalised_iou(to_moments(outputs.spans), to_moments(targets.spans))
        foreground = outputs.logits.softmax(dim=-1)[..., :1]
        cost = config.span_weight * distance - config.giou_weight * overlap
        cost = cost - config.label_weight * foreground  # [layer, row, slot, moment]
        mask = targets.moment_mask.expand(layers, -1, -1)
        match = assign(cost.flatten(0, 1), mask.flatten(0, 1)).view(cost.shape)
        terms = {}
        if config.span_weight:
            loss = span_loss(distance, match, targets.num_moments)
            terms["span"] = (config.span_weight, loss)
        if config.giou_weight:
            terms["giou"] = (config.giou_weight, giou_loss(overlap, match, targets.num_moments))
        if config.label_weight:
            loss = label_loss(
                outputs.logits,
                match.any(dim=-1),
                targets.num_rows,
                background_weight=config.background_weight,
            )
            terms["label"] = (config.label_weight, loss)
        return terms

    def _saliency_terms(
        self, saliency: Float[Tensor, "text row clip"], targets: Targets
    ) -> dict[str, tuple[float, Float[Tensor, ""]]]:
        config = self.config
        own, partner, has_partner = saliency[0], saliency[1], targets.text_valid[1]
        clip_mask, num_partners = targets.inside | targets.outside, targets.num_both[1, 1]
        terms = {}
        if config.rank_weight:
            loss = rank_loss(
                own, partner, targets.relevance, clip_mask, has_partner, targets.num_rows
            )
            terms["rank"] = (config.rank_weight, loss)
        if config.negative_weight:
            loss = negative_loss(partner, clip_mask, has_partner, num_partners)
            terms["negative"] = (config.negative_weight, loss)
        if config.intra_weight or config.inter_weight:
            intra, inter = coarse_ranking(
                own,
                partner,
                targets.inside,
                targets.outside,
                has_partner,
                targets.num_outside,
                num_partners,
                intra_margin=config.intra_margin,
                inter_margin=config.inter_margin,
                top_divisor=config.top_divisor,
            )
            terms["intra"] = (config.intra_weight, intra)
            terms["inter"] = (config.inter_weight, inter)
        if any(config.fine_weights):
            fine = fine_ranking(
                saliency,
                targets.inside,
                clip_mask,
                targets.text_valid,
                targets.num_both,
                margins=config.fine_margins,
                order=config.fine_order,
            )
            for number, (weight, loss) in enumerate(zip(config.fine_weights, fine, strict=True), 1):
                terms[f"fine_{number}"] = (weight, loss)
        return terms
