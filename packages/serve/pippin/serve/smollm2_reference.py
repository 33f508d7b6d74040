"""Greedy answers and hidden states of transformers: run by smollm2_peers_test.py, on the interpreter of the peers.

smollm2_reference.py FILE PROMPTS ANSWERS MAX_TOKENS   # of a GGUF file; in JSON

PROMPTS are lists of token ids; ANSWERS get {"answers": such lists, "means": of each prompt's last hidden states}.
"""

import json
import pathlib
import sys

import torch
import transformers

_BATCH = 10


def main(file, prompts, max_tokens):
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    answers, means = [], []
    with torch.no_grad():
        for prompt in prompts:
            means.append(model.model(torch.tensor([prompt])).last_hidden_state[0].mean(dim=0).tolist())
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
        with torch.no_grad():
            # Nothing ends a text: each answer has all its tokens.
            written = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers += written[:, longest:].tolist()
    return {"answers": answers, "means": means}


if __name__ == "__main__":
    file, prompts, answers = map(pathlib.Path, sys.argv[1:4])
    answers.write_text(json.dumps(main(file, json.loads(prompts.read_text()), int(sys.argv[4]))))
