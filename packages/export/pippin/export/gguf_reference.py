# pyright: reportMissingImports=false
"""GGUF files by llama.cpp: run by gguf_peers_test.py, on the interpreter of the peers.

gguf_reference.py FOLDER   # answers each question of FOLDER/questions.json in FOLDER/answers.json
"""

import json
import pathlib
import sys
import urllib.request

import xllamacpp as llama


def main(folder):
    questions = json.loads((folder / "questions.json").read_text())
    (folder / "answers.json").write_text(json.dumps([answer(**question) for question in questions]))


def answer(path, prompts, new_tokens, texts):
    """What llama.cpp goes on with, greedily, after some ids, and the ids that texts have for it."""
    params = llama.CommonParams()
    params.model.path = path
    params.n_ctx = 256
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.warmup = False
    # Keys and values as exact as ours, and the plain way to attend.
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(params)
    asked = {
        "n_predict": new_tokens,
        "temperature": 0,
        "n_probs": 1,
        "return_tokens": True,
        "cache_prompt": False,
    }
    at = server.listening_address
    said = [ask(at, "completion", asked | {"prompt": prompt}) for prompt in prompts]
    asked = {"add_special": False, "parse_special": False}
    return {
        "written": [
            {
                "ids": answer["tokens"],
                # Fewer than ids: none for a token that ends within a character.
                "logprobs": [[token["id"], token["logprob"]] for token in answer["completion_probabilities"]],
                "ended": answer["stop_type"] == "eos",
            }
            for answer in said
        ],
        "ids": [ask(at, "tokenize", asked | {"content": text})["tokens"] for text in texts],
    }


def ask(address, what, question):
    body, headers = json.dumps(question).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/{what}", body, headers)) as response:
        return json.load(response)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
