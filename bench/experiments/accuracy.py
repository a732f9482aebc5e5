"""What quantisation costs in answers: python -m bench.experiments.accuracy [--samples 200]

Exact greedy answers of the micro models on rendered documents of a fresh seed (`nvlm eval micro`), with weights as they
are shipped, in int8, in int4, and with an int8 tower; and the bytes of the weights each keeps.
"""

import argparse
from pathlib import Path

from bench.reports import report
from nvlm_runtime import NVLM
from nvlm_runtime.micro.evaluate import evaluate

SCHEMES: dict[str, dict[str, str]] = {
    "as shipped": {},
    "int8 weights": {"decoder": "int8", "cross": "int8", "head": "int8"},
    "int4 weights": {"decoder": "int4", "cross": "int4", "head": "int4"},
    "int8 tower": {"vision": "int8_dynamic"},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--json", type=Path, help="default: bench/results/accuracy.json")
    args = parser.parse_args()
    rows = []
    for name in ("micro-d", "micro-x", "micro-h"):
        for words, scheme in SCHEMES.items():
            given = {part: method for part, method in scheme.items() if (name, part) != ("micro-d", "cross")}
            model = NVLM.load(name, quantize=given, reuse=False)
            found = evaluate(model, args.seed, args.samples)
            tensors = {t.data_ptr(): t for t in (*model.model.parameters(), *model.model.buffers())}
            num_bytes = sum(t.nbytes for t in tensors.values())
            row = {"model": name, "weights": words, "exact": found["accuracy"], "samples": args.samples}
            rows.append(row | {"seed": args.seed, "bytes": num_bytes})
            print(f"{name} {words}: {found['accuracy']:.1%}", flush=True)
    print()
    cells = [(row["model"], row["weights"], f"{row['exact']:.1%}", row["bytes"] / 1e6) for row in rows]
    print(report.table(("model", "weights", "exact", "MB"), cells))
    report.write(args.json, "accuracy", rows, args.samples < 200)


if __name__ == "__main__":
    main()
