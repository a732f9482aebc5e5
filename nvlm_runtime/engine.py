"""The engine: a prompt and pictures to text, one request or a batch, whole or streamed.

The prefix and the images are computed once; a step costs one token through the decoder, whatever was generated
before it, but for attention itself. Rows of a batch are padded on the right, so slot s of the cache is position s.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvlm_runtime.attention import Attention, check_attention
from nvlm_runtime.cache import KVCache
from nvlm_runtime.decoder import CrossView
from nvlm_runtime.image import open_image, plan_tiles, tile_pixels
from nvlm_runtime.layout import make_layout
from nvlm_runtime.model import NVLMModel
from nvlm_runtime.presets import PRESETS
from nvlm_runtime.prompt import build_prompt, find_blocks, tag_ids
from nvlm_runtime.request import Output, Prepared, Row, check_ids
from nvlm_runtime.sampling import GenerationParams, Sampler
from nvlm_runtime.tokenizer import TextStream, Tokenizer
from nvlm_runtime.weights import DTYPES, load, read_json

BUNDLED = Path(__file__).parent / "models"


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a bundled model or of a path. ValueError or FileNotFoundError saying what was expected."""
    bundled = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
    if str(name) in bundled:
        return BUNDLED / str(name)
    if not isinstance(name, str | Path):
        raise ValueError(f"a model is a name or a folder, got {type(name).__name__}")
    if Path(name).is_dir():
        return Path(name)
    if str(name) in PRESETS:
        raise ValueError(f"{name} has no weights in this package: give the folder of its checkpoint")
    raise ValueError(f"unknown model {str(name)!r}: expected a checkpoint folder or one of {', '.join(bundled)}")


