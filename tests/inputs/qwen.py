"""The two vocabularies the tests speak: Qwen's rank file, carried by the dashscope wheel, and a byte-level BPE of 512.

dashscope is never imported, only its data file is read. Without it the tests fail: golden ids are nothing to skip.
"""

from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nvlm_runtime.inputs.tokenizer import Tokenizer

TINY_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
CORPUS = [
    "system\nAnswer the questions.",
    "user\nWhat is in the picture?",
    "assistant\nA red square.",
    "<tile_1></Image>",
]


def rank_file() -> Path:
    """PackageNotFoundError without dashscope, FileNotFoundError without its file."""
    path = Path(str(distribution("dashscope").locate_file("dashscope/resources/qwen.tiktoken")))
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; `pip install --no-deps dashscope==2.0.2` brings it")
    return path


@lru_cache(maxsize=1)
def qwen_tokenizer() -> Tokenizer:
    return Tokenizer.from_tiktoken(rank_file())


def tiny_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=TINY_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return backend


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_backend())


VOCABULARIES = {"qwen": qwen_tokenizer, "tiny": tiny_tokenizer}
