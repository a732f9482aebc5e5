FILE = "bench/proofs/interpreter.py"
MUTATIONS = [
    (FILE, "inside[inside] = self.live[at[inside]]", "pass", "a gap of a tensor may be touched"),
    (FILE, "(who != NOBODY) & (who != program)", "(who == MANY) & (who != program)", "the writer is not remembered"),
    (FILE, '([self.reader[at]] if kind == "stored" else [])', "[]", "the reader is not remembered"),
    (FILE, 'if kind == "stored" and len(left) < len(touched):', "if False:", "lanes may share an address"),
    (
        FILE,
        "np.nan if np.issubdtype(dtype, np.floating)",
        "0 if np.issubdtype(dtype, np.floating)",
        "masked lanes are 0",
    ),
]
