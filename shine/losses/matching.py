"""Which slot answers for which moment: an exact assignment on the device of its inputs."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@torch.no_grad()
def assign(
    cost: Float[Tensor, "row slot moment"], moment_mask: Bool[Tensor, "row moment"]
) -> Bool[Tensor, "row slot moment"]:
    """True where a slot is matched to a moment: one to one, at the least total cost of each row.

    Every real moment gets a slot; where a row has more moments than slots, every slot gets a
    moment. One moment needs an argmin. More are solved by dynamic programming over the subsets of
    moments (`2^moment` of them, so five at most in practice), slot by slot and for all rows at
    once, without waiting for the device.

    Args:
        cost: of each pair; the columns of padding moments may hold anything.
        moment_mask: True on real moments.
    """
    num_slots, num_moments = cost.shape[1:]
    if num_moments == 1:
        best = cost.argmin(dim=1, keepdim=True)  # [row, 1, 1]
        return (torch.arange(num_slots, device=cost.device)[:, None] == best) & moment_mask[:, None]

    cost = torch.where(moment_mask[:, None], cost, math.inf)
    moment = torch.arange(num_moments, device=cost.device)
    bit = 2**moment
    subset = torch.arange(2**num_moments, device=cost.device)
    contains = (subset[:, None] & bit).bool()  # [subset, moment]
    without = subset[:, None] & ~bit

    # least[a] is the cost of matching the moments of subset a, and no others, to the slots so far:
    # the next slot stays free, or takes one moment of a and leaves the rest to those before it.
    least = cost.new_full((len(cost), len(subset)), math.inf)
    least[:, 0] = 0
    choices = []
    for slot in range(num_slots):
        taking = (least[:, without] + cost[:, slot, None]).masked_fill(~contains, math.inf)
        least, choice = torch.cat([least[..., None], taking], dim=-1).min(dim=-1)
        choices.append(choice - 1)  # [row, subset]: a moment, or -1

    wanted = moment_mask.sum(dim=1, keepdim=True).clamp(max=num_slots)
    full = contains.sum(dim=1) == wanted  # [row, subset]
    state = torch.where(full, least, math.inf).argmin(dim=1, keepdim=True)  # [row, 1]
    taken = []
    for choice in reversed(choices):
        chosen = choice.gather(1, state) == moment  # [row, moment], nowhere True for a free slot
        state = state - (chosen * bit).sum(dim=1, keepdim=True)
        taken.append(chosen)
    return torch.stack(taken[::-1], dim=1)
