#!/usr/bin/env bash
# What SGLang needs on a CPU beside its packages: tests/sglang/prepare.sh VENV
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
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
