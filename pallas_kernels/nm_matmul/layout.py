"""Where the entries of a compressed weight lie: what every implementation reads them by.

`W` is the dense weight `[r, c]` with groups of m along r, of which n entries each are stored:
`values` `[r*n/m, c]`, and their positions as a stream of bits along r in `packed`
`[ceil(r*n/m * bits / 8), c]`, the first in the low bits. The positions of a group differ.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Pattern:
    """n of every m entries are stored.

    A unit is the fewest groups whose positions fill whole bytes: 2 groups and one byte for 2:4,
    4 groups and three bytes for 2:8.
    """

    n: int
    m: int

    @property
    def bits(self) -> int:
        """Of a position."""
        return (self.m - 1).bit_length()

    @property
    def unit(self) -> int:
        """Groups of a unit."""
        return 8 // math.gcd(self.n * self.bits, 8)

    @property
    def unit_bytes(self) -> int:
        """Bytes of the positions of a unit, along r."""
        return self.unit * self.n * self.bits // 8

    @property
    def straddles(self) -> bool:
        """Whether a position can lie in two bytes."""
        return self.bits > 0 and 8 % self.bits != 0

    def dense_rows(self, values: Array) -> int:
        """r, by the stored values."""
        return values.shape[0] // self.n * self.m

    def packed_rows(self, stored: int) -> int:
        """Bytes that hold the positions of so many stored entries."""
        return -(-stored * self.bits // 8)


def positions(packed: Array, count: int, pattern: Pattern) -> Array:
    """`[count, c]` positions 0 to m-1, uint8."""
    if pattern.bits == 0:
        return jnp.zeros((count, packed.shape[1]), jnp.uint8)
    first = jnp.arange(count, dtype=jnp.int32) * pattern.bits
    byte, shift = first // 8, (first % 8).astype(jnp.uint8)[:, None]
    found = packed[byte] >> shift
    if pattern.straddles:
        after = packed[jnp.minimum(byte + 1, packed.shape[0] - 1)]
        # in two steps: a shift by all 8 bits is not defined
        found |= (after << (7 - shift)) << jnp.uint8(1)
    return found & jnp.uint8(2**pattern.bits - 1)


def choose(leaves: Sequence[Array], bits: Sequence[Array]) -> Array:
    """The leaf at the position with these bits, lowest first."""
    for bit in bits:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = [jnp.where(bit, p[1], p[0]) if len(p) == 2 else p[0] for p in pairs]
    return leaves[0]


def as_bits(values: Array) -> Array:
    """bfloat16 as the bit patterns that XLA on CPU moves well, all else as it is."""
    return lax.bitcast_convert_type(values, jnp.uint16) if values.dtype == jnp.bfloat16 else values


def precise(dtype: jnp.dtype) -> jnp.dtype:
    """Of sums: float32, or float64 for float64."""
    return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def wide(bits: Array) -> Array:
    """What `as_bits` gave, in the precision of sums."""
    if bits.dtype == jnp.uint16:
        return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    return bits.astype(precise(bits.dtype))
