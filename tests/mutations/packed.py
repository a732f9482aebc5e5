TESTS = ("tests/checkpoint/test_packed.py", "-k", "not tracked")
FILE, COMPOSITE = "nvlm_runtime/checkpoint/packed.py", "nvlm_runtime/checkpoint/composite.py"
MUTATIONS = [
    (FILE, '"int4" if name.endswith(INT4_ENDS) else "int8"', '"int4"', "every linear is packed in int4"),
    (FILE, '"int4" if name.endswith(INT4_ENDS) else "int8"', '"int8"', "no linear is packed in int4"),
    (FILE, "given.shape != buffer.shape or", "", "a scale of another shape is not looked at"),
    (FILE, " or given.dtype != buffer.dtype", "", "a scale of another dtype is not looked at"),
    (FILE, "sorted(expected ^ set(stored))", "sorted(expected - set(stored))", "a tensor too many is not looked at"),
    (FILE, "sorted(expected ^ set(stored))", "sorted(set(stored) - expected)", "a missing tensor is not looked at"),
    (COMPOSITE, "linears = _linears(model) & set(tensors)", "linears = set()", "packed=True packs nothing"),
]
