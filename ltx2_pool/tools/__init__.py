"""What serving does not need: plan, doctor, status, local stack, tiny checkpoints, benchmarks."""
