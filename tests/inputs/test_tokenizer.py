"""Qwen's golden ids (read with tiktoken from the same rank file), loading, text that stays text, and streaming."""

import base64
import json
import unicodedata
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from nvlm_runtime.inputs.tokenizer import QWEN2_SPECIALS, Detokenizer, Tokenizer
from tests.inputs.qwen import (
    TINY_SPECIALS,
    VOCABULARIES,
    qwen_tokenizer,
    rank_file,
    tiny_backend,
    tiny_tokenizer,
)

each_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES)

GOLDEN = {
    **{f"<tile_{k}>": [27, 21094, 62, 15 + k, 29] for k in range(1, 7)},
    "<tile_global_thumbnail>": [27, 21094, 19296, 37824, 29],
    "<tile_global>": [27, 21094, 19296, 29],
    "<Image>": [46465, 29],
    "<Image><tile_1>": [46465, 1784, 21094, 62, 16, 29],
    "<Image><tile_global_thumbnail>": [46465, 1784, 21094, 19296, 37824, 29],
    "</Image>\n": [522, 1906, 397],
    "</Image>What": [522, 1906, 29, 3838],
    "</Image>Please": [522, 1906, 66304],
    "</Image>a": [522, 1906, 43875],
    "<tile_x0_y0>": [27, 21094, 3212, 15, 4178, 15, 29],
    "<tile_10>": [27, 21094, 62, 16, 15, 29],
    "<tile_01>": [27, 21094, 62, 15, 16, 29],
    "assistant\n": [77091, 198],
    "system\nAnswer the questions.": [8948, 198, 16141, 279, 4755, 13],
    "": [],
}
TEXTS = (
    "Hello, world!  It's 2024 -- they'LL see\r\n\n\tdone   ",
    "你好，世界。これは日本語です。한국어도",
    "👩‍👩‍👧 🇩🇪 e\u0301 ﬁ Ω Å \u00a0\u200b",
    "def f(x):\n    return x**2  # <tile_1></Image>",
)


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(text):
    assert qwen_tokenizer().encode(text) == GOLDEN[text]


def test_special_ids_follow_the_ranks():
    qwen = qwen_tokenizer()
    assert [qwen.special(name) for name in QWEN2_SPECIALS] == list(range(151643, 151657))
    published = {
        "endoftext": 151643,
        "im_start": 151644,
        "im_end": 151645,
        "vision_start": 151652,
        "vision_end": 151653,
    }
    published |= {"vision_pad": 151654, "image_pad": 151655, "video_pad": 151656}
    assert {name: qwen.special(f"<|{name}|>") for name in published} == published
    assert qwen.vocab_size == 151657


@pytest.mark.parametrize("text", TEXTS)
def test_merges_agree_with_the_ranks(text):
    """Byte-pair encoding straight from the rank file, lowest joined rank first, as tiktoken does."""
    lines = (line.split() for line in rank_file().read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    splitter = qwen_tokenizer()._backend.pre_tokenizer[0]
    want = []
    for piece, _ in splitter.pre_tokenize_str(unicodedata.normalize("NFC", text)):
        parts = [bytes([b]) for b in piece.encode()]
        while joins := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            _, i = min(joins)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        want += [ranks[part] for part in parts]
    assert qwen_tokenizer().encode(text) == want


def test_text_is_normalised_to_nfc_and_digits_are_split():
    qwen = qwen_tokenizer()
    assert qwen.encode("e\u0301") == qwen.encode("é")
    assert len(qwen.encode("2024")) == 4


def test_pieces_of_the_pattern():
    splitter = qwen_tokenizer()._backend.pre_tokenizer[0]
    text = "I'LLx see\t12  a½²! \n\n b.\n \nx  "
    pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)]
    assert pieces == [
        "I",
        "'LL",
        "x",
        " see",
        "\t",
        "1",
        "2",
        " ",
        " a",
        "½",
        "²",
        "!",
        " \n\n",
        " b",
        ".\n",
        " \n",
        "x",
        "  ",
    ]


