#!/usr/bin/env bash
# What the operating system has to bring, on Debian and Ubuntu, as root: Python with venv, a C++ compiler, Open MPI. Installs what is
# missing and nothing else. docker/Dockerfile and tests/run.sh both run it.
set -euo pipefail

wanted=()
need() { # need COMMAND PACKAGE ...
  command -v "$1" >/dev/null || wanted+=("${@:2}")
}
need python3 python3
need c++ g++
need mpirun openmpi-bin libopenmpi-dev
python3 -c 'import ensurepip, venv' 2>/dev/null || wanted+=(python3-venv)
# headers, for the compilers that torch.compile calls
python3 -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null ||
  wanted+=(python3-dev)
[ ${#wanted[@]} -gt 0 ] || exit 0

command -v apt-get >/dev/null || {
  echo "system.sh: no apt-get here; install by other means: ${wanted[*]}" >&2
  exit 1
}
[ "$(id -u)" -eq 0 ] || {
  echo "system.sh: not root; run it as root, or: apt-get install ${wanted[*]}" >&2
  exit 1
}
export DEBIAN_FRONTEND=noninteractive
install() { timeout 300 apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null; }
install 2>/dev/null || { # the lists may be missing or old
  timeout 120 apt-get update -qq >/dev/null
  install
}
