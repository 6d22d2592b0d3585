#!/bin/bash
# Pretrain on several machines of a Slurm cluster: srun starts one process for each GPU, without another launcher.
# Submit it in the folder of train.py:  sbatch examples/slurm/pretrain_srun.sh
# docs/clusters.md explains every line.
#SBATCH --job-name=dclr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

DATA=${DATA:-/shared/UCF101}
RUN=${RUN:-/shared/runs/ucf}

if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Five minutes before the time limit, Slurm sends USR1 to this script. The ranks then write a checkpoint and end.
warned=
trap 'warned=yes; kill -USR1 "$step"' USR1

srun --kill-on-bad-exit=1 \
    python train.py pretrain --data "$DATA" --preset ucf101 --out "$RUN" --resume auto &
step=$!
wait "$step"
status=$?
if [ "$warned" ]; then
    wait "$step" # USR1 has ended the first wait
    status=$?
    if [ "$status" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$status"
