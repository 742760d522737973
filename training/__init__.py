"""How a step is computed: optimizer, compilation, CUDA graphs, and a look inside the model."""
