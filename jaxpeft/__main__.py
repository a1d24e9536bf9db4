"""`python -m jaxpeft` is the `jaxpeft` command."""

from jaxpeft import cli

if __name__ == "__main__":  # worker processes import this module
    cli.main()
