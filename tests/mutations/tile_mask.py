FILE = "nvlm_kernels/ops/attention/mask.py"
MUTATIONS = [
    (FILE, "seen = seen.maximum(since)", "seen = seen", "a new document sees the old one's images"),
    (FILE, "- _scatter(end, value, length)", "- 0", "a tag never ends"),
    (FILE, '"amax").cummax(1).values\n    since', '"amax")\n    since', "an image is seen by one row"),
    (FILE, "since = since.scatter_reduce", "since.scatter_reduce", "documents are not parted"),
    (FILE, "torch.where(tagged, inside(end_key), seen)", "seen", "a tag sees all tiles so far"),
    (FILE, "(number - 1) * tokens_per_tile,", "number * tokens_per_tile,", "from ids: the next tile's keys"),
    (FILE, "(hits * (tag_ids >= 0).sum(-1)).amax(-1)", "width", "from ids: every tag is as long as the longest"),
    (FILE, "torch.where(hits[..., last], ends", "torch.where(begins, ends", "from ids: every tag ends an image"),
    (FILE, "keys < intervals[..., 1:]", "keys <= intervals[..., 1:]", "one key too many in the dense form"),
]
