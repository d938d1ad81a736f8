"""`python -m swaa_local` is `swaa-local`."""

from swaa_local.cli.main import main

if __name__ == "__main__":
    main(prog_name="swaa-local")
