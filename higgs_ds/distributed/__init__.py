"""Many processes as one: DeepSpeed, the process group, the watch over the ranks."""
