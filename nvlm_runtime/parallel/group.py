"""Tensor parallelism: which part of every weight a rank holds, and the collectives between the parts.

A rank's decoder is a smaller decoder of the same width: its share of the heads (q, and the kv heads they read) and of
the feed-forward's inner columns. What ends a block is then a partial sum, and one all-reduce completes it:

    x -> spread -> column-parallel (qkv, gate and up) -> ... -> row-parallel (o, down) -> reduce -> residual

`reduce` sums over the ranks and passes gradients as they are; `spread` passes activations as they are and sums
gradients: between the two every rank has a part, outside them all have the same. Norms, gates, biases behind a `reduce`
and residuals are held by all and computed alike. With more ranks than kv heads, ranks share one, and `share_gradient`
sums what each found for it. Inner columns and vocabulary rows are cut into equal runs, the last one's end padded with
zeros where they do not divide: such columns give nothing and their gradients are zero, such rows are never drawn.

The vision encoder is held whole, and ranks take tiles (`tiles`: no collective but one gather; right for inference,
where 7 tiles on 8 GPUs cost one tile's time), or is cut by heads (`heads`: one rank's memory holds its share; right
where the vision encoder's 12 GB do not fit, or it trains). 25 heads are padded with zero heads to a multiple of the
ranks; they stay zero, as their gradients are.

Source: Megatron-LM (Shoeybi et al. 2019), whose f and g are `spread` and `reduce`; transport is torch.distributed.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nvlm_runtime.config import NVLMConfig, TextConfig, VisionConfig

VisionSplit = Literal["tiles", "heads"]


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
    def forward(ctx: Any, rows: Tensor, group: "Group", at: int, num: int) -> Tensor:
        ctx.group, ctx.at, ctx.num = group, at, num
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        whole = grad.new_zeros(ctx.num, *grad.shape)
        whole[ctx.at] = grad
        return ctx.group.all_reduce(whole)[ctx.at], None, None, None


@dataclass(frozen=True)
class Group:
    """The ranks that hold one model. Size 1, the default, does nothing anywhere.

    handle: the torch.distributed group; a rank without one is pretended, for shapes on the meta device, and its
    collectives move nothing.
    """

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None

    def __post_init__(self):
        if not 0 <= self.rank < self.size:
            raise ValueError(f"the rank must be from 0 to {self.size - 1} (a group of {self.size}), got {self.rank}")

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x. Gradients pass as they are. Without gradients x is written over."""
        if self.size == 1:
            return x
        return _Reduce.apply(x, self) if x.requires_grad else self.all_reduce(x.contiguous())

    def spread(self, x: Tensor) -> Tensor:
        """x, whose gradient is the sum of all ranks'."""
        return x if self.size == 1 or not x.requires_grad else _Spread.apply(x, self)

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """All ranks' x, of one shape, beside each other along `dim`. A rank's gradient is its part."""
        if self.size == 1:
            return x
        return _Gather.apply(x, self, dim) if x.requires_grad else torch.cat(self.all_gather(x), dim)

    def share_gradient(self, rows: Tensor, at: int, num: int) -> Tensor:
        """Weight rows that are part `at` of `num`, held by several ranks: the gradient is the sum of theirs."""
        if self.size <= num or not (rows.requires_grad and torch.is_grad_enabled()):
            return rows
        return _ShareGradient.apply(rows, self, at, num)

    def largest(self, x: Tensor) -> Tensor:
        """The largest of the ranks' x, element by element, without a gradient."""
        return x if self.size == 1 else torch.stack(self.all_gather(x.detach())).amax(0)

    def collect(self, x: Tensor) -> Tensor:
        """On rank 0 all ranks' parts of x, bit for bit, each zero where another's is not. Elsewhere nothing of use."""
        if self.handle is not None:
            dist.reduce(x.view(torch.uint8), group=self.handle, group_dst=0)
        return x

    def wait(self) -> None:
        """Returns when all ranks are here."""
        if self.handle is not None:
            dist.barrier(self.handle)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums over the ranks, in place."""
        if self.handle is not None:
            dist.all_reduce(x, group=self.handle)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, all of one shape."""
        if self.handle is None:
            return [x] * self.size
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.handle)
        return parts

    def agree(self, value: Any) -> Any:
        """Rank 0's value, small and picklable, on every rank."""
        if self.handle is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.handle, group_src=0)
        return values[0]

    def check_same(self, what: str, value: Any) -> None:
        """ValueError on every rank where the ranks' values differ."""
        if self.handle is None:
            return
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.handle)
        if other := [rank for rank in range(self.size) if values[rank] != values[0]]:
            raise ValueError(f"{what} of rank {other[0]} is not rank 0's: every rank needs the same")


