"""The same GGUF file by transformers: run by gguf_peers_test.py, on the interpreter of the peers.

gguf_reference.py FILE FOLDER   # answers FOLDER/questions.json in FOLDER/answers.json and FOLDER/logits.npy
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers


def main(file, folder):
    questions = json.loads((folder / "questions.json").read_text())
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    # It takes the tokens and merges over, but not how text is split before, which the file only names: SmolLM2's way.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    chats = [
        tokenizer.apply_chat_template(
            question["messages"],
            chat_template=question["template"],
            tools=question["tools"],
            add_generation_prompt=question["add_generation_prompt"],
            tokenize=False,
        )
        for question in questions["chats"]
    ]
    prompt = torch.tensor([tokenizer.encode(chats[0], add_special_tokens=False)])
    with torch.no_grad():
        np.save(folder / "logits.npy", model(prompt).logits.numpy())
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=questions["max_new_tokens"],
            do_sample=False,
        )
    answers = {
        "ids": [tokenizer.encode(text, add_special_tokens=False) for text in questions["texts"]],
        "chats": chats,
        "chat_ids": [tokenizer.encode(chat, add_special_tokens=False) for chat in chats],
        "written": written[0, prompt.shape[1] :].tolist(),
        "config": {name: getattr(model.config, name) for name in questions["config"]},
    }
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
