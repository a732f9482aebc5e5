VISION, MODEL = "nvlm_runtime/model/vision.py", "nvlm_runtime/model/model.py"
MUTATIONS = [
    (VISION, "else statistics[:, 1:]", "else statistics[:, :-1]", "statistics from the CLS token's row on"),
    (MODEL, "            statistics=features.statistics,\n", "", "the projector is not given its statistics"),
]
