"""`python -m jtl` is the command `jtl`."""

from jtl.cli import main

if __name__ == "__main__":
    main()
