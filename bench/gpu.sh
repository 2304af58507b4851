#!/usr/bin/env bash
# Everything that only a CUDA machine can show, in one run: the kernel tests compiled, training steps beside the peers, and
# whether LoRA learns as in fp32; if asked, every architecture's contract. Needs python3 (or $PYTHON) with torch, triton, transformers
# and peft; nothing is installed or downloaded.
#
#   bench/gpu.sh [-s site.tgz] [-o OUT] [-k SECONDS] [-t SECONDS] [-l SECONDS] [part ...]
#
#   -s  an archive of further packages (peers, say); unpacked beside OUT and put on PYTHONPATH
#   -o  where tables, plots and logs go (default bench/out)
#   -k  time limit of the kernel tests (default 240), -t of each training table (600), -l of the curves (300)
#   parts: kernels train ckpt full curve micro coverage (default: kernels train curve); every table is printed again at the end
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out="$root/bench/out" site="" kernels_s=240 train_s=600 curve_s=300
while getopts "s:o:k:t:l:h" option; do
  case $option in
    s) site=$OPTARG ;; o) out=$OPTARG ;; k) kernels_s=$OPTARG ;; t) train_s=$OPTARG ;; l) curve_s=$OPTARG ;;
    *) sed -n '2,11p' "$0"; exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || set -- kernels train curve
mkdir -p "$out" && out=$(cd "$out" && pwd)
if [ -n "$site" ]; then
  mkdir -p "$out/site" && tar xzf "$site" -C "$out/site" || exit 2
  export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
unset TRITON_INTERPRET
"${PYTHON:-python3}" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device: use make bench-cpu")' || exit 2

status=0 logs=()
# part NAME SECONDS COMMAND...: run under a limit, keep the log, go on whatever happens
part() {
  local name=$1 limit=$2; shift 2
  echo "== $name (at most $limit s)"
  if timeout --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>"$out/$name.err"; then echo "   done in ${SECONDS} s since the start"
  else echo "   $name: exit code $?"; tail -n 15 "$out/$name.err" "$out/$name.log"; status=1; fi
  logs+=("$out/$name.log")
}
train() { part "$1" "$train_s" "${PYTHON:-python3}" "$root/bench/train.py" --out "$out" --name "$1" --timeout "$((train_s / 2))" "${@:2}"; }

cd "$root"
for name in "$@"; do
  case $name in
    kernels) part kernel-tests "$kernels_s" "${PYTHON:-python3}" -m pytest tests/kernels -m "not slow" -p no:cacheprovider -x --tb=short ;;
    train)
      train llama8b-lora --model llama8b --systems eager,inductor,liger,sloth --profile
      train llama1b-lora --model llama1b --batch 4 --systems eager,liger,sloth ;;
    ckpt) train llama8b-lora-ckpt --model llama8b --ckpt --systems eager,liger,unsloth,sloth ;;
    full) train llama1b-full --model llama1b --mode full --batch 4 --systems eager,inductor,liger,sloth ;;
    curve) part lora-curve "$curve_s" "${PYTHON:-python3}" "$root/bench/curve.py" --out "$out" ;;
    micro) part kernel-rates "$train_s" "${PYTHON:-python3}" -m pytest bench/kernels.py -p no:cacheprovider --benchmark-columns=median ;;
    coverage) part coverage "$train_s" "${PYTHON:-python3}" -m slothc coverage --all --peft lora --dtype bf16 --device cuda --jobs "$(nproc)" \
      --json "$out/coverage.json" --html "$out/coverage.html" --resume ;;
    *) echo "unknown part $name; known: kernels train ckpt full curve micro coverage"; exit 2 ;;
  esac
done
for log in "${logs[@]}"; do
  printf '\n######## %s\n' "$(basename "$log" .log)"
  case $log in *kernel-tests.log) tail -n 3 "$log" ;; *kernel-rates.log) grep '^|' "$log" ;; *) cat "$log" ;; esac
done
exit $status
