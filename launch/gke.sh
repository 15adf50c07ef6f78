#!/usr/bin/env bash
# Runs marjax on TPU slices of a GKE cluster, as a JobSet created by xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   python3 -m venv .venv-xpk && .venv-xpk/bin/pip install xpk && export PATH=$PWD/.venv-xpk/bin:$PATH
#   export PROJECT=my-project ZONE=us-east5-b CLUSTER=tpus NAME=mar TYPE=v5litepod-256
#   export IMAGE=us-east5-docker.pkg.dev/my-project/images/marjax:1
#   launch/gke.sh build                     # build launch/Dockerfile as IMAGE, for the user RUN_AS (root), and push it
#   launch/gke.sh create marjax train --config configs/imagenet256.py:model=mar_huge --workdir gs://bucket/mar_huge
#   launch/gke.sh render FILE.yaml marjax train ...   # only write the manifest; needs no cluster
#   launch/gke.sh list
#   launch/gke.sh delete
#
# If a pod exits with 42 (preempted after saving) or 128 to 255 (killed, or lost another pod), all pods restart, at most
# MAX_RESTARTS (100) times, and the same command resumes; any other code ends the workload on all pods. xpk's wrapper
# forwards SIGTERM within five seconds; the pod then has GRACE_SECONDS to save, but only 15 seconds on a reclaimed spot
# node. SLICES is the number of slices. STORAGE names storage of `xpk storage attach` that is not mounted automatically.
# SPOT=1 requests spot capacity in a cluster with node auto-provisioning (otherwise the node pool decides). To create a
# cluster and give its pods access to data, see docs/launchers.md.
set -euo pipefail
[[ ${1-} != -h && ${1-} != --help ]] || { sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }

fail() {
    echo "usage: launch/gke.sh build | create COMMAND... | render FILE.yaml COMMAND... | list | delete" >&2
    echo "launch/gke.sh: error: $1" >&2
    exit 2
}

need() {
    local variable
    for variable in "$@"; do
        [[ -n ${!variable-} ]] || fail "no $variable: set it"
    done
}

workload() {
    need PROJECT ZONE CLUSTER NAME TYPE IMAGE
    [[ $# -gt 0 ]] || fail "no command, such as: marjax train --config NAME --workdir gs://..."
    [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
        fail "NAME is '$NAME': give at most 40 of a-z, 0-9 and -, a letter first and no - last"
    local command
    printf -v command '%q ' "$@"
    # xpk also restarts after 127, but a missing program will stay missing. `exec`: the wrapper signals the shell that it
    # starts, so the shell must become the program.
    printf -v command 'type -P %q >/dev/null || { echo "there is no program" %q >&2; exit 2; }; exec %s' \
        "$1" "$1" "${command% }"
    xpk workload create \
        --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
        --tpu-type="$TYPE" --num-slices="${SLICES:-1}" ${SPOT:+--spot} \
        ${STORAGE:+--storage="$STORAGE"} \
        --docker-image="$IMAGE" --command="$command" --max-restarts="${MAX_RESTARTS:-100}" \
        --termination-grace-period-seconds="${GRACE_SECONDS:-300}" \
        --ttl-seconds-after-finished="${KEEP_SECONDS:-604800}" \
        "${extra[@]}"
}

extra=()
action=${1-}
[[ -n $action ]] || fail "say what to do"
shift
case $action in
build)
    need IMAGE
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    # On GKE, the TPU's device files and mounted buckets belong to root.
    docker build --platform=linux/amd64 --file=launch/Dockerfile --tag="$IMAGE" --build-arg=RUN_AS="${RUN_AS:-root}" \
        "$@" .
    docker push "$IMAGE"
    ;;
create) workload "$@" ;;
render)
    [[ $# -gt 0 ]] || fail "render needs a file to write"
    # Without --project-number, xpk looks it up, which needs an account.
    extra=(--dry-run --skip-validation --project-number="${PROJECT_NUMBER:-0}" --output-manifest-file="$1")
    workload "${@:2}"
    ;;
list | delete)
    need PROJECT ZONE CLUSTER
    [[ $action == list ]] || need NAME
    where=(--project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER")
    [[ $action == list ]] || where+=(--workload="$NAME")
    xpk workload "$action" "${where[@]}"
    ;;
*) fail "unknown action $action" ;;
esac
