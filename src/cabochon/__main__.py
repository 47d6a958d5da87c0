"""`python -m cabochon`."""

from cabochon.cli import main

main()
