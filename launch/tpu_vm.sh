#!/usr/bin/env bash
# Runs marjax on a Cloud TPU slice, spot or on demand, through gcloud: a queued resource, then ssh to all workers.
#
#   export PROJECT=my-project ZONE=us-east5-b NAME=mar TYPE=v6e-16 FETCH=gs://bucket/data
#   launch/tpu_vm.sh --spot keep marjax train --config configs/imagenet256.py:model=mar_base --workdir gs://bucket/mar_base
#
# `keep` performs create, setup and run, and repeats them if the slice is reclaimed, until the run has ended. Ctrl-C does
# not stop the run; the same command attaches to it again.
#
#   launch/tpu_vm.sh --spot create          # request the slice, and wait for it
#   launch/tpu_vm.sh setup                  # copy the code to all workers, install it, and copy FETCH to ~
#   launch/tpu_vm.sh run marjax train ...   # start it on all workers, detached
#   launch/tpu_vm.sh logs                   # of worker 0; also: logs 3, logs all
#   launch/tpu_vm.sh status                 # of the slice, and of the run on all workers
#   launch/tpu_vm.sh stop                   # save and end the run; the same `run` resumes
#   launch/tpu_vm.sh delete
#
# The code consists of the files in git, and untracked ones in marjax/, configs/ and launch/; in an unpacked sdist, of these
# folders. CREATE_FLAGS and SSH_FLAGS are passed to gcloud, such as CREATE_FLAGS=--internal-ips SSH_FLAGS=--internal-ip.
# launch/tpu_vm_worker.sh describes what runs on the workers, restarts and settings. A queued resource is one slice; for
# several, see gke.sh.
set -euo pipefail
[[ ${1-} != -h && ${1-} != --help ]] || { sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "launch/tpu_vm.sh: error: this is bash $BASH_VERSION, and 4.4 or newer is needed: on a Mac, brew install bash" >&2
    exit 2
fi

usage() {
    echo "usage: launch/tpu_vm.sh [--project P] [--zone Z] [--name N] [--type v6e-16] [--version RUNTIME] [--spot]" \
        "create | setup | run COMMAND... | keep COMMAND... | logs [WORKER] | status | stop | delete" >&2
    echo "launch/tpu_vm.sh: error: $1" >&2
    exit 2
}

fail() {
    echo "launch/tpu_vm.sh: error: $1" >&2
    exit 1
}

project=${PROJECT-} zone=${ZONE-} name=${NAME-} type=${TYPE-} version=${VERSION-} spot=${SPOT-}
poll_seconds=${POLL_SECONDS:-30}
while [[ ${1-} == --* ]]; do
    case $1 in
    --spot) spot=1 && shift && continue ;;
    --help) exec bash "${BASH_SOURCE[0]}" -h ;;
    --project | --zone | --name | --type | --version) ;;
    *) usage "unknown option $1" ;;
    esac
    [[ -n ${2-} ]] || usage "$1 needs a value"
    printf -v "${1#--}" %s "$2"
    shift 2
done
action=${1-}
[[ $action != -h ]] || exec bash "${BASH_SOURCE[0]}" -h
[[ -n $action ]] || usage "say what to do"
shift
for field in project zone name; do
    [[ -n ${!field} ]] || usage "no $field: give --$field, or set ${field^^}"
done
where=("--project=$project" "--zone=$zone")
read -ra ssh_flags <<<"${SSH_FLAGS-}"
read -ra create_flags <<<"${CREATE_FLAGS-}"
read -ra fetch <<<"${FETCH-}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

queued() { gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }

# What a worker needs to know, as one string: ssh carries no variables, and hands its command to a shell.
worker_command() {
    local setting words=()
    for setting in INSTALL MAX_RESTARTS MAX_QUICK QUICK_SECONDS RESTART_SECONDS STOP_SECONDS; do
        [[ -z ${!setting-} ]] || words+=("$setting=${!setting}")
    done
    [[ ${#words[@]} -eq 0 ]] || words=(env "${words[@]}")
    words+=(bash marjax/launch/tpu_vm_worker.sh "$@")
    printf '%q ' "${words[@]}"
}

# A shell command on workers, `all` or a number.
ssh_to() { gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "${ssh_flags[@]}" "--worker=$1" "--command=$2"; }

on_workers() { ssh_to "$1" "$(worker_command "${@:2}")"; }

# The state of the request; NONE if there is none. Whatever else keeps gcloud from an answer (a login that has run out, a
# network that is gone) is told, and it is asked again, $1 times in all.
state() {
    local tries=$1 said
    while true; do
        if said=$(queued describe '--format=value(state.state)' 2>"$scratch/error"); then
            echo "$said"
            return
        elif grep -q NOT_FOUND "$scratch/error"; then
            echo NONE
            return
        fi
        echo "$(date +%T) the slice cannot be asked after: $(tail -n 1 "$scratch/error")" >&2
        tries=$((tries - 1))
        ((tries > 0)) || return 1
        sleep "$poll_seconds"
    done
}

create() {
    [[ -n $type ]] || usage "no type: give --type, or set TYPE, such as v6e-16"
    local runtime=$version now before='' asked=''
    if [[ -z $runtime ]]; then
        case $type in
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v4-* | v3-* | v2-*) runtime=tpu-ubuntu2204-base ;;
        *) usage "no runtime is known for $type: give --version" ;;
        esac
    fi
    while true; do
        now=$(state 20)
        case $now in
        ACTIVE) break ;;
        SUSPENDED | FAILED | NONE)
            [[ -z $asked ]] || fail "the slice is $now: run create again"
            # What was taken away, or never given, does not come back.
            [[ $now == NONE ]] || queued delete --force --quiet
            queued create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime" ${spot:+--spot} \
                "${create_flags[@]}"
            asked=1
            continue
            ;;
        esac
        [[ $now == "$before" ]] || echo "$(date +%T) $now"
        before=$now
        sleep "$poll_seconds"
    done
    echo "$name is ACTIVE"
}

