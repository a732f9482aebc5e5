TESTS = ("tests/checkpoint/test_weights.py",)
FILE, CONFIG, PRESETS = "nvlm_runtime/checkpoint/tensors.py", "nvlm_runtime/config.py", "nvlm_runtime/presets.py"
MUTATIONS = [
    (FILE, "padded = real + vision.num_dummy_heads * vision.head_dim", "padded = real", "trap 1: 25 heads in the file"),
    (
        FILE,
        "_share(third * padded, third * padded + real, rank, each)",
        "_share(third * real, (third + 1) * real, rank, each)",
        "trap 4: padding is cut at the end",
    ),
    (
        FILE,
        "if stored[_range(num, entry.axis, start, end)].count_nonzero():",
        "if False:",
        "trap 1: padding is not looked at",
    ),
    (PRESETS, "num_hidden_layers=45,", "num_hidden_layers=41,", "trap 10: four layers fewer"),
    (CONFIG, 'section.choose("select_layer", (-1,), -1)', "pass", "trap 10: any select_layer is taken"),
    (CONFIG, "projector_eps: float = 1e-5", "projector_eps: float = 1e-6", "trap 25: Megatron's eps by default"),
    (CONFIG, 'section.choose("use_thumbnail", (True,))', "pass", "use_thumbnail is not asked for"),
    (
        CONFIG,
        """section = _Section("llm_config", values)
""",
        """section = _Section("llm_config", values)
    section.choose("cross_attention_hidden_size", (), ...)
""",
        "trap 26: a key of no use is refused",
    ),
    (
        CONFIG,
        'architecture == [f"NVLM_{variant.upper()}"]',
        'architecture == ["NVLM_D_Model"]',
        "trap 26: the class's name",
    ),
]
