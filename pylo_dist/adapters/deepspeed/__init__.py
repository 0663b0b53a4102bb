"""DeepSpeed's partitions: the optimizer on them, and the checkpoints. Imports nothing."""
