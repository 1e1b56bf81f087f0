"""The command line in a process of its own: ``python tests/cli_process.py demo --help``."""

from support import define_torchvision_operators

define_torchvision_operators()

if __name__ == "__main__":
    from manifold_mixup.lab.cli import main

    main()
