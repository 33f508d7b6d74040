"""Files and names that were made to do harm: refused, in a line, with no more memory than they take themselves."""

import ast
import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys

import grpc
import grpc.aio
import numpy as np
import pytest

from pippin.core.adapter import LowRank, save_adapter
from pippin.serve.adapters import Adapters
from pippin.serve.served_model import ServedModel
from pippin.serve.testing import MODEL, fake_backend, serving
from pippin.v1 import inference_pb2 as pb
from tests.robustness.tiny_model import save_model

_PACKAGES = pathlib.Path(__file__).parents[2] / "packages"
# Beyond what the program takes before it has read a model.
_ROOM_BYTES = 4 << 30

# FOLDER: where everything of the test lies; HERE: where adapters are registered.
NAMES = [
    *(
        "../secret",
        "../../etc/passwd",
        "/etc/passwd",
        "/",
        ".",
        "..",
        "",
        "FOLDER/secret",
        "HERE/good",
        "HERE",
    ),
    *(
        "a/b",
        "a\\b",
        "good/",
        "./good",
        "good/.",
        "good/../good",
        "../adapters/good",
        "good\x00",
        " good",
        "good\n",
    ),
    *("C:\\x", "~/x", "~", "$HOME", "%2e%2e%2fsecret", "name\x00.safetensors", "file://HERE/good"),
    *(
        "http://127.0.0.1/x",
        "x" * 10_000,
        "\u202e",
        "link",
        "file",
        "-rf",
        ".hidden",
        "a\nb",
        "CON",
        "*",
        "g[o]od",
    ),
]
_BASE = "ba5e"


class _Slots:
    """Remembers which folders were read."""

    count = 2

    def __init__(self):
        self.read = []

    def put(self, slot, adapter):
        self.read.append(adapter.directory.name)


def _write_adapter(path: pathlib.Path, base: str = _BASE) -> None:
    maps = {"q": LowRank(np.ones((4, 2), np.float32), np.ones((2, 4), np.float32))}
    save_adapter(path, maps, base)


def _baited(folder: pathlib.Path) -> pathlib.Path:
    """A folder of adapters; all around it, and wherever a name could lead, lie adapters that were not registered."""
    here = folder / "adapters"
    for itself in (folder, here):  # for ".", ".." and ""
        _write_adapter(itself)
    _write_adapter(folder / "secret")
    _write_adapter(folder / "home" / "x")
    for name in (
        "good",
        "a/b",
        "a\\b",
        "C:\\x",
        "~",
        "$HOME",
        "%2e%2e%2fsecret",
        "\u202e",
        "-rf",
        ".hidden",
        "a\nb",
    ):
        _write_adapter(here / name)
    for name in (" good", "good\n", "*"):
        _write_adapter(here / name)
    (here / "link").symlink_to(folder / "secret")
    (here / "file").symlink_to("/etc/passwd")
    return here


