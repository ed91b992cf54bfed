"""`mhmoe-np` with `--backend cuda` emulated: `python -m tests.cuda.emulated_main train ...`."""

from __future__ import annotations

from mhmoe_cli import backend as cli_backend
from mhmoe_cli.main import main
from mhmoe_np.operations.cuda import driver
from tests.cuda.emulator import install


def run() -> None:
    """The command line of this process, where a driver is said to be there."""
    install()
    driver.check_driver = cli_backend.check_driver = lambda: None
    main()


if __name__ == "__main__":
    run()
