#!/usr/bin/env bash
# The paper's recipe on CIFAR-10, in pieces of under nine minutes: call it until it exits with 0 (3: more to do).
#
#   bench/train_cifar10.sh DATA              DATA holds cifar-10-batches-bin or -py
#   ALIASED=1 bench/train_cifar10.sh DATA    as the authors' code: the attack's start is added to the clean batch too
#   PIECE=520       seconds of one call: training stops in time, saves, and the next call goes on with the same batches,
#                   crops and attack starts (on a CPU bit for bit; a GPU adds up in another order each time)
#   CONFIG=arat-cifar10-resnet18             the recipe
#   AUTOATTACK_IMAGES=1000                   AutoAttack and its 10-iteration setting, on the first so many test images
#   AUTOATTACK_BATCH=1000                    images at a time; without it 250 on a GPU of less than 40 GB, or a CPU
#   EXTRA="--epochs 20"                      further flags of `arat-fast train`
#   RUN=runs/..., OUT=bench/out/...          the run, and its small results
#   WHEELS=folder   unpacks the wheels of a folder first, as bench/gpu.sh does
#   PYTHON=python3
#
# Clean accuracy and PGD-20 on all test images. The results: config, metrics, evaluations, and the weights in half
# precision in parts of under 16 MiB (bench/pack_run.py), which are packed before AutoAttack begins. A rehearsal of it all
# on a CPU:
#
#   EXTRA="--device cpu --model resnet8 --epochs 1 --limit-train 256" AUTOATTACK_IMAGES=2 RUN=runs/rehearsal \
#       OUT=bench/out/rehearsal PIECE=3000 bench/train_cifar10.sh DATA
set -uo pipefail
cd "$(dirname "$0")/.."
begun=$SECONDS
python=${PYTHON:-python3}
config=${CONFIG:-arat-cifar10-resnet18}
aliased=${ALIASED:-0}
name=$config$([ "$aliased" = 1 ] && echo -aliased)
run=${RUN:-runs/bench-$name}
out=${OUT:-bench/out/$name}
piece=${PIECE:-520}
images=${AUTOATTACK_IMAGES:-1000}
read -ra extra <<<"${EXTRA:-}"
[ -n "${1:-}" ] && extra+=(--data-root "$1")
[ "$aliased" = 1 ] && extra+=(--attack.aliased-start)
[[ $out == /* ]] || out=$PWD/$out
mkdir -p "$out"
source bench/package.sh
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/runs/.compiled}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/runs/.compiled-triton}
if ! "$python" -c 'import pyautoattack' 2>/dev/null; then
    echo "AutoAttack needs pyautoattack, which $python lacks: install it, or give its wheel in WHEELS" >&2
    exit 2
fi
arat() { timeout --preserve-status -s INT -k 40 "$(left)" "$python" -m arat_fast.cli "$@"; }
left() { echo $((piece - (SECONDS - begun))); }
later() {
    echo "$1: call again ($((SECONDS - begun)) s used)"
    exit 3
}

if [ ! -e "$out/trained" ]; then
    arat train --config "$config" --run-dir "$run" --resume --no-evaluate "${extra[@]}"
    status=$?
    cp "$run"/config.json "$run"/environment.json "$run"/metrics.jsonl "$out" 2>/dev/null
    [ $status = 130 ] && later "training goes on"
    [ $status = 0 ] || exit $status
    touch "$out/trained"
fi
device=()
[[ " ${extra[*]} " == *" --device cpu "* ]] && device=(--device cpu)

# evaluate FILE SECONDS ARGUMENTS...: once, and only where SECONDS are left.
evaluate() {
    local file=$out/$1 need=$2 given status
    shift 2
    [ -e "$file" ] && return 0
    given=$(left)
    ((given >= need)) || later "no time left for $(basename "$file")"
    arat evaluate "$run" "${device[@]}" --json "$file" "$@"
    status=$?
    if [ $status = 130 ] && ((given < piece * 9 / 10)); then
        later "$(basename "$file") was cut short"
    elif [ $status = 130 ]; then
        echo "$(basename "$file") takes longer than PIECE=$piece: give more, or fewer AUTOATTACK_IMAGES or a smaller" \
            "AUTOATTACK_BATCH" >&2
    fi
    [ $status = 0 ] || exit $status
}
evaluate pgd20.json $((piece / 8)) --attacks clean,pgd20
[ -e "$out/manifest.json" ] || "$python" bench/pack_run.py "$run" "$out" || exit 1
# A thousand images of ResNet-18 take some 25 GB; small batches, most of their images lost early, leave a GPU idle.
large='import torch; assert torch.cuda.get_device_properties(0).total_memory >= 40e9'
[ ${#device[@]} -gt 0 ] && large=false
batch=${AUTOATTACK_BATCH:-$("$python" -c "$large" 2>/dev/null && echo 1000 || echo 250)}
evaluate autoattack.json $((piece / 2)) --attacks clean,pgd20,autoattack --limit "$images" --batch-size "$batch"
evaluate autoattack10.json $((piece / 8)) --attacks autoattack10 --limit "$images" --batch-size "$batch"
echo "complete: $out"
