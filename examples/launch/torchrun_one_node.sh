#!/bin/sh
# One video over all GPUs of this machine (or over RANKS processes on its CPU, to try it).
#
#   examples/launch/torchrun_one_node.sh "A cat walks on the grass" --model hunyuanvideo-community/HunyuanVideo
#
# Any number of ranks: those that divide the heads (24 for HunyuanVideo) share them out, the rest is a ring.
set -eu
PYTHON="${PYTHON:-python}"
RANKS="${RANKS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}"

# One thread a rank on the CPU, unless told otherwise: ranks that fight for cores wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# --standalone picks a free port, so that several jobs fit on one machine; --max-restarts 0: a rank that fails ends all.
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$RANKS" --max-restarts=0 \
    -m hvcompile generate "$@"
