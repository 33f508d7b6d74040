import pytest

from pippin.core.errors import ConfigError
from pippin.train.cluster.environment import is_one_of_several, join

_SLURM = {f"SLURM_{name}": "2" for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")}


@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        ({"PIPPIN_COORDINATOR": "host:1", "PIPPIN_NUM_PROCESSES": "2"}, True),
        ({"PIPPIN_COORDINATOR": "host:1", "PIPPIN_NUM_PROCESSES": "1"} | _SLURM, False),
        ({"PIPPIN_COORDINATOR": "auto"}, True),
        (_SLURM, True),
        (_SLURM | {"SLURM_NTASKS": "1"}, False),
        # A shell inside an allocation, or a batch script: nothing started it as one of several.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_the_environment_says_whether_there_are_others(env: dict[str, str], several: bool) -> None:
    assert is_one_of_several(env) is several


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [
        ("two", "0", "PIPPIN_NUM_PROCESSES is two, and must be a number"),
        ("2", None, "PIPPIN_PROCESS_ID is not set"),
        ("2", "2", "numbered from 0 to one less"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, count: str, index: str | None, message: str
) -> None:
    monkeypatch.setenv("PIPPIN_COORDINATOR", "127.0.0.1:1")
    monkeypatch.setenv("PIPPIN_NUM_PROCESSES", count)
    if index is not None:
        monkeypatch.setenv("PIPPIN_PROCESS_ID", index)
    with pytest.raises(ConfigError, match=message):
        join()
