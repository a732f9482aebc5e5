"""Trains a micro NVLM: the shared tower once, its features once, then the projector and decoder of one variant.

Everything is drawn from seeds. A work folder holds what the variants share, under names that say what it was made
from, and is reused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_runtime.micro.dataset import IGNORE, Batch, batches, documents_hash, write_features
from nvlm_runtime.micro.questions import KINDS
from nvlm_runtime.micro.tower import DenseHeads, pretrain
from nvlm_runtime.micro.vocabulary import make_tokenizer
from nvlm_runtime.model import NVLMModel
from nvlm_runtime.presets import MICRO_VISION, PRESETS
from nvlm_runtime.weights import save

Log = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Sizes of a training run.

    batch: documents a step; num_questions: the most asked of one document at a time; num_short: steps on documents of
    two or three tiles, which come first; num_transcribed: steps whose conversations end with a transcription.
    """

    steps: int = 5500
    tower_steps: int = 3000
    num_documents: int = 20000
    batch: int = 16
    num_questions: int = 8
    num_short: int = 600
    num_transcribed: int = 2000
    lr: float = 2e-3


def init_weights(model: NVLMModel) -> None:
    """Unit-variance linears, smaller where they end a residual branch; open gates, with no text model to keep."""
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


def shared_tower(model: NVLMModel, work: Path, seed: int, steps: int, log: Log) -> DenseHeads:
    """Loads the work folder's tower into the model, pretraining it first where there is none. Returns its heads."""
    path = work / f"tower-{seed}-{steps}-{documents_hash(seed)}.pt"
    if not path.exists():
        partial = path.with_suffix(".partial")
        tower, heads = pretrain(MICRO_VISION, seed, log, steps)
        torch.save({"tower": tower.state_dict(), "heads": heads.state_dict()}, partial)
        partial.rename(path)
    state = torch.load(path, weights_only=True)
    heads = DenseHeads(MICRO_VISION.hidden_size)
    heads.load_state_dict(state["heads"])
    model.vision_model.load_state_dict(state["tower"])
    model.vision_model.eval().requires_grad_(False)
    return heads


@torch.no_grad()
def init_projector(model: NVLMModel, heads: DenseHeads, features: Tensor) -> None:
    """Lets the projector's first linear begin with what the heads read from each of a token's four patches.

    A layer too narrow for all of it (NVLM-X's) takes random mixtures. The last linear is scaled so that image tokens of
    these features [N, 4P, C] have the embeddings' standard deviation: cross-attention does not norm its keys, and
    larger ones saturate it before it has learned anything.
    """
    first, last = model.mlp1[1], model.mlp1[-1]
    readout = torch.block_diag(*[heads.readout()] * 4)  # [4 * targets, 4 * width]
    if len(readout) <= len(first.weight):
        first.weight[: len(readout)] = readout
    else:
        mixture = torch.randn(len(first.weight), len(readout)) * len(readout) ** -0.5
        first.weight.copy_(mixture @ readout)
    last.weight *= model.language_model.embed_tokens.weight.std() / model.project(features).std()


class Score:
    """Exact answers a question kind over the last fifty batches or so, by teacher forcing.

    Greedy decoding gives the answer if and only if every argmax is right.
    """

    def __init__(self):
        self.right = dict.fromkeys((*KINDS, "page"), 0.0)
        self.asked = dict.fromkeys((*KINDS, "page"), 1e-9)

    def add(self, batch: Batch, correct: torch.Tensor) -> None:
        for kind in self.asked:
            self.right[kind] *= 0.98
            self.asked[kind] *= 0.98
        for row, kinds in enumerate(batch.kinds):
            for kind, first, end in kinds:
                self.right[kind] += bool(correct[row, first:end].all())
                self.asked[kind] += 1

    def __str__(self) -> str:
        return " ".join(f"{kind} {self.right[kind] / self.asked[kind]:.2f}" for kind in self.asked)


def train_micro(variant: str, seed: int, out: Path, work: Path, recipe: Recipe, log: Log) -> None:
    """Trains a micro model of a variant ("d", "x" or "h") and writes its checkpoint to `out`, weights in bfloat16."""
    config = PRESETS[f"micro-{variant}"]
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model, tokenizer = NVLMModel(config), make_tokenizer(config.text.vocab_size)
    init_weights(model)
    heads = shared_tower(model, work, seed, recipe.tower_steps, log)
    documents = f"{seed}-{recipe.tower_steps}-{recipe.num_documents}-{documents_hash(seed)}"
    features = work / f"features-{documents}.npy"
    if not features.exists():
        write_features(model, features, seed, recipe.num_documents, log)
    init_projector(model, heads, torch.from_numpy(np.load(features, mmap_mode="r")[:256].astype(np.float32)))
    stream = batches(
        config,
        tokenizer,
        features,
        seed,
        recipe.num_documents,
        recipe.batch,
        recipe.num_questions,
        recipe.num_short,
        recipe.num_transcribed,
    )
    train_decoder(model, stream, recipe, log)
    save(model, out, dtype=torch.bfloat16, run_dtype=torch.float32)
    tokenizer.save(out)


def train_decoder(model: NVLMModel, stream: Iterator[Batch], recipe: Recipe, log: Log) -> None:
    """AdamW, linear decay after a warm-up, on everything but the tower; leaves the model in eval mode."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    score = Score()
    for step, data in zip(range(recipe.steps), stream):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min((step + 1) / 200, 1 - step / recipe.steps)
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
        if step % 25 == 0 or step == recipe.steps - 1:
            log(f"step {step}/{recipe.steps} loss {loss.item():.3f} {score}")
    model.eval()
