#!/bin/sh
# All GPU figures in one go, under ten minutes: benchmarks/gpu.sh [FOLDER FOR RESULTS]
set -e
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out"
[ -d "$out/torchscale" ] || python3 -m pip install --quiet --no-deps --target "$out/torchscale" torchscale==0.3.0
PYTHONPATH=src timeout 580 python3 benchmarks/gpu.py --torchscale "$out/torchscale" --json "$out/gpu.json"
