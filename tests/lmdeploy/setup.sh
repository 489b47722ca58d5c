#!/usr/bin/env bash
# The real LMDeploy engine on a machine without a GPU, for checks: tests/lmdeploy/setup.sh VENV
# It is installed without its dependencies, which are CUDA builds and tools that the PyTorch engine
# does not load for one machine. With a GPU, install LMDeploy as its own documentation says instead.
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
"${pip[@]}" --no-deps lmdeploy # last: pip would complain that its dependencies are missing

# the stand-in for its device layer: used from where it is, by every Python process that starts here
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
printf '%s\n' "$here/standin" 'import lmdeploy_cpu; lmdeploy_cpu.replace_on_import()' \
  >"$site/lmdeploy_cpu.pth"
"$venv/bin/python" -W ignore -c 'import lmdeploy.pytorch.engine; print("lmdeploy", lmdeploy.__version__)'
