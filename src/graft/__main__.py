"""`python -m graft` is the program `graft`."""

from graft.cli import main

if __name__ == "__main__":
    main()
