"""Nothing may wait for the device between scoring and compaction: shown without a device.

Tensors on `meta` have no values, so whatever needs a value on the host fails there. What waits on
a GPU without needing a value is refused by name.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Refuses operations for which the host would wait until a GPU has come that far."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            raise AssertionError(f"{func} reads values on the host")
        if name == "index_put_" and args[2].ndim == 0:
            raise AssertionError("assigning a number to chosen elements copies it to the device")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("choosing by booleans waits for their number")
        device = kwargs.get("device")
        if name == "_to_copy" and device not in (None, args[0].device):
            assert kwargs.get("non_blocking"), f"a copy from {args[0].device} to {device} waits"
        return func(*args, **kwargs)
