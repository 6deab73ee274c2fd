"""`python -m rayml.cli` is `rayml`."""

from rayml.cli import main

if __name__ == "__main__":
    main()