@pytest.mark.parametrize("template", NAMES, ids=lambda name: repr(name)[:30])
async def test_the_name_of_an_adapter_is_never_a_path(template, tmp_path, monkeypatch):
    folder = tmp_path / "f"
    here, slots = _baited(folder), _Slots()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(folder / "home"))
    name = template.replace("FOLDER", str(folder)).replace("HERE", str(here))
    model = dataclasses.replace(MODEL, adapters=Adapters(here, slots))
    async with _administered(model) as (served, admin):
        for method in ("LoadAdapter", "UnloadAdapter"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await served.method(method, admin)(getattr(pb, f"{method}Request")(name=name), timeout=10)
            _is_refused(refused.value, grpc.StatusCode.NOT_FOUND, folder if name == template else None)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.generate(adapter=name)
        _is_refused(refused.value, grpc.StatusCode.INVALID_ARGUMENT, folder if name == template else None)
        assert (slots.read, served.engine.load().taken) == ([], 0)
        # It is not for want of adapters.
        await served.method("LoadAdapter", admin)(pb.LoadAdapterRequest(name="good"), timeout=10)
        assert slots.read == ["good"]
        assert await served.generate(adapter="good", max_tokens=2)


@contextlib.asynccontextmanager
async def _administered(model: ServedModel):
    async with serving(fake_backend(model=model), admin_address="127.0.0.1:0") as served:
        assert served.server.admin_address is not None
        async with grpc.aio.insecure_channel(served.server.admin_address) as admin:
            yield served, admin


def _is_refused(error: grpc.aio.AioRpcError, code: grpc.StatusCode, untold: pathlib.Path | None) -> None:
    assert error.code() is code, error
    words = ["root:", "Traceback", "No such file", "Errno", *([] if untold is None else [str(untold)])]
    assert not any(word in (error.details() or "") for word in words), error


class Bomb:
    """A pickle that leaves a trace where it is read."""

    def __init__(self, trace: pathlib.Path):
        self._trace = trace

    def __reduce__(self):
        return (pathlib.Path.touch, (self._trace,))


def _pickled(folder: pathlib.Path) -> bytes:
    return pickle.dumps(Bomb(folder.parent / "trace"))


def huggingface_with_a_pickle(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(_pickled(folder))
    return folder


def bundle_whose_weights_are_a_pickle(folder: pathlib.Path) -> pathlib.Path:
    path = save_model(folder)
    (path / "model.safetensors").write_bytes(_pickled(folder))
    return path


def bundle_whose_tokenizer_is_a_pickle(folder: pathlib.Path) -> pathlib.Path:
    path = save_model(folder)
    (path / "tokenizer" / "tokenizer.json").write_bytes(_pickled(folder))
    return path


def file_that_is_a_pickle(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    (folder / "model.pt").write_bytes(_pickled(folder))
    return folder / "model.pt"


def _safetensors(folder: pathlib.Path, data: bytes) -> pathlib.Path:
    folder.mkdir()
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
        "intermediate_size": 8,
    }
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 1, **sizes}
    (folder / "config.json").write_text(
        json.dumps({**model, "rms_norm_eps": 1e-5, "max_position_embeddings": 64})
    )
    (folder / "model.safetensors").write_bytes(data)
    return folder


def safetensors_with_an_endless_header(folder: pathlib.Path) -> pathlib.Path:
    return _safetensors(folder, struct.pack("<Q", 1 << 62) + b"{}")


def safetensors_with_a_header_of_100_gb(folder: pathlib.Path) -> pathlib.Path:
    return _safetensors(folder, struct.pack("<Q", 100 << 30) + b"{" * 1000)


def safetensors_with_a_tensor_of_a_petabyte(folder: pathlib.Path) -> pathlib.Path:
    tensor = {"dtype": "F32", "shape": [1 << 24, 1 << 24], "data_offsets": [0, 1 << 50]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    return _safetensors(folder, struct.pack("<Q", len(header)) + header + bytes(64))


def safetensors_whose_shape_overflows(folder: pathlib.Path) -> pathlib.Path:
    tensor = {"dtype": "F32", "shape": [1 << 32, 1 << 32, 1 << 32], "data_offsets": [0, 0]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    return _safetensors(folder, struct.pack("<Q", len(header)) + header)


def safetensors_that_is_deep(folder: pathlib.Path) -> pathlib.Path:
    header = b'{"a":' * 100_000
    return _safetensors(folder, struct.pack("<Q", len(header)) + header)


def config_of_a_model_of_a_petabyte(folder: pathlib.Path) -> pathlib.Path:
    path = _safetensors(folder, struct.pack("<Q", 2) + b"{}")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "hidden_size": 1 << 40, "num_hidden_layers": 1 << 40})
    )
    return path


def config_that_is_deep(folder: pathlib.Path) -> pathlib.Path:
    path = _safetensors(folder, struct.pack("<Q", 2) + b"{}")
    (path / "config.json").write_text('{"a":' * 100_000)
    return path


