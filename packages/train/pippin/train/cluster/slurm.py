"""SLURM: a batch script whose one step runs all processes, one a node for GPUs. sbatch submits it.

The script looks at how the first process ended that did not end well. It has the job queued again where that asked to be
(75, not counted), or was lost, within the budget; else the job ends with that exit code. SLURM asks all processes to
stop before the time limit, so that a job longer than the limit goes on in the next one.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from pippin.core.errors import ConfigError
from pippin.train.cluster.backend import ClusterError, JobStatus, Phase, call
from pippin.train.cluster.exit_codes import PREEMPTED, outcome_of
from pippin.train.cluster.launch_spec import MODULE, LaunchSpec

_REMEDY = "Submit on a login node of the cluster; or look at what would be submitted with --dry-run."

_PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "CONFIGURING")
_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "SIGNALING")

_BODY = """
set -u
logs={logs}
ends=$logs/slurm-$SLURM_JOB_ID.$(( ${{SLURM_RESTART_COUNT:-0}} )).ends
losses=$logs/slurm-$SLURM_JOB_ID.losses
rm -f "$ends"
export PIPPIN_COORDINATOR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$(( 20000 + SLURM_JOB_ID % 10000 ))
export PIPPIN_NUM_PROCESSES=$SLURM_NTASKS
export ENDS=$ends
{exports}
# A process notes how it ended, as srun tells the highest code of all, those that it killed included.
process='trap : TERM; export PIPPIN_PROCESS_ID=$SLURM_PROCID; "$@"; code=$?; if [ $code != 0 ]; then echo $code >> "$ENDS"; fi; exit $code'

srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/process-%t.log" bash -c "$process" process \\
  {command}
srun=$?

code=0
if [ -s "$ends" ]; then code=$(head -n 1 "$ends"); elif [ $srun != 0 ]; then code=137; fi
rm -f "$ends"
case $code in
  0|1|2) exit $code ;;
  {preempted}|143) ;;
  *)
    echo $code >> "$losses"
    if [ $(wc -l < "$losses") -gt {max_restarts} ]; then
      echo "the budget of {max_restarts} restarts is used up (exit code $code)"
      exit $code
    fi ;;
