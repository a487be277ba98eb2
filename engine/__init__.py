"""The training engine: networks, augmentation, optimizers and the training loop."""
