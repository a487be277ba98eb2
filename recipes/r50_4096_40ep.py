"""ResNet-50, batch 4096, 40 epochs of ImageNet.

Paper        This is a preset of the official code.
Data, hardware and command are as in recipes/r50_4096.py.
Time         The paper's 8 hours for 1000 epochs, in proportion. It has not been measured here.
Expected     No figure is published.
"""

from recipes.r50_4096 import shortened

recipe = shortened(epochs=40, base_lr=0.45, base_tau=0.97)
