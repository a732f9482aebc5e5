TESTS = ("tests/engine/test_sampling.py",)
FILE = "nvlm_runtime/engine/sampling.py"
MUTATIONS = [
    (
        FILE,
        "logits = logits[:, : sampling.seen.shape[1]].float()",
        "logits = logits.float()",
        "trap 23: padding rows of the embedding are drawn",
    ),
    (
        FILE,
        "before = ordered.cumsum(-1) - ordered",
        "before = ordered.cumsum(-1)",
        "top-p drops the token that crosses it",
    ),
    (FILE, "logits < ordered.gather(-1, k - 1)", "logits <= ordered.gather(-1, k - 1)", "top-k keeps one less"),
    (
        FILE,
        "logits / penalty, logits * penalty",
        "logits / penalty, logits / penalty",
        "the penalty lifts negative logits",
    ),
    (FILE, "sampling.seen.scatter_(1, tokens[:, None], True)", "pass", "the answer's own tokens are not penalised"),
    (
        FILE,
        "uniform(sampling.seed, positions)",
        "uniform(sampling.seed, positions * 0)",
        "every position draws the same number",
    ),
]
