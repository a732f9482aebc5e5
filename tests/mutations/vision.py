TESTS = ("tests/model/test_vision.py", "tests/model/test_parity.py", "tests/checkpoint/test_weights.py")
FILE, MODEL = "nvlm_runtime/model/vision.py", "nvlm_runtime/model/model.py"
SHUFFLE = "nvlm_kernels/ops/pixel_shuffle_project.py"
MUTATIONS = [
    (
        FILE,
        "return qk_norm(qkv, *weights, self.q_norm.eps)",
        "return qk_norm_from_sums(qkv, qk_sum_squares(qkv), 2 * self.width, *weights, self.q_norm.eps)",
        "trap 2: the mean square over padded channels",
    ),
    (
        FILE,
        "return qk_norm(qkv, *weights, self.q_norm.eps)",
        "heads = ((t.unflatten(-1, (self.num_heads, -1)), w) for t, w in zip(qkv.chunk(3, -1), weights))\n"
        "            return tuple(F.rms_norm(t, t.shape[-1:]).flatten(-2) * w for t, w in heads)",
        "trap 3: a norm a head",
    ),
    (
        FILE,
        "q, k, v = qkv.chunk(3, dim=-1)",
        "q, k, v = qkv.unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)\n"
        "        q, k, v = (t.flatten(-2) for t in (q, k, v))",
        "trap 4: qkv interleaved by heads, as Megatron has it",
    ),
    (
        FILE,
        "self.proj = nn.Linear(inner, size)",
        "self.proj = nn.Linear(inner, size, bias=False)",
        "trap 5: no bias of proj",
    ),
    (
        FILE,
        "F.gelu(self.fc1(self.group.spread(x)))",
        'F.gelu(self.fc1(self.group.spread(x)), approximate="tanh")',
        "trap 6: GELU by tanh in the vision encoder",
    ),
    (
        SHUFFLE,
        "return F.gelu(x) if gelu else x\n\n\ndef pick",
        'return F.gelu(x, approximate="tanh") if gelu else x\n\n\ndef pick',
        "trap 6: GELU by tanh in the projector",
    ),
    (
        FILE,
        "x = layer_scale_residual(x, self.attn(self.norm1(x)), self.ls1)",
        "x = x + (1 - self.ls1) * self.attn.proj.bias\n"
        "        x = layer_scale_residual(x, self.attn(self.norm1(x)), self.ls1)",
        "trap 7: LayerScale without the bias",
    ),
    (
        FILE,
        "return Features(x[:, 1:], None if",
        "return Features(x[:, :-1], None if",
        "trap 8: another token is dropped than CLS",
    ),
    (
        FILE,
        "return Features(x[:, 1:], None if",
        "x = F.layer_norm(x, x.shape[-1:])\n            return Features(x[:, 1:], None if",
        "trap 8: a norm behind the last block",
    ),
    (MODEL, "version=self.config.ps_version,", 'version="v1",', "trap 9: pixel shuffle v1"),
    (
        MODEL,
        "nn.LayerNorm(width, eps=config.projector_eps)",
        "nn.LayerNorm(width, eps=1e-3)",
        "trap 25: another eps in the projector",
    ),
    (
        MODEL,
        "nn.Linear(width, text.intermediate_size, bias=False)",
        "nn.Linear(width, text.intermediate_size)",
        "trap 31: a projector with biases",
    ),
    (FILE, "x.permute(0, 2, 4, 1, 3, 5)", "x.permute(0, 2, 4, 3, 5, 1)", "a patch's channels last"),
]
