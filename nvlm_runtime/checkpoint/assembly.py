"""A new NVLM from a text model and a vision encoder: what `nvlm init` does.

The text model's weights stay bit for bit what they are. New are the projector, the gated cross-attention and, where the
vision encoder is a random one, the vision encoder, all drawn from one seed: linears of unit variance, the ends of
residual branches smaller by sqrt(2 layers), image tokens as large as the text's embeddings. Gates are 0: on text, and
in NVLM-X beside any picture, the model is the text model, bit for bit. Special tokens that NVLM needs and the
vocabulary has not get ids behind its last. Where the embedding has no row for such an id it gets the mean of all
others, in the head too: then no such token can be the likeliest, so greedy answers stay. A row the text model has is
kept, used by it or not.
Sources: NVLM paper sections 4.2 to 4.5 (parts, gates, tokens); Flamingo (arXiv 2204.14198) for gates at 0.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nvlm_runtime.checkpoint.sources import TextSource, VisionSource, open_text_model, open_vision_encoder
from nvlm_runtime.checkpoint.tensors import Entry, file_entries, fill
from nvlm_runtime.checkpoint.weights import save, some
from nvlm_runtime.config import VARIANTS, CrossConfig, NVLMConfig
from nvlm_runtime.inputs.template import ChatTemplate
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.model.model import NVLMModel, allocate, outline
from nvlm_runtime.model.vision import RMSNorm

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|vision_pad|>")
GATED_LAYERS = 10  # as many as the paper has, where the caller does not say
BRANCH_ENDS = ("o_proj", "down_proj", "proj", "fc2")
POSITION_STD = 0.5  # beside patches of unit variance
GELU_SQUARE = 0.4252  # of a standard normal: the mean of gelu(z) ** 2


@dataclass(frozen=True)
class Assembly:
    """A whole new model. added: special tokens the vocabulary did not have, to their ids. num_new_rows: of the
    embedding, behind the text model's own.
    """

    model: NVLMModel
    tokenizer: Tokenizer
    template: ChatTemplate | None
    added: dict[str, int]
    num_new_rows: int

    def save(self, folder: Path) -> None:
        """Writes the checkpoint whole or not at all.

        Args:
            folder: a new or empty folder.

        Raises:
            ValueError: `folder` exists and is not empty.
        """
        with new_folder(folder) as partial:
            self.tokenizer.save(partial)
            if self.template is not None:
                self.template.save(partial)
            save(self.model, partial)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write to, which becomes `folder` at the end, or is deleted where the block raises.

    Args:
        folder: a new or empty folder. The one that is yielded stands beside it.

    Yields:
        The folder to write to.

    Raises:
        ValueError: `folder` exists and is not empty.
    """
    check_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_empty(folder: Path) -> None:
    """Checks that a folder is new or empty.

    Args:
        folder: the folder.

    Raises:
        ValueError: it is a file, or holds anything.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty: give a new folder")


def gated_layers(num_layers: int, every: int | None = None) -> tuple[int, ...]:
    """Chooses the layers that get cross-attention: every so many from layer 0.

    Args:
        num_layers: layers of the decoder.
        every: distance between two of them; None makes about ten of them.

    Returns:
        Indices of layers, ascending.

    Raises:
        ValueError: `every` is below 1 or above `num_layers`.
    """
    if every is None:
        every = max(1, num_layers // GATED_LAYERS)
    if not 1 <= every <= num_layers:
        raise ValueError(f"cross-attention can stand in one layer of 1 to {num_layers}, got one of {every}")
    return tuple(range(0, num_layers, every))


def assemble(
    variant: str,
    text: str | Path,
    vision: str | Path,
    *,
    seed: int = 0,
    every: int | None = None,
    layers: Sequence[int] | None = None,
    placement: Literal["inside", "before"] = "inside",
    ffn: Literal["none", "swiglu", "gelu4x"] = "none",
    positions: Literal["none", "sinusoidal"] = "sinusoidal",
    dtype: torch.dtype | None = None,
    max_tiles: int = 6,
) -> Assembly:
    """Makes a new model from a text model and a vision encoder; projector and cross-attention are drawn at random.

    Args:
        variant: "d", "x" or "h".
        text: as `open_text_model` takes it.
        vision: as `open_vision_encoder` takes it.
        seed: of the new weights, 0 by default.
        every: NVLM-X and -H get cross-attention in one layer of so many.
        layers: the layers that get it. With neither `every` nor `layers`, `gated_layers` chooses.
        placement: of `CrossConfig`.
        ffn: of `CrossConfig`.
        positions: of `CrossConfig`.
        dtype: of all weights; None is the text model's own, float32 where it was quantised.
        max_tiles: the most regular tiles of an image, 6 by default.

    Returns:
        The model in eval mode, its tokenizer and its template.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: weights are damaged, missing, unexpected or wrongly shaped, or an option is invalid. Both are raised
            before memory is allocated.
    """
    if variant not in VARIANTS:
        raise ValueError(f"the variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if every is not None and layers is not None:
        raise ValueError("give every how many layers, or the layers, not both")
    with ExitStack() as stack:
        text_source, vision_source = open_text_model(text, stack), open_vision_encoder(vision, stack)
        tokenizer, added = _vocabulary(text_source)
        rows = max(text_source.config.vocab_size, tokenizer.vocab_size)
        if layers is None:
            layers = gated_layers(text_source.config.num_hidden_layers, every)
        config = NVLMConfig(
            variant=variant,
            vision=vision_source.config,
            text=replace(text_source.config, vocab_size=rows),
            cross=None if variant == "d" else CrossConfig(tuple(layers), placement, ffn, positions),
            ps_version=vision_source.ps_version,
            max_tiles=max_tiles,
            bos_token=text_source.bos_token,
        )
        model = outline(config)
        entries = file_entries(model)
        _check(text_source, vision_source, entries)
        allocate(model, dtype or text_source.dtype, "cpu")
        if config.text.tie_word_embeddings:
            model.language_model.tie()
        with torch.no_grad():
            _fill(model, entries, text_source, vision_source)
            _draw(model, torch.Generator().manual_seed(seed), is_vision_new=vision_source.tensors is None)
    return Assembly(model.eval(), tokenizer, text_source.template, added, rows - text_source.config.vocab_size)


def _vocabulary(text_source: TextSource) -> tuple[Tokenizer, dict[str, int]]:
    """The tokenizer with all of `SPECIALS`, and those that were not there."""
    tokenizer, rows = text_source.tokenizer, text_source.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{text_source.name}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only {rows} rows"
        )
    names = tokenizer.missing([*SPECIALS, *([text_source.bos_token] if text_source.bos_token else [])])
    if text_source.bos_token in names:
        raise ValueError(
            f"{text_source.name}: bos_token {text_source.bos_token!r} is no special token of the tokenizer"
        )
    tokenizer = tokenizer.with_specials(names)
    return tokenizer, {name: tokenizer.special(name) for name in names}


def is_of_text_model(name: str) -> bool:
    """Returns whether a tensor of a checkpoint is the text model's own.

    Args:
        name: the tensor's name in the file.
    """
    return name.startswith("language_model.") and ".cross_attn." not in name


def _text_name(name: str) -> str | None:
    """The text model's own name of a tensor of the checkpoint, None where it is none of its."""
    return name.removeprefix("language_model.") if is_of_text_model(name) else None