def _gguf(folder: pathlib.Path, data: bytes) -> pathlib.Path:
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + data)
    return folder / "model.gguf"


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_with_endless_tensors(folder: pathlib.Path) -> pathlib.Path:
    return _gguf(folder, struct.pack("<QQ", 1 << 60, 0) + bytes(100))


def gguf_with_endless_keys(folder: pathlib.Path) -> pathlib.Path:
    return _gguf(folder, struct.pack("<QQ", 0, 1 << 60) + bytes(100))


def gguf_with_an_endless_text(folder: pathlib.Path) -> pathlib.Path:
    return _gguf(folder, struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1 << 61))


def gguf_with_an_endless_array(folder: pathlib.Path) -> pathlib.Path:
    return _gguf(folder, struct.pack("<QQ", 0, 1) + _text(b"k") + struct.pack("<IIQ", 9, 10, 1 << 61))


def gguf_of_arrays_in_arrays(folder: pathlib.Path) -> pathlib.Path:
    return _gguf(
        folder,
        struct.pack("<QQ", 0, 1) + _text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000,
    )


def gguf_with_a_tensor_of_an_exabyte(folder: pathlib.Path) -> pathlib.Path:
    tensor = _text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 1 << 31, 1 << 31, 0, 0)
    return _gguf(folder, struct.pack("<QQ", 1, 0) + tensor + bytes(256))


FILES = [make for name, make in list(globals().items()) if getattr(make, "__module__", None) == __name__
         and name.startswith(("huggingface", "bundle", "file_", "safetensors", "config", "gguf"))]  # fmt: skip


# One process for all: it is JAX's import that takes time. Its memory is limited from within, as gRPC's threads bear no fork.
_OPEN = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, ({_ROOM_BYTES}, {_ROOM_BYTES}))
from pippin.serve.server import open_backend, run
for path in sys.argv[1:]:
    print(f"{{path}}:", file=sys.stderr, flush=True)
    print(run(open_backend, ["--port", "0", "--model", path]), flush=True)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the program said of each file, and its exit code."""
    folder = tmp_path_factory.mktemp("files")
    paths = [str(make(folder / make.__name__)) for make in FILES]
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, *paths],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PIPPIN_CACHE_DIR": str(folder / "cache"),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(zip(paths[::-1], _parts(done.stderr, paths[::-1]), strict=True))
    assert not (folder / "trace").exists(), "a pickle was read"
    return {
        make: (int(code), said[path])
        for make, path, code in zip(FILES, paths, done.stdout.split(), strict=True)
    }


def _parts(text: str, heads: list[str]) -> list[str]:
    """What follows each line `HEAD:`, from the last head to the first."""
    parts = []
    for head in heads:
        text, _, part = text.rpartition(f"{head}:\n")
        parts.append(part)
    return parts


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__.replace("_", " "))
def test_a_model_that_lies_is_refused_in_a_line(make, told):
    code, said = told[make]
    assert code == 2, said
    assert said.strip().splitlines()[-1].startswith("server: ") and "Traceback" not in said
    assert len(said) < 3_000


_FORBIDDEN = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch"}


def _forbidden(path: pathlib.Path) -> list[str]:
    """What a file has that could run code of a file or of a request."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in ("eval", "exec", "compile", "__import__"):
                found.append(f"{path.name}:{node.lineno}: {called.id}")
            unsafe = {"allow_pickle", "trust_remote_code", "shell"}
            for keyword in node.keywords:
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value
                if keyword.arg in unsafe and on:
                    found.append(f"{path.name}:{node.lineno}: {keyword.arg}")
        found += [f"{path.name}:{node.lineno}: {n}" for n in names if n.partition(".")[0] in _FORBIDDEN]
    return found


def test_nothing_that_serves_can_run_what_a_file_says():
    folders = [_PACKAGES / name / "pippin" / name for name in ("core", "layers", "serve")]
    files = [
        path
        for folder in folders
        for path in folder.rglob("*.py")
        if not path.name.endswith(("_test.py", "_reference.py"))
    ]
    assert len(files) > 10, "the sources are not here"
    assert [line for path in files for line in _forbidden(path)] == []
