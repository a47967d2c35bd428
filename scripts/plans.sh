#!/usr/bin/env bash
# Recomputes the plans of docs/scale.md: results/plans/NAME/plan.json, and the table. Takes about an hour on two cores,
# half of it for ResNet-152 3x + SK with micro-batches. Needs the TPU compiler, which `sh scripts/setup.sh dev` installs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

plan() {
  local name=$1
  shift
  # The published table was computed with augmentation on the host.
  .venv/bin/python -m simclr_jax plan "$@" --config.augment.place=host --workdir="results/plans/$name"
}

r152x3sk=(--config=imagenet:v2 --config.model.depth=152 --config.model.width=3 --config.model.sk_ratio=0.0625)

plan v3-r50 --config=imagenet:v1 --topology=v3:8x8 --batch_sizes=4096,8192
plan v3-r50x2 --config=imagenet:v1 --config.model.width=2 --topology=v3:8x8
plan v3-r50x4 --config=imagenet:v1 --config.model.width=4 --topology=v3:8x8
plan v3-r152x3sk "${r152x3sk[@]}" --topology=v3:8x8
plan v5e-r50 --config=imagenet:v1 --topology=v5e:4x4
plan v5e-r152x3sk "${r152x3sk[@]}" --topology=v5e:8x8 \
  --config.sharding.parameters=sharded --config.model.remat=blocks --config.micro_batches=4
plan v5p-r50-8192 --config=imagenet:v1 --topology=v5p:1x1x1 \
  --config.batch_size=8192 --config.micro_batches=16
.venv/bin/python scripts/plans_table.py
