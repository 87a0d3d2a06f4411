"""Running the command line inside a test."""

import pytest

from undertow_cli import main


def call(capsys, *arguments):
    """(exit status, stdout, stderr) of one command, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return end.value.code, said.out, said.err
