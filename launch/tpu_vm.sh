#!/usr/bin/env bash
# Runs marjax on a Cloud TPU slice, spot or not, through gcloud: a queued resource, then ssh to all workers.
#
#   export PROJECT=my-project ZONE=us-east5-b NAME=mar TYPE=v6e-16
#   launch/tpu_vm.sh --spot create          # ask for the slice, and wait until it is there
#   launch/tpu_vm.sh setup                  # copy this working tree to all workers, and install it
#   launch/tpu_vm.sh run marjax train --config configs/imagenet256.py:model=mar_base --workdir gs://bucket/mar_base
#   launch/tpu_vm.sh logs                   # of worker 0; or of another: logs 3, logs all
#   launch/tpu_vm.sh status                 # of the slice, and of the run on all workers
#   launch/tpu_vm.sh stop                   # saves and ends the run; the same `run` goes on
#   launch/tpu_vm.sh delete
#
# A spot slice that was taken away is SUSPENDED: create, setup and the same run go on from the last checkpoint. What the
# workers do, restarts included, is in launch/tpu_vm_worker.sh. Queued resources give one slice; for many, see gke.sh.
set -euo pipefail

usage() {
    echo "usage: launch/tpu_vm.sh [--project P] [--zone Z] [--name N] [--type v6e-16] [--version RUNTIME] [--spot]" \
        "create | setup | run COMMAND... | logs [WORKER] | status | stop | delete" >&2
    echo "launch/tpu_vm.sh: error: $1" >&2
    exit 2
}

project=${PROJECT-} zone=${ZONE-} name=${NAME-} type=${TYPE-} version=${VERSION-} spot=${SPOT-}
poll_seconds=${POLL_SECONDS:-30}
while [[ ${1-} == --* ]]; do
    case $1 in
    --spot) spot=1 && shift && continue ;;
    --project | --zone | --name | --type | --version) ;;
    *) usage "unknown option $1" ;;
    esac
    [[ -n ${2-} ]] || usage "$1 needs a value"
    printf -v "${1#--}" %s "$2"
    shift 2
done
action=${1-}
[[ -n $action ]] || usage "say what to do"
shift
for field in project zone name; do
    [[ -n ${!field} ]] || usage "no $field: give --$field, or set ${field^^}"
done
where=("--project=$project" "--zone=$zone")
read -ra ssh_flags <<<"${SSH_FLAGS-}" # such as --internal-ip, for workers without an address of their own

queued() { gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

# Runs tpu_vm_worker.sh on workers, `all` or a number. ssh hands its command to a shell: hence the quoting.
on_workers() {
    local command
    printf -v command '%q ' bash marjax/launch/tpu_vm_worker.sh "${@:2}"
    gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "${ssh_flags[@]}" "--worker=$1" "--command=${command% }"
}

state() { queued describe '--format=value(state.state)' 2>/dev/null || echo NONE; }

create() {
    [[ -n $type ]] || usage "no type: give --type, or set TYPE, such as v6e-16"
    local runtime=$version now before=
    if [[ -z $runtime ]]; then
        case $type in
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v4-* | v3-* | v2-*) runtime=tpu-ubuntu2204-base ;;
        *) usage "no runtime is known for $type: give --version" ;;
        esac
    fi
    case $(state) in
    SUSPENDED | FAILED) # taken away, or never given: this request does not come back
        queued delete --force --quiet ;;&
    SUSPENDED | FAILED | NONE)
        queued create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime" ${spot:+--spot} ;;
    esac
    while now=$(state) && [[ $now != ACTIVE ]]; do
        case $now in
        SUSPENDING | SUSPENDED | FAILED | DELETING | NONE)
            echo "launch/tpu_vm.sh: error: the slice is $now: run create again" >&2
            exit 1
            ;;
        esac
        [[ $now == "$before" ]] || echo "$(date +%T) $now"
        before=$now
        sleep "$poll_seconds"
    done
    echo "$name is ACTIVE"
}

setup() {
    local root packed
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    packed=$(mktemp -d)
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf '$packed'" EXIT
    # What git knows or would take: no virtual environments, no runs.
    (cd "$root" && git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        [[ ! -e $file ]] || printf '%s\0' "$file" # deleted, but not yet for git
    done | tar --null --files-from=- --create --gzip --file="$packed/marjax.tar.gz")
    gcloud compute tpus tpu-vm scp "$packed/marjax.tar.gz" "$name:marjax.tar.gz" "${where[@]}" "${ssh_flags[@]}" \
        --worker=all
    gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "${ssh_flags[@]}" --worker=all \
        '--command=mkdir -p marjax && tar -xzf marjax.tar.gz -C marjax && bash marjax/launch/tpu_vm_worker.sh setup'
}

case $action in
create) create ;;
setup) setup ;;
run)
    [[ $# -gt 0 ]] || usage "run needs a command, such as: run marjax train --config FILE.py --workdir gs://..."
    on_workers all run "$@"
    ;;
logs) on_workers "${1:-0}" logs ;;
status)
    echo "$name is $(state)"
    on_workers all status
    ;;
stop) on_workers all stop ;;
delete) queued delete --force --quiet ;;
*) usage "unknown action $action" ;;
esac
