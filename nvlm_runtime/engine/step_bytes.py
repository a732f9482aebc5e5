"""What a decoding step has to read, which on most machines is what it costs."""

from dataclasses import dataclass

from nvlm_runtime.engine.slots import cache_bytes
from nvlm_runtime.model.model import NVLMModel


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a step reads once, whatever its rows: `weights` of the layers, the last norm and the head, and `cross`
    of the gated layers where a row sees an image. Of each row the keys and values: `token` of a position, `image_key`
    of an image key in all gated layers.
    """

    weights: int
    cross: int
    token: int
    image_key: int

    def total(self, context: int, image_keys: int = 0, rows: int = 1) -> int:
        """Of a step whose rows stand behind `context` tokens each and see `image_keys`."""
        cross = self.cross if image_keys else 0
        return self.weights + cross + rows * (context * self.token + image_keys * self.image_key)


def step_bytes(model: NVLMModel) -> StepBytes:
    """Of a model, or of what a rank holds of it, as it is: quantised weights count the bytes they are kept in."""
    decoder = model.language_model
    tensors = {
        f"{part}.{name}": tensor
        for part in ("layers", "norm", "lm_head")
        for name, tensor in (*getattr(decoder, part).named_parameters(), *getattr(decoder, part).named_buffers())
    }
    once = [name for name in tensors if ".cross_attn.k_proj." in name or ".cross_attn.v_proj." in name]  # an image
    cross = sum(tensor.nbytes for name, tensor in tensors.items() if ".cross_attn." in name and name not in once)
    weights = sum(tensor.nbytes for name, tensor in tensors.items() if ".cross_attn." not in name)
    dtype = decoder.embed_tokens.weight.dtype
    token, image_key = (cache_bytes(model.shard, 1, *size, dtype) for size in ((1, 0), (0, 1)))
    return StepBytes(weights, cross, token, image_key)
