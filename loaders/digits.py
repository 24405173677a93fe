"""Handwritten digits: 1,797 real 8x8 grey images that scikit-learn bundles (UCI optical recognition, test
part).
"""

from __future__ import annotations

import numpy as np

from arat_fast.errors import UserError
from arat_fast.loaders.images import ImageSet


def load_digits() -> tuple[ImageSet, ImageSet]:
    """(train, test). Every fifth image of a class is for testing; grey levels 0 to 16 become 0 to 255.

    Raises UserError when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError:
        raise UserError(
            "the data set digits comes with scikit-learn: pip install 'arat-fast[digits]'"
        ) from None
    images, labels = bundled(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int64)
    is_test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        is_test[np.flatnonzero(labels == digit)[4::5]] = True
    source = "scikit-learn's digits"
    return (
        ImageSet(grey[~is_test], labels[~is_test], 10, source),
        ImageSet(grey[is_test], labels[is_test], 10, source),
    )
