"""`pyquiet train`: teach a model to think, to fill in, to remove noise, or to judge."""

import argparse

from pyquiet.cli import train_any_subset, train_diffusion, train_energy, train_quiet_star
from pyquiet.cli.options import add_commands


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "teach a model to think, to fill in, to remove noise or to judge"
    parser = commands.add_parser("train", help=what, description=f"{what.capitalize()}.")
    methods = add_commands(parser, "methods")
    for method in (train_quiet_star, train_any_subset, train_diffusion, train_energy):
        method.add_parser(methods)
