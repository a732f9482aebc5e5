"""The ranks that hold one model together, and the collectives between them.

A block of a decoder that is split over ranks runs so (`shard` says which part of every weight a rank holds):

    x -> spread -> column-parallel (qkv, gate and up) -> ... -> row-parallel (o, down) -> reduce -> residual

`reduce` sums over the ranks and passes gradients as they are. `spread` passes activations as they are and sums
gradients. Between the two every rank has a part; outside them all ranks have the same.

Source: Megatron-LM (Shoeybi et al. 2019), whose f and g are `spread` and `reduce`; transport is torch.distributed.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "Group") -> Tensor:
        return group.all_reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "Group") -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "Group", dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.size = group, dim, x.shape[dim]
        return torch.cat(group.all_gather(x), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(ctx.dim, ctx.group.rank * ctx.size, ctx.size), None, None


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: "Group", part: int, num: int) -> Tensor:
        ctx.group, ctx.part, ctx.num = group, part, num
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        whole = grad.new_zeros(ctx.num, *grad.shape)
        whole[ctx.part] = grad
        return ctx.group.all_reduce(whole)[ctx.part], None, None, None


@dataclass(frozen=True)
class Group:
    """The ranks that hold one model. A group of size 1, the default, does nothing in any collective.

    Attributes:
        rank: of this process, from 0.
        size: number of ranks.
        handle: the torch.distributed group. None where size is 1, and for a pretended rank, whose shapes are needed on
            the meta device: its collectives move nothing.

    Raises:
        ValueError: the rank is not in 0 .. size - 1.
    """

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"the rank must be from 0 to {self.size - 1} (a group of {self.size}), got {self.rank}")

    def reduce(self, x: Tensor) -> Tensor:
        """Sums a tensor over the ranks. Gradients pass unchanged.

        Args:
            x: of one shape on all ranks, any dtype. Without a gradient it is overwritten.

        Returns:
            The sum, of x's shape.
        """
        if self.size == 1:
            return x
        return _Reduce.apply(x, self) if x.requires_grad else self.all_reduce(x.contiguous())

    def spread(self, x: Tensor) -> Tensor:
        """Passes a tensor on; its gradient is the sum of all ranks' gradients.

        Args:
            x: equal on all ranks.

        Returns:
            x.
        """
        return x if self.size == 1 or not x.requires_grad else _Spread.apply(x, self)

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Concatenates the ranks' tensors. A rank's gradient is its part.

        Args:
            x: of one shape on all ranks.
            dim: the dimension to concatenate along, the last by default.

        Returns:
            A tensor `size` times as long along `dim`, in the order of the ranks.
        """
        if self.size == 1:
            return x
        return _Gather.apply(x, self, dim) if x.requires_grad else torch.cat(self.all_gather(x), dim)

    def share_gradient(self, rows: Tensor, part: int, num: int) -> Tensor:
        """Returns rows of a weight that several ranks hold; their gradient is the sum of those ranks' gradients.

        Args:
            rows: this rank's rows of the weight.
            part: which of the weight's `num` parts they are.
            num: number of parts, of one shape. The gradients are shared only where there are more ranks than parts.
        """
        if self.size <= num or not (rows.requires_grad and torch.is_grad_enabled()):
            return rows
        return _ShareGradient.apply(rows, self, part, num)

    def largest(self, x: Tensor) -> Tensor:
        """Takes the elementwise maximum over the ranks, without a gradient.

        Args:
            x: of one shape on all ranks.

        Returns:
            The maximum, of x's shape.
        """
        return x if self.size == 1 else torch.stack(self.all_gather(x.detach())).amax(0)

    def collect(self, x: Tensor) -> Tensor:
        """Merges the ranks' parts of x on rank 0, bit for bit; elsewhere the result is undefined.

        Args:
            x: contiguous; every element is zero on all ranks but one.
        """
        if self.handle is not None:
            dist.reduce(x.view(torch.uint8), group=self.handle, group_dst=0)
        return x

    def wait(self) -> None:
        """Returns when all ranks have called it."""
        if self.handle is not None:
            dist.barrier(self.handle)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place and without a gradient.

        Args:
            x: contiguous, of one shape on all ranks.

        Returns:
            x itself.
        """
        if self.handle is not None:
            dist.all_reduce(x, group=self.handle)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Collects the ranks' tensors, without a gradient.

        Args:
            x: of one shape on all ranks.

        Returns:
            One tensor per rank, in their order.
        """
        if self.handle is None:
            return [x] * self.size
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.handle)
        return parts

    def agree(self, value: Any) -> Any:
        """Sends rank 0's value to every rank.

        Args:
            value: small and picklable. Only rank 0's is used.

        Returns:
            Rank 0's value.
        """
        if self.handle is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.handle, group_src=0)
        return values[0]

    def check_same(self, what: str, value: Any) -> None:
        """Checks that all ranks have the same value, small and picklable.

        Args:
            what: names the value in the message.
            value: this rank's.

        Raises:
            ValueError: on every rank, where the ranks' values differ.
        """
        if self.handle is None:
            return
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.handle)
        if other := [rank for rank in range(self.size) if values[rank] != values[0]]:
            raise ValueError(f"{what} of rank {other[0]} is not rank 0's: every rank needs the same")


SOLO = Group()


@dataclass(frozen=True)
class Mesh:
    """The ranks of a training run.

    Attributes:
        tensor: the ranks that hold one model together (tensor parallelism).
        data: the ranks that would hold the same part of the model. Each keeps a share of its rows (FSDP) and learns
            from documents of its own.
        world: all ranks.
    """

    tensor: Group = SOLO
    data: Group = SOLO
    world: Group = SOLO
