"""Accuracy of trained networks: clean, under PGD, under AutoAttack."""
