"""Chat templates against transformers' apply_chat_template, against the built-in styles, and against forgers."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

from nvlm_runtime.checkpoint.bundled import BUNDLED
from nvlm_runtime.checkpoint.weights import save
from nvlm_runtime.commands.cli import main
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.inputs.prompt import build_prompt, read_prompt
from nvlm_runtime.inputs.template import CONFIG_FILE, JINJA_FILE, JSON_FILE, MAX_WRITTEN, ChatTemplate
from nvlm_runtime.inputs.tokenizer import Tokenizer
from tests.inputs.qwen import VOCABULARIES, qwen_tokenizer, tiny_tokenizer
from tests.inputs.test_prompt import CHAT, EVIL, IMAGE, SEVEN, TWO, big, each_variant, micro, text_part, user
from tests.small import CONFIGS, small_model

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# takes strings and parts
QWEN2_VL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# takes parts alone
PARTS = (
    "{%- for message in messages %}\n    {%- set content = message.content | list %}\n"
    "    {{- '<|im_start|>' + message.role + '\n' }}\n"
    "    {%- for item in content %}\n        {%- if item.type == 'text' %}\n            {{- item.text }}\n"
    "        {%- endif %}\n    {%- endfor %}\n    {{- '<|im_end|>\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n"
)
TRIMMED = QWEN2.replace("message['content']", "message['content'] | trim")
# NVLM's hf style, default system message included
HF = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nAnswer the questions.<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FAMILIES = {"qwen2": QWEN2, "qwen2-vl": QWEN2_VL, "parts": PARTS, "trimmed": TRIMMED}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one turn": user("What?"),
    "system": [SYSTEM, *user("What?")],
    "empty system": [{"role": "system", "content": ""}, *user("What?")],
    "many turns": CHAT,
    "all": [SYSTEM, *CHAT],
    "blanks": [{"role": "system", "content": "\n\tBe \n brief. "}, *user("  What? \n"), *CHAT[1:]],
    "merges": [*user("\nnew line and <|"), {"role": "assistant", "content": "|>\n\n"}, *user("é — 日本\u00a0")],
}
each_family = pytest.mark.parametrize("family", FAMILIES)
MESSAGE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def rendered(template, messages, plans=(), *, tokenizer=None, config=None, generation=True, **variables):
    template = template if isinstance(template, ChatTemplate) else ChatTemplate(template, variables)
    return build_prompt(
        tokenizer or qwen_tokenizer(),
        config or big("d"),
        messages,
        plans,
        style="template",
        generation=generation,
        template=template,
    )


@lru_cache(maxsize=1)
def transformers_tokenizer():
    backend = tokenizers.Tokenizer.from_str(qwen_tokenizer()._backend.to_str())
    backend.encode_special_tokens = False
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def golden(template, messages, generation=True):
    return transformers_tokenizer().apply_chat_template(
        messages, chat_template=template, add_generation_prompt=generation, tokenize=True, return_dict=False
    )


def own_text(template, messages=None, **variables):
    """What the template wrote, the marks' texts among it."""
    turns = [(m["role"], [m["content"]]) for m in messages or user("What?")]
    return "".join(piece.text for piece in ChatTemplate(template, variables).render(turns, True))


# The same as transformers, and as the built-in styles


@each_family
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("generation", (True, False))
def test_ids_are_those_of_transformers(family, conversation, generation):
    messages = CONVERSATIONS[conversation]
    given = messages
    if family == "parts":
        given = [{**m, "content": [text_part(m["content"])] if m["content"] else []} for m in messages]
    want = golden(FAMILIES[family], given, generation)
    assert list(rendered(FAMILIES[family], messages, generation=generation).input_ids) == want
    assert len(want) > 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=3, max_size=3))
