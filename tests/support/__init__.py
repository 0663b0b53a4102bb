"""What tests and benchmarks share: ranks, golden numbers, models, layouts. Holds no test."""
