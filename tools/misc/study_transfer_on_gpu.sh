#!/usr/bin/env bash
# The study of docs/transfer.md on a GPU, in about ten minutes: five times the epochs, and CamVid with whole frames of
# 480 x 360 pixels if they are given. What is measured when the time is up is in the tables.
#
# usage: bash tools/misc/study_transfer_on_gpu.sh PHOTOS OUT [CAMVID]
set -eu
photos=$1 out=$2 camvid=${3:-}

python tools/analysis_tools/compare_position_biases.py "$photos" --out "$out/biases" --device cuda --jobs 9 \
    --epochs 100 --curve 5 10 20 50 --minutes "$([ "$camvid" ] && echo 6 || echo 9)"

[ "$camvid" ] || exit 0
frames=(
    model.data_preprocessor.size='(360,480)'
    train_dataloader.dataset.pipeline.2.scale='(480,360)'
    train_dataloader.dataset.pipeline.3.crop_size='(360,480)'
)
moved="$out/biases/log_cpb_seed_{seed}/after_20_epochs.pth"
timeout 180 python tools/analysis_tools/compare_starts.py configs/demo/upernet_swinv2_camvid.py --data-root "$camvid" \
    --out "$out/camvid" --jobs 6 \
    --start scratch none "${frames[@]}" optim_wrapper.optimizer.lr=6e-3 \
    --start log_cpb "$moved" "${frames[@]}" \
    --start wrong "$moved" "${frames[@]}" model.backbone.pretrained_window_sizes=16