setup() {
    local root size
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    local code=(marjax configs launch setup.cfg setup.py pyproject.toml README.md LICENSE)
    # No virtual environments, no runs; and of what git does not know, no data. An unpacked sdist has no git.
    (cd "$root" && {
        if [[ -e .git ]]; then
            git ls-files -z --cached
            git ls-files -z --others --exclude-standard -- "${code[@]}"
        else
            find "${code[@]}" -type f ! -path '*/__pycache__/*' -print0
        fi
    } | while IFS= read -r -d '' file; do
        [[ ! -e $file ]] || printf '%s\0' "$file" # deleted, but not yet for git
    done | tar --null --files-from=- --create --gzip --file="$scratch/marjax.tar.gz")
    size=$(wc -c <"$scratch/marjax.tar.gz")
    ((size <= ${MAX_MB:-100} * 1000000)) || fail "the code is $((size / 1000000)) MB, packed, which every worker would \
get: move data out of the repository (git ls-files --others says what it does not know), or set MAX_MB"
    gcloud compute tpus tpu-vm scp "$scratch/marjax.tar.gz" "$name:marjax.tar.gz" "${where[@]}" "${ssh_flags[@]}" \
        --worker=all
    ssh_to all "mkdir -p marjax && tar -xzf marjax.tar.gz -C marjax && $(worker_command setup "${fetch[@]}")"
}

# This script, with the same slice.
self() {
    PROJECT=$project ZONE=$zone NAME=$name TYPE=$type VERSION=$version SPOT=$spot bash "${BASH_SOURCE[0]}" "$@"
}

readonly GONE=9

# Returns 0 once the command has ended with 0 on all workers, 1 if it ended otherwise, and GONE when the slice has gone.
watch() {
    local now said silent=0
    while true; do
        now=$(state 20) || return 1
        [[ $now == ACTIVE ]] || return "$GONE"
        if ! said=$(on_workers all status); then
            silent=$((silent + 1))
            if ((silent >= 20)); then
                echo "some workers do not answer; the others may be at work: look at status, then keep it again" >&2
                return 1
            fi
        elif [[ $said == *"nothing was run"* ]]; then # a worker that was restarted; the others wait for it
            on_workers all again "$@" || true
        elif [[ $said != *"running; last line: "* ]]; then
            echo "$said"
            [[ ! $said =~ "ended with "[1-9] ]]
            return
        else
            silent=0
        fi
        sleep "$poll_seconds"
    done
}

keep() {
    local code failures=0
    while true; do
        code=0
        { self create && self setup && self again "$@"; } || code=$?
        if ((code == 2)); then
            exit 2
        elif ((code)); then
            failures=$((failures + 1))
            ((failures < 3)) || fail "the slice cannot be set up: see above"
            sleep "$poll_seconds"
            continue
        fi
        failures=0
        watch "$@" || code=$?
        if ((code != GONE)); then
            echo "$name is still there, and billed: launch/tpu_vm.sh delete"
            exit "$code"
        fi
        echo "$(date +%T) the slice was taken away"
    done
}

case $action in
create) create ;;
setup) setup ;;
run | keep | again)
    [[ $# -gt 0 ]] || usage "$action needs a command, such as: $action marjax train --config NAME --workdir gs://..."
    if [[ $action == keep ]]; then keep "$@"; else on_workers all "$action" "$@"; fi
    ;;
logs) on_workers "${1:-0}" logs ;;
status)
    now=$(state 1)
    echo "$name is $now"
    on_workers all status
    ;;
stop) on_workers all stop ;;
delete) queued delete --force --quiet ;;
*) usage "unknown action $action" ;;
esac
