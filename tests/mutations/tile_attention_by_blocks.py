TESTS = ("tests/kernels/test_tile_attention.py",)
FILE = "nvlm_kernels/ops/attention/tile.py"
MUTATIONS = [
    (FILE, "& (reached <= ahead)", "", "documents are parted in their middle"),
    (FILE, "cuts = 1 + torch.nonzero", "cuts = 0 * torch.nonzero", "a document begins at the row's first token"),
    (FILE, "torch.where(sees, end, 0).cummax(0).values[:-1]", "end[:-1]", "only the row before is looked at"),
    (FILE, "ahead[cuts - 1].tolist()", "(ahead[cuts - 1] + 1).tolist()", "a document's first key is the one before's"),
    (
        FILE,
        "tile_attention_ref(qs, ks, vs, seen - first)",
        "tile_attention_ref(qs, ks, vs, seen)",
        "intervals are not moved",
    ),
    (FILE, "by_blocks = trained and", "by_blocks = False and", "documents are not parted"),
]
