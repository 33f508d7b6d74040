#!/usr/bin/env bash
# Made by //bazel:python.bzl.
set -euo pipefail

if [[ -d $0.runfiles ]]; then
  runfiles=$0.runfiles
elif [[ $0 == *.runfiles/* ]]; then
  runfiles=${0%%.runfiles/*}.runfiles
else
  runfiles=${RUNFILES_DIR:?cannot find the runfiles of $0}
fi
runfiles=$(cd "$runfiles" && pwd)

# The environment of @pip lies beside this file, outside of the runfiles.
marker=$(readlink -f "$runfiles/%PYTHON%")

export RUNFILES_DIR=$runfiles
export PYTHONNOUSERSITE=1
export PYTHONPATH="%IMPORTS%"
unset PYTHONHOME PYTHONSTARTUP
%ENV%
exec "${marker%/*}/venv/bin/python" -P %MAIN% %ARGUMENTS% "$@"