def test_any_text_is_tokenised_as_transformers_does(texts):
    """But the names of special tokens, which forge there and not here."""
    assume(all(qwen_tokenizer().split(text) in ([], [text]) for text in texts))
    roles = ("system", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    if not texts[1].strip():
        messages[1]["content"] += "x"
    for template in (QWEN2, TRIMMED):
        want = golden(template, messages, False)
        assert list(rendered(template, messages, generation=False).input_ids) == want


@pytest.mark.parametrize("conversation", ("system", "all"))
def test_text_is_that_of_the_built_in_styles(conversation):
    messages = CONVERSATIONS[conversation]
    assert rendered(QWEN2, messages) == build_prompt(qwen_tokenizer(), big("d"), messages, [], style="megatron")
    assert rendered(HF, messages) == build_prompt(qwen_tokenizer(), big("d"), messages, [], style="hf")


def test_no_system_message_is_the_templates_own():
    want = build_prompt(qwen_tokenizer(), big("d"), CHAT, [])
    assert rendered(HF, CHAT) == want
    assert "helpful assistant" in qwen_tokenizer().decode(rendered(QWEN2, CHAT).input_ids)
    none = [{"role": "system", "content": None}, *CHAT]
    empty = [{"role": "system", "content": ""}, *CHAT]
    assert rendered(QWEN2, none) == rendered(QWEN2, empty)
    assert list(rendered(QWEN2, empty).input_ids) == golden(QWEN2, empty)


def test_text_in_parts_is_joined():
    parts = [text_part("Wh"), text_part(""), text_part("at"), text_part("?")]
    assert rendered(QWEN2, user(parts)) == rendered(QWEN2, user("What?"))


# Pictures


@each_variant
@pytest.mark.parametrize(
    "content",
    ("<image>\nWhat?", "What?", "Left <image> right <image>.", "<image>", [IMAGE, text_part("\n<image>?")]),
    ids=("first", "no-place", "two", "alone", "parts"),
)
def test_pictures_are_written_as_in_hf(variant, content):
    plans = [SEVEN, TWO] if "two" in str(content) or str(content).count("<image>") == 2 else [SEVEN]
    for template in (HF, HF.replace("message.content", "message.content | trim")):
        got = rendered(template, user(content), plans, config=big(variant))
        assert got == build_prompt(qwen_tokenizer(), big(variant), user(content), plans)
        assert len(got.blocks) == len(plans)
        assert read_prompt(qwen_tokenizer(), big(variant), got.input_ids, plans) == got


@each_variant
def test_pictures_of_many_turns_through_every_family(variant):
    config = micro(variant)
    messages = [SYSTEM, *user("<image>\nOne?"), {"role": "assistant", "content": "Two."}, *user("And <image>?")]
    want = rendered(QWEN2, messages, [TWO, SEVEN], config=config)
    assert [len(block.tiles) for block in want.blocks] == [3, 7]
    for family in ("qwen2-vl", "parts"):
        assert rendered(FAMILIES[family], messages, [TWO, SEVEN], config=config) == want


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (QWEN2, False),
        (QWEN2_VL, False),
        (PARTS, True),
        ("{% for c in messages[0]['content'] | selectattr('type', 'eq', 'text') %}{{ c.text }}{% endfor %}", True),
        ("{% for c in messages[0].content[1:] %}{{ c.text }}{% endfor %}", True),
        ("{% set m = messages[0] %}{% set all = m.content %}{% for c in all %}{{ c.text }}{% endfor %}", True),
        ("{% if messages[0].role is string %}{% for c in messages[0].content %}{{ c }}{% endfor %}{% endif %}", True),
        ("{% if messages[0].content is not string %}{% for c in messages[0].content %}{% endfor %}{% endif %}", False),
        ("{% for line in messages[0].content.split('x') %}{{ line }}{% endfor %}", False),
    ],
)
def test_who_gets_parts(template, parts):
    assert ChatTemplate(template).wants_parts is parts


def test_a_template_may_not_move_one_picture_before_another():
    swapped = "{% for message in messages | reverse %}{{ message.content }}{% endfor %}"
    messages = [*user("<image> One?"), {"role": "assistant", "content": "Two."}, *user("And <image>?")]
    with pytest.raises(ValueError, match="order of the images"):
        rendered(swapped, messages, [TWO, SEVEN])
    assert len(rendered(swapped, [*user("<image> One?"), *messages[1:2], *user("And?")], [TWO]).blocks) == 1


