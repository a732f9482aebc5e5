"""What computes the logits of a decode step: PyTorch, or the native library on a CPU.

B rows, T tokens of each, V vocabulary rows. A plain step has T = 1. A step that verifies a draft has one row.
"""

from typing import Protocol

import torch
from torch import Tensor

from nvlm_kernels.native import NativeLibrary
from nvlm_runtime.engine.native import NativeDecoder
from nvlm_runtime.engine.slots import BatchSlots
from nvlm_runtime.model.decoder import CrossView
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import make_past


class LogitsBackend(Protocol):
    """Logits of the tokens that batch slots decode next."""

    def logits(
        self, slots: BatchSlots, tokens: Tensor, positions: Tensor, num_visible: int, sees_images: bool
    ) -> Tensor:
        """Writes the tokens' keys and values into the slots' caches and computes the logits.

        Args:
            slots: the B slots of the step. Nothing but their caches changes.
            tokens: int64 [B, T].
            positions: int64 [B, T], where the tokens stand, consecutive along a row.
            num_visible: how many cache positions are read, more than any active slot's `positions`.
            sees_images: whether a slot may see an image key.

        Returns:
            [B * T, V]: this rank's vocabulary rows. Those of an inactive slot mean nothing.
        """
        ...

    def refresh(self) -> None:
        """Takes changed weights into account. A runner calls it before it reads a prompt."""
        ...


class EagerLogits:
    """Logits computed in PyTorch."""

    def __init__(self, model: NVLMModel):
        self._decoder = model.language_model

    def logits(
        self, slots: BatchSlots, tokens: Tensor, positions: Tensor, num_visible: int, sees_images: bool
    ) -> Tensor:
        """As `LogitsBackend.logits`. The rounding of a product may differ with the number of its rows."""
        decoder = self._decoder
        view = None
        if sees_images:
            assert slots.cross is not None
            intervals = slots.interval * slots.active[:, None, None]  # an inactive slot sees no image
            view = CrossView(slots.cross, intervals.expand(-1, tokens.shape[1], -1))
        past = make_past(positions, decoder.attention, slots.cache, num_visible, slots.active)
        hidden = decoder(decoder.embed_tokens(tokens), positions, past, view)
        return decoder.local_logits(hidden.flatten(0, 1))

    def refresh(self) -> None:
        """Does nothing: PyTorch reads the weights themselves."""


class NativeLogits:
    """Logits computed by the native library on a CPU. Each token has the bits that it would have alone.

    Args:
        model: a model on a CPU in float32 or bfloat16, of one process.
        library: the native library.

    Raises:
        ValueError: The library cannot read the model's weights.
    """

    def __init__(self, model: NVLMModel, library: NativeLibrary):
        self._model, self._library = model, library
        self._version = model.version
        self._decoder = NativeDecoder(model.language_model, library)

    def logits(
        self, slots: BatchSlots, tokens: Tensor, positions: Tensor, num_visible: int, sees_images: bool
    ) -> Tensor:
        """As `LogitsBackend.logits`. T tokens of one slot run as T rows that share its cache."""
        num_tokens = tokens.shape[1]
        cache, cross, active, intervals = slots.cache, slots.cross, slots.active, slots.interval
        if num_tokens > 1:
            assert len(tokens) == 1, "several tokens are those of one slot"
            tokens, positions = tokens[0], positions[0]
            cache = cache.shared(0, num_tokens)
            cross = cross.shared(0, num_tokens) if cross is not None else None
            active, intervals = active.repeat(num_tokens), intervals.repeat(num_tokens, 1, 1)
        logits = torch.empty(len(active), self._decoder.vocab_size)
        self._decoder.step(tokens, positions, active, cache, cross, intervals if sees_images else None, logits)
        return logits

    def refresh(self) -> None:
        """Copies the small weights again if any weight has changed."""
        if self._model.version != self._version:
            self._version = self._model.version
            self._decoder = NativeDecoder(self._model.language_model, self._library)
