"""Checks that the configurations of the classifiers share."""

from collections.abc import Mapping
from typing import Any, TypeVar

from sparsejax.models.llama_config import require

Config = TypeVar("Config")


def require_sizes(config: Any, *names: str) -> None:
    """Raises ValueError unless each of the fields `names` is a positive integer."""
    for name in names:
        value = getattr(config, name)
        fits = isinstance(value, int) and value > 0
        require(fits, f"{name} is {value!r}; it must be a positive integer.")


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError unless each of the fields `names` is above zero."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name} is {value}; it must be positive.")


def require_choice(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the field `name` is one of `allowed`."""
    value = getattr(config, name)
    require(value in allowed, f"{name} is {value!r}; allowed are {', '.join(allowed)}.")


def require_dtypes(config: Any) -> None:
    """Raises ValueError unless `dtype` and `param_dtype` are float32 or bfloat16."""
    for name in ("dtype", "param_dtype"):
        require_choice(config, name, ("float32", "bfloat16"))


def named(sizes: Mapping[str, Config], name: str) -> Config:
    """The entry `name` of `sizes`. Raises ValueError for an unknown one."""
    require(name in sizes, f"name is {name!r}; known are {', '.join(sizes)}.")
    return sizes[name]
