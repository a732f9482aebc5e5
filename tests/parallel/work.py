"""What the ranks of a test do; each returns what the test looks at. One start of processes serves many checks."""

import collections
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nvlm_runtime.checkpoint.weights import load as load_weights
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.past import make_past
from nvlm_runtime.parallel.group import SOLO, Group
from tests.model.test_model import picture
from tests.parallel.small import load

LARGE, SMALL = picture((96, 64)), picture((32, 32), 1)
SAMPLED = [{"temperature": 0.8, "seed": 5}, {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 6}]
SAMPLED += [{"temperature": 1.5, "top_k": 7, "top_p": 0.9, "seed": 7}]


def answers(model: NVLM) -> tuple[list[list[int]], Tensor]:
    """Token ids, greedy in a batch, sampled and drafted alone; and the logits of one whole forward."""
    asked = [("What is it?", [LARGE]), ("Hello?", []), ("First <image> and <image>?", [SMALL, LARGE])]
    prepared = [model.prepare(text, images) for text, images in asked]
    outputs = model.generate(prepared, params=GenerationParams(max_new_tokens=8, ignore_eos=True))
    outputs += [model.generate("What is it?", [LARGE], max_new_tokens=6, ignore_eos=True, **given) for given in SAMPLED]
    outputs.append(model.generate("one two three one two", max_new_tokens=8, ignore_eos=True))
    ids = prepared[0].input_ids
    return [output.token_ids for output in outputs], model.logits(ids, [LARGE])


def gradients(folder: Path, group: Group = SOLO) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In fp64: the gradients of every parameter, vision included, and the parameters after two steps of AdamW."""
    engine = load(folder, group=group, vision_split="heads")
    prepared = engine.prepare("What is it?", [LARGE])
    model = engine.model.double().train()
    ids = torch.tensor([prepared.input_ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    found: dict[str, Tensor] = {}
    for _ in range(2):
        features = model.encode(prepared.images[0].pixel_values.double())
        hidden = model(ids, [prepared.layout], [features])
        loss = F.cross_entropy(model.language_model.logits(hidden)[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        found = found or {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
    return found, {name: parameter.detach() for name, parameter in model.named_parameters()}


def collectives(group: Group, folder: Path, vision_split: str) -> dict[str, dict[tuple[str, int], int]]:
    """Of each part: (name, length of the last axis) of every collective, and how often."""
    model, _ = load_weights(folder, group=group, vision_split=vision_split)
    calls: collections.Counter = collections.Counter()
    names = [name for name in ("all_reduce", "all_gather", "broadcast", "reduce", "all_to_all", "reduce_scatter")]
    originals = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name, args[name == "all_gather"].shape[-1]] += 1
            return originals[name](*args, **kwargs)

        return call

    found = {}
    decoder = model.language_model
    x = torch.zeros(1, 3, model.config.text.hidden_size)
    parts = {
        "encode": lambda: model.encode(torch.zeros(3, 3, 32, 32)),
        "project": lambda: model.project(Features(torch.zeros(1, 16, model.config.vision.hidden_size))),
        "embed": lambda: decoder.embed_tokens(torch.tensor([[1, 2, 3]])),
        "prefill": lambda: decoder(x, torch.arange(3)[None], make_past(torch.arange(3)[None], "sdpa")),
        "logits": lambda: decoder.logits(x),
    }
    for name in names:
        setattr(dist, name, counted(name))
    try:
        with torch.inference_mode():
            for part, run in parts.items():
                run()
                found[part] = dict(calls)
                calls.clear()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return found


def everything(group: Group, folders: list[Path], splits: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for split in splits:
        models = [load(folder, group=group, vision_split=split, speculate=2) for folder in folders]
        found["answers", split] = [answers(model) for model in models]
        found["collectives", split] = collectives(group, folders[0], split)
    static = [load(folder, group=group, graphs=True, chunk=32) for folder in folders]
    found["static answers"] = [answers(model) for model in static]
    free = models[0].generate("Hello?", max_new_tokens=12, ignore_eos=True, temperature=5.0)
    found["free"] = free.token_ids
    found["gradients"] = [gradients(folder, group) for folder in folders]
    try:
        load(folders[min(group.rank, 1)], group=group)
    except ValueError as error:
        found["refused"] = str(error)
    return found
