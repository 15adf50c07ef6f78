#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker of a slice, in ~/marjax: setup, run COMMAND..., status, logs, stop.
#
# The run is detached from ssh and writes run.log. It is started again when it ends with 42 (it was preempted, and has
# saved) or a code from 127 up (a process was lost; the others end with 134 within a minute), on every worker alike, so
# that they meet again; at most MAX_RESTARTS (100) times. Any other end is final, and so is stop.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The process of the loop below, if it runs; a process id may have been given to another program since.
running() {
    [[ -f run.pid ]] && tr '\0' ' ' <"/proc/$(<run.pid)/cmdline" 2>/dev/null | grep -q "tpu_vm_worker.sh loop"
}

setup() {
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break || python=
    done
    if [[ -z $python ]]; then # images for TPU have Python 3.10
        python3 -m pip install --quiet --user uv
        python3 -m uv python install 3.12
        python=$(python3 -m uv python find --managed-python 3.12)
    fi
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

loop() {
    local code restarts=0 stopping='' interrupted child=''
    # shellcheck disable=SC1091
    [[ ! -f .venv/bin/activate ]] || source .venv/bin/activate
    trap 'stopping=1 interrupted=1; kill -TERM "$child" 2>/dev/null || true' TERM
    while true; do
        echo "$(date +%FT%T) start: $*"
        "$@" &
        child=$!
        interrupted=1
        while [[ -n $interrupted ]]; do # a signal ends `wait`, but not the program; its code can be asked for again
            interrupted='' code=0
            wait "$child" || code=$?
        done
        echo "$(date +%FT%T) ended with $code"
        if [[ -n $stopping ]] || ((code != 42 && code < 127)) || ((restarts >= ${MAX_RESTARTS:-100})); then
            echo "$code" >run.code
            exit "$code"
        fi
        restarts=$((restarts + 1))
        sleep "${RESTART_SECONDS:-10}" & # in the background, so that a signal is not kept waiting
        wait $! || true
        if [[ -n $stopping ]]; then
            echo "$code" >run.code
            exit "$code"
        fi
    done
}

status() {
    if running; then
        echo "running; last line: $(tail -n 1 run.log)"
    elif [[ -f run.code ]]; then
        echo "ended with $(<run.code); last lines: $(tail -n 2 run.log | head -n 1)"
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
setup | run | loop | status | stop) "$action" "$@" ;;
logs) tail -n 200 run.log ;;
*)
    echo "tpu_vm_worker.sh: error: setup, run COMMAND..., status, logs or stop, not '$action'" >&2
    exit 2
    ;;
esac
