"""SmolLM2-135M-Instruct from its GGUF file: logits, tokens and chats equal those of transformers on the same file."""

import functools
import hashlib
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from pippin.core.chat_template import ChatTemplate, load_chat_template
from pippin.core.module import merge, split
from pippin.core.tokenizer import Tokenizer, load_tokenizer
from pippin.layers.generate import generate
from pippin.layers.gguf import GGUFModel, load_gguf
from pippin.layers.models.llama import smollm2_135m
from pippin.layers.named_models import MODELS

_NAME = "smollm2-135m-instruct"
_FILE = Path(os.environ["RUNFILES_DIR"], "smollm2", "model.gguf")
_TOLERANCE = 2e-4  # of logits up to 30; measured: see the README
_NEW_TOKENS = 24

_CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "  And how many people live there?\n\n"},
]
_TOOLS = [
    {
        "type": "function",
        "function": {"name": "größe", "parameters": {"x": {"type": "number", "enum": [1, 2.5]}}},
    }
]
# What other models' templates do.
_TEMPLATES = [
    None,  # the file's own
    """{%- if tools %}
    {{- 'Tools: ' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- tools | tojson(indent=2) }}
{%- endif %}
{% for message in messages %}
    {%- if message.role == 'user' and loop.last %}{{ '<|im_start|>' + message.content | trim }}
    {%- else %}
{{ message['content'].strip().split(' ')[-1] ~ loop.index0 }}{% break %}
    {% endif %}
{%- endfor %}
{{ eos_token }}""",
    """{% set ns = namespace(n=0) %}
{% macro part(text) %}[{{ text | upper }}]{% endmacro %}
{% for message in messages[1:] if message.role != 'system' %}
  {% set ns.n = ns.n + message.content | length %}
  {{ part(message.role) }}{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>
{% endfor %}
{{ ns.n }}{% if add_generation_prompt %}{{ bos_token }}{% endif %}""",
]


def _texts() -> list[str]:
    """Varied text: whatever tokenizers are known to stumble over, and 300 random mixtures of it."""
    parts = [
        *" \t\n\r.,'7½²",
        "  ",
        "\r\n\n",
        "don't",
        "I'LL",
        "naïve",
        "e\u0301",
        "日本語",
        "👩\u200d👧",
        "🇫🇷",
        "שלום",
        "हिन्दी",
    ]
    parts += [
        "12345",
        "x1y22",
        "def f(x):\n\treturn x",
        "https://a.b/c?d=e",
        "\u00a0",
        "\u200b",
        "\ufeff",
        "…",
        "```",
        "<|im",
        "|>",
    ]
    rng = random.Random(0)
    return [*parts, *("".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(300))]


def _questions() -> dict[str, Any]:
    chats = [
        {"messages": _CHAT[:length], "template": template, "tools": tools, "add_generation_prompt": prompt}
        for template in _TEMPLATES
        for length, tools, prompt in ((1, None, True), (3, None, False), (3, _TOOLS, True))
    ]
    config = ["hidden_size", "num_hidden_layers", "rms_norm_eps", "tie_word_embeddings", "eos_token_id"]
    return {"texts": _texts(), "chats": chats, "max_new_tokens": _NEW_TOKENS, "config": config}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], np.ndarray]:
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "questions.json").write_text(json.dumps(_questions()))
    script = Path(__file__).with_name("gguf_reference.py")
    command = [os.environ["PIPPIN_PEERS_PYTHON"], "-I", str(script), str(_FILE), str(folder)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text()), np.load(folder / "logits.npy")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> GGUFModel:
    return load_gguf(_FILE, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(ours: GGUFModel) -> Tokenizer:
    assert ours.tokenizer is not None
    return load_tokenizer(ours.tokenizer)


@functools.cache
def _template(folder: Path, source: str | None) -> ChatTemplate:
    template = load_chat_template(folder)
    assert template is not None
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return template if source is None else ChatTemplate(source, load_tokenizer(folder), names)


def test_it_is_the_file_that_the_name_stands_for() -> None:
    with open(_FILE, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == MODELS[_NAME].member_sha256


def test_the_config_is_smollm2s(ours: GGUFModel, theirs: tuple[dict[str, Any], np.ndarray]) -> None:
    assert ours.config == smollm2_135m()
    assert theirs[0]["config"]["num_hidden_layers"] == 30


def test_ids_are_theirs(tokenizer: Tokenizer, theirs: tuple[dict[str, Any], np.ndarray]) -> None:
    for text, ids in zip(_texts(), theirs[0]["ids"], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


def test_the_ends_of_turns_are_known(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == {tokenizer.special_tokens["<|im_end|>"]}
    assert len(tokenizer.special_ids) == 17


def test_chats_are_theirs(ours: GGUFModel, theirs: tuple[dict[str, Any], np.ndarray]) -> None:
    assert ours.tokenizer is not None
    answers = theirs[0]
    for question, text, ids in zip(_questions()["chats"], answers["chats"], answers["chat_ids"], strict=True):
        template = _template(ours.tokenizer, question.pop("template"))
        messages = question.pop("messages")
        assert template.render(messages, **question) == text
        assert template.encode(messages, **question) == ids


def test_logits_and_the_greedy_answer_are_theirs(
    ours: GGUFModel, tokenizer: Tokenizer, theirs: tuple[dict[str, Any], np.ndarray]
) -> None:
    answers, logits = theirs
    prompt = answers["chat_ids"][0]
    definition, _ = split(nnx.eval_shape(lambda: ours.config.build(rngs=nnx.Rngs(0))))
    tokens = np.asarray([prompt], np.int32)
    got = np.asarray(jax.jit(lambda p, t: merge(definition, p)(t))(ours.params, tokens))
    print(f"logits differ by {np.abs(got - logits).max():.1e} at most; they reach {np.abs(logits).max():.0f}")
    np.testing.assert_allclose(got, logits, rtol=0, atol=_TOLERANCE)
    model = merge(definition, jax.tree.map(jax.numpy.asarray, ours.params))
    written = list(generate(model, prompt, max_new_tokens=_NEW_TOKENS, stop_ids=tokenizer.eos_ids))
    theirs_written = [i for i in answers["written"] if i not in tokenizer.eos_ids]
    assert written == theirs_written
    assert "Paris" in tokenizer.decode(written)
