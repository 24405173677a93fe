#!/usr/bin/env bash
# Everything that only a GPU can show, in under eight minutes: tests, ceilings, kernels, attacks, iterations, where
# their time goes. Installs nothing. Results go to bench/out/gpu/; the summary is printed last, so that the end of
# the output holds it all.
#
#   bench/gpu.sh                        all parts
#   PARTS="tests kernels" bench/gpu.sh  some of: tests ceilings convolutions kernels attack step128 step512
#                                      step1024 wide
#   TOTAL=570 bench/gpu.sh              seconds in all (470); what does not fit is cut short, and said
#   WHEELS=folder bench/gpu.sh          unpacks the wheels of a folder first: pydantic, tyro and what else is missing
#   DEVICE=cpu bench/gpu.sh             a rehearsal of every part on a CPU, with tiny networks
#   PYTHON=python3                      names the interpreter that holds torch and triton
set -uo pipefail
cd "$(dirname "$0")/.."
begun=$SECONDS
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
total=${TOTAL:-470}
parts=" ${PARTS:-tests ceilings convolutions kernels attack step128 step512 step1024 wide} "
out=$PWD/bench/out/gpu
mkdir -p "$out"
unset TRITON_INTERPRET
# What the tests compile; each benchmark has caches of its own, which are written while the tests run.
export TORCHINDUCTOR_CACHE_DIR=$out/caches/tests/torchinductor_cache_dir TRITON_CACHE_DIR=$out/caches/tests/triton_cache_dir

if [ "$device" = cuda ] && ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "no GPU that $python's torch can use (DEVICE=cpu rehearses without one)" >&2
    exit 2
