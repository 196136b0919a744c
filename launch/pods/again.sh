#!/usr/bin/env bash
# again.sh CRASHES STOPFILE COMMAND...: runs a command until it is done. One that was stopped and has saved its work (exit
# code 75), or was out of time for that (143), starts again as often as it takes; one that crashed CRASHES times at most, so
# that a lost process of a run, which takes the others along, does not end it. Once STOPFILE exists nothing starts again.
set -uo pipefail
crashes=$1 stopfile=$2
shift 2
while true; do
  "$@"
  code=$?
  case $code in
    0 | 130) exit $code ;;  # done, or Ctrl-C
    75 | 143) ;;
    *)
      [ "$crashes" -gt 0 ] || exit $code
      crashes=$((crashes - 1)) ;;
  esac
  [ ! -e "$stopfile" ] || exit $code
  echo "exit code $code: starting again ($crashes crashes are left)"
  sleep "${PAUSE:-10}"
done
