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

# Of the nine minutes the build takes what it needs, the tests at most 180 seconds, the report and the
# last benchmark 60; --budget skips the benchmarks that do not fit into the rest. A run that is
# interrupted still names its failures and writes what it has measured.
status=0
timeout -s INT -k 20 180 "$python" -m pytest -m gpu tests -q || status=$?
budget=$((480 - SECONDS))
if [ "$budget" -lt 60 ]; then budget=60; fi
measured=0
rm -f "$results/bench.json"  # never report an earlier run as this one
timeout -s INT -k 20 $((budget + 30)) "$python" -m pytest bench --benchmark-only -q -s \
  --budget="$budget" --benchmark-json="$results/bench.json" || measured=$?
if [ "$measured" -ne 0 ]; then status=$measured; fi
if [ -s "$results/bench.json" ]; then
  "$python" -m lipfast report "$results/bench.json" --out "$results"
  cat "$results/README.md"
fi
exit "$status"
