#!/usr/bin/env bash
# One stage on several nodes, a torchrun on each: sbatch --nodes 2 infra/slurm/stage.sh student
# Submitted from a workspace on a shared file system, with its .venv, recipe (`cm use`) and inputs in out/.
#SBATCH --job-name=consistency
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
# SIGTERM comes five minutes before the time is over: every rank stops after the same step, rank 0 saves the state.
# When a rank is lost all nodes end by themselves; srun need not kill them.
set -euo pipefail
stage=${1:?stage, such as student}
source .venv/bin/activate
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280 OMP_NUM_THREADS=4
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_PER_NODE" --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head_node:29500" -m flows.stage_runner.worker "$stage"
dvc commit --force "$stage"
