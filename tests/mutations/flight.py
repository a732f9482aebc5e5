TESTS = ("tests/engine/test_in_flight.py",)
FILE = "nvlm_runtime/engine/batch.py"
MUTATIONS = [
    (
        FILE,
        "            if self.rows[slot] is not row:\n                continue  # it has left since\n",
        "",
        "a row that has left takes in the token of a step that was under way",
    ),
    (
        FILE,
        "row.limit > len(row.token_ids) + (id(row) in under_way)",
        "row.limit > len(row.token_ids)",
        "a step is launched behind the last token a row may draw",
    ),
    (
        FILE,
        "            return Flight.of(due, began, self.slots.drawn)",
        "            return Flight(due, began, self.slots.drawn, None)",
        "tokens are read from the buffer that the next step writes",
    ),
    (
        FILE,
        "            self._flight, flight = flight, before\n",
        "            pass\n",
        "the host waits for every step before it launches the next",
    ),
    (
        "nvlm_runtime/engine/graphs.py",
        "    ahead = True\n",
        "    ahead = False\n",
        "static stages do not run ahead",
    ),
]
