"""`python -m clsa_cli`: the same as the console script `clsa`."""

from clsa_cli.main import main

if __name__ == "__main__":
    main()
