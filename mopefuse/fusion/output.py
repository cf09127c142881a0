"""What a fusion method returns for a batch.

Shapes: B batch, N labels, L routed layers, K experts, S sides.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SideOutputs(NamedTuple):
    """What each side predicts by itself; it adds to the loss, see `mopefuse.training.losses.side_loss`."""

    logits_BSN: Tensor
    confidence_BS: Tensor  # larger where a side should be right
    present_BS: Tensor  # False where a sample lacks the side


class Output(NamedTuple):
    """The output of a fusion method for a batch."""

    logits_BN: Tensor
    routing_BLK: Tensor | None = None  # noise-free expert weights of each routed layer
    alone_BN: Tensor | None = None  # logits from the complementary side alone, trained together with the others (`either`)
    by_side: SideOutputs | None = None

    @property
    def logits(self) -> Tensor:
        """(B, N)."""
        return self.logits_BN

    @property
    def load_LK(self) -> Tensor | None:
        """Routing weights summed over the batch (L, K), which the importance loss balances."""
        return None if self.routing_BLK is None else self.routing_BLK.sum(dim=0)
