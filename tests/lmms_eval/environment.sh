#!/usr/bin/env bash
# lmms-eval with what it imports for tasks on pictures: tests/lmms_eval/environment.sh VENV
# All that it declares, from LoRA to video decoders, takes several times as long to install.
# To evaluate, install it whole: pip install 'entropyprune[eval]'
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
pip=("$venv/bin/pip" install --quiet --disable-pip-version-check
  --constraint "$here/../../constraints.txt" --constraint "$here/constraints.txt")

"${PYTHON:-python3}" -m venv "$venv"
"${pip[@]}" --requirement "$here/requirements.txt" --editable "$here/../..[cli,transformers,conformance]"
"${pip[@]}" --no-deps lmms-eval # last: pip would complain of what is missing
