"""Images in memory: datasets, the split, augmentation, triggers and attacks."""
