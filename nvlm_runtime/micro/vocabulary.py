"""The micro models' tokenizer: byte-level BPE, 512 entries, whose merges know the questions and nothing else.

Documents print capitals and digits, and no merge joins those, so an answer is spelled one glyph a token.
"""

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPE

from nvlm_runtime.inputs.image import plan_tiles
from nvlm_runtime.inputs.prompt import tile_tags
from nvlm_runtime.inputs.tokenizer import QWEN2_PATTERN, Tokenizer
from nvlm_runtime.micro.document import GRIDS, make_document
from nvlm_runtime.micro.questions import questions

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>")


def _corpus() -> list[str]:
    lines = ["<Image><tile_1>", "system\nAnswer the questions.", "user\n", "assistant\n", "<Image></Image>\n"] * 50
    for cols, rows in GRIDS:
        lines.extend(tile_tags(plan_tiles(100 * cols, 100 * rows, 64), "1d", "<tile_global_thumbnail>"))
    for index in range(2000):
        for question in questions(make_document(f"vocabulary:{index}")):
            lines.append(question.text)
            if question.answer.islower():
                lines.append(question.answer)
    return lines


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Trains a tokenizer on the question templates; the same on every machine.

    Args:
        vocab_size: number of tokens, special ones included.

    Returns:
        The tokenizer.
    """
    bpe = BPE(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    return Tokenizer(bpe)
