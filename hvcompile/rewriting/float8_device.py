"""Whether float8 products run on the device that a trunk's blocks are on."""

from __future__ import annotations

import torch

from hvcompile.float8 import format as float8_format
from hvcompile.float8 import linear as float8_linear
from hvcompile.graph.nodes import is_tensor
from hvcompile.journal import Declined
from hvcompile.pipeline import Context
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.trunk import Trunk


def device_of(trunk: Trunk) -> torch.device | Declined:
    """The device that the blocks are on."""
    devices = (value(node).device for block in trunk.blocks for node in block.operands if is_tensor(node))
    return next(devices, None) or Declined("the blocks take no tensor")


def runs_elsewhere(device: torch.device, context: Context) -> bool:
    """Whether float8 kernels aren't needed here: on the meta device nothing runs, and a CPU emulates on request."""
    return device.type == "meta" or (device.type == "cpu" and context.requested)


def check_device(device: torch.device, context: Context) -> Declined | None:
    """Decline a device on which float8 does not pay; a CPU does where the user asked for the pass by name."""
    if device.type == "meta":
        planned = context.planned_for
        if context.requested or (planned is not None and float8_format.DTYPE in planned.flops):
            return None
        return Declined("it is not known to run on a GPU with float8 products")
    if runs_elsewhere(device, context):
        return None
    reason = float8_linear.reason_unfit(device)
    return Declined(reason) if reason else None
