TESTS = ("tests/model/test_features.py",)
FILE = "nvlm_runtime/model/features.py"
MUTATIONS = [
    (FILE, "self.statistics.split(sizes)", "self.statistics.flip(0).split(sizes)", "statistics of other tiles"),
    (FILE, "torch.cat(statistics) if", "torch.cat(statistics[::-1]) if", "statistics joined the other way round"),
    (FILE, "        if len(parts) == 1:\n            return parts[0]\n", "", "one part is copied"),
]
