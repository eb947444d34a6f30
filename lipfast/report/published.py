"""Figures of "1-Lipschitz Layers Compared" (Prach et al., CVPR 2024): CIFAR-10, one A100 80 GB.

Batch 256, float32, the authors' own code. LOT of size L did not fit in the memory.
"""

from __future__ import annotations

IMAGES = 50_000
BATCH_SIZE = 256
SIDE = 32

# seconds per training epoch, table of training times; sizes XS, S, M, L
EPOCH_SECONDS: dict[str, tuple[float | None, ...]] = {
    "aol": (8.6, 9.4, 19.6, 87),
    "bcop": (56.7, 57.6, 76.6, 300),
    "cayley": (20.2, 33.6, 103, 424),
    "cpl": (8.6, 9.0, 13.8, 37),
    "lot": (32.4, 106, 655, None),
    "sll": (9.8, 10.2, 20.4, 91),
    "soc": (19.4, 21.4, 35.8, 94),
}

# percent of the test images after 24 hours: accuracy, certified robust accuracy at 36/255
ACCURACY: dict[str, tuple[tuple[float, float] | None, ...]] = {
    "aol": ((71.7, 59.1), (73.6, 60.8), (73.4, 61.0), (73.7, 61.5)),
    "bcop": ((71.7, 58.5), (73.1, 59.3), (74.0, 60.5), (74.6, 61.5)),
    "cayley": ((73.1, 59.5), (74.2, 61.1), (74.4, 61.0), (73.6, 60.1)),
    "cpl": ((74.9, 62.5), (76.1, 64.2), (76.6, 65.1), (76.8, 65.2)),
    "lot": ((75.5, 63.4), (76.6, 64.6), (72.0, 58.7), None),
    "sll": ((73.7, 61.0), (74.2, 62.0), (75.3, 62.8), (74.3, 62.3)),
    "soc": ((74.1, 61.3), (75.0, 62.9), (76.9, 66.3), (76.9, 65.4)),
}

# images per second in evaluation mode, size M
INFERENCE_IMAGES_PER_SECOND = {
    "aol": 5700,
    "bcop": 4390,
    "cayley": 3890,
    "cpl": 3620,
    "lot": 3930,
    "sll": 2830,
    "soc": 439,
}

# from 1 (worst) to 5 (best): certified robust accuracy, accuracy, training time, inference time,
# training memory, inference memory
SCORES = {
    "aol": (2, 2, 4, 5, 5, 5),
    "bcop": (2, 1, 2, 5, 2, 5),
    "cayley": (1, 3, 2, 3, 2, 3),
    "cpl": (4, 4, 5, 3, 5, 5),
    "lot": (4, 4, 1, 2, 1, 1),
    "sll": (3, 1, 4, 3, 4, 5),
    "soc": (5, 5, 3, 1, 3, 5),
}
