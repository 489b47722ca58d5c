"""What only a GPU would show, shown without one.

Nothing may wait for the device between scoring and compaction: tensors on `meta` have no values, so
whatever needs a value on the host fails there, and what waits on a GPU without needing a value is
refused by name. And no operation may mix tensors of two devices: `meta` is the second one.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ep_core.kernels import reference
from ep_core.kernels.interface import Kernels

# for `meta` in the place of Triton's: torch's eigenvalues would wait on a GPU
KERNELS = Kernels("none", lambda q, how: q.float().sum(dim=(1, 2)), reference.greedy_renyi2, list)

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_linalg_eigh")


class NoWaiting(TorchDispatchMode):
    """Refuses operations for which the host would wait until a GPU has come that far."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS:
            raise AssertionError(f"{func} reads values on the host")
        if name == "index_put_" and args[2].ndim == 0:
            raise AssertionError("assigning a number to chosen elements copies it to the device")
        if name in ("index", "index_put_"):
            for index in args[1]:
                if index is not None and index.dtype == torch.bool:
                    raise AssertionError("choosing by booleans waits for their number")
                if index is not None and index.device != args[0].device:
                    raise AssertionError("indices of another device are copied")
        if name == "copy_" and args[0].device != args[1].device:
            assert args[2:] == (True,), f"a copy from {args[1].device} waits"
        device = kwargs.get("device")
        if name == "_to_copy" and device not in (None, args[0].device):
            assert kwargs.get("non_blocking"), f"a copy from {args[0].device} to {device} waits"
        return func(*args, **kwargs)


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of different devices, indices too; only copies may."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim}  # numbers may come from anywhere
        name = func.overloadpacket.__name__
        assert len(devices) < 2 or name in ("copy_", "_to_copy"), f"{func} mixes {devices}"
        return func(*args, **kwargs)
