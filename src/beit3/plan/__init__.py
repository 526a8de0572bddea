"""What a run will take before it is started: memory, micro-batch, time, cost."""
