"""The engine: a prompt and pictures to text, one request or a batch, whole or streamed.

The prefix and the images are computed once; a step costs one token through the decoder, whatever was generated
before it, but for attention itself.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from nvlm_kernels import MAX_DECODE_TOKENS
from nvlm_kernels.native import NativeLibrary, is_available, load_library
from nvlm_runtime.checkpoint.joined import whole_folder
from nvlm_runtime.checkpoint.lora import load_lora, merge_lora
from nvlm_runtime.checkpoint.weights import DTYPES, Progress, checkpoint_digest, load
from nvlm_runtime.engine.batch import Batch
from nvlm_runtime.engine.compiles import CompileWatch
from nvlm_runtime.engine.encoder import ImageEncoder
from nvlm_runtime.engine.graphs import GraphStages
from nvlm_runtime.engine.handle import ImageCache, ImageHandle, image_key
from nvlm_runtime.engine.native import use_library
from nvlm_runtime.engine.request import PHASES, ImageInput, Output, PreparedPrompt, Request, check_ids
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.slots import Slots
from nvlm_runtime.engine.stages import Stages
from nvlm_runtime.engine.step_bytes import step_bytes
from nvlm_runtime.inputs.image import TilePlan, grids, open_image, plan_tiles, tile_pixels
from nvlm_runtime.inputs.layout import image_layout, layout_prompt, max_image_keys
from nvlm_runtime.inputs.prompt import build_prompt, read_prompt
from nvlm_runtime.inputs.template import ChatTemplate
from nvlm_runtime.inputs.tokenizer import TextStream, Tokenizer
from nvlm_runtime.model.adapter import AdaptedLinear
from nvlm_runtime.model.finite import check_layers
from nvlm_runtime.model.linear import replace_linears
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import AttentionBackend, CausalPast, check_attention
from nvlm_runtime.model.quantize import quantize as quantize_model
from nvlm_runtime.model.quantize import scheme_of
from nvlm_runtime.parallel.group import SOLO, Group, VisionSplit

ROUNDING = 256  # slots: requests of nearly the same length share their buffers


def check_device(device: torch.device | str) -> None:
    """ValueError where tensors cannot be made on this device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} is not to be had here: {str(error).splitlines()[0]}") from error


class Stream:
    """Pieces of an answer as they become certain; `output` is the whole answer so far, final when it is exhausted.

    Left early, by `close` or by being forgotten, it frees its row; the text so far stays.
    """

    def __init__(self, pieces: Iterator[str], row: Request):
        self._pieces, self._row = pieces, row

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if piece:
                yield piece

    def close(self) -> None:
        self._pieces.close()

    @property
    def output(self) -> Output:
        return self._row.output


