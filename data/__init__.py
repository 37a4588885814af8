"""Images in memory: datasets, the split, augmentation and triggers."""
