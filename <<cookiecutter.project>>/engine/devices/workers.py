"""Lets several processes that run the same command train one model, on one machine or many. Only
the first one, the chief, writes the run folder."""

import contextlib
import functools
import json
import logging
import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vegab import UsageError
from vegab.config import flatten
from vegab.exits import INTERRUPTED as INTERRUPTED

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf

log = logging.getLogger(__name__)
SECONDS_TO_COME = 300  # that the workers wait for each other at the start
SECONDS_TO_TELL = 30  # that one that is refused waits to tell them
HERE, REFUSED, GO = b"here", b"refused", b"go"  # what they say to the chief, and it to them
APART, MET, ALL_KNOW = range(3)
_stage = APART  # of this process: whether it is in TensorFlow, and all know that they are refused
SECONDS_TO_REGISTER = 45  # once all are there, with TensorFlow's service, or all end
SECONDS_OF_SILENCE = 20  # after which a worker is taken for dead
FIRST_PORT, NUM_PORTS, PORTS_PER_JOB = 20_000, 12_000, 64  # below those that systems hand out
ADDRESS = re.compile(r"(?:\[[^\s/\[\]]+\]|[^\s/:\[\]]+):([0-9]{1,5})")
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
    """Meet the other workers, before TensorFlow has run anything; return the strategy by which all
    train one model. Its servers listen on all networks of the machine."""
    import tensorflow as tf

    from engine import keras_private

    global _stage
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
    log.info("all are there; if one dies now, the others end within %d s", SECONDS_TO_REGISTER)
    try:
        with keras_private.exiting_after(SECONDS_TO_REGISTER, INTERRUPTED):
            met = tf.distribute.MultiWorkerMirroredStrategy(resolver)
        _stage = MET
        return met
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
    port = FIRST_PORT + int(os.environ.get("SLURM_JOB_ID", "0")) * PORTS_PER_JOB % NUM_PORTS
    # GPUs are SLURM's business; the resolver asks for a number, and fails at 0.
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=port, gpus_per_node=number, gpus_per_task=1, auto_set_gpu=False
    )
    addresses = resolver.cluster_spec().as_dict()["worker"]
    # It sorts the machines by name, n10 before n9; SLURM numbers the tasks in its own order.
    hosts = keras_private.hosts_in(os.environ["SLURM_STEP_NODELIST"])
    addresses.sort(key=lambda address: hosts.index(address.rpartition(":")[0]))
    return rank, tuple(addresses)


def free_ports(number: int) -> list[int]:
    """Return ports of the loopback on which nothing listens."""
    with contextlib.ExitStack() as stack:
        opened = (socket.create_server(("127.0.0.1", 0)) for _ in range(number))
        sockets = [stack.enter_context(each) for each in opened]
        return [each.getsockname()[1] for each in sockets]


def on_this_machine(number: int) -> list[str]:
    """Return `TF_CONFIG` for each of some workers over loopback, at ports that are free now."""
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
        shown = f"{text!r} ({type(error).__name__}: {error})"
        raise UsageError(f"TF_CONFIG is {shown}; expected {EXAMPLE}, or unset it") from None
    if strange := sorted(by_type.keys() - {"chief", "worker"}):
        raise UsageError(f"TF_CONFIG names {', '.join(strange)}; expected only chief and worker")
    chiefs = by_type.get("chief", [])
    addresses = (*chiefs, *by_type.get("worker", []))
    for address in addresses:
        match = ADDRESS.fullmatch(str(address))
        if not match or not 1 <= int(match[1]) <= 65535:
            form = "HOST:PORT, or [HOST]:PORT for IPv6, with a port from 1 to 65535"
            raise UsageError(f"TF_CONFIG has the address {address!r}; expected {form}")
        if addresses.count(address) > 1:
            raise UsageError(f"TF_CONFIG has the address {address!r} twice; give each worker one")
    if type(index) is not int or not 0 <= index < number:
        place = f"{kind} {index!r} of {number}"
        raise UsageError(f"TF_CONFIG says that this is {place}; indices begin with 0")
    return index + len(chiefs) * (kind == "worker"), addresses


def _meet(rank: int, addresses: Sequence[str]) -> None:
    """Wait until all are there: TensorFlow's own waiting ends at no signal and no time limit."""
    awaited = ", ".join(addresses[1:] if rank == 0 else addresses[:1])
    log.info("worker %d of %d waits for %s", rank, len(addresses), awaited)
    with _socket(rank, addresses) as mine:
        if rank == 0:
            answer, missing = _lead(mine, addresses)
        else:
            answer, missing = _ask(rank, addresses[0], HERE, SECONDS_TO_COME), [addresses[0]]
    if answer == GO:
        return
    reason = f"{', '.join(missing)} did not connect in {SECONDS_TO_COME} s"
    if answer == REFUSED:
        reason = "another worker was refused, and says why"
    log.error("%s; start all workers again", reason)
    raise SystemExit(INTERRUPTED)


