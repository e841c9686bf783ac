#!/usr/bin/env bash
# Test in several processes, as the script of this name in mmdet and mmseg does:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [FLAGS OF tools/test.py]
# NNODES, NODE_RANK, MASTER_ADDR and PORT are read from the environment.
set -euo pipefail

if ! [[ $# -ge 3 && $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: $0 CONFIG CHECKPOINT GPUS [FLAGS], as $0 configs/mask_rcnn_swinv2.py epoch_12.pth 8" >&2
    exit 2
fi
exec torchrun --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$3" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
