"""What a rank of a group holds of a model: which part of every weight, and the config its modules are built from.

A rank's decoder is a smaller decoder of the same width: its share of the heads (q, and the kv heads they read) and of
the feed-forward's inner columns. What ends a block is then a partial sum, and one all-reduce completes it (`group`).
All ranks hold norms, gates, biases after a `reduce` and residuals, and compute them alike. With more ranks than kv
heads, ranks share one, and `share_gradient` sums their gradients for it. Inner columns and vocabulary rows are cut into
equal runs. Where they do not divide, the last run is padded with zeros: such columns add nothing and have zero
gradients, and such rows are never sampled.

The vision encoder is split in one of two ways (`VisionSplit`):

    tiles    every rank holds the whole encoder and runs some of the tiles; the only collective is one gather. Best for
             inference: 7 tiles on 8 GPUs take the time of one tile.
    heads    every rank holds some of the heads. For training, and where an encoder of 12 GB does not fit on one rank.
             25 heads are padded with zero heads to a multiple of the ranks; they stay zero, as their gradients do.

Source: Megatron-LM (Shoeybi et al. 2019).
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, nn

from nvlm_runtime.config import NVLMConfig, TextConfig, VisionConfig
from nvlm_runtime.parallel.group import Group

if TYPE_CHECKING:  # the import takes a second
    from torch.distributed.tensor import DTensor

VisionSplit = Literal["tiles", "heads"]
MAX_RANKS = 64  # that `group_sizes` lists


@dataclass(frozen=True)
class TextShard(TextConfig):
    """One rank's share of a decoder. Heads, kv heads, inner columns and vocabulary rows are the rank's own.

    Attributes:
        whole: the decoder it was cut from.
        first_kv_head: the index, in the whole decoder, of this rank's first kv head.
        first_id: the token id of this rank's first vocabulary row.
    """

    whole: TextConfig = field(kw_only=True)
    first_kv_head: int = field(kw_only=True)
    first_id: int = field(kw_only=True)

    @property
    def head_dim(self) -> int:
        """Numbers per attention head."""
        return self.whole.head_dim


@dataclass(frozen=True)
class VisionShard(VisionConfig):
    """One rank's share of a vision encoder that is split by heads; the last heads may be zero heads.

    Attributes:
        whole: the vision encoder it was cut from.
    """

    whole: VisionConfig = field(kw_only=True)

    @property
    def head_dim(self) -> int:
        """Numbers per attention head."""
        return self.whole.head_dim


@dataclass(frozen=True)
class ModelShard(NVLMConfig):
    """One rank's share of a model; its text, and its vision where that is split by heads, are shards."""

    def __post_init__(self) -> None:
        pass  # the whole model's config was checked


def _copy(config: Any, kind: type, **changes: Any) -> Any:
    return kind(**{field.name: getattr(config, field.name) for field in fields(config)} | changes)


def group_sizes(config: NVLMConfig) -> list[int]:
    """Lists the sizes of groups that the model can be split over.

    Args:
        config: the whole model's configuration.

    Returns:
        Numbers of ranks up to `MAX_RANKS`, ascending, 1 included.
    """
    return [size for size in range(1, MAX_RANKS + 1) if _splits(config, size)]


def _splits(config: NVLMConfig, size: int) -> bool:
    heads, kv_heads = config.text.num_attention_heads, config.text.num_key_value_heads
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def shard_config(config: NVLMConfig, group: Group, vision_split: VisionSplit = "tiles") -> NVLMConfig:
    """Returns what one rank's modules are built from: the config itself in a group of 1.

    Args:
        config: of the whole model.
        group: the ranks that hold it together, of which this is one.
        vision_split: how they split the vision encoder, "tiles" or "heads".

    Raises:
        ValueError: the heads cannot be split evenly; the message lists the group sizes that can.
    """
    if vision_split not in ("tiles", "heads"):
        raise ValueError(f"vision_split must be 'tiles' or 'heads', got {vision_split!r}")
    if group.size == 1:
        return config
    text, vision, size = config.text, config.vision, group.size
    if not _splits(config, size):
        raise ValueError(
            f"{size} ranks cannot share {text.num_attention_heads} heads and {text.num_key_value_heads} kv heads "
            f"evenly: this model can be split over {', '.join(map(str, group_sizes(config)))}"
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


def held_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Finds the rows of a tensor that this rank holds.

    FSDP gives every rank an equal run of rows; the last runs may be shorter or empty. Any other tensor is held whole.

    Args:
        tensor: a tensor, or a DTensor cut along its first dimension.

    Returns:
        The rows that are held, and the index of the first of them.
    """
    if not hasattr(tensor, "to_local"):
        return tensor, 0
    shared = cast("DTensor", tensor)
    mesh, num = shared.device_mesh, len(shared)
    return shared.to_local(), min(mesh.get_local_rank() * -(-num // mesh.size()), num)


class VocabularyEmbedding(nn.Embedding):
    """Token ids to vectors. In a group every rank looks up the ids of its own rows, and one all-reduce adds them up.

    Args:
        config: the decoder, or a rank's share of one.
        group: the ranks that hold it together.
    """

    def __init__(self, config: TextConfig, group: Group):
        super().__init__(config.vocab_size, config.hidden_size)
        self.group = group
        self.first_id = config.first_id if isinstance(config, TextShard) else 0

    def forward(self, ids: Tensor) -> Tensor:
        """Looks up embeddings, summed over the ranks.

        Args:
            ids: token ids of the whole vocabulary, int64 of any shape.

        Returns:
            Embeddings [*, C], the same on every rank.
        """
        if self.group.size == 1:
            return super().forward(ids)
        ids = ids - self.first_id
        here = (ids >= 0) & (ids < self.num_embeddings)
        rows = super().forward(ids.clamp(0, self.num_embeddings - 1))
        return self.group.reduce(rows.masked_fill(~here[..., None], 0))
