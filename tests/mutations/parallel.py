TESTS = ("tests/parallel/test_parallel.py", "-k", "not published and not hold and not three")
PARALLEL, VISION = "nvlm_runtime/parallel/group.py", "nvlm_runtime/model/vision.py"
CROSS, SAMPLING = "nvlm_runtime/model/cross.py", "nvlm_runtime/engine/rank_sampling.py"
WEIGHTS, MODEL = "nvlm_runtime/checkpoint/tensors.py", "nvlm_runtime/model/model.py"
MUTATIONS = [
    (
        PARALLEL,
        "return ctx.group.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None",
        "return grad, None",
        "no all-reduce in the backward",
    ),
    (
        VISION,
        "self.group.spread(self.group.reduce(qk_sum_squares(qkv)))",
        "self.group.reduce(qk_sum_squares(qkv))",
        "QK-norm's sum has no gradient across ranks",
    ),
    (
        VISION,
        "self.group.spread(self.group.reduce(qk_sum_squares(qkv)))",
        "qk_sum_squares(qkv)",
        "trap 3: a rank norms by its own heads",
    ),
    (
        VISION,
        "return group.reduce(F.linear(x, linear.weight)) + linear.bias",
        "return group.reduce(linear(x))",
        "a bias a rank",
    ),
    (
        CROSS,
        "self.group.reduce(self.o_proj(out.flatten(2)))",
        "self.o_proj(out.flatten(2))",
        "cross-attention is not summed",
    ),
    (
        SAMPLING,
        "totals[: group.rank].sum(0)",
        "totals[: group.rank + 1].sum(0)",
        "a rank's own mass counts as before it",
    ),
    (
        WEIGHTS,
        "first = part.first_kv_head if isinstance(part, TextShard) else 0",
        "first = 0",
        "every rank has the first kv head",
    ),
    (
        MODEL,
        "given = tuple(map(self.group.spread, given))",
        "pass",
        "the projector's norm has no gradient across ranks",
    ),
]
