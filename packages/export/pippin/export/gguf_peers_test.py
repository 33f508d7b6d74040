"""llama.cpp loads the GGUF files that are written, and goes on with our greedy tokens; SmolLM2-135M among the models."""

import functools
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from pippin.core.bundle import load_bundle
from pippin.core.module import merge, split
from pippin.core.tokenizer import load_tokenizer
from pippin.export.gguf import export_gguf
from pippin.export.stacked_model import stacked_model
from pippin.export.tiny_models import CONFIGS, save_sentencepiece, save_tiny
from pippin.layers.causal_lm_config import CausalLMConfig
from pippin.layers.gguf import GGUFModel, load_gguf
from pippin.layers.model_files import open_model

_SMOLLM2 = Path(os.environ["RUNFILES_DIR"], "smollm2", "model.gguf")
_NEW_TOKENS = 32
# Of log-probabilities. llama.cpp rounds what it multiplies F16 weights with to float16 as well.
_TOLERANCE = {"F32": 1e-3, "F16": 2e-2}

_TINY_PROMPTS = [[3, 17, 200, 45, 6, 301, 9], [250] * 5 + [7, 8, 9, 10]]
_SMOLLM2_PROMPTS = [
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
    "Once upon a time, there was an apple tree that",
]
_TEXTS = [
    "def main():\n\treturn 12345  # it's",
    " naïve 日本語 👩\u200d👧 e\u0301\u00a0\ufeff…",
    "  \r\n\n x1y22 ½",
    "I'LL don't <|im_start|> | <think>",
]


def _llama_cpp(folder: Path, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    (folder / "questions.json").write_text(json.dumps(questions))
    script = Path(__file__).with_name("gguf_reference.py")
    command = [os.environ["PIPPIN_PEERS_PYTHON"], "-I", str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "answers.json").read_text())


def _question(path: Path, prompts: list[list[int]], texts: list[str] = []) -> dict[str, Any]:  # noqa: B006
    return {"path": str(path), "prompts": prompts, "new_tokens": _NEW_TOKENS, "texts": texts}


@functools.cache
def _log_probabilities(cfg: CausalLMConfig) -> Any:
    definition, _ = split(nnx.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0))))
    return jax.jit(lambda params, ids: jax.nn.log_softmax(merge(definition, params)(ids)))


def _apart(model: GGUFModel, prompts: list[list[int]], answers: list[dict[str, Any]]) -> float:
    """How far log-probabilities are apart at most, after the same ids, if all of their tokens are ours; else infinity."""
    longest = max(map(len, prompts)) + _NEW_TOKENS
    rows = [p + a["ids"] for p, a in zip(prompts, answers, strict=True)]
    tokens = np.asarray([row + [0] * (longest - len(row)) for row in rows], np.int32)
    ours = np.asarray(_log_probabilities(model.config)(model.params, tokens))
    apart = 0.0
    for row, prompt, answer in zip(ours, prompts, answers, strict=True):
        ids = answer["ids"]
        assert len(ids) == _NEW_TOKENS or answer["ended"]
        at = row[len(prompt) - 1 :][: len(ids)]
        said = iter(answer["logprobs"])
        token, logprob = next(said)
        for step, i in enumerate(ids):
            if i == token:
                apart = max(apart, abs(float(at[step, i]) - logprob))
                token, logprob = next(said, (-1, 0.0))
        assert token == -1 or answer["ended"]
        if (at.argmax(-1) != ids).any():
            return math.inf
    return apart


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, dict[str, Any]]]:
    """(name, type) -> the file, and what llama.cpp says of it."""
    folder = tmp_path_factory.mktemp("tiny")
    files = {}
    for name in CONFIGS:
        model = stacked_model(load_bundle(save_tiny(folder / name, name)))
        for kind in _TOLERANCE:
            files[name, kind] = folder / f"{name}-{kind}.gguf"
            export_gguf(model, files[name, kind], type_name=kind)
    answers = _llama_cpp(folder / "asked", [_question(path, _TINY_PROMPTS) for path in files.values()])
    return {key: (path, answer) for (key, path), answer in zip(files.items(), answers, strict=True)}


@pytest.mark.parametrize("kind", _TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_ours(name: str, kind: str, tiny: Any, tmp_path: Path) -> None:
    path, answer = tiny[name, kind]
    apart = _apart(load_gguf(path, cache_dir=tmp_path), _TINY_PROMPTS, answer["written"])
    print(f"{name} {kind}: log-probabilities differ by {apart:.1e} at most")
    assert apart < _TOLERANCE[kind]


def test_sentencepiece_ids_are_ours(tmp_path: Path) -> None:
    tokenizer = save_sentencepiece(tmp_path / "tokenizer")
    path = tmp_path / "model.gguf"
    export_gguf(stacked_model(load_bundle(save_tiny(tmp_path / "bundle", tokenizer=tokenizer))), path)
    texts = [*_TEXTS[:3], "I'LL don't ▁"]
    (answer,) = _llama_cpp(tmp_path / "asked", [_question(path, _TINY_PROMPTS[:1], texts)])
    ours = load_tokenizer(tokenizer)
    assert answer["ids"][:3] == [ours.encode(text) for text in texts[:3]]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[GGUFModel, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("smollm2")
    model = stacked_model(open_model(_SMOLLM2))
    assert model.tokenizer is not None
    tokenizer = load_tokenizer(model.tokenizer)
    prompts = [tokenizer.encode(text) for text in _SMOLLM2_PROMPTS]
    files = {kind: folder / f"{kind}.gguf" for kind in _TOLERANCE}
    for kind, path in files.items():
        export_gguf(model, path, type_name=kind)
    answers = _llama_cpp(folder / "asked", [_question(path, prompts, _TEXTS) for path in files.values()])
    return {
        kind: (load_gguf(path, cache_dir=folder), answer | {"prompts": prompts})
        for (kind, path), answer in zip(files.items(), answers, strict=True)
    }


@pytest.mark.parametrize("kind", _TOLERANCE)
def test_smollm2_goes_on_as_here(kind: str, smollm2: Any) -> None:
    model, answer = smollm2[kind]
    apart = _apart(model, answer["prompts"], answer["written"])
    print(f"SmolLM2 {kind}: log-probabilities differ by {apart:.1e} at most")
    assert apart < _TOLERANCE[kind]


def test_smollm2s_ids_are_ours(smollm2: Any) -> None:
    model, answer = smollm2["F32"]
    tokenizer = load_tokenizer(model.tokenizer)
    assert answer["ids"] == [tokenizer.encode(text) for text in _TEXTS]
