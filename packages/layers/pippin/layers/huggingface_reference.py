"""The same models by transformers: run by huggingface_peers_test.py, on the interpreter of the peers.

huggingface_reference.py read FOLDER   # reads each model FOLDER/NAME and writes the logits of
                                       # FOLDER/tokens.npy, in float32, to FOLDER/NAME.npy
huggingface_reference.py make FOLDER   # makes the models of FOLDER/specs.json (name -> config.json), and reads them
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def make(folder):
    torch.manual_seed(0)
    for name, spec in json.loads((folder / "specs.json").read_text()).items():
        config = transformers.AutoConfig.for_model(**spec)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for of, value in model.named_parameters():
                # Large enough that attention is sharp, and that no norm or bias is what it starts as.
                if "norm" in of:
                    value.uniform_(0.5, 1.5)
                else:
                    value.normal_(std=0.5 if value.ndim == 1 else 1.2 * value.shape[-1] ** -0.5)
        model.to(getattr(torch, spec["torch_dtype"])).save_pretrained(folder / name, max_shard_size="20KB")
    read(folder)


def read(folder):
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        if any(info.values()):
            sys.exit(f"{path.name}: {info}")
        tokens = torch.from_numpy(np.load(folder / "tokens.npy")).long()
        with torch.no_grad():
            np.save(folder / f"{path.name}.npy", model.eval()(tokens).logits.numpy())


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]](pathlib.Path(sys.argv[2]))
