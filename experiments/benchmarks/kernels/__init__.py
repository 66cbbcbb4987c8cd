"""What the ops of pallas_kernels cost, against what plain JAX offers for the same work.

`python -m experiments.benchmarks.kernels` times each in turns with its alternatives, in the
implementation that the device gets by default, and prints one table, or with `--only` a part of it.
"""