def _socket(rank: int, addresses: Sequence[str]) -> socket.socket:
    """Return a socket at this worker's port, for both versions of IP; UsageError if it is taken."""
    port, both = int(addresses[rank].rpartition(":")[2]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        wrong = f"worker {rank} is to listen on port {port} ({addresses[rank]}), and cannot"
        hint = "wait until it is free, or name another one for all"
        raise UsageError(f"{wrong}: {os.strerror(error.errno or 0)}; {hint}") from None


def _lead(
    mine: socket.socket, addresses: Sequence[str], answer: bytes = GO
) -> tuple[bytes, list[str]]:
    """Wait for all other workers, and answer them; return the answer, and who did not come."""
    mine.settimeout(0.2)
    there: dict[int, socket.socket] = {}
    until = time.monotonic() + SECONDS_TO_COME
    while True:
        missing = [address for rank, address in enumerate(addresses) if rank and rank not in there]
        is_over = not missing or time.monotonic() > until
        if is_over and missing and answer == GO:
            answer = b""
        if is_over or answer == REFUSED:
            until = min(until, time.monotonic() + SECONDS_TO_TELL)
            for connection in there.values():
                with contextlib.suppress(OSError):  # it has its answer
                    connection.sendall(answer)
                    connection.close()
        if is_over:
            return answer, missing
        with contextlib.suppress(OSError, ValueError):
            connection = mine.accept()[0]
            connection.settimeout(2)
            said, _, rank = connection.recv(64).partition(b" ")
            there[int(rank)] = connection
            answer = REFUSED if said == REFUSED else answer


def _ask(rank: int, address: str, word: bytes, seconds: float) -> bytes:
    """Tell the chief a word, and return its answer; nothing if there is none."""
    host, _, port = address.rpartition(":")
    place, until = (host.strip("[]"), int(port)), time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(place, 2) as chief:
            chief.sendall(word + b" %d" % rank)
            chief.settimeout(max(until - time.monotonic(), 0.1))
            if answer := chief.recv(64):
                return answer
        time.sleep(0.2)
    return b""


def tell_of_failure() -> None:
    """Tell the other workers that this one was refused or has failed, so that they do not wait."""
    with contextlib.suppress(UsageError):  # it was refused because of this
        if worker().number == 1 or _stage == ALL_KNOW:
            return
        if _stage == MET:
            from engine import keras_private

            keras_private.tell_workers("another worker was refused or has failed")
            return
        rank, addresses = cluster()
        if rank > 0:
            _ask(rank, addresses[0], REFUSED, SECONDS_TO_TELL)
            return
        with _socket(rank, addresses) as mine:
            _lead(mine, addresses, REFUSED)


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
    from tensorflow import errors

    gone = (errors.UnavailableError, errors.AbortedError, errors.CancelledError)
    late = (errors.DeadlineExceededError, errors.FailedPreconditionError)
    # A hook that fails is named by an error of its own.
    is_absence = isinstance(error, (*gone, *late))
    return error is not None and (is_absence or _tells_of_another(error.__cause__))


@functools.cache
def _adder(strategy: Any) -> Callable[["np.ndarray"], Any]:
    """Return a function that adds up matrices of integers, one from each replica."""
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
        return _adder(self.strategy)(rows).numpy() // (self.num_replicas // self.number)

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Return what each worker has given, all of the same length; see `gather`."""
        import numpy as np

        rows = self.gather(np.frombuffer(content, np.uint8))
        return [row.astype(np.uint8).tobytes() for row in rows]

    def require_same(self, things: Mapping[str, Any], meaning: str) -> None:
        """Raise a UsageError on all workers that names what differs of plain things."""
        global _stage
        text = json.dumps(flatten(dict(things)), sort_keys=True).encode()
        longest = int(self.gather([len(text)]).max())
        of_each = [json.loads(row) for row in self.gather_bytes(text.ljust(longest))]
        keys = sorted({key for each in of_each for key in each})
        if differing := [key for key in keys if len({str(each.get(key)) for each in of_each}) > 1]:
            _stage = ALL_KNOW
            hint = "start the same command on machines of one kind"
            raise UsageError(f"the workers differ in {', '.join(differing)} {meaning}; {hint}")
