"""What torch is asked to do on "cuda" happens on the CPU.

Streams and events become objects without an effect: the CPU runs everything in order. Functions
that take a device are wrapped, because a torch mode would hold for one thread only and the engine
runs in several.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

MEMORY = 1 << 30  # bytes that the "GPU" has free; without a number of blocks, the KV cache's size
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like"),
    *("randperm", "tensor", "zeros", "zeros_like"),
)
METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


class Stream:
    """In place of `torch.cuda.Stream`."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def synchronize(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = synchronize


class Event:
    """In place of `torch.cuda.Event`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 0.0

    def record(self, *args: Any) -> None:
        pass

    wait = synchronize = record


def redirect() -> None:
    """Change torch in this process."""
    # Dynamo lists torch's functions by identity when it is imported: before they change.
    import torch._dynamo

    _replace_cuda()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    for owner in (torch.Tensor, torch.nn.Module):
        owner.to = _to_cpu(owner.to)  # type: ignore[method-assign] # a stand-in
        owner.cuda = _itself  # type: ignore[method-assign] # a stand-in
    torch.Tensor.pin_memory = _itself  # type: ignore[method-assign] # a stand-in
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign] # a stand-in


def _replace_cuda() -> None:
    cuda: Any = torch.cuda
    stream = Stream()
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = cuda.device = lambda *args: contextlib.nullcontext()
    cuda.current_device = lambda: 0
    cuda.set_device = cuda.synchronize = cuda.empty_cache = cuda.ipc_collect = _nothing
    cuda.mem_get_info = lambda device=None: (MEMORY, MEMORY)
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.is_current_stream_capturing = lambda: False
    cuda.graph_pool_handle = lambda: (0, 0)
    torch._C._cuda_clearCublasWorkspaces = _nothing  # type: ignore[attr-defined] # a stand-in


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _itself(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    return tensor


def _cpu_for(device: Any) -> Any:
    """A device's place on this machine; anything that is no CUDA device stays what it is."""
    if isinstance(device, str | torch.device):
        return torch.device("cpu") if torch.device(device).type == "cuda" else device
    return torch.device("cpu") if type(device) is int else device


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that take their device by name."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu_for(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper


def _to_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """For `to`, which takes its device by name or first."""
    by_name = _on_cpu(function)

    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return by_name(self, *(_cpu_for(arg) for arg in args[:1]), *args[1:], **kwargs)

    return wrapper
