"""Accelerator kernels of sparsejax: one op a folder, knowing nothing of sparsejax.

Every op is a public function that validates its arguments, chooses an implementation and owns
the `custom_vjp`; its `reference` module is the definition that all implementations are tested
against.
"""

__all__: list[str] = []
