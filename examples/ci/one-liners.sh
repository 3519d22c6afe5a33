#!/usr/bin/env bash
# What fits into one line of a pipeline. Each line works by itself, after those above it.
set -euo pipefail

# How much would a scheme save? Reads headers alone.
quantcli inspect model.onnx --scheme int8 --scheme int4 --quiet

# Quantize, and fail where the result does not decode to what was meant, or the runtime does not run it.
quantcli convert model.onnx -o int8.onnx --scheme int8-static --data calibration.npz --force --quiet

# Gate on accuracy and size: exit status 1 where one fails. JUnit and a page for people are written all the same.
quantcli eval model.onnx int8.onnx --data test.npz --require "top1_drop <= 0.01" --require "size_ratio <= 0.5" --junit eval.xml --html eval.html --quiet

# Keep what was measured, and let no later model be worse by more than half a point.
quantcli eval model.onnx int8.onnx --data test.npz --json --quiet > baseline.json
quantcli eval model.onnx int8.onnx --data test.npz --baseline baseline.json --require "top1_drop <= 0.005" --quiet

# One figure of a report.
python3 -c 'import json, sys; print(json.load(sys.stdin)["models"][1]["metrics"]["top1"])' < baseline.json

# Only where the model changed since the report: its hash is in there.
test "$(sha256sum < model.onnx | cut -d" " -f1)" = "$(python3 -c 'import json; print(json.load(open("baseline.json"))["models"][0]["sha256"])')" && echo "same model"

# Latency, in a comment of a pull request or anywhere that takes Markdown.
quantcli bench model.onnx int8.onnx --data test.npz --runs 20 --markdown bench.md --quiet
