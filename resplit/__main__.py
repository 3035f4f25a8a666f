"""`python -m resplit` is the command `resplit`."""

from resplit.cli import main

if __name__ == "__main__":
    main()
