TESTS = ("tests/engine/test_threads.py",)
FILE = "nvlm_runtime/engine/images.py"
MUTATIONS = [
    (
        FILE,
        "            pixel_values = picture.pixel_values\n",
        "            with self._lock:\n                pixel_values = picture.pixel_values\n",
        "the cache's lock is held while tiles are cut",
    ),
    (
        FILE,
        "found = self.cached(picture.key)  # another thread may have encoded it meanwhile",
        "found = None",
        "threads that want one image encode it each",
    ),
]
