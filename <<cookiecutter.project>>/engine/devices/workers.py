"""Several processes that train one model together, on one machine or many.

Each runs the same command. `TF_CONFIG` or SLURM tells it which of them it is; the first one, the
chief, is the only one that writes the run folder.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import random
import re
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vegab import UsageError
from vegab.exits import INTERRUPTED as INTERRUPTED

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf

log = logging.getLogger(__name__)
SECONDS_TO_COME = 300  # that the workers wait for each other at the start
SECONDS_TO_REGISTER = 45  # once all are there, with TensorFlow's service, or all end
SECONDS_OF_SILENCE = 20  # after which a worker is taken for dead
FIRST_PORT, NUM_PORTS, PORTS_PER_JOB = 20_000, 12_000, 64  # below those that systems hand out
EXAMPLE = '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}'


class Worker(NamedTuple):
    """Which of how many workers a process is; the chief has the rank 0."""

    rank: int
    number: int


def worker() -> Worker:
    """Return which worker the environment says this process is: (0, 1) if it names no others."""
    if text := os.environ.get("TF_CONFIG"):
        rank, addresses = _tf_config(text)
        return Worker(rank, len(addresses))
    number = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return Worker(int(os.environ["SLURM_PROCID"]) if number > 1 else 0, number)


def is_follower() -> bool:
    """Return whether this process is a worker other than the chief, which writes nothing."""
    return worker().rank > 0


def strategy() -> "tf.distribute.Strategy":
    """Meet the other workers; return the strategy by which all of them train one model.

    TensorFlow may not have run anything before. The servers that it starts listen on all networks
    of the machine. If the others come and then are silent, the process itself ends with code 75.
    Raises UsageError if this worker's port is in use, SystemExit(75) if the others do not come.
    """
    import tensorflow as tf

    from engine import keras_private

    rank, addresses = cluster()
    _meet(rank, addresses)
    keras_private.set_patience(len(addresses), SECONDS_TO_REGISTER, SECONDS_OF_SILENCE)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(addresses)}),
        task_type="worker",
        task_id=rank,
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
        rpc_layer="grpc",
    )
    log.info("all are there; if one dies now, this ends within %d s", SECONDS_TO_REGISTER)
    try:
        with keras_private.exiting_after(SECONDS_TO_REGISTER, INTERRUPTED):
            return tf.distribute.MultiWorkerMirroredStrategy(resolver)
    finally:  # TensorFlow has put a handler of its own in the place of the one that was there
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def cluster() -> tuple[int, tuple[str, ...]]:
    """Return this worker's rank, and the address of each, as "host:port"."""
    if text := os.environ.get("TF_CONFIG"):
        return _tf_config(text)
    import tensorflow as tf

    from engine import keras_private

    rank, number = worker()
    # Jobs that share a machine must not meet: each has ports of its own.
    job = int(os.environ.get("SLURM_JOB_ID", "0")) * PORTS_PER_JOB
    # GPUs are SLURM's business; the resolver asks for a number, and fails at 0.
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=FIRST_PORT + job % NUM_PORTS,
        gpus_per_node=number,
        gpus_per_task=1,
        auto_set_gpu=False,
    )
    addresses = resolver.cluster_spec().as_dict()["worker"]
    # It sorts the machines by name, n10 before n9; SLURM numbers the tasks in its own order.
    hosts = keras_private.hosts_in(os.environ["SLURM_STEP_NODELIST"])
    addresses.sort(key=lambda address: hosts.index(address.rpartition(":")[0]))
    return rank, tuple(addresses)


def free_ports(number: int) -> list[int]:
    """Return ports of the loopback on which nothing listens; OSError if there are not as many."""
    found: list[int] = []
    every = range(FIRST_PORT, FIRST_PORT + NUM_PORTS)
    for port in random.SystemRandom().sample(every, 1000):
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            return found
    raise OSError(f"of the ports from {every[0]} to {every[-1]}, no {number} are free")


def on_this_machine(number: int) -> list[str]:
    """Return `TF_CONFIG` for each of so many workers over loopback, at ports that are free now."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(number)]
    tasks = [{"type": "worker", "index": index} for index in range(number)]
    return [json.dumps({"cluster": {"worker": addresses}, "task": task}) for task in tasks]


def _tf_config(text: str) -> tuple[int, tuple[str, ...]]:
    """Return what `TF_CONFIG` says: this worker's rank, and the addresses of all, chief first."""
    try:
        config = json.loads(text)
        cluster, kind, index = config["cluster"], config["task"]["type"], config["task"]["index"]
        by_type = {each: list(addresses) for each, addresses in cluster.items()}
        number = len(by_type.get(kind, []))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"TF_CONFIG is {text!r} ({reason}); expected {EXAMPLE}, or unset it"
        ) from None
    if strange := sorted(by_type.keys() - {"chief", "worker"}):
        raise UsageError(f"TF_CONFIG names {', '.join(strange)}; expected only chief and worker")
    chiefs = by_type.get("chief", [])
    addresses = (*chiefs, *by_type.get("worker", []))
    for address in addresses:
        if not re.fullmatch(r"[^\s/]+:[0-9]{1,5}", str(address)):
            raise UsageError(f"TF_CONFIG has the address {address!r}; expected HOST:PORT")
    if type(index) is not int or not 0 <= index < number:
        raise UsageError(
            f"TF_CONFIG says that this is {kind} {index!r}, and its cluster has {number} of that "
            "type; indices begin with 0"
        )
    return index + len(chiefs) * (kind == "worker"), addresses


