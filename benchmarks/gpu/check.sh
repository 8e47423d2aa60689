#!/usr/bin/env bash
# The one command for a machine with a GPU, from the root of the project: OUT=FOLDER bash .gpu/gpu_check.sh
# Stages with a limit in seconds each, and IN_ALL together; a log of each in $OUT. PRETEND=1: a dry run without a GPU.
set -u
: "${OUT:=runs/gpu}" "${PYTHON:=python3}" "${IN_ALL:=555}"
export OUT PYTHON PYTHONPATH="/tmp/gpu-site:$PWD/src:$PWD/tests" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 XDG_CACHE_HOME="${XDG_CACHE_HOME:-/tmp/gpu-cache}"
[ -d benchmarks/gpu ] || { echo "run this from the root of the project"; exit 2; }
mkdir -p "$OUT" && rm -f "$OUT/timing.jsonl"
SECONDS=0 failed='' slower=1
[ -z "${PRETEND:-}" ] || { export OMP_NUM_THREADS=1 && slower=20; } # two busy cores take their time

stage() { # NAME LIMIT COMMAND...: its log is $OUT/NAME.log; the end of it is shown
  local name=$1 limit=$(($2 * slower)) left=$((IN_ALL * slower - SECONDS)) began=$SECONDS status
  shift 2
  [ "$left" -gt 15 ] || { echo "== $name: no time left"; failed="$failed $name"; return 1; }
  [ "$limit" -lt "$left" ] || limit=$left
  echo "== $name, at most $limit s"
  SECONDS_LEFT=$((limit * 9 / 10)) timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1
  status=$?
  tail -n 14 "$OUT/$name.log" | cut -c1-300
  echo "   exit status $status after $((SECONDS - began)) s"
  [ $status = 0 ] || { failed="$failed $name"; return 1; }
}

# All that later stages import. The wheels of `prepare.sh` are for what the machine lacks.
imports='
import sys; sys.path[:0] = ["benchmarks/gpu"]
import datasets, efficientnet_lite_pytorch, pydantic, pytest, transformers, tyro
import consonar.cli, consonar.training.run, parity, timing, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "datasets", datasets.__version__)'
if [ -z "${PRETEND:-}" ] && [ -d .gpu/whl ] && ! "$PYTHON" -c "$imports" > /dev/null 2>&1; then
  stage install 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target /tmp/gpu-site .gpu/whl/*.whl
fi
if stage imports 60 "$PYTHON" -c "$imports"; then
  tests() { stage "$1" 120 "$PYTHON" -m pytest -m gpu tests/gpu -q -p no:cacheprovider -k "$2"; }
  [ -n "${PRETEND:-}" ] || tests tests "not (compiled or shards)"
  stage parity 120 "$PYTHON" benchmarks/gpu/parity.py
  stage timing 190 "$PYTHON" benchmarks/gpu/timing.py
  stage real 150 bash benchmarks/gpu/real.sh
  # The compiler and NCCL may take minutes the first time: after all else.
  [ -n "${PRETEND:-}" ] || tests slow_tests "compiled or shards"
fi
echo "== after $SECONDS s, failed:${failed:- none}"
(cd "$OUT" && tar czf logs.tgz ./*.log && rm -f ./*.log)
[ -z "$failed" ]
