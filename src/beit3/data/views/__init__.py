"""From a decoded image to the network's input: preprocessing, augmentation, masking."""
