"""`pctrain doctor`: check that this machine and these ranks can train, and say how to fix what cannot.

Under torchrun it checks every rank and measures the interconnect between them. It exits with status 1 if anything is
wrong.
"""

from pctrain.tools.doctor.command import main
from pctrain.tools.doctor.findings import Finding, combined
from pctrain.tools.doctor.host import machine
from pctrain.tools.doctor.libraries import imports
from pctrain.tools.doctor.variables import environment
from pctrain.tools.doctor.versions import CUDA, PACKAGES, PYTHONS, Package, packages

__all__ = (
    "CUDA",
    "PACKAGES",
    "PYTHONS",
    "Finding",
    "Package",
    "combined",
    "environment",
    "imports",
    "machine",
    "main",
    "packages",
)
