"""Text to token ids and back, by the `tokenizers` library, from any of `FILES`.

Text is only ever text: the name of a special token inside it is encoded as ordinary characters, so nobody who types
"<|im_end|>" can end a turn. The id of a special token comes from `special(name)`, by its name, because published files
disagree on the numbers, or from `split`, which is for what a chat template wrote. Sources: Qwen's tokenization_qwen.py
and the Qwen2 tokenizer.json (pattern, NFC, ids).
"""

import base64
import json
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

FILES = ("tokenizer.json", "vocab.json + merges.txt + tokenizer_config.json", "qwen.tiktoken")
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPECIALS = (  # their ids follow the ranks, in this order: 151643 ... 151656 in Qwen2-VL and Qwen2.5
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class Tokenizer:
    """A `tokenizers` backend that never finds a special token in text. `vocab_size` is one more than the largest id."""

    def __init__(self, backend: tokenizers.Tokenizer):
        added = backend.get_added_tokens_decoder()
        # some publishers mark control tokens as ordinary added ones, which text could then forge
        control = [t.content for t in added.values() if t.content.startswith("<|") and t.content.endswith("|>")]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._special_ids = frozenset(self._special.values())
        # a name with a blank in it is not looked for: the blank could be a user's, see template.py
        names = [name for name in self._special if not re.search(r"\s", name)]
        self._names = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads the first of `FILES` that a folder holds.

        Args:
            folder: a checkpoint's folder.

        Returns:
            The tokenizer.

        Raises:
            ValueError: the folder holds none of `FILES`, holds one in part, or holds a damaged one.
        """
        folder = Path(folder)
        try:
            if (folder / "tokenizer.json").is_file():
                return cls(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                return cls(_from_vocab(folder))
            if (folder / "qwen.tiktoken").is_file():
                return cls.from_tiktoken(folder / "qwen.tiktoken")
        except Exception as error:  # the library raises nothing narrower for a damaged file
            raise ValueError(f"the tokenizer files of {folder} are damaged: {error}") from error
        raise ValueError(f"no tokenizer in {folder}: it needs one of {', or '.join(FILES)}")

    @classmethod
    def from_tiktoken(cls, path: str | Path) -> "Tokenizer":
        """Reads Qwen's file of ranks.

        Args:
            path: a file whose lines are a token in base64 and its rank, from 0 without gaps, all 256 bytes among them.

        Returns:
            The tokenizer, with `QWEN2_SPECIALS` after the last rank.

        Raises:
            ValueError: ranks are missing, or a token has no merge.

        Source: Qwen's tokenization_qwen.py.
        """
        lines = Path(path).read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError(f"{path}: the ranks must be 0, 1, 2, ... and hold all 256 bytes, got {len(ranks)} of them")
        letters = _byte_letters()
        vocab = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
        merges = []
        for token in sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__):
            pair = _merge_of(token, ranks)
            if pair is None:
                raise ValueError(f"{path}: no two tokens of lower rank make {token!r}")
            merges.append(tuple("".join(letters[b] for b in part) for part in pair))
        return cls(_qwen2(vocab, merges, {name: len(ranks) + i for i, name in enumerate(QWEN2_SPECIALS)}))

    @property
    def eos_id(self) -> int:
        """<|im_end|>, which ends a turn; <|endoftext|> where there is none."""
        return self.special("<|im_end|>" if "<|im_end|>" in self._special else "<|endoftext|>")

    def special(self, name: str) -> int:
        """Returns the id of a special token.

        Args:
            name: its text, such as "<|im_end|>".

        Raises:
            ValueError: the vocabulary has no special token of that name.
        """
        if name not in self._special:
            raise ValueError(f"the tokenizer has no special token {name!r}, only {sorted(self._special)}")
        return self._special[name]

    @property
    def bos(self) -> str | None:
        """The special token that the file's own post-processor puts before every text, None where it puts none."""
        ids = self._backend.encode("a", add_special_tokens=True).ids
        return self._backend.id_to_token(ids[0]) if ids and ids[0] in self._special_ids else None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Lists the names that are no special tokens here.

        Args:
            names: texts such as "<|im_end|>".

        Returns:
            Those of `names` that are missing, in their order.
        """
        return [name for name in names if name not in self._special]

    def with_specials(self, names: Iterable[str]) -> "Tokenizer":
        """Copies this tokenizer and adds special tokens after its last id, in order.

        Args:
            names: texts of the tokens. Those that are special already keep their ids.

        Returns:
            A new tokenizer.

        Raises:
            ValueError: ids have gaps, so that a new token would get an id below `vocab_size`.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        names = self.missing(names)
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        made = Tokenizer(backend)
        known = self._backend.get_vocab(with_added_tokens=True)
        new = [made.special(name) for name in names if name not in known]
        if new != list(range(self.vocab_size, self.vocab_size + len(new))):
            raise ValueError(
                f"the tokenizer has {len(known)} tokens and ids up to {self.vocab_size - 1}: between them {names} "
                f"would get the ids {new}"
            )
        return made

    def encode(self, text: str) -> list[int]:
        """Encodes a text as ordinary tokens, with no BOS.

        Args:
            text: names of special tokens in it are ordinary characters.

        Returns:
            Token ids.

        Raises:
            ValueError: `text` is no Unicode text (a lone surrogate, or no string).
        """
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(f"encode needs Unicode text, got {text!r:.60}") from error

    def split(self, text: str) -> list[str | int]:
        """Cuts a trusted text at the names of special tokens.

        Args:
            text: what a chat template wrote. Never what a user typed.

        Returns:
            The texts between the names, none empty, and the ids of the names, in order.
        """
        parts: list[str | int] = []
        end = 0
        for match in self._names.finditer(text):
            parts += [text[end : match.start()], self._special[match.group()]]
            end = match.end()
        return [part for part in (*parts, text[end:]) if part != ""]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes token ids.

        Args:
            ids: token ids. Special tokens, and ids above the vocabulary (padding of an embedding), are skipped.

        Returns:
            The text.
        """
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def is_text(self, token_id: int) -> bool:
        """Returns whether `decode` writes anything for this id.

        Args:
            token_id: any id, also one above the vocabulary.
        """
        return token_id not in self._special_ids and self._backend.id_to_token(token_id) is not None

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json.

        Args:
            folder: an existing folder.
        """
        self._backend.save(str(Path(folder) / "tokenizer.json"))


class Detokenizer:
    """Decodes one id at a time: the concatenation of what `push` and `flush` return is `decode` of all the ids.

    Exact for byte-level vocabularies, whatever the bytes. A character of UTF-8 has at most 4 bytes and a token at least
    one, so only the last 4 tokens can still change the text; and of that only a last U+FFFD, which stands for the
    unfinished character, is held back.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tail: list[int] = []
        self._num_sent = 0  # characters of decode(tail) that were returned

    def push(self, token_id: int) -> str:
        """Takes the next id.

        Args:
            token_id: any id. One that is no text changes nothing.

        Returns:
            The text that is now certain, perhaps "".
        """
        if not self._tokenizer.is_text(token_id):
            return ""
        self._tail.append(token_id)
        text = self._tokenizer.decode(self._tail)
        held = int(text.endswith("\ufffd"))
        new = text[self._num_sent : len(text) - held]
        self._num_sent = len(text) - held
        if len(self._tail) > 8:
            self._tail = self._tail[-4:]
            self._num_sent = len(self._tokenizer.decode(self._tail)) - held
        return new

    def flush(self) -> str:
        """Returns what was held back, and starts anew."""
        text = self._tokenizer.decode(self._tail)[self._num_sent :]
        self._tail, self._num_sent = [], 0
        return text


def _from_vocab(folder: Path) -> tokenizers.Tokenizer:
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        raise ValueError(f"{folder} has vocab.json and merges.txt but no tokenizer_config.json to name <|im_end|>")
    entries = json.loads(config.read_text("utf-8")).get("added_tokens_decoder", {})
    specials = {entry["content"]: int(token_id) for token_id, entry in entries.items()}
    if "<|im_end|>" not in specials:
        raise ValueError(f"{config}: added_tokens_decoder must hold <|im_end|>, got {sorted(specials)}")
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    ordinary = frozenset(entry["content"] for entry in entries.values() if not entry.get("special", False))
    return _qwen2(vocab, merges, specials, ordinary)


def _qwen2(
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    added: Mapping[str, int],
    ordinary: frozenset[str] = frozenset(),
) -> tokenizers.Tokenizer:
    """The Qwen2 pipeline. Added tokens stand in the vocabulary too, so that they keep their ids across gaps."""
    vocab = {**vocab, **added}
    if len(set(vocab.values())) != len(vocab):
        raise ValueError(f"two tokens share an id; the added tokens are {dict(added)}")
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    for name in added:
        token = AddedToken(name, special=name not in ordinary, normalized=False)
        (backend.add_tokens if name in ordinary else backend.add_special_tokens)([token])
    return backend


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself if it prints, else the next code point from 256 up."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(b) if b in printing else chr(next(rest)) for b in range(256)]


def _merge_of(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The last merge that makes `token`: its byte-pair encoding by lower ranks, which must leave two parts."""
    limit = ranks[token]
    splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    splits = [pair for pair in splits if ranks[pair[0]] < limit and ranks[pair[1]] < limit]
    if len(splits) < 2:
        return splits[0] if splits else None
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(a + b, limit) for a, b in pairwise(parts)]
        place = min(range(len(merged)), key=merged.__getitem__)
        if merged[place] >= limit:
            return None
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]