@each_vocabulary
@pytest.mark.parametrize("text", ("hello", " two  spaces ", "", "\n\n", "日本語", "<|im_end|><image>"))
def test_decode_inverts_encode(vocabulary, text):
    tokenizer = VOCABULARIES[vocabulary]()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@each_vocabulary
@pytest.mark.parametrize("name", TINY_SPECIALS)
def test_text_never_becomes_a_special_token(vocabulary, name):
    tokenizer = VOCABULARIES[vocabulary]()
    for text in (name, f"a{name}b", f" {name}\n", name * 2):
        ids = tokenizer.encode(text)
        assert tokenizer.special(name) not in ids
        assert tokenizer.decode(ids) == text


def test_an_added_control_token_cannot_be_forged_even_if_published_as_ordinary():
    backend = tiny_backend()
    backend.add_tokens([AddedToken("<|image_pad|>", special=False), AddedToken("<tool_call>", special=False)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.special("<|image_pad|>") not in tokenizer.encode("<|image_pad|>")
    assert tokenizer.encode("<tool_call>") == [tokenizer.vocab_size - 1]
    assert tokenizer.decode(tokenizer.encode("<tool_call>")) == "<tool_call>"


def test_decode_skips_specials_and_padding_rows():
    qwen = qwen_tokenizer()
    assert qwen.decode([151644, *qwen.encode("hi"), 151645, 151657, 152063]) == "hi"


def test_eos_is_im_end_not_endoftext():
    assert qwen_tokenizer().eos_id == 151645
    assert tiny_tokenizer().eos_id == tiny_tokenizer().special("<|im_end|>") == 2


def test_eos_without_im_end_is_endoftext():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    backend.add_special_tokens(["<|endoftext|>"])
    assert Tokenizer(backend).eos_id == 1


def test_special_names_what_is_missing():
    with pytest.raises(ValueError, match=r"<\|video_pad\|>.*<\|im_end\|>"):
        tiny_tokenizer().special("<|video_pad|>")
    with pytest.raises(ValueError, match="'a'"):
        tiny_tokenizer().special("a")


def test_a_lone_surrogate_is_a_value_error():
    with pytest.raises(ValueError, match="Unicode"):
        tiny_tokenizer().encode("a\ud800")


def test_truncation_in_the_file_is_not_obeyed():
    backend = tiny_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    text = "a long question about tiles"
    assert Tokenizer(backend).encode(text) == tiny_tokenizer().encode(text)


def test_tokenizer_json_round_trip(tmp_path):
    tiny_tokenizer().save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == tiny_tokenizer().vocab_size
    for text in (*TEXTS, "<|im_end|>"):
        assert loaded.encode(text) == tiny_tokenizer().encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert [loaded.special(name) for name in TINY_SPECIALS] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in the form of Qwen2-72B-Instruct, with a gap before <|vision_pad|>."""
    folder = tmp_path_factory.mktemp("published")
    model = json.loads(qwen_tokenizer()._backend.to_str())["model"]
    vocab = {token: i for token, i in model["vocab"].items() if i < 151643}
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", "utf-8")
    names = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151700: "<|vision_pad|>"}
    added = {str(i): {"content": name, "special": True} for i, name in names.items()}
    added["151646"] = {"content": "<tool_call>", "special": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), "utf-8")
    return folder


def test_vocab_and_merges(published, tmp_path):
    tokenizer = Tokenizer.load(published)
    tokenizer.save(tmp_path)
    for loaded in (tokenizer, Tokenizer.load(tmp_path)):
        assert loaded.special("<|vision_pad|>") == 151700
        assert loaded.eos_id == 151645
        assert loaded.vocab_size == 151701
        assert loaded.encode("<tool_call>") == [151646]
        for text in (*TEXTS, *GOLDEN, "<|vision_pad|>"):
            assert loaded.encode(text) == qwen_tokenizer().encode(text)


def test_vocab_and_merges_need_im_end(published, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(published / name)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="im_end"):
        Tokenizer.load(tmp_path)
    entry = {"7": {"content": "<|im_end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entry}))
    with pytest.raises(ValueError, match="share an id"):
        Tokenizer.load(tmp_path)


def test_a_folder_with_nothing_names_what_it_needs(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json.*merges\.txt.*qwen\.tiktoken") as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def _write_ranks(folder, tokens):
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")


def test_a_rank_file_in_the_folder(tmp_path):
    _write_ranks(tmp_path, [*(bytes([b]) for b in range(256)), b"ab", b"bc", b"abc", b"bca", b"abcab"])
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("abc") == [258]
    assert tokenizer.encode("abcab") == [260]  # abc + ab, though ab + cab and a + bcab have no rank
    assert tokenizer.special("<|endoftext|>") == 261


def test_a_rank_file_that_is_no_bpe_is_refused(tmp_path):
    single = [bytes([b]) for b in range(256)]
    _write_ranks(tmp_path, [*single, b"abc"])
    with pytest.raises(ValueError, match="abc"):
        Tokenizer.load(tmp_path)
    _write_ranks(tmp_path, single[1:])
    with pytest.raises(ValueError, match="256 bytes"):
        Tokenizer.load(tmp_path)


def _pushed(tokenizer, ids):
    """Every push must have given all of the text that later ids cannot change, and no more."""
    stream, text = Detokenizer(tokenizer), ""
    for count, token_id in enumerate(ids, 1):
        text += stream.push(token_id)
        assert text == tokenizer.decode(ids[:count]).removesuffix("\ufffd")
    return text + stream.flush()


@each_vocabulary
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(text=st.text(max_size=40))
def test_stream_of_any_text(vocabulary, text):
    tokenizer = VOCABULARIES[vocabulary]()
    ids = tokenizer.encode(text)
    assert _pushed(tokenizer, ids) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(ids=st.lists(st.integers(0, 520), max_size=60))
def test_stream_of_any_tokens(ids):
    """Most of these are no UTF-8; some are special; some lie above the vocabulary."""
    assert _pushed(tiny_tokenizer(), ids) == tiny_tokenizer().decode(ids)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.lists(st.sampled_from([0x41, 0x80, 0xBD, 0xC3, 0xE4, 0xED, 0xF0, 0x9F, 0x98, 0xEF, 0xBF]), max_size=40))
def test_stream_of_broken_bytes(data):
    tokenizer = tiny_tokenizer()
    ids = [_byte_id(tokenizer, b) for b in data]
    assert _pushed(tokenizer, ids) == bytes(data).decode("utf-8", "replace")


def _byte_id(tokenizer, byte):
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printing]
    return tokenizer._backend.token_to_id(chr(byte) if byte in printing else chr(256 + others.index(byte)))


@pytest.mark.parametrize(
    "text", ("👩‍👩‍👧 ok 🇩🇪", "日本語とかな", "e\u0301a\u0308\u0323", " a  b\n c", "x\ufffdy\ufffd")
)
def test_stream_never_gives_half_a_character(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text)
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids] + [stream.flush()]
    assert "".join(pieces) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert stream.push(ids[0]) + stream.flush() == tokenizer.decode(ids[:1])


def test_stream_decodes_a_short_tail_only():
    lengths = []

    class Counting(Tokenizer):
        def decode(self, ids):
            lengths.append(len(ids))
            return super().decode(ids)

    tokenizer = Counting(tiny_backend())
    ids = [_byte_id(tokenizer, 0x80)] * 300 + tokenizer.encode("日本 plain words " * 30)
    stream = Detokenizer(tokenizer)
    for token_id in ids:
        stream.push(token_id)
    assert max(lengths) <= 9
    assert len(lengths) <= 2 * len(ids)
