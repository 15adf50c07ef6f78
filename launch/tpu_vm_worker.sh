#!/usr/bin/env bash
# Commands that launch/tpu_vm.sh runs in ~/marjax on every worker of a slice: setup, run COMMAND..., status, logs, stop.
#
# The run is detached from ssh and writes run.log. It restarts on all workers, at most MAX_RESTARTS (100) times, after 42
# (preempted after saving) or a code of 128 and above (a process was lost; the others exit with 134 within a minute). If
# one worker has failed permanently, the others cannot start: they give up after MAX_QUICK (4) consecutive starts with
# such a code in less than QUICK_SECONDS (600). Any other exit code is final, and so is stop.
set -euo pipefail
[[ ${1-} != -h && ${1-} != --help ]] || { sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}" && exit; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Whether the loop below runs; its process id may have been reused by another program.
running() {
    [[ -f run.pid ]] && tr '\0' ' ' <"/proc/$(<run.pid)/cmdline" 2>/dev/null | grep -q "tpu_vm_worker.sh loop"
}

# setup [gs://ADDRESS...]: installs marjax, and copies the addresses to the home folder, without existing files.
setup() {
    local python
    export PYTHONSAFEPATH=1 # Python imports nothing from the current folder; 3.10 does, so it runs in another
    cd /
    for python in python3.13 python3.12 python3.11 python3; do
        "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break || python=
    done
    if [[ -z $python ]]; then # images for TPU have Python 3.10
        python3 -m pip install --quiet --user uv
        python3 -m uv python install 3.12
        python=$(python3 -m uv python find --managed-python 3.12)
    fi
    cd "$OLDPWD"
    [[ $# -eq 0 ]] || (cd && gcloud storage cp --recursive --no-clobber "$@" .)
    export PYTHON=$python
    # shellcheck source=launch/venv.sh
    source launch/venv.sh .venv "${INSTALL:-.[tpu,gcs]}"
    python -c 'import importlib.metadata as m; print("marjax", m.version("marjax"), "with jax", m.version("jax"))'
}

run() {
    if running; then
        echo "a run is under way here (process $(<run.pid)): stop it first" >&2
        exit 2
    fi
    rm -f run.code
    setsid nohup bash launch/tpu_vm_worker.sh loop "$@" >>run.log 2>&1 </dev/null &
    echo $! >run.pid
    echo "started; the log is $PWD/run.log"
}

# run, unless a run is under way.
again() { running || run "$@"; }

loop() {
    local code begun why again restarts=0 quick=0 stopping='' interrupted child=''
    # shellcheck disable=SC1091
    [[ ! -f .venv/bin/activate ]] || source .venv/bin/activate
    trap 'stopping=1 interrupted=1; kill -TERM "$child" 2>/dev/null || true' TERM
    while true; do
        echo "$(date +%FT%T) start: $*"
        begun=$SECONDS
        "$@" &
        child=$!
        interrupted=1
        while [[ -n $interrupted ]]; do # a signal ends `wait`, but not the program; its code can be asked for again
            interrupted='' code=0
            wait "$child" || code=$?
        done
        why='' again=''
        if ((code >= 128 && SECONDS - begun < ${QUICK_SECONDS:-600})); then quick=$((quick + 1)); else quick=0; fi
        if [[ -n $stopping ]] || ((code != 42 && code < 128)); then
            :
        elif ((restarts >= ${MAX_RESTARTS:-100})); then
            why="; given up, after $restarts restarts"
        elif ((quick >= ${MAX_QUICK:-4})); then
            why="; given up, after $quick starts in a row that did not last: see what the other workers ended with"
        else
            again=1
        fi
        echo "$(date +%FT%T) ended with $code$why"
        if [[ -n $again ]]; then
            restarts=$((restarts + 1))
            sleep "${RESTART_SECONDS:-10}" & # in the background, so that a signal is not kept waiting
            wait $! || true
        fi
        if [[ -z $again || -n $stopping ]]; then
            echo "$code$why" >run.code
            exit "$code"
        fi
    done
}

status() {
    if running; then
        echo "running; last line: $(tail -n 1 run.log)"
    elif [[ -f run.code ]]; then # the last line of the log is the loop's own
        echo "ended with $(<run.code); last line: $(tail -n 2 run.log | head -n 1)"
    else
        echo "nothing was run since this worker was set up, or it was restarted"
    fi
}

stop() {
    if ! running; then
        echo "nothing runs here"
        return
    fi
    kill -TERM "$(<run.pid)"
    local waited
    for ((waited = 0; waited < ${STOP_SECONDS:-600}; waited++)); do
        running || break
        sleep 1
    done
    status
}

action=${1-}
[[ $# -eq 0 ]] || shift
case $action in
setup | run | again | loop | status | stop) "$action" "$@" ;;
logs) tail -n 200 run.log ;;
*)
    echo "tpu_vm_worker.sh: error: setup, run COMMAND..., status, logs or stop, not '$action'" >&2
    exit 2
    ;;
esac
