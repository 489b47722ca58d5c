#!/usr/bin/env bash
# A real engine on a machine without a GPU, for checks: tests/environment.sh ENGINE VENV
# Its wheels are CUDA builds, so they go in without their dependencies; what the engine imports on a
# CPU is named in tests/ENGINE/requirements.txt, and prepare.sh there does what only this engine needs.
# With a GPU, install the engine as its own documentation says instead.
set -euo pipefail
engine=$1 venv=$2
tests=$(cd "$(dirname "$0")" && pwd)
pip=("$venv/bin/pip" install --quiet --disable-pip-version-check
  --constraint "$tests/$engine/constraints.txt")

"${PYTHON:-python3}" -m venv "$venv"
"${pip[@]}" torch numpy
"${pip[@]}" --no-deps torchvision triton xgrammar
"${pip[@]}" --requirement "$tests/$engine/requirements.txt"
"${pip[@]}" --editable "$tests/..[cli,transformers,conformance]"
"${pip[@]}" --no-deps "$engine" # last: pip would complain that its dependencies are missing
"$tests/$engine/prepare.sh" "$venv"
