#!/usr/bin/env bash
# One run on a SLURM cluster that takes machines back:
#
#     sbatch examples/slurm.sh configs/text.yaml run_name=text seed=0
#
# The job stops before its time limit, or when it is preempted, and submits itself again. The same
# command continues from the checkpoint. Submit it from the repository's root.
#SBATCH --job-name=rmaat
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# 225 minutes leave room for a validation before --time. SIGTERM, which preemption sends too, saves a
# checkpoint and exits with 143.
srun timeout --foreground --preserve-status -s TERM 225m \
  .venv/bin/python run_train.py --config "$@" --resume
status=$?
case $status in
  143) scontrol requeue "$SLURM_JOB_ID" ;;
  *) exit $status ;;
esac
