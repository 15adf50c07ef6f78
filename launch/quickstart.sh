#!/usr/bin/env bash
# Installs marjax into .venv, trains on the embedded digits and samples into runs/digits/out/grid.png.
set -euo pipefail
[[ ${1-} != -h && ${1-} != --help ]] || { sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
cd "$(dirname "$0")/.."
source launch/venv.sh .venv .
marjax train --config configs/digits.py --workdir runs/digits "$@"
marjax sample --workdir runs/digits --labels 0-9 --num_per_label 50 --seed 0 --out runs/digits/out
