"""Small models, made on the spot, whose layers differ the way large ones do."""

from jenga.demo.catalogue import NAMES, RECALL, Made, make, make_reporting
from jenga.demo.folder import DemoModelError

__all__ = ["NAMES", "RECALL", "DemoModelError", "Made", "make", "make_reporting"]
