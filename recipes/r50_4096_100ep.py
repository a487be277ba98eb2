"""ResNet-50, batch 4096, 100 epochs of ImageNet.

Paper        This is a preset of the official code.
Data, hardware and command are as in recipes/r50_4096.py.
Time         The paper's 8 hours for 1000 epochs, in proportion. It has not been measured here.
Expected     The paper has no figure. The authors of SimSiam (arXiv 2011.10566, table 4) reach 66.5
             linear top-1 after 100 epochs of batch 4096 with a BYOL of their own.
"""

from recipes.r50_4096 import shortened

recipe = shortened(epochs=100, base_lr=0.45, base_tau=0.99)
