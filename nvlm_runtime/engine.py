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

from nvlm_runtime.cache import KVCache
from nvlm_runtime.decoder import CrossView
from nvlm_runtime.image import open_image, plan_tiles, tile_pixels
from nvlm_runtime.layout import make_layout
from nvlm_runtime.model import NVLMModel
from nvlm_runtime.presets import PRESETS
from nvlm_runtime.prompt import build_prompt, find_blocks, tag_ids
from nvlm_runtime.request import Output, Prepared, Row, check_ids, check_stop
from nvlm_runtime.sampling import Sampler, SamplingParams
from nvlm_runtime.tokenizer import TextStream, Tokenizer
from nvlm_runtime.weights import load, read_json

BUNDLED = Path(__file__).parent / "models"


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a bundled model or of a path. ValueError or FileNotFoundError saying what was expected."""
    bundled = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
    if str(name) in bundled:
        return BUNDLED / str(name)
    if Path(name).is_dir():
        return Path(name)
    if str(name) in PRESETS:
        raise ValueError(f"{name} has no weights in this package: give the folder of its checkpoint")
    raise ValueError(f"unknown model {str(name)!r}: expected a checkpoint folder or one of {', '.join(bundled)}")


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
        finish_reason=row.finish_reason or "length",
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
    def load(cls, name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> "NVLM":
        """A bundled model ("micro-d", "micro-x", "micro-h") or a checkpoint folder.

        dtype: None is config.json's torch_dtype. Raises FileNotFoundError or ValueError as `weights.load` does.
        """
        folder = checkpoint_folder(name)
        read_json(folder / "config.json")
        tokenizer = Tokenizer.load(folder)
        model, _ = load(folder, device, dtype)
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
        if isinstance(images, str | Path | bytes):
            raise ValueError(f"images must be a list of pictures, got {type(images).__name__}")
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
            ids = check_ids(input_ids, config.text.vocab_size, self.tokenizer)
            blocks = find_blocks(self.tokenizer, config, ids, plans)
        if len(ids) > config.text.max_position_embeddings:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the context of this model {config.text.max_position_embeddings}"
            )
        tags = [tag_ids(self.tokenizer, plan, config) for plan in plans]
        layout = make_layout(config, len(ids), blocks, plans, tags)
        return Prepared(ids, layout, plans, pixel_values, {"open": opened - start, "tile": tiled - opened})

    def generate(self, prompt: str | None = None, images: Sequence[Any] = (), **options: Any) -> Output:
        """An answer. Options: those of `prepare` and of `complete`."""
        stream = self.stream(prompt, images, **options)
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
        **options: Any,
    ) -> Stream:
        """An answer piece by piece; bad input raises here, not at the first piece."""
        return self.complete(
            self.prepare(prompt, images, messages=messages, input_ids=input_ids, style=style), **options
        )

    def complete(
        self,
        prepared: Prepared,
        *,
        max_new_tokens: int = 512,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Stream:
        """Decodes one prepared request. It ends at <|im_end|>, a stop string, max_new_tokens or the context's end."""
        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        row = self._row(prepared, params, max_new_tokens, check_stop(stop), ignore_eos)
        timings: dict[str, float] = {}
        return Stream(self._run([row], timings), row, timings)

    def generate_batch(
        self,
        requests: Sequence[Prepared],
        params: SamplingParams | None = None,
        *,
        max_new_tokens: int = 512,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> list[Output]:
        """Answers to several prepared requests in one batch, whatever images each has; each as it would be alone.

        params: greedy when None. The other options are those of `complete`. Timings are the batch's.
        """
        params = params or SamplingParams()
        rows = [self._row(prepared, params, max_new_tokens, check_stop(stop), ignore_eos) for prepared in requests]
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

    def _row(
        self, prepared: Prepared, params: SamplingParams, max_new_tokens: int, stop: tuple[str, ...], ignore_eos: bool
    ) -> Row:
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a whole number from 1 on, got {max_new_tokens!r}")
        # the last token drawn is never fed back, so it needs no position
        room = self.config.text.max_position_embeddings - len(prepared.input_ids) + 1
        rows = min(self.tokenizer.vocab_size, self.config.text.vocab_size)
        return Row(
            prepared=prepared,
            sampler=Sampler(params, rows, list(prepared.input_ids), self.device),
            stream=TextStream(self.tokenizer),
            eos_id=None if ignore_eos else self.tokenizer.eos_id,
            stop=stop,
            limit=min(max_new_tokens, room),
        )

    def _encode(self, prepared: Prepared) -> Tensor:
        """Features of all tiles of a request, [N, P, 4 * vision hidden_size], one image at a time."""
        config = self.config
        empty = torch.zeros(
            0, config.tokens_per_tile, 4 * config.vision.hidden_size, device=self.device, dtype=self.dtype
        )
        images = [self.model.encode(pixels.to(self.device, self.dtype)) for pixels in prepared.pixel_values]
        return torch.cat([empty, *images])

    def _run(self, rows: list[Row], timings: dict[str, float]) -> Iterator[list[str]]:
        """Decodes the rows together; yields each row's new text, a step at a time."""
        with torch.inference_mode():
            started = time.perf_counter()
            features = [self._encode(row.prepared) for row in rows]
            timings["encode"] = time.perf_counter() - started
            logits, cache, view = self._prefill(rows, features)
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
