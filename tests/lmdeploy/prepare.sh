#!/usr/bin/env bash
# What LMDeploy needs on a CPU beside its packages: tests/lmdeploy/prepare.sh VENV
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
# the stand-in for its device layer: used from where it is, by every Python process that starts here
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
printf '%s\n' "$here/standin" 'import lmdeploy_cpu; lmdeploy_cpu.replace_on_import()' \
  >"$site/lmdeploy_cpu.pth"
"$venv/bin/python" -W ignore -c 'import lmdeploy.pytorch.engine; print("lmdeploy", lmdeploy.__version__)'
