#!/usr/bin/env bash
# A small real model from pictures to results on the card: tokenise, train, post-train by VA-pi, sample, evaluate.
# Reads $DATA/openmoji and $DATA/tokens of `prepare.sh`; results go to $OUT. TOY=1: two steps of each, some pictures.
set -eu
: "${DATA:=.gpu}" "${OUT:=.}" "${PYTHON:=python3}" "${TOY:=}" "${WORK:=}"
: "${CONSONAR:=$PYTHON -m consonar}"
[ -n "$WORK" ] || { WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT; }
rm -f "$OUT/rear.json" "$OUT/vapi.json" "$OUT/vapi.png"
steps=1500 updates=60 batch=256 images=32 samples=1024 views=center_flip
pictures=$DATA/openmoji
if [ -n "$TOY" ]; then # on some pictures of each class
  steps=2 updates=2 batch=8 images=4 samples=16 views=center pictures=$WORK/openmoji
  for class in "$DATA"/openmoji/*/*; do
    mkdir -p "$pictures/${class#"$DATA/openmoji/"}"
    find "$class" -type f | sort | head -n 8 | while read -r file; do
      cp "$file" "$pictures/${class#"$DATA/openmoji/"}"
    done
  done
fi

$CONSONAR tokenize --tokenizer openmoji-64 --data "$pictures" --out "$WORK/tokens" --batch-size $batch \
  --views $views
$CONSONAR train rear-openmoji --out "$WORK/rear" --data.tokens "$WORK/tokens" --loop.steps $steps \
  --loop.batch-size $batch --loop.validate-every $((steps / 2)) --loop.sample-every 0 --quiet
$CONSONAR train vapi-openmoji --init "$WORK/rear" --out "$WORK/vapi" --data.images "$pictures" \
  --loop.steps $updates --loop.batch-size $images --loop.validate-every $((updates / 2)) --quiet
for name in rear vapi; do
  $CONSONAR sample "$WORK/$name" --out "$WORK/$name.npz" --num-samples $samples --batch-size $batch
  $CONSONAR evaluate "$WORK/$name.npz" --reference "$pictures" --out "$OUT/$name.json" --batch-size $batch
done
$CONSONAR sample "$WORK/vapi" --out "$OUT/vapi.png" --num-samples 16
for name in rear vapi; do cp "$WORK/$name/metrics.jsonl" "$OUT/${name}_metrics.jsonl"; done
[ -n "$TOY" ] || $PYTHON - "$DATA/tokens" "$WORK/tokens" <<'PY'
import sys
import torch
from consonar.data.tokens import TokenStore
here, there = map(TokenStore.open, sys.argv[1:])
rows = torch.arange(len(here))
first, second = (store.read(rows, torch.zeros_like(rows)) for store in (here, there))
print(f"tokens made here that differ from those made on a CPU: {100 * (first != second).float().mean():.4f} %")
PY
