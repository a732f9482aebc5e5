TESTS = ("tests/training/test_share_reader.py",)
READER = "nvlm_runtime/training/share_reader.py"
MUTATIONS = [
    (READER, "_IndexUnpickler(io.BytesIO(raw)).load()", "pickle.loads(raw)", "the index runs code"),
    (READER, "def load_bytes", "def _load_bytes", "an entry that is a pickle is unpickled"),
    (READER, "place.relative_path not in names", "not place.relative_path", "files outside the folder are read"),
]
