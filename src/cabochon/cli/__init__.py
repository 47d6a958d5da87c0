"""The `cabochon` command. Data goes to stdout, everything said to a person to stderr.

Exit status: 0 done; 1 the checkpoint is refused; 2 wrong usage, or something that cannot be read
or served; 3 too little memory; 70 a fault of ours; 130 interrupted. A file here is a command, which
`app` lists; torch and FastAPI are imported inside of those that need them, so that the others start
at once.
"""

from cabochon.cli.app import main

__all__ = ["main"]
