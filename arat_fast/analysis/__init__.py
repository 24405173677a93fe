"""Why a method works: gradient conflict, mixture distribution, effective margin, trade-off, accuracy over
eps.
"""
