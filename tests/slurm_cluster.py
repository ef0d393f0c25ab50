"""A real SLURM of two nodes in a temporary folder; it needs root and Debian's packages.

The first node is in this machine's network, the second one in a network of its own at the other end
of a cable, and each has its own host name, so that programs on both meet as on two machines.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import run
from sweeping import LIMIT, wait_for

from engine.devices.workers import free_ports

NODES = ("node1", "node2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobSubmitPlugins=lua
PartitionName=main Nodes=ALL Default=YES
"""
# MaxSubmitJobs, which SLURM itself keeps to only with a database of accounts: the controller
# refuses in the same words. A number in the file `most` is the limit.
SUBMISSIONS = """\
local second, taken = 0, 0  -- the table of jobs is as old as a second
function slurm_job_submit(asked, partitions, user)
  local file = io.open("{folder}/most")
  if not file then return slurm.SUCCESS end
  local most = tonumber(file:read("*a"))
  file:close()
  local last = string.match(asked.array_inx or "", "%-(%d+)")
  local new = last and last + 1 or 1
  if os.time() > second + 1 then taken = 0 end
  local there = new + taken
  for _, job in pairs(slurm.jobs) do
    local state = job.job_state % 256  -- the rest are flags
    if state == 0 then there = there + math.max(job.array_task_cnt or 1, 1) end
    if state == 1 or state == 2 then there = there + 1 end
  end
  if there <= most then
    second, taken = os.time(), taken + new
    return slurm.SUCCESS
  end
  slurm.log_user("QOSMaxSubmitJobPerUserLimit")
  return 2050  -- ESLURM_ACCOUNTING_POLICY
end

function slurm_job_modify(asked, job, partitions, user)
  return slurm.SUCCESS
end
"""


@dataclass(frozen=True)
class Cluster:
    """A controller, and two nodes of one processor each that have host names of their own."""

    environment: dict[str, str]
    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]]

    def restart(self, *, seconds_away: float) -> None:
        """End the controller, and begin it again; it knows its jobs."""
        self.daemons["slurmctld"].terminate()
        self.daemons["slurmctld"].wait(LIMIT)
        time.sleep(seconds_away)
        self.begin("slurmctld", "slurmctld", "-D")

    def begin(self, name: str, *command: str) -> None:
        """Begin a daemon."""
        with open(self.folder / "daemons.txt", "a") as file:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=file, stderr=file
            )

    def ask(self, *command: str) -> str:
        """Return what a command of SLURM's says."""
        return run(*command, env=self.environment).stdout

    def queue(self, what: str = "%i") -> list[str]:
        """Return a line for each job that waits or runs, a task of an array being one."""
        return self.ask("squeue", "--noheader", "--array", f"--format={what}").splitlines()

    def is_done(self) -> bool:
        """Whether no job waits or runs; those that were queued again begin at once."""
        self.hurry()
        return not self.queue()

    def hurry(self) -> None:
        """Have jobs that were queued again begin at once, not two minutes later."""
        for line in self.queue("%i %r"):
            job, reason = line.split(maxsplit=1)
            if reason == "BeginTime":
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")


# Of the clusters of this process, and no other's.
OWN_NUMBERS = itertools.count(os.getpid())


@contextlib.contextmanager
def opened(folder: Path, *settings: str) -> Iterator[Cluster]:
    """A cluster whose configuration, state, logs and key are in a folder; it is shut in the end."""
    if os.geteuid() != 0:
        pytest.skip("needs root, as whom SLURM's daemons run here")
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.skip(f"SLURM is not installed here ({', '.join(missing)}); .ci/run shows how")
    for name in ("state", *NODES):
        (folder / name).mkdir()
    ports = free_ports(1 + len(NODES))
    own = next(OWN_NUMBERS)
    cable = f"slurm{own}"
    addresses = [f"10.213.{own % 256}.{number}" for number in (1, 2)]
    configuration = CONFIGURATION.format(
        folder=folder,
        host=socket.gethostname().partition(".")[0],
        address=addresses[0],
        controller_port=ports.pop(),
    )
    for node, address in zip(NODES, addresses, strict=True):
        configuration += f"NodeName={node} NodeAddr={address} Port={ports.pop()} CPUs=1\n"
    (folder / "slurm.conf").write_text(configuration + "\n".join([*settings, ""]))
    (folder / "job_submit.lua").write_text(SUBMISSIONS.replace("{folder}", str(folder)))
    hosts = [f"{address} {node}" for node, address in zip(NODES, addresses, strict=True)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    cluster = Cluster({**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}, folder, {})
    files = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
    munge = [f"--{name}-file={folder}/munge.{end}" for name, end in files.items()]
    munge[1] = munge[1].replace("--socket-file", "--socket")
    commands = [
        ["munged", "--force", "--foreground", *munge],
        ["slurmctld", "-D", "-c"],
        in_own_name(NODES[0], folder),
        ["nsenter", f"--net=/run/netns/{cable}", *in_own_name(NODES[1], folder)],
    ]
    try:
        lay(cable, *addresses)
        for number, command in enumerate(commands):
            cluster.begin("slurmctld" if command[0] == "slurmctld" else str(number), *command)
            if command[0] == "munged":
                wait_for((folder / "munge.socket").exists)
        ready = ("sinfo", "--noheader", "--format=%T")
        wait_for(
            lambda: (
                "idle" in run(*ready, env=cluster.environment, check=False).stdout
                or any(daemon.poll() is not None for daemon in cluster.daemons.values())
            )
        )
        have_ended = any(daemon.poll() for daemon in cluster.daemons.values())
        assert not have_ended, (folder / "daemons.txt").read_text()
        yield cluster
        cluster.ask("scancel", "--user=root", "--signal=KILL", "--full")
        cluster.ask("scancel", "--user=root")
        wait_for(lambda: not cluster.queue())
    finally:
        for daemon in reversed(cluster.daemons.values()):
            daemon.terminate()
            daemon.wait(LIMIT)
        run("ip", "netns", "delete", cable, check=False)  # the cable goes with it


def lay(cable: str, here: str, there: str) -> None:
    """Make a network of the name of the cable that joins it with this machine's."""
    for words in (
        f"netns add {cable}",
        f"link add {cable} type veth peer name {cable} netns {cable}",
        f"address add {here}/30 dev {cable}",
        f"link set {cable} up",
        f"-n {cable} address add {there}/30 dev {cable}",
        f"-n {cable} link set {cable} up",
        f"-n {cable} link set lo up",
    ):
        run("ip", *words.split())


def in_own_name(node: str, folder: Path) -> list[str]:
    """Return a command that is a node: of that host name, knowing the other by name."""
    program = f"hostname {node}; mount --bind {folder}/hosts /etc/hosts; exec slurmd -D -N {node}"
    return ["unshare", "--uts", "--mount", "sh", "-c", program]
