"""SmolLM2-135M-Instruct, served: the greedy answers to 50 prompts are those of transformers, token for token, and vectors too."""

import collections
import dataclasses
import json
import os
import queue
import subprocess
from pathlib import Path

import numpy as np

from pippin.serve.engine.engine import QueueLimits
from pippin.serve.engine.request import Request, Sampling
from pippin.serve.model import Sizes, open_served
from pippin.serve.served_model import Message

_FILE = Path(os.environ["RUNFILES_DIR"], "smollm2", "model.gguf")
_MAX_TOKENS = 64
_TOPICS = [
    "apples",
    "the moon",
    "steam engines",
    "chess",
    "volcanoes",
    "bread",
    "the Roman Empire",
    "bees",
    "glaciers",
    "jazz",
    "electricity",
    "the alphabet",
    "coral reefs",
    "bicycles",
    "the heart",
    "maps",
    "silk",
    "earthquakes",
    "coffee",
    "the number zero",
    "owls",
    "bridges",
    "the Nile",
    "clouds",
    "printing",
]


def test_greedy_answers_and_vectors_are_those_of_transformers(tmp_path):
    opened = open_served(_FILE, Sizes(max_context=512), QueueLimits())
    encode, encode_chat = opened.model.encode, opened.model.encode_chat
    assert encode is not None and encode_chat is not None
    prompts = [list(encode_chat([Message("user", f"Tell me about {topic}.")])) for topic in _TOPICS]
    prompts += [list(encode(f"What is known of {topic} begins with")) for topic in _TOPICS]
    expected = _reference(prompts, tmp_path)
    outputs: queue.Queue = queue.Queue()
    for i, prompt in enumerate(prompts):
        request = Request(
            request_id=str(i),
            prompt=tuple(prompt),
            max_tokens=_MAX_TOKENS,
            sampling=Sampling(temperature=0.0),
            text=False,
        )
        opened.engine.submit(request, outputs.put)
        wants_sums = dataclasses.replace(request, request_id=f"sums {i}", max_tokens=0, sums=True)
        opened.engine.submit(wants_sums, outputs.put)
    opened.engine.start()
    answers: dict[str, list[int]] = collections.defaultdict(list)
    sums, missing = {}, 2 * len(prompts)
    while missing:
        output = outputs.get(timeout=300)
        answers[output.request_id] += [sampled.token for sampled in output.tokens]
        sums[output.request_id] = output.sums
        missing -= output.finish_reason is not None
    opened.engine.stop(0)
    assert [answers[str(i)] for i in range(len(prompts))] == expected["answers"]
    for i, (prompt, mean) in enumerate(zip(prompts, expected["means"], strict=True)):
        np.testing.assert_allclose(sums[f"sums {i}"] / len(prompt), mean, rtol=1e-3, atol=1e-3)


def _reference(prompts, folder):
    """What transformers answers."""
    asked, answered = folder / "prompts.json", folder / "answers.json"
    asked.write_text(json.dumps(prompts))
    script = Path(__file__).with_name("smollm2_reference.py")
    command = [os.environ["PIPPIN_PEERS_PYTHON"], "-I", script, _FILE, asked, answered, str(_MAX_TOKENS)]
    subprocess.run(command, check=True)
    return json.loads(answered.read_text())
