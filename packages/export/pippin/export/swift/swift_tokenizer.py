"""The files of a tokenizer as swift-transformers wants them, which the sample code takes."""

from __future__ import annotations

import json
from pathlib import Path

from pippin.core import manifest
from pippin.core.chat_template import chat_template_source
from pippin.core.tokenizer import read_tokenizer_object
from pippin.export.tokenizer_json import write_special_ids, write_tokenizer_json

_JSON, _CONFIG = "tokenizer.json", "tokenizer_config.json"

# Of a class that it does not know it says so, and goes no further. These are for any tokenizer of their kind.
_GENERAL = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_CLASSES = {"BPE": "PreTrainedTokenizerFast", "Unigram": "T5Tokenizer"}  # by the model of tokenizer.json


def complete_tokenizer(folder: Path) -> bool:
    """Adds to a tokenizer's folder what swift-transformers reads beside tokenizer.json. Whether that is all there now.

    That is a config.json, and in tokenizer_config.json a class that it knows and the chat template, which not every release
    finds in a file of its own.
    """
    if not write_tokenizer_json(folder):
        return False
    write_special_ids(folder)
    old = read_tokenizer_object(folder / _CONFIG)
    new = dict(old)
    if old.get("tokenizer_class") in _GENERAL:
        kind = read_tokenizer_object(folder / _JSON)["model"].get("type")
        new["tokenizer_class"] = _CLASSES.get(kind, _CLASSES["BPE"])
    template = chat_template_source(folder)
    if template is not None and not isinstance(old.get("chat_template"), list):
        new["chat_template"] = template
    if new != old:
        text = json.dumps(new, ensure_ascii=False, indent=2) + "\n"
        manifest.write_file(folder / _CONFIG, text.encode())
    return True
