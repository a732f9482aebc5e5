TESTS = ("tests/engine/test_builds.py",)
FILE = "nvlm_runtime/engine/graphs.py"
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
]