SOLO = Group()


@dataclass(frozen=True)
class Mesh:
    """The ranks of a training run. tensor: those that hold one model together. data: those that would hold the same
    part of it, keep a share of its rows each (FSDP) and learn from documents of their own. world: all of them.
    """

    tensor: Group = SOLO
    data: Group = SOLO
    world: Group = SOLO


def held_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, and the first row of it: FSDP shares rows out in equal runs, the last ones
    shorter or empty. Any other tensor is held whole.
    """
    if not hasattr(tensor, "to_local"):
        return tensor, 0
    mesh, num = tensor.device_mesh, len(tensor)
    return tensor.to_local(), min(mesh.get_local_rank() * -(-num // mesh.size()), num)


@dataclass(frozen=True)
class TextShard(TextConfig):
    """One rank's share of a decoder: heads, kv heads, inner columns and vocabulary rows of its own.

    first_kv_head: which kv head of all comes first here. first_id: the id of its first vocabulary row.
    """

    whole: TextConfig | None = None
    first_kv_head: int = 0
    first_id: int = 0

    @property
    def head_dim(self) -> int:
        return self.whole.head_dim


@dataclass(frozen=True)
class VisionShard(VisionConfig):
    """One rank's share of a vision encoder cut by heads, the last of which may be zero heads."""

    whole: VisionConfig | None = None

    @property
    def head_dim(self) -> int:
        return self.whole.head_dim


@dataclass(frozen=True)
class ModelShard(NVLMConfig):
    """One rank's share of a model, whose text and vision may be shards."""

    def __post_init__(self):
        pass  # what it was cut from was checked


def _copy(config: Any, kind: type, **changes: Any) -> Any:
    return kind(**{field.name: getattr(config, field.name) for field in fields(config)} | changes)


def sizes(config: NVLMConfig) -> list[int]:
    """Every number of ranks, up to 64, that the model can be split over."""
    return [size for size in range(1, 65) if _splits(config, size)]


def _splits(config: NVLMConfig, size: int) -> bool:
    heads, kv_heads = config.text.num_attention_heads, config.text.num_key_value_heads
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def shard_config(config: NVLMConfig, group: Group, vision_split: VisionSplit = "tiles") -> NVLMConfig:
    """What one rank's modules are built from; the config itself in a group of 1.

    Raises ValueError, with the sizes that can, where the heads cannot be shared out evenly.
    """
    if vision_split not in ("tiles", "heads"):
        raise ValueError(f"vision_split must be 'tiles' or 'heads', got {vision_split!r}")
    if group.size == 1:
        return config
    text, vision, size = config.text, config.vision, group.size
    if not _splits(config, size):
        raise ValueError(
            f"{size} ranks cannot share {text.num_attention_heads} heads and {text.num_key_value_heads} kv heads "
            f"evenly: this model can be split over {', '.join(map(str, sizes(config)))}"
        )
    kv_heads, rows = text.num_key_value_heads, -(-text.vocab_size // size)
    part = _copy(
        text,
        TextShard,
        num_attention_heads=text.num_attention_heads // size,
        num_key_value_heads=max(1, kv_heads // size),
        intermediate_size=-(-text.intermediate_size // size),
        vocab_size=rows,
        whole=text,
        first_kv_head=group.rank * kv_heads // size,
        first_id=group.rank * rows,
    )
    if vision_split == "heads":
        vision = _copy(
            vision,
            VisionShard,
            num_attention_heads=-(-vision.num_attention_heads // size),
            intermediate_size=-(-vision.intermediate_size // size),
            whole=vision,
        )
    return _copy(config, ModelShard, text=part, vision=vision)


class VocabularyEmbedding(nn.Embedding):
    """Ids to vectors, by all ranks together: each looks up the ids of its rows, and a sum brings them together."""

    def __init__(self, config: TextConfig, group: Group):
        super().__init__(config.vocab_size, config.hidden_size)
        self.group = group
        self.first_id = config.first_id if isinstance(config, TextShard) else 0

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 of any shape. Returns [*, C]."""
        if self.group.size == 1:
            return super().forward(ids)
        ids = ids - self.first_id
        here = (ids >= 0) & (ids < self.num_embeddings)
        rows = super().forward(ids.clamp(0, self.num_embeddings - 1))
        return self.group.reduce(rows.masked_fill(~here[..., None], 0))
