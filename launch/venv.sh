# shellcheck shell=bash
# Source it from bash: `source launch/venv.sh FOLDER WHAT` creates the virtual environment FOLDER with an editable
# install of WHAT, unless it is complete, and activates it. PYTHON is the interpreter (3.11 or newer).
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
    # Compiling all modules takes half of the installation; they are compiled when first imported.
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable "$what"
    cp setup.cfg "$folder/installed-for"
fi
# shellcheck disable=SC1091
source "$folder/bin/activate"
# If set, every process compiles all its imports: two of the three seconds of a start.
unset PYTHONDONTWRITEBYTECODE
