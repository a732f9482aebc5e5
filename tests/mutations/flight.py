TESTS = ("tests/engine/test_in_flight.py",)
FILE = "nvlm_runtime/engine/batch.py"
MUTATIONS = [
    (
        FILE,
        "            if slot.request is not request:\n                continue  # it has left since\n",
        "",
        "a row that has left takes in the token of a step that was under way",
    ),
    (
        FILE,
        "request.limit > len(request.token_ids) + (id(request) in drawing)",
        "request.limit > len(request.token_ids)",
        "a step is launched behind the last token a row may draw",
    ),
    (
        FILE,
        "            return InFlightStep.of(due, began, self.slots.drawn)",
        "            return InFlightStep(due, began, self.slots.drawn, None)",
        "tokens are read from the buffer that the next step writes",
    ),
    (
        FILE,
        "            self._in_flight, step = step, before\n",
        "            pass\n",
        "the host waits for every step before it launches the next",
    ),
    (
        "nvlm_runtime/engine/nvlm.py",
        "self._async_scheduling = captured",
        "self._async_scheduling = False",
        "captured steps are not scheduled ahead",
    ),
]
