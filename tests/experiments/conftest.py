"""Fixtures that the tests of experiments share."""

import pytest

from experiments.harness import cli


@pytest.fixture
def error_of(tmp_path, capsys):
    """`(experiment, arguments, preset="test")`: the one line with which the command refuses."""

    def run(experiment, arguments, preset="test"):
        chosen = [] if "--preset" in arguments else ["--preset", preset]
        with pytest.raises(SystemExit) as stop:
            cli.main(experiment, [*chosen, "--out", str(tmp_path), *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run
