"""How far Hugging Face's model in float16 is from itself in float32. argv: a GGUF file, a text file, and how many tokens of it.

It runs in the environment of @peers, which has no pippin. Both have the same float16 weights; a line of JSON is printed.
"""

import json
import pathlib
import sys

import torch
import transformers

_STEPS = 32  # greedy tokens behind the prompt


def main(file, text, tokens):
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    prompt = torch.tensor([tokenizer(text)["input_ids"][:tokens]])
    with torch.no_grad():
        # By torch's own methods: transformers refuses them for models from GGUF files, which hold floats by now.
        half = torch.nn.Module.half(model)
        read = torch.nn.Module.float(half).generate(
            prompt, max_new_tokens=_STEPS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        exact = model(read).logits[0].double()
        rounded = torch.nn.Module.half(model)(read).logits[0].double()
    difference = rounded - exact
    told = {
        "largest": difference.abs().max().item(),
        "root_mean_square": difference.square().mean().sqrt().item(),
        "largest_logit": exact.abs().max().item(),
        "tokens_equal": (rounded.argmax(-1) == exact.argmax(-1))[-_STEPS - 1 : -1].sum().item(),
        "steps": _STEPS,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_text(), int(sys.argv[3]))
