#!/usr/bin/env bash
# The tests that compare numbers, as other processors and numbers of threads compute them; a line for every setting.
#   bash scripts/test_matrix.sh                        # a quarter of an hour on two cores
#   bash scripts/test_matrix.sh tests/caching/test_cache.py    # arguments go to pytest
# A processor runs the kernels of older ones, so one machine shows most of what others would do. What it can run at best
# is the first setting: ATen takes AVX-512 by itself.
set -uo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh --dev || exit 1
export PATH="$PWD/.venv/bin:$PATH"
logs="$(mktemp -d)"

# By default without what takes long, and what rounds nowhere.
tests=("$@")
if [ $# = 0 ]; then
  slow="two_processes or killed or train or compil or baselines or fid_equals or budget or shipped or efficiency or mixed or cuda"
  exact="clips or pictures or video_files"
  tests=(-k "not ($slow or $exact)")
fi

settings=(
  "as it is"
  ATEN_CPU_CAPABILITY=default
  ATEN_CPU_CAPABILITY=avx2
  ONEDNN_MAX_CPU_ISA=AVX2
  ONEDNN_MAX_CPU_ISA=AVX512_CORE
  MKL_CBWR=COMPATIBLE
  MKL_CBWR=AVX2
  SKIPDIT_TEST_THREADS=2
  SKIPDIT_TEST_THREADS=3
)

# MKL has kernels for Intel's processors and others for the rest, whatever they can do. It asks this function of its own
# which ones to take, and a preloaded library answers first.
maker="$logs/maker.so" intel=1
if grep -qs GenuineIntel /proc/cpuinfo; then intel=0; fi
if echo "int mkl_serv_intel_cpu_true(void) { return $intel; }" | cc -shared -fPIC -x c -o "$maker" - 2>/dev/null; then
  for more in "" MKL_ENABLE_INSTRUCTIONS=AVX2 SKIPDIT_TEST_THREADS=2; do settings+=("LD_PRELOAD=$maker $more"); done
else
  echo "without a C compiler MKL cannot be told that the processor is another maker's: three settings are left out"
fi

failed=0
for number in "${!settings[@]}"; do
  setting="${settings[$number]}" log="$logs/$number.txt" began=$SECONDS
  result=passed
  # shellcheck disable=SC2086 (a setting may be of several variables)
  env ${setting#as it is} python -m pytest -q -n auto -m numerics "${tests[@]}" > "$log" 2>&1 || result=FAILED
  echo "$result  ${setting/LD_PRELOAD=$maker/MKL of the other maker}: $(tail -n 1 "$log"), $((SECONDS - began)) s"
  if [ $result = FAILED ]; then
    failed=$((failed + 1))
    grep -E '^(FAILED|ERROR)' "$log" | sed 's/^/        /'
  fi
done
echo "${#settings[@]} settings, $failed failed; output in $logs"
[ $failed = 0 ]
