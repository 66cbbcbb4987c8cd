"""Beyond l1: natural images under penalties nearer to l0 need fewer active neurons.

Paper: Rentzeperis, Calatroni, Perrinet and Prandi, "Beyond l1 sparse coding in V1" (PLoS
Computational Biology 2023). Expected: at equal reconstruction error l1 has a denser code than the
other penalties; all of them learn cells that are selective for orientation.

Every penalty learns a dictionary from the same start on the same patches. Penalties are compared at
equal error, not at equal weight: l1's active atoms are interpolated over the log of its error.
"""

MINUTES = {"laptop": "5", "test": "0.2", "paper": "checked abstractly"}
