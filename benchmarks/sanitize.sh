#!/usr/bin/env bash
# Build the CPU extension with AddressSanitizer, then with UndefinedBehaviorSanitizer, and run the operators' tests on each.
# Works on a copy of the repository; needs gcc and the .venv of launch/setup.sh. Takes some minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r setup.py pyproject.toml README.md LICENSE constraints.txt csrc tests pylo_dist benchmarks "$copy"
cd "$copy"
sed -i "s/-O3/-O1/" setup.py # a sanitized -O3 takes very long to compile
export OMP_NUM_THREADS=1 PYLO_DIST_CUDA=0 PYTHONPATH=$copy:$copy/tests PYTHONMALLOC=malloc
for sanitizer in address undefined; do
  rm -rf build pylo_dist/_kernels_*
  flags="-fsanitize=$sanitizer -fno-sanitize-recover=all -fno-omit-frame-pointer"
  CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="-fsanitize=$sanitizer" "$root/.venv/bin/python" setup.py -q build_ext --inplace
  library=$(gcc -print-file-name="$([ "$sanitizer" = address ] && echo libasan.so || echo libubsan.so)")
  # Python itself leaks; torch and Python throw across libraries that were not built with the sanitizer
  LD_PRELOAD="$library $(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$root/.venv/bin/python" -m pytest -q -p no:cacheprovider tests/maths/test_kernels.py tests/maths/test_adamw.py "$@"
  echo "$sanitizer: clean"
done
