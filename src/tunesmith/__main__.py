"""`python -m tunesmith`: the command line, by the interpreter that is named."""

from .cli import main

if __name__ == "__main__":
    main()
