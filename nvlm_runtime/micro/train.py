"""Trains a micro NVLM: the shared tower once, its features once, then the projector and decoder of one variant.

Everything is drawn from seeds. A work folder holds what the variants share and is reused when it is whole.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nvlm_runtime.presets import MICRO_VISION, PRESETS
from nvlm_runtime.micro.dataset import IGNORE, Batch, batches, write_features
from nvlm_runtime.micro.questions import KINDS
from nvlm_runtime.micro.tower import pretrain
from nvlm_runtime.micro.vocabulary import make_tokenizer
from nvlm_runtime.model import NVLMModel

Log = Callable[[str], None]


def init_weights(model: NVLMModel) -> None:
    """Unit-variance linears, smaller where they end a residual branch; gates open, as there is no text model to keep."""
    depth = (2 * len(model.language_model.layers)) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("vision_model"):
            scale = depth if name.endswith(("o_proj", "down_proj")) else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            nn.init.ones_(parameter)


def shared_tower(model: NVLMModel, work: Path, seed: int, steps: int, log: Log) -> None:
    """Loads the work folder's tower into the model, pretraining it first where there is none."""
    path = work / f"tower-{seed}.pt"
    if not path.exists():
        partial = path.with_suffix(".partial")
        torch.save(pretrain(MICRO_VISION, seed, log, steps).state_dict(), partial)
        partial.rename(path)
    model.vision_model.load_state_dict(torch.load(path, weights_only=True))
    model.vision_model.eval().requires_grad_(False)


class Score:
    """Exact answers a question kind, by teacher forcing: greedy decoding gives the answer iff every argmax is right."""

    def __init__(self):
        self.right = dict.fromkeys(KINDS, 0.0)
        self.asked = dict.fromkeys(KINDS, 1e-9)

    def add(self, batch: Batch, correct: torch.Tensor) -> None:
        for row, kinds in enumerate(batch.kinds):
            for kind, first, end in kinds:
                self.right[kind] = 0.98 * self.right[kind] + bool(correct[row, first:end].all())
                self.asked[kind] = 0.98 * self.asked[kind] + 1

    def __str__(self) -> str:
        return " ".join(f"{kind} {self.right[kind] / self.asked[kind]:.2f}" for kind in KINDS)


def train(
    variant: str,
    seed: int,
    work: Path,
    log: Log,
    steps: int = 4000,
    tower_steps: int = 2000,
    num_documents: int = 30000,
    batch: int = 32,
    num_questions: int = 8,
    lr: float = 2e-3,
) -> NVLMModel:
    """A trained micro model of this variant ("d", "x" or "h"), in fp32."""
    config = PRESETS[f"micro-{variant}"]
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model, tokenizer = NVLMModel(config), make_tokenizer(config.text.vocab_size)
    init_weights(model)
    shared_tower(model, work, seed, tower_steps, log)
    features = work / f"features-{seed}-{num_documents}.npy"
    if not features.exists():
        write_features(model, features, seed, num_documents, log)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    score = Score()
    stream = batches(config, tokenizer, features, seed, num_documents, batch, num_questions)
    for step, data in zip(range(steps), stream):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 200, 1 - step / steps)
        hidden = model(data.input_ids, data.layouts, data.features)
        answers = data.labels != IGNORE
        logits, labels = model.language_model.logits(hidden[answers]), data.labels[answers]
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        correct = answers.clone()
        correct[answers] = logits.argmax(-1) == labels
        score.add(data, correct)
        if step % 25 == 0 or step == steps - 1:
            log(f"micro-{variant} step {step}/{steps} loss {loss.item():.3f} {score}")
    return model.eval()
