"""The batch script; where SLURM is installed, on a cluster of this one machine that the test starts."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pippin.core.errors import ConfigError
from pippin.core.hardware.accelerator import parse_target
from pippin.train import jobs
from pippin.train.cluster.backend import ClusterError, Phase
from pippin.train.cluster.exit_codes import ERROR, PREEMPTED
from pippin.train.cluster.launch_spec import LaunchSpec
from pippin.train.cluster.slurm import SlurmBackend

_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch")

_RECIPES = """
from pippin.train.recipe import recipe
from pippin.train.toy import toy_config

@recipe
def whole():
    "A few seconds."
    return toy_config(steps=12)

@recipe
def long():
    "Minutes: to be interrupted."
    return toy_config(steps=400, seconds_a_batch=0.25)

@recipe
def failing():
    "Its input fails."
    return toy_config(steps=12, fails_at=2)
"""

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def spec(**fields: object) -> LaunchSpec:
    standard = {"name": "job", "arguments": ("--recipe", "r"), "out": "/runs/job"}
    return LaunchSpec(**(standard | fields))  # type: ignore[arg-type]


def test_a_gpu_job_has_a_process_a_node() -> None:
    target = parse_target("gpu-h100-16")
    script = SlurmBackend().render(spec(target=target, queue="a100", time_limit_s=7200, env={"A": "b c"}))
    for line in (
        "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=8\n",
        "#SBATCH --partition=a100\n#SBATCH --time=120\n#SBATCH --signal=TERM@300\n#SBATCH --requeue\n",
        "export A='b c'\n",
    ):
        assert line in script


def test_what_slurm_does_not_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no TPUs, and the target is tpu-v5p-8"):
        SlurmBackend().render(spec(target=parse_target("tpu-v5p-8")))
    with pytest.raises(ConfigError, match="got the image 'x'"):
        SlurmBackend().render(spec(image="x"))


def test_a_client_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="squeue is not on PATH, and this backend submits with it"):
        SlurmBackend().cancel("job")


def free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start_cluster(folder: Path) -> list[subprocess.Popen[bytes]]:
    """Starts munge, slurmctld and slurmd; SLURM_CONF then names their cluster."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    cpus = max(2, os.cpu_count() or 2)
    conf.write_text(
        _CONF.format(folder=folder, host=host, ports=free_ports(), user=getpass.getuser(), cpus=cpus)
    )
    os.environ["SLURM_CONF"] = str(conf)
    files = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munge.pid"}
    files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    options = [f"--{option}={path}" for option, path in files.items()]
    commands = [
        ["munged", "--force", "--foreground", *options],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c"],
    ]
    return [
        subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        for c in commands
    ]


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Path:
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        why = f"{', '.join(missing)} not installed" if missing else "slurmd needs root"
        pytest.skip(f"{why}: on Debian, as root, apt-get install slurmctld slurmd slurm-client munge")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short: munge's socket lies in it
    started = start_cluster(folder)

    def stop() -> None:
        subprocess.run(["scancel", "--user", getpass.getuser()], check=False, capture_output=True)
        for process in reversed(started):
            process.terminate()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)

    request.addfinalizer(stop)
    wait_until(lambda: "idle" in said("sinfo", "--noheader", "--format=%t"))
    (folder / "recipes.py").write_text(_RECIPES)
    return folder


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def wait_until(done: Callable[[], object], timeout_s: int = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, said("scontrol", "show", "job")
        time.sleep(0.5)


def submit(cluster: Path, recipe: str, *options: str, code: int = 0) -> str:
    """What launch prints, with this exit code."""
    command = [sys.executable, "-m", "pippin.train.launch", "--recipe-file", str(cluster / "recipes.py")]
    command += ["--recipe", recipe, "--backend", "slurm", "-n", "2", "--out", str(cluster / recipe), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def status(name: str) -> tuple[Phase, str]:
    found = SlurmBackend().status(name)
    return found.phase, found.detail


def job_id(name: str) -> str:
    return said("squeue", f"--name={name}", "--noheader", "--states=all", "--format=%i").split()[0]


def test_sbatch_accepts_the_script(cluster: Path) -> None:
    script = cluster / "script.sh"
    script.write_text(submit(cluster, "whole", "--dry-run", "--time-limit", "30m"))
    done = subprocess.run(["sbatch", "--test-only", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "using 2 processors" in done.stderr, done.stderr


def test_two_processes_train_and_status_and_logs_say_so(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "whole: pending (Submitted batch job" in submit(cluster, "whole")
    wait_until(lambda: status("whole")[0] is Phase.ENDED)
    assert jobs.main(["status", "whole", "--backend", "slurm"]) == 0
    assert "whole: done" in capsys.readouterr().out
    assert jobs.main(["logs", "whole", "--backend", "slurm"]) == 0
    assert "in 2 processes" in capsys.readouterr().out
    assert (cluster / "whole" / "checkpoints" / "12").is_dir()
    assert jobs.main(["logs", "whole", "--backend", "slurm", "--process", "7"]) == ERROR


def test_a_mistake_of_the_users_is_not_tried_again(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(cluster, "failing")
    wait_until(lambda: status("failing")[0] is Phase.ENDED)
    assert jobs.main(["status", "failing", "--backend", "slurm"]) == ERROR
    assert "0 restarts" in capsys.readouterr().out


def test_a_preempted_and_a_lost_job_go_on_and_a_cancelled_one_ends(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cluster / "long"
    submit(cluster, "long", "--max-restarts", "1")
    wait_until(lambda: (out / "checkpoints" / "4").exists())
    assert "a job named long is in the queue" in submit(cluster, "long", code=ERROR)
    job = job_id("long")
    subprocess.run(["scancel", "--signal=TERM", job], check=True)  # to the processes: a preemption
    wait_until(lambda: "1 restarts" in status("long")[1])
    assert not list(out.glob("logs/*.losses"))  # it is not counted
    # SLURM would wait two minutes; less than its node needs to forget the last start, and it refuses the next one.
    time.sleep(20)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    log = out / "logs" / "process-1.log"
    wait_until(lambda: "from the checkpoint of step" in (out / "logs" / "process-0.log").read_text())
    assert "stopped by a signal after step" in log.read_text()
    mine = [p for p in Path("/proc").glob("[0-9]*") if is_process_of(p, out)]
    os.kill(int(mine[-1].name), 9)
    wait_until(lambda: "2 restarts" in status("long")[1])
    assert next(out.glob("logs/*.losses")).read_text() == "137\n"
    assert jobs.main(["cancel", "long", "--backend", "slurm"]) == 0
    wait_until(lambda: status("long")[0] is Phase.ENDED)
    capsys.readouterr()
    assert jobs.main(["status", "long", "--backend", "slurm"]) == PREEMPTED


def is_process_of(folder: Path, out: Path) -> bool:
    """Whether a folder of /proc is one of the job's Python processes."""
    try:
        words = (folder / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return words[0] == sys.executable and "pippin.train.launch" in words and str(out) in words
