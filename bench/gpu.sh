#!/usr/bin/env bash
# GPU tests and benchmarks, offline, in less than nine minutes. With .venv if there is one, else with
# the python3 that holds torch. Writes bench.json and README.md into RESULTS.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || {
  echo "make gpu needs a CUDA GPU and a CUDA build of torch in $python" >&2
  exit 1
}
slug=$(printf '%s' "$gpu" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]' '-' | sed 's/-*$//')
results=${RESULTS:-bench/results/$slug}
mkdir -p "$results"

install=("$python" -m pip install --quiet --no-build-isolation --no-deps)
"${install[@]}" -e . || "${install[@]}" --user --break-system-packages -e .

# an interrupted run still names its failures and writes what it has measured
status=0
timeout -s INT -k 20 200 "$python" -m pytest -m gpu tests -q || status=$?
timeout -s INT -k 20 240 "$python" -m pytest bench --benchmark-only -q -s \
  --benchmark-json="$results/bench.json" || status=$?
if [ -s "$results/bench.json" ]; then
  "$python" -m lipfast report "$results/bench.json" --out "$results"
  cat "$results/README.md"
fi
exit "$status"
