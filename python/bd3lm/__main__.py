"""Run ``bd3lm`` as ``python -m bd3lm``."""

from bd3lm.cli.main import main

main()
