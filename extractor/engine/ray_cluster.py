"""A Ray cluster: which one, how to reach it, and what it has room for. Ray itself is imported late: it is an extra."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from cache_format.errors import InputError
from extractor.config import TargetOptions

_PASSED_ON = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
)
"""Environment variables that the actors get from the driver: which store, but no credentials, which nodes have."""

_PASSED_ON_OF_VLLM = re.compile(r"VLLM_(?!.*KEY).*")
"""Which kernels it takes, among others."""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Which cluster, and how much of it."""

    address: str | None = None
    """``auto`` or host:port of a running cluster; None: what RAY_ADDRESS says, or one of this machine alone"""
    num_workers: int | None = None
    """actors; None: as many as the cluster has room for at the start (without GPUs: one a node)"""
    gpus_per_worker: int | None = None
    """None: those of an engine of vLLM, else 1; 0 with --device cpu"""

    def __post_init__(self) -> None:
        if self.address is not None and self.address.startswith("ray://"):
            raise InputError("--address ray://...: run the command on a node of the cluster, with --address auto")


def gpus_of_actor(target: TargetOptions, asked: int | None) -> int:
    """GPUs that Ray is to give an actor.

    Raises:
        InputError: vLLM's engine takes another number than was asked for.
    """
    if asked is None:
        return 0 if target.device == "cpu" else target.devices
    if target.backend == "vllm" and asked not in (0, target.devices):
        raise InputError(
            f"--gpus-per-worker {asked}: an engine of --tensor-parallel {target.tensor_parallel} and "
            f"--pipeline-parallel {target.pipeline_parallel} takes {target.devices}; leave it out"
        )
    return asked


def import_ray() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'dflash-cache[ray]'") from None
    return ray


def require_reachable(address: str | None) -> None:
    """Ray itself tries for minutes, and then ends the process.

    Raises:
        InputError: nobody answers at host:port.
    """
    host, colon, port = (address or "").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(f"--address {address}: no Ray cluster to be reached there ({error})") from None


def environment() -> dict[str, str]:
    """What of this process's environment the actors get."""
    return {
        name: value for name, value in os.environ.items() if name in _PASSED_ON or _PASSED_ON_OF_VLLM.fullmatch(name)
    }


@contextmanager
def connected(ray: Any, cluster: RayOptions) -> Iterator[None]:
    """A context in which this process is a driver of the cluster.

    Raises:
        InputError: it cannot be reached.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # Without an address Ray would join whatever cluster was last started on this machine.
        address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address=address, log_to_driver=False, logging_level="error", configure_logging=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--address {cluster.address}: no Ray cluster to be reached there ({error})") from None
    # Ray puts handlers of its own in place.
    for number, handler in handlers.items():
        signal.signal(number, handler)
    # Ray prints what it hears of dead nodes, the last of it as it shuts down; stdout is for the report.
    with redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()


def room(ray: Any, gpus: int) -> int:
    """Actors that the cluster has room for as it is now; at least one, whose node may yet come."""
    if gpus:
        return max(1, int(ray.cluster_resources().get("GPU", 0)) // gpus)
    return nodes(ray)


def nodes(ray: Any) -> int:
    """Nodes of the cluster as it is now that an actor may be on; at least one."""
    return max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes()))
