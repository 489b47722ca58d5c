"""Compile csrc/ to shared libraries; standard library only, run by the build hook (hatch_build.py).

One library for each instruction set, so that no code of one ends up in another: the loader picks
at run time. They are plain C interfaces that know nothing of torch or Python, so one build serves
every version of both.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARIES = Path(__file__).parent / "lib"

# in the order of ep_variant() in csrc/library.cpp; the first runs on every processor
VARIANTS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "AVX2": ("-mavx2", "-mfma"),
    "AVX-512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")


def library(variant: str, folder: Path = LIBRARIES) -> Path:
    """Where a variant's library lies."""
    return folder / f"libentropyprune-{variant.lower()}.so"


def digest() -> str:
    """Identifies the sources, so that a library of older ones is noticed."""
    content = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    return hashlib.sha256(content).hexdigest()[:16]


def compiler() -> str | None:
    """The C++ compiler: the variable CXX, or what is installed."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def compile_all(folder: Path = LIBRARIES) -> list[Path]:
    """Compile every variant into `folder`.

    Raises:
        RuntimeError: there is no compiler, or the baseline does not compile. A variant that only
            this compiler does not know is left out.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler was found when entropyprune was installed")
    folder.mkdir(exist_ok=True)
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    made = []
    for variant, options in VARIANTS.items():
        if options and not x86:
            continue
        out = library(variant, folder)
        new = out.with_suffix(".new")  # a process that has the old one loaded keeps it
        define = f'-DEP_SOURCES="{digest()}"'
        call = [command, *FLAGS, *options, define, *sources, "-o", str(new), "-pthread"]
        result = subprocess.run(call, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            new.replace(out)
            made.append(out)
        elif not options:
            raise RuntimeError(f"{command} failed: {result.stderr.strip().splitlines()[-1:]}")
    return made
