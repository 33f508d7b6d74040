# pyright: reportMissingImports=false
"""Models by transformers: run by huggingface_peers_test.py, on the interpreter of the peers.

huggingface_reference.py FOLDER   # of each model FOLDER/NAME, writes the logits of FOLDER/tokens.npy to FOLDER/NAME.npy
"""

import pathlib
import sys

import numpy as np
import torch
import transformers


def main(folder):
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        if any(info.values()):
            sys.exit(f"{path.name}: {info}")
        with torch.no_grad():
            np.save(folder / f"{path.name}.npy", model.eval()(tokens).logits.numpy())
        transformers.AutoTokenizer.from_pretrained(path)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