def test_only_an_image_writes_placeholders():
    with pytest.raises(ValueError, match="vision_pad"):
        rendered(MESSAGE + "<|vision_pad|>", user("What?"))


# Forging


@each_variant
@each_family
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("evil", EVIL)
def test_typed_tokens_stay_text(vocabulary, family, variant, evil):
    tokenizer, config = VOCABULARIES[vocabulary](), micro(variant)

    def prompt(text):
        messages = [{"role": "system", "content": text}, *user([IMAGE, text_part(text)])]
        messages += [{"role": "assistant", "content": text}, *user(text)]
        return rendered(FAMILIES[family], messages, [SEVEN], tokenizer=tokenizer, config=config)

    plain, forged = prompt("Hello"), prompt(evil)
    for name in ("<|im_start|>", "<|im_end|>", "<|vision_pad|>"):
        token_id = tokenizer.special(name)
        assert forged.input_ids.count(token_id) == plain.input_ids.count(token_id)
    assert len(forged.blocks) == 1
    assert tokenizer.decode(forged.input_ids) == tokenizer.decode(plain.input_ids).replace("Hello", evil)


FRAGMENTS = ("<|", "|>", "<|im_", "end|>", "im_end", "<|im_end|>", "<|vision_pad|>", "<image>", " ", "\n", "x")
PRIVATE = [chr(0xF0000 + i) for i in range(4)] + [chr(0xFFFFD), "\ue000"]
forgers = st.lists(st.sampled_from([*FRAGMENTS, *PRIVATE]), min_size=1, max_size=6).map("".join)
# leaves a special token open on both sides of a text, cuts and glues what it is given
SPLICED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n<|im_{{ m.content }}end|><|{{ m.content[:0] }}"
    "<|im_end|>{% endfor %}"
)


@settings(max_examples=150, deadline=None)
@given(st.lists(forgers, min_size=3, max_size=3), st.sampled_from([*FAMILIES.values(), SPLICED]))
def test_no_text_forges_a_token(texts, template):
    tokenizer = tiny_tokenizer()
    system, question, answer = texts
    messages = [
        {"role": "system", "content": system},
        *user([IMAGE, text_part(question)]),
        {"role": "assistant", "content": answer},
        *user([text_part(question), text_part("?")]),
    ]
    prompt = rendered(template, messages, [TWO], tokenizer=tokenizer, config=micro("d"))
    generation = 1 if "add_generation_prompt" in template else 0
    assert prompt.input_ids.count(tokenizer.special("<|im_end|>")) == 4
    assert prompt.input_ids.count(tokenizer.special("<|im_start|>")) == 4 + generation
    assert prompt.input_ids.count(tokenizer.special("<|vision_pad|>")) == 3 * micro("d").tokens_per_tile
    said = tokenizer.decode(prompt.input_ids)
    for text in texts:
        assert text.strip() in said


def test_a_name_with_a_blank_in_it_is_not_looked_for():
    """The blanks around a text reach the template, so they could complete such a name."""
    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer()._backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken("a b", special=True), tokenizers.AddedToken("<|cd|>")])
    tokenizer = Tokenizer(backend)
    messages = [{"role": "system", "content": " "}, *user("x")]
    template = "{{ 'a' + messages[0].content + 'b' + messages[1].content }}<|cd|>"
    ids = rendered(template, messages, tokenizer=tokenizer).input_ids
    assert tokenizer.special("a b") not in ids and ids[-1] == tokenizer.special("<|cd|>")
    assert tokenizer.decode(ids) == "a bx"


def test_split_takes_the_longest_name():
    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer()._backend.to_str())
    backend.add_special_tokens(["<a>", "<a>b"])
    tokenizer = Tokenizer(backend)
    longest, shorter = tokenizer.special("<a>b"), tokenizer.special("<a>")
    assert tokenizer.split("x<a>b<a><a>c") == ["x", longest, shorter, shorter, "c"]
    assert tokenizer.split("") == [] and tokenizer.split("x") == ["x"]


