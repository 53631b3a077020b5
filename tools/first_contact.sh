#!/usr/bin/env bash
# What the first minutes with a GPU bring back, in one command: docs/first_contact.md.
#   bash tools/first_contact.sh OUT [--minutes 8] [--stages STAGE ...] [--emulated]
# PYTHON names the interpreter that has PyTorch; python3 if it is not set.
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$tools${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m first_contact "$@"
