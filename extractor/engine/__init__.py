"""Who runs the shards of one job: this process alone, a process a device of this machine, or torchrun's and Slurm's."""