# What a template sees


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ("content", " What? \n"),
        ("content | trim", "What?"),
        ("content.strip()", "What?"),
        ("content.lstrip()", "What? \n"),
        ("content | upper", " What? \n"),
        ("content[:-1]", " What? "),
        ("(content | trim)[0]", "What?"),
        ("content ~ ('yes' if 'What' in content else 'no')", " What? \nno"),
        ("content ~ ('full' if content else 'empty')", " What? \nfull"),
        ("content ~ (content is string)", " What? \nTrue"),
        ("content | tojson", '" What? \\n"'),
        ("content | replace('W', 'V')", " What? \n"),
        ("'<b>' ~ content", "<b> What? \n"),
    ],
)
def test_contents(expression, want):
    assert own_text("{% set content = messages[0].content %}{{ " + expression + " }}", user(" What? \n")) == want


def test_an_empty_text_is_false():
    messages = [{"role": "system", "content": ""}, *user("x")]
    assert own_text("{{ 'full' if messages[0].content else 'empty' }}{{ messages[1].content }}", messages) == "emptyx"
    parts = "{{ messages[0].content | length }}{% for part in messages[1].content %}{{ part.text }}{% endfor %}"
    assert own_text(parts, messages) == "0x"


@pytest.mark.parametrize(
    ("template", "want"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|" + MESSAGE, "<s>|</s>||x"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}" + MESSAGE, "TrueTrueTruex"),
        ("{{ {'a': '<é>'} | tojson }}" + MESSAGE, '{"a": "<é>"}x'),
        ("{{ strftime_now('%%') }}" + MESSAGE, "%x"),
        ("  {% if true %}\n  a\n  {% endif %}\n" + MESSAGE, "  a\nx"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}" + MESSAGE, "01x"),
        ("{% generation %}{% set a = 1 %}" + MESSAGE + "{% endgeneration %}{{ a }}", "x"),
        ("{% set n = namespace(a=1, self=2) %}{% set n.a = n.a + n.self %}{{ n.a }}" + MESSAGE, "3x"),
        ("{{ dict(a=1).a }}" + MESSAGE, "1x"),
    ],
)
def test_the_environment_is_that_of_transformers(template, want):
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    assert own_text(template, user("x"), **variables) == want
    theirs = transformers_tokenizer().apply_chat_template(
        user("x"), chat_template=template, add_generation_prompt=True, tokenize=False, **variables, unk_token=""
    )
    assert theirs == want


def test_bos_is_the_templates_own():
    ids = rendered("{{ bos_token }}" + MESSAGE, user("x"), bos_token="<|endoftext|>").input_ids
    assert ids == (qwen_tokenizer().special("<|endoftext|>"), *qwen_tokenizer().encode("x"))