fi
rm -rf "$out"/*.json "$out"/*.txt "$out"/*.p?? "$out/status" "$out/caches"
source bench/package.sh
has() { "$python" -c "import $1" 2>/dev/null; }
whole=1 # every dependency of training is here
"$python" -c 'import arat_fast.config, arat_fast.commands.table, tyro, tqdm' 2>/dev/null || whole=0

if [ "$device" = cuda ]; then
    model=resnet18 wide=wrn-34-10 sizes=(128 512 1024) few=(--repeats 7)
    step=(--device cuda) jobs=6 narrow=()
else
    model=resnet8 wide=resnet8 sizes=(4 8 16)
    step=(--device cpu --side 8 --steps 1 --repeats 2 --threads 1) jobs=1 few=()
    narrow=(--side 8 --steps 1 --repeats 1 --threads 1)
fi

left() { echo $((total - (SECONDS - begun))); }

# part NAME SECONDS COMMAND...: runs the command for at most SECONDS, or what is left; its output and status are kept.
part() {
    local name=$1 limit=$2 rest status
    shift 2
    [[ $parts == *" $name "* ]] || return 0
    rest=$(left)
    ((limit < rest)) || limit=$rest
    if ((limit < 10)); then
        echo "$name: not begun, no time left" >>"$out/status"
        return 0
    fi
    local started=$SECONDS
    timeout -s INT -k 15 "$limit" "$@" >"$out/$name.txt" 2>&1 # interrupted, pytest still prints what failed
    status=$?
    if ((status == 124 || status == 137)); then
        echo "$name: CUT SHORT after $limit s" >>"$out/status"
    else
        echo "$name: exit status $status, $((SECONDS - started)) s" >>"$out/status"
    fi
}
bench() { "$python" -m arat_fast.cli bench "$@"; }

mapfile -t tests < <(grep -rlE 'mark\.gpu' tests --include='test_*.py' | grep -v '^tests/kernels/')
tests+=(tests/kernels)
select=(-m gpu)
[ "$device" = cpu ] && tests=(tests/kernels/test_launches.py) select=(-m "not gpu")
if [ $whole = 0 ]; then
    echo "not every dependency is here: kernel tests, ceilings and kernels only"
    tests=(--confcutdir tests/kernels tests/kernels)
    parts=" $(echo "$parts" | grep -owE 'tests|ceilings|kernels' | tr '\n' ' ')"
fi
options=(-v -p no:cacheprovider) # a line a test: what a time limit leaves still names the failures
has pytest_timeout || options+=(-o addopts=)
has xdist && [ "$device" = cuda ] && options+=(-n 6)

# While the tests run, compile what the iterations need, each variant in a process of its own: their first
# iterations and peak memory are measured by the way.
prepare() {
    local name=$1 model=$2 batch=$3 variants=$4
    [[ $parts == *" $name "* ]] || return 0
    TORCHINDUCTOR_COMPILE_THREADS=2 bench step --prepare --model "$model" --batch "$batch" "${step[@]}" --jobs $jobs --caches "$out/caches/$name" \
        --variants "$variants" --json "$out/prepared_$name.json" >"$out/prepare_$name.txt" 2>&1
}
few_variants=eager,strong-compiled,fast
[ "$device" = cpu ] && few_variants=eager,strong,fast
background=
if [ $whole = 1 ]; then
    set -m # a process group of its own, so that all of it can be ended
    {
        prepare step128 $model "${sizes[0]}" ""
        prepare wide $wide "${sizes[0]}" $few_variants
        prepare step512 $model "${sizes[1]}" $few_variants
        prepare step1024 $model "${sizes[2]}" $few_variants
    } &
    background=$!
    set +m
fi

part tests 200 "$python" -m pytest "${options[@]}" "${select[@]}" "${tests[@]}"
if [ -n "$background" ]; then
    # Timings begin when nothing else computes; compiling gets its half of the time at most.
    while kill -0 $background 2>/dev/null && (($(left) > total / 2)); do sleep 1; done
    if kill -0 $background 2>/dev/null; then
        echo "preparation: CUT SHORT, compile times and peak memory are not complete" >>"$out/status"
        kill -- -$background 2>/dev/null
        wait $background 2>/dev/null
    fi
fi

part ceilings 30 "$python" -m arat_fast.benchmarks.ceilings --device "$device" --json "$out/ceilings.json"
[ $whole = 1 ] && part convolutions 45 "$python" -m arat_fast.cli bench convolutions --model $model \
    --batch "${sizes[0]}" --device "$device" --json "$out/convolutions.json" "${narrow[@]}"
part kernels 80 "$python" -m arat_fast.benchmarks.kernels --device "$device" --budget 45 --json "$out/kernels.json"

# iterate NAME SECONDS MODEL BATCH ARGUMENTS...
iterate() {
    local name=$1 limit=$2 model=$3 batch=$4 rest
    shift 4
    rest=$(left)
    ((limit < rest)) || limit=$rest # the budget follows what is left
    local known=()
    [ -s "$out/prepared_$name.json" ] && known=(--prepared "$out/prepared_$name.json")
    part "$name" "$limit" "$python" -m arat_fast.cli bench step --model "$model" --batch "$batch" "${step[@]}" \
        --no-memory "${known[@]}" --caches "$out/caches/$name" --budget $((limit * 2 / 3)) --json "$out/$name.json" "$@"
}
iterate step128 110 $model "${sizes[0]}"
export TORCHINDUCTOR_CACHE_DIR=$out/caches/step128/all/torchinductor_cache_dir
export TRITON_CACHE_DIR=$out/caches/step128/all/triton_cache_dir
part attack 60 "$python" -m arat_fast.cli bench attack --model $model --batch "${sizes[0]}" "${step[@]}" "${few[@]}" \
    --json "$out/attack.json"
iterate step512 60 $model "${sizes[1]}" --variants $few_variants,fast-folded "${few[@]}"
iterate wide 60 $wide "${sizes[0]}" --variants $few_variants,fast-folded "${few[@]}"
iterate step1024 60 $model "${sizes[2]}" --variants $few_variants "${few[@]}"

# The pictures are drawn where there is matplotlib; there is no harm where not.
records=$(ls "$out"/step*.json "$out"/wide.json "$out"/attack.json "$out"/kernels.json 2>/dev/null)
[ -n "$records" ] && has matplotlib && [ $whole = 1 ] &&
    "$python" -m arat_fast.cli bench plots $records --out "$out" >/dev/null 2>"$out/plots.txt"

"$python" - "$out" <<'PYTHON'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
found = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
(out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
PYTHON
(cd "$out" && tar -czf logs.tar.gz -- *.txt status)

echo "== kernels"
cat "$out/kernels.txt" 2>/dev/null
for name in wide step1024 step512 attack; do
    [ -s "$out/$name.txt" ] && echo "== $name" && sed '/where the time goes/,$d' "$out/$name.txt"
done
if [ -s "$out/step128.txt" ]; then
    echo "== step128"
    # Of the profiles only those of the fast iterations.
    awk '/^[a-z-]+: where the time goes/ {skip = !($1 == "fast:" || $1 == "fast-folded:")} !skip' "$out/step128.txt"
fi
echo "== ceilings"
cat "$out/ceilings.txt" "$out/convolutions.txt" 2>/dev/null
echo "== tests"
grep -E '(FAILED|ERROR).*::|::.*(FAILED|ERROR)' "$out/tests.txt" 2>/dev/null | cut -c1-200 | sort -u | head -n 20
tail -n 1 "$out/tests.txt" 2>/dev/null
echo "== parts, $((SECONDS - begun)) s in all; figures in ${out#"$PWD"/}/results.json, output in logs.tar.gz"
cat "$out/status"
! grep -qE 'CUT SHORT|exit status [^0]|not begun' "$out/status"
