#!/usr/bin/env bash
# What some tests need and pip does not bring: Slurm and shellcheck, from Debian's packages. Where it cannot install
# them it says so, and those tests are skipped.
set -uo pipefail

missing=()
PATH=$PATH:/usr/sbin:/sbin
command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null || missing+=(slurm-wlm)
command -v shellcheck >/dev/null || missing+=(shellcheck)
[[ ${#missing[@]} -gt 0 ]] || exit 0
if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "not installed: ${missing[*]}; tests that need them are skipped (root and apt-get would install them)" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
quietly() { timeout 300 apt-get -qq -o Dpkg::Use-Pty=0 -o APT::Update::Error-Mode=any "$@" >/dev/null 2>&1; }
# The lists may be old or none; and without them, nothing can be installed.
quietly install --yes --no-install-recommends "${missing[@]}" ||
    { quietly update && quietly install --yes --no-install-recommends "${missing[@]}"; } ||
    echo "could not be installed: ${missing[*]}; tests that need them are skipped" >&2
exit 0
