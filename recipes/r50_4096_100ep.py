"""ResNet-50, batch 4096, 100 epochs of ImageNet.

Paper        the official code's preset
Data, hardware and command as recipes/r50_4096.py
Time         the paper's 8 hours for 1000 epochs, in proportion; not measured here
Expected     no published figure
"""

from recipes.r50_4096 import shortened

recipe = shortened(epochs=100, base_lr=0.45, base_tau=0.99)
