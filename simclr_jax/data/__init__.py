"""Data: sources of images, the order of batches, augmentation."""
