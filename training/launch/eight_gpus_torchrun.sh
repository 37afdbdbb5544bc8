#!/usr/bin/env bash
# One machine with torchrun, a copy of the model on each GPU (DDP); GPUS=4 for fewer than eight.
#   OUTPUT_DIR=outputs/text bash training/launch/eight_gpus_torchrun.sh training/train_causal_lm.py --preset twicing
# The same command goes on where it ended. A process that is lost ends the launch.
set -euo pipefail

: "${OUTPUT_DIR:?is the folder of the run}"
resume=()
if [[ -f "$OUTPUT_DIR/run.json" ]]; then resume=(--resume); fi
exec torchrun --standalone --nproc_per_node "${GPUS:-8}" "$@" --output_dir "$OUTPUT_DIR" "${resume[@]}"
