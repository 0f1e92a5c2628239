"""A worker: one of the processes that share a job. It knows its rank and how many there are, and nothing of the others.

Shard n belongs to rank n % world_size. A rerun with another number of workers divides what is missing anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cache_format.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Worker:
    """This process's part in a job; alone by default."""

    rank: int = 0
    world_size: int = 1
    job: str | None = None
    """the same text in all workers of a job, and in no other job; None: alone"""
    local_rank: int = 0
    """among the workers of this machine: picks the CUDA device where --device is auto"""
    local_size: int = 1
    """workers that share the cores of this machine; 1 where each was given cores of its own, as srun does"""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"rank {self.rank} is not one of {self.world_size} workers; look at RANK and WORLD_SIZE")

    @property
    def leads(self) -> bool:
        """Whether this worker begins the cache, sees to it that all samples are prepared, and plans the shards."""
        return self.rank == 0

    def share(self, numbers: Iterable[int]) -> list[int]:
        """Those of the shards ``numbers`` that are this worker's."""
        return [number for number in numbers if number % self.world_size == self.rank]

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Worker:
        """As torchrun, srun or a Slurm array say; alone without any of them.

        Raises:
            InputError: the variables contradict each other.
        """
        number = _Numbers(environment)
        if number("WORLD_SIZE", 1) > 1:
            names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
            return Worker(
                rank=number("RANK", 0),
                world_size=number("WORLD_SIZE", 1),
                local_rank=number("LOCAL_RANK", 0),
                local_size=max(1, number("LOCAL_WORLD_SIZE", 1)),
                job="torchrun " + ":".join(environment.get(name, "") for name in names),
            )
        tasks = number("SLURM_NTASKS", 1) if "SLURM_STEP_ID" in environment else 1
        array = number("SLURM_ARRAY_TASK_COUNT", 1)
        if tasks * array == 1:
            return Worker()
        # An array's tasks may be numbered 5-8, or in steps.
        step = number("SLURM_ARRAY_TASK_STEP", 1)
        task = (number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)) // step
        job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID", "")
        return Worker(
            rank=task * tasks + (number("SLURM_PROCID", 0) if tasks > 1 else 0),
            world_size=array * tasks,
            local_rank=number("SLURM_LOCALID", 0),
            job=f"slurm {job}",
        )


class _Numbers:
    def __init__(self, environment: Mapping[str, str]):
        self._environment = environment

    def __call__(self, name: str, default: int) -> int:
        text = self._environment.get(name, str(default))
        if not (text.isascii() and text.isdigit()):
            raise InputError(f"environment variable {name} is {text!r}; it must be a number")
        return int(text)
