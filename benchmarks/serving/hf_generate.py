"""Hugging Face's generate on PyTorch: run by contenders.py, on the interpreter of the peers.

hf_generate.py GGUF   # then a line of JSON a batch: prompts (token ids, of one length) and max_tokens; the answer is a line, too
"""

import json
import pathlib
import sys
import time

import torch
import transformers


def main(file):
    out, sys.stdout = sys.stdout, sys.stderr
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    print(json.dumps({}), file=out, flush=True)
    times = []  # of the tokens of a batch

    def note(ids, scores):
        times.append(time.monotonic())
        return scores

    for line in sys.stdin:
        asked = json.loads(line)
        ids = torch.tensor(asked["prompts"])
        start = time.monotonic()
        times.clear()
        with torch.no_grad():
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=asked["max_tokens"],
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=[note],
            )
        answer = {"token_s": [t - start for t in times], "tokens": written[:, ids.shape[1] :].tolist()}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
