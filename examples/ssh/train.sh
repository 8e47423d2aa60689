#!/bin/bash
# bash examples/ssh/train.sh "node1 node2" rear-l runs/rear-l [options of train]
# The same folder, with the code and the data, on every node; GPUS=8 of each. The first node is where they meet.
set -eu
nodes=$1 recipe=$2 out=$3
shift 3
resume=()
[ -f "$out/config.json" ] && resume=(--resume)
read -ra names <<<"$nodes"
words=(torchrun --nnodes "${#names[@]}" --nproc-per-node "${GPUS:-8}" --rdzv-backend c10d
    --rdzv-endpoint "${names[0]}:${PORT:-29500}" --rdzv-id "$(basename "$out")"
    -m consonar train "$recipe" --out "$out" ${resume[@]+"${resume[@]}"} "$@")
printf -v quoted '%q ' "${words[@]}"
printf -v command 'cd %q && exec %s' "$PWD" "$quoted"
trap 'kill $(jobs -p) 2>/dev/null || true' TERM INT
for name in "${names[@]}"; do
    ${SSH:-ssh -tt} "$name" "$command" &
done
wait
