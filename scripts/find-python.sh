#!/bin/sh
# Prints the Python to build .venv with: $PYTHON if it is set, else the one that .venv has (a later
# change of PATH must not rebuild it), else the first of the usual names, provided that it is 3.11 to
# 3.13 and can make virtual environments.  Says what to install if there is none.
tried=""
for candidate in ${PYTHON:-.venv/bin/python python3 python3.13 python3.12 python3.11}; do
    # A name on PATH proves nothing (pyenv's shims fail when run), so ask the interpreter itself.
    found=$("$candidate" -c 'import sys
try:
    import ensurepip, venv
    able = ""
except ImportError:
    able = " without venv"
print("%d.%d%s" % (sys.version_info[0], sys.version_info[1], able))' 2>/dev/null) || found="not found"
    case $found in
        3.11 | 3.12 | 3.13)
            command -v "$candidate"
            exit 0
            ;;
    esac
    tried="$tried
  $candidate: $found"
done
cat >&2 <<EOF
Jenga Serve needs Python 3.11, 3.12 or 3.13 with the modules venv and ensurepip.  Tried:$tried
Remedy: install one (Debian, Ubuntu: apt install python3.11 python3.11-venv) or name yours,
for instance: PYTHON=/path/to/python3.12 make install
EOF
exit 1