class NVLM:
    """A loaded model: `load`, then `generate`, `stream`, `generate_batch`, `encode_image`, `logits`.

    template: the checkpoint's own, for style "template".
    chunk: prompt tokens read at a time. image_cache_bytes: of handles of the pictures seen last. reuse: a prompt that
    begins as the last one did, text and images, starts from its keys and values. deterministic: an answer's bits do not
    depend on what else runs or ran, at the price of batching and of reuse. graphs: static stages only, captured into
    CUDA graphs on a GPU; `warmup` before the first request, or they are captured on the way. native: attention and
    decoding on a CPU in C++, built at first use and kept in `cache_folder` (the user's cache where it is None); None is
    yes where the model is on a CPU in float32 or bfloat16 and a compiler is there. quantize: parts to methods, in
    place, as `quantize.quantize` takes them. check: every layer is looked at, and a value that is not finite is an
    error that names the first one to give it; slow. speculate: tokens that a request which decodes alone drafts a step
    from its own words (`ngram`): the same answer in fewer steps where it repeats them, slower steps where a draft is
    wrong.
    Raises ValueError where native decoding is asked for and cannot be, BuildError where its compiler fails.
    """

    def __init__(
        self,
        model: NVLMModel,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        chunk: int = 512,
        image_cache_bytes: int = 256 * 2**20,
        reuse: bool = True,
        deterministic: bool = False,
        graphs: bool = False,
        native: bool | None = None,
        cache_folder: str | Path | None = None,
        quantize: Mapping[str, str] | None = None,
        check: bool = False,
        speculate: int = 0,
    ):
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")
        if image_cache_bytes < 0:
            raise ValueError(f"image_cache_bytes must be at least 0, got {image_cache_bytes}")
        if not 0 <= speculate <= MAX_DECODE_TOKENS - 1:
            raise ValueError(f"speculate must be from 0 to {MAX_DECODE_TOKENS - 1} tokens, got {speculate}")
        if graphs and native:
            raise ValueError("graphs and native exclude each other: static stages are PyTorch's")
        if check and (graphs or native):
            raise ValueError("check looks at every layer in PyTorch: it excludes graphs and native")
        self.model = model
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        adapted = any(isinstance(module, AdaptedLinear) for module in model.modules())
        if adapted and (native or quantize):
            raise ValueError("native decoding and quantised weights know no adapters: merge them first (merge_lora)")
        found = None if graphs else self._library(False if check or adapted else native, cache_folder)
        if speculate and (graphs or (deterministic and found is None)):
            raise ValueError("speculate draws several tokens a step: it excludes graphs, and deterministic in PyTorch")
        if quantize:
            quantize_model(model, quantize)
        if check:
            check_layers(model)
        self.config = model.config
        self.tokenizer = tokenizer
        self.template = template
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            replace_linears(model)
        use_library(model, found)
        self._reads = step_bytes(model)
        self.chunk = chunk
        self.reuse = reuse and not deterministic
        self.speculate = speculate
        self.stages = GraphStages(model, deterministic) if graphs else Stages(model, deterministic, found)
        self.encoder = ImageEncoder(self.stages, ImageCache(image_cache_bytes))
        self._threads = ThreadPoolExecutor(2, "nvlm-image")
        self._lock = threading.Lock()
        self._idle: Batch | None = None  # the buffers of the last single request
        self._watch = CompileWatch()
        self.stages.built = lambda name: self._watch.saw(f"the stage {name!r} was built")

    def _library(self, native: bool | None, folder: str | Path | None) -> NativeLibrary | None:
        alone = self.model.group.size == 1
        if native and not alone:
            raise ValueError("native decoding is one process's: it excludes a tensor-parallel group")
        if native is None:
            native = (
                is_available() and alone and self.device.type == "cpu" and self.dtype in (torch.float32, torch.bfloat16)
            )
        return load_library(None if folder is None else Path(folder)) if native else None

    @classmethod
    def load(
        cls,
        name: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: AttentionBackend = "sdpa",
        group: Group = SOLO,
        vision_split: VisionSplit = "tiles",
        lora: str | Path | None = None,
        merge: bool = True,
        progress: Progress = lambda read, total: None,
        cache_folder: str | Path | None = None,
        **options: Any,
    ) -> "NVLM":
        """A bundled model ("micro-d", "micro-x", "micro-h") or a checkpoint folder; one that comes without its text
        model is put together first, in `cache_folder` (`joined`).

        lora: a folder of adapters in PEFT's form, put on the model (`lora.load_lora`). merge: into its weights, so that
        every fast path runs it; otherwise they stay beside the weights, in float32, and decoding is PyTorch's.

        group: the ranks that hold the model together (`ranks.join`). Every rank loads its share, then makes the same
        calls with the same arguments and gets the same answers. vision_split: "tiles" or "heads" (`parallel`).
        dtype: None is config.json's torch_dtype. attention: what prompts' self-attention goes through, torch's own or
        "flash", the flash-attn package on a CUDA device; decoding has its own kernel. progress: as in
        `weights.load`. options: as of NVLM. Raises FileNotFoundError or ValueError as `weights.load` and
        `load_lora` do, and ValueError where flash-attn is asked for and cannot run.
        """
        if dtype is not None and dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype!r}")
        if lora is not None and group.size > 1:
            raise ValueError("adapters are put on a whole model: merge them into a checkpoint before it is shared out")
        check_device(device)
        check_attention(attention, device)
        folder = whole_folder(name, cache_folder, group)
        tokenizer = Tokenizer.load(folder)
        for special in ("<|im_start|>", "<|im_end|>", "<|vision_pad|>"):
            tokenizer.special(special)
        template = ChatTemplate.load(folder)
        group.check_same("the checkpoint", checkpoint_digest(folder))
        model, _ = load(folder, device, dtype, group, vision_split, progress=progress)
        if lora is not None and scheme_of(model):
            raise ValueError(f"{folder} is quantised, and quantised weights know no adapters")
        if lora is not None:
            load_lora(model, lora)
            if merge:
                merge_lora(model)
        model.language_model.attention = attention
        if tokenizer.vocab_size > model.config.text.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only "
                f"{model.config.text.vocab_size} rows"
            )
        return cls(model, tokenizer, template=template, cache_folder=cache_folder, **options)

    def prepare(
        self,
        prompt: str | None = None,
        images: Sequence[Any] = (),
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | None = None,
        style: str = "hf",
    ) -> PreparedPrompt:
        """A request made ready: exactly one of prompt, messages and input_ids; images are paths, PIL images or arrays.

        `<image>` in a prompt stands for a picture; without one, pictures come first. input_ids are used as they are.
        style: "hf", "megatron", or "template", the checkpoint's own chat template, which is never taken unasked.
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
        config = self.config
        start = time.perf_counter()
        with record_function("nvlm.open"):
            pictures = tuple(self._threads.map(self._picture, images))
        opened = time.perf_counter() - start
        plans = [picture.plan for picture in pictures]
        if input_ids is None:
            messages = [{"role": "user", "content": prompt}] if messages is None else messages
            built = build_prompt(self.tokenizer, config, messages, plans, style=style, template=self.template)
        else:
            built = read_prompt(self.tokenizer, config, check_ids(input_ids, config.text.vocab_size), plans)
        ids = built.input_ids
        if len(ids) > config.text.context:
            raise ValueError(f"the prompt has {len(ids)} tokens, the context of this model {config.text.context}")
        return PreparedPrompt(
            ids, layout_prompt(self.tokenizer, config, built, plans), pictures, {"queue": 0.0, "open": opened}
        )

    def _picture(self, source: Any) -> ImageInput:
        """Opens and names a picture; its tiles are cut in a thread, unless its handle is there already."""
        if isinstance(source, ImageHandle):
            if source.fingerprint != self.encoder.fingerprint:
                raise ValueError("the image handle was made by other weights than this model's")
            return ImageInput(source.plan, source.key, None, source)
        picture = open_image(source)
        plan = plan_tiles(*picture.size, self.config.vision.image_size, self.config.min_tiles, self.config.max_tiles)
        key = image_key(picture.tobytes(), plan)
        handle = self.encoder.cached(key)
        if handle is not None:
            return ImageInput(plan, key, lambda: tile_pixels(picture, plan), handle)
        return ImageInput(plan, key, self._threads.submit(tile_pixels, picture, plan).result)

    def encode_image(self, source: Any) -> ImageHandle:
        """What the decoder needs of a picture, to be given to any prompt in the picture's place."""
        picture = self._picture(source)
        return self.encoder.handle(
            picture, image_layout(self.tokenizer, self.config, picture.plan), dict.fromkeys(PHASES, 0.0)
        )

    def handle_from_embeds(self, image_embeds: Tensor, width: int, height: int) -> ImageHandle:
        """A handle of image tokens [N, P, C] computed elsewhere, thumbnail last, of a picture of width x height pixels.

        Raises ValueError where the tokens are not those of such a picture's tiles.
        """
        config = self.config
        plan = plan_tiles(width, height, config.vision.image_size, config.min_tiles, config.max_tiles)
        return self.encoder.from_embeds(image_embeds, plan, image_layout(self.tokenizer, self.config, plan))

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

    def complete(self, prepared: PreparedPrompt, params: GenerationParams | None = None) -> Stream:
        """Decodes one prepared request, greedily if params is None. The context's end ends it too ("length")."""
        row = self.request(prepared, params or GenerationParams())
        return Stream(self._alone(row), row)

    def generate_batch(
        self, requests: Sequence[PreparedPrompt], params: GenerationParams | None = None
    ) -> list[Output]:
        """Answers to prepared requests in one batch, whatever images each has; each as it would be alone.

        Raises ValueError where their caches do not fit into memory, before anything is computed.
        """
        rows = [self.request(prepared, params or GenerationParams()) for prepared in requests]
        if not rows:
            return []
        batch = self.batch(
            len(rows),
            max(row.num_positions for row in rows),
            max(row.prepared.layout.cross_length for row in rows),
        )
        for row in rows:
            batch.admit(row)
        while not batch.is_idle:
            for row, _ in batch.advance():
                if row.error is not None:
                    raise row.error
        return [row.output for row in rows]

    def batch(self, num_rows: int, capacity: int, cross_capacity: int) -> Batch:
        """Buffers for `num_rows` rows of `capacity` tokens and `cross_capacity` image keys each."""
        slots = Slots.allocate(
            self.model.shard,
            num_rows,
            capacity,
            cross_capacity,
            self.tokenizer.vocab_size,
            self.device,
            self.dtype,
            self.stages.spare,
        )
        return Batch(self.stages, slots, self.encoder, self.chunk, self.reuse, self.speculate)

    def _keep(self, batch: Batch) -> None:
        """For the next single request."""
        with self._lock:
            before, self._idle = self._idle, batch
        if before is not None and before is not batch:
            before.close()

    def _alone(self, row: Request) -> Iterator[str]:
        """A row in a batch of its own: the buffers of the last one, if they are free and long enough."""
        with self._lock:
            batch, self._idle = self._idle, None
        if batch is None or not batch.fits(row):
            if batch is not None:
                batch.close()
            capacity = -(-row.num_positions // ROUNDING) * ROUNDING
            cross_capacity = -(-row.prepared.layout.cross_length // ROUNDING) * ROUNDING
            batch = self.batch(1, min(capacity, self.config.text.context), cross_capacity)
        batch.admit(row)
        try:
            while not row.done:
                for _, piece in batch.advance():
                    yield piece
            if row.error is not None:
                raise row.error
        finally:
            batch.cancel(row)
            self._keep(batch)

    @torch.inference_mode()
    def logits(self, input_ids: Sequence[int], images: Sequence[Any] = ()) -> Tensor:
        """[T, vocab] of one full forward over exact ids, without a cache."""
        prepared = self.prepare(input_ids=input_ids, images=images)
        timings = dict.fromkeys(PHASES, 0.0)
        pairs = zip(prepared.images, prepared.layout.images, strict=True)
        tokens = [self.encoder.handle(picture, image, timings).tokens for picture, image in pairs]
        ids = torch.tensor([prepared.input_ids], device=self.device)
        x = self.model.embed(ids, [prepared.layout], [tokens])
        view = self.model.cross_view(ids.shape[1], [prepared.layout], [tokens])
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        decoder = self.model.language_model
        hidden = decoder(x, positions, CausalPast(positions, decoder.attention), view)
        return decoder.logits(hidden[0])

    @torch.inference_mode()
    def warmup(self, max_model_len: int = 1024, max_images: int = 1) -> dict[str, float]:
        """Allocates the buffers of single requests of up to `max_model_len` tokens, prompt and answer, and `max_images`
        images, and compiles and captures all that such requests can need. Returns seconds a phase.

        From then on `compiles_after_warmup` counts what is compiled all the same, and each is a warning.
        """
        began = time.perf_counter()
        batch = self.batch(1, min(max_model_len, self.config.text.context), max_images * self.max_image_keys)
        phases = {"buffers": time.perf_counter() - began, **self.warm(batch)}
        self._keep(batch)
        return phases

    @torch.inference_mode()
    def warm(self, batch: Batch) -> dict[str, float]:
        """What `warmup` does, for all that requests in an idle batch can need. Returns seconds a phase."""
        size, began = self.config.vision.image_size, time.perf_counter()
        for num_tiles in sorted({plan.num_tiles for plan in self._plans()}):
            pixel_values = torch.zeros(num_tiles, 3, size, size, device=self.device, dtype=self.dtype)
            self.stages.project(self.stages.encode(pixel_values))
        phases = {"encode": time.perf_counter() - began, **batch.warmup()}
        self._watch.start()
        return phases

    @property
    def max_image_keys(self) -> int:
        """Image keys of the picture that has most of them; 0 in NVLM-D."""
        return max_image_keys(self.tokenizer, self.config)

    def _plans(self) -> list[TilePlan]:
        """One of every grid."""
        config, size = self.config, self.config.vision.image_size
        return [TilePlan(c * size, r * size, c, r, size) for c, r in grids(config.min_tiles, config.max_tiles)]

    @property
    def compiles_after_warmup(self) -> int:
        """Triton kernels and static stages that requests have had to wait for since `warmup`."""
        return self._watch.count

    def request(self, prepared: PreparedPrompt, params: GenerationParams) -> Request:
        """A request ready for a batch. Ranks of a group draw by one seed."""
        if params.seed is None and params.temperature and self.model.group.size > 1:
            params = replace(params, seed=self.model.group.agree(int.from_bytes(os.urandom(8))))
        # the last token drawn is never fed back, so it needs no position
        room = self.config.text.context - len(prepared.input_ids) + 1
        return Request(
            prepared=prepared,
            params=params,
            stream=TextStream(self.tokenizer),
            eos_id=None if params.ignore_eos else self.tokenizer.eos_id,
            limit=min(params.max_new_tokens, room),
            reads=self._reads,
        )
