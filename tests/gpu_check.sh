#!/usr/bin/env bash
# Trains on one GPU, kills, continues and compares, in less than ten minutes: tests/gpu_check.sh [PYTHON]
#
# PYTHON has this template's requirements and TensorFlow for the GPU. Each run is made twice: straight, and
# killed (SIGKILL) in the middle and continued. Deterministic runs must end with the same bytes; of the others,
# only that they end. The last lines are rates, as ratios to model.fit. CPU=1 tries the script without a GPU.
set -eu -o pipefail
cd "$(dirname "$0")/.."
here=$PWD
python=$(realpath -s "${1:-.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${CPU:-}" ]; then
  "$python" -c 'import tensorflow as tf; assert tf.config.list_physical_devices("GPU"), "TensorFlow sees no GPU"'
fi
"$python" -m cookiecutter "$here" --no-input --default-config -o "$work" git_init=false > /dev/null
cd "$work"/*/

cat > src/gpu_check.py << 'PYTHON'
"""Kills the process at a step, and photographs of the shape of CIFAR's."""
import os
import signal

import numpy as np

from engine.batches import ArrayBatches
from engine.hooks import Hook
from src.data import Dataset


class Kill(Hook):
    def next_step(self, global_step):
        return int(os.environ.get("KILL_AT", 10**9))

    def after_step(self, global_step, last_results):
        if str(global_step) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)


def photographs(config):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (3840, 32, 32, 3), np.uint8)
    labels = draw.integers(0, 10, 3840).astype(np.uint8)
    prepare = lambda batch: batch.astype(np.float32) / 255
    train = ArrayBatches(images[:3200], labels[:3200], config["batch_size"], config["seed"], prepare)
    test = prepare(images[3200:]), labels[3200:]
    return Dataset(train, test, lambda: test, (32, 32, 3), 10)
PYTHON

failed=0
check() { # NAME EXACT WORDS…: straight and killed; EXACT is 1 where the bytes must be the same
  local name=$1 exact=$2 start=$SECONDS
  shift 2
  set -- "$@" '--hooks=[{class: src.gpu_check.Kill}]'
  "$python" bin/train.py "$1" "results/$name/straight" "${@:2}" > "$work/$name.log" 2>&1 \
    || { echo "$name: FAILED: $(tail -1 "$work/$name.log")"; failed=1; return; }
  KILL_AT=45 "$python" bin/train.py "$1" "results/$name/killed" "${@:2}" > "$work/$name.log" 2>&1 \
    && { echo "$name: FAILED: it was not killed"; failed=1; return; }
  "$python" bin/train.py "$1" "results/$name/killed" "${@:2}" > "$work/$name.log" 2>&1 \
    || { echo "$name: FAILED: $(tail -1 "$work/$name.log")"; failed=1; return; }
  local verdict=identical file
  for file in model.h5 history.csv; do
    cmp -s "results/$name/straight/$file" "results/$name/killed/$file" || verdict=differs
  done
  [ "$exact" = 0 ] || [ "$verdict" = identical ] || failed=1
  echo "$name: $verdict ($((SECONDS - start)) s)"
}

often=(--num_epochs=2 --checkpoint_steps=10 --no_tensorboard)
photographs=(--dataset=src.gpu_check:photographs --batch_size=64 --n_layers=3 --no_augmented "${often[@]}")
check digits 1 digits "${often[@]}"
check photographs 1 root "${photographs[@]}"
check mixed_precision 1 root --precision=mixed_float16 "${photographs[@]}"
check iterator 1 iterator_trainer --num_epochs=2 -p ckpt_freq 10
check not_deterministic 0 root --no_deterministic "${photographs[@]}"
check xla 0 root --no_deterministic --jit_compile "${photographs[@]}"

cd "$here"
"$python" benchmarks/loop.py fit cifar --pairs=2 || echo "the rates were not measured"
exit "$failed"
