"""The ground floor: what this process may use of the machine, and how to use it well.

Cores and memory, number formats, the allocator, the compiler and its cache, and files that are
never half written. Nothing here knows what a language model is.
"""
