"""A small real tokenizer for tests: bytes, a few longer tokens, and two that end a text."""

import functools
import json
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pippin.core.tokenizer import Tokenizer, load_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(directory: Path, **config: object) -> Path:
    """Writes the tokenizer's files, with more entries of tokenizer_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "tr", "ue", "true", '{"', '":'])}
    merges = [("t", "r"), ("u", "e"), ("tr", "ue"), ("{", '"'), ('"', ":")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<|im_start|>", "<|im_end|>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", **config}))
    return directory


@functools.cache
def make_tokenizer() -> Tokenizer:
    """The tokenizer, of 264 tokens."""
    with tempfile.TemporaryDirectory() as directory:
        return load_tokenizer(save_tokenizer(Path(directory)))
