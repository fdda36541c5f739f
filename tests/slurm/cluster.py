"""A Slurm of one node on this machine: its own key, sockets, ports and folder, gone when the tests are over.

Everything that needs cgroups, systemd or an accounting database is switched off, so it works in a bare container. The
daemons stay in the foreground and die with the process that started them.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "setpriv")

CPUS = 4
"""What the node claims to have, so that jobs run side by side on fewer."""

KILL_WAIT = 5
"""Seconds from SIGTERM to SIGKILL."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
"""States that a job stays in."""

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
MinJobAge=3600
NodeName=localhost CPUs={cpus} State=UNKNOWN
PartitionName=small Nodes=localhost Default=YES MaxTime=1:00:00 State=UP OverSubscribe=FORCE:4
"""


class NoCluster(Exception):
    """Why there can be none here."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running Slurm."""

    folder: Path
    environment: dict[str, str]
    """With which sbatch, srun, scontrol and squeue find it."""

    def call(self, *words: str | Path) -> str:
        """What a command prints. Raises CalledProcessError, with its complaint among the notes."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        try:
            done.check_returncode()
        except subprocess.CalledProcessError as error:
            error.add_note(done.stderr)
            raise
        return done.stdout.strip()

    def submit(self, script: Path, *options: str) -> str:
        """The number of the job. It works, and logs, in the folder of the script."""
        log = script.with_suffix(".log")
        return self.call("sbatch", "--parsable", f"--chdir={script.parent}", f"--output={log}", *options, script)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of it: JobState, Restarts, Reason and so on."""
        words = self.call("scontrol", "show", "job", "-o", number).split()
        return {key: value for key, _, value in (word.partition("=") for word in words)}

    def wait(self, number: str, states: Sequence[str], seconds: float = 60) -> dict[str, str]:
        """The job once it is in one of the states. Raises TimeoutError that says which it is in."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            if time.monotonic() > deadline or job["JobState"] in ENDED:
                raise TimeoutError(f"job {number} is {job['JobState']} ({job['Reason']}), not {' or '.join(states)}")
            time.sleep(0.1)
        return job

    def start_again(self, number: str, restart: int = 1) -> None:
        """Waits until the job is queued for its given restart, then starts it: Slurm by itself waits two minutes."""
        deadline = time.monotonic() + 60
        while (job := self.job(number))["JobState"] != "PENDING" or job["Restarts"] != str(restart):
            if time.monotonic() > deadline or job["JobState"] in ENDED:
                raise TimeoutError(
                    f"job {number} is {job['JobState']} after {job['Restarts']} restarts, not queued again"
                )
            time.sleep(0.1)
        time.sleep(1.1)  # what starts within the second in which the job was killed counts as killed, too
        self.call("scontrol", "update", f"JobId={number}", "StartTime=now")


@contextmanager
def running_cluster(seconds: float = 30) -> Iterator[Cluster]:
    """Starts a Slurm and stops it. Raises NoCluster where it is not installed or not ready within the seconds."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise NoCluster(f"slurm-wlm and munge are not installed: there is no {missing[0]}")
    if os.geteuid() != 0:
        raise NoCluster("the daemons of Slurm want to be root")
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        # Not a folder of pytest's: munge refuses one that others cannot enter, and a socket's path must be short.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)
        configuration, key = _write_configuration(folder)
        munge = f"--socket={folder}/munge.socket", f"--key-file={key}", f"--pid-file={folder}/munged.pid"
        stack.enter_context(_daemon(folder, "munged", "--foreground", *munge, f"--seed-file={folder}/munged.seed"))
        _wait_until(folder, deadline, "MUNGE", ["munge", "--no-input", f"--socket={folder}/munge.socket"])
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        cluster = Cluster(folder, outer | {"SLURM_CONF": str(configuration)})
        stack.enter_context(_daemon(folder, "slurmctld", "-D", "-f", configuration))
        stack.enter_context(_daemon(folder, "slurmd", "-D", "-f", configuration, "-N", "localhost"))
        _wait_until(folder, deadline, "idle", ["sinfo", "--noheader", "--format=%T"], cluster.environment)
        try:
            yield cluster
        finally:
            _cancel_all(cluster)


def _write_configuration(folder: Path) -> tuple[Path, Path]:
    """slurm.conf and the key of munge."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    controller_port, node_port = _free_ports(2)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            folder=folder, controller_port=controller_port, node_port=node_port, kill_wait=KILL_WAIT, cpus=CPUS
        )
    )
    # Newer ones want cgroups to be switched off in words, which older ones do not know; these use none of them here.
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n" if _version() >= (23, 11) else "")
    return configuration, key


def _version() -> tuple[int, ...]:
    """Of Slurm, such as (22, 5)."""
    words = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(int(part) for part in words[-1].split(".")[:2])


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _daemon(folder: Path, name: str, *options: str | Path) -> Iterator[None]:
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig=TERM", name, *options], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until(
    folder: Path, deadline: float, answer: str, command: list[str], environment: dict[str, str] | None = None
) -> None:
    """Until the command prints the answer, up to a colon. Raises NoCluster with the newest lines of the logs."""
    while time.monotonic() < deadline:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        if done.stdout.strip().partition(":")[0] == answer:
            return
        time.sleep(0.2)
    said = [line for path in sorted(folder.glob("*.log")) for line in path.read_text(errors="replace").splitlines()]
    raise NoCluster(f"Slurm does not start here: {' / '.join(said[-5:])}")


def _cancel_all(cluster: Cluster) -> None:
    """So that no process of a job outlives the daemons."""
    cluster.call("scancel", "--partition=small")
    deadline = time.monotonic() + KILL_WAIT + 10
    while cluster.call("squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.1)
