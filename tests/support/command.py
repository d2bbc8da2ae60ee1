"""The command cm in this process."""

from flows import cli


def run(capsys, *argv):
    """Run `cm` in this process; return exit code, stdout, stderr."""
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()
