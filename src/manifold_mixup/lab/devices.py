"""Where a run trains: one device, or several processes that share every batch (data parallel), through Fabric."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric

from manifold_mixup.lab.errors import UsageError

# Fabric says on stderr which precision and processes it has. Records say it too, and it would break progress bars.
logging.getLogger("lightning_fabric.utilities.rank_zero").setLevel(logging.WARNING)

__all__ = ["Devices", "gather", "leave", "make_fabric"]


@dataclass(frozen=True)
class Devices:
    """What a run trains on.

    Attributes:
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        count: Processes, each with a device of its own, on every machine.
        nodes: Machines.
    """

    accelerator: str = "auto"
    count: int = 1
    nodes: int = 1

    @property
    def several(self) -> bool:
        """Whether more than one process trains a network."""
        return self.count * self.nodes > 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints; asked before anything is launched."""
        if not self.several:
            return True
        return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK") or 0) == 0


def make_fabric(devices: Devices, precision: Any) -> Fabric:
    """Fabric for one run; with several processes it joins them, the first time.

    Raises:
        UsageError: There are no such devices, or fewer.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*srun.*"
            )  # one process on a SLURM machine is what was asked for
            fabric = Fabric(
                accelerator=devices.accelerator,
                devices=devices.count,
                num_nodes=devices.nodes,
                strategy="ddp" if devices.several else "auto",
                precision=precision,
            )
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{devices.count} devices of accelerator {devices.accelerator!r}: {error}") from error
    if devices.several:
        fabric.launch()
    return fabric


def gather(fabric: Fabric, value: Mapping[str, Any]) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def leave(code: int) -> None:
    """End a process that trained together with others; return if it did not.

    Threads of the gloo backend outlive the process group, and one that frees a tensor while Python shuts down aborts
    the process. So Python does not shut down here: what was printed is flushed, and the process ends.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if code == 0:
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
