"""Build hook: compile the CPU kernels; where there is no compiler, install without them."""

from __future__ import annotations

import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileKernels(BuildHookInterface[Any]):
    """Adds the shared libraries of ep_core/kernels to wheels and to editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; `version` is "editable" or "standard"."""
        if self.target_name != "wheel":
            return
        # by path: the package itself needs torch, which a build does not
        build = runpy.run_path(str(Path(self.root) / "ep_core/kernels/build.py"))
        folder = build["LIBRARIES"]
        if version != "editable":
            self.temporary = tempfile.TemporaryDirectory()
            folder = Path(self.temporary.name)
        try:
            made = build["compile_all"](folder)
        except RuntimeError as error:
            self.app.display_warning(f"entropyprune will score in torch: {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"py3-none-{platform}"}
        if version != "editable":
            build_data["force_include"] |= {
                str(path): f"ep_core/kernels/lib/{path.name}" for path in made
            }

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled for a wheel."""
        if hasattr(self, "temporary"):
            self.temporary.cleanup()
