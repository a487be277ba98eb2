#!/usr/bin/env bash
# What the first machine with a GPU shall show, unattended and without a network, in 25 minutes:
#
#     OUT=/some/folder tests/gpu_day.sh
#
# Every part runs under a timeout of its own, so one that hangs costs only itself. $OUT/gpu_day.json
# is written anew after every part. The tests run while the networks compile, and all that measures
# runs alone. With CIFAR10=FOLDER, a folder of shards with train/ and test/,
# the last part trains on CIFAR-10, and otherwise on drawn images of the same size. A second call
# with the same OUT continues that training. GPU_DAY_FAST=1 runs every command on a CPU at a tiny
# size, to see that they all run. PYTHON names the Python. PARTS names the only parts that shall run,
# and the others stay in the file as they are.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:?OUT is not set: give a folder for the results}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -z "${PARTS:-}" ]; then rm -f "$OUT/gpu_day.json"; fi

fast=${GPU_DAY_FAST:-}
if [ -n "$fast" ]; then
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
    step="--batch 4 --steps 1 --rounds 1 --threads 1"
    half="$step --precision bf16" small="quickstart $step"
    checkpoint="--recipe recipes/quickstart.py --rounds 1 --starts 0"
    views="--images 5 --batch 5 --size 32 --rounds 1 --threads 1"
    peers="--size 32 --batch 4 --steps 1 --rounds 1"
    most="--most 16 --threads 1"
    photos=8 drawn=64 drawn_size=32
    profile="quickstart --batch.size 8 --threads 1 --no-compile --precision fp32 --steps 3"
    profile+=" --profile 2:3" few="$step --batch 2"
    profile_small="$profile --data.streams 2"
    train="--batch.size 8 --threads 1 --no-compile --precision fp32 --data.streams 2 --steps 3"
    train+=" --model.encoder.width 0.0625"
else
    step="--steps 8 --rounds 5"
    half="$step --precision bf16" small="cifar10 --precision bf16 --steps 40 --rounds 3"
    checkpoint="--rounds 3 --starts 0"
    views="--images 2000 --batch 100 --rounds 5"
    peers="--rounds 5"
    most=""
    photos=1024 drawn=50000 drawn_size=32
    profile="r50_256 --precision bf16 --steps 14 --profile 10:12"
    profile_small="cifar10 --steps 54 --profile 51:52 --log.every 10" few="$half --batch 64"
    few+=" --no-compile"
    train="--checkpoint.every 200"
fi

# part NAME SECONDS COMMAND...: run it, keep what it prints, and note how it ended.
part() {
    local name=$1 seconds=$2 start code
    shift 2
    if [ -n "$fast" ]; then seconds=$((seconds * 5)); fi
    if [ -n "${PARTS:-}" ] && [[ " $PARTS " != *" $name "* ]]; then return; fi
    echo "$(date +%T) $name: $*"
    rm -f "$OUT/$name.rows.json"
    start=$(date +%s.%N)
    timeout --signal=TERM --kill-after=20 "$seconds" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    "$PYTHON" tests/helpers/gpu_day.py "$OUT" "$name" "$code" "$start" "$seconds" "$@"
}

bench() { # bench NAME SECONDS BENCH OPTIONS...
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" "$PYTHON" launch/bench.py "$@" --out "$OUT/$name.rows.json"
}

# Options are words without spaces.
# shellcheck disable=SC2086
{
    part draw 60 "$PYTHON" tests/helpers/gpu_day.py draw "$OUT/data" $photos $drawn $drawn_size
    plain="--probe.every 0 --probe.no-baseline"
    big="--data.train $OUT/data/photos --data.val $OUT/data/photos --data.streams 2 $plain"
    data=${CIFAR10:-$OUT/data/cifar10}
    little="--data.train $data/train --data.val $data/test"
    # A ResNet-50 compiles for three minutes, and beside the tests for four and a half. Later parts
    # find it compiled.
    if [ -z "$fast" ]; then
        part compile_r50 300 "$PYTHON" launch/train.py r50_256 --precision bf16 --steps 2 \
            --run "$OUT/compile_r50" $big &
        part compile_cifar10 200 "$PYTHON" launch/train.py cifar10 --steps 2 \
            --run "$OUT/compile_cifar10" $little $plain &
    fi
    # Only these files, because to collect all takes half a minute and needs every package. Pytest
    # itself ends the session in time, so that it still tells what failed. Compilers take most of
    # the time, so several processes share the GPU.
    part tests 300 "$PYTHON" -m pytest -n 5 -vv --tb=short --timeout 200 --session-timeout 280 \
        -m gpu $(grep -rl --include='test_*.py' 'pytest\.mark\.gpu' tests)
    wait
    if [ -z "$fast" ]; then bench step_compiled 190 step $half --compile --no-fresh; fi
    part profile 90 "$PYTHON" launch/train.py $profile --run "$OUT/profile" $big
    bench peers 120 peers $peers --no-fresh
    bench largest 70 largest $most
    bench views 50 input $views
    bench checkpoint 60 checkpoint $checkpoint
    # Few images for each GPU, and small ones, are a matter of the host that starts the kernels.
    # There a CUDA graph should help.
    bench step_few 120 step $few --cuda-graph
    bench step_small 150 step --recipe $small --cuda-graph --no-fresh
    part profile_small 90 "$PYTHON" launch/train.py $profile_small --run "$OUT/profile_small" \
        $little $plain
    part cifar10 90 "$PYTHON" launch/train.py cifar10 $train --run "$OUT/cifar10" $little
}
echo "$(date +%T) the figures are in $OUT/gpu_day.json"
