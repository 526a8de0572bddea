"""The tour of the embedded world, and the long comparison of training with and without
pretraining."""