def _meet(rank: int, addresses: Sequence[str]) -> None:
    """Return when all workers are there: TensorFlow's own waiting heeds no signal, and no time. The
    chief waits for the others to listen, and they for the chief, which then is in TensorFlow.
    """
    port = int(addresses[rank].rpartition(":")[2])
    with socket.socket() as mine:
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            mine.bind(("", port))
            if rank > 0:
                mine.listen()
        except OSError as error:
            raise UsageError(
                f"worker {rank} is to listen on port {port} ({addresses[rank]}), and cannot: "
                f"{error.strerror}; wait for who has it, or name another port for all workers"
            ) from None
        until = time.monotonic() + SECONDS_TO_COME
        missing = list(addresses[1:] if rank == 0 else addresses[:1])
        log.info("worker %d of %d waits for %s", rank, len(addresses), ", ".join(missing))
        while missing := [address for address in missing if not _listens(address)]:
            if time.monotonic() > until:
                what = f"did not come in {SECONDS_TO_COME} s; start all workers again"
                log.error("%s %s", ", ".join(missing), what)
                raise SystemExit(INTERRUPTED)
            time.sleep(0.2)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), 2):
        return True
    return False


@contextlib.contextmanager
def ends_with_the_others() -> Iterator[None]:
    """Turn what TensorFlow raises when another worker is gone into exit code 75."""
    try:
        yield
        return
    except Exception as error:
        if worker().number == 1 or not _tells_of_another(error):
            raise
        log.debug("%s", error)
        traceback.clear_frames(error.__traceback__)  # TensorFlow's threads end before Python does
    log.error("another worker is gone; the latest checkpoint is kept: start all workers again")
    raise SystemExit(INTERRUPTED)


def _tells_of_another(error: BaseException | None) -> bool:
    import tensorflow as tf

    absence = (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
        tf.errors.FailedPreconditionError,
    )
    # A hook that fails is named by an error of its own.
    return error is not None and (isinstance(error, absence) or _tells_of_another(error.__cause__))


@functools.cache
def _adder(strategy: Any) -> Callable[["np.ndarray"], Any]:
    """Return a function that adds up matrices of integers, of each replica one."""
    import tensorflow as tf

    def on_replica(rows: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(rows))

    def add_up(rows: tf.Tensor) -> tf.Tensor:
        sums = strategy.run(on_replica, args=(rows,))
        return strategy.experimental_local_results(sums)[0]

    signature = [tf.TensorSpec([None, None], tf.int64)]
    return tf.function(add_up, input_signature=signature, autograph=False)


class Workers:
    """What the workers of a strategy tell each other; where it is None, there is only this one."""

    def __init__(self, strategy: Any) -> None:
        resolver = strategy.cluster_resolver if strategy is not None else None
        self.strategy = strategy
        self.rank: int = resolver.task_id if resolver is not None else 0
        self.number = len(resolver.cluster_spec().as_dict()["worker"]) if resolver else 1
        # Copies of the model, of all workers.
        self.num_replicas: int = strategy.num_replicas_in_sync if strategy is not None else 1

    @property
    def is_chief(self) -> bool:
        """Whether this is the worker that writes."""
        return self.rank == 0

    @property
    def layout(self) -> str:
        """How the work is shared out, in words."""
        devices = self.num_replicas // self.number
        each = f"{devices} device{'s' * (devices > 1)}"
        return f"{self.number} workers with {each} each" if self.number > 1 else each

    def gather(self, numbers: "Sequence[int] | np.ndarray") -> "np.ndarray":
        """Return what each has given, int64 of (number, len(numbers)); all call it at one place."""
        import numpy as np

        mine = np.asarray(numbers, np.int64)
        if self.number == 1:
            return mine[np.newaxis]
        rows = np.zeros((self.number, len(mine)), np.int64)
        rows[self.rank] = mine
        replicas_here = self.num_replicas // self.number
        return _adder(self.strategy)(rows).numpy() // replicas_here

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Return what each worker has given, all of the same length; see `gather`."""
        import numpy as np

        rows = self.gather(np.frombuffer(content, np.uint8))
        return [row.astype(np.uint8).tobytes() for row in rows]

    def require_same(self, things: Mapping[str, str], meaning: str) -> None:
        """Raise a UsageError on all workers that names texts that differ, and their `meaning`."""
        digests = b"".join(hashlib.sha256(text.encode()).digest() for text in things.values())
        rows = self.gather_bytes(digests)
        of_each = [
            {row[begin : begin + 32] for row in rows} for begin in range(0, len(digests), 32)
        ]
        differing = [name for name, found in zip(things, of_each, strict=True) if len(found) > 1]
        if differing:
            raise UsageError(
                f"the workers differ in {', '.join(differing)} {meaning}; start the same command "
                "on machines of one kind"
            )
