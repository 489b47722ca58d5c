"""The real LMDeploy PyTorch engine on a machine without a GPU: for checks only.

LMDeploy 0.18.0 has no CPU device. Everything above its device layer is plain Python and torch: the
scheduler, the paged KV cache's book-keeping, the models, the image preprocessing, the server. That
part runs here as installed. Three things below it are replaced:

- `device`: what torch is asked to do on "cuda" happens on the CPU (LMDeploy's integrations of other
  accelerators redirect that name as well);
- `operators`: attention over the paged cache in plain torch, in place of the Triton kernels; the
  other operators are LMDeploy's own plain-torch defaults. With `TRITON_INTERPRET=1` the Triton
  kernels stay, and Triton's interpreter runs them (`interpreter`);
- two questions about data types, whose answers depend on the GPU or leave float32 out.

Beside LMDeploy, torchvision is told two operators' names: its wheels are CUDA builds, whose own
operators do not load with a CPU build of torch.

`tests/lmdeploy/prepare.sh` puts a line into the environment that calls `replace_on_import` whenever
Python starts. So the engine's worker processes and LMDeploy's own command line are covered too,
and torch stays as it is in a process that never imports lmdeploy. Never covered: quantised models
and KV caches, MoE, LoRA, sliding windows; asking for one raises an error.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

KERNELS = "lmdeploy.pytorch.kernels.cuda"


def replace_on_import() -> None:
    """From now on, importing lmdeploy in this process imports it with the stand-in."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Changes modules right after they ran, before whoever imports them sees a name of theirs."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in _PREPARE:
            _PREPARE[name]()
        change = _change(name)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_change(module: ModuleType) -> None:
                run(module)
                change(module)

            spec.loader.exec_module = run_and_change  # type: ignore[method-assign] # a stand-in
        return spec


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _prepare() -> None:
    import torch

    from . import device

    if torch.cuda.is_available():
        raise RuntimeError(
            "this environment holds a CPU stand-in for LMDeploy's device layer, for checks only, "
            "and this machine has a GPU: install LMDeploy in another environment"
        )
    # read when lmdeploy.pytorch.envs is imported, here and in worker processes
    os.environ["LMDEPLOY_ENABLE_CHECK_ENV"] = "0"  # it looks for a GPU
    os.environ.setdefault("LMDEPLOY_SKIP_WARMUP", "1")
    # LMDeploy compiles a few small functions, which costs more time than it saves
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    device.redirect()


def _declare_operators() -> None:
    """Torchvision registers fakes for these two without asking whether it has them."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)


def _change(name: str) -> Callable[[ModuleType], None] | None:
    if name in _CHANGES:
        return _CHANGES[name]
    if interpreting() and name.startswith(f"{KERNELS}."):
        from . import interpreter

        return interpreter.change
    return None


def _select_operators(selector: ModuleType) -> None:
    def backend():
        from .operators import CPUOpsBackend  # later: its own imports need this selector

        return CPUOpsBackend

    if not interpreting():
        selector._get_backend = backend


def _allow_bfloat16(utils: ModuleType) -> None:
    utils.is_bf16_supported = lambda device_type="cuda": True


def _allow_float32(engine: ModuleType) -> None:
    """Pixels for a float32 engine: the configuration's other data types are float16, bfloat16."""
    resolve = engine._resolve_mm_feature_dtype

    def resolve_float32(hf_config, backend_config):
        if getattr(backend_config, "dtype", "auto") == "float32":
            import torch

            return torch.float32
        return resolve(hf_config, backend_config)

    engine._resolve_mm_feature_dtype = resolve_float32


_LIBRARIES: list[Any] = []  # torch forgets what a library declared when the object goes
_PREPARE: dict[str, Callable[[], None]] = {
    "lmdeploy": _prepare,
    "torchvision._meta_registrations": _declare_operators,
}
_CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "lmdeploy.utils": _allow_bfloat16,
    "lmdeploy.vl.engine": _allow_float32,
    "lmdeploy.pytorch.backends.selector": _select_operators,
}