# Templates that fail


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for message in messages[1:] %}{{ message.content }}{% endfor %}", "dropped text of message 1"),
        (MESSAGE + "{{ messages[1].content }}", "repeated text of message 2"),
        ("{{ messages[0].content }}{{ messages[1].content }}", "dropped text of message 3"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "dropped text of message 1"),
        (MESSAGE + "\U000f0001", "repeated text of message 2"),
        (MESSAGE + "{{ '\\U000f0009' }}", "private-use"),
        ("{{ raise_exception('no system, please') }}", "failed: no system, please$"),
        ("{{ messages[0].nothing.more }}", "failed: .*no attribute 'nothing'"),
        ("{{ missing.more }}", "failed: 'missing' is undefined"),
        ("{{ messages[0].content + 1 }}", "failed: TypeError"),
        ("{{ 1 // (messages | length - 3) }}", "failed: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: RecursionError"),
        ("{% include 'passwd' %}", "failed: "),
        ("{% for i in range(10**9) %}x{% endfor %}", "failed: OverflowError: Range too big"),
        ("{% for i in range(2000) %}{% for j in range(2000) %}x{% endfor %}{% endfor %}", "more than 1048576"),
        ("{{ ''.__class__.__mro__ }}", "failed: access to attribute '__class__'"),
        ("{{ ''['__class__']['__mro__'] }}", "failed: access to attribute '__class__'"),
        ("{{ (messages | map(attribute='__class__') | list)[0].mro() }}", "failed: "),
        ("{{ ('' | attr('__class__')).mro() }}", "failed: access to attribute '__class__'"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "failed: access to attribute '__class__'"),
        ("{{ strftime_now.__globals__.keys() }}", "failed: access to attribute '__globals__'"),
        ("{{ raise_exception.__globals__['json'] }}", "failed: access to attribute '__globals__'"),
        ("{{ lipsum.__globals__['os'].popen('id').read() }}", "failed: access to attribute '__globals__'"),
        ("{{ self.__init__.__globals__ }}", "failed: access to attribute '__init__'"),
        ("{{ messages.append(1) }}", "failed: .*append"),
        ("{{ messages[0].update(content='x') }}", "failed: .*update"),
        ("{% set n = namespace(__call__=1) %}", "failed: a namespace cannot hold '__call__'"),
        ("{% set n = namespace() %}{% set n.__call__ = 1 %}", "cannot hold '__call__'"),
        ("{% for %}", "does not compile: Expected an expression"),
        ("{{ messages", "does not compile: "),
        ("{% nothing %}", "does not compile: .*nothing"),
        ("{{ 'x' | nothing }}", "does not compile: .*nothing"),
    ],
)
def test_a_bad_template_says_what_it_did(template, match):
    messages = [*user("One?"), {"role": "assistant", "content": "Two."}, *user("Three?")]
    with pytest.raises(ValueError, match=match):
        rendered(template, messages)


def test_the_bound_of_what_is_written_counts_no_text_of_the_conversation():
    long = "x" * (MAX_WRITTEN + 1)
    assert own_text(MESSAGE, user(long)) == long


def test_a_dropped_picture_is_named():
    template = "{% for m in messages %}{{ (m.content | trim)[-1] }}{% endfor %}"
    with pytest.raises(ValueError, match="dropped an image of message 1"):
        rendered(template, user("<image>x"), [TWO])


def test_style_template_needs_one():
    with pytest.raises(ValueError, match="needs a chat template"):
        build_prompt(tiny_tokenizer(), micro("d"), user("x"), [], style="template")
    with pytest.raises(ValueError, match="is a string, got 7"):
        ChatTemplate(7)


# Files


def write(folder, **files):
    names = {"jinja": JINJA_FILE, "json": JSON_FILE, "config": CONFIG_FILE}
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / names[name]).write_text(text, "utf-8")
    return folder


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]


@pytest.mark.parametrize(
    ("files", "source"),
    [
        ({}, None),
        ({"config": {}}, None),
        ({"config": {"chat_template": None}}, None),
        ({"config": {"chat_template": "config"}}, "config"),
        ({"config": {"chat_template": NAMED}}, "named"),
        ({"json": {"chat_template": "json"}}, "json"),
        ({"jinja": "jinja"}, "jinja"),
        ({"json": {"chat_template": "json"}, "config": {"chat_template": "config"}}, "json"),
        ({"jinja": "jinja", "config": {"chat_template": NAMED}}, "jinja"),
        ({"jinja": "jinja", "config": {"chat_template": NAMED[:1]}}, "jinja"),
        ({"jinja": "same", "json": {"chat_template": "same"}}, "same"),
    ],
)
def test_where_a_template_is_found(tmp_path, files, source):
    template = ChatTemplate.load(write(tmp_path, **files))
    assert (template.source if template else None) == source


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"jinja": "a", "json": {"chat_template": "b"}}, "different chat templates"),
        ({"jinja": "{% for %}"}, "chat_template.jinja: the chat template does not compile"),
        ({"json": "{"}, "chat_template.json is not JSON"),
        ({"json": []}, "chat_template.json must hold a JSON object"),
        ({"json": {}}, "chat_template.json: chat_template must be a string"),
        ({"json": {"chat_template": 3}}, "chat_template.json: chat_template must be a string"),
        ({"config": "nonsense"}, "tokenizer_config.json is not JSON"),
        ({"config": {"chat_template": {"default": "x"}}}, "must be a string or a list"),
        ({"config": {"chat_template": ["x"]}}, "must be a string or a list"),
        ({"config": {"chat_template": NAMED[:1]}}, r'named "default", only \[\'tool_use\'\]'),
        ({"config": {"chat_template": [{"name": "default", "template": 1}]}}, 'named "default"'),
        ({"config": {"chat_template": "x", "bos_token": 1}}, "bos_token must be a string"),
    ],
)
def test_a_file_that_is_no_template(tmp_path, files, match):
    with pytest.raises(ValueError, match=match):
        ChatTemplate.load(write(tmp_path, **files))


