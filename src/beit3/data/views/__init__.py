"""From a decoded image to what a network sees: transforms, augmentation, masks."""
