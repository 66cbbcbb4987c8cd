"""`python -m experiments.benchmarks.kernels`."""

import experiments.benchmarks.kernels
from experiments.benchmarks.kernels.block_sparse_attention import attention_groups
from experiments.benchmarks.kernels.block_sparse_matmul import block_sparse_matmul_groups
from experiments.benchmarks.kernels.common import Config
from experiments.benchmarks.kernels.nm_matmul import nm_decode_groups, nm_prefill_groups
from experiments.benchmarks.kernels.sparse_ffn import expert_union_groups, sparse_ffn_groups
from experiments.benchmarks.kernels.statistical_topk import topk_relu_groups, topk_sort_groups
from experiments.benchmarks.suite import run_suite

PRESETS = {
    "laptop": Config("laptop", rounds=31, slow_rounds=15, min_seconds=0.01),
    "test": Config("test", rounds=2, slow_rounds=2, min_seconds=1e-4),
}
BUILDERS = (
    topk_sort_groups,
    topk_relu_groups,
    attention_groups,
    nm_decode_groups,
    nm_prefill_groups,
    sparse_ffn_groups,
    expert_union_groups,
    block_sparse_matmul_groups,
)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes `<out>/benchmarks/kernels.json`."""
    run_suite(
        "kernels",
        experiments.benchmarks.kernels.__doc__,
        PRESETS,
        BUILDERS,
        lambda config: "kernels",
        arguments,
    )


if __name__ == "__main__":
    main()
