#!/usr/bin/env bash
# Converts the ImageNet tars to a latent cache, on one machine with an accelerator and a data disk of 400 GB:
#
#   launch/imagenet_latents.sh gs://bucket [/dev/sdb]
#
# reads ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and kl16.ckpt from gs://bucket/raw, and writes imagenet_kl16/ and
# kl16.safetensors to gs://bucket/data. The disk (default: /dev/sdb) is formatted if it is empty, and mounted at FOLDER.
# Running it again resumes, so a spot machine suffices: docs/pods.md has the commands. CONFIG is the config whose images
# are encoded, WORKERS the number of processes that read them.
set -euo pipefail
[[ ${1-} != -h && ${1-} != --help ]] || { sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }

if [[ ${1-} != gs://* ]]; then
    echo "usage: launch/imagenet_latents.sh gs://BUCKET [DEVICE]" >&2
    exit 2
fi
bucket=${1%/} device=${2:-/dev/sdb} folder=${FOLDER:-/mnt/imagenet}
config=${CONFIG:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/configs/imagenet256.py}

if ! mountpoint --quiet "$folder"; then
    sudo mkdir -p "$folder"
    # Format it only without a file system and partitions.
    [[ $(lsblk --noheadings --output=FSTYPE,PARTTYPE "$device") == *[![:space:]]* ]] || sudo mkfs.ext4 -q "$device"
    sudo mount "$device" "$folder"
    sudo chown "$(id -u)" "$folder"
fi
cd "$folder"
mkdir -p raw
gcloud storage cp --no-clobber "$bucket/raw/*" raw/
marjax prepare --imagenet raw/ILSVRC2012_img_train.tar raw/ILSVRC2012_img_val.tar --out data
marjax convert --tokenizer raw/kl16.ckpt --out kl16.safetensors
marjax cache-latents --config "$config" --config.data.data_dir=data --config.data.workers="${WORKERS:-16}" \
    --config.tokenizer.path=kl16.safetensors --out imagenet_kl16
gcloud storage cp --recursive imagenet_kl16 kl16.safetensors "$bucket/data/"