def check_device(device: torch.device | str) -> None:
    """ValueError where tensors cannot be made on this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} is not to be had here: {str(error).splitlines()[0]}") from error


class Stream:
    """Pieces of an answer as they become certain; `output` is the whole answer so far, final when it is exhausted."""

    def __init__(self, pieces: Iterator[list[str]], row: Row, timings: dict[str, float]):
        self._pieces, self._row, self._timings = pieces, row, timings

    def __iter__(self) -> Iterator[str]:
        for (piece,) in self._pieces:
            if piece:
                yield piece

    @property
    def output(self) -> Output:
        return _output(self._row, self._timings)


def _output(row: Row, timings: dict[str, float]) -> Output:
    times = {**row.prepared.timings, **timings}
    times["total"] = sum(times.values())
    return Output(
        text=row.text[: row.num_shown],
        token_ids=list(row.token_ids),
        finish_reason=row.finish_reason,
        timings=times,
        num_prompt_tokens=len(row.prepared.input_ids),
        plans=row.prepared.plans,
    )


class NVLM:
    """A loaded model: `load`, then `generate`, `stream`, `generate_batch`, `logits`."""

    def __init__(self, model: NVLMModel, tokenizer: Tokenizer):
        self.model = model
        self.config = model.config
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype

    @classmethod
    def load(
        cls,
        name: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: Attention = "sdpa",
    ) -> "NVLM":
        """A bundled model ("micro-d", "micro-x", "micro-h") or a checkpoint folder.

        dtype: None is config.json's torch_dtype. attention: what prompts' self-attention goes through, torch's own or
        "flash", the flash-attn package on a CUDA device; decoding has its own kernel. Raises FileNotFoundError or
        ValueError as `weights.load` does, and ValueError where flash-attn is asked for and cannot run.
        """
        if dtype is not None and dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype!r}")
        folder = checkpoint_folder(name)
        check_device(device)
        check_attention(attention, device)
        read_json(folder / "config.json")
        tokenizer = Tokenizer.load(folder)
        for special in ("<|im_start|>", "<|im_end|>", "<|vision_pad|>"):
            tokenizer.special(special)
        model, _ = load(folder, device, dtype)
        model.language_model.attention = attention
        if tokenizer.vocab_size > model.config.text.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only "
                f"{model.config.text.vocab_size} rows"
            )
        return cls(model, tokenizer)

    def prepare(
        self,
        prompt: str | None = None,
        images: Sequence[Any] = (),
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | None = None,
        style: str = "hf",
    ) -> Prepared:
        """A request made ready: exactly one of prompt, messages and input_ids; images are paths, PIL images or arrays.

        `<image>` in a prompt stands for a picture; without one, pictures come first. input_ids are used as they are.
        Raises ValueError (FileNotFoundError for a path) on everything the model could not answer rightly.
        """
        if sum(given is not None for given in (prompt, messages, input_ids)) != 1:
            raise ValueError("give exactly one of prompt, messages and input_ids")
        if not isinstance(images, Sequence) or isinstance(images, str | bytes):
            raise ValueError(f"images must be a list of pictures, got {type(images).__name__}")
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"the prompt must be a string, got {type(prompt).__name__}")
        if prompt is not None and not prompt.strip():
            raise ValueError("the prompt is empty")
        config, vision = self.config, self.config.vision
        start = time.perf_counter()
        pictures = [open_image(source) for source in images]
        opened = time.perf_counter()
        plans = tuple(
            plan_tiles(*picture.size, vision.image_size, config.min_tiles, config.max_tiles) for picture in pictures
        )
        pixel_values = tuple(tile_pixels(picture, plan) for picture, plan in zip(pictures, plans, strict=True))
        tiled = time.perf_counter()
        if input_ids is None:
            messages = [{"role": "user", "content": prompt}] if messages is None else messages
            built = build_prompt(self.tokenizer, config, messages, plans, style=style)
            ids, blocks = built.input_ids, built.blocks
        else:
            ids = check_ids(input_ids, config.text.vocab_size)
            blocks = find_blocks(self.tokenizer, config, ids, plans)
        if len(ids) > config.text.context:
            raise ValueError(f"the prompt has {len(ids)} tokens, the context of this model {config.text.context}")
        tags = [tag_ids(self.tokenizer, plan, config) for plan in plans]
        layout = make_layout(config, len(ids), blocks, plans, tags)
        return Prepared(ids, layout, plans, pixel_values, {"open": opened - start, "tile": tiled - opened})

    def generate(
        self,
        prompt: str | None = None,
        images: Sequence[Any] = (),
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | None = None,
        style: str = "hf",
        **params: Any,
    ) -> Output:
        """An answer to what `prepare` takes. params: fields of `GenerationParams`, greedy by default."""
        stream = self.stream(prompt, images, messages=messages, input_ids=input_ids, style=style, **params)
        for _ in stream:
            pass
        return stream.output

    def stream(
        self,
        prompt: str | None = None,
        images: Sequence[Any] = (),
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | None = None,
        style: str = "hf",
        **params: Any,
    ) -> Stream:
        """`generate` piece by piece; bad input raises here, not at the first piece."""
        checked = GenerationParams(**params)
        return self.complete(self.prepare(prompt, images, messages=messages, input_ids=input_ids, style=style), checked)

    def complete(self, prepared: Prepared, params: GenerationParams | None = None) -> Stream:
        """Decodes one prepared request, greedily if params is None. The context's end ends it too ("length")."""
        row, timings = self._row(prepared, params or GenerationParams()), {}
        return Stream(self._run([row], timings), row, timings)

    def generate_batch(self, requests: Sequence[Prepared], params: GenerationParams | None = None) -> list[Output]:
        """Answers to prepared requests in one batch, whatever images each has; each as it would be alone.

        Timings are the batch's.
        """
        rows = [self._row(prepared, params or GenerationParams()) for prepared in requests]
        timings: dict[str, float] = {}
        for _ in self._run(rows, timings) if rows else ():
            pass
        return [_output(row, timings) for row in rows]

    @torch.inference_mode()
    def logits(self, input_ids: Sequence[int], images: Sequence[Any] = ()) -> Tensor:
        """[T, vocab] of one full forward over exact ids, without a cache."""
        prepared = self.prepare(input_ids=input_ids, images=images)
        features = self._encode(prepared)
        ids = torch.tensor([prepared.input_ids], device=self.device)
        hidden = self.model(ids, [prepared.layout], [features])
        return self.model.language_model.logits(hidden[0])

    def _row(self, prepared: Prepared, params: GenerationParams) -> Row:
        # the last token drawn is never fed back, so it needs no position
        room = self.config.text.context - len(prepared.input_ids) + 1
        return Row(
            prepared=prepared,
            sampler=Sampler(params, self.tokenizer.vocab_size, list(prepared.input_ids), self.device),
            stream=TextStream(self.tokenizer),
            eos_id=None if params.ignore_eos else self.tokenizer.eos_id,
            stop=params.stop,
            limit=min(params.max_new_tokens, room),
        )

    def _encode(self, prepared: Prepared) -> Tensor:
        """Features of all tiles of a request, [N, patches, vision hidden_size], one image at a time."""
        vision = self.config.vision
        empty = torch.zeros(0, vision.num_patches, vision.hidden_size, device=self.device, dtype=self.dtype)
        images = [self.model.encode(pixels.to(self.device, self.dtype)) for pixels in prepared.pixel_values]
        return torch.cat([empty, *images])

    def _run(self, rows: list[Row], timings: dict[str, float]) -> Iterator[list[str]]:
        """Decodes the rows together; yields each row's new text, a step at a time."""
        with torch.inference_mode():
            started = time.perf_counter()
            features = [self._encode(row.prepared) for row in rows]
            timings["encode"] = time.perf_counter() - started
            logits, cache, view = self._prefill(rows, features)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its weights or their dtype are wrong")
            timings["prefill"] = time.perf_counter() - started - timings["encode"]
        timings["decode"] = 0.0
        while True:
            started = time.perf_counter()
            pieces = [
                "" if row.finish_reason else row.accept(row.sampler.draw(logits[i])) for i, row in enumerate(rows)
            ]
            done = all(row.finish_reason for row in rows)
            if not done:
                with torch.inference_mode():
                    logits = self._step(rows, cache, view)
            timings["decode"] += time.perf_counter() - started
            yield pieces
            if done:
                return

    def _prefill(self, rows: list[Row], features: list[Tensor]) -> tuple[Tensor, KVCache, CrossView | None]:
        """Logits after every row's prompt [B, V], the cache they filled, and the images' keys and values."""
        prompts = [torch.tensor(row.prepared.input_ids, device=self.device) for row in rows]
        layouts = [row.prepared.layout for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        capacity = max(len(row.prepared.input_ids) + row.limit - 1 for row in rows)
        cache = KVCache(self.config.text, len(rows), max(capacity, ids.shape[1]), self.device, self.dtype)
        image_tokens = [self.model.project(tiles) for tiles in features]
        x = self.model.embed(ids, layouts, image_tokens)
        view = self.model.cross_view(ids.shape[1], layouts, image_tokens)
        positions = torch.arange(ids.shape[1], device=self.device).expand(len(rows), -1)
        hidden = self.model.language_model.prefill(x, positions, cache, view)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        logits = self.model.language_model.logits(hidden[torch.arange(len(rows), device=self.device), last])
        if view is not None:
            after = torch.tensor([[layout.after] for layout in layouts], device=self.device)
            view = CrossView(view.kv, after)
        return logits, cache, view

    def _step(self, rows: list[Row], cache: KVCache, view: CrossView | None) -> Tensor:
        """Feeds every row's last token; logits [B, V]. A finished row repeats its last step, which nobody reads."""
        decoder = self.model.language_model
        last = [row.token_ids[-1] if row.token_ids else self.tokenizer.eos_id for row in rows]
        ids = torch.tensor(last, device=self.device)[:, None]
        lengths = [len(row.prepared.input_ids) + max(len(row.token_ids), 1) for row in rows]
        positions = torch.tensor(lengths, device=self.device)[:, None] - 1
        positions = positions.clamp(max=cache.capacity - 1)
        hidden = decoder.decode(decoder.embed_tokens(ids), positions, cache, min(max(lengths), cache.capacity), view)
        return decoder.logits(hidden[:, 0])