def _check(text_source: TextSource, vision_source: VisionSource, entries: Mapping[str, Entry]) -> None:
    """Every name and shape, the embedding's rows but for."""
    wanted = {text: entry.shape for name, entry in entries.items() if (text := _text_name(name)) is not None}
    sides = [(text_source.name, text_source.shapes, wanted)]
    if vision_source.tensors is not None:
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in vision_source.tensors.items()}
        wanted = {name: entry.shape for name, entry in entries.items() if name.startswith("vision_model.")}
        sides.append((vision_source.name, shapes, wanted))
    for source, given, wanted in sides:
        if missing := set(wanted) - set(given):
            raise ValueError(f"{source} misses {len(missing)} tensors: {some(missing)}")
        if unexpected := set(given) - set(wanted):
            raise ValueError(f"{source} holds {len(unexpected)} unexpected tensors: {some(unexpected)}")
        for name, shape in wanted.items():
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                shape = (text_source.config.vocab_size, *shape[1:])
            if given[name] != shape:
                raise ValueError(f"{source}: {name} has shape {list(given[name])}, expected {list(shape)}")


def _fill(model: NVLMModel, entries: Mapping[str, Entry], text_source: TextSource, vision_source: VisionSource) -> None:
    parameters = dict(model.named_parameters())
    for name, entry in entries.items():
        parameter, text = parameters[entry.parameter], _text_name(name)
        if text in ("model.embed_tokens.weight", "lm_head.weight"):
            stored = text_source.read(text)
            parameter[: len(stored)] = stored
            parameter[len(stored) :] = stored.float().mean(0)
        elif text is not None:
            fill(parameter, entry, text_source.read(text), name, is_checked=True)
        elif vision_source.tensors is not None and name.startswith("vision_model."):
            fill(parameter, entry, vision_source.tensors[name], name, is_checked=True)


def _draw(model: NVLMModel, generator: torch.Generator, is_vision_new: bool) -> None:
    """Draws all that is new, module by module in the order of their names."""
    decoder, vision = model.language_model, model.vision_model
    _draw_part(model.mlp1, 0, generator)
    # the norm before it gives unit variance, a GELU between the two takes some away
    scale = decoder.embed_tokens.weight.float().std() / (math.sqrt(GELU_SQUARE) if len(model.mlp1) > 2 else 1)
    model.mlp1[-1].weight.mul_(scale)
    for i in decoder.cross_layers:
        cross = decoder.layers[i].cross_attn
        _draw_part(cross, len(decoder.layers), generator)
        for name, parameter in cross.named_parameters():
            if name in ("gate", "ffn_gate"):
                parameter.zero_()
    if not is_vision_new:
        return
    _draw_part(vision.encoder, len(vision.encoder.layers), generator)
    for block in vision.encoder.layers:
        block.ls1.fill_(1)
        block.ls2.fill_(1)
    patch = vision.embeddings.patch_embedding
    _normal(patch.weight, patch.weight[0].numel() ** -0.5, generator)
    patch.bias.zero_()
    for parameter in (vision.embeddings.class_embedding, vision.embeddings.position_embedding):
        _normal(parameter, POSITION_STD, generator)


def _draw_part(part: nn.Module, num_layers: int, generator: torch.Generator) -> None:
    """Linears and norms. num_layers: on whose residual stream the part's branches end."""
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear):
            branches = 2 * num_layers if name.rpartition(".")[2] in BRANCH_ENDS else 1
            _normal(module.weight, (branches * module.in_features) ** -0.5, generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm | RMSNorm):
            module.weight.fill_(1)
            if isinstance(module, nn.LayerNorm):
                module.bias.zero_()


def _normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """In float32, whatever the parameter is in: a seed gives the same weights in every dtype but for rounding."""
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
