"""Street View House Numbers (Netzer et al. 2011), cropped digits: 73,257 training and 26,032 test images of
32 x 32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arat_fast.errors import UserError
from arat_fast.loaders.images import ImageSet


def load_svhn(root: str | None) -> tuple[ImageSet, ImageSet]:
    """(train, test) from train_32x32.mat and test_32x32.mat in `root`, through torchvision.

    With no root, ./data is used and the set is downloaded there when absent. Raises UserError for missing or
    damaged files (checksum), or where scipy is missing.
    """
    from arat_fast.loaders.torchvision_import import torchvision

    folder = Path(root or "data")
    sets = []
    for split in ("train", "test"):
        file = folder / f"{split}_32x32.mat"
        try:
            loaded = torchvision.datasets.SVHN(str(folder), split=split, download=root is None)
        except ImportError:
            raise UserError("the data set svhn is read with scipy: pip install scipy") from None
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            found = "is damaged (checksum)" if file.exists() else "is missing"
            raise UserError(
                f"{file} {found}: {error}; put the cropped digits' train_32x32.mat and test_32x32.mat there"
            ) from None
        images = np.ascontiguousarray(loaded.data.transpose(0, 2, 3, 1))
        sets.append(ImageSet(images, np.asarray(loaded.labels, np.int64), 10, str(file)))
    return sets[0], sets[1]
