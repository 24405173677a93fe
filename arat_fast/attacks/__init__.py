"""Attacks for any classifier: `adv = attack(images, labels)`, images in [0, 1]."""

from .pgd import PGD

__all__ = ["PGD"]
