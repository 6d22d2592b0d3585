#!/bin/bash
# Pretrain on several machines of a Slurm cluster: srun starts torchrun once on each machine, torchrun one process for
# each GPU. Submit it in the folder of train.py:  sbatch examples/slurm/pretrain_torchrun.sh
# docs/clusters.md explains every line.
#SBATCH --job-name=dclr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

DATA=${DATA:-/shared/UCF101}
RUN=${RUN:-/shared/runs/ucf}

if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 9000))

# Five minutes before the time limit, Slurm sends USR1 to this script. The ranks then write a checkpoint and end.
# torchrun must get TERM. srun would not pass TERM on, but kill torchrun. scancel sends TERM to torchrun itself.
warned=
trap 'warned=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 \
    torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:$port" \
    train.py pretrain --data "$DATA" --preset ucf101 --out "$RUN" --resume auto &
step=$!
wait "$step"
status=$?
if [ "$warned" ]; then
    wait "$step" # USR1 has ended the first wait
    status=$?
    if [ "$status" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$status"
