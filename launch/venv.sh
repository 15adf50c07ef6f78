# shellcheck shell=bash
# To be sourced by bash: `source launch/venv.sh FOLDER WHAT` makes the virtual environment FOLDER with WHAT installed in
# editable form, unless it is there and complete, and activates it. PYTHON names the interpreter (3.11 or newer).
if [[ ${1-} == -h || ${1-} == --help ]]; then # sourced, too
    sed -nE '2,/^[^#]/s/^#( |$)//p' "${BASH_SOURCE[0]}"
    [[ ${BASH_SOURCE[0]} == "$0" ]] || return 0
    exit
fi
folder=$1 what=$2
export PYTHONSAFEPATH=1 # Python imports nothing from the current folder
if ! cmp -s setup.cfg "$folder/installed-for"; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "marjax needs Python 3.11 or newer: set PYTHON to one" >&2
        exit 1
    }
    "${PYTHON:-python3}" -m venv --clear "$folder"
    # Modules are compiled as they are imported (all of them took half of the installation), and kept, see below.
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable "$what"
    cp setup.cfg "$folder/installed-for"
fi
# shellcheck disable=SC1091
source "$folder/bin/activate"
# Where this is set, every process would compile anew what it imports: two of the three seconds that a start takes.
unset PYTHONDONTWRITEBYTECODE
