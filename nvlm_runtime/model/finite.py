"""Where a value that is not finite begins: for weights that are wrong, or a dtype too narrow for them."""

from typing import Any

from torch import Tensor, nn

from nvlm_runtime.model.decoder import DecoderLayer
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.vision import Block


def check_layers(model: NVLMModel) -> None:
    """From now on every block of the vision encoder and the decoder, the embeddings and the head look at what they
    give.

    The first that gives inf or nan raises ValueError with its name and that of the last one that was whole. It waits
    for the device after each block, and no stage can be captured.
    """
    last = "the input"

    def hook(name: str) -> Any:
        def look(module: nn.Module, given: Any, out: Tensor | tuple[Tensor, ...]) -> None:
            nonlocal last
            if isinstance(module, Block):
                out = out[0]  # the statistics are of it
            tensors = (out,) if isinstance(out, Tensor) else out
            wrong = sum(int((~tensor.isfinite()).sum()) for tensor in tensors)
            if wrong:
                total = sum(tensor.numel() for tensor in tensors)
                dtype = tensors[0].dtype
                raise ValueError(f"{name} gave {wrong} of {total} values in {dtype} that are not finite, after {last}")
            last = f"{name}, which was whole"

        return look

    for name, module in model.named_modules():
        if isinstance(module, Block | DecoderLayer | nn.Embedding) or name.endswith(
            ("embeddings", "language_model.lm_head")
        ):
            module.register_forward_hook(hook(name))
