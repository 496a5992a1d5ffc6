#!/bin/sh
# One video over several machines: run this on every one of them, with the same arguments.
#
#   HEAD=10.0.0.1 NODES=2 examples/launch/torchrun_several_nodes.sh "A cat walks on the grass" --model MODEL
#
# HEAD is the address of one of the machines, which the others reach on PORT. It need not have rank 0, which alone writes
# the video: torchrun numbers the machines in the order of their full host names as text ("node10" before "node9"), so
# --output is best in a folder that all share. (--node-rank, 0 on the machine that is to write, has a say only with
# --rdzv-backend=static, and HEAD is then that machine.) The model, its weights and hvcompile must be the same
# everywhere. Each attention exchanges its whole input and output: over a network slower than InfiniBand, give
# every machine a prompt of its own instead.
set -eu
: "${HEAD:?give HEAD, the address of one of the machines}" "${NODES:?give NODES, the number of machines}"
PYTHON="${PYTHON:-python}"
RANKS="${RANKS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$RANKS" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${JOB:-hvcompile}" \
    -m hvcompile generate "$@"
