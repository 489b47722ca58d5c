#!/usr/bin/env bash
# The real SGLang engine on a machine without a GPU, for checks: tests/sglang/setup.sh VENV
# Its wheels are CUDA builds, so they go in without their dependencies, and what SGLang imports in
# CPU mode is named here. With a GPU, install SGLang as its own documentation says instead.
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
pip=("$venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$here/constraints.txt")

"${PYTHON:-python3}" -m venv "$venv"
"${pip[@]}" torch numpy
"${pip[@]}" --no-deps torchvision triton xgrammar
"${pip[@]}" --requirement "$here/requirements.txt"
"${pip[@]}" --editable "$root[cli,transformers,conformance]"
"${pip[@]}" --no-deps sglang # last: pip would complain that its dependencies are missing

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp -r "$here/standin/sgl_kernel" "$site/"
# torchvision's C++ operators do not load beside a CPU build of torch. All its fake operators but
# two are registered only if the real one is there; make those two like the others.
"$venv/bin/python" - "$site/torchvision/_meta_registrations.py" <<'PYTHON'
import re, sys
from pathlib import Path

file = Path(sys.argv[1])
text, count = re.subn(
    r'^@torch\.library\.register_fake\("torchvision::(q?nms)"\)',
    r'@register_meta("\1")',
    file.read_text(),
    flags=re.MULTILINE,
)
if count != 2:
    sys.exit(f"expected 2 registrations to change in torchvision, found {count}: another version?")
file.write_text(text)
PYTHON
SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" -W ignore -c \
  'import sglang; from sglang.srt.entrypoints.engine import Engine; print("sglang", sglang.__version__)'
