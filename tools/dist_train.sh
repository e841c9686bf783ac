#!/usr/bin/env bash
# Train in several processes, as the script of this name in mmdet and mmseg does:
#   tools/dist_train.sh CONFIG GPUS [FLAGS OF tools/train.py]
# NNODES, NODE_RANK, MASTER_ADDR and PORT are read from the environment.
set -euo pipefail

if ! [[ $# -ge 2 && $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: $0 CONFIG GPUS [FLAGS], as $0 configs/mask_rcnn_swinv2.py 8 --amp bf16" >&2
    exit 2
fi
exec torchrun --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$2" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
