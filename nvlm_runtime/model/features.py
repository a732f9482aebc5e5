"""What the vision encoder hands to the projector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Of N tiles. patches: [N, 4P, C]. statistics: [N, 4P, 2] fp32, `nvlm_kernels.row_statistics` of the patches, where
    the vision encoder had them at hand.
    """

    patches: Tensor
    statistics: Tensor | None = None

    def split(self, sizes: int | Sequence[int]) -> list["Features"]:
        """By tiles."""
        patches = self.patches.split(sizes)
        statistics = [None] * len(patches) if self.statistics is None else self.statistics.split(sizes)
        return list(map(Features, patches, statistics))

    @staticmethod
    def cat(parts: Sequence["Features"]) -> "Features":
        """parts: at least one, with statistics all or none."""
        if len(parts) == 1:
            return parts[0]
        statistics = [part.statistics for part in parts if part.statistics is not None]
        return Features(torch.cat([part.patches for part in parts]), torch.cat(statistics) if statistics else None)