esac
echo "exit code $code: queued again"
scontrol requeue "$SLURM_JOB_ID" || exit $code
sleep {stop_grace_s}  # SLURM ends this script
"""


class SlurmBackend:
    """SLURM, by sbatch, squeue, sacct, scontrol and scancel."""

    def render(self, spec: LaunchSpec) -> str:
        """The batch script.

        Raises:
            ConfigError: it asks for what SLURM does not run.
        """
        if spec.platform == "tpu":
            raise ConfigError(
                f"the slurm backend has no TPUs, and the target is {spec.target.name if spec.target else ''}. Submit it "
                "with --backend jobset."
            )
        if spec.image:
            raise ConfigError(
                f"the slurm backend got the image {spec.image!r}; it runs the interpreter that submits, which all nodes "
                "see. Leave out --image."
            )
        options = _options(spec)
        head = "".join(f"#SBATCH {option}\n" for option in options)
        exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in spec.env.items())
        body = _BODY.format(
            logs=shlex.quote(f"{spec.out}/logs"),
            exports=exports,
            command=shlex.join([sys.executable, "-P", "-m", MODULE, *spec.arguments]),
            preempted=PREEMPTED,
            max_restarts=spec.max_restarts,
            stop_grace_s=spec.stop_grace_s,
        )
        return f"#!/bin/bash\n{head}{body}"

    def submit(self, spec: LaunchSpec) -> JobStatus:
        """Queues the job; one of the same name must not be there."""
        script = self.render(spec)
        try:
            Path(spec.out, "logs").mkdir(parents=True, exist_ok=True)  # SLURM makes no directories
        except OSError as e:
            raise ClusterError(
                f"{spec.out} cannot be made ({e.strerror}). Give an --out that this machine and the nodes share."
            ) from None
        if _job_id(spec.name):
            raise ClusterError(
                f"a job named {spec.name} is in the queue. Give another --name, or cancel that one first."
            )
        return JobStatus(Phase.PENDING, call(["sbatch"], _REMEDY, stdin=script).strip())

    def status(self, name: str) -> JobStatus:
        """By scontrol while SLURM remembers the job, then by sacct."""
        job = _job_id(name, states="all")
        if job:
            found = call(["scontrol", "show", "job", job, "--oneliner"], _REMEDY)
            fields = dict(re.findall(r"(JobState|Reason|ExitCode|Restarts)=(\S+)", found))
            detail = f"job {job}, {fields['JobState']}, {fields.get('Restarts', 0)} restarts"
            if fields.get("Reason", "None") != "None":
                detail += f", {fields['Reason']}"
            return _status(fields["JobState"], fields["ExitCode"], detail)
        try:
            columns = "--format=JobID,State,ExitCode"
            ended = call(["sacct", f"--name={name}", "--noheader", "-X", "-P", columns], _REMEDY)
        except ClusterError:
            ended = ""  # a cluster without accounting
        if not ended.strip():
            raise ClusterError(
                f"SLURM knows no job named {name} (any more). squeue --me lists yours; record.textproto in its --out says "
                "what became of the last attempt."
            )
        job, state, code = ended.strip().splitlines()[-1].split("|")
        return _status(state.split()[0], code, f"job {job}, {state}")

    def logs(self, name: str, process: int) -> str:
        """The file that the process writes to."""
        job = _job_id(name, states="all")
        if not job:
            raise ClusterError(f"SLURM remembers no job named {name}. Its logs are in its --out, in logs/.")
        found = re.search(
            r"StdOut=(\S+)/slurm-", call(["scontrol", "show", "job", job, "--oneliner"], _REMEDY)
        )
        path = f"{found[1] if found else ''}/process-{process}.log"
        try:
            with open(path) as log:
                return log.read()
        except OSError as e:
            raise ClusterError(
                f"{path} cannot be read ({e.strerror}): the process has printed nothing yet, or there is none of that "
                "number. `jobs status` says whether the job has started."
            ) from None

    def cancel(self, name: str) -> str:
        """Has all processes asked to stop, and ended after SLURM's KillWait."""
        job = _job_id(name)
        if not job:
            raise ClusterError(f"no job named {name} is in the queue. squeue --me lists yours.")
        call(["scancel", job], _REMEDY)
        return f"job {job} is cancelled"


def _options(spec: LaunchSpec) -> list[str]:
    """The options of sbatch."""
    options = [f"--job-name={spec.name}"]
    if spec.devices_per_host:
        options += [f"--nodes={spec.num_hosts}", "--ntasks-per-node=1"]
        options += [f"--gpus-per-node={spec.devices_per_host}", "--exclusive"]
    else:
        options += [f"--ntasks={spec.num_hosts}"]
    if spec.queue:
        options += [f"--partition={spec.queue}"]
    if spec.time_limit_s is not None:
        options += [f"--time={max(1, spec.time_limit_s // 60)}"]
    return [
        *options,
        # To the processes, not to this script.
        f"--signal=TERM@{spec.stop_grace_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={spec.out}/logs/slurm-%j.log",
    ]


def _status(state: str, exit_code: str, detail: str) -> JobStatus:
    if state in _PENDING:
        return JobStatus(Phase.PENDING, detail)
    if state in _RUNNING:
        return JobStatus(Phase.RUNNING, detail)
    code, _, signal = exit_code.partition(":")
    # Cancelled, or killed with its node: the script had no say.
    status = -int(signal or 0) or int(code) or (0 if state == "COMPLETED" else 143)
    return JobStatus(Phase.ENDED, f"{detail}, exit code {code}", outcome_of(status))


def _job_id(name: str, states: str = "PENDING,RUNNING,SUSPENDED,COMPLETING") -> str:
    """The newest job of a name that is in one of these states; empty where there is none."""
    command = ["squeue", f"--name={name}", "--noheader", f"--states={states}", "--sort=-i", "--format=%i"]
    return (call(command, _REMEDY).split() or [""])[0]
