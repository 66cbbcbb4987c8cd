"""Where each parameter of a model lies among the tensors of a Hugging Face checkpoint."""

import dataclasses
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Source:
    """One parameter, of one layer if it has several.

    name: of the tensor, with `{}` for the number of the layer.
    shape: of the tensor.
    transposed: the tensor is `[out, in]`, the parameter `[in, out]`.
    columns: the part of the tensor's last axis that is the parameter; None for all of it.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    columns: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensors of one model.

    sources: from a parameter's path to where it lies.
    n_layers: what `{}` runs over.
    ignored: matches the names of tensors that old checkpoints hold and no model reads.
    copies: tensors that may be there too if they equal another: a tied head.
    """

    sources: Mapping[str, Source]
    n_layers: int
    ignored: re.Pattern[str]
    copies: Mapping[str, str]

    def tensors(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a model of `layers` layers reads, in layer order."""
        sources = {source.name: source.shape for source in self.sources.values()}
        once = {name: shape for name, shape in sources.items() if "{}" not in name}
        stacked = {name: shape for name, shape in sources.items() if "{}" in name}
        every = {name.format(i): shape for i in range(layers) for name, shape in stacked.items()}
        return once | every

    def layer(self, name: str) -> int | None:
        """The layer that a tensor called `name` is of, or None outside the layers."""
        prefix = next(s.name for s in self.sources.values() if "{}" in s.name).split("{}")[0]
        found = re.match(rf"{re.escape(prefix)}(0|[1-9][0-9]{{0,8}})\.", name)
        return None if found is None else int(found[1])
