TESTS = ("tests/inputs/test_tokenizer.py",)
FILE = "nvlm_runtime/inputs/tokenizer.py"
MUTATIONS = [
    (FILE, '    "<|video_pad|>",\n)', '    "<|video_pad|>",\n    "<tile_1>",\n)', "trap 16: a tag is a special token"),
    (
        FILE,
        "backend.encode_special_tokens = True",
        "backend.encode_special_tokens = False",
        "trap 19: typed tokens are special",
    ),
    (
        FILE,
        'self.special("<|im_end|>" if "<|im_end|>" in self._special else "<|endoftext|>")',
        'self.special("<|endoftext|>")',
        "trap 21: <|endoftext|> ends a turn",
    ),
    (
        FILE,
        '    "<|vision_start|>",\n    "<|vision_end|>",\n',
        '    "<|vision_end|>",\n    "<|vision_start|>",\n',
        "ids of the vision tokens in another order",
    ),
    (FILE, "+|\\p{N}| ?", "+|\\p{N}{1,3}| ?", "digits in groups of three"),
    (FILE, "backend.normalizer = normalizers.NFC()", "pass", "no NFC"),
    (FILE, "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|", "| ?\\p{L}+|", "GPT-2's pattern of words"),
    (FILE, "+[\\r\\n]*|\\s*[\\r\\n]+|", "+|\\s*[\\r\\n]+|", "no newline behind punctuation: </Image> + newline"),
    (
        FILE,
        "backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))",
        "backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges[::-1]))",
        "merges from the last to the first",
    ),
    (FILE, "skip_special_tokens=True)", "skip_special_tokens=False)", "special tokens are written"),
]
