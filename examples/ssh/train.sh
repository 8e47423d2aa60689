#!/bin/bash
# bash examples/ssh/train.sh "node1 node2" rear-l runs/rear-l [options of train]
# The same folder, with code, environment and data, at the same place on every node; GPUS=8 of each. The first node is
# where they meet. The same call goes on with a run that has ended early. Ctrl-C and SIGTERM close the terminals of all
# nodes, where the run saves and ends.
set -eu
if [ $# -lt 3 ]; then
    echo "usage: $0 NODES RECIPE OUT [options of train]" >&2
    exit 2
fi
nodes=$1 recipe=$2 out=$3
shift 3
# By its whole name: a shell that ssh starts knows nothing of an active environment.
torchrun=$(command -v torchrun || echo "$PWD/.venv/bin/torchrun")
read -ra names <<<"$nodes"
words=(env TORCH_ELASTIC_SHUTDOWN_TIMEOUT=570 "$torchrun" --nnodes "${#names[@]}" --nproc-per-node "${GPUS:-8}"
    --rdzv-backend c10d --rdzv-endpoint "${names[0]##*@}:${PORT:-29500}" --rdzv-id "$(basename "$out")"
    -m consonar train "$recipe" --out "$out" --resume-if-begun "$@")
printf -v quoted '%q ' "${words[@]}"
printf -v command 'cd %q && exec %s' "$PWD" "$quoted"
started=()
trap 'kill "${started[@]}" 2>/dev/null || true' TERM INT
for name in "${names[@]}"; do
    ${SSH:-ssh -tt} "$name" "$command" &
    started+=($!)
done
status=0
for one in "${started[@]}"; do wait "$one" || status=$?; done
exit "$status"