def test_a_template_that_is_no_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8"):
        ChatTemplate.load(tmp_path)


def test_what_transformers_saves_is_read(tmp_path):
    tokenizer = transformers_tokenizer()
    template = "{{ eos_token }}{{ pad_token }}{{ bos_token }}" + QWEN2
    for jinja in (True, False):
        folder = tmp_path / str(jinja)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder, save_jinja_files=jinja)
        tokenizer.chat_template = None
        assert (folder / "chat_template.jinja").is_file() is jinja
        loaded = ChatTemplate.load(folder)
        assert loaded.variables == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        assert list(rendered(loaded, CHAT).input_ids) == golden(template, CHAT)


def test_added_tokens_are_named_by_their_content(tmp_path):
    config = {"chat_template": "x", "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}
    assert ChatTemplate.load(write(tmp_path, config=config)).variables == {"bos_token": "<s>"}


# The engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save(small_model("d"), folder)
    tiny_tokenizer().save(folder)
    return folder


def test_the_engine_takes_a_template_when_asked(checkpoint):
    picture = Image.new("RGB", (64, 32))
    bare = NVLM.load(checkpoint)
    with pytest.raises(ValueError, match="needs a chat template"):
        bare.prepare("What?", style="template")
    write(checkpoint, jinja=QWEN2)
    model = NVLM.load(checkpoint)
    assert model.config == CONFIGS["d"]
    assert model.prepare("What?").input_ids == bare.prepare("What?").input_ids, "never taken unasked"
    messages = [SYSTEM, *user("<image>\nWhat?")]
    prepared = model.prepare(messages=messages, images=[picture], style="template")
    want = rendered(QWEN2, messages, prepared.plans, tokenizer=model.tokenizer, config=model.config)
    assert prepared.input_ids == want.input_ids
    out = model.generate(messages=messages, images=[picture], style="template", max_new_tokens=3, ignore_eos=True)
    assert out.num_prompt_tokens == len(want.input_ids) and len(out.token_ids) == 3
    stream = model.stream(messages=messages, images=[picture], style="template", max_new_tokens=3, ignore_eos=True)
    assert "".join(stream) == out.text
    write(checkpoint, jinja="{% if %}")
    with pytest.raises(ValueError, match="does not compile"):
        NVLM.load(checkpoint)


def test_the_command_takes_a_template_when_asked(tmp_path, capsys, monkeypatch):
    for path in (BUNDLED / "micro-d").iterdir():
        (tmp_path / path.name).symlink_to(path)
    write(tmp_path, jinja="<|endoftext|>" + HF)
    picture = str(Path(__file__).parents[2] / "examples" / "receipt.png")
    options = ["--model", str(tmp_path), "--json", "--max-new-tokens", "2"]
    counts = {}
    for style in ("hf", "template"):
        lines = iter(["What is the total?", "/quit"])
        monkeypatch.setattr("builtins.input", lambda prompt="", lines=lines: next(lines))
        assert main(["ask", picture, "What is the total?", *options, "--style", style]) == 0
        assert main(["chat", picture, *options, "--style", style]) == 0
        counts[style] = [json.loads(line)["num_prompt_tokens"] for line in capsys.readouterr().out.splitlines()]
    assert counts["template"] == [count + 1 for count in counts["hf"]] and len(counts["hf"]) == 2
