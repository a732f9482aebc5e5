"""The engine: a prompt and images to text, one request or a batch, whole or streamed.

The prompt and the images are computed once. A step costs one token through the decoder, whatever was generated before
it, except for attention itself.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from nvlm_runtime.checkpoint.composite import whole_folder
from nvlm_runtime.checkpoint.lora import load_lora
from nvlm_runtime.checkpoint.lora import merge_lora as merge_adapters
from nvlm_runtime.checkpoint.weights import Progress, checkpoint_digest, load
from nvlm_runtime.engine.batch import Batch
from nvlm_runtime.engine.compiles import CompileWatch
from nvlm_runtime.engine.generator import Images, Message, Question, TextGenerator, TextStream
from nvlm_runtime.engine.graphs import CapturedRunner
from nvlm_runtime.engine.images import ImageCache, ImageEncoder, ImageHandle
from nvlm_runtime.engine.logits import EagerLogits, NativeLogits
from nvlm_runtime.engine.native import use_library
from nvlm_runtime.engine.options import DtypeOption, GraphsOption, NativeOption, Options, device_of, dtype_of
from nvlm_runtime.engine.request import PHASES, Output, PreparedPrompt, Request, check_ids
from nvlm_runtime.engine.runner import Runner
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.step_bytes import step_bytes
from nvlm_runtime.inputs.image import TilePlan, grids, plan_tiles
from nvlm_runtime.inputs.layout import image_layout, layout_prompt, max_image_keys
from nvlm_runtime.inputs.prompt import Style, build_prompt, read_prompt
from nvlm_runtime.inputs.template import ChatTemplate
from nvlm_runtime.inputs.tokenizer import Detokenizer, Tokenizer
from nvlm_runtime.model.finite import check_layers
from nvlm_runtime.model.linear import with_inference_linears
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import AttentionBackend, CausalPast, check_attention
from nvlm_runtime.model.quantize import quantize as quantize_model
from nvlm_runtime.model.quantize import scheme_of
from nvlm_runtime.model.view import view_of
from nvlm_runtime.parallel.group import SOLO, Group
from nvlm_runtime.parallel.shard import VisionSplit

ROUNDING = 256  # tokens: requests of nearly the same length share their buffers
IMAGE_CACHE_BYTES = 256 * 2**20


class NVLM(TextGenerator):
    """A loaded model: `load` it, then `generate`, `stream`, `astream`, `encode_image` or `logits`.

    The model that is given does not change: an `NVLM` computes on a view of it (`view_of`), in evaluation mode. What
    changes its weights in place changes the answers; weights that `quantize` has replaced stay as they were.

    Attributes:
        model: The view of the model that the requests run on.
        tokenizer: The model's tokenizer.
        config: The model's configuration.
        device: Where the model is.
        dtype: The dtype of its weights.
    """

    def __init__(
        self,
        model: NVLMModel,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        chunk: int = 512,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        reuse: bool = True,
        deterministic: bool = False,
        graphs: GraphsOption = "auto",
        native: NativeOption = "auto",
        cache_folder: str | Path | None = None,
        quantize: Mapping[str, str] | None = None,
        check: bool = False,
        speculate: int = 0,
    ):
        """Wraps a model.

        Args:
            model: The model, which stays as it is.
            tokenizer: Its tokenizer.
            template: The checkpoint's chat template, for style "template".
            chunk: The most prompt tokens that run at a time.
            image_cache_bytes: Size of the cache of the images seen last; 0 is off.
            reuse: Whether a prompt that begins as the last one did, text and images, starts from its keys and values.
            deterministic: Whether the bits of an answer do not depend on what else runs or ran. Requests then do not
                batch in PyTorch, and `reuse` is off.
            graphs: Whether steps run on static buffers, captured into CUDA graphs on a GPU. Call `warmup` before the
                first request, or they are captured on the way. "auto" or None: on a CUDA device, unless `check` or
                `speculate` is on.
            native: Whether attention and decoding run in C++ on a CPU, built at first use. "auto" is True where the
                model is on a CPU in float32 or bfloat16 and there is a compiler.
            cache_folder: Folder of the built native library; None is the user's cache.
            quantize: Parts of the model to methods, as `model.quantize.quantize` takes them.
            check: Whether a value that is not finite raises ValueError with the name of the first layer that gives
                one; slow.
            speculate: The most tokens per step that a request which decodes alone drafts from its own text, 0 for
                none. The answer is the same, in fewer steps where it repeats itself.

        Raises:
            ValueError: Options that exclude each other or do not suit the model.
            BuildError: Native decoding is needed and its compiler is missing or fails.
        """
        options = Options(
            chunk=chunk,
            image_cache_bytes=image_cache_bytes,
            reuse=reuse,
            deterministic=deterministic,
            graphs=graphs,
            native=native,
            cache_folder=cache_folder,
            quantize=quantize,
            check=check,
            speculate=speculate,
        )
        library = options.library_for(model)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        captured = options.uses_graphs(self.device)
        in_fp32 = self.device.type == "cpu" and self.dtype == torch.bfloat16
        self.model = (with_inference_linears(model) if in_fp32 else view_of(model)).eval()
        if quantize:
            quantize_model(self.model, quantize)
        if check:
            check_layers(self.model)
        use_library(self.model, library)
        self.config = model.config
        self.tokenizer = tokenizer
        self.template = template
        self._reads = step_bytes(self.model)
        self.chunk = chunk
        self.reuse = reuse and not deterministic
        self.speculate = speculate
        self._watch = CompileWatch()
        backend = EagerLogits(self.model) if library is None else NativeLogits(self.model, library)
        runner = Runner(self.model, backend, row_by_row=deterministic and library is None, allow_host_sync=not captured)
        self.runner = CapturedRunner(runner, self._watch.built) if captured else runner
        self._async_scheduling = captured
        self.encoder = ImageEncoder(self.runner, ImageCache(image_cache_bytes))
        self._lock = threading.Lock()
        self._idle: Batch | None = None  # the buffers of the last single request

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: DtypeOption = "auto",
        attention: AttentionBackend = "sdpa",
        group: Group = SOLO,
        vision_split: VisionSplit = "tiles",
        lora: str | Path | None = None,
        merge_lora: bool = True,
        progress: Progress | None = None,
        cache_folder: str | Path | None = None,
        chunk: int = 512,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        reuse: bool = True,
        deterministic: bool = False,
        graphs: GraphsOption = "auto",
        native: NativeOption = "auto",
        quantize: Mapping[str, str] | None = None,
        check: bool = False,
        speculate: int = 0,
    ) -> "NVLM":
        """Loads a bundled model or a checkpoint.

        Args:
            name: "micro-d", "micro-x", "micro-h", "smol-x", or a checkpoint folder. A checkpoint without its text
                model is assembled first, in `cache_folder`.
            device: "cpu", "cuda", "cuda:N", a torch.device, or "auto": CUDA where it is available, else the CPU.
            dtype: "float32", "bfloat16", "float16", a torch.dtype, or "auto": that of config.json.
            attention: What the self-attention of prompts runs on: "sdpa", or "flash" for the package flash-attn on
                a CUDA device. Decoding has its own kernel.
            group: The ranks that hold the model together (`parallel.ranks.join`). Every rank loads its share, then
                makes the same calls with the same arguments and gets the same answers.
            vision_split: How ranks share the vision encoder: "tiles" or "heads" (`parallel.group`).
            lora: Folder of LoRA adapters in PEFT's format.
            merge_lora: Whether the adapters are merged into the weights. Otherwise they stay beside the weights in
                float32, and decoding runs in PyTorch.
            progress: Called with (bytes_read, bytes_total) as the weights are read.
            cache_folder: Folder of assembled checkpoints and of the native library; None is the user's cache.
            chunk: As in `NVLM`, as are the arguments below.
            image_cache_bytes: As in `NVLM`.
            reuse: As in `NVLM`.
            deterministic: As in `NVLM`.
            graphs: As in `NVLM`.
            native: As in `NVLM`.
            quantize: As in `NVLM`; the full-precision weights of these parts are freed.
            check: As in `NVLM`.
            speculate: As in `NVLM`.

        Returns:
            The model, ready for requests.

        Raises:
            FileNotFoundError: The checkpoint or one of its files does not exist.
            ValueError: The checkpoint or the adapters are invalid, or an argument is, or flash-attn cannot run.
            BuildError: Native decoding is needed and its compiler is missing or fails.
        """
        options = Options(
            chunk=chunk,
            image_cache_bytes=image_cache_bytes,
            reuse=reuse,
            deterministic=deterministic,
            graphs=graphs,
            native=native,
            cache_folder=cache_folder,
            quantize=quantize,
            check=check,
            speculate=speculate,
        )
        if lora is not None and group.size > 1:
            raise ValueError("adapters are put on a whole model: merge them into a checkpoint before it is split")
        read_device, read_dtype = device_of(device), dtype_of(dtype)
        check_attention(attention, read_device)
        folder = whole_folder(name, cache_folder, group)
        tokenizer = Tokenizer.load(folder)
        for special in ("<|im_start|>", "<|im_end|>", "<|vision_pad|>"):
            tokenizer.special(special)
        template = ChatTemplate.load(folder)
        group.check_same("the checkpoint", checkpoint_digest(folder))
        report = progress or (lambda bytes_read, bytes_total: None)
        model, _ = load(folder, read_device, read_dtype, group, vision_split, progress=report)
        if lora is not None:
            if scheme_of(model):
                raise ValueError(f"{folder} is quantised, and quantised weights do not support adapters")
            load_lora(model, lora)
            if merge_lora:
                merge_adapters(model)
        model.language_model.attention = attention
        if tokenizer.vocab_size > model.config.text.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only "
                f"{model.config.text.vocab_size} rows"
            )
        if quantize:  # in the model itself, which nobody else holds: its full-precision weights are freed
            options.library_for(model)
            quantize_model(model, quantize)
        return cls(
            model,
            tokenizer,
            template=template,
            chunk=chunk,
            image_cache_bytes=image_cache_bytes,
            reuse=reuse,
            deterministic=deterministic,
            graphs=graphs,
            native=native,
            cache_folder=cache_folder,
            check=check,
            speculate=speculate,
        )

    def prepare(
        self,
        prompt: str | None = None,
        images: Images | None = None,
        *,
        messages: Sequence[Message] | None = None,
        input_ids: Sequence[int] | None = None,
        style: Style = "hf",
    ) -> PreparedPrompt:
        """Makes one prompt ready: token ids, a layout and opened images, whose tiles are cut in a thread.

        Args:
            prompt: A question. Each `<image>` in it stands for one image; without any, the images come first.
            images: The images: paths, PIL images, uint8 arrays or `ImageHandle`s. None is no images.
            messages: A conversation of {"role": ..., "content": ...} that ends with a user turn.
            input_ids: Token ids, used as they are.
            style: How the turns are written: "hf", "megatron", or "template" for the checkpoint's chat template.

        Returns:
            The prompt, for `generate`, `stream` and `astream`.

        Raises:
            ValueError: An argument or an image is invalid, or the prompt does not fit into the model's context.
            FileNotFoundError: An image path does not exist.
        """
        images = () if images is None else images
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
            pictures = self.encoder.open(images)
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

    def encode_image(self, source: Any) -> ImageHandle:
        """What the decoder needs of a picture, to be given to any prompt in the picture's place."""
        (picture,) = self.encoder.open([source])
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

    def _answer_all(self, requests: Sequence[tuple[PreparedPrompt, GenerationParams]]) -> list[Output]:
        """Decodes requests in one batch, whatever images each has; each as it would be alone.

        Raises ValueError where their caches do not fit into memory, before anything is computed.
        """
        rows = [self.request(*request) for request in requests]
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

    def _stream(self, prepared: PreparedPrompt, params: GenerationParams) -> TextStream:
        request = self.request(prepared, params)
        return TextStream(self._alone(request), request)

    async def _astream(self, question: Question, style: Style, params: GenerationParams) -> AsyncIterator[str]:
        # one thread runs every call, so that it closes the stream when the step under way is done
        thread = ThreadPoolExecutor(1, "nvlm-astream")
        run = partial(asyncio.get_running_loop().run_in_executor, thread)
        stream: TextStream | None = None
        try:
            stream = await run(lambda: self._stream(self._prepared(question, style), params))
            while (piece := await run(next, stream, None)) is not None:
                yield piece
        finally:
            if stream is not None:
                thread.submit(stream.close)
            thread.shutdown(wait=False)

    def batch(self, num_rows: int, capacity: int, cross_capacity: int) -> Batch:
        """Buffers for `num_rows` rows of `capacity` tokens and `cross_capacity` image keys each."""
        slots = self.runner.allocate(num_rows, capacity, cross_capacity, self.tokenizer.vocab_size)
        return Batch(self.runner, slots, self.encoder, self.chunk, self.reuse, self.speculate, self._async_scheduling)

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
    def logits(self, input_ids: Sequence[int], images: Images | None = None) -> Tensor:
        """Computes the logits of every position of a prompt, without a cache.

        Args:
            input_ids: T token ids, with the tags and placeholders of the images.
            images: The images, as in `prepare`.

        Returns:
            [T, vocab] in the model's dtype.

        Raises:
            ValueError: As `prepare`.
        """
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
            self.runner.project(self.runner.encode(pixel_values))
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
        """Triton kernels and captured steps that requests have had to wait for since `warmup`."""
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
            stream=Detokenizer(self.tokenizer),
            eos_id=None if params.ignore_eos else self.tokenizer.eos_id,
            limit=min(params.max_new_tokens, room),
            reads=self._reads,
        )
