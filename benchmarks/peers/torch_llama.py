"""Hugging Face's Llama on PyTorch, as a contender. argv: the folder of protocol.py, a shape as JSON, eager or compile.

It runs in the environment of @peers, which has no pippin.
"""

import json
import sys

import torch
import transformers

sys.path.insert(0, sys.argv[1])
import protocol


def start(shape, mode):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_heads"],
        intermediate_size=shape["hidden_dim"],
        max_position_embeddings=shape["sequence_length"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    forward = torch.compile(model) if mode == "compile" else model
    tokens = torch.randint(0, shape["vocab_size"], (shape["batch_size"], shape["sequence_length"]))

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = forward(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return float(loss)

    facts = {
        "params": sum(p.numel() for p in model.parameters()),
        "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    return train, facts


if __name__ == "__main__":
    protocol.serve(lambda: start(json.loads(sys.argv[2]), sys.argv[3]))
