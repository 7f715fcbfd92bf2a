"""FlashLM in notebooks: understand, train, measure and run a ternary (1.58-bit) language model on a CPU.

Data flows one way through the modules: config -> corpus -> vocab -> tokens -> model -> training ->
checkpoint -> evaluation and generation. `python -m flashlm_helpers --help` is the command line.
"""

__version__ = "0.1.0"
