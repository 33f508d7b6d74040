"""The environment of the peers runs beside ours: a tiny Llama, in a process of its interpreter."""

import os
import subprocess
import sys

_PROGRAM = """
import torch, transformers
config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
)
model = transformers.LlamaForCausalLM(config)
with torch.no_grad():
    print(tuple(model(torch.arange(8)[None]).logits.shape))
"""


def test_a_tiny_llama_runs_on_the_peers_interpreter():
    python = os.environ["PIPPIN_PEERS_PYTHON"]
    assert python != sys.executable
    done = subprocess.run([python, "-I", "-c", _PROGRAM], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 8, 32)", done.stderr
