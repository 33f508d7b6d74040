from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import install_peers
from benchmarks.serving.peers import Places


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run, in an empty cache, by a machine that has all tools."""
    commands: list[list[str]] = []
    monkeypatch.setenv("PIPPIN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PIPPIN_PEERS_PYTHON", "python3.11")
    monkeypatch.setattr(install_peers, "find_model", lambda name: Path("model.gguf"))

    def run(command: Sequence[str]) -> None:
        commands.append(list(command))
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)

    monkeypatch.setattr(install_peers, "_run", run)
    return commands


def test_vllm_is_installed_from_hashes_once(ran: list[list[str]], tmp_path: Path) -> None:
    assert install_peers.main(["vllm"]) == 0
    weights, environment, install = ran
    assert weights[-1] == str(Places(tmp_path / "peers").gguf.parent)
    assert "venv" in environment
    assert {"--require-hashes", "--no-deps"} <= set(install) and install[-1].endswith(
        "requirements_vllm.lock"
    )
    assert Path(install[-1].removeprefix("--requirement=")).is_file()
    assert install_peers.main(["vllm"]) == 0
    assert [command for command in ran[3:] if "pip" in command] == []


def test_a_machine_without_a_compiler_is_told(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_peers.shutil, "which", lambda tool: None if tool == "c++" else f"/bin/{tool}")
    assert install_peers.main(["llama"]) == 2
    assert "there is no c++ on this machine" in capsys.readouterr().err


def test_what_is_no_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        install_peers.main(["tgi"])
    assert "tgi is none of llama, vllm" in capsys.readouterr().err
