"""A linear with low-rank adapters beside its weight: LoRA (arXiv 2106.09685).

    y = W x + b,   y[rows of part p] += scale * B_p A_p dropout(x)      scale = alpha / r, or alpha / sqrt(r) (rsLoRA)

K in features, L out features, r rank. A weight that is several of the checkpoint's joined (q, k, v; gate, up) has an
adapter for each, on that one's rows alone: three adapters on q, k and v are not one adapter on their joint weight,
whose A would be shared. The base weight keeps its name and is frozen; adapters are in float32 at least, whatever the
base is in.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = tuple[int, int]


@dataclass(frozen=True)
class LoraConfig:
    """dropout: of the adapters' input, while training. rslora: scale by sqrt(rank) (arXiv 2312.03732)."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"lora: the rank must be a whole number from 1, got {self.rank!r}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"lora: alpha must be above 0, got {self.alpha!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout must be from 0 to below 1, got {self.dropout!r}")
        if not isinstance(self.rslora, bool):
            raise ValueError(f"lora: rslora must be true or false, got {self.rslora!r}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class AdaptedLinear(nn.Linear):
    """linear: whose weight and bias it holds. parts: name of each adapter to the rows [start, end) it stands on.

    `lora_A[part]` is [r, K], drawn as PEFT draws it; `lora_B[part]` is [its rows, r], zero: a new adapter changes
    nothing.
    """

    def __init__(
        self, linear: nn.Linear, parts: dict[str, Rows], config: LoraConfig, generator: torch.Generator | None = None
    ):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.parts = dict(sorted(parts.items(), key=lambda part: part[1]))
        self.config = config
        wide = {"dtype": torch.promote_types(self.weight.dtype, torch.float32), "device": self.weight.device}
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, (start, end) in self.parts.items():
            drawn = torch.empty(config.rank, self.in_features)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)  # on the CPU: a seed's own everywhere
            self.lora_A[name] = nn.Parameter(drawn.to(**wide))
            self.lora_B[name] = nn.Parameter(torch.zeros(end - start, config.rank, **wide))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, K]. Returns [*, L] in x's dtype."""
        y = F.linear(x, self.weight, self.bias)
        narrow = F.dropout(x, self.config.dropout, self.training).to(next(iter(self.lora_A.values())).dtype)
        pieces, at = [], 0
        for name, (start, end) in self.parts.items():
            branch = F.linear(F.linear(narrow, self.lora_A[name]), self.lora_B[name])
            pieces += [y[..., at:start], y[..., start:end] + (self.config.scale * branch).to(y.dtype)]
            at = end
        return torch.cat([*pieces, y[..., at:]], -1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """An ordinary linear with the adapters in its weight, which is changed in place and rounded once."""
        for name, (start, end) in self.parts.items():
            delta = self.config.scale * (self.lora_B[name] @ self.lora_A[name])
            self.weight[start:end] = (self.weight[start:end].to(delta.dtype) + delta).to(self.weight.dtype)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)
