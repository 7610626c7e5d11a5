"""Will it fit: the memory of a training step and of an answer, before a weight is loaded."""
