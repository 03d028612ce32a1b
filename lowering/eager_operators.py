"""What PyTorch runs: every operator of graphwright as it is, by its own kernel for the device."""

from __future__ import annotations

from ..kernels.contract import OPERATORS
from .apply import Keep
from .registry import Lowering, register

for _name, _operator in OPERATORS.items():
    _devices = " and ".join(_operator.contract.devices)
    register(Lowering(_name, "eager", f"its kernel ({_devices})", Keep()))
