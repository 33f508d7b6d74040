import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import sys
from pathlib import Path
import jax
from pippin.core.compilation_cache import keep_compiled_programs

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(keep_compiled_programs(Path(sys.argv[1]) if sys.argv[1:] else None))
print(float(jax.jit(lambda x: x * 2 + 1)(3.0)), sum(hits))
"""


def run(*arguments: str, program: str = _PROGRAM, **env: str) -> list[str]:
    """The lines that a fresh process prints: the directory; a result, and how many programs were not compiled."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:2]


def test_a_second_start_uses_what_the_first_one_compiled(tmp_path: Path) -> None:
    assert run(str(tmp_path)) == [str(tmp_path), "7.0 0"]
    _, result = run(str(tmp_path))
    assert result.startswith("7.0 ") and int(result.split()[1]) >= 1


def test_a_damaged_program_is_compiled_again(tmp_path: Path) -> None:
    run(str(tmp_path))
    for path in tmp_path.glob("*-cache"):
        path.write_bytes(b"not a program")
    assert run(str(tmp_path))[1] == "7.0 0"


def test_programs_that_were_not_used_for_longest_make_room(tmp_path: Path) -> None:
    for name, seconds in (("old", 1), ("new", 2)):
        (tmp_path / f"{name}-cache").write_bytes(bytes(100_000))
        (tmp_path / f"{name}-atime").write_bytes((seconds * 10**9).to_bytes(8, "little"))
    run(str(tmp_path), JAX_COMPILATION_CACHE_MAX_SIZE="200000")
    assert not (tmp_path / "old-cache").exists() and (tmp_path / "new-cache").exists()


def test_there_is_a_limit_and_an_own_one_stands(tmp_path: Path) -> None:
    program = _PROGRAM.replace("print(float", "print(jax.config.jax_compilation_cache_max_size)\nprint(float")
    for env, most in (({}, 10 * 2**30), ({"JAX_COMPILATION_CACHE_MAX_SIZE": "-1"}, -1)):
        assert run(str(tmp_path), program=program, **env)[1] == str(most)


def test_the_directory_is_of_this_kind_of_cpu_and_an_own_choice_stands(tmp_path: Path) -> None:
    (directory, _) = run(PIPPIN_CACHE_DIR=str(tmp_path))
    assert Path(directory).parent == tmp_path / "programs" and len(Path(directory).name) == 16
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[0] == str(tmp_path / "own")
