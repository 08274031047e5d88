"""What every stage runs on: jobs, storage, scheduling, the cluster and progress."""
