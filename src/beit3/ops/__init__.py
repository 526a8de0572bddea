"""Small operations on tensors that know nothing of the model: initial values, position tables,
collectives."""
