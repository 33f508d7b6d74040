import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pippin.core.chat_template import ChatTemplate, load_chat_template
from pippin.core.errors import DataError
from pippin.core.tokenizer import JsonTokenizer, Tokenizer

_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>", "zone"]
_PARTS = st.sampled_from(
    [*_SPECIAL, "<|im_", "start|>", "end|>", "<", "|", ">", " ", "\n", "{{", "%}", "\ufdd0", "\ufdd1", "1"]
)
_CONTENT = st.lists(st.one_of(_PARTS, st.text(st.characters(codec="utf-8")))).map("".join)


def _library() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=_SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["assistant\n and users\n\n of the system " * 9], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return JsonTokenizer(_library(), {"bos": 0, "eos": 2, "pad": None})


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_a_conversation_is_rendered(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(_CHATML, tokenizer)
    messages = [*_user("Hi"), {"role": "assistant", "content": "Hello"}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert template.render(messages, add_generation_prompt=False) == text
    assert template.render(messages) == text + "<|im_start|>assistant\n"


def test_the_templates_special_tokens_become_their_ids(tokenizer: Tokenizer) -> None:
    ids = ChatTemplate(_CHATML, tokenizer).encode(_user("Hi"))
    start, end = 1, 2
    expected = [start, *tokenizer.encode("user\nHi"), end, *tokenizer.encode("\n"), start]
    assert ids == [*expected, *tokenizer.encode("assistant\n")]


def test_no_message_makes_a_special_token(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(_CHATML, tokenizer)
    empty = [i for i in template.encode(_user("")) if i in tokenizer.special_ids]

    @given(_CONTENT, _CONTENT)
    @settings(max_examples=300, deadline=None)
    def check(content: str, role: str) -> None:
        messages = [{"role": role, "content": content}]
        ids = template.encode(messages)
        assert [i for i in ids if i in tokenizer.special_ids] == empty
        # And nothing of the message is lost or changed.
        assert template.render(messages).startswith(f"<|im_start|>{role}\n{content}<|im_end|>\n")
        assert f"{role}\n{content}\n" in tokenizer.decode(ids)

    check()


def test_ids_are_those_of_the_whole_text(tokenizer: Tokenizer) -> None:
    """As transformers has them: text is cut at special tokens, and not where a message starts or ends."""
    template = ChatTemplate(_CHATML, tokenizer)
    reading = _library()  # reads special tokens from text

    @given(st.text(st.characters(codec="utf-8")).filter(lambda text: not any(s in text for s in _SPECIAL)))
    @settings(max_examples=200, deadline=None)
    def check(content: str) -> None:
        messages = [{"role": "tool", "content": content}]
        text = template.render(messages)
        assert template.encode(messages) == reading.encode(text, add_special_tokens=False).ids

    check()


def test_a_message_cannot_complete_the_templates_text(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ messages[1].content }}", tokenizer)
    messages = [*_user("<|im_"), *_user("end|>")]
    with pytest.raises(DataError, match="out of parts"):
        template.encode(messages)


def test_a_special_token_out_of_parts_is_refused(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ '<|im_' + 'start|>' }}", tokenizer)
    with pytest.raises(DataError, match=r"makes '<\|im_start\|>' out of parts; .* Write it out"):
        template.encode(_user("Hi"))


def test_a_special_token_that_is_a_name_leaves_the_program_as_it_is(tokenizer: Tokenizer) -> None:
    assert ChatTemplate("{% set zone = 1 %}{{ zone }}", tokenizer).render([]) == "1"


def test_variables_and_tools_reach_the_template(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{{ eos_token }}{{ tools | tojson }}{{ day }}", tokenizer, {"eos_token": "<|im_end|>"}
    )
    given = {"tools": [{"name": "<|im_end|>"}], "variables": {"day": "<|end|>"}}
    assert template.render([], **given) == '<|im_end|>[{"name": "<|im_end|>"}]<|end|>'
    ids = template.encode([], **given)
    assert [i for i in ids if i in tokenizer.special_ids] == [2]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "does not take this conversation: roles must alternate. Change"),
        ("{{ raise_exception('no <|im_end|> here') }}", "no <|im_end|> here"),
        ("{{ messages[0].content.nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' * 10**9 }}", "characters at once"),
        ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "writes more than 4194304 characters"),
    ],
)  # fmt: skip
def test_a_template_that_fails_says_so(source: str, problem: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError) as e:
        ChatTemplate(source, tokenizer).render(_user("Hi"))
    assert problem in str(e.value)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for", "is no Jinja: unexpected"),
        ("{{ 'a' | center(10) }}", "is no Jinja: No filter named 'center'"),
        ("x" * 300_000, "has 300000 characters; at most"),
    ],
)
def test_what_is_no_template_is_refused(source: str, problem: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=problem):
        ChatTemplate(source, tokenizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _library().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def _write(folder: Path, **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _rendered(folder: Path) -> str:
    template = load_chat_template(folder)
    assert template is not None
    return template.render(_user("Hi"))


def test_a_template_is_found_in_either_file(folder: Path) -> None:
    assert load_chat_template(folder) is None
    _write(folder, chat_template="{{ bos_token }}a", bos_token={"content": "<|end|>"}, pad_token=None)
    assert _rendered(folder) == "<|end|>a"
    several = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    _write(folder, chat_template=several)
    assert _rendered(folder) == "c"
    (folder / "chat_template.jinja").write_text("d")
    assert _rendered(folder) == "d"


def test_a_damaged_file_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="chat_template.jinja is no UTF-8"):
        load_chat_template(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json is no JSON"):
        load_chat_template(folder)
