"""Every file that is read or written: checkpoints, cards, trigger, mask and sweep files, pictures."""
