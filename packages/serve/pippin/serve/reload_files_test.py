"""Which files of a folder that holds both, model and tokenizer, as Hugging Face's do, may change when it is read anew."""

import json

import pytest

from pippin.core.bundle import Bundle
from pippin.core.manifest import provenance
from pippin.layers.models.llama import smollm2_135m
from pippin.serve.errors import PreconditionError
from pippin.serve.reload import Reader
from pippin.serve.tokenizer_testing import TEMPLATE, save_tokenizer


class _Runner:
    """Takes parameters, and computes nothing."""

    def prepare(self, params):
        return params

    def exchange(self, prepared):
        self.params = prepared


@pytest.fixture
def read(tmp_path, monkeypatch):
    path = save_tokenizer(tmp_path / "apple", chat_template=TEMPLATE)
    _change(path / "config.json", eos_token_id=5, architectures=["LlamaForCausalLM"])
    bundle = Bundle(path, smollm2_135m(), {}, path, provenance())
    monkeypatch.setattr("pippin.serve.reload.open_model", lambda _: bundle)
    return Reader(path, bundle, _Runner(), lambda params: params)


def _change(path, **entries):
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | entries))


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("trainer_state.json", {"global_step": 5}),
        ("config.json", {"transformers_version": "4.99", "_name_or_path": "elsewhere"}),
        ("generation_config.json", {"temperature": 0.6}),
        ("tokenizer_config.json", {"model_max_length": 7, "tokenizer_class": "Fast"}),
        ("special_tokens_map.json", {"eos_token": "<eos>"}),
    ],
)
def test_what_no_answer_depends_on_may_change(read, tmp_path, file, entries):
    _change(tmp_path / "apple" / file, **entries)
    read()()


@pytest.mark.parametrize(
    ("file", "entries", "said"),
    [
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "tokenizer: tokenizer.json"),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, "tokenizer: tokenizer_config.json"),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, "tokenizer: special ids"),
        ("generation_config.json", {"eos_token_id": [7]}, "tokenizer: ids that end a text"),
        ("config.json", {"eos_token_id": 6}, "tokenizer: ids that end a text"),
    ],
)
def test_what_answers_depend_on_may_not_change(read, tmp_path, file, entries, said):
    _change(tmp_path / "apple" / file, **entries)
    with pytest.raises(PreconditionError, match=f"another model than is served: .*{said}"):
        read()


def test_a_template_of_its_own_may_not_come(read, tmp_path):
    (tmp_path / "apple" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(PreconditionError, match="tokenizer: chat_template.jinja"):
        read()


def test_a_damaged_tokenizer_is_told(read, tmp_path):
    (tmp_path / "apple" / "tokenizer.json").write_text("{")
    with pytest.raises(PreconditionError, match="cannot be served: .*tokenizer.json"):
        read()
