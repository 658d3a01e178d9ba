#!/bin/sh
# Makes .venv with a Python that clsa supports, or keeps the one that is there and works.
# PYTHON=/path/to/python chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

fail() {
    echo "clsa: $1" >&2
    exit 1
}

if [ -x .venv/bin/python ] && supported .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; then
    exit 0
fi

found=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if supported "$candidate"; then
        found=$candidate
        break
    fi
done
[ -n "$found" ] || fail "no Python 3.11, 3.12 or 3.13 here (tried: ${PYTHON:-python3, python3.13, python3.12, python3.11}); install one, or run: make PYTHON=/path/to/python ..."
"$found" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$found cannot make virtual environments; on Debian or Ubuntu run: sudo apt install python3-venv"

echo "clsa: making .venv with $("$found" --version)" >&2
"$found" -m venv --clear .venv
