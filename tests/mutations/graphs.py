TESTS = (
    "tests/engine/test_builds.py",
    "tests/engine/test_encoding_aside.py",
    "tests/engine/test_graphs.py",
    "tests/kernels/test_split_variants.py",
)
FILE = "nvlm_runtime/engine/graphs.py"
SPLIT = "nvlm_kernels/ops/attention/split.py"
MUTATIONS = [
    (
        FILE,
        "[None] + len(slots) * slots.cache.capacity)",
        "[None] + slots.capacity)",
        "a dry run of a prompt's step writes into the row after",
    ),
    (
        FILE,
        "with key[1].all_inactive() if isinstance(key[1], BatchSlots) else nullcontext():",
        "with nullcontext():",
        "a dry run of a decode step moves the rows on",
    ),
    (
        FILE,
        'capture_error_mode="thread_local"',
        'capture_error_mode="global"',
        "a capture breaks when another thread calls CUDA",
    ),
    (
        "nvlm_runtime/engine/slots.py",
        "mem_get_info(device)[0] + held",
        "mem_get_info(device)[0]",
        "memory that the allocator holds counts as used",
    ),
    (
        "nvlm_runtime/model/past.py",
        "lengths if active is None else lengths * active",
        "lengths",
        "an inactive row reads its whole cache",
    ),
    (
        "nvlm_runtime/engine/logits.py",
        "slots.interval * slots.active[:, None, None]",
        "slots.interval",
        "an inactive row reads its last request's image",
    ),
    (
        "nvlm_runtime/engine/options.py",
        'return device.type == "cuda" and not',
        "return not",
        "steps run on static buffers on a CPU by default",
    ),
    (
        SPLIT,
        '@triton.jit(do_not_specialize=["num_keys"])',
        "@triton.jit",
        "the kernel is compiled for the number of keys",
    ),
    (
        SPLIT,
        "max(num_splits, _most_splits(q, k))",
        "num_splits",
        "the kernel is compiled for the number of splits",
    ),
    (
        "nvlm_runtime/engine/batch.py",
        "while not encoding.done() and any(other.is_decoding for other in self._slots):",
        "while False:",
        "rows wait until a picture has been encoded",
    ),
    (
        "nvlm_runtime/engine/images.py",
        "torch.cuda.current_stream(tensor.device).synchronize()",
        "torch.cuda.synchronize(tensor.device)",
        "encoding waits for the whole device",
    ),
    (
        "nvlm_runtime/engine/images.py",
        "        self._stream.wait_stream(used_by)\n",
        "",
        "encoding does not wait for what the weights wait for",
    ),
]
