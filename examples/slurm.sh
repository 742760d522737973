#!/usr/bin/env bash
# One run on a SLURM cluster that takes machines back:
#
#     sbatch examples/slurm.sh configs/text.yaml run_name=text seed=0
#
# The job ends itself before its time is up, or when it is preempted, and queues itself again; the
# same command goes on from the checkpoint. Submit from the repository's root.
#SBATCH --job-name=rmaat
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Less than --time by what an evaluation may take; a preempted job gets SIGTERM and saves as well.
srun .venv/bin/python run_train.py --config "$@" --resume max_minutes=225
status=$?
case $status in
  75 | 143) scontrol requeue "$SLURM_JOB_ID" ;;  # out of time, or preempted: to be gone on with
  *) exit $status ;;
esac
