"""The number that the model sees for each level of a uint8 pixel. Both backends look it up in this one table.

Compilers turn the division by 255 into a product with its rounded reciprocal, which shifts every pixel of a picture the
same way; on small models that doubled the distance of the actions from exact arithmetic.
"""

import numpy as np

PIXEL_VALUES = np.arange(256, dtype=np.float32) / np.float32(255) * 2 - 1
"""(256,) float32: level / 255 · 2 - 1, each operation rounded as openpi's are."""
