# pyright: reportMissingImports=false
"""Models by transformers: run by huggingface_peers_test.py, on the interpreter of the peers.

huggingface_reference.py FOLDER   # of each model FOLDER/NAME, writes the logits of FOLDER/tokens.npy to FOLDER/NAME.npy,
                                  # and what its tokenizer makes of FOLDER/texts.json to FOLDER/NAME.json
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def main(folder):
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
    texts = json.loads((folder / "texts.json").read_text())
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        if any(info.values()):
            sys.exit(f"{path.name}: {info}")
        with torch.no_grad():
            np.save(folder / f"{path.name}.npy", model.eval()(tokens).logits.numpy())
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        found = {
            "ids": ids,
            "texts": [tokenizer.decode(of_text, skip_special_tokens=True) for of_text in ids],
            "eos": tokenizer.eos_token_id,
            "stops at": model.generation_config.eos_token_id,
        }
        (folder / f"{path.name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
