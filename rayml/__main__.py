"""`python -m rayml`, where the command `rayml` is not on the path."""

from rayml.cli import main

if __name__ == "__main__":
    main()
