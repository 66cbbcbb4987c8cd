"""The command line of every experiment."""

import contextlib
import io
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from experiments.harness.config import (
    Experiment,
    ExperimentError,
    as_arguments,
    read_config,
)
from experiments.harness.run import InterruptedRunError, execute


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> None:
    """Runs an experiment from the command line and exits.

    Exit status: 0, 2 for a mistake of the user (one line on stderr), 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        execute(experiment, parse(experiment, arguments))
    except InterruptedRunError as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def parse(experiment: Experiment, arguments: Sequence[str]) -> Any:
    """Settings from command-line arguments.

    `--preset NAME` chooses the defaults, without it `--model` does: `pretrained` for a model that
    is loaded, else `laptop`. `--variant NAME` chooses among an experiment's variants, each with
    presets of its own. `--resume DIR` takes the settings of that run.

    Raises:
      ExperimentError: in one line, an unknown flag (with the likely one), a bad value or preset.
    """
    arguments = list(arguments)
    resume = _value_of(arguments, "--resume")
    if resume is not None:
        if len(arguments) > 2 - any("=" in a for a in arguments):
            raise ExperimentError("--resume takes its settings from the run: give no other flag")
        folder = pathlib.Path(resume)
        values = read_config(folder / "config.json")
        arguments = as_arguments({**values, "resume": str(folder)})
    name = _value_of(arguments, "--preset") or _default_preset(experiment, arguments)
    description = experiment.paper
    if experiment.variants:
        name, arguments = _of_variant(experiment, name, arguments)
        description += f"\n\n--variant chooses what is trained: {', '.join(experiment.variants)}."
    if name not in experiment.presets:
        known = ", ".join(experiment.presets)
        raise ExperimentError(f"preset is {name!r}; {experiment.slug} has {known}")
    import tyro

    default = experiment.presets[name]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                type(default),
                default=default,
                args=arguments,
                prog=f"python -m experiments.{experiment.slug}",
                description=description,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ExperimentError(_condense(complaint.getvalue())) from None


def _default_preset(experiment: Experiment, arguments: Sequence[str]) -> str:
    from experiments.harness.language import is_pretrained

    loaded = "pretrained" in experiment.presets and is_pretrained(_value_of(arguments, "--model"))
    return "pretrained" if loaded else "laptop"


def _of_variant(
    experiment: Experiment, preset: str, arguments: Sequence[str]
) -> tuple[str, list[str]]:
    """The name of a variant's preset, and the arguments with that instead of both flags."""
    variant = _value_of(arguments, "--variant")
    if variant is None:
        return preset, list(arguments)
    if variant not in experiment.variants:
        known = ", ".join(experiment.variants)
        raise ExperimentError(f"variant is {variant!r}; {experiment.slug} has {known}")
    if variant != experiment.variants[0]:
        preset = variant if preset == "laptop" else f"{variant}_{preset}"
    kept = _without(_without(arguments, "--variant"), "--preset")
    return preset, [*kept, "--preset", preset]


def one_line(error: Exception) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None


def _without(arguments: Sequence[str], flag: str) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != flag and not argument.startswith(flag + "="):
            kept.append(argument)
        skip = argument == flag
    return kept


def _condense(text: str) -> str:
    """tyro's framed complaint on one line."""
    words = [line.strip(" │╭╮╰╯─|+") for line in text.splitlines()]
    kept = [w for w in words if w and not set(w) <= set("-─") and not w.startswith("For full help")]
    if len(kept) > 1 and kept[1].lower().startswith((kept[0].lower(), "error parsing")):
        kept = kept[1:]
    return re.sub(r"\s+", " ", " ".join(kept))
