"""Division of a local sum by a global count."""

from jaxtyping import Float
from torch import Tensor


def per(total: Float[Tensor, "*term"], count: Float[Tensor, "*#term"]) -> Float[Tensor, "*term"]:
    """`total / count`, and 0 with gradient 0 where nothing was counted.

    A count is that of the global batch over the number of workers, so it may lie between 0 and 1.
    """
    return total / count.clamp(min=1e-6)
